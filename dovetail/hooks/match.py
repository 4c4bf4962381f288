"""Which call form a function has: by count and kind of its parameters, then the first name."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dovetail.hooks.spec import CallForm, HookSpec, Kind
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


@dataclass(frozen=True)
class Match:
    """How a user's object is called."""

    form: CallForm
    keywords: tuple[str, ...]
    """Those of the form's named values and keywords that this function takes."""
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
    if spec.kind is Kind.OBJECT:
        return Match(spec.forms[0], (), None)
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
    chosen, notice = _choose(fitting, target, family)
    shape = _shape_for(target, chosen)
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


def _has(target: type, name: str) -> bool:
    """Whether instances of it have this method."""
    if name == "__call__":
        return _own_call(target) is not None
    return callable(getattr(target, name, None))


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


def _shape_for(target: Any, form: CallForm) -> Shape:
    """The parameters that the form's values meet: those of the constructor, if it makes something,
    else those of the call."""
    if form.makes:
        return _shape(target)
    return _shape(_callee(target), skip_self=inspect.isclass(target))


def _misfit(target: Any, form: CallForm) -> str | None:
    """What keeps `target` from being called in this form; None: nothing."""
    is_class = inspect.isclass(target)
    if form.makes and is_class:
        lacking = [name for name in form.makes if not _has(target, name)]
        if lacking:
            return f"your class has no {' and no '.join(lacking)}"
    elif not is_class and form.construct is not None:
        return "yours is not a class"
    elif is_class and _own_call(target) is None:
        return "your class has no __call__"
    elif is_class and _construct(target, form) is None:
        wanted = " or ".join(f"({', '.join(values)})" for values in _constructors(form))
        return f"your __init__ can't be called with {wanted}"
    return _difference(_shape_for(target, form), form)


def _constructors(form: CallForm) -> tuple[tuple[str, ...], ...]:
    return ((), ("args",)) if form.construct is None else (form.construct,)


def _construct(target: Any, form: CallForm) -> tuple[str, ...] | None:
    if not inspect.isclass(target) or form.makes:
        return None
    shape = _shape(target)
    for values in _constructors(form):
        meant = values != ("args",) or (shape.positional and _is_args(shape.positional[0]))
        if meant and _difference(shape, CallForm(families=(), positional=values)) is None:
            return values
    return None


def _is_args(parameter: inspect.Parameter) -> bool:
    return parameter.name in _ARGS_NAMES or _annotation(parameter).endswith("Namespace")


def _difference(shape: Shape, form: CallForm) -> str | None:
    given, keywords = form.positional, (*form.named, *form.keywords)
    if len(given) > len(shape.positional) and not shape.var_positional:
        extra = given[len(shape.positional) :]
        return f"yours has no place for {_quoted(extra)}"
    for name, parameter in zip(given, shape.positional, strict=False):
        if parameter.name in keywords:
            return f"your {parameter.name!r} stands where {name!r} is passed"
    unfilled = [*shape.positional[len(given) :], *shape.keyword_only]
    by_name = [name for name in keywords if not _only_by_position(shape, name)]
    missing = [p.name for p in unfilled if p.default is p.empty and p.name not in by_name]
    takes_any = shape.var_keyword or bool({p.name for p in unfilled} & set(form.named))
    if not missing and form.named and not takes_any:
        return f"yours names none of {_quoted(form.named)}"
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        return f"yours requires {_quoted(missing)}, which {verb} not passed"
    for name, parameter in zip(given, shape.positional, strict=False):
        if parameter.name != name and parameter.name in given:
            return f"your {parameter.name!r} stands where {name!r} is passed"
    return None


def _only_by_position(shape: Shape, name: str) -> bool:
    kinds = {parameter.name: parameter.kind for parameter in shape.positional}
    return kinds.get(name) is inspect.Parameter.POSITIONAL_ONLY


def _quoted(names: Any) -> str:
    return " and ".join(repr(name) for name in names)


def _choose(
    fitting: list[CallForm], target: Any, family: str | None
) -> tuple[CallForm, str | None]:
    telling = [(form, last) for form in fitting if (last := _telling(target, form)) is not None]
    annotated = [form for form, last in telling if _annotation(last) in form.told_by]
    # A name speaks where the annotation speaks for no form.
    named = [
        form
        for form, last in telling
        if last.name in form.told_by and "list[list[" not in _annotation(last)
    ]
    silent = [form for form in fitting if not form.told_by]
    fitting = annotated or named or silent or fitting
    agreeing = {form: _agreement(_shape_for(target, form), form) for form in fitting}
    best = max(agreeing.values())
    if best > (False, 0):
        return next(form for form in fitting if agreeing[form] == best), None
    if family is None and all(_shape_for(target, form).var_positional for form in fitting):
        # The flags are the slime family's spelling, so that is whose form is meant.
        foreign = [form for form in fitting if "slime" in form.families] or fitting
        return foreign[0], (
            f"takes any arguments; it is called as {foreign[0].label}: {foreign[0].signature}. "
            "Write native: before the path for the native form"
        )
    exact = [form for form in fitting if len(form.positional) == _shape_for(target, form).required]
    return (exact or fitting)[0], None


def _agreement(shape: Shape, form: CallForm) -> tuple[bool, int]:
    """Whether the first parameter, and how many of all, are named as the form names them.

    A function that says `args` first agrees with no form that passes something else there, and the
    other way round.
    """
    same = [
        parameter.name == name or (name == "args" and _is_args(parameter))
        for name, parameter in zip(form.positional, shape.positional, strict=False)
    ]
    named = {p.name for p in (*shape.positional, *shape.keyword_only)} & set(form.named)
    first = same[0] if same else bool(named)
    return first, sum(same) + len(named)


def _telling(target: Any, form: CallForm) -> inspect.Parameter | None:
    """The parameter whose annotation or name may speak for this form: its last one."""
    positional, last = _shape_for(target, form).positional, len(form.positional) - 1
    return positional[last] if form.told_by and last < len(positional) else None


def _annotation(parameter: inspect.Parameter) -> str:
    """Without modules and blanks: `list[Sample]`; empty when there is none."""
    found = parameter.annotation
    if found is parameter.empty:
        return ""
    text = found if isinstance(found, str) else inspect.formatannotation(found)
    bare = re.sub(r"[\w.]+\.(?=\w)", "", text.replace(" ", "").strip("'\""))
    return bare.replace("List[", "list[")


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
    bare = _annotation(parameter)
    if bare:
        is_list = any(word in bare.lower() for word in ("list[", "sequence[", "group"))
        if is_list != (bare == "Sample"):
            # A union of both says nothing.
            return None if "|" in bare or "Union" in bare else is_list
    if parameter.name in _GROUP_NAMES:
        return True
    return False if parameter.name == "sample" else None


def _keywords(shape: Shape, form: CallForm) -> tuple[str, ...]:
    taken = {parameter.name for parameter in (*shape.positional, *shape.keyword_only)}
    named = (name for name in form.named if shape.var_keyword or name in taken)
    everything = form.to_var_keywords and shape.var_keyword
    return (*named, *(name for name in form.keywords if everything or name in taken))


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
