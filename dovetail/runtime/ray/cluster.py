"""The Ray that a run lives on: one of its own on this machine, or one that runs already.

    own      ray.init -> gcs, raylet, ... : killed with this process (PR_SET_PDEATHSIG)
    foreign  ray.init(address): the run takes placement groups and actors, and gives them back

Ray writes about itself into its session's directory, never onto the terminal.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import secrets
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from dovetail.config.leaves import cure
from dovetail.runtime.ray.door import TOKEN_CURE, absence, refusal
from dovetail.runtime.ray.session import SessionDirectory
from dovetail.types.errors import ConfigError, DovetailError, MissingExtraError

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
OBJECT_STORE_BYTES = 1 << 30
"""Of a cluster of our own: the rows of a few steps; Ray spills to the disk what is more."""
_STARTS = 2
_MODE, _TOKEN = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"
_NO_REPORTS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}

_made: dict[str, str] = {}
"""The secret under which this process has imported Ray, if it is ours: Ray reads it then, and never
again."""


def import_ray(*, alone: bool = False) -> Any:
    """The package; `alone`: for a cluster that nobody else is to use.

    Raises:
        MissingExtraError: it is not installed.
    """
    # Read when ray is imported: no reports to its makers, devices are chosen by us.
    os.environ.update({name: os.environ.get(name, value) for name, value in _NO_REPORTS.items()})
    if alone:
        _ask_for_a_secret()
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError(_needed()) from error
    return ray


def _ask_for_a_secret() -> None:
    if "ray" not in sys.modules:
        # A secret of this process: Ray would write one to ~/.ray, and tell the terminal.
        given = {_MODE: "token", _TOKEN: secrets.token_hex(32)}
        _made.update({name: os.environ.get(name, value) for name, value in given.items()})
    os.environ.update({name: os.environ.get(name, value) for name, value in _made.items()})


def _tell_if_open() -> None:
    """Of a cluster of our own that runs; Ray 2.60 asks for the token of ~/.ray if it was imported
    before the run had a secret, and sets the variable. Others ask for none then."""
    if os.environ.get(_MODE, "").lower() != "token":
        log.warning(
            "the run's own Ray asks for no token: whoever reaches this machine's ports can run "
            "code in it. Either %s says so, or something has imported ray before the run: set "
            "%s=token and %s=... before that",
            *(_MODE, _MODE, _TOKEN),
        )


def check_ray() -> None:
    """Without importing it.

    Raises:
        MissingExtraError: Ray is not installed.
    """
    if importlib.util.find_spec("ray") is None:
        raise MissingExtraError(_needed())


def _needed() -> str:
    return (
        "modes colocated and disaggregated need Ray: pip install 'dovetail-rl[ray]', or use "
        f"{cure('mode', 'local')}"
    )


class Cluster:
    """A connection to Ray, from `start` to `close`.

    Args:
        address: of a cluster that runs already, `HOST:PORT` or `auto`; None: start one here.
        resources: that one of our own shall have, e.g. `{"CPU": 4, "GPU": 2}`.
    """

    def __init__(self, address: str | None, resources: Mapping[str, float]) -> None:
        self.address, self._resources = address, dict(resources)
        self._directory: SessionDirectory | None = None
        self._before: dict[str, str | None] = {}
        self.ray: Any = None

    @property
    def is_own(self) -> bool:
        """Whether it was started for this run alone."""
        return self.address is None

    def start(self) -> None:
        """Start it, or connect. To be called on the main thread: the processes of a cluster of our
        own are killed when the thread that started them ends.

        Raises:
            ConfigError: there is no cluster at the address, or this process is connected already.
            MissingExtraError: Ray is not installed.
        """
        self._before = {name: os.environ.get(name) for name in (*_NO_REPORTS, _MODE, _TOKEN)}
        try:
            self._start()
        except BaseException:
            self._restore_environment()
            raise

    def _start(self) -> None:
        ray = import_ray(alone=self.is_own)
        if ray.is_initialized():
            raise ConfigError("this process is connected to Ray already: call ray.shutdown() first")
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": False}
        with _silent_loggers():
            if self.address is None:
                self._start_own(ray, quiet)
                _tell_if_open()
            else:
                self._connect(ray, self.address, quiet)
        self.ray = ray

    def _start_own(self, ray: Any, quiet: dict[str, Any]) -> None:
        for chance in range(_STARTS):
            try:
                self._start_once(ray, quiet)
                return
            # Ray waits for its own processes for 30 s, in vain on a machine that is very busy, and
            # raises nothing better.
            except Exception as error:
                ray.shutdown()
                self._remove_directory()
                if chance + 1 == _STARTS:
                    raise DovetailError(
                        f"Ray did not start on this machine: {_first_line(error)}. It may be too "
                        "busy, or without memory; try again, or name a cluster that runs: "
                        f"{cure('ray_address', 'HOST:PORT')}"
                    ) from error

    def _start_once(self, ray: Any, quiet: dict[str, Any]) -> None:
        own = dict(self._resources)
        self._directory = SessionDirectory()
        with _without("RAY_ADDRESS"):
            ray.init(
                address="local",
                num_cpus=int(own.pop("CPU", 1)),
                num_gpus=int(own.pop("GPU", 0)),
                resources=own or None,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                _node_ip_address=LOOPBACK,
                _temp_dir=str(self._directory.path),
                **quiet,
            )

    def _connect(self, ray: Any, address: str, quiet: dict[str, Any]) -> None:
        if ":" in address and (why := absence(address)) is not None:
            raise _unreached(address, why)
        if ":" in address and (why := refusal(address)) is not None:
            raise ConfigError(f"the Ray cluster at {address} lets nobody in: {why}; {TOKEN_CURE}")
        try:
            ray.init(address=address, namespace=f"dovetail-{os.getpid()}", **quiet)
        except ray.exceptions.AuthenticationError as error:
            raise ConfigError(
                f"the Ray cluster at {address}: {str(error).rstrip('. ')}; {TOKEN_CURE}"
            ) from error
        except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
            raise _unreached(
                address, f"{error}. If it wants a token (RAY_AUTH_MODE), {TOKEN_CURE}"
            ) from error

    @property
    def nodes(self) -> list[dict[str, Any]]:
        """What Ray says of the nodes that live."""
        return [node for node in self.ray.nodes() if node["Alive"]]

    @property
    def in_order(self) -> list[dict[str, Any]]:
        """`nodes` as plans count them: this machine's first."""
        here = self.ray.get_runtime_context().get_node_id()
        return sorted(self.nodes, key=lambda node: (node["NodeID"] != here, node["NodeID"]))

    @property
    def own_address(self) -> str:
        """Of this machine, as Ray knows it."""
        here = self.ray.get_runtime_context().get_node_id()
        return str(next(one["NodeManagerAddress"] for one in self.nodes if one["NodeID"] == here))

    def close(self) -> None:
        """Disconnect, and end a cluster of our own; the environment is as it was. A second call
        does nothing."""
        if self.ray is not None:
            with _silent_loggers():
                self.ray.shutdown()
            self.ray = None
        self._remove_directory()
        self._restore_environment()

    def _restore_environment(self) -> None:
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        self._before = {}

    def _remove_directory(self) -> None:
        if self._directory is not None:
            self._directory.remove()
            self._directory = None


def _unreached(address: str, why: str) -> ConfigError:
    return ConfigError(
        f"no Ray cluster can be reached at {address}: {why}. Start one with `ray start --head`, or "
        f"leave {cure('ray_address')} out and the run starts its own"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(". ")


@contextmanager
def _without(variable: str) -> Iterator[None]:
    kept = os.environ.pop(variable, None)
    try:
        yield
    finally:
        if kept is not None:
            os.environ[variable] = kept


@contextmanager
def _silent_loggers() -> Iterator[None]:
    """Ray's own words go to its files."""
    own = logging.getLogger("ray")
    before, own.propagate = own.propagate, False
    handler = logging.NullHandler()
    own.addHandler(handler)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            own.removeHandler(handler)
        own.propagate = before
