"""Plugins as their authors write them, in a real small run: nothing in them knows of dovetail."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from dovetail import compat
from dovetail.config.resolve import resolve
from dovetail.run.train import run_training
from dovetail.types import HookError
from tests.loop import tiny


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("foreign")
    tiny.make_model(directory / "model")
    tiny.make_rows(directory / "rows.jsonl")
    return directory


@pytest.fixture(autouse=True)
def clean() -> Any:
    compat.uninstall()  # Runs of other tests in this process left theirs on.
    path, modules = list(sys.path), set(sys.modules)
    yield
    compat.uninstall()
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if name.startswith(("plugin_", "_dovetail_")):
            del sys.modules[name]


def plugin(tmp_path: Path, name: str, text: str) -> Path:
    file = tmp_path / f"{name}.py"
    file.write_text(textwrap.dedent(text))
    return file


def flags(place: Path, run_dir: Path, *more: str) -> list[str]:
    """A run of two steps of two groups of two."""
    return [
        *("--hf-checkpoint", str(place / "model"), "--prompt-data", str(place / "rows.jsonl")),
        *("--label-key", "label", "--run-dir", str(run_dir), "--num-rollout", "2"),
        *("--rollout-batch-size", "2", "--n-samples-per-prompt", "2", "--lr", "0.001"),
        *("--rollout-max-response-len", "6", "--progress", "off", "--no-use-tensorboard"),
        *more,
    ]


def train(place: Path, tmp_path: Path, *more: str) -> list[dict[str, Any]]:
    """Samples that were trained on."""
    run_dir = tmp_path / "run"
    report = run_training(resolve([], flags(place, run_dir, *more)))
    assert report.steps_done == 2
    return [
        json.loads(line)
        for file in sorted(run_dir.glob("samples/*step*.jsonl"))
        for line in file.read_text().splitlines()
    ]


TWO_TURNS = """
    # Two turns with a tool in between, in the way of the search examples.
    from slime.rollout.sglang_rollout import GenerateState
    from slime.utils.http_utils import post
    from slime.utils.types import Sample

    STATES = []

    async def generate(args, sample: Sample, sampling_params) -> Sample:
        assert not args.partial_rollout, "Partial rollout is not supported"
        state = GenerateState(args)
        STATES.append(state)
        url = f"http://{args.sglang_router_ip}:{args.sglang_router_port}/generate"
        prompt_ids = state.tokenizer(sample.prompt, add_special_tokens=False)["input_ids"]
        response, ids, mask, logprobs = "", [], [], []
        for turn in range(2):
            payload = {
                "input_ids": prompt_ids + ids,
                "sampling_params": {**sampling_params, "max_new_tokens": 2},
                "return_logprob": True,
            }
            output = await post(url, payload)
            if output["meta_info"]["finish_reason"]["type"] == "abort":
                sample.status = Sample.Status.ABORTED
                return sample
            got = output["meta_info"]["output_token_logprobs"]
            ids += [item[1] for item in got]
            logprobs += [item[0] for item in got]
            mask += [1] * len(got)
            response += output["text"]
            if turn == 0:
                observed = state.tokenizer("+", add_special_tokens=False)["input_ids"]
                ids += observed
                logprobs += [0.0] * len(observed)
                mask += [0] * len(observed)
                response += "+"
        sample.tokens = prompt_ids + ids
        sample.response_length = len(ids)
        sample.response = response
        sample.loss_mask = mask
        sample.rollout_log_probs = logprobs
        match output["meta_info"]["finish_reason"]["type"]:
            case "length":
                sample.status = Sample.Status.TRUNCATED
            case "stop":
                sample.status = Sample.Status.COMPLETED
        return sample

    async def reward_func(args, sample, **kwargs):
        if not isinstance(sample, Sample):
            raise TypeError("Sample must be an instance of Sample class.")
        return float(len(sample.response) % 2)
"""


def test_a_slime_plugin_of_two_turns_trains(place: Path, tmp_path: Path) -> None:
    file = plugin(tmp_path, "plugin_two_turns", TWO_TURNS)
    samples = train(
        place,
        tmp_path,
        *("--custom-generate-function-path", f"{file}:generate"),
        *("--custom-rm-path", f"{file}:reward_func"),
    )
    assert len(samples) == 8
    for sample in samples:
        assert sample["loss_mask"].count(0) == 1 and "+" in sample["response"]
        assert len(sample["loss_mask"]) == len(sample["rollout_log_probs"])
    states = sys.modules["plugin_two_turns"].STATES
    assert len({id(state) for state in states}) == 1


def test_a_plugin_that_polls_its_state_sees_the_runs_abort(place: Path, tmp_path: Path) -> None:
    file = plugin(
        tmp_path,
        "plugin_polls",
        """
        import asyncio

        from slime.rollout.sglang_rollout import GenerateState
        from slime.utils.types import Sample

        SEEN = []

        async def generate(args, sample, sampling_params):
            state = GenerateState(args)
            sample.tokens = state.tokenizer.encode(sample.prompt)
            # Two groups are enough for a step; the two others wait for its end.
            while sample.group_index % 4 >= 2 and sample.group_index < 4:
                if state.aborted:
                    SEEN.append(sample.index)
                    sample.status = Sample.Status.ABORTED
                    return sample
                await asyncio.sleep(0.01)
            sample.append_response_tokens(args, tokens=[5, 1], log_probs=[-1.0, -1.0], text="2")
            sample.status = Sample.Status.COMPLETED
            return sample
        """,
    )
    train(
        place,
        tmp_path,
        *("--custom-generate-function-path", f"{file}:generate", "--rm-type", "random"),
        *("--over-sampling-batch-size", "4", "--partial-rollout", "--no-check-hooks"),
    )
    assert set(sys.modules["plugin_polls"].SEEN) == {4, 5, 6, 7}


def test_a_python_launch_script_starts_our_training(place: Path, tmp_path: Path) -> None:
    words = " ".join(flags(place, tmp_path / "run", "--rm-type", "random"))
    script = plugin(
        tmp_path,
        "launch",
        f"""
        from slime.utils.external_utils.command_utils import execute_train

        execute_train({words!r}, num_gpus_per_node=8, megatron_model_type="qwen3-4B")
        """,
    )
    command = [sys.executable, "-m", "dovetail.compat", str(script)]
    out = subprocess.run(command, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert len(tiny.read_metrics(tmp_path / "run")) >= 2


def test_a_second_run_of_the_process_has_a_state_of_its_own(place: Path, tmp_path: Path) -> None:
    file = plugin(tmp_path, "plugin_again", TWO_TURNS)
    words = ["--custom-generate-function-path", f"{file}:generate", "--rm-type", "random"]
    words += ["--no-check-hooks"]
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        train(place, tmp_path / str(number), *words)
    states = sys.modules["plugin_again"].STATES
    assert len({id(state) for state in states}) == 2


def test_a_vime_plugin_speaks_its_own_protocol(place: Path, tmp_path: Path) -> None:
    file = plugin(
        tmp_path,
        "plugin_vime",
        """
        from vime.rollout.vllm_rollout import GenerateState, _build_inference_sampling_params
        from vime.utils.http_utils import post
        from vime.utils.types import Sample

        async def generate(args, sample, sampling_params, evaluation=False):
            state = GenerateState(args)
            url = f"http://{args.vllm_router_ip}:{args.vllm_router_port}/inference/v1/generate"
            ids = state.tokenizer.encode(sample.prompt, add_special_tokens=False)
            body = {
                "model": args.hf_checkpoint,
                "token_ids": ids,
                "sampling_params": _build_inference_sampling_params(sampling_params),
            }
            choice = (await post(url, body))["choices"][0]
            sample.tokens = list(ids)
            sample.append_response_tokens(
                args,
                tokens=choice["token_ids"],
                log_probs=[item["logprob"] for item in choice["logprobs"]["content"]],
                text=state.tokenizer.decode(choice["token_ids"]),
            )
            done = choice["finish_reason"] == "stop"
            sample.status = Sample.Status.COMPLETED if done else Sample.Status.TRUNCATED
            sample.metadata["mark"] = "vime"
            return sample
        """,
    )
    words = ("--custom-generate-function-path", f"{file}:generate", "--rm-type", "random")
    assert {sample["metadata"]["mark"] for sample in train(place, tmp_path, *words)} == {"vime"}


def test_slimes_own_rollout_function_wrapped_by_a_plugin(place: Path, tmp_path: Path) -> None:
    file = plugin(
        tmp_path,
        "plugin_wrapper",
        """
        from slime.rollout.base_types import RolloutFnEvalOutput, RolloutFnTrainOutput
        from slime.rollout.sglang_rollout import generate_rollout as base_rollout

        def generate_rollout(args, rollout_id, data_source, evaluation=False):
            output = base_rollout(args, rollout_id, data_source, evaluation=evaluation)
            if evaluation:
                assert isinstance(output, RolloutFnEvalOutput)
                output.metrics = {"eval/wrapped": 1.0}
                return output
            assert isinstance(output, RolloutFnTrainOutput)
            for group in output.samples:
                for sample in group:
                    sample.metadata["mark"] = "wrapped"
            output.metrics["rollout/wrapped"] = 1.0
            return output
        """,
    )
    samples = train(
        place,
        tmp_path,
        *("--rollout-function-path", f"{file}:generate_rollout", "--rm-type", "random"),
        *("--eval-prompt-data", "held", f"{place / 'rows.jsonl'}@[:2]", "--eval-interval", "1"),
    )
    assert {sample["metadata"]["mark"] for sample in samples} == {"wrapped"}
    rows = tiny.read_metrics(tmp_path / "run")
    assert any(row.get("rollout/wrapped") == 1.0 for row in rows)
    assert any(row.get("eval/wrapped") == 1.0 and "eval/held/reward" in row for row in rows)


def test_a_miles_rollout_class_with_its_parts(place: Path, tmp_path: Path) -> None:
    file = plugin(
        tmp_path,
        "plugin_miles",
        """
        from miles.rollout.base_types import (
            GenerateFnInput,
            GenerateFnOutput,
            RolloutFnConstructorInput,
            RolloutFnTrainInput,
        )
        from miles.rollout.inference_rollout.inference_rollout_common import InferenceRolloutFn

        class Mine(InferenceRolloutFn):
            def __init__(self, input: RolloutFnConstructorInput):
                super().__init__(input)
                self.calls = 0

            async def __call__(self, input: RolloutFnTrainInput):
                output = await super().__call__(input)
                self.calls += 1
                output.metrics = {**(output.metrics or {}), "rollout/calls": float(self.calls)}
                return output

        async def generate(input: GenerateFnInput) -> GenerateFnOutput:
            from miles.rollout.generate_hub.single_turn import generate as single_turn

            output = await single_turn(input)
            output.samples.metadata["mark"] = "miles"
            return output
        """,
    )
    samples = train(
        place,
        tmp_path,
        *("--rollout-function-path", f"{file}:Mine", "--rm-type", "random"),
        *("--custom-generate-function-path", f"{file}:generate"),
    )
    assert {sample["metadata"]["mark"] for sample in samples} == {"miles"}
    rows = tiny.read_metrics(tmp_path / "run")
    assert [row["rollout/calls"] for row in rows if "rollout/calls" in row] == [1.0, 2.0]


@pytest.mark.parametrize(
    "path",
    [
        "slime.rollout.sglang_rollout.generate_rollout",
        "vime.rollout.vllm_rollout.generate_rollout",
        "miles.rollout.inference_rollout.inference_rollout_common.InferenceRolloutFn",
        "slime.rollout.fully_async_rollout.generate_rollout_fully_async",
        "miles.rollout.fully_async_rollout.FullyAsyncRolloutFn",
    ],
)
def test_a_launch_script_names_a_rollout_function_of_the_family(
    path: str, place: Path, tmp_path: Path
) -> None:
    samples = train(place, tmp_path, "--rollout-function-path", path, "--rm-type", "random")
    assert len(samples) == 8 and all(sample["reward"] in (0.0, 1.0) for sample in samples)


def test_supervised_training_by_the_familys_rollout_function(place: Path, tmp_path: Path) -> None:
    samples = train(
        place,
        tmp_path,
        *("--rollout-function-path", "slime.rollout.sft_rollout.generate_rollout"),
        *("--loss-type", "sft_loss", "--n-samples-per-prompt", "1"),
    )
    assert all(sample["response_length"] > 0 for sample in samples) and len(samples) == 4


def test_with_the_aliases_off_the_plugin_is_refused_before_anything_is_loaded(
    place: Path, tmp_path: Path
) -> None:
    file = plugin(tmp_path, "plugin_off", TWO_TURNS)
    words = ["--custom-generate-function-path", f"{file}:generate", "--no-compat-imports"]
    with pytest.raises(HookError, match="No module named 'slime'"):
        train(place, tmp_path, *words, "--rm-type", "random")


def test_a_name_that_is_not_covered_is_told_with_the_hook_and_its_line(
    place: Path, tmp_path: Path
) -> None:
    file = plugin(
        tmp_path,
        "plugin_uncovered",
        "from slime.utils.http_utils import post_fast\n\nasync def rm(args, sample): return 1.0\n",
    )
    with pytest.raises(HookError) as caught:
        train(place, tmp_path, "--custom-rm-path", f"{file}:rm")
    said = str(caught.value)
    assert "--custom-rm-path" in said and "plugin_uncovered.py" in said
    assert "cannot import name 'post_fast' from slime.utils.http_utils" in said


def test_help_does_not_load_the_aliases() -> None:
    code = """
        import sys
        from dovetail.cli.main import main
        main(["--help"])
        assert "dovetail.compat" not in sys.modules
    """
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True
    )
    assert out.returncode == 0, out.stderr
