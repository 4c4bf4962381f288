"""Reads a JSON object of a request, field by field, and says exactly what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import takewhile
from typing import Any

_SHOWN = 80


class RequestError(Exception):
    """A request that can't be answered: becomes a JSON answer with this HTTP status."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        field: str | None = None,
        got: Any = None,
        expected: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.field, self.got, self.expected = status, field, got, expected
        self.retry_after_s = retry_after_s
        """When it may go better; None: not said."""


def wrong(field: str, got: Any, expected: str) -> RequestError:
    """The error for one field."""
    text = shown(got)
    message = f"{field}: got {text}, expected {expected}"
    return RequestError(message, field=field, got=text, expected=expected)


def shown(value: Any) -> str:
    """A value as Python writes it, of a large one the beginning alone."""
    text = repr(_beginning(value, [_SHOWN]))
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def _beginning(value: Any, left: list[int]) -> Any:
    """What of a value the first `left[0]` characters are made of, or some more."""
    left[0] -= 1
    if isinstance(value, str):
        return value[: _SHOWN + 1]
    if isinstance(value, list):
        return [_beginning(one, left) for one in takewhile(lambda _: left[0] >= 0, value)]
    if isinstance(value, Mapping):
        some = takewhile(lambda _: left[0] >= 0, value.items())
        return {name[: _SHOWN + 1]: _beginning(one, left) for name, one in some}
    return value


@dataclass(frozen=True)
class Shape:
    """What a value looks like whose reader checks it further: for the description of requests."""

    schema: Mapping[str, Any]
    """A JSON Schema."""
    sample: Any = None
    """A value that its reader takes; None: nothing does as well."""
    required: bool = False


class Fields:
    """A JSON object, read by names. After the last read, `finish` refuses names nobody asked for.

    Example:
        >>> fields = Fields({"max_new_token": 4}, "sampling_params.")
        >>> fields.integer("max_new_tokens", 128)
        128
        >>> fields.finish()
        Traceback (most recent call last):
        dovetail.router.fields.RequestError: sampling_params.max_new_token: no such field; did you \
mean 'max_new_tokens'?
    """

    def __init__(self, values: Any, path: str = "") -> None:
        if not isinstance(values, dict | Mapping):
            raise wrong(path.rstrip(".") or "body", values, "a JSON object")
        self._values, self._path = values, path
        self._known: set[str] = set()

    @property
    def values(self) -> Mapping[str, Any]:
        """The whole object."""
        return self._values

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    def is_null(self, name: str) -> bool:
        """Whether it is there, as null."""
        return name in self._values and self._values[name] is None

    def raw(self, name: str, default: Any = None, shape: Shape | None = None) -> Any:
        """The value as it came; null counts as absent. `shape` is for readers of the code and of
        the description; whoever asks checks."""
        self._known.add(name)
        value = self._values.get(name)
        return default if value is None else value

    def integer(
        self, name: str, default: int | None, least: int | None = None, most: int | None = None
    ) -> int | None:
        """A whole number within bounds."""
        value = self.raw(name, default)
        bounds = _bounds("a whole number", least, most)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or _outside(value, least, most):
            raise self.wrong(name, value, bounds)
        return value

    def number(
        self, name: str, default: float, least: float | None = None, most: float | None = None
    ) -> float:
        """A finite number within bounds."""
        value = self.raw(name, default)
        plain = isinstance(value, int | float) and not isinstance(value, bool)
        if not plain or value != value or _outside(value, least, most):
            raise self.wrong(name, value, _bounds("a number", least, most))
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """true or false."""
        value = self.raw(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, value, "true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str | None:
        """A string."""
        value = self.raw(name, default)
        if value is not None and not isinstance(value, str):
            raise self.wrong(name, value, "a string")
        return value

    def choice(self, name: str, words: Sequence[str]) -> str | None:
        """One of these words."""
        value = self.raw(name)
        if value is not None and value not in words:
            raise self.wrong(name, value, f"one of {', '.join(words)}")
        return None if value is None else str(value)

    def texts(self, name: str, most: int | None = None) -> tuple[str, ...]:
        """A string or a list of them, none of them empty."""
        value = self.raw(name, [])
        many = [value] if isinstance(value, str) else value
        self._check_count(name, many, most)
        if not isinstance(many, list) or not all(isinstance(one, str) and one for one in many):
            raise self.wrong(name, value, "a string or a list of strings, none of them empty")
        return tuple(many)

    def ids(self, name: str, *, required: bool = False, most: int | None = None) -> tuple[int, ...]:
        """A list of token ids."""
        value = self.raw(name, [])
        self._check_count(name, value, most)
        if not is_ids(value):
            raise self.wrong(name, value, "a list of token ids (whole numbers from 0)")
        if required and not value:
            raise self.wrong(name, value, "a list of one token id or more")
        return tuple(value)

    def table(self, name: str) -> Fields:
        """An object inside this one; absent counts as empty."""
        return Fields(self.raw(name, {}), f"{self._path}{name}.")

    def tables(self, name: str, count: int) -> list[Fields]:
        """One object inside this one for each of `count` things: a list of them, or one for
        all."""
        value = self.raw(name, {})
        many = value if isinstance(value, list) else [value] * count
        if len(many) != count:
            raise self.wrong(name, value, f"one for each of the {count} prompts")
        return [Fields({} if one is None else one, f"{self._path}{name}.") for one in many]

    def refuse(self, reason: str, **neutral: Any) -> None:
        """Fields that this server can't serve: only their neutral value passes."""
        for name, value in neutral.items():
            got = self.raw(name, value)
            if got != value and got not in ([], {}, "", False):
                raise self.wrong(name, got, f"{value!r} or nothing: {reason}")

    def ignore(self, *names: str) -> None:
        """Fields without an effect on what is generated."""
        self._known.update(names)

    def finish(self) -> None:
        """Refuse unknown names.

        Raises:
            RequestError: there is one; the message has the nearest known name.
        """
        for name, value in self._values.items():
            if name in self._known:
                continue
            near = get_close_matches(str(name), self._known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise RequestError(
                f"{self._path}{name}: no such field{hint}",
                field=f"{self._path}{name}",
                got=shown(value),
                expected=f"one of {', '.join(sorted(self._known))}",
            )

    def _check_count(self, name: str, many: Any, most: int | None) -> None:
        if most is not None and isinstance(many, list) and len(many) > most:
            raise self.wrong(name, f"{len(many)} of them", f"at most {most}")

    def wrong(self, name: str, got: Any, expected: str) -> RequestError:
        """The error for a field of this object."""
        return wrong(f"{self._path}{name}", got, expected)


def is_ids(value: Any) -> bool:
    """Whether it is a list of whole numbers from 0."""
    # Prompts have thousands: a look at each of them in Python takes longer than all the rest.
    return isinstance(value, list) and (
        not value or (set(map(type, value)) == {int} and min(value) >= 0)
    )


def is_objects(value: Any) -> bool:
    """Whether it is a list of JSON objects."""
    return isinstance(value, list) and all(isinstance(one, dict) for one in value)


def _outside(value: float, least: float | None, most: float | None) -> bool:
    return (least is not None and value < least) or (most is not None and value > most)


def _bounds(kind: str, least: float | None, most: float | None) -> str:
    if least is None and most is None:
        return kind
    if most is None:
        return f"{kind} >= {least}"
    return f"{kind} from {'-inf' if least is None else least} to {most}"
