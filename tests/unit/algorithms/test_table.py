"""The tables of algorithms."""

import pytest

from dovetail.algorithms import table
from dovetail.types import ConfigError

ROWS = [(t, name) for t in (table.ADVANTAGES, table.LOSSES) for name in t if t[name].path]


@pytest.mark.parametrize(("rows", "name"), ROWS)
def test_every_row_names_a_documented_function(rows, name):
    function = table.load(rows, name, "loss_type")
    assert callable(function) and function.__doc__
    assert rows[name].name == name and rows[name].doc


def test_an_unknown_name_gets_the_nearest_one_and_its_flag():
    with pytest.raises(ConfigError, match=r"--loss-type.*'policy_los'.*did you mean 'policy_loss'"):
        table.load(table.LOSSES, "policy_los", "loss_type")


def test_the_custom_loss_needs_its_hook():
    with pytest.raises(ConfigError, match="--custom-loss-function-path"):
        table.load(table.LOSSES, "custom_loss", "loss_type")
