"""The user's code: one table of hooks; loading, matching and adapting what stands behind a path.

path --load--> object --match (count and kind of parameters, then first name)--> call form
     --adapt--> a callable in the native form of its slot, which the owner of the slot calls
"""

from dovetail.hooks.args_view import ArgsView
from dovetail.hooks.bind import BoundHook, bind, bind_hooks
from dovetail.hooks.load import register
from dovetail.hooks.spec import CallForm, HookSpec
from dovetail.hooks.table import HOOKS, spec_of

__all__ = [
    "HOOKS",
    "ArgsView",
    "BoundHook",
    "CallForm",
    "HookSpec",
    "bind",
    "bind_hooks",
    "register",
    "spec_of",
]
