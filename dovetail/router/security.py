"""Who may ask: clients of this machine, under a name of this machine, with the token where there is
one; no page in somebody's browser."""

from __future__ import annotations

import hmac
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Receive, Scope, Send

from dovetail.config.router_rules import is_loopback
from dovetail.config.sections.router import RouterConfig
from dovetail.router.fields import RequestError
from dovetail.router.respond import failure
from dovetail.types import ConfigError

_LOCAL = ("127.0.0.1", "localhost", "::1")
OPEN_PATHS = frozenset({"/health", "/v1/health", "/ping", "/liveness", "/readiness"})
"""What GET tells without the token: that somebody is there."""
_HERE = (b"same-origin", b"none")
_READ = frozenset({b"host", b"authorization", b"origin", b"sec-fetch-site"})


@dataclass(frozen=True)
class Access:
    """Who is let in.

    Raises:
        ConfigError: other machines would be served without a token.
    """

    host: str = "127.0.0.1"
    """The address that is listened on."""
    token: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.token is None and not is_loopback(self.host):
            raise ConfigError(
                f"router_host {self.host} serves other machines, expected a token that clients "
                "must send: name the variable that has it (--router-token-env NAME, TOML: "
                "router.router_token_env), or use 127.0.0.1"
            )
        if self.token is not None and not (self.token.isascii() and self.token.isprintable()):
            raise ConfigError(
                "the token in the variable of router_token_env has characters that no header "
                "holds, expected printable ASCII (TOML: router.router_token_env)"
            )

    @classmethod
    def of(cls, config: RouterConfig) -> Access:
        """As the settings have it.

        Raises:
            ConfigError: the variable that should have the token has none.
        """
        variable = config.router_token_env
        token = None if variable is None else os.environ.get(variable)
        if variable is not None and not token:
            raise ConfigError(
                f"router_token_env names the environment variable {variable}, which is not set or "
                "empty (TOML: router.router_token_env)"
            )
        return cls(config.router_host, token)

    def allows_host(self, host: str) -> bool:
        """Whether this name, out of a Host header, is one of this server's.

        On an address of this machine only: a page elsewhere may have had its own name resolve to
        it. Where other machines are served the token, which no such page has, keeps it out.
        """
        return not is_loopback(self.host) or _name(host) in {*_LOCAL, self.host}


class Guard:
    """ASGI middleware: lets in what `access` allows."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access
        token = access.token
        self._last_host = b""
        """The last good one: most clients use the same."""
        self._credentials = None if token is None else f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            problem = self._problem(scope)
            if problem is not None:
                await failure(problem)(scope, receive, send)
                return
            if self._credentials is not None:
                # It is for this server: neither users' functions nor engines get to see it.
                kept = [one for one in scope["headers"] if one[0] != b"authorization"]
                scope = {**scope, "headers": kept}
        await self._app(scope, receive, send)

    def _problem(self, scope: Scope) -> RequestError | None:
        headers: dict[bytes, list[bytes]] = {}
        for name, value in scope["headers"]:
            if name in _READ:
                headers.setdefault(name, []).append(value)
        return (
            self._wrong_host(headers.get(b"host", ()))
            or _wrong_origin(headers)
            or self._wrong_token(scope, headers.get(b"authorization", ()))
        )

    def _wrong_host(self, hosts: Sequence[bytes]) -> RequestError | None:
        if len(hosts) == 1 and hosts[0] == self._last_host:
            return None
        if len(hosts) == 1 and self._access.allows_host(hosts[0].decode("latin-1")):
            self._last_host = hosts[0]
            return None
        return RequestError(
            f"Host: got {[host.decode('latin-1')[:80] for host in hosts]}, expected a name of this "
            f"server: {self._access.host}",
            status=400,
            field="Host",
            expected=self._access.host,
        )

    def _wrong_token(self, scope: Scope, given: Sequence[bytes]) -> RequestError | None:
        if self._credentials is None:
            return None
        if scope["path"] in OPEN_PATHS and scope["method"] in ("GET", "HEAD"):
            return None
        if len(given) == 1 and hmac.compare_digest(given[0], self._credentials):
            return None
        got = "another one" if given else "none"
        return RequestError(
            f"Authorization: got {got}, expected Bearer and the token of this server, which is in "
            "the variable that router_token_env names",
            status=401,
            field="Authorization",
            expected="Bearer TOKEN",
        )


def _wrong_origin(headers: dict[bytes, list[bytes]]) -> RequestError | None:
    """A browser says where a page is from that makes it ask; programs say nothing."""
    if b"origin" not in headers and b"sec-fetch-site" not in headers:
        return None
    own = {scheme + host for host in headers[b"host"] for scheme in (b"http://", b"https://")}
    origins = headers.get(b"origin", [])
    elsewhere = any(site not in _HERE for site in headers.get(b"sec-fetch-site", ()))
    if not elsewhere and all(origin in own for origin in origins):
        return None
    return RequestError(
        "a page of another site asks, and this server answers programs and its own pages only",
        status=403,
        field="Origin",
        expected="no Origin, or this server's own",
    )


def _name(host: str) -> str:
    """A Host header without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()
