"""From paths to objects, and what is said when nothing is there."""

import sys

import pytest

from dovetail.hooks import register, spec_of
from dovetail.hooks.load import load, split_family
from dovetail.types import HookError

SPEC = spec_of("custom_rm")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of the user's in the working directory, gone from the process afterwards."""
    root = tmp_path / "userpkg"
    root.mkdir()
    (root / "__init__.py").write_text("")
    (root / "rewards.py").write_text(
        "class Judge:\n    @staticmethod\n    def score(sample): return 1.0\n"
        "def exact(sample): return 2.0\n"
    )
    (root / "broken.py").write_text("import json\n\nvalue = 1 / 0\n")
    (root / "needy.py").write_text("import surely_not_installed\n")
    (root / "typo.py").write_text("def f(:\n")
    (root / "leaver.py").write_text("import sys\nsys.exit(3)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_every_way_to_write_a_path_finds_the_object(package):
    for path in (
        "userpkg.rewards.exact",
        "userpkg.rewards:exact",
        "userpkg/rewards.py:exact",
        f"{package}/userpkg/rewards.py:exact",
    ):
        assert load(SPEC, path)(None) == 2.0
    for path in ("userpkg.rewards.Judge.score", "userpkg/rewards.py:Judge.score"):
        assert load(SPEC, path)(None) == 1.0


def test_a_file_sees_the_files_beside_it_and_is_one_module_with_them(package):
    (package / "near.py").write_text(
        "import main_reward\ndef double(x): return 2 * main_reward.ONE\n"
    )
    (package / "main_reward.py").write_text(
        "ONE = 1\ndef reward(sample):\n    import near\n    return near.double(1)\n"
    )
    assert load(SPEC, f"{package}/main_reward.py:reward")(None) == 2
    assert sys.modules["near"].main_reward is sys.modules["main_reward"]


def test_a_file_named_like_another_module_is_still_the_file(package):
    (package / "json.py").write_text("def reward(sample): return 5\n")
    assert load(SPEC, f"{package}/json.py:reward")(None) == 5
    assert load(SPEC, f"{package}/json.py:reward") is load(SPEC, f"{package}/json.py:reward")
    import json

    assert json.loads("1") == 1


def fails(path):
    with pytest.raises(HookError) as caught:
        load(SPEC, path)
    text = str(caught.value)
    assert "--custom-rm-path (TOML: hooks.custom_rm_path)" in text
    return text


def test_a_missing_file_names_the_nearest(package):
    assert "did you mean 'rewards.py'" in fails("userpkg/reward.py:exact")
    assert "names no function; write userpkg/rewards.py:NAME" in fails("userpkg/rewards.py")


def test_a_missing_attribute_names_the_nearest(package):
    assert "has no 'exat'" in fails("userpkg.rewards.exat")
    assert "did you mean exact" in fails("userpkg/rewards.py:exat")
    assert "did you mean rewards" in fails("userpkg.reward.exact")


def test_a_missing_module_says_where_it_was_looked_for(package):
    text = fails("nowhere_pkg.mod.fn")
    assert "no module 'nowhere_pkg'" in text and str(package) in text
    assert "no module 'userpkg.nope'" in fails("userpkg.nope:fn")


def test_an_import_that_fails_shows_the_users_line(package):
    for path in ("userpkg.broken.f", "userpkg/broken.py:f"):
        text = fails(path)
        assert "broken.py:3, in <module>: ZeroDivisionError: division by zero" in text
    text = fails("userpkg.needy:f")
    assert "needy.py:1, in <module>: ModuleNotFoundError" in text
    assert "typo.py:1: SyntaxError" in fails("userpkg.typo.f")
    assert "leaver.py:2, in <module>: SystemExit: 3" in fails("userpkg/leaver.py:f")


def test_a_name_that_is_not_registered_names_the_nearest():
    with pytest.raises(HookError, match="did you mean 'check_no_aborted'"):
        load(spec_of("dynamic_sampling_filter"), "check_no_abort")
    assert "Give a registered name, pkg.mod.attr" in fails("reward")


def test_registered_functions_are_found_by_name_and_names_are_taken_once():
    @register("custom_rm", "half")
    def half(sample):
        return 0.5

    assert load(SPEC, "half") is half
    with pytest.raises(HookError, match="'half' is already registered"):
        register("custom_rm", "half")(lambda sample: 1.0)
    with pytest.raises(HookError, match="did you mean 'custom_rm'"):
        register("custom_rms", "x")


def test_families_are_split_off():
    assert split_family("slime:pkg.fn") == ("slime", "pkg.fn")
    assert split_family("miles:a/b.py:fn") == ("miles", "a/b.py:fn")
    assert split_family("native:half") == ("native", "half")
    assert split_family("slime:fn") == (None, "slime:fn")
    assert split_family("pkg.mod:fn") == (None, "pkg.mod:fn")
