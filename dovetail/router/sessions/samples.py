"""From a session's tree of turns to training samples: every sampled id is trained on at most once.

leaves of the tree -> one sample each, the whole way from the root
    -> pick (by default without what was asked for again) -> each turn belongs to the first
       sample that has it, other samples read it as context -> postprocess
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dovetail.router.sessions.strand import Strand
from dovetail.router.sessions.tree import Session, Turn
from dovetail.types import Sample
from dovetail.types.ports import Tokenizer

Pick = Callable[[list[Sample], dict[str, Any]], Sequence[Sample]]
"""`(a sample for each leaf, facts of the session) -> those that are kept`."""
Postprocess = Callable[[list[Sample], dict[str, Any]], Sequence[Sample]]
"""`(picked samples, facts of the session) -> samples`."""


@dataclass(frozen=True)
class Collecting:
    """How a session's samples are chosen and finished; None: as they are by default."""

    pick: Pick | None = None
    postprocess: Postprocess | None = None


def drop_retries(samples: list[Sample], metadata: Mapping[str, Any]) -> list[Sample]:
    """Without leaves whose very prompt was asked again later: the answer was not used."""
    return [sample for sample in samples if not sample.metadata["leaf"]["asked_again"]]


def keep_all(samples: list[Sample], metadata: Mapping[str, Any]) -> list[Sample]:
    """Every leaf: answers that were asked for at once to choose among them, say."""
    return list(samples)


def collect(
    session: Session,
    base: Sample,
    tokenizer: Tokenizer,
    how: Collecting,
    *,
    max_seq_len: int | None = None,
    agent: Mapping[str, Any] | None = None,
) -> list[Sample]:
    """The samples of what a session recorded, in the order in which they were finished.

    The first is `base` itself; further ones are copies of it and share its `rollout_id`. [] when
    nothing was recorded, or nothing that fits.

    Args:
        max_seq_len: most tokens of a sample; turns that end later are left out.
        agent: what the agent gave back, for the hooks.

    Raises:
        ValueError: the picker gave back what it was not given, or one sample twice.
    """
    facts: dict[str, Any] = {"session_id": session.session_id, "tree": _tree(session)}
    facts["agent"] = dict(agent or {})
    paths: dict[int, list[Turn]] = {}
    samples: list[Sample] = []
    for leaf in session.leaves():
        path = _fitting(leaf.path(), max_seq_len)
        if not path:
            continue
        sample = _sample_of(path, base, tokenizer, whole=path[-1] is leaf)
        sample.metadata = {**sample.metadata, "leaf": _leaf_facts(leaf, path)}
        paths[id(sample)] = path
        samples.append(sample)
    picked = list((how.pick or drop_retries)(list(samples), facts)) if samples else []
    _check_picked(picked, paths)
    owned: set[int] = set()
    for sample in sorted(picked, key=lambda one: paths[id(one)][-1].number):
        _train_once(sample, paths[id(sample)], owned, tokenizer)
    if how.postprocess is not None and picked:
        picked = list(how.postprocess(picked, facts))
    for number, sample in enumerate(picked):
        sample.metadata.pop("leaf", None)
        sample.metadata["strand"] = {"number": number, "of": len(picked)}
    return _with_base(picked, base)


def _fitting(path: list[Turn], max_seq_len: int | None) -> list[Turn]:
    return [turn for turn in path if max_seq_len is None or turn.end <= max_seq_len]


def _sample_of(path: list[Turn], base: Sample, tokenizer: Tokenizer, *, whole: bool) -> Sample:
    strand = Strand(prompt_length=len(path[0].context_ids))
    sample = _copy(base)
    for turn in path:
        strand.observe(turn.context_ids)
        strand.sampled(
            list(turn.output_ids), list(turn.logprobs), turn.weight_versions, turn.finish_reason
        )
    strand.fill(sample)
    if not whole:
        sample.status = Sample.Status.TRUNCATED
    experts = path[-1].routed_experts
    sample.rollout_routed_experts = experts
    sample.response = _text(sample, tokenizer)
    return sample


def _train_once(sample: Sample, path: list[Turn], owned: set[int], tokenizer: Tokenizer) -> None:
    """Leave out of the loss what other samples train on, and out of the counts; what comes before
    the first turn of its own is this sample's prompt."""
    start = path[0].start
    assert sample.loss_mask is not None and sample.rollout_log_probs is not None
    for turn in path:
        if turn.number not in owned:
            _count(sample, turn)
            continue
        span = slice(turn.start - start, turn.end - start)
        sample.loss_mask[span] = [0] * len(turn.output_ids)
        sample.rollout_log_probs[span] = [0.0] * len(turn.output_ids)
    first = next((turn for turn in path if turn.number not in owned), path[-1])
    owned.update(turn.number for turn in path)
    skipped = first.start - start
    if skipped:
        sample.loss_mask = sample.loss_mask[skipped:]
        sample.rollout_log_probs = sample.rollout_log_probs[skipped:]
        sample.response_length -= skipped
        own = path[path.index(first) :]
        sample.weight_versions = [version for turn in own for version in turn.weight_versions]
        sample.response = _text(sample, tokenizer)


def _count(sample: Sample, turn: Turn) -> None:
    counts = {
        "prompt_tokens": turn.prompt_tokens,
        "cached_tokens": turn.cached_tokens,
        "completion_tokens": len(turn.output_ids),
    }
    sample.spec_info.add(counts)
    sample.prefix_cache_info.add(counts)


def _text(sample: Sample, tokenizer: Tokenizer) -> str:
    ids = sample.tokens[len(sample.tokens) - sample.response_length :]
    return tokenizer.decode(ids, skip_special_tokens=False)


def _copy(base: Sample) -> Sample:
    """A sample of the same prompt without a response; its metadata may be written to."""
    made = copy.copy(base)
    made.metadata = dict(base.metadata)
    fresh = Sample()
    made.spec_info, made.prefix_cache_info = fresh.spec_info, fresh.prefix_cache_info
    made.reward = None
    return made


def _with_base(samples: list[Sample], base: Sample) -> list[Sample]:
    """The first one is the sample that was to be answered: others hold on to it."""
    if not samples or samples[0] is base:
        return samples
    base.__dict__.update(samples[0].__dict__)
    if len(samples) > 1:
        shared = base.index if base.rollout_id is None else base.rollout_id
        for sample in (base, *samples[1:]):
            sample.rollout_id = shared if sample.rollout_id is None else sample.rollout_id
    return [base, *samples[1:]]


def _check_picked(picked: list[Any], known: Mapping[int, Any]) -> None:
    ids = [id(one) for one in picked]
    if len(set(ids)) != len(ids) or not set(ids) <= known.keys():
        raise ValueError(
            "the session's picker gave back samples that it was not given, or one twice; expected "
            "some of them (a postprocessor may change, split and join)"
        )


def _tree(session: Session) -> dict[str, Any]:
    """Turns and leaves, as miles' pickers read them."""
    nodes = [
        {
            "id": turn.number,
            "parent": None if turn.parent is None else turn.parent.number,
            "seq": turn.number,
            "truncated": turn.finish_reason == "length",
            "committed_at": turn.made_at,
            "completion_span": [turn.start, turn.end],
            "num_tokens": turn.end,
            "response_id": turn.response_id,
        }
        for turn in session.turns
    ]
    leaves = [
        {"node_id": leaf.number, "path_node_ids": [turn.number for turn in leaf.path()]}
        for leaf in session.leaves()
    ]
    return {"nodes": nodes, "leaves": leaves}


def _leaf_facts(leaf: Turn, path: list[Turn]) -> dict[str, Any]:
    return {
        "node_id": leaf.number,
        "parent": None if leaf.parent is None else leaf.parent.number,
        "path_node_ids": [turn.number for turn in path],
        "response_id": leaf.response_id,
        "asked_again": _asked_again(leaf),
    }


def _asked_again(leaf: Turn) -> bool:
    """Whether a later turn has the same prompt."""
    others = leaf.siblings
    return any(
        other.number > leaf.number and other.context_ids == leaf.context_ids for other in others
    )


__all__ = ["Collecting", "Pick", "Postprocess", "collect", "drop_retries", "keep_all"]
