from pathlib import Path

from dovetail.config.aliases import ALIASES, FIXED, UNSUPPORTED, WITHOUT_EFFECT
from dovetail.config.leaves import leaves
from dovetail.config.reference import flag_help, markdown

ROOT = Path(__file__).resolve().parents[3]


def test_the_reference_page_is_what_the_declarations_say_now() -> None:
    page = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert page == markdown(), "docs/config.md is stale: run `make docs`"


def test_help_has_every_flag_and_fits_its_width() -> None:
    text = flag_help(100)
    for leaf in leaves().values():
        assert leaf.flag in text.replace("--[no-]", "--"), leaf.flag
    assert max(len(line) for line in text.splitlines()) <= 100


def test_no_name_means_two_things() -> None:
    tables = [set(leaves()), set(ALIASES), set(FIXED), set(WITHOUT_EFFECT), set(UNSUPPORTED)]
    assert sum(len(table) for table in tables) == len(set().union(*tables))
    assert {alias.leaf for alias in ALIASES.values()} <= set(leaves())


def test_an_alias_with_a_value_of_its_own_is_not_shown_as_none() -> None:
    reference = markdown()
    assert "| `--slime-router-timeout` | `router_request_timeout_s` |" in reference
    assert "| `--recompute-granularity` | `gradient_checkpointing = true` |" in reference


def test_no_reason_speaks_of_a_run_that_is_one_process_on_one_device() -> None:
    for reason in {*WITHOUT_EFFECT.values(), *UNSUPPORTED.values()}:
        assert "one device" not in reason and "one process" not in reason
    assert "offload_train and offload_rollout" in WITHOUT_EFFECT["offload"]
