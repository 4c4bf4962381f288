from pathlib import Path

import pytest

from dovetail.config.check import check, check_evaluation, check_names
from dovetail.config.eval_sets import eval_sets
from dovetail.config.notes import notes
from dovetail.config.resolve import resolve
from dovetail.config.run import RunConfig
from dovetail.types.errors import ConfigError


@pytest.fixture
def paths(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "model").mkdir()
    (tmp_path / "train.jsonl").write_text('{"input": "1+1=", "label": "2"}\n')
    return {"model": str(tmp_path / "model"), "data": str(tmp_path / "train.jsonl")}


def _config(paths: dict[str, str], *changes: str) -> RunConfig:
    base = ["--hf-checkpoint", paths["model"], "--prompt-data", paths["data"]]
    base += ["--num-rollout", "3", "--rollout-batch-size", "4", "--n-samples-per-prompt", "6"]
    base += ["--label-key", "label", "--rm-type", "math"]
    return resolve([], [*base, *(word.format(**paths) for word in changes)]).config


def test_a_complete_run_passes_and_has_nothing_to_note(paths: dict[str, str]) -> None:
    config = _config(paths, "--prompt-data", "{data}@[0:1]", "--eval-interval", "1")
    config = _config(paths, "--eval-interval", "1", "--eval-prompt-data", "held", "{data}@[0:1]")
    check(config)
    assert notes(config) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ("--no-hf-checkpoint", "no model; give its directory: --hf-checkpoint DIR"),
        ("--hf-checkpoint /no/such/dir", "hf_checkpoint '/no/such/dir' is not a directory"),
        ("--use-kl-loss --kl-loss-coef 0 --ref-load {model}/x", "ref_load '"),
        ("--no-prompt-data", "no prompts; --prompt-data FILE.jsonl"),
        ("--prompt-data {data}x@[0:5]", "train.jsonlx' does not exist"),
        ("--no-num-rollout", "how long to run? --num-rollout 100"),
        ("--no-num-rollout --num-epoch 1 --no-prompt-data", "num_epoch counts passes"),
        (
            "--global-batch-size 5",
            "a rollout gives 24 samples (rollout_batch_size 4 x n_samples_per_prompt 6), which "
            "global_batch_size 5 does not divide; use a divisor of 24, e.g. --global-batch-size 4 "
            "(TOML: batch.global_batch_size)",
        ),
        ("--global-batch-size 48", "which global_batch_size 48 does not divide"),
        ("--num-steps-per-rollout 5", "which num_steps_per_rollout 5 does not divide"),
        ("--global-batch-size 12 --num-steps-per-rollout 3", "makes 2 optimizer steps of it"),
        (
            "--over-sampling-batch-size 3",
            "over_sampling_batch_size 3 is below rollout_batch_size 4",
        ),
        ("--mask-offpolicy-in-partial-rollout", "add --partial-rollout"),
        ("--rollout-stop-token-ids 1 -5", "rollout_stop_token_ids has [-5]"),
        ("--rollout-max-context-len 256", "rollout_max_response_len 256 leaves no room"),
        ("--rollout-min-new-tokens 300", "rollout_min_new_tokens 300 is above"),
        ("--no-rm-type", "no reward; --rm-type math"),
        ("--rm-type remote_rm", "rm_type 'remote_rm' has nowhere to post to; --rm-url"),
        ("--n-samples-per-prompt 1", "every advantage would be 0; --n-samples-per-prompt 8"),
        ("--use-kl-loss", "use_kl_loss has no coefficient; --kl-loss-coef 0.001"),
        ("--kl-loss-coef 0.1", "kl_loss_coef 0.1 does nothing without a KL loss"),
        ("--min-lr 1", "min_lr 1.0 is above lr 1e-06"),
        ("--lr-decay-iters 5 --lr-warmup-iters 5", "does not end before lr_decay_iters 5"),
        ("--eval-interval 5", "eval_interval 5 has nothing to evaluate"),
        ("--eval-prompt-data held", "got 1 words ['held'], expected pairs"),
        ("--eval-prompt-data a {data} a {data}", "evaluation set 'a' is named twice"),
        ("--eval-prompt-data a {data}y", "train.jsonly' does not exist"),
        ("--no-rm-type --eval-prompt-data a {data}", "evaluation set 'a' has no reward"),
        ("--loss-type sft_loss --no-label-key", "which is not named; --label-key label"),
        ("--load /no/checkpoint", "load '/no/checkpoint' does not exist"),
        ("--save {data}", "is a file, expected a directory"),
        ("--debug-train-only", "debug_train_only has no samples to train on"),
        ("--debug-rollout-only --load-debug-rollout-data x", "debug_rollout_only never trains"),
        ("--save-debug-rollout-data out.jsonl", "would be overwritten every step"),
        ("--loss-type custom_loss", "has no function; --custom-loss-function-path path/loss.py"),
        ("--custom-loss-function-path a.py:b", "is never called under loss_type 'policy_loss'"),
        ("--custom-tis-function-path a.py:b", "is never called; add --use-tis"),
        ("--use-tis --loss-type sft_loss", "use_tis belongs to the policy loss"),
        ("--use-tis --use-rollout-logprobs", "leave one of them out (--no-use-rollout-logprobs"),
        ("--use-tis --tis-clip-low 3", "tis_clip_low 3.0 is above tis_clip 2.0"),
        (
            "--custom-loss-function-path a.py:b --loss-type custom_loss "
            "--custom-pg-loss-reducer-function-path a.py:c",
            "custom_pg_loss_reducer_function_path belongs to the policy loss",
        ),
        (
            "--custom-convert-samples-to-train-data-path a.py:b "
            "--custom-reward-post-process-path a.py:c",
            "'a.py:c' is never called: custom_convert_samples_to_train_data_path makes the rewards",
        ),
        (
            "--loss-type sft_loss --custom-advantage-function-path a.py:b",
            "'sft_loss' has no advantages",
        ),
        (
            "--advantage-estimator ppo --save-hf out --critic-save ./out",
            "is where save_hf writes the policy, which the critic would replace; --critic-save",
        ),
    ],
)
def test_what_can_not_run_is_refused_with_the_cure(
    paths: dict[str, str], changes: str, expected: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check(_config(paths, *changes.split()))
    assert expected in str(caught.value)
    assert "TOML: " in str(caught.value) or "does not exist" in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        "--n-samples-per-prompt 1 --no-rewards-normalization",
        "--n-samples-per-prompt 1 --debug-rollout-only",
        "--n-samples-per-prompt 1 --rollout-function-path own.py:rollout",
        "--n-samples-per-prompt 1 --no-rm-type --loss-type sft_loss",
        "--no-rm-type --custom-rm-path reward.py:f",
        "--no-prompt-data --no-rm-type --rollout-function-path own.py:rollout",
        "--no-prompt-data --no-rm-type --load-debug-rollout-data step_{{rollout_id}}.jsonl",
        "--use-kl-loss --kl-loss-coef 0",
        "--global-batch-size 12 --num-steps-per-rollout 2",
        "--hf-checkpoint Qwen/Qwen3-0.6B",
        "--load new/dir --save new/dir",
        "--num-rollout 0",
        "--use-tis --custom-tis-function-path a.py:b",
        "--get-mismatch-metrics --use-rollout-logprobs",
        "--n-samples-per-prompt 1 --custom-advantage-function-path a.py:b",
    ],
)
def test_unusual_but_sound_combinations_pass(paths: dict[str, str], changes: str) -> None:
    check(_config(paths, *changes.split()))


def test_all_problems_are_told_at_once(paths: dict[str, str]) -> None:
    with pytest.raises(ConfigError) as caught:
        check(_config(paths, "--no-rm-type", "--global-batch-size", "7", "--kl-loss-coef", "1"))
    lines = str(caught.value).splitlines()
    assert lines[0] == "3 problems in the settings:" and len(lines) == 4


def test_names_that_no_table_has_are_refused_with_the_nearest(paths: dict[str, str]) -> None:
    tables = {
        "rewards": ["math", "random"],
        "advantages": ["grpo"],
        "losses": ["policy_loss", "sft_loss"],
        "engines": ["embedded"],
    }
    check_names(_config(paths), **tables)
    wrong = _config(paths, "--rm-type", "maths", "--loss-type", "sft", "--rollout-engine", "zzz")
    with pytest.raises(ConfigError) as caught:
        check_names(wrong, **tables)
    text = str(caught.value)
    assert "unknown rm_type 'maths'; did you mean 'math'? known: math, random; --rm-type" in text
    assert "unknown loss_type 'sft'" in text
    assert "unknown rollout_engine 'zzz'; known: embedded; --rollout-engine" in text


def test_evaluation_sets_inherit_from_the_run_and_keep_their_own_settings(
    paths: dict[str, str],
) -> None:
    changes = ["--eval-prompt-data", "plain", "{data}", "--eval-temperature", "0.5"]
    table = '{{"own": {{"path": "x", "temperature": 0, "rm_type": "random", "label_key": "y"}}}}'
    config = _config(paths, *changes, "--rollout-top-k", "5", "--eval-sets", table)
    plain, own = eval_sets(config)
    assert (plain.name, plain.path, plain.temperature, plain.top_k) == (
        "plain",
        paths["data"],
        0.5,
        5,
    )
    assert (plain.label_key, plain.rm_type, plain.max_response_len) == ("label", None, 256)
    assert (own.name, own.temperature, own.rm_type, own.label_key) == ("own", 0.0, "random", "y")


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (
            '{{"own": {{"path": "x", "temprature": 0}}}}',
            "unknown key temprature; did you mean temper",
        ),
        ('{{"own": {{"top_k": 3}}}}', "path got nothing: Field required"),
        ('{{"own": {{"path": "x", "top_p": 3}}}}', "top_p got 3: Input should be less than"),
        ('{{"a/b": {{"path": "x"}}}}', "name got 'a/b'"),
    ],
)
def test_a_wrong_evaluation_set_is_named(paths: dict[str, str], table: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=r"evaluation set '") as caught:
        eval_sets(_config(paths, "--eval-sets", table))
    assert expected in str(caught.value)


def test_evaluation_alone_needs_a_model_and_a_set_but_no_length_of_run(
    paths: dict[str, str],
) -> None:
    unlimited = ["--no-num-rollout", "--no-prompt-data", "--eval-prompt-data", "a", "{data}"]
    check_evaluation(_config(paths, *unlimited))
    with pytest.raises(ConfigError, match="nothing to evaluate; name a set"):
        check_evaluation(_config(paths))
    with pytest.raises(ConfigError, match="no model"):
        check_evaluation(_config(paths, "--no-hf-checkpoint"))
    # Lengths of training are no matter of it, those of the sets are.
    short = [*unlimited, "--rollout-max-context-len", "64", "--rollout-max-response-len", "99"]
    check_evaluation(_config(paths, *short, "--eval-max-response-len", "9"))
    with pytest.raises(ConfigError, match="'a': max_response_len 99 leaves no room"):
        check_evaluation(_config(paths, *short))
    with pytest.raises(ConfigError, match="'remote_rm' has nowhere to post to"):
        check_evaluation(_config(paths, *unlimited, "--rm-type", "remote_rm"))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ("--num-epoch 2", "num_epoch 2 is ignored"),
        ("--apply-chat-template-kwargs {{}}", None),
        ("--partial-rollout", "nothing is surplus"),
        ("--eval-prompt-data a {data}", "the evaluation sets are not used"),
        (
            "--eval-prompt-data a {data} --eval-interval 1 --n-samples-per-eval-prompt 2"
            " --eval-temperature 0",
            "temperature 0 is greedy: all 2 samples of a prompt of evaluation set 'a'",
        ),
        ("--eval-top-k 5", "eval_top_k does nothing: there is no evaluation set"),
        (
            "--eval-prompt-data a {data} --eval-interval 1 --no-log-passrate --eval-pass-k 1",
            "eval_pass_k and eval_pass_threshold do nothing",
        ),
        ("--ref-load {model}", "ref_load is not loaded"),
        ("--min-lr 1e-7", "min_lr does nothing"),
        ("--custom-rm-path r.py:reward --rm-type math", "the run's --custom-rm-path goes first"),
        ("--distillation-top-k 5", "top_k 5 changes nothing under advantage_estimator 'grpo'"),
        ("--value-clip 0.1", "value_clip 0.1 changes nothing: there is no critic"),
        ("--rejection-scope token", "scope token changes nothing without --use-tis (TOML"),
        ("--kl-loss-type k3", "kl_loss_type k3 changes nothing"),
        ("--loss-reduction constant --calculate-per-token-loss", "per_token_loss True changes not"),
        (
            "--loss-type distillation_loss --opd-teacher-load {model} --entropy-coef 0.1",
            "entropy_coef 0.1 changes nothing under loss_type 'distillation_loss'",
        ),
        (
            "--advantage-estimator on_policy_distillation --opd-teacher-load {model} --kl-coef 0.1",
            "kl_coef 0.1 changes nothing under advantage_estimator 'on_policy_distillation'",
        ),
    ],
)
def test_pointless_settings_are_notes(
    paths: dict[str, str], changes: str, expected: str | None
) -> None:
    found = notes(_config(paths, *changes.split()))
    assert len(found) == (expected is not None)
    assert expected is None or expected in found[0]
