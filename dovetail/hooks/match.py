"""Which call form a function has: by count and kind of its parameters, then the first name."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dovetail.hooks.spec import CallForm, HookSpec
from dovetail.types import HookError

_ARGS_NAMES = ("args", "_args", "arguments", "config", "cfg", "_")
_GROUP_NAMES = ("samples", "group", "groups", "batch", "sample_list", "sample_group")
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@dataclass(frozen=True)
class Shape:
    """The parameters of a callable, as far as matching looks at them."""

    positional: tuple[inspect.Parameter, ...]
    var_positional: bool
    keyword_only: tuple[inspect.Parameter, ...]
    var_keyword: bool

    @property
    def required(self) -> int:
        """Positional parameters without a default."""
        return sum(parameter.default is parameter.empty for parameter in self.positional)

    @property
    def first_name(self) -> str | None:
        """The name of the first positional parameter."""
        return self.positional[0].name if self.positional else None


@dataclass(frozen=True)
class Match:
    """How a user's object is called."""

    form: CallForm
    keywords: tuple[str, ...]
    """Those of the form's keywords that this function takes."""
    construct: tuple[str, ...] | None
    """For a class: the values of its constructor."""
    notice: str | None = None
    """Worth telling the user: the form was taken although others fit too."""


def match(
    target: Any,
    spec: HookSpec,
    *,
    family: str | None = None,
    batched: bool | None = None,
    path: str | None = None,
) -> Match:
    """The call form of `spec` that `target` has.

    `family` leaves only that family's forms. `batched` is what the run will hand over where a slot
    has plain and batched forms. `path` is where the target came from, for messages.

    Raises:
        HookError: it is not callable, or no form fits; the message shows the user's signature and,
            for each accepted form, what differs.
    """
    if not callable(target):
        raise HookError(
            f"{spec.where}: {path or repr(target)} is of type {type(target).__name__}, not a "
            "function, class or callable object"
        )
    forms = [form for form in spec.forms if family is None or family in form.families]
    misfits = {form: _misfit(target, form) for form in forms}
    fitting = [form for form in forms if misfits[form] is None]
    if not fitting:
        raise HookError(_explain(target, spec, misfits, family))
    shape = _call_shape(target)
    chosen, notice = _choose(fitting, shape, family)
    if any(form.batched for form in spec.forms):
        chosen = _plain_or_batched(chosen, fitting, shape, bool(batched), spec, target)
    return Match(chosen, _keywords(shape, chosen), _construct(target, chosen), notice)


def describe(target: Any) -> str:
    """`async def name(parameters)` at file:line."""
    prefix = "class " if inspect.isclass(target) else ""
    if not prefix:
        prefix = "async def " if is_async(target) else "def "
    name = getattr(target, "__qualname__", None) or f"{type(target).__qualname__}.__call__"
    try:
        signature = str(_signature(_callee(target)))
    except (TypeError, ValueError):
        signature = "(...)"
    return f"{prefix}{name}{signature} at {place(target)}"


def place(target: Any) -> str:
    """`file:line` of the definition."""
    inner = inspect.unwrap(_without_partial(target))
    if not (inspect.isroutine(inner) or inspect.isclass(inner)):
        inner = type(inner)
    try:
        return f"{inspect.getsourcefile(inner)}:{inspect.getsourcelines(inner)[1]}"
    except (OSError, TypeError):
        return getattr(inner, "__module__", None) or "an unknown place"


def is_async(target: Any) -> bool:
    """Whether calling it (or an instance of it) gives a coroutine."""
    inner = _without_partial(_callee(target))
    return inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(
        getattr(inner, "__call__", None)  # noqa: B004 - the method itself is asked about
    )


def _without_partial(target: Any) -> Any:
    while isinstance(target, functools.partial):
        target = target.func
    return target


def _callee(target: Any) -> Any:
    """What is called per use: the function, or the `__call__` of a class's instances."""
    return _own_call(target) or target if inspect.isclass(target) else target


def _own_call(target: type) -> Callable[..., Any] | None:
    # Attribute lookup on a class without `__call__` finds its metaclass's.
    return next((k.__dict__["__call__"] for k in target.__mro__ if "__call__" in k.__dict__), None)


def _shape(target: Any, *, skip_self: bool = False) -> Shape:
    try:
        parameters = list(_signature(target).parameters.values())
    except (TypeError, ValueError):
        # A builtin that tells nothing takes what comes.
        return Shape((), True, (), True)
    if skip_self and parameters and parameters[0].kind in _POSITIONAL:
        parameters = parameters[1:]
    kinds = {parameter.kind for parameter in parameters}
    return Shape(
        tuple(p for p in parameters if p.kind in _POSITIONAL),
        inspect.Parameter.VAR_POSITIONAL in kinds,
        tuple(p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY),
        inspect.Parameter.VAR_KEYWORD in kinds,
    )


def _signature(target: Any) -> inspect.Signature:
    """A wrapper's own parameters, or the wrapped function's where it takes anything."""
    own = inspect.signature(target, follow_wrapped=False)
    vague = all(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in own.parameters.values())
    return inspect.signature(target) if vague else own


def _call_shape(target: Any) -> Shape:
    return _shape(_callee(target), skip_self=inspect.isclass(target))


def _misfit(target: Any, form: CallForm) -> str | None:
    """What keeps `target` from being called in this form; None: nothing."""
    if not inspect.isclass(target):
        if form.construct is not None:
            return "yours is not a class"
        return _difference(_shape(target), form.positional, form.keywords)
    if _own_call(target) is None:
        return "your class has no __call__"
    if _construct(target, form) is None:
        wanted = " or ".join(f"({', '.join(values)})" for values in _constructors(form))
        return f"your __init__ can't be called with {wanted}"
    return _difference(_call_shape(target), form.positional, form.keywords)


def _constructors(form: CallForm) -> tuple[tuple[str, ...], ...]:
    return ((), ("args",)) if form.construct is None else (form.construct,)


def _construct(target: Any, form: CallForm) -> tuple[str, ...] | None:
    if not inspect.isclass(target):
        return None
    shape = _shape(target)
    for values in _constructors(form):
        meant = values != ("args",) or shape.first_name in _ARGS_NAMES
        if meant and _difference(shape, values, ()) is None:
            return values
    return None


def _difference(shape: Shape, given: tuple[str, ...], keywords: tuple[str, ...]) -> str | None:
    if len(given) > len(shape.positional) and not shape.var_positional:
        extra = given[len(shape.positional) :]
        return f"yours has no place for {_quoted(extra)}"
    for name, parameter in zip(given, shape.positional, strict=False):
        if parameter.name in keywords:
            return f"your {parameter.name!r} stands where {name!r} is passed"
    unfilled = [*shape.positional[len(given) :], *shape.keyword_only]
    missing = [p.name for p in unfilled if p.default is p.empty and p.name not in keywords]
    verb = "is" if len(missing) == 1 else "are"
    return f"yours requires {_quoted(missing)}, which {verb} not passed" if missing else None


def _quoted(names: Any) -> str:
    return " and ".join(repr(name) for name in names)


def _choose(
    fitting: list[CallForm], shape: Shape, family: str | None
) -> tuple[CallForm, str | None]:
    first = "args" if shape.first_name in _ARGS_NAMES else shape.first_name
    named = [form for form in fitting if form.positional[:1] == (first,)]
    if named:
        return named[0], None
    if shape.var_positional and family is None:
        # The flags are the slime family's spelling, so that is whose form is meant.
        foreign = [form for form in fitting if "slime" in form.families] or fitting
        return foreign[0], (
            f"takes any arguments; it is called as {foreign[0].label}: {foreign[0].signature}. "
            "Write native: before the path for the native form"
        )
    exact = [form for form in fitting if len(form.positional) == shape.required]
    return (exact or fitting)[0], None


def _plain_or_batched(
    chosen: CallForm,
    fitting: list[CallForm],
    shape: Shape,
    batched: bool,
    spec: HookSpec,
    target: Any,
) -> CallForm:
    """One sample or a group: by annotation, then by the parameter's name, then by the run."""
    position = len(chosen.positional) - 1
    declared = (
        _takes_group(shape.positional[position]) if position < len(shape.positional) else None
    )
    if declared and not batched:
        raise HookError(
            f"{spec.where}: {describe(target)} takes a group of samples, but the run hands over "
            "one at a time; add --group-rm (TOML: reward.group_rm = true)"
        )
    wanted = batched if declared is None else declared
    same = [form for form in fitting if len(form.positional) == len(chosen.positional)]
    return next(form for form in same if form.batched == wanted)


def _takes_group(parameter: inspect.Parameter) -> bool | None:
    """Whether a parameter says that it takes a list of samples; None: it does not say."""
    annotation = parameter.annotation
    if annotation is not parameter.empty:
        text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
        bare = text.replace(" ", "")
        is_list = any(word in bare.lower() for word in ("list[", "sequence[", "group"))
        if is_list != (bare.rpartition(".")[2] == "Sample"):
            # A union of both says nothing.
            return None if "|" in bare or "Union" in bare else is_list
    if parameter.name in _GROUP_NAMES:
        return True
    return False if parameter.name == "sample" else None


def _keywords(shape: Shape, form: CallForm) -> tuple[str, ...]:
    taken = {parameter.name for parameter in (*shape.positional, *shape.keyword_only)}
    everything = form.to_var_keywords and shape.var_keyword
    return tuple(name for name in form.keywords if everything or name in taken)


def _explain(
    target: Any, spec: HookSpec, misfits: dict[CallForm, str | None], family: str | None
) -> str:
    forced = f" of the family {family!r}" if family else ""
    lines = [
        f"{spec.where}: the function fits no call form{forced}.",
        f"  yours: {describe(target)}",
    ]
    lines += [f"  {form.label}: {form.signature} - {why}" for form, why in misfits.items()]
    return "\n".join(lines)
