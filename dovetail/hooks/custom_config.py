"""`custom_config_path`: a plugin's own settings, as attributes of its `args`."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from dovetail.config.aliases import ALIASES
from dovetail.config.leaves import cure, leaves
from dovetail.types import ConfigError

_INLINE = "base64:"


def custom_config(path: str | None, known: Collection[str] = ()) -> dict[str, Any]:
    """The keys of a YAML file, or of YAML written as `base64:...`.

    Args:
        path: the leaf's value; None has no keys.
        known: attributes that `args` has already.

    Raises:
        ConfigError: it can't be read, is no mapping, or has a key that is known.
    """
    if path is None:
        return {}
    import yaml

    inline = path.startswith(_INLINE) and len(path) > 80
    where = f"custom_config_path {path[:77] + '...' if inline else path}"
    try:
        found = yaml.safe_load(_text(path, where))
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not YAML: {error}") from None
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise ConfigError(
            f"{where}: got a {type(found).__name__}, expected a mapping of names to values, e.g. "
            "`max_turns: 3`"
        )
    check_keys(found, where, known)
    return found


def check_keys(found: Iterable[str], where: str, known: Collection[str]) -> None:
    """Refuse names that are no attributes, or are taken.

    Raises:
        ConfigError: the message names both places.
    """
    for key in found:
        _check_key(key, where, known)


def _text(path: str, where: str) -> str:
    try:
        if path.startswith(_INLINE):
            return base64.b64decode(path.removeprefix(_INLINE), validate=True).decode()
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, binascii.Error) as error:
        raise ConfigError(
            f"{where} can't be read: {error}; {cure('custom_config_path', 'FILE.yaml')}"
        ) from None


def _check_key(key: str, where: str, known: Collection[str]) -> None:
    if key.startswith("__") or not key.isidentifier():
        raise ConfigError(f"{where}: {key!r} can't be an attribute; use letters, digits and _")
    if key not in known and key != "learn":
        return
    leaf = leaves().get(ALIASES[key].leaf if key in ALIASES else key)
    if leaf is not None:
        other = f"is set by {leaf.flag} (TOML: {leaf.key})"
    else:
        other = "is an attribute that args has of itself"
    raise ConfigError(f"{where} sets {key!r}, which {other}; give it another name, or take it out")
