"""Before a run is on Ray: the directory of a Ray of its own, and a cluster that wants a token."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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
