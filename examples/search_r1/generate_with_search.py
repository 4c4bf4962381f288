"""Multi-turn generation with a search engine, and its reward, written as one writes them for slime.

A turn ends with </search> or </answer>. After a search its results follow as <information>: the
model sees them, and is not trained on them, for it did not write them (loss mask 0).
"""

import re
from functools import cache
from pathlib import Path

from bm25 import Bm25
from slime.rollout.sglang_rollout import GenerateState
from slime.utils.http_utils import post
from slime.utils.types import Sample

STOPS = ["</search>", "</answer>"]
SEARCH = re.compile(r"<search>([^<]*)</search>$")
ANSWER = re.compile(r"<answer>([^<]*)")
CORPUS = Path(__file__).with_name("corpus.jsonl")
STATUS = {
    "stop": Sample.Status.COMPLETED,
    "length": Sample.Status.TRUNCATED,
    "abort": Sample.Status.ABORTED,
}
SEARCHED, ANSWERED, RIGHT = 0.2, 0.2, 0.6


async def generate(args, sample: Sample, sampling_params) -> Sample:
    """Alternate between the model and the search engine, for `args.search_max_turns` turns."""
    assert not args.partial_rollout, "a conversation with a tool is not gone on with later"
    state = GenerateState(args)
    url = f"http://{args.sglang_router_ip}:{args.sglang_router_port}/generate"
    prompt = state.tokenizer.encode(sample.prompt, add_special_tokens=False)
    tokens, loss_mask, log_probs, response = [], [], [], ""
    searches = 0
    for turn in range(args.search_max_turns):
        room = sampling_params["max_new_tokens"] - len(tokens)
        params = {**sampling_params, "max_new_tokens": room, "stop": STOPS}
        body = {"input_ids": prompt + tokens, "sampling_params": params, "return_logprob": True}
        output = await post(url, body)
        meta = output["meta_info"]
        for log_prob, token, _ in meta["output_token_logprobs"]:
            tokens.append(token)
            log_probs.append(log_prob)
            loss_mask.append(1)
        response += output["text"]
        sample.weight_versions.append(meta["weight_version"])
        sample.status = STATUS[meta["finish_reason"]["type"]]
        search = SEARCH.search(response)
        if sample.status != Sample.Status.COMPLETED or not search:
            break
        if turn == args.search_max_turns - 1:
            break
        found = index().search(search[1], args.search_topk)
        told = f"<information>{' '.join(found)}</information>"
        seen = state.tokenizer.encode(told, add_special_tokens=False)
        if len(tokens) + len(seen) >= sampling_params["max_new_tokens"]:
            sample.status = Sample.Status.TRUNCATED
            break
        searches += 1
        tokens += seen
        log_probs += [0.0] * len(seen)
        loss_mask += [0] * len(seen)
        response += told
    sample.tokens = prompt + tokens
    sample.response, sample.response_length = response, len(tokens)
    sample.loss_mask, sample.rollout_log_probs = loss_mask, log_probs
    sample.metadata["searches"] = searches
    return sample


async def reward(args, sample: Sample, **kwargs) -> float:
    """0.2 for a search, 0.2 for an answer after it, 0.6 more for the right one; else 0."""
    if not sample.metadata.get("searches"):
        return 0.0
    answer = ANSWER.search(sample.response.rpartition("</information>")[2])
    right = bool(answer) and answer[1].strip() == str(sample.label)
    return SEARCHED + ANSWERED * bool(answer) + RIGHT * right


@cache
def index() -> Bm25:
    """The search engine, made when it is first needed."""
    return Bm25.from_file(CORPUS)
