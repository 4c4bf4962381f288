"""`--megatron-*`: what Megatron has not, and what the run sets itself, is told without Megatron."""

import pytest

from dovetail.trainers.megatron.passed import Target, check, settings_of
from dovetail.types.errors import ConfigError
from tests.megatron_fields import text


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("moe_router_dtyp", "did you mean --megatron-moe-router-dtype?"),
        ("hidden-size", "leave it out: it is the model's"),
        ("weight_decay", "use --weight-decay instead"),
    ],
)
def test_a_name_that_is_none_is_refused_with_the_cure(name, said):
    with pytest.raises(ConfigError, match=r"--megatron-") as caught:
        check({name: "1"})
    assert said in str(caught.value)


def test_each_class_gets_its_own_fields_as_numbers_and_truth_values():
    passed = {"overlap_grad_reduce": "true", "bucket_size": "1000", "recompute_num_layers": "2"}
    assert settings_of(passed, Target.DDP) == {"overlap_grad_reduce": True, "bucket_size": 1000}
    assert settings_of(passed, Target.TRANSFORMER) == {"recompute_num_layers": 2}


def test_the_list_of_names_is_that_of_the_installed_version():
    from importlib import resources

    file = resources.files("dovetail.trainers.megatron").joinpath("fields.txt")
    assert file.read_text() == text()
