"""Three agents of one model, written as a rollout function for slime.

    solver: "12+34="           -> "046"       n answers to a problem
    critic: "12+34=046-"       -> "1" or "0"  is that answer right?
    selector: "12+34=046*036-" -> "0", "1"..  which answer is it? (n votes)

Every agent's text is trained on with a reward of its own, against its own kind: solvers of a
problem are one group, its critics another, its selectors a third.
"""

import asyncio
import copy

from slime.rollout.base_types import RolloutFnTrainOutput
from slime.rollout.sglang_rollout import GenerateState, eval_rollout
from slime.utils.async_utils import run
from slime.utils.http_utils import post
from slime.utils.types import Sample

ROLES = ("solver", "critic", "selector")
STATUS = {
    "stop": Sample.Status.COMPLETED,
    "length": Sample.Status.TRUNCATED,
    "abort": Sample.Status.ABORTED,
}


def generate_rollout(args, rollout_id, data_source, evaluation=False):
    """Solvers, critics and selectors for each problem of the step; evaluation asks solvers only."""
    if evaluation:
        return run(eval_rollout(args, rollout_id))[0]
    problems = data_source.get_samples(args.rollout_batch_size)
    groups = [group for answers in run(work_on_all(args, problems)) for group in answers]
    return RolloutFnTrainOutput(samples=groups, metrics=metrics_of(groups))


async def work_on_all(args, problems):
    """The three groups of every problem."""
    return await asyncio.gather(*(work_on(args, problem) for problem in problems))


async def work_on(args, solvers):
    """Solvers answer, critics judge each answer, selectors vote for one."""
    problem, label = solvers[0].prompt, solvers[0].label
    await asyncio.gather(*(ask(args, solver, args.solver_tokens) for solver in solvers))
    answers = [text_of(solver) for solver in solvers]
    critics = [
        agent(solvers, "critic", place, f"{problem}{answer}-")
        for place, answer in enumerate(answers)
    ]
    candidates = answers[: args.num_candidates]
    selectors = [
        agent(solvers, "selector", place, f"{problem}{'*'.join(candidates)}-")
        for place in range(len(solvers))
    ]
    await asyncio.gather(*(ask(args, one, 1) for one in (*critics, *selectors)))
    right = [answer == label for answer in answers]
    for solver, is_right in zip(solvers, right, strict=True):
        solver.reward = args.solver_weight * is_right
    for critic, is_right in zip(critics, right, strict=True):
        critic.reward = args.critic_weight * (text_of(critic) == str(int(is_right)))
    for selector in selectors:
        selector.reward = args.selector_weight * vote(selector, right[: args.num_candidates])
    groups = [solvers, critics, selectors]
    for number, group in enumerate(groups):
        for sample in group:
            # Groups are compared within themselves, so a role of a problem is one.
            sample.group_index = sample.group_index * len(ROLES) + number
            sample.metadata["role"] = ROLES[number]
    # A solver, its critic and a selector are one execution: they weigh as one in a batch.
    for execution in zip(*groups, strict=True):
        for sample in execution:
            sample.rollout_id = execution[0].index
    return groups


def agent(solvers, role, place, prompt):
    """A sample of another role beside those of the solvers."""
    model = solvers[place]
    own = copy.deepcopy(model.metadata)
    index = -1 - (model.index * len(ROLES) + ROLES.index(role))
    return Sample(
        group_index=model.group_index, index=index, prompt=prompt, label=model.label, metadata=own
    )


async def ask(args, sample, max_new_tokens):
    """Let the engine answer a sample's prompt."""
    state = GenerateState(args)
    url = f"http://{args.sglang_router_ip}:{args.sglang_router_port}/generate"
    prompt = state.tokenizer.encode(sample.prompt, add_special_tokens=False)
    params = {**state.sampling_params, "max_new_tokens": max_new_tokens}
    body = {"input_ids": prompt, "sampling_params": params, "return_logprob": True}
    output = await post(url, body)
    meta = output["meta_info"]
    pairs = meta["output_token_logprobs"]
    sample.tokens = prompt + [token for _, token, _ in pairs]
    sample.rollout_log_probs = [log_prob for log_prob, _, _ in pairs]
    sample.response, sample.response_length = output["text"], len(pairs)
    sample.weight_versions.append(meta["weight_version"])
    sample.status = STATUS[meta["finish_reason"]["type"]]


def text_of(sample):
    """What an agent said, without the end that some said and some did not."""
    return sample.response.replace("<eos>", "").replace("<pad>", "")


def vote(selector, right):
    """1.0 for a vote for a right candidate; when none is right, for any vote that names one."""
    text = text_of(selector)
    if not text.isdigit() or int(text) >= len(right):
        return 0.0
    return float(right[int(text)] or not any(right))


def metrics_of(groups):
    """The mean reward of each role."""
    found = {}
    for role in ROLES:
        rewards = [one.reward for group in groups for one in group if one.metadata["role"] == role]
        found[f"agents/{role}_reward"] = sum(rewards) / len(rewards)
    return found
