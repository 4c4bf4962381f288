"""Who judges a sample, for how long, and what happens when that fails.

    sample.custom_rm_path -> the run's function -> sample.metadata["rm_type"] -> the run's rm_type
                                      |
             value --checked--> sample.reward          fault --counted--> excluded, reward 0.0

A failed reward never hangs and never ends the run by itself: the sample is taken out of training
and out of its group's baseline, and counted under the fault's name. Too many in a row mean that the
function is broken, and stop the run. A group function whose list has another length than the group
stops it at once: there is no telling which reward is whose.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

from dovetail.config.reward_terms import parse_terms
from dovetail.rewards.rules import Rules, TermFault
from dovetail.rewards.value import RewardFault, as_reward, as_rewards
from dovetail.types.errors import ConfigError, HookRunError, RewardError, UsageError
from dovetail.types.sample import Sample

if TYPE_CHECKING:
    from dovetail.config.sections import RewardConfig

_log = logging.getLogger("dovetail.rewards")

CustomReward = Callable[[Any], Any]
"""`(sample) -> number or object`, or with group_rm `(samples) -> list of them`; plain or async."""
_ENDS_THE_RUN = (UsageError, HookRunError)
OWN_KEY = "eval_reward_key"
"""Key of `sample.metadata` with the entry of object rewards that is read of this sample, e.g. that
of its evaluation set; goes before the run's."""


class Scorer:
    """Sets `reward` of samples.

    An async function is cancelled at `reward_timeout_s`, and left behind if it ignores that. A
    plain function is called on the event loop, in order and without a thread: it must be quick, for
    nothing else runs meanwhile and no time limit can reach it. Built-in rules bound their own time.

    Where the reward is an object, its readers use `reward_key` (`eval_reward_key` in evaluation); a
    failed sample's object has 0.0 under each. The scores that a weighted sum is made of are in
    `sample.metadata["reward_parts"]`.

    Args:
        reward: the run's `[reward]` section.
        custom: the run's function; goes before `rm_type`.
        name: what messages call it.
        resolve: from a sample's `custom_rm_path` to a function of the same kind.
        seed: of the rule `random`.
        max_concurrent: async custom functions that run at a time; no time runs for those that wait.
        max_response_len: most tokens of a response, for built-in rewards of its length.
        keeps_objects: without a key an object is a reward too: a function of the user's makes
            numbers of them later.

    Example:
        >>> scorer = Scorer(RewardConfig(rm_type="math"))
        >>> await scorer.score(sample)
        >>> sample.reward
        1.0
    """

    def __init__(
        self,
        reward: RewardConfig,
        custom: CustomReward | None = None,
        *,
        name: str | None = None,
        resolve: Callable[[str], CustomReward] | None = None,
        seed: int = 0,
        max_concurrent: int = 256,
        max_response_len: int | None = None,
        keeps_objects: bool = False,
    ) -> None:
        self._reward, self._keeps_objects = reward, keeps_objects
        self._custom = custom
        self._name = name or getattr(custom, "__qualname__", None) or type(custom).__name__
        self._resolve = resolve
        self._keys = tuple(k for k in (reward.reward_key, reward.eval_reward_key) if k)
        self._turn = asyncio.Semaphore(max_concurrent)
        self._rules = Rules(reward, seed=seed, max_response_len=max_response_len)
        self._resolved: dict[str, CustomReward] = {}
        self._counts: Counter[str] = Counter()
        self._failures_in_a_row = 0
        self._left_behind: set[asyncio.Future[Any]] = set()

    async def score(self, sample: Sample) -> None:
        """Set the reward of one finished sample; one that has a reward keeps it, if it is one.

        Raises:
            RewardError: `max_reward_failures` rewards in a row failed.
            HookRunError: the run's function broke the contract of its hook.
            UsageError: no such reward, or one of its settings is missing.
        """
        if sample.reward is not None:
            self._check_given(sample)
            return
        name, judge = self._judge_of(sample)
        try:
            reward = self._as_reward(sample, await judge(sample))
        except _ENDS_THE_RUN:
            raise
        # User code and judges' answers: whatever they raise costs this sample, and is counted.
        except Exception as error:
            self._fail([sample], name, error)
        else:
            self._succeed(sample, reward)

    async def score_group(self, samples: list[Sample]) -> None:
        """Set the rewards of a finished group: with group_rm by one call of the function that takes
        groups, the samples' own or the run's, or by the built-in rewards that compare siblings.

        Raises:
            RewardError: `max_reward_failures` rewards in a row failed.
            HookRunError: a list of rewards has another length than the group.
            UsageError: no such reward, or one of its settings is missing.
        """
        by_path: dict[str | None, list[Sample]] = {}
        for sample in samples:
            by_path.setdefault(sample.custom_rm_path, []).append(sample)
        for path, part in by_path.items():
            custom = self._custom_of(path)
            if custom is None:
                await self._score_by_rules(part)
            elif not self._takes_groups(custom):
                await asyncio.gather(*(self.score(sample) for sample in part))
            else:
                await self._score_together(part, custom, path or self._name)

    async def _score_together(self, samples: list[Sample], custom: CustomReward, name: str) -> None:
        try:
            values = as_rewards(await self._call(custom, samples), len(samples))
        except _ENDS_THE_RUN:
            raise
        except RewardFault as fault:
            if fault.kind == "wrong_length":
                raise HookRunError(
                    f"the reward {name} (--custom-rm-path, TOML: hooks.custom_rm_path) gave "
                    f"{fault}, the first of them sample {samples[0].index}; with --group-rm it "
                    "gives a list of one reward per sample, in their order"
                ) from fault
            self._fail(samples, name, fault)
            return
        # As in `score`: one fault costs the whole group.
        except Exception as error:
            self._fail(samples, name, error)
            return
        for sample, value in zip(samples, values, strict=True):
            self._take(name, sample, value)

    async def _score_by_rules(self, samples: list[Sample]) -> None:
        """Built-in rewards: those with a term that compares siblings by their `rm_type`."""
        alone: list[Sample] = []
        compared: dict[str, list[Sample]] = {}
        for sample in samples:
            asked = parse_terms(self._rm_type_of(sample))
            if sample.reward is None and asked.by_group:
                compared.setdefault(asked.text, []).append(sample)
            else:
                alone.append(sample)
        await asyncio.gather(
            *(self.score(sample) for sample in alone),
            *(self._compare(part, rm_type) for rm_type, part in compared.items()),
        )

    async def _compare(self, samples: list[Sample], rm_type: str) -> None:
        values = await self._rules.values(samples, rm_type, self._keys_of(samples[0]))
        for sample, value in zip(samples, values, strict=True):
            if isinstance(value, _ENDS_THE_RUN):
                raise value
            if isinstance(value, Exception):
                self._fail([sample], rm_type, value)
            else:
                self._take(rm_type, sample, value)

    def _check_given(self, sample: Sample) -> None:
        """A reward that a generate function or a sample hook set: theirs to form, but a reward."""
        try:
            if not isinstance(sample.reward, dict):
                as_reward(sample.reward, ())
        except Exception as error:
            self._fail([sample], "that was set before scoring", error)

    def _take(self, name: str, sample: Sample, value: Any) -> None:
        """Check a value that is there, and count it."""
        try:
            reward = self._as_reward(sample, value)
        # A value's own conversion to a number may raise anything.
        except Exception as error:
            self._fail([sample], name, error)
        else:
            self._succeed(sample, reward)

    def _as_reward(self, sample: Sample, value: Any) -> float | dict[str, Any]:
        return as_reward(value, self._keys_of(sample), keeps_objects=self._keeps_objects)

    def _keys_of(self, sample: Sample) -> tuple[str, ...]:
        """The entries of an object that are read, the sample's own first."""
        own = sample.metadata.get(OWN_KEY)
        if not isinstance(own, str) or not own:
            return self._keys
        return (own, *(key for key in self._keys if key != own))

    def metrics(self) -> dict[str, float]:
        """Counts since the last call: `reward/scored`, `reward/failed`, `reward/failures/<kind>`,
        `reward/parts_failed/<name>` of a weighted sum's terms, and those of the built-in rules. The
        kind is timeout, nan, inf, none, wrong_type, wrong_length, missing_key, unexpected_object,
        or the name of the exception."""
        counts = {name: float(count) for name, count in sorted(self._counts.items())}
        self._counts.clear()
        return counts | self._rules.metrics()

    def close(self) -> None:
        """End worker processes and connections; may be called again, and after the event loop."""
        self._rules.close()

    def _custom_of(self, path: str | None) -> CustomReward | None:
        """The function behind a sample's own path, else the run's."""
        if path is None or self._resolve is None:
            return self._custom
        if path not in self._resolved:
            self._resolved[path] = self._resolve(path)
        return self._resolved[path]

    def _takes_groups(self, custom: CustomReward) -> bool:
        """Whether one call of it judges a whole group: by its form, where that is known."""
        form = getattr(custom, "form", None)
        return self._reward.group_rm and getattr(form, "batched", True)

    def _judge_of(self, sample: Sample) -> tuple[str, Callable[[Sample], Awaitable[Any]]]:
        custom = self._custom_of(sample.custom_rm_path)
        if custom is not None:
            judge = self._first_of_one if self._reward.group_rm else self._call
            return sample.custom_rm_path or self._name, functools.partial(judge, custom)
        rm_type = self._rm_type_of(sample)
        keys = self._keys_of(sample)
        return str(rm_type), lambda one: self._rules.value(one, rm_type, keys)

    def _rm_type_of(self, sample: Sample) -> Any:
        rm_type = sample.metadata.get("rm_type") or self._reward.rm_type
        if rm_type:
            return rm_type
        raise ConfigError(
            "nothing says what a response is worth: give --rm-type (TOML: reward.rm_type), "
            "--custom-rm-path (TOML: hooks.custom_rm_path) or metadata['rm_type'] of each row"
        )

    async def _first_of_one(self, custom: CustomReward, sample: Sample) -> Any:
        """Under group_rm every function takes a list."""
        return as_rewards(await self._call(custom, [sample]), 1)[0]

    async def _call(self, custom: CustomReward, given: Sample | Sequence[Sample]) -> Any:
        try:
            value = custom(given)
        except SystemExit as error:
            raise RewardFault("SystemExit", "it called sys.exit()") from error
        if not inspect.isawaitable(value):
            return value
        async with self._turn:
            if getattr(custom, "has_time_limit", False):
                return await _uncancelled(value)
            return await self._bounded(value)

    async def _bounded(self, value: Awaitable[Any]) -> Any:
        task = asyncio.ensure_future(_without_exit(value))
        try:
            await asyncio.wait({task}, timeout=self._reward.reward_timeout_s)
            if task.cancelled():
                raise _cancelled()
            if task.done():
                return task.result()
            raise RewardFault("timeout", f"no reward within {self._reward.reward_timeout_s:g} s")
        finally:
            if not task.done():
                # Not waited for: a function that swallows its cancellation must not hold the run.
                task.cancel()
                self._left_behind.add(task)
                task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Future[Any]) -> None:
        self._left_behind.discard(task)
        if not task.cancelled():
            task.exception()  # Read, so that asyncio does not report it as lost.

    def _succeed(self, sample: Sample, reward: float | dict[str, Any]) -> None:
        sample.reward = reward
        sample.metadata.pop("reward_error", None)
        self._counts["reward/scored"] += 1
        self._failures_in_a_row = 0

    def _fail(self, samples: list[Sample], name: str, error: Exception) -> None:
        if isinstance(error, TermFault):
            self._counts[f"reward/parts_failed/{error.term}"] += len(samples)
            name, error = f"{name} (its term {error.term})", error.error
        kind = _kind(error)
        said = f"{kind}: {error}" if str(error) else kind
        for sample in samples:
            keys = self._keys_of(sample)
            sample.reward = dict.fromkeys(keys, 0.0) if keys else 0.0
            sample.remove_sample = True
            sample.metadata["reward_error"] = said
        self._counts["reward/failed"] += len(samples)
        self._counts[f"reward/failures/{kind}"] += len(samples)
        self._failures_in_a_row += 1
        where = f"sample {samples[0].index}" if samples else "an empty group"
        if self._failures_in_a_row >= self._reward.max_reward_failures:
            raise RewardError(
                f"the reward {name} failed {self._failures_in_a_row} times in a row, the last time "
                f"on {where} with {said}; mend it, or allow more with "
                "--max-reward-failures (TOML: reward.max_reward_failures)"
            ) from error
        if self._counts[f"reward/failures/{kind}"] == len(samples):
            _log.warning("the reward %s failed on %s: %s", name, where, said, exc_info=error)


def _kind(error: Exception) -> str:
    if isinstance(error, RewardFault):
        return error.kind
    return "timeout" if isinstance(error, TimeoutError) else type(error).__name__


async def _uncancelled(value: Awaitable[Any]) -> Any:
    """A cancellation that nobody asked for is a fault of the reward."""
    try:
        return await _without_exit(value)
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise _cancelled() from None


def _cancelled() -> RewardFault:
    return RewardFault("CancelledError", "it was cancelled from within")


async def _without_exit(value: Awaitable[Any]) -> Any:
    """SystemExit out of a task ends the whole event loop; a reward may not do that."""
    try:
        return await value
    except SystemExit as error:
        raise RewardFault("SystemExit", "it called sys.exit()") from error
