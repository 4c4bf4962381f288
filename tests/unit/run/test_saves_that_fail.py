"""Generation is held for a save, and goes on after it however the save ended."""

import asyncio
from types import SimpleNamespace

import pytest

from dovetail.config.resolve import resolve
from dovetail.run.collecting import CollectingAhead
from dovetail.run.parts import Run
from dovetail.types import CheckpointError, RolloutOutput, Sample, TrainerLostError

STEPS = 4


class Source:
    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class Policy:
    """Its export raises."""

    def __init__(self, error):
        self.error = error

    def export(self, path):
        raise self.error


class Reporter:
    def __init__(self):
        self.failed = []

    def failed_save(self, error):
        self.failed.append(error)


async def collect(step):
    await asyncio.sleep(0)
    return RolloutOutput(samples=[[Sample(index=step)]])


def made(error, tmp_path):
    ahead = CollectingAhead(collect, Source(), num_steps=STEPS, max_lag=1, stream=None)
    template = str(tmp_path / "{rollout_id}")
    return Run(
        config=resolve([], ["--save-hf", template, "--max-lag", "1"]).config,
        schedule=SimpleNamespace(num_steps=STEPS),
        run_dir=None,
        reporter=Reporter(),
        checkpoints=None,
        interrupt=SimpleNamespace(requested=False),
        collecting=ahead,
        evaluator=None,
        policy=Policy(error),
        to_rows=list,
        compute=None,
    )


async def begins(run, done):
    run.collecting.advance(done, done)


async def takes(run, step):
    return await asyncio.wait_for(run.collecting.take(step), 30)


@pytest.mark.parametrize("error", [CheckpointError("disk full"), TrainerLostError("rank 1 left")])
def test_steps_are_collected_after_a_save_that_fails(error, tmp_path):
    run = made(error, tmp_path)
    run._checkpoint = lambda done, evaluated: None
    with run.runner:
        run.runner.run(begins(run, 0))
        run.runner.run(takes(run, 0))
        if isinstance(error, CheckpointError):
            run.save(1, False)
            assert run.reporter.failed == [error]
        else:
            with pytest.raises(TrainerLostError):
                run.save(1, False)
        run.runner.run(begins(run, 1))
        for step in (1, 2):
            assert run.runner.run(takes(run, step)).samples[0][0].index == step
        run.runner.run(run.collecting.close())


def test_collecting_that_begins_anew_is_not_held_any_more(tmp_path):
    run = made(None, tmp_path)
    with run.runner:
        run.runner.run(begins(run, 0))
        # Held, and nobody lets go: the run is recovering from a lost trainer.
        run.runner.run(run.collecting.hold(False))
        run.runner.run(run.collecting.close())
        run.runner.run(begins(run, 0))
        assert run.runner.run(takes(run, 0)).samples[0][0].index == 0
        run.runner.run(run.collecting.close())
