import asyncio
import os
import subprocess

import pytest

from dovetail.config.sections import RewardConfig
from dovetail.rewards.math import MathReward
from dovetail.rewards.score import Scorer
from dovetail.types.errors import DataError
from dovetail.types.sample import Sample

HOSTILE = [
    "9^{9^{9^{9}}}",
    "9**9**9**9",
    "((((9!)!)!)!)!",
    "(99999999)!",
    "2^{10^{10}}",
    "(" * 3000 + "1" + ")" * 3000,
    "{" * 3000 + "1" + "}" * 3000,
    "+".join(["\\frac{1}{x}"] * 1500),
    "\\int_0^1 \\frac{\\sin(x^{x^x})}{\\ln(x^x+e^{x^2})} dx",
    "\\sum_{n=1}^{10^{9}} \\frac{1}{n^n}",
    "\\prod_{k=1}^{99999999} k",
    "(x+y+z)^{9999}",
    "\\sqrt{" * 200 + "2" + "}" * 200,
    "\\binom{99999999}{49999999}",
]


def grade(response, label, **options):
    async def run():
        reward = MathReward(workers=1, timeout_s=20.0, **options)
        try:
            return await reward(Sample(response=response, label=label), response)
        finally:
            reward.close()

    return asyncio.run(run())


def children():
    listing = subprocess.run(
        ["ps", "-o", "pid=,args=", "--ppid", str(os.getpid())],
        capture_output=True,
        text=True,
    ).stdout
    return [line for line in listing.splitlines() if "math_worker" in line]


def test_numbers_start_no_process():
    async def run():
        reward = MathReward(workers=2, timeout_s=1.0)
        right = await reward(Sample(label=46), "12+34=046")
        wrong = await reward(Sample(label="46"), "it is 47")
        nothing = await reward(Sample(label="46"), "who knows")
        return right, wrong, nothing, reward.pool.num_alive

    assert asyncio.run(run()) == (1.0, 0.0, 0.0, 0)


def test_algebra_is_known_by_math_verify():
    before = children()  # Foreign reward functions keep workers for the whole process.

    async def run():
        scorer = Scorer(RewardConfig(rm_type="math", reward_timeout_s=20.0))
        pairs = [
            ("\\boxed{x^2+1}", "1+x^2", 1.0),
            ("\\boxed{2\\sqrt{3}}", "\\sqrt{12}", 1.0),
            ("\\boxed{\\left( 1, 2 \\right)}", "(1,2)", 1.0),
            ("\\boxed{50\\%}", "0.5", 1.0),
            ("\\boxed{x=5}", "5", 1.0),
            ("\\boxed{x^2+2}", "1+x^2", 0.0),
            ("\\boxed{\\frac{", "x", 0.0),
        ]
        samples = [Sample(index=i, response=r, label=w) for i, (r, w, _) in enumerate(pairs)]
        await asyncio.gather(*map(scorer.score, samples))
        scorer.close()
        return [s.reward for s in samples], [reward for *_, reward in pairs], scorer.metrics()

    got, wanted, metrics = asyncio.run(run())
    assert got == wanted and metrics == {"reward/scored": 7.0}
    assert set(children()) <= set(before)


def test_a_sample_without_label_is_a_mistake_of_the_run():
    with pytest.raises(DataError, match="--label-key"):
        grade("5", None)
    with pytest.raises(ValueError, match="text or a number"):
        grade("5", [5])


def test_hostile_answers_score_zero_and_the_pool_stays_whole():
    before = children()

    async def run():
        reward = MathReward(workers=2, timeout_s=0.5)
        try:
            # Both workers are up, so that no hostile answer waits for one to start.
            warm = [reward(Sample(label="1+x"), "\\boxed{x+1}") for _ in range(2)]
            assert await asyncio.gather(*warm) == [1.0, 1.0]
            samples = [(Sample(label="5"), f"\\boxed{{{answer}}}") for answer in HOSTILE]
            # Without a limit that holds, one of these runs for minutes.
            scores = await asyncio.wait_for(
                asyncio.gather(*(reward(*sample) for sample in samples)), 60
            )
            reward.pool.timeout_s = 20.0
            after = [reward(Sample(label="1+x"), "\\boxed{x+1}") for _ in range(4)]
            assert await asyncio.gather(*after) == [1.0] * 4
            return scores, reward.metrics(), reward.pool.num_alive
        finally:
            reward.close()

    scores, metrics, alive = asyncio.run(run())
    assert scores == [0.0] * len(HOSTILE) and alive == 2
    # The guards stop most of them; some must have met the limit itself.
    assert metrics["reward/math_timeouts"] >= 1.0
    assert set(children()) <= set(before)
