from pathlib import Path

import pytest

from dovetail.config.leaves import leaves, sections
from dovetail.config.resolve import Resolved, resolve
from dovetail.types.errors import ConfigError


def _file(folder: Path, text: str, name: str = "run.toml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def _error(files: list[Path], flags: list[str]) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(files, flags)
    return str(caught.value)


def test_defaults_lose_to_files_and_files_to_later_files_and_to_flags(tmp_path: Path) -> None:
    first = _file(
        tmp_path, "[rollout]\nrollout_batch_size = 2\nn_samples_per_prompt = 4\n", "a.toml"
    )
    second = _file(tmp_path, "[rollout]\nn_samples_per_prompt = 5\nrollout_top_k = 7\n", "b.toml")
    resolved = resolve([first, second], ["--rollout-top-k", "9"])
    rollout = resolved.config.rollout
    assert (rollout.rollout_batch_size, rollout.n_samples_per_prompt) == (2, 5)
    assert (rollout.rollout_top_k, rollout.rollout_top_p) == (9, 1.0)
    assert resolved.origins["rollout_batch_size"] == f"{first}:rollout.rollout_batch_size"
    assert resolved.origins["n_samples_per_prompt"] == f"{second}:rollout.n_samples_per_prompt"
    assert resolved.origins["rollout_top_k"] == "flag --rollout-top-k"
    assert resolved.origins["rollout_top_p"] == "default"
    assert list(resolved.origins) == list(leaves())


def test_every_leaf_has_one_line_of_help_and_a_section_that_explains_itself() -> None:
    assert len(leaves()) == sum(len(s.model_fields) for s in sections().values())
    for leaf in leaves().values():
        assert leaf.help and "\n" not in leaf.help, leaf.name
        assert leaf.help.endswith((".", "...", "]")), f"{leaf.name}: {leaf.help}"
    assert all(section.__doc__ for section in sections().values())


def test_flags_take_values_in_all_their_forms() -> None:
    config = resolve(
        [],
        [
            *("--rollout-stop", "END", "\n\n", "--rollout-stop-token-ids", "5", "6"),
            *("--partial-rollout", "--no-use-tensorboard", "--lr=2e-5", "--rollout-top-k", "-1"),
            *("--apply-chat-template-kwargs", '{"enable_thinking": false}'),
            *("--use-wandb=false", "--eval-temperature=0"),
        ],
    ).config
    assert config.rollout.rollout_stop == ["END", "\n\n"]
    assert config.rollout.rollout_stop_token_ids == [5, 6]
    assert config.rollout.partial_rollout and not config.observe.use_tensorboard
    assert config.optimizer.lr == 2e-5 and config.rollout.rollout_top_k == -1
    assert config.data.apply_chat_template_kwargs == {"enable_thinking": False}
    assert not config.observe.use_wandb and config.eval.eval_temperature == 0


def test_a_no_flag_unsets_what_a_file_set(tmp_path: Path) -> None:
    path = _file(tmp_path, '[eval]\neval_interval = 5\n[rollout]\nrollout_stop = ["a"]\n')
    config = resolve([path], ["--no-eval-interval", "--no-rollout-stop"]).config
    assert config.eval.eval_interval is None and config.rollout.rollout_stop == []


def test_a_stop_string_that_looks_like_a_flag_is_given_with_an_equals_sign() -> None:
    assert resolve([], ["--rollout-stop=--end"]).config.rollout.rollout_stop == ["--end"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--rollout-batchsize", "3"], "did you mean --rollout-batch-size?"),
        (["--n-samples-per-promt", "3"], "did you mean --n-samples-per-prompt?"),
        (["--qqqq"], "unknown flag --qqqq; dovetail train --help lists all of them"),
        (["--lr"], "--lr needs a value: a number (at least 0)"),
        (["--lr", "fast"], "lr got 'fast' from flag --lr, expected a number (at least 0)"),
        (["--lr", "nan"], "lr got 'nan' from flag --lr, expected a number"),
        (["--rollout-top-p", "1.5"], "expected a number (above 0, at most 1)"),
        (
            ["--dtype", "int3"],
            "dtype got 'int3' from flag --dtype, expected one of bfloat16, float32",
        ),
        (["--rollout-stop-token-ids", "1", "x"], "expected a list of integers"),
        (["--eval-sets", "{"], "expected a JSON object"),
        (["--eval-sets", "[1]"], "expected a JSON object (a table in TOML)"),
        (["--partial-rollout", "yes"], "unexpected 'yes'"),
        (["--partial-rollout=maybe"], "got 'maybe', expected true or false"),
        (["--no-seed"], "does not exist: seed is always set; use --seed"),
        (["--lr", "1", "run.toml"], "unexpected 'run.toml'; run files come before all flags"),
    ],
)
def test_a_wrong_flag_is_one_clear_error(flags: list[str], expected: str) -> None:
    assert expected in _error([], flags)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "[rollout]\n\nrollout_batchsize = 3\n",
            "run.toml:3: unknown key rollout_batchsize; "
            "did you mean rollout_batch_size, in table [rollout]?",
        ),
        ("[data]\nlr = 1.0\n", "run.toml:2: lr belongs in table [optimizer], not in [data]"),
        (
            "[rolout]\nrollout_batch_size = 3\n",
            "run.toml:1: unknown table [rolout]; did you mean [rollout]?",
        ),
        (
            "[rollout]\nrollout_batch_size = 'eight'\n",
            "run.toml:2: rollout_batch_size got 'eight', expected an integer (at least 1)",
        ),
        ("[rollout]\nrollout_batch_size = true\n", "got True, expected an integer"),
        ("[rollout]\npartial_rollout = 1\n", "got 1, expected true or false"),
        ("[rollout]\nrollout_batch_size = 0\n", "rollout_batch_size got 0 from "),
        ("[rollout]\nrollout_stop = 'x'\n", "expected a list of strings"),
        ("[rollout\nx = 1\n", "run.toml:1, column 9: not valid TOML"),
        ("[rollout]\nx = \n", "run.toml:2, column 5: not valid TOML"),
        (
            "use_indexer_replay = true\n",
            "run.toml:1: --use-indexer-replay is a flag of the slime family",
        ),
    ],
)
def test_a_wrong_file_is_one_clear_error_with_file_and_line(
    tmp_path: Path, text: str, expected: str
) -> None:
    assert expected in _error([_file(tmp_path, text)], [])


def test_a_missing_or_binary_file_is_named(tmp_path: Path) -> None:
    assert f"run file {tmp_path}/no.toml does not exist" in _error([tmp_path / "no.toml"], [])
    binary = tmp_path / "b.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert f"run file {binary} can't be read" in _error([binary], [])


def test_leaves_may_stand_before_the_first_table(tmp_path: Path) -> None:
    resolved = resolve([_file(tmp_path, "lr = 3e-4\n[data]\nnum_rollout = 2\n")], [])
    assert resolved.config.optimizer.lr == 3e-4 and resolved.config.data.num_rollout == 2


def _set(resolved: Resolved) -> dict[str, str]:
    return {name: origin for name, origin in resolved.origins.items() if origin != "default"}


def test_foreign_spellings_set_our_leaves_and_keep_their_own_origin(tmp_path: Path) -> None:
    resolved = resolve([], ["--disable-grpo-std-normalization", "--disable-rewards-normalization"])
    assert not resolved.config.algorithm.grpo_std_normalization
    assert not resolved.config.algorithm.rewards_normalization
    assert _set(resolved)["grpo_std_normalization"] == "flag --disable-grpo-std-normalization"
    assert resolve([], ["--colocate"]).config.runtime.mode == "colocated"
    assert resolve([], ["--recompute-granularity", "full"]).config.model.gradient_checkpointing
    path = _file(tmp_path, "[algorithm]\ndisable_rewards_normalization = false\n")
    assert resolve([path], []).config.algorithm.rewards_normalization


def test_settings_without_effect_are_accepted_and_told_once() -> None:
    resolved = resolve([], ["--actor-num-nodes", "1", "--use-dynamic-batch-size", "--swiglu"])
    assert _set(resolved) == {"actor_num_nodes": "flag --actor-num-nodes"}
    assert [note.split(" (")[0] for note in resolved.notes] == [
        "without effect in this run: flag --use-dynamic-batch-size",
        "without effect in this run: flag --swiglu",
    ]


def test_other_owners_settings_are_handed_through(tmp_path: Path) -> None:
    path = _file(tmp_path, "[vllm]\nmax_num_seqs = 8\n")
    resolved = resolve([path], ["--sglang-mem-fraction-static", "0.7", "--megatron-x", "--lr", "1"])
    assert resolved.passthrough == {
        "vllm_max_num_seqs": 8,
        "sglang_mem_fraction_static": "0.7",
        "megatron_x": True,
    }
    assert len(resolved.notes) == 1 and "--vllm-max-num-seqs" in resolved.notes[0]


def test_a_misspelt_flag_of_the_router_is_no_setting_of_somebody_else() -> None:
    assert "unknown flag --router-prot; did you mean --router-port?" in _error(
        [], ["--router-prot", "30000"]
    )
    assert "did you mean --router-token-env?" in _error([], ["--router-api-key", "secret"])


def test_settings_of_sglangs_router_are_taken_or_told_as_without_effect() -> None:
    resolved = resolve(
        [], ["--router-request-timeout-secs", "90", "--router-balance-abs-threshold", "8"]
    )
    assert resolved.config.router.router_request_timeout_s == 90
    (note,) = resolved.notes
    assert "--router-balance-abs-threshold" in note and "a router of its own" in note


def test_known_but_unsupported_foreign_flags_are_not_called_unknown() -> None:
    assert "this version does not support yet" in _error([], ["--use-indexer-replay"])
    assert "use --num-rollout instead" in _error([], ["--train-iters", "100"])
    assert "use --max-lag N instead" in _error([], ["--fully-async"])


_SLIME_SCRIPT = """
    --hf-checkpoint m --load c --save c --save-interval 20 --prompt-data d.jsonl
    --input-key prompt --label-key label --apply-chat-template --rollout-shuffle
    --rm-type math --num-rollout 3000 --rollout-batch-size 32 --n-samples-per-prompt 8
    --rollout-max-response-len 8192 --rollout-temperature 0.8 --global-batch-size 256
    --balance-data --eval-interval 20 --eval-prompt-data aime a.jsonl
    --n-samples-per-eval-prompt 16 --eval-max-response-len 16384 --eval-top-p 0.7
    --tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 1
    --recompute-granularity full --recompute-method uniform --recompute-num-layers 1
    --use-dynamic-batch-size --max-tokens-per-gpu 9216 --advantage-estimator grpo
    --use-kl-loss --kl-loss-coef 0.00 --kl-loss-type low_var_kl --entropy-coef 0.00
    --eps-clip 0.2 --eps-clip-high 0.28 --optimizer adam --lr 1e-6 --lr-decay-style constant
    --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.98 --rollout-num-gpus-per-engine 2
    --sglang-mem-fraction-static 0.7 --attention-dropout 0.0 --hidden-dropout 0.0
    --accumulate-allreduce-grads-in-fp32 --attention-softmax-in-fp32 --attention-backend flash
"""


def test_the_flags_of_a_usual_slime_script_are_understood_on_one_device() -> None:
    config = resolve([], _SLIME_SCRIPT.split()).config
    assert config.rollout.rollout_max_response_len == 8192 and config.optimizer.adam_beta2 == 0.98
    assert config.model.gradient_checkpointing and config.batch.max_tokens_per_gpu == 9216
    assert "here it is always adam or adamw" in _error([], ["--optimizer", "sgd"])


def test_a_resolved_config_cannot_be_written_to() -> None:
    config = resolve().config
    with pytest.raises(ValueError, match="frozen"):
        config.optimizer.lr = 1.0  # type: ignore[misc]
