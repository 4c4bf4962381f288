"""What is said of Megatron's backend before it is imported."""

import pytest

from dovetail.run.megatron import check_device
from dovetail.types.errors import ConfigError


def test_ranks_without_a_gpu_are_refused_unless_a_function_answers_for_cuda() -> None:
    check_device("cuda", answers=False)
    check_device("cpu", answers=True)
    with pytest.raises(ConfigError, match=r"needs GPUs.*--train-backend torch"):
        check_device("cpu", answers=False)
