"""An engine's seat on a cluster: its GPUs, and what its server is told."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from dovetail.engines.embedded.launch import TOKEN_ENV, launch
from dovetail.engines.launch import LaunchSettings
from dovetail.runtime.ray.actor import Answer, Stage
from dovetail.runtime.ray.placement import Place
from dovetail.runtime.ray.server import RemoteSeat
from dovetail.types.errors import EngineError


class Actor:
    """Of one bundle; calls are answered at once."""

    def __init__(self, gpu: str, calls: list[tuple[Any, ...]]) -> None:
        self._gpu, self._calls = gpu, calls
        self.call = SimpleNamespace(remote=self._answer)

    def _answer(self, name: str, *given: Any) -> Answer:
        self._calls.append((name, *given))
        return Answer({"gpus": [self._gpu], "reserve": 4000}.get(name))


class Bundles:
    """A placement with one GPU per bundle."""

    def __init__(self, gpus: Sequence[str], has_gpus: bool = True) -> None:
        self.has_gpus, self._gpus = has_gpus, gpus
        self.calls: list[tuple[Any, ...]] = []
        self.alive: list[Actor] = []

    def actor(self, holder: type, place: Place, **options: Any) -> Any:
        def remote(*given: Any) -> Actor:
            self.alive.append(Actor(self._gpus[place.bundle], self.calls))
            return self.alive[-1]

        return SimpleNamespace(remote=remote)


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    fake: Any = ModuleType("ray")
    fake.get = lambda answer, timeout=None: answer
    fake.exceptions = SimpleNamespace(RayError=OSError, GetTimeoutError=TimeoutError)
    monkeypatch.setitem(sys.modules, "ray", fake)
    return fake


def _started(bundles: Bundles, ray: Any, tmp_path: Path) -> dict[str, str]:
    """The variables of the server that a seat with all bundles but the first starts."""
    ray.kill = lambda actor, no_restart: bundles.alive.remove(actor)
    places = [Place(at, "node", "127.0.0.1") for at in range(1, len(bundles._gpus))]
    seat: Any = RemoteSeat(bundles, places, Stage("engine 0 seat", "", (), ""))  # type: ignore[arg-type]
    server = seat.server(["serve"], log_file=tmp_path / "log", name="engine 0", env={"A": "b"})
    server.start()
    assert len(bundles.alive) == 1, "who only looked is gone"
    starts = [one for one in bundles.calls if one[0] == "start"]
    assert len(starts) == 1
    return dict(starts[0][2])


def test_an_engine_of_several_gpus_sees_them_all(ray: Any, tmp_path: Path) -> None:
    seen = _started(Bundles(["7", "3", "5"]), ray, tmp_path)
    assert seen == {"A": "b", "CUDA_VISIBLE_DEVICES": "3,5"}


def test_an_engine_of_one_gpu_or_none_sees_what_its_actor_does(ray: Any, tmp_path: Path) -> None:
    assert _started(Bundles(["7", "3"]), ray, tmp_path) == {"A": "b"}
    assert _started(Bundles(["", "", ""], has_gpus=False), ray, tmp_path) == {"A": "b"}


def test_gpus_that_are_the_same_one_are_refused(ray: Any, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="expected 2 different ones"):
        _started(Bundles(["7", "3", "3"]), ray, tmp_path)


def test_the_token_of_an_engine_is_in_no_flag_and_no_text() -> None:
    settings = LaunchSettings(Path("model"), 4000, 64, "python", host="10.0.0.7", token="secret")
    spec = launch(settings)
    assert spec.argv[spec.argv.index("--router-token-env") + 1] == TOKEN_ENV
    assert spec.env[TOKEN_ENV] == "secret"
    assert "secret" not in f"{settings} {spec} {spec.argv}"
    plain = launch(LaunchSettings(Path("model"), 4000, 64, "python"))
    assert "--router-token-env" not in plain.argv and TOKEN_ENV not in plain.env


def test_a_late_answer_of_an_actor_that_is_gone_leaves_the_next_one_alone(ray: Any) -> None:
    bundles = Bundles([""], has_gpus=False)
    seat: Any = RemoteSeat(bundles, [Place(0, "node", "127.0.0.1")], Stage("seat", "", (), ""))  # type: ignore[arg-type]
    seat.hold()

    def gone(answer: Any, timeout: float | None = None) -> Any:
        ray.get = lambda answer, timeout=None: answer
        seat.drop()
        seat.hold()  # As another thread does meanwhile.
        raise OSError("the actor died")

    ray.get = gone
    with pytest.raises(EngineError, match="actor is gone"):
        seat.ask("facts")
    assert seat.ask("reserve", 0) == 4000


def test_an_actor_that_is_gone_is_asked_no_more(ray: Any) -> None:
    bundles = Bundles([""], has_gpus=False)
    seat: Any = RemoteSeat(bundles, [Place(0, "node", "127.0.0.1")], Stage("seat", "", (), ""))  # type: ignore[arg-type]
    seat.hold()

    def gone(answer: Any, timeout: float | None = None) -> Any:
        raise OSError("the actor died")

    ray.get = gone
    with pytest.raises(EngineError, match="actor is gone"):
        seat.ask("facts")
    calls = len(bundles.calls)
    with pytest.raises(EngineError, match="is gone"):
        seat.ask("facts")
    assert len(bundles.calls) == calls
