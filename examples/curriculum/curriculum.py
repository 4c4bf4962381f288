"""A data source that makes its own sums, harder ones when the model gets them right.

get_samples --level--> sums --> rollout --> rewards
     ^                                        |
     +------- saw(groups): up or down <-------+   look_back, --rollout-all-samples-process-path
"""

import random

from dovetail.types import Sample

LEVELS = (2, 4, 10, 30, 100)
"""Operands are below these."""
WINDOW = 8
"""So many groups of the current level are looked at before it changes."""
UP, DOWN = 0.6, 0.2
"""Mean rewards at which the level changes."""


class Curriculum:
    """Sums below 100, one level of difficulty at a time."""

    def __init__(self, call):
        self.args, self.returned = call.args, []
        self.level, self.next_group, self.seen = 0, 0, []

    def get_samples(self, num_samples):
        """Groups that came back, then new ones of the current level."""
        groups, self.returned = self.returned[:num_samples], self.returned[num_samples:]
        while len(groups) < num_samples:
            groups.append(self._new_group())
        return groups

    def _new_group(self):
        number, n = self.next_group, self.args.n_samples_per_prompt
        self.next_group += 1
        # A group's sum depends on its number and level alone, so a resumed run goes on with the
        # same ones.
        draw = random.Random(f"{self.args.rollout_seed}/{number}/{self.level}")
        a, b = (draw.randrange(LEVELS[self.level]) for _ in range(2))
        return [
            Sample(
                group_index=number,
                index=number * n + i,
                prompt=f"{a:02d}+{b:02d}=",
                label=f"{a + b:03d}",
                metadata={"level": self.level},
            )
            for i in range(n)
        ]

    def add_samples(self, samples):
        """Unfinished or unused groups."""
        self.returned += samples

    def saw(self, groups):
        """Note how the model does, and move on or back."""
        for group in groups:
            if group[0].metadata["level"] == self.level:
                self.seen.append(sum(sample.reward for sample in group) / len(group))
        if len(self.seen) < WINDOW:
            return
        mean = sum(self.seen) / len(self.seen)
        step = (mean > UP) - (mean < DOWN)
        self.level = min(max(self.level + step, 0), len(LEVELS) - 1)
        self.seen = []

    def state_dict(self):
        """What a checkpoint keeps."""
        returned = [[sample.to_dict() for sample in group] for group in self.returned]
        own = {name: getattr(self, name) for name in ("level", "next_group", "seen")}
        return {**own, "returned": returned}

    def load_state_dict(self, state):
        """Go on from a checkpoint."""
        self.level, self.next_group = state["level"], state["next_group"]
        self.seen = list(state["seen"])
        self.returned = [[Sample.from_dict(one) for one in group] for group in state["returned"]]

    def __len__(self):
        return LEVELS[-1] ** 2


def look_back(args, all_samples, data_source):
    """Tells the data source how each finished group went, filtered ones too."""
    data_source.saw(all_samples)


async def reward(args, sample, **kwargs):
    """The share of right digits: something to learn from before the first whole answer."""
    answer = sample.response.removesuffix("<eos>")
    if len(answer) != len(sample.label):
        return 0.0
    right = sum(a == b for a, b in zip(answer, sample.label, strict=True))
    return right / len(sample.label)


def log_level(rollout_id, args, samples, rollout_extra_metrics, rollout_time):
    """The level as a metric."""
    levels = [sample.metadata["level"] for sample in samples]
    rollout_extra_metrics["curriculum/level"] = sum(levels) / len(levels)
    return False
