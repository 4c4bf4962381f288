"""Every kind of bad input ends in one message that names what, where and the cure: exit code 2 when
the run was asked for wrongly, 1 when it failed on the way.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from dovetail.cli.main import main
from tests.loop.good_run import Place, make_shared
from tests.loop.tiny import make_model

REWARDS = {
    "syntax": "def reward(sample)\n    return 1.0\n",
    "signature": "def reward(prompt, answer, weight):\n    return 1.0\n",
    "raises": "def reward(sample):\n    raise RuntimeError('no judge today')\n",
    "nan": "def reward(sample):\n    return float('nan')\n",
    "text": "def reward(sample):\n    return 'very good'\n",
    "imports": "import no_such_package\n\ndef reward(sample):\n    return 1.0\n",
    "number": "reward = 3\n",
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("shared")
    make_shared(directory)
    make_model(directory / "other", "llama", hidden_size=48, head_dim=12)
    for name, text in REWARDS.items():
        (directory / f"{name}.py").write_text(text, encoding="utf-8")
    place = Place(directory, directory)
    code = main(place.train(run_dir=directory / "trained", save_interval=1))
    assert code == 0
    return directory


@pytest.fixture
def place(shared: Path, tmp_path: Path) -> Place:
    return Place(shared, tmp_path)


@dataclass(frozen=True)
class Case:
    """One kind of bad input: its command line, the exit code, and what the message has to name."""

    name: str
    argv: Callable[[Place], list[str]]
    code: int
    says: tuple[str, ...]


def _damaged_model(place: Place, damage: Callable[[Path], object]) -> str:
    copy = place.own / "model"
    shutil.copytree(place.shared / "model", copy)
    damage(copy)
    return str(copy)


def _damaged_run(place: Place, damage: Callable[[Path], object]) -> str:
    copy = place.own / "checkpoints"
    shutil.copytree(place.shared / "trained" / "checkpoints", copy)
    damage(copy / "step_000001")
    return str(copy)


def _garbage(path: Path) -> None:
    path.write_bytes(b"\x00garbage" * 100)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _toml(place: Place, text: str) -> list[str]:
    return ["train", place.write("run.toml", text), *place.flags()]


def _data(text: str | bytes, name: str = "data.jsonl") -> Callable[[Place], list[str]]:
    return lambda place: place.train(prompt_data=place.write(name, text))


def _slice(part: str) -> Callable[[Place], list[str]]:
    return lambda p: p.train(prompt_data=f"{p.shared}/rows.jsonl@{part}")


def _with(**changes: object) -> Callable[[Place], list[str]]:
    return lambda place: place.train(**changes)


def _reward(name: str, **changes: object) -> Callable[[Place], list[str]]:
    return lambda p: p.train(custom_rm_path=f"{p.shared}/{name}.py:reward", **changes)


def _unchecked(name: str) -> Callable[[Place], list[str]]:
    return _reward(name, max_reward_failures=3, check_hooks=False)


def _load(**changes: object) -> Callable[[Place], list[str]]:
    def argv(place: Place) -> list[str]:
        values = {"load": place.shared / "trained" / "checkpoints", "num_rollout": 2}
        ready = {k: v(place) if callable(v) else v for k, v in changes.items()}
        return place.train(**{**values, **ready})

    return argv


GOOD = '{"input": "1+1=", "label": "2"}\n'
DATA = (
    Case("prompt file missing", _with(prompt_data="no.jsonl"), 2, ("'no.jsonl' does not exist",)),
    Case("line is not JSON", _data(GOOD * 2 + '{"input": "1+\n'), 2, ("data.jsonl:3",)),
    Case("line is no object", _data(GOOD + "[1, 2]\n"), 2, ("data.jsonl:2", "object")),
    Case("file is empty", _data(""), 2, ("data.jsonl", "no rows")),
    Case("file is not UTF-8", _data(GOOD.encode() + b'{"input": "\xff\xfe"}\n'), 2, (".jsonl:2",)),
    Case("prompt column missing", _data('{"question": "1"}\n'), 2, (".jsonl:1", "--input-key")),
    Case("label column missing", _with(label_key="answer"), 2, (".jsonl:1", "--label-key")),
    Case("prompt is a number", _data('{"input": 3, "label": "x"}\n'), 2, (".jsonl:1", "got 3")),
    Case(
        "slice is empty", lambda p: p.train(prompt_data=f"{p.shared}/rows.jsonl@[100:200]"), 2, ()
    ),
    Case(
        "slice is malformed", lambda p: p.train(prompt_data=f"{p.shared}/rows.jsonl@[a:b]"), 2, ()
    ),
    Case("not parquet inside", _data("hello", "data.parquet"), 2, ("data.parquet",)),
    Case("all prompts too long", _with(rollout_max_prompt_len=1), 2, ("--rollout-max-prompt-len",)),
    Case("prompt data is a directory", lambda p: p.train(prompt_data=p.own), 2, ("no .parquet",)),
    Case("no chat template", _with(apply_chat_template=True), 2, ("chat template",)),
    Case(
        "malformed chat messages",
        _data('{"input": [{"role": "user"}], "label": "2"}\n'),
        2,
        (".jsonl:1",),
    ),
)
SETTINGS = (
    Case("unknown flag", _with(rollout_batchsize=2), 2, ("did you mean --rollout-batch-size?",)),
    Case("unknown TOML key", lambda p: _toml(p, "[optimizer]\nlearn = 1\n"), 2, ("run.toml",)),
    Case("unknown TOML section", lambda p: _toml(p, "[optimiser]\nlr = 1\n"), 2, ("optimizer",)),
    Case("broken TOML", lambda p: _toml(p, "[optimizer\nlr = 1\n"), 2, ("run.toml:1", "column 11")),
    Case("wrong type", _with(rollout_batch_size="many"), 2, ("--rollout-batch-size", "'many'")),
    Case("wrong type in TOML", lambda p: _toml(p, '[optimizer]\nlr = "x"\n'), 2, ("lr", "'x'")),
    Case("out of bounds", _with(rollout_top_p=1.5), 2, ("--rollout-top-p", "1.5")),
    Case("no choice of this name", _with(dtype="float16"), 2, ("--dtype", "bfloat16")),
    Case("value missing", lambda p: [*p.train(), "--lr"], 2, ("--lr needs a value",)),
    Case("unknown reward", _with(rm_type="maths", custom_rm_path=None), 2, ("mean 'math'?",)),
    Case("unknown advantage", _with(advantage_estimator="grpoo"), 2, ("mean 'grpo'?",)),
    Case("unknown engine", _with(rollout_engine="embeded"), 2, ("mean 'embedded'?",)),
    Case("impossible batch", _with(global_batch_size=3), 2, ("--global-batch-size 2",)),
    Case("group of one", _with(n_samples_per_prompt=1), 2, ("--n-samples-per-prompt 8",)),
    Case("no reward", _with(custom_rm_path=None), 2, ("--rm-type math", "--custom-rm-path")),
    Case(
        "evaluation set without a reward",
        lambda p: ["eval", *p.flags(custom_rm_path=None), *_heldout(p)],
        2,
        ("'heldout' has no reward",),
    ),
    Case(
        "evaluation set missing",
        _with(eval_interval=1, eval_prompt_data=["a", "no.jsonl"]),
        2,
        ("evaluation set 'a'", "no.jsonl"),
    ),
    Case("odd evaluation words", _with(eval_prompt_data=["a"]), 2, ("pairs",)),
    Case("length of run unknown", _with(num_rollout=None), 2, ("--num-rollout 100",)),
    Case("KL without coefficient", _with(use_kl_loss=True), 2, ("--kl-loss-coef",)),
    Case("coefficient without KL", _with(kl_loss_coef=0.1), 2, ("--use-kl-loss",)),
    Case(
        "no cluster here",
        _with(mode="colocated", ray_address="127.0.0.1:9"),
        2,
        ("--ray-address", "127.0.0.1:9"),
    ),
    Case(
        "epoch below a step",
        _with(num_rollout=None, num_epoch=1, rollout_batch_size=65),
        2,
        ("64",),
    ),
    Case(
        "response fills the context",
        _with(rollout_max_context_len=4),
        2,
        ("rollout_max_response_len 4", "--rollout-max-context-len"),
    ),
    Case("response over the model's context", _with(rollout_max_response_len=300), 2, ("256",)),
    Case("replay without data", _with(debug_train_only=True), 2, ("--load-debug-rollout-data",)),
    Case(
        "replayed file missing",
        _with(load_debug_rollout_data="no_{rollout_id}.jsonl"),
        2,
        ("no_0.jsonl", "--load-debug-rollout-data"),
    ),
    Case("template without a step", _with(save_hf="out_{step}"), 2, ("--save-hf", "{rollout_id}")),
    Case("template with a lone brace", _with(save_debug_rollout_data="a{"), 2, ("'a{'",)),
    Case("min_lr above lr", _with(min_lr=1.0), 2, ("--min-lr",)),
    Case("warm-up beyond the decay", _with(lr_warmup_iters=9, lr_decay_iters=9), 2, ("--lr-wa",)),
    Case("nothing to evaluate", _with(eval_interval=1), 2, ("--eval-prompt-data NAME PATH",)),
    Case("eval without a set", lambda p: ["eval", *p.flags()], 2, ("nothing to evaluate",)),
    Case("JSON flag is not JSON", _with(apply_chat_template_kwargs="{x}"), 2, ("JSON object",)),
    Case("file after flags", lambda p: [*p.train(), "--lr", "1", "run.toml"], 2, ("'run.toml'",)),
    Case(
        "remote reward without address",
        _with(rm_type="remote_rm", custom_rm_path=None),
        2,
        ("--rm-url",),
    ),
    Case("tracker of no name", _with(trackers=["graphite"]), 2, ("graphite",)),
    Case("run name with a slash", _with(run_name="a/b"), 2, ("--run-name",)),
)
HOOKS = (
    Case("reward file missing", _with(custom_rm_path="no.py:reward"), 2, ("no.py",)),
    Case("reward module missing", _with(custom_rm_path="no_such.reward"), 2, ("no_such",)),
    Case(
        "reward function missing",
        lambda p: p.train(custom_rm_path=f"{p.shared}/good.py:rewrad"),
        2,
        ("rewrad", "reward"),
    ),
    Case("reward is no function", _reward("number"), 2, ("number.py",)),
    Case("reward has a syntax error", _reward("syntax"), 2, ("syntax.py", "line 1")),
    Case("reward imports what is not there", _reward("imports"), 2, ("no_such_package",)),
    Case("reward of the wrong form", _reward("signature"), 2, ("(prompt, answer, weight)",)),
    Case("reward raises when tried out", _reward("raises"), 2, ("no judge today", "raises.py:2")),
    Case("reward is no number when tried out", _reward("nan"), 2, ("NaN", "--no-check-hooks")),
    Case("reward always raises", _unchecked("raises"), 1, ("no judge today",)),
    Case("reward is never a number", _unchecked("nan"), 1, ("nan",)),
    Case("reward is text", _unchecked("text"), 1, ("str",)),
    Case(
        "filter drops everything",
        lambda p: p.train(
            dynamic_sampling_filter_path=p.write("f.py", "def keep(samples): return False\n")
            + ":keep",
            max_dropped_groups=3,
        ),
        1,
        ("3 groups", "--max-dropped-groups"),
    ),
    Case(
        "generate always raises",
        lambda p: p.train(
            custom_generate_function_path=p.write(
                "g.py", "async def gen(args, sample, sampling_params):\n    raise OSError('down')\n"
            )
            + ":gen",
            max_failed_groups=3,
        ),
        1,
        ("down",),
    ),
)
MODELS = (
    Case("model missing", _with(hf_checkpoint="/no/model"), 2, ("'/no/model'",)),
    Case("model by an unknown name", _with(hf_checkpoint="nobody/nothing"), 2, ("nobody/nothing",)),
    Case(
        "model directory is empty",
        lambda p: p.train(hf_checkpoint=_damaged_model(p, lambda d: _empty(d))),
        2,
        ("config.json",),
    ),
    Case(
        "tokenizer missing",
        lambda p: p.train(
            hf_checkpoint=_damaged_model(p, lambda d: [f.unlink() for f in d.glob("tok*")])
        ),
        2,
        ("tokenizer",),
    ),
    Case(
        "weights missing",
        lambda p: p.train(
            hf_checkpoint=_damaged_model(p, lambda d: (d / "model.safetensors").unlink())
        ),
        1,
        ("model",),
    ),
    Case(
        "weights are garbage",
        lambda p: p.train(
            hf_checkpoint=_damaged_model(p, lambda d: _garbage(d / "model.safetensors"))
        ),
        1,
        ("model.safetensors",),
    ),
    Case(
        "weights are cut short",
        lambda p: p.train(hf_checkpoint=_damaged_model(p, lambda d: _cut(d / "model.safetensors"))),
        1,
        ("model.safetensors",),
    ),
    Case(
        "config.json is garbage",
        lambda p: p.train(hf_checkpoint=_damaged_model(p, lambda d: _garbage(d / "config.json"))),
        1,
        ("config.json",),
    ),
    Case("no GPU", _with(device="cuda"), 2, ("--device",)),
    Case(
        "reference of another shape",
        lambda p: p.train(
            use_kl_loss=True,
            kl_loss_coef=0.1,
            ref_load=_damaged_model(p, lambda d: _other_vocabulary(d)),
        ),
        2,
        ("--ref-load",),
    ),
)
CHECKPOINTS = (
    Case("checkpoint missing", _load(load="/no/checkpoints"), 2, ("/no/checkpoints", "--load")),
    Case("directory without checkpoints", _load(load=lambda p: p.own), 1, ("no checkpoint",)),
    Case(
        "checkpoint is garbage",
        _load(load=lambda p: _damaged_run(p, lambda d: _garbage(d / "policy.safetensors"))),
        1,
        ("policy.safetensors",),
    ),
    Case(
        "checkpoint is cut short",
        _load(load=lambda p: _damaged_run(p, lambda d: _cut(d / "policy.safetensors"))),
        1,
        ("policy.safetensors",),
    ),
    Case(
        "checkpoint lacks a file",
        _load(load=lambda p: _damaged_run(p, lambda d: (d / "source.json").unlink())),
        1,
        ("source.json",),
    ),
    Case("checkpoint is a file", _load(load=lambda p: p.write("file", "x")), 1, ("file",)),
    Case(
        "checkpoint of another model",
        _load(hf_checkpoint=lambda p: p.shared / "other"),
        1,
        ("model",),
    ),
    Case(
        "checkpoint of other data",
        _load(prompt_data=lambda p: p.write("data.jsonl", GOOD * 3)),
        1,
        ("--prompt-data",),
    ),
    Case(
        "run directory holds a run",
        lambda p: p.train(run_dir=p.shared / "trained"),
        2,
        ("trained", "--load", "--run-dir"),
    ),
    Case(
        "run directory is a file", lambda p: p.train(run_dir=p.write("f", "x")), 2, ("--run-dir",)
    ),
    Case("save is a file", lambda p: p.train(save=p.write("f", "x")), 2, ("--save",)),
    Case(
        "export directory holds something",
        lambda p: p.train(save_hf=str(Path(p.write("out/x", "x")).parent)),
        2,
        ("--save-hf",),
    ),
    Case(
        "converting what is no checkpoint",
        lambda p: ["convert", str(p.shared / "model"), str(p.own / "out")],
        1,
        ("model",),
    ),
)
CASES = DATA + SETTINGS + HOOKS + MODELS + CHECKPOINTS


def _heldout(place: Place) -> list[str]:
    return ["--eval-prompt-data", "heldout", str(place.shared / "rows.jsonl")]


def _empty(directory: Path) -> None:
    for path in directory.iterdir():
        path.unlink()


def _other_vocabulary(directory: Path) -> None:
    shutil.rmtree(directory)
    make_model(directory, vocab_size=50)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_is_one_message(
    case: Case, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    if case.name == "no GPU" and torch.cuda.is_available():
        pytest.skip("there is one")
    argv = case.argv(place)
    capsys.readouterr()
    code = main(argv)
    captured = capsys.readouterr()
    aside = ("note: ", "warning: ")
    err = "".join(line for line in captured.err.splitlines(True) if not line.startswith(aside))
    assert err.startswith("error: ") and err.count("error: ") == 1, err
    assert "Traceback" not in err and "traceback" not in err
    for words in case.says:
        assert words in err, err
    assert code == case.code
