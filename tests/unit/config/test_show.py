import json
import tomllib
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail.config.resolve import resolve
from dovetail.config.show import diff, to_toml, toml_value

_PLAIN = st.text(st.characters(exclude_categories=["Cs"]))
_VALUES = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | _PLAIN,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_PLAIN, inner, max_size=3),
    max_leaves=6,
)


@given(_VALUES)
@settings(max_examples=200, deadline=None)
def test_every_value_reads_back_from_its_toml(value: object) -> None:
    assert tomllib.loads(f"x = {toml_value(value)}")["x"] == value


def test_a_resolved_run_reads_back_to_the_same_run(tmp_path: Path) -> None:
    flags = ["--rollout-stop", 'quote "', "line\n", "--lr", "3e-7", "--eval-sets"]
    flags += ['{"a b": {"path": "p", "top_k": 3}}', "--num-rollout", "2", "--vllm-x", "1"]
    resolved = resolve([], flags)
    path = tmp_path / "config.toml"
    path.write_text(to_toml(resolved), encoding="utf-8")
    again = resolve([path], [])
    assert again.config == resolved.config
    assert again.passthrough == resolved.passthrough
    assert diff(resolved, again) == []


def test_what_nobody_set_in_a_run_is_not_set_by_its_own_configuration(tmp_path: Path) -> None:
    resolved = resolve([], ["--num-rollout", "2", "--hf-checkpoint", str(tmp_path)])
    path = tmp_path / "config.toml"
    path.write_text(to_toml(resolved))
    (tmp_path / "origins.json").write_text(json.dumps(resolved.origins))
    again = resolve([path], [])
    assert again.config.critic.model_fields_set == again.config.distillation.model_fields_set
    assert not again.config.critic.model_fields_set
    assert again.config == resolved.config and again.origins["lr"] == "default"
    # A default that has changed since then is the run's own.
    path.write_text(path.read_text().replace("lr = 1e-06", "lr = 2e-06"))
    assert resolve([path], []).config.optimizer.lr == 2e-6
    assert resolve([path], ["--lr", "1e-6"]).config.optimizer.lr == 1e-6


def test_show_names_the_origin_of_each_value_and_can_leave_defaults_out() -> None:
    text = to_toml(resolve([], ["--lr", "1e-3"]), only_set=True)
    assert text.split() == ["[optimizer]", "lr", "=", "0.001", "#", "flag", "--lr"]


def test_diff_tells_what_differs_in_reading_order() -> None:
    left = resolve([], ["--lr", "1e-3", "--num-rollout", "3"])
    right = resolve([], ["--rollout-stop", "a", "--lr", "1e-3"])
    assert diff(left, right) == [
        "data.num_rollout: 3 -> (not set)",
        'rollout.rollout_stop: [] -> ["a"]',
    ]
