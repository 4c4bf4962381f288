import json

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dovetail.data.state import sample_from_json, sample_to_json
from dovetail.types.errors import CheckpointError
from dovetail.types.sample import Sample

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text() | st.integers() | st.just("__dovetail__"), inner, max_size=4)
    ),
    max_leaves=8,
)


def through_json(sample):
    return sample_from_json(json.loads(json.dumps(sample_to_json(sample), allow_nan=False)))


def same(a, b):
    return repr(a) == repr(b)


@given(plain)
def test_plain_values_of_any_shape_come_back_exactly(value):
    sample = Sample(index=3, metadata={"value": value}, label=value)
    back = through_json(sample)
    assert same(back.metadata, sample.metadata) and same(back.label, value)


def test_a_half_done_sample_comes_back_equal_with_its_ad_hoc_attributes():
    sample = Sample(group_index=1, index=2, prompt="p", tokens=[1, 2])
    sample.append_response_tokens(
        tokens=[3, 4],
        log_probs=[-0.1, -1e-300],
        text="xy",
        meta_info={"finish_reason": {"type": "abort"}, "weight_version": 7, "cached_tokens": 2},
    )
    sample.trace = {"turns": 2}
    back = through_json(sample)
    assert back == sample and back.trace == {"turns": 2}
    assert back.status is Sample.Status.ABORTED


def test_non_finite_numbers_and_half_surrogates_survive():
    back = through_json(Sample(metadata={"v": [float("inf"), float("nan"), "\ud800"]}))
    assert same(back.metadata, {"v": [float("inf"), float("nan"), "\ud800"]})


def test_arrays_and_tensors_keep_type_shape_and_bits():
    torch = pytest.importorskip("torch")
    experts = numpy.arange(24, dtype=numpy.int32).reshape(2, 3, 4)
    tensors = {
        "bf16": torch.randn(3, 2).bfloat16(),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4, dtype=torch.int64),
        "bool": torch.tensor([True, False]),
    }
    scalar = numpy.float32(0.1)
    sample = Sample(rollout_routed_experts=experts, metadata={**tensors, "np": scalar})
    back = through_json(sample)
    assert back.rollout_routed_experts.dtype == numpy.int32
    assert numpy.array_equal(back.rollout_routed_experts, experts)
    assert back.metadata["np"] == scalar and type(back.metadata["np"]) is numpy.float32
    for name, tensor in tensors.items():
        assert back.metadata[name].dtype == tensor.dtype
        assert torch.equal(back.metadata[name], tensor)


def test_what_has_no_exact_form_is_refused_with_its_place():
    sample = Sample(index=5, metadata={"env": [1, object()]})
    with pytest.raises(CheckpointError, match=r"sample 5\.metadata\['env'\]\[1\] holds a .*object"):
        sample_to_json(sample)
