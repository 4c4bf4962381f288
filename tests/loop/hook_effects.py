"""What the functions under `test_every_hook.py` do: each leaves a mark that only its own work can
leave, and notes what it was given.

`effect(slot, given)` is the body of the hook of `slot`; `given` are its parameters by name. Where
the work waits for something, the result is awaitable: an async hook awaits it, a plain one is only
used where nothing waits.
"""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

from dovetail.types import DynamicFilterOutput, Sample
from dovetail.types.family import (
    GenerateFnOutput,
    RolloutFnConstructorInput,
    RolloutFnEvalOutput,
    RolloutFnTrainOutput,
)

SEEN: list[tuple[str, dict[str, Any]]] = []
"""(slot, given) of every call since the last `SEEN.clear()`."""

_numbers = itertools.count(1000)


def effect(slot: str, given: dict[str, Any]) -> Any:
    """Note the call and do the work of `slot`."""
    given = {name: value for name, value in given.items() if name != "self"}
    SEEN.append((slot, given))
    return _EFFECTS[slot](given)


def group(size: int = 2, **marks: Any) -> list[Sample]:
    """Siblings that wait for their response."""
    group_index = next(_numbers)
    return [
        Sample(
            group_index=group_index,
            index=group_index * size + i,
            prompt="1+1=",
            label="2",
            metadata=dict(marks),
        )
        for i in range(size)
    ]


def answered(samples: list[Sample], mark: str) -> list[Sample]:
    """The same with a response of two tokens, a reward and a mark."""
    for position, sample in enumerate(samples):
        sample.tokens = [4, 13, 4, 15]
        sample.append_response_tokens(tokens=[5, 1], log_probs=[-4.0, -4.0], text="2")
        sample.reward = float(position % 2)
        sample.status = Sample.Status.COMPLETED
        sample.metadata["mark"] = mark
    return samples


class Source:
    """A data source of a user's own, in the slime family's form."""

    def __init__(self, given: Any) -> None:
        effect("data_source", {"given": given})
        self.given, self.waiting, self.served = given, [], 0

    def get_samples(self, num_samples: int) -> list[list[Sample]]:
        taken, self.waiting = self.waiting[:num_samples], self.waiting[num_samples:]
        self.served += num_samples
        return taken + [group(mark="source") for _ in range(num_samples - len(taken))]

    def add_samples(self, samples: list[list[Sample]]) -> None:
        self.waiting += samples

    def save(self, rollout_id: int) -> None:
        SEEN.append(("data_source.save", {"rollout_id": rollout_id}))

    def load(self, rollout_id: int | None = None) -> None:
        SEEN.append(("data_source.load", {"rollout_id": rollout_id}))

    def __len__(self) -> int:
        return 4


def _collected(given: dict[str, Any]) -> Any:
    """A step of our own making: the mark on its samples, and a metric."""
    call = given.get("call") or given.get("input")
    evaluation = given.get("evaluation", getattr(call, "evaluation", False))
    if evaluation:
        return _evaluated(given)
    source = given.get("data_source") or getattr(call, "data_source", None)
    groups = source.get_samples(2) if source is not None else [group(), group()]
    made = [answered(one, "rollout") for one in groups]
    return RolloutFnTrainOutput(samples=made, metrics={"rollout/mine": 7.0})


def _evaluated(given: dict[str, Any]) -> Any:
    samples = answered(group(), "eval")
    data = {"mine": {"rewards": [0.25, 0.75], "truncated": [False, False], "samples": samples}}
    return RolloutFnEvalOutput(data=data, metrics={"eval/mine/extra": 7.0})


def _generated(given: dict[str, Any]) -> Any:
    call = given.get("call") or given.get("input")
    sample = given.get("sample") or call.sample
    if not sample.tokens:
        sample.tokens = [4, 13, 4, 15]
    answered_one = answered_keeping_prompt(sample)
    return GenerateFnOutput(samples=answered_one) if "input" in given else answered_one


def answered_keeping_prompt(sample: Sample) -> Sample:
    """A response for a sample whose prompt is tokenised already."""
    sample.append_response_tokens(tokens=[5, 1], log_probs=[-4.0, -4.0], text="mine")
    sample.status = Sample.Status.COMPLETED
    return sample


def _hooked(given: dict[str, Any]) -> None:
    given["sample"].metadata["mark"] = "sample hook"


def _rewarded(given: dict[str, Any]) -> Any:
    if "samples" in given:
        return [0.25] * len(given["samples"])
    return 0.25


def _filtered(given: dict[str, Any]) -> DynamicFilterOutput:
    calls = sum(slot == "dynamic_sampling_filter" for slot, _ in SEEN)
    return DynamicFilterOutput(keep=calls != 1, reason="mine")


def _taken(given: dict[str, Any]) -> list[list[Sample]]:
    if "num_samples" not in given:
        return list(reversed(given["samples"]))
    taken = [given["buffer"].pop() for _ in range(min(given["num_samples"], len(given["buffer"])))]
    for one in taken:
        one[0].metadata["mark"] = "buffer filter"
    return taken


def _marked_out(given: dict[str, Any]) -> None:
    groups = given.get("groups")
    flat = given.get("samples") or [sample for one in groups for sample in one]
    for sample in flat:
        sample.remove_sample = True


def _processed(given: dict[str, Any]) -> None:
    for one in given.get("groups") or given.get("all_samples"):
        for sample in one:
            sample.metadata["mark"] = "all samples"


def _logged(given: dict[str, Any]) -> bool:
    metrics = given.get("metrics")
    if metrics is None:
        metrics = given.get("rollout_extra_metrics", given.get("extra_metrics"))
    if metrics is not None:
        metrics["rollout/mine"] = 7.0
    return True


def _levelled(given: dict[str, Any]) -> Any:
    samples = given["samples"]
    return [0.5] * len(samples), [0.0] * len(samples)


def _converted(given: dict[str, Any]) -> dict[str, list[Any]]:
    samples = given["samples"]
    return {
        "tokens": [sample.tokens for sample in samples],
        "response_lengths": [sample.response_length for sample in samples],
        "rewards": [1.0 for _ in samples],
        "truncated": [0 for _ in samples],
        "sample_indices": [sample.index for sample in samples],
        "loss_masks": [[1] + [0] * (sample.response_length - 1) for sample in samples],
        "rollout_log_probs": [sample.rollout_log_probs for sample in samples],
    }


def _after_data(given: dict[str, Any]) -> None:
    data = given.get("data") or given.get("rollout_data")
    if data is not None:
        data["advantages"] = [0.0 * advantages for advantages in data["advantages"]]
    grouped = (sample for group in given.get("samples", ()) for sample in group)
    for sample in (*given.get("flat_samples", ()), *grouped):
        sample.loss_mask = [0] * sample.response_length


def _advantages(given: dict[str, Any]) -> None:
    import torch

    data = given.get("data") or given["rollout_data"]
    zeros = [torch.zeros(length) for length in data["response_lengths"]]
    data["advantages"], data["returns"] = zeros, zeros


def _loss(given: dict[str, Any]) -> Any:
    import torch

    if "call" in given:
        call = given["call"]
        total = sum(values.sum() for values in call.logprobs)
        count = sum(map(len, call.logprobs))
    else:
        total, count = given["logits"].sum(), len(given["batch"]["response_lengths"])
    return 0.0 * total, {"mine": torch.tensor(float(count))}


def _corrected(given: dict[str, Any]) -> Any:
    call = given.get("call")
    pg_loss = call.pg_loss if call is not None else given["pg_loss"]
    masks = call.loss_masks if call is not None else given["loss_masks"]
    return 0.0 * pg_loss, masks, {"mine": 7.0 + 0.0 * pg_loss.detach()}


def _reducer(given: dict[str, Any]) -> Any:
    return lambda values: 0.0 * values.sum()


_EFFECTS = {
    "data_source": lambda given: None,
    "buffer_filter": _taken,
    "rollout_function": _collected,
    "eval_function": _evaluated,
    "custom_generate_function": _generated,
    "rollout_sample_hook": _hooked,
    "custom_rm": _rewarded,
    "dynamic_sampling_filter": _filtered,
    "rollout_sample_filter": _marked_out,
    "rollout_all_samples_process": _processed,
    "custom_rollout_log_function": _logged,
    "custom_eval_rollout_log_function": _logged,
    "custom_reward_post_process": _levelled,
    "custom_convert_samples_to_train_data": _converted,
    "rollout_data_postprocess": _after_data,
    "custom_advantage_function": _advantages,
    "custom_loss_function": _loss,
    "custom_tis_function": _corrected,
    "custom_pg_loss_reducer_function": _reducer,
}


def construct(slot: str, given: dict[str, Any]) -> None:
    """Note the construction of a class form."""
    given = {name: value for name, value in given.items() if name != "self"}
    SEEN.append((f"{slot}.construct", given))
    assert isinstance(given["constructor_input"], RolloutFnConstructorInput)


async def later(result: Any) -> Any:
    """For async hooks: give way to the loop once, as real ones do."""
    await asyncio.sleep(0)
    return result
