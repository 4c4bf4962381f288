"""The servers of this process that want a token, for the clients that this process has itself: the
helpers that functions of the slime family post with find it here."""

from __future__ import annotations

from urllib.parse import urlsplit

_TOKENS: dict[str, str] = {}
"""By host and port."""


def learn(address: str, token: str) -> None:
    """There is a server at `host:port`."""
    _TOKENS[address] = token


def forget(address: str) -> None:
    """It is closed."""
    _TOKENS.pop(address, None)


def headers_for(url: str) -> dict[str, str]:
    """What a request to this address has to send; nothing, where the server is not one of ours."""
    token = _TOKENS.get(urlsplit(url).netloc) if _TOKENS else None
    return {} if token is None else {"Authorization": f"Bearer {token}"}
