"""Other frameworks' plugins run as they are: `import slime`, `vime`, `miles` give our modules.

`install()` turns that on in this process and in the Python processes that it starts. A training run
does so before it loads hooks (`--no-compat-imports` turns it off); anything else runs under it with
`python -m dovetail.compat script.py`, `-m pytest ...` or `-c CODE`. An installed package, or a
directory of that name on the path, is never shadowed.
"""

from dovetail.compat.finder import install, installed, uninstall

__all__ = ["install", "installed", "uninstall"]
