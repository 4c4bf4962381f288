"""`dovetail serve`: what is wrong is told before anything loads; it answers; a signal ends it."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dovetail.checkpoint.manager import CheckpointManager
from dovetail.cli.main import main
from dovetail.cli.serve import tell
from dovetail.config.resolve import resolve
from tests.loop.tiny import make_model
from tests.serve_process import serving

QUICK = ("--dtype", "float32", "--engine-kv-tokens", "2048", "--num-threads", "1")
TOKEN = "open-sesame"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("served") / "model", initializer_range=0.3)


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        yield held.getsockname()[1]


def ask(url: str, body: Any = None, token: str | None = None) -> tuple[int, Any]:
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    headers |= {} if token is None else {"Authorization": f"Bearer {token}"}
    request = urllib.request.Request(url, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            raw, status = answer.read(), answer.status
    except urllib.error.HTTPError as error:
        raw, status = error.read(), error.code
    return status, json.loads(raw) if raw else None


def test_help_says_what_it_reads(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--help"]) == 0
    said = capsys.readouterr().out
    assert "usage: dovetail serve" in said and "--router-port" in said and "--load" in said
    assert "--lr " not in said and "--prompt-data" not in said


def test_what_is_wrong_is_told_before_the_model_is_read(
    model: Path, taken: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    wrong = {
        (): "no model; give its directory: --hf-checkpoint DIR",
        ("--hf-checkpoint", "nowhere/at/all"): "'nowhere/at/all' is not a directory",
        ("--hf-checkpoint", str(model), "--load", "none"): "load 'none' does not exist",
        ("--hf-checkpoint", str(model), "--rollout-engine", "vlm"): "did you mean 'vllm'?",
        ("--hf-checkpoint", str(model), "--router-host", "0.0.0.0"): "--router-token-env",
        ("--hf-checkpoint", str(model), "--router-token-env", "NO_SUCH"): "NO_SUCH, which is not",
        ("--hf-checkpoint", str(model), "--routr-port", "1"): "did you mean",
        (str(model), "--port", "1"): "did you mean --router-port?",
        (str(model.parent),): "neither a model directory",
        (str(model), "--rollout-engine", "vllm", "--engine-python", "/no"): "/no can't be run",
        (str(model), "--router-port", str(taken)): "Address already in use",
        # The port is taken before the model, which is none.
        ("--hf-checkpoint", str(tmp_path), "--router-port", str(taken)): "Address already in use",
        (
            "--hf-checkpoint",
            str(model),
            "--router-middleware-paths",
            "no.such:thing",
        ): "no.such:thing",
    }
    for flags, says in wrong.items():
        assert main(["serve", *flags]) == 2, flags
        error = capsys.readouterr().err
        assert says in error and "Traceback" not in error


def test_settings_of_training_are_told_to_have_no_effect(
    model: Path, taken: int, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--hf-checkpoint", str(model), "--router-port", str(taken), "--lr", "1e-3"]
    assert main(["serve", *flags, "--rollout-max-context-len", "64"]) == 2
    assert "note: without effect in a server: lr\n" in capsys.readouterr().err
    run_file = model.parent / "run.toml"
    run_file.write_text("[optimizer]\nlr = 1e-3\n[rollout]\nn_samples_per_prompt = 4\n")
    assert main(["serve", str(run_file), *flags[:4]]) == 2
    assert "without effect" not in capsys.readouterr().err
    assert main(["serve", str(run_file), *flags]) == 2
    assert "note: without effect in a server: lr\n" in capsys.readouterr().err


def test_what_it_prints_has_the_token_where_one_is_wanted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["--hf-checkpoint", "DIR"]
    tell(resolve([], flags), "http://127.0.0.1:1")
    assert "Authorization" not in capsys.readouterr().out
    tell(resolve([], [*flags, "--router-token-env", "MINE"]), "http://127.0.0.1:1")
    said = capsys.readouterr().out
    assert '-H "Authorization: Bearer $MINE"' in said and "api_key $MINE" in said


@pytest.mark.slow
def test_it_answers_with_the_weights_of_a_checkpoint_until_it_is_told_to_stop(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make_model(tmp_path / "other", seed=1, initializer_range=0.3)
    CheckpointManager(tmp_path / "saved", 1).save(6, {"policy": (masters(other), {})})
    monkeypatch.setenv("SERVE_TOKEN", TOKEN)
    flags = (*QUICK, "--load", str(tmp_path / "saved"), "--router-token-env", "SERVE_TOKEN")
    log = tmp_path / "serve.log"
    with serving(model, *flags, log=log) as (url, process):
        body = {"input_ids": [5, 9, 14], "sampling_params": {"temperature": 0, "ignore_eos": True}}
        body["sampling_params"]["max_new_tokens"] = 8
        assert ask(f"{url}/generate", body)[0] == 401
        assert ask(f"{url}/pause_generation", {})[0] == 401
        status, answer = ask(f"{url}/generate", body, TOKEN)
        assert status == 200 and answer["meta_info"]["weight_version"] == "6"
        assert answer["output_ids"] == greedy(other, [5, 9, 14], 8)
        chat = {"model": "m", "prompt": "1+2=", "max_tokens": 3}
        assert ask(f"{url}/v1/completions", chat, TOKEN)[0] == 200
        status, answer = ask(f"{url}/update_weights_from_disk", {"model_path": str(model)}, TOKEN)
        assert status == 200 and ask(f"{url}/get_weight_version", None, TOKEN)[1] == {
            "weight_version": "7"
        }
        assert ask(f"{url}/generate", body, TOKEN)[1]["output_ids"] == greedy(model, [5, 9, 14], 8)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    said = log.read_text()
    assert "SIGTERM: leaving" in said and TOKEN not in said and "Traceback" not in said


@pytest.mark.slow
def test_several_engines_answer_behind_one_address(model: Path, tmp_path: Path) -> None:
    flags = (*QUICK, "--rollout-num-engines", "2", "--run-dir", str(tmp_path / "run"))
    with serving(model, *flags, log=tmp_path / "serve.log") as (url, process):
        workers = ask(f"{url}/workers")[1]["workers"]
        assert len({one["url"] for one in workers}) == 2
        body = {"input_ids": [5, 9], "sampling_params": {"temperature": 0, "max_new_tokens": 4}}
        body["sampling_params"]["ignore_eos"] = True
        assert ask(f"{url}/generate", body)[1]["output_ids"] == greedy(model, [5, 9], 4)
        # As `timeout` does, to the process and to its group: one wish, not two.
        process.send_signal(signal.SIGINT)
        time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        for one in workers:
            assert not answers(one["url"])
    logs = sorted(path.name for path in (tmp_path / "run").rglob("*.log"))
    assert logs == ["engine_0.log", "engine_1.log"]


@pytest.mark.slow
def test_it_prints_a_line_that_can_be_typed(model: Path, tmp_path: Path) -> None:
    with serving(model, *QUICK, log=tmp_path / "serve.log") as (_, process):
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(2)]
        command = re.sub(r"\s*\\\n\s*", " ", "".join(lines)).strip()
        assert command.startswith("curl http://127.0.0.1:")
        found = subprocess.run(
            ["bash", "-c", f"{command} -s"], capture_output=True, text=True, timeout=60
        )
        assert "meta_info" in json.loads(found.stdout), found


def answers(url: str) -> bool:
    for _ in range(50):
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5)
        except (urllib.error.URLError, OSError):
            return False
        time.sleep(0.1)
    return True


def masters(directory: Path) -> dict[str, Any]:
    """A trainer's state, as far as it is the weights."""
    from dovetail.checkpoint import hf

    model = hf.load_model(directory, "float32")
    return {f"master.{name}": value.detach() for name, value in model.named_parameters()}


def greedy(directory: Path, prompt: list[int], count: int) -> list[int]:
    """What a plain forward would choose, again and again."""
    import torch

    from dovetail.checkpoint import hf

    model, ids = hf.load_model(directory, "float32"), list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]
