"""`dovetail hooks check` and `dovetail train` name what is wrong with a function before anything is
loaded; what is right passes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from dovetail.cli.hooks_new import body, defined
from dovetail.cli.main import main
from dovetail.hooks import HOOKS
from dovetail.types.errors import UsageError
from tests.loop.wrong_hooks import WRONG, Wrong

_SECONDS = re.compile(r"([\d.]+) s\)$", re.MULTILINE)
_LIMIT_S = 20.0
"""With nothing else to do it is 4 s at most; importing torch takes longer on a busy machine."""


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.name)
def test_check_names_what_is_wrong_within_seconds_and_exits_with_1(
    wrong: Wrong, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["hooks", "check", wrong.flag, wrong.write(tmp_path), *wrong.flags])
    out = capsys.readouterr().out
    assert code == 1, out
    assert out.startswith(f"FAIL  {wrong.flag} ") and out.endswith("1 hook: 1 failed\n")
    for words in wrong.says:
        assert words in out
    (seconds,) = map(float, _SECONDS.findall(out))
    assert seconds < _LIMIT_S


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.name)
def test_train_refuses_the_same_before_it_loads_the_model(
    wrong: Wrong, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A directory that no model loads from: reaching it is another message.
    model = tmp_path / "model"
    model.mkdir()
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"input": "1+1=", "label": "2"}\n' * 4, encoding="utf-8")
    argv = ["train", "--hf-checkpoint", str(model), "--prompt-data", str(rows)]
    argv += ["--label-key", "label", "--num-rollout", "1", "--device", "cpu", "--progress", "off"]
    argv += ["--n-samples-per-prompt", "4", "--run-dir", str(tmp_path / "run")]
    argv += ["--hook-check-timeout-s", "1"]
    argv += [] if wrong.slot == "custom_rm" else ["--rm-type", "math"]
    code = main([*argv, wrong.flag, wrong.write(tmp_path), *wrong.flags])
    err = capsys.readouterr().err
    assert code == 2, err
    assert "config.json" not in err and str(model) not in err
    assert wrong.flag in err and "Traceback" not in err
    for words in wrong.says:
        assert words in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("form", ["native", "slime", "vime", "miles"])
def test_what_new_writes_passes_check_in_the_form_of_every_family(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = []
    for spec in HOOKS:
        try:
            name = defined(body(spec, form))
        except UsageError:
            assert not any(form in one.families for one in spec.forms)
            continue
        file = tmp_path / f"{spec.slot}.py"
        assert main(["hooks", "new", spec.flag, "--form", form, str(file)]) == 0
        assert max(map(len, file.read_text(encoding="utf-8").splitlines())) <= 100
        flags += [spec.flag, f"{file}:{name}"]
    capsys.readouterr()
    code = main(["hooks", "check", *flags])
    out = capsys.readouterr().out
    assert code == 0, out
    assert f"{len(flags) // 2} hooks: {len(flags) // 2} ok\n" in out and "FAIL" not in out


def test_every_example_of_the_table_passes_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = []
    for spec in HOOKS:
        file = tmp_path / f"{spec.slot}.py"
        file.write_text(spec.example, encoding="utf-8")
        flags += [spec.flag, f"{file}:{spec.example_name}"]
    assert main(["hooks", "check", *flags]) == 0, capsys.readouterr().out


def test_one_verdict_follows_another_after_hooks_that_hang_exit_and_crash(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mixed.py").write_text(
        "import os, time\n"
        "def sleeps(sample):\n    time.sleep(60)\n"
        "def exits(args, group):\n    os._exit(1)\n"
        "def good(args, sample):\n    print('seen', sample.index)\n",
        encoding="utf-8",
    )
    path = f"{tmp_path}/mixed.py"
    flags = ["--custom-rm-path", f"{path}:sleeps", "--dynamic-sampling-filter-path"]
    flags += [f"{path}:exits", "--rollout-sample-hook-path", f"{path}:good"]
    assert main(["hooks", "check", *flags, "--hook-check-timeout-s", "0.5"]) == 1
    out = capsys.readouterr().out
    assert out.count("FAIL") == 2 and "ok    --rollout-sample-hook-path" in out
    assert "printed: seen 0" in out
    assert out.endswith("3 hooks: 1 ok, 2 failed\n")


def test_the_first_rows_of_the_data_are_the_inputs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"input": "2+3=", "label": {"tests": ["5"]}, "metadata": {"level": 3}}
    data = tmp_path / "data.jsonl"
    # The broken last line is not reached: a check must not read a large file to its end.
    data.write_text((json.dumps(row) + "\n") * 6 + "{\n", encoding="utf-8")
    reward = tmp_path / "reward.py"
    reward.write_text(
        "def reward(sample):\n"
        "    assert sample.prompt == '2+3=' and sample.label['tests'] == ['5']\n"
        "    return sample.metadata['level']\n",
        encoding="utf-8",
    )
    flags = ["--custom-rm-path", f"{reward}:reward"]
    assert main(["hooks", "check", *flags, "--prompt-data", str(data), "--label-key", "label"]) == 0
    assert capsys.readouterr().out.startswith("ok ")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("return sample.metadata['level']", "sample.metadata['level']"),
        ("return float(sample.label['tests'][0])", "--prompt-data"),
        ("raise ConnectionRefusedError('judge is down')", "judge is down"),
        ("return os.environ['JUDGE_TOKEN']", "JUDGE_TOKEN"),
        ("subprocess.run(['sleep', '60'])", "another process"),
        ("open('/no/such/table.json')", "/no/such/table.json"),
    ],
)
def test_what_only_the_real_thing_has_is_no_fault(
    line: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reward = tmp_path / "reward.py"
    reward.write_text(f"import os, subprocess\ndef reward(sample):\n    {line}\n", encoding="utf-8")
    flags = ["--custom-rm-path", f"{reward}:reward", "--hook-check-timeout-s", "0.5"]
    assert main(["hooks", "check", *flags]) == 0
    out = capsys.readouterr().out
    assert out.startswith("?     --custom-rm-path") and says in out
    assert "1 could not be judged" in out


def test_what_an_earlier_function_of_the_run_puts_onto_samples_is_no_fault(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = tmp_path / "code.py"
    code.write_text(
        "async def generate(call):\n"
        "    sample = await call.default(call.sample, call.sampling)\n"
        "    sample.turn_rewards = [1.0]\n"
        "    return sample\n\n"
        "def reward(sample):\n    return sum(sample.turn_rewards)\n"
    )
    argv = ["hooks", "check", "--custom-rm-path", f"{code}:reward"]
    assert main(argv) == 1
    assert "no attribute 'turn_rewards'" in capsys.readouterr().out
    assert main([*argv, "--custom-generate-function-path", f"{code}:generate"]) == 0
    assert "may need what the run's --custom-generate-function-path" in capsys.readouterr().out


def test_a_reward_that_fails_on_some_inputs_passes_with_a_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reward = tmp_path / "reward.py"
    reward.write_text(
        "def reward(sample):\n    return float(len(sample.response.split()[0]))\n", encoding="utf-8"
    )
    assert main(["hooks", "check", "--custom-rm-path", f"{reward}:reward"]) == 0
    out = capsys.readouterr().out
    assert "note: an empty response: raises IndexError" in out and "reward.py:2" in out


@pytest.mark.parametrize("kind", ["convert", "postprocess"])
def test_a_column_that_is_nearly_a_known_one_passes_with_a_note(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(
        "def convert(args, samples):\n"
        "    return {\n"
        "        'tokens': [s.tokens for s in samples], 'rewards': [s.reward for s in samples],\n"
        "        'response_lengths': [s.response_length for s in samples],\n"
        "        'loss_mask': [[1] * s.response_length for s in samples],\n"
        "        'levels': [0 for s in samples],\n"
        "    }\n"
        "def postprocess(args, rollout_id, rollout_data):\n"
        "    rollout_data['loss_mask'] = rollout_data['levels'] = rollout_data['loss_masks']\n",
        encoding="utf-8",
    )
    flag = {
        "convert": "--custom-convert-samples-to-train-data-path",
        "postprocess": "--rollout-data-postprocess-path",
    }[kind]
    assert main(["hooks", "check", flag, f"{tmp_path}/mine.py:{kind}"]) == 0
    out = capsys.readouterr().out
    assert out.count("note:") == 1 and "sets 'loss_mask'" in out
    assert "did you mean loss_masks?" in out


def test_a_generate_function_without_logprobs_is_told_so_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(
        "def generate(args, sample, sampling_params):\n"
        "    sample.tokens, sample.response_length, sample.response = [5, 6, 7], 2, 'ab'\n"
        "    sample.status = sample.Status.COMPLETED\n"
        "    return sample\n",
        encoding="utf-8",
    )
    flag = "--custom-generate-function-path"
    assert main(["hooks", "check", flag, f"{tmp_path}/mine.py:generate"]) == 0
    assert capsys.readouterr().out.count("no rollout_log_probs") == 1


def test_check_without_a_hook_is_asked_wrongly(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["hooks", "check"]) == 2
    assert "--custom-rm-path reward.py:reward" in capsys.readouterr().err
    assert main(["hooks", "check", "--custom-rm-pth", "x.py:f"]) == 2
    assert "did you mean --custom-rm-path?" in capsys.readouterr().err


def test_check_reads_hooks_from_a_run_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reward = tmp_path / "reward.py"
    reward.write_text("def reward(sample):\n    return 0.5\n", encoding="utf-8")
    run = tmp_path / "run.toml"
    run.write_text(f'[hooks]\ncustom_rm_path = "{reward}:reward"\n', encoding="utf-8")
    assert main(["hooks", "check", str(run)]) == 0
    assert f"{reward}:1, called as (sample)" in capsys.readouterr().out


def test_new_overwrites_nothing_and_knows_forms_and_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.py"
    file.write_text("precious = 1\n", encoding="utf-8")
    assert main(["hooks", "new", "custom_rm", str(file)]) == 2
    assert "overwrites nothing" in capsys.readouterr().err
    assert file.read_text(encoding="utf-8") == "precious = 1\n"
    assert main(["hooks", "new", "custom_rn", str(tmp_path / "a.py")]) == 2
    assert "did you mean 'custom_rm'?" in capsys.readouterr().err
    assert main(["hooks", "new", "custom_rm", "--form", "verl"]) == 2
    assert "expected one of native, slime, vime, miles" in capsys.readouterr().err
    assert main(["hooks", "new", "custom_rm", str(tmp_path / "a.txt")]) == 2
    assert main(["hooks", "new"]) == 2


def test_a_source_of_the_family_is_checked_with_neither_data_nor_a_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source.py"
    source.write_text(
        "from slime.rollout.data_source import RolloutDataSourceWithBuffer\n\n\n"
        "class Halving(RolloutDataSourceWithBuffer):\n"
        "    def __init__(self, args):\n"
        "        super().__init__(args)\n"
        "        del self.dataset.samples[len(self) // 2 + 1 :]\n",
        encoding="utf-8",
    )
    assert main(["hooks", "check", "--data-source-path", f"{source}:Halving"]) == 0
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"input": "1+1=", "label": "2"}\n' * 4, encoding="utf-8")
    argv = ["--data-source-path", f"{source}:Halving", "--prompt-data", str(rows)]
    assert main(["hooks", "check", *argv]) == 0
    assert "could not be judged" not in capsys.readouterr().out


def test_a_rollout_function_that_scores_by_the_family_is_checked_without_a_reward(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rollout = tmp_path / "rollout.py"
    rollout.write_text(
        "from slime.rollout.sglang_rollout import GenerateState, generate_and_rm_group\n\n\n"
        "async def rollout(args, rollout_id, data_source, evaluation=False):\n"
        "    how = GenerateState(args).sampling_params\n"
        "    groups = data_source.get_samples(args.rollout_batch_size)\n"
        "    return [await generate_and_rm_group(args, group, dict(how)) for group in groups]\n",
        encoding="utf-8",
    )
    code = main(["hooks", "check", "--rollout-function-path", f"{rollout}:rollout"])
    assert code == 0, capsys.readouterr().out


def test_a_function_that_reads_no_engine_is_checked_beside_torch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_eval.py").write_text(
        "import torch\nfrom miles.rollout.base_types import RolloutFnEvalOutput\n\n\n"
        "def evaluate(args, rollout_id, data_source, evaluation=False):\n"
        "    own = {'rewards': [float(torch.ones(()))], 'truncated': [False]}\n"
        "    return RolloutFnEvalOutput(data={'own': own})\n",
        encoding="utf-8",
    )
    code = main(["hooks", "check", "--eval-function-path", "own_eval.evaluate"])
    out = capsys.readouterr().out
    assert (code, "could not be judged" in out) == (0, False), out


def test_a_library_that_a_thread_of_the_function_imports_takes_its_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reward = tmp_path / "reward.py"
    reward.write_text(
        "import asyncio\n\n\ndef judge():\n    import torch\n    return float(torch.ones(()))\n\n\n"
        "async def reward(sample):\n    return await asyncio.to_thread(judge)\n",
        encoding="utf-8",
    )
    argv = ["--custom-rm-path", f"{reward}:reward", "--hook-check-timeout-s", "0.4"]
    code = main(["hooks", "check", *argv])
    assert code == 0, capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "code", "verdict"),
    [
        (["--eval-prompt-data", "aime"], 0, "ok "),
        (["--eval-prompt-data", "amc"], 1, "KeyError: 'aime'"),
        ([], 0, "reads the evaluation set 'aime', which a rehearsal does not have"),
    ],
)
def test_a_function_that_logs_evaluations_gets_the_sets_of_the_run(
    flags: list[str], code: int, verdict: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"input": "1+1=", "label": "2"}\n', encoding="utf-8")
    log = tmp_path / "log.py"
    log.write_text(
        "def log_eval(rollout_id, args, data, extra_metrics):\n"
        "    return sum(data['aime']['rewards']) < 0 or extra_metrics['eval/aime/reward'] < 0\n",
        encoding="utf-8",
    )
    argv = ["--custom-eval-rollout-log-function-path", f"{log}:log_eval", *flags]
    assert main(["hooks", "check", *argv, *([str(rows)] if flags else [])]) == code
    assert verdict in capsys.readouterr().out
