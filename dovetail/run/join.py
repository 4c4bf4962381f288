"""A server that joins the engines of a running job, and leaves them before it ends."""

from __future__ import annotations

import os
from urllib.parse import quote

from dovetail.config.leaves import cure
from dovetail.config.router_rules import is_loopback
from dovetail.config.run import RunConfig
from dovetail.engines.http import HttpClient
from dovetail.types.errors import ConfigError, EngineError

_ADDED_S = 600.0
"""Hand to hand an engine gets its weights with the next update of the run."""
_REMOVED_S = 40.0


class Membership:
    """Of the server at `own_url`, in the run whose router `config.router.join` names.

    Raises:
        ConfigError: the run could not reach it.
    """

    def __init__(self, config: RunConfig, own_url: str) -> None:
        self.of = (config.router.join or "").rstrip("/")
        self._own, self._joined = own_url, False
        router, variable = self.of.partition("://")[2], config.router.router_token_env
        host = router.rpartition(":")[0] or router
        if self.of and is_loopback(config.router.router_host) and not is_loopback(host):
            raise ConfigError(
                f"the run at {self.of} is on another machine and can't reach {own_url}; give an "
                f"address of this machine, {cure('router_host', 'ADDRESS')}, and the run's token, "
                f"{cure('router_token_env', 'VARIABLE')}"
            )
        self._token = None if variable is None else os.environ.get(variable)

    async def enter(self) -> None:
        """Join, and return when the run sends requests.

        Raises:
            EngineError: it does not take this server, and says why.
        """
        self._joined = True
        try:
            await self._tell("/add_worker", _ADDED_S)
        except EngineError:
            self._joined = False
            raise

    async def leave(self) -> str | None:
        """Leave; why that could not be told to the run, if so: it finds out by itself."""
        if not self._joined:
            return None
        self._joined = False
        try:
            await self._tell("/remove_worker", _REMOVED_S)
        except EngineError as error:
            return str(error)
        return None

    async def _tell(self, path: str, timeout_s: float) -> None:
        http = HttpClient(self.of, self._token, timeout_s, name=f"the router at {self.of}")
        try:
            await http.post(f"{path}?url={quote(self._own, safe='')}", {}, timeout_s=timeout_s)
        finally:
            await http.close()
