"""Impossible combinations of what is served over HTTP. As in `dovetail.config.check`, whose rule
this is."""

from __future__ import annotations

import functools
import ipaddress
import os
from collections.abc import Iterator

from dovetail.config.leaves import cure
from dovetail.config.run import RunConfig


@functools.cache
def is_loopback(host: str) -> bool:
    """Whether only this machine reaches that address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def router_rules(config: RunConfig) -> Iterator[str]:
    """Other machines are served with a token only, and the token must be there."""
    router = config.router
    if router.serve_router == "false":
        return
    variable = router.router_token_env
    if variable is None and not is_loopback(router.router_host):
        yield (
            f"router_host {router.router_host} serves other machines, and anybody there could make "
            "the engine work: put a token into an environment variable and name it, "
            f"{cure('router_token_env', 'VARIABLE')}; or serve this machine alone, "
            f"{cure('router_host', '127.0.0.1')}"
        )
    elif variable is not None and not os.environ.get(variable):
        yield (
            f"router_token_env names the environment variable {variable}, which is not set or "
            f"empty; put the token there (export {variable}=...), or name another one: "
            f"{cure('router_token_env', 'VARIABLE')}"
        )
