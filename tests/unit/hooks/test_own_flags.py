"""Flags that a user's function brings along."""

import pytest

from dovetail.config.resolve import resolve
from dovetail.hooks import ArgsView, bind_hooks
from dovetail.hooks.own_flags import own_flags
from dovetail.types import ConfigError, HookError

PLUGIN = """
async def generate(args, sample, sampling_params):
    return sample

def add_arguments(parser):
    parser.add_argument("--max-turns", type=int, default=4)
    parser.add_argument("--tools", nargs="+", default=None)
    parser.add_argument("--verbose-agent", action="store_true")

generate.add_arguments = add_arguments
"""


@pytest.fixture
def path(tmp_path):
    (tmp_path / "agent.py").write_text(PLUGIN)
    return ["--custom-generate-function-path", f"{tmp_path}/agent.py:generate"]


def args_of(*flags):
    config = resolve([], flags, own_flags).config
    args = ArgsView(config)
    bind_hooks(config.hooks, args)
    return args


def test_a_functions_own_flags_become_attributes(path):
    args = args_of("--max-turns", "2", *path, "--tools", "a", "b", "--lr", "0.5")
    assert (args.max_turns, args.tools, args.verbose_agent, args.lr) == (2, ["a", "b"], False, 0.5)
    assert args_of(*path, "--max-turns=7", "--verbose-agent").verbose_agent is True


def test_without_them_their_defaults_are_there(path):
    args = args_of(*path)
    assert (args.max_turns, args.tools, args.verbose_agent) == (4, None, False)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-turn", "2"], r"unknown flag --max-turn; did you mean --max-turns \("),
        (["--max-turns", "2", "--rollout-batch-sizes", "3"], "did you mean --rollout-batch-size"),
        (["--max-turns", "many"], "--max-turns: invalid int value: 'many'"),
        (["--verbose-agent", "yes"], "unrecognized arguments: yes"),
    ],
)
def test_others_are_unknown_as_ever(path, flags, message):
    with pytest.raises(ConfigError, match=message):
        args_of(*path, *flags)


def test_without_such_a_function_a_flag_is_unknown():
    with pytest.raises(ConfigError, match="unknown flag --max-turns"):
        args_of("--max-turns", "2")
    with pytest.raises(ConfigError, match="unknown flag --max-turns"):
        resolve([], ["--max-turns", "2", "--custom-rm-path", "a.b"])


def test_they_may_stand_in_a_run_file_too(path, tmp_path):
    (tmp_path / "run.toml").write_text("[hooks.plugin_args]\nmax_turns = 9\n")
    config = resolve([tmp_path / "run.toml"], path, own_flags).config
    assert ArgsView(config).max_turns == 9
    with pytest.raises(ConfigError, match=r"sets 'lr', which is set by --lr"):
        ArgsView(resolve([], ["--plugin-args", '{"lr": 1}']).config)


def test_the_function_may_import_what_another_framework_is_called(tmp_path):
    (tmp_path / "foreign_agent.py").write_text("import miles.utils.types\n" + PLUGIN)
    path = ["--rollout-function-path", f"{tmp_path}/foreign_agent.py:generate"]
    assert resolve([], [*path, "--max-turns", "2"], own_flags).config.hooks.plugin_args == {
        "max_turns": 2,
        "tools": None,
        "verbose_agent": False,
    }


def test_a_function_that_cannot_be_loaded_is_named_by_its_own_flag(tmp_path):
    flags = ["--rollout-function-path", f"{tmp_path}/none.py:roll", "--max-turns", "2"]
    with pytest.raises(HookError, match=r"--rollout-function-path .*: no file"):
        resolve([], flags, own_flags)
