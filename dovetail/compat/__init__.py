"""Other frameworks' plugins run as they are: `import slime`, `vime`, `miles` give our modules.

`install()` turns that on in this process and in the Python processes that it starts. A training run
does so before it loads hooks (`--no-compat-imports` turns it off); anything else runs under it with
`python -m dovetail.compat script.py`, `-m pytest ...` or `-c CODE`. An installed package, or a
directory of that name on the path, is never shadowed.
"""

import sys

from dovetail.compat.finder import install, installed, uninstall

__all__ = ["install", "installed", "start_run", "uninstall"]


def start_run() -> None:
    """`install`, and forget what an earlier run of this process left in the foreign modules."""
    install()
    fully_async = sys.modules.get("dovetail.compat.modules.fully_async")
    if fully_async is not None:
        fully_async.stop_worker()
    misc = sys.modules.get("dovetail.compat.modules.misc")
    rollout = sys.modules.get("dovetail.compat.modules.rollout")
    if misc is not None and rollout is not None:
        misc.SingletonMeta.forget(rollout.GenerateState)
