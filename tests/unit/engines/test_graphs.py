"""Padding steps to buckets changes no result, and a capture that fails costs nothing but time."""

import pytest
import torch

from dovetail.engines.embedded.graphs import GraphedDecode
from tests.unit.engines.tiny import (
    generate,
    prompt_of,
    request,
    tiny_engine,
    tiny_model,
    worst_logprob_error,
)


def with_graphs(engine, capture):
    core = engine._core
    core.graphs = GraphedDecode(core.runner, core.scheduler.max_running, capture)
    return core.graphs


def asked():
    return [
        request(f"{i}.{k}", prompt_of(n, i), max_new_tokens=3 + 6 * k, seed=i + k)
        for i, n in enumerate((3, 1, 20, 33))
        for k in range(3)
    ]


def test_replayed_steps_give_what_eager_steps_give():
    model = tiny_model("qwen3")
    engine = tiny_engine(model, fused="on", kv_tokens=4000)
    captured = []

    def capture(step):
        captured.append(step)
        return step

    decode = with_graphs(engine, capture)
    results = generate(engine, asked())
    assert worst_logprob_error(model, asked(), results) < 1e-4
    plain = generate(tiny_engine(model, fused="on", kv_tokens=4000), asked())
    assert [r.token_ids for r in results] == [r.token_ids for r in plain]
    assert decode.replays == engine.stats.decode_steps > 2 * len(captured)


def test_steps_on_shared_segments_run_without_a_graph():
    model = tiny_model("qwen3")
    engine = tiny_engine(model, fused="on")
    engine._core.scheduler.min_saved_tokens = 0
    decode = with_graphs(engine, lambda step: step)
    siblings = [request(k, prompt_of(30), seed=k) for k in range(3)]
    assert worst_logprob_error(model, siblings, generate(engine, siblings)) < 1e-4
    assert decode.replays == 0


def test_a_failing_capture_is_logged_once_and_decoding_goes_on(caplog):
    model = tiny_model("qwen3")
    engine = tiny_engine(model, fused="on")

    def capture(step):
        raise RuntimeError("operation not permitted when stream is capturing")

    decode = with_graphs(engine, capture)
    assert worst_logprob_error(model, asked(), generate(engine, asked())) < 1e-4
    assert "not permitted" in decode.failure
    assert caplog.text.count("decoding without CUDA graphs") == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_graphs_give_what_the_full_forward_gives():
    model = tiny_model("qwen3").cuda()
    engine = tiny_engine(model, fused="on", kv_tokens=4000, cuda_graphs=True)
    results = generate(engine, asked())
    assert engine._core.graphs.replays > 0
    model.cpu()
    assert worst_logprob_error(model, asked(), results) < 1e-3
