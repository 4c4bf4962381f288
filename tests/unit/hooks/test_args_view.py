"""`args` as plugins of the slime family use it."""

import base64
import copy
import pickle

import pytest

from dovetail.config.aliases import ALIASES
from dovetail.config.leaves import leaves
from dovetail.config.resolve import resolve
from dovetail.config.run import RunConfig
from dovetail.hooks import ArgsView
from dovetail.hooks.family_args import FACTS, FAMILY_ARGS
from dovetail.types import ConfigError


def view(**sections):
    return ArgsView(RunConfig.model_validate(sections), start_rollout_id=3)


def test_leaves_are_flat_attributes_and_facts_stand_beside_them():
    args = view(rollout={"rollout_batch_size": 5}, optimizer={"lr": 0.5})
    assert (args.rollout_batch_size, args.lr, args.start_rollout_id) == (5, 0.5, 3)
    assert "lr" in args and vars(args)["lr"] == 0.5


def test_leaves_that_default_to_another_are_filled_in():
    args = view(
        rollout={"rollout_batch_size": 5, "n_samples_per_prompt": 4, "rollout_temperature": 0.7}
    )
    assert args.over_sampling_batch_size == 5 and args.eval_temperature == 0.7
    assert args.global_batch_size == 20


def test_foreign_spellings_are_there():
    assert view().disable_grpo_std_normalization is False
    assert view(algorithm={"grpo_std_normalization": False}).disable_grpo_std_normalization is True
    assert view(runtime={"mode": "colocated"}).colocate is True


def test_writes_stay_local():
    config = RunConfig()
    args = ArgsView(config)
    args.lr = 7.0
    args.results_dict = {}
    args.rollout_stop.append("x")
    assert (args.lr, args.results_dict, config.optimizer.lr) == (7.0, {}, 1e-6)
    assert config.rollout.rollout_stop == []


@pytest.mark.parametrize(
    "through", [copy.copy, copy.deepcopy, lambda args: pickle.loads(pickle.dumps(args))]
)
def test_it_copies_and_pickles_with_local_writes(through):
    args = view()
    args.results_dict = {"a": [1]}
    other = through(args)
    assert other == args and other.results_dict == {"a": [1]} and type(other) is ArgsView
    other.lr = 9
    assert args.lr == 1e-6


def test_an_unknown_name_says_the_nearest_and_getattr_defaults_work():
    args = view()
    with pytest.raises(AttributeError, match="did you mean 'rollout_batch_size'"):
        _ = args.rollout_batch_sizes
    assert getattr(args, "max_turns", 4) == 4 and not hasattr(args, "tis_mode")


def test_what_only_the_family_has_reads_as_its_default():
    args = view()
    assert (args.rollout_num_gpus_per_engine, args.offload_train) == (1, False)
    assert (args.sglang_server_concurrency, args.rollout_task_type) == (512, "math")
    args.profile_target.append("x")
    assert view().profile_target == ["train_overall"]


def test_the_familys_names_are_said_once():
    own = {*leaves(), *ALIASES}
    assert sorted(own & {*FAMILY_ARGS}) == [], "these are leaves now: drop them from family_args.py"
    assert not own & {*FACTS} and not {*FACTS} & {*FAMILY_ARGS}


def test_a_run_learns_facts():
    args = ArgsView(RunConfig())
    assert (args.rank, args.world_size, args.start_rollout_id) == (0, 1, 0)
    assert (args.sglang_router_ip, args.vllm_router_port) == (None, None)
    args.learn(sglang_router_ip="127.0.0.1", sglang_router_port=30000)
    assert (args.sglang_router_ip, args.sglang_router_port) == ("127.0.0.1", 30000)


def custom(path):
    return view(hooks={"custom_config_path": str(path)})


def test_keys_of_the_custom_config_are_attributes(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("max_turns: 3\ntools: {search: [a, b]}\n")
    assert custom(file).max_turns == 3 and custom(file).tools == {"search": ["a", "b"]}
    inline = base64.b64encode(b"tis_mode: truncate\n").decode()
    assert custom(f"base64:{inline}").tis_mode == "truncate"
    assert copy.deepcopy(custom(file)).max_turns == 3
    file.write_text("")
    assert not hasattr(custom(file), "max_turns")
    # A setting that only rollout functions read, and that no flag of ours stands for.
    file.write_text("max_weight_staleness: 4\n")
    assert custom(file).max_weight_staleness == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: 1.0\n", r"sets 'lr', which is set by --lr \(TOML: optimizer.lr\)"),
        ("colocate: true\n", r"sets 'colocate', which is set by --mode"),
        ("rank: 1\n", "sets 'rank', which is an attribute that args has of itself"),
        ("opd_teacher_ckpt_step: 1\n", "an attribute that args has of itself"),
        ("a-b: 1\n", "'a-b' can't be an attribute"),
        ("- 1\n", "got a list, expected a mapping"),
        ("a: [\n", "is not YAML"),
    ],
)
def test_a_custom_config_that_clashes_or_is_none_is_refused(tmp_path, text, message):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        custom(file)
    assert str(file) in str(caught.value)


def test_a_custom_config_that_can_not_be_read_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"none.yaml can't be read.*--custom-config-path FILE"):
        custom(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="base64:!! can't be read"):
        custom("base64:!!")


def test_settings_that_are_handed_through_are_attributes_with_flags_text_as_values():
    flags = ["--sglang-tool-call-parser", "qwen25", "--sglang-server-concurrency", "64"]
    flags += ["--vllm-gpu-memory-utilization", "0.5", "--vllm-enforce-eager", "true"]
    resolved = resolve([], flags)
    args = ArgsView(resolved.config, resolved.passthrough)
    assert args.sglang_tool_call_parser == "qwen25"
    assert args.sglang_server_concurrency == 64
    assert args.vllm_gpu_memory_utilization == 0.5
    assert args.vllm_enforce_eager is True
