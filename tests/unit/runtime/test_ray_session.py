"""Before a run is on Ray: the directory of a Ray of its own, and a cluster that wants a token."""

from __future__ import annotations

import builtins
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

from dovetail.runtime.ray import session
from dovetail.runtime.ray.session import SessionDirectory, remove_left

TOKEN = "right"
HELD = "from dovetail.runtime.ray.session import *; import os, signal\n"
HELD += "print(SessionDirectory().path, flush=True); os.kill(os.getpid(), signal.SIGKILL)"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(session, "_place", lambda: tmp_path)
    return tmp_path


def test_a_directory_of_a_killed_process_is_removed_by_the_next_and_no_other(place: Path) -> None:
    code = f"from pathlib import Path; from dovetail.runtime.ray import session\n{HELD}"
    code = code.replace("print(", f"session._place = lambda: Path({str(place)!r}); print(")
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    left, unlocked = Path(killed.stdout.strip()), place / "dovetail-ray-about-to-be-locked"
    unlocked.mkdir()
    assert left.is_dir() and left.parent == place
    one = SessionDirectory()
    assert not left.exists() and unlocked.exists()
    other = SessionDirectory()
    remove_left()
    assert one.path.is_dir() and other.path.is_dir()
    one.remove()
    assert not one.path.exists() and other.path.is_dir()
    other.remove()


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    """What of a Ray head asks for the token."""
    grpc = pytest.importorskip("grpc")
    pb2 = pytest.importorskip("ray.core.generated.gcs_service_pb2")

    def answer(request: bytes, context: object) -> bytes:
        given = dict(context.invocation_metadata()).get("authorization")  # type: ignore[attr-defined]
        if given != f"Bearer {TOKEN}":
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")  # type: ignore[attr-defined]
        return bytes(pb2.GetClusterIdReply().SerializeToString())

    handler = grpc.unary_unary_rpc_method_handler(answer)
    server = grpc.server(ThreadPoolExecutor(1))
    service = "ray.rpc.NodeInfoGcsService"
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler(service, {"GetClusterId": handler})]
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None)


@pytest.mark.parametrize(
    ("mode", "token", "said"),
    [
        (None, None, "it wants a token"),
        (None, TOKEN, "RAY_AUTH_MODE is not token here"),
        ("token", None, "there is none here"),
        ("token", "other", "another token than the one here"),
        ("token", TOKEN, None),
    ],
)
def test_a_cluster_that_wants_a_token_says_so_before_ray_tries_for_long(
    head: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mode: str | None,
    token: str | None,
    said: str | None,
) -> None:
    from dovetail.runtime.ray.cluster import Cluster
    from dovetail.runtime.ray.door import refusal
    from dovetail.types.errors import ConfigError

    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in (("RAY_AUTH_MODE", mode), ("RAY_AUTH_TOKEN", token)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    found = refusal(head)
    assert (found is None) == (said is None)
    if said is not None:
        with pytest.raises(ConfigError, match=said) as caught:
            Cluster(head, {}).start()
        for word in ("InvalidAuthToken", "RAY_AUTH_MODE=token", "RAY_AUTH_TOKEN"):
            assert word in str(caught.value)
        assert token is None or token not in str(caught.value).replace("another token", "").split()


VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_USAGE_STATS_ENABLED")


class Fake(ModuleType):
    """As much of Ray as a cluster of our own needs to start; notes what it was started under."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__("ray")
        self.seen: list[dict[str, str | None]] = []
        self._fails = fails

    def is_initialized(self) -> bool:
        return False

    def init(self, **given: object) -> None:
        self.seen.append({name: os.environ.get(name) for name in VARIABLES})
        if self._fails:
            raise OSError("no memory")

    def shutdown(self) -> None:
        pass


@pytest.fixture
def clean(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dovetail.runtime.ray import cluster

    monkeypatch.setattr(cluster, "_made", {})
    for name in VARIABLES:
        # Put back after the test what it was before, whatever the test leaves.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def lives(fake: Fake) -> dict[str, str | None]:
    """What a cluster of our own was started under; the environment is clean afterwards."""
    from dovetail.runtime.ray.cluster import Cluster

    made = Cluster(None, {"CPU": 1})
    made.start()
    made.close()
    assert not any(name in os.environ for name in VARIABLES)
    return fake.seen[-1]


def test_a_cluster_of_our_own_has_one_secret_per_process_and_leaves_no_variables(
    clean: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake = Fake()
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    monkeypatch.setattr("builtins.__import__", importing(fake))
    first = lives(fake)
    assert first["RAY_AUTH_MODE"] == "token" and len(first["RAY_AUTH_TOKEN"] or "") == 64
    # Ray has read it when it was imported, and would know no other.
    monkeypatch.setitem(sys.modules, "ray", fake)
    assert lives(fake) == first
    assert not caplog.records


def importing(fake: Fake) -> Callable[..., object]:
    """Gives the fake to who imports ray, as if it were imported for the first time."""
    usual = builtins.__import__

    def found(name: str, *given: object, **more: object) -> object:
        return fake if name == "ray" else usual(name, *given, **more)  # type: ignore[arg-type]

    return found


def test_ray_that_was_imported_without_a_secret_is_told(
    clean: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake = Fake()
    monkeypatch.setitem(sys.modules, "ray", fake)
    assert lives(fake)["RAY_AUTH_TOKEN"] is None
    (told,) = caplog.messages
    assert "asks for no token" in told and "imported ray before" in told


def test_a_cluster_that_does_not_start_leaves_no_variables(
    clean: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dovetail.types.errors import DovetailError

    fake = Fake(fails=True)
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    monkeypatch.setattr("builtins.__import__", importing(fake))
    with pytest.raises(DovetailError, match="no memory"):
        lives(fake)
    assert len(fake.seen) == 2 and fake.seen[0]["RAY_AUTH_MODE"] == "token"
    assert not any(name in os.environ for name in VARIABLES)
