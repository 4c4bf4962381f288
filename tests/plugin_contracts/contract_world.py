"""A small training run around one function: real data source, real rollout, a made-up engine.

Nothing here needs a model, a GPU or the network. Tokens are letters and so is the engine's answer.
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import inspect
import json
import random
import traceback
from collections.abc import Awaitable
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import pytest
from contract_paths import PLUGINS, run_flags

from dovetail.config.resolve import resolve
from dovetail.config.run import RunConfig
from dovetail.data.build import build_source
from dovetail.hooks import ArgsView, BoundHook, bind
from dovetail.hooks.load import admit_foreign_imports
from dovetail.rollout.generate import generate
from dovetail.rollout.rollout import Rollout
from dovetail.rollout.sampling import mix_seed, rollout_sampling
from dovetail.router.bridge import Bridge
from dovetail.run.serving import CALLERS, with_sessions
from dovetail.types import (
    EvalOutput,
    FinishReason,
    GenerateCall,
    GenerateRequest,
    GenerateResult,
    Group,
    HookError,
    HookRunError,
    RolloutCall,
    Sample,
    SamplingParams,
    VersionSpan,
)

T = TypeVar("T")
DEFAULTS = {
    "--rollout-batch-size": "3",
    "--n-samples-per-prompt": "4",
    "--rollout-max-response-len": "12",
    "--label-key": "label",
    "--num-rollout": "2",
    "--rm-type": "random",
    "--custom-agent-function-path": f"{PLUGINS / 'native.py'}:agent",
}
PATIENCE_S = 60.0
"""A function that takes longer than this for a handful of short samples is taken to hang."""


class Letters:
    """A tokenizer with one token per character."""

    eos_token_id, pad_token_id, eos_token, pad_token = 1, 0, "<eos>", "<pad>"
    chat_template = None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, token_ids: Any, skip_special_tokens: bool = False) -> str:
        return "".join(chr(int(i)) for i in token_ids if i > 1 or not skip_special_tokens)

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": self.encode(text)}

    def apply_chat_template(self, conversation: Any, tokenize: bool = True, **_: Any) -> Any:
        text = "".join(f"{turn['role']}: {turn['content']}\n" for turn in conversation)
        return self.encode(text) if tokenize else text


def write_letters(directory: Path) -> Path:
    """A checkpoint of nothing but `Letters`, for plugins that load the run's tokenizer."""
    directory.mkdir()
    vocab = {chr(i): i for i in range(2, 128)} | {"<pad>": 0, "<eos>": 1}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": r"[\s\S]"},
            "behavior": "Isolated",
            "invert": False,
        },
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "?"},
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "?",
    }
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (directory / "config.json").write_text('{"model_type": "qwen3"}', encoding="utf-8")
    return directory


class Babble:
    """An engine that answers with digits, drawn by the request's seed, of varied length."""

    def __init__(self) -> None:
        self.requests: list[GenerateRequest] = []
        self.aborts = 0

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        self.requests.append(request)
        await asyncio.sleep(0)
        draw = random.Random(mix_seed(request.sampling.seed or 0, *request.prompt_ids))
        wanted = draw.randint(1, 16)
        length = min(wanted, request.sampling.max_new_tokens)
        ids = [ord(draw.choice("0123456789")) for _ in range(length)]
        return GenerateResult(
            request.request_id,
            ids,
            [-draw.random() for _ in ids],
            FinishReason.STOP if length == wanted else FinishReason.LENGTH,
            text="".join(map(chr, ids)),
            version_spans=(VersionSpan(1, 0, length),),
            prompt_tokens=len(request.prompt_ids),
        )

    async def abort(self, request_ids: Any = None) -> None:
        self.aborts += 1

    async def close(self) -> None:
        pass


class Counting:
    """A scorer: one point for an answer that has the label's last digit."""

    async def score(self, sample: Sample) -> None:
        sample.reward = float(str(sample.label)[-1:] in sample.response)

    async def score_group(self, samples: list[Sample]) -> None:
        for sample in samples:
            await self.score(sample)


class World:
    """The run: its configuration, and the parts that hooks are handed."""

    def __init__(self, directory: Path, *flags: str) -> None:
        rows = [{"input": f"{i}+{i + 3}=", "label": str(2 * i + 3)} for i in range(40)]
        prompts = directory / "prompts.jsonl"
        prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        own = {**DEFAULTS, "--prompt-data": str(prompts), "--run-dir": str(directory / "run")}
        own["--hf-checkpoint"] = self._letters = str(write_letters(directory / "checkpoint"))
        given = [word for flag in own.items() for word in flag]
        given += ["--eval-prompt-data", "held_out", f"{prompts}@[0:2]"]
        self.config: RunConfig = resolve([], [*given, *run_flags(), *flags]).config
        self.args = ArgsView(self.config)
        admit_foreign_imports()
        self.engine, self.scorer = Babble(), Counting()

    @cached_property
    def tokenizer(self) -> Any:
        """That of the run's own checkpoint where it has one, else letters."""
        checkpoint = self.config.model.hf_checkpoint
        if checkpoint == self._letters:
            return Letters()
        from dovetail.checkpoint.hf import load_tokenizer

        return load_tokenizer(checkpoint)

    @cached_property
    def source(self) -> Any:
        """The built-in data source over the prompts."""
        return self.make_source()

    def make_source(self, buffer_filter: Any = None) -> Any:
        """Another built-in data source, at its start."""
        config = self.config
        return build_source(
            config.data,
            config.rollout.n_samples_per_prompt,
            self.tokenizer,
            None,
            buffer_filter=buffer_filter,
        )

    @property
    def sampling(self) -> SamplingParams:
        """What training samples with."""
        return rollout_sampling(self.config.rollout)

    async def collect(self, rollout_id: int) -> Any:
        """The built-in rollout function."""
        rollout = Rollout(
            self.engine,
            self.tokenizer,
            self.source,
            self.scorer,
            self.config.rollout,
            seed=self.config.data.rollout_seed,
        )
        return await rollout(rollout_id)

    async def evaluate(self, rollout_id: int) -> EvalOutput:
        """A built-in evaluation of two prompts."""
        samples = [sample for group in await self._finished(2) for sample in group]
        return EvalOutput({"held_out": samples}, {"eval/held_out/reward": 0.5})

    def rollout_call(self, rollout_id: int = 0, *, evaluation: bool = False) -> RolloutCall:
        """What a rollout or evaluation function gets."""
        return RolloutCall(
            rollout_id=rollout_id,
            evaluation=evaluation,
            data_source=self.source,
            engine=self.engine,
            tokenizer=self.tokenizer,
            scorer=self.scorer,
            default=self.evaluate if evaluation else self.collect,
            args=self.args,
            weight_version=rollout_id,
        )

    async def respond(self, sample: Sample, sampling: SamplingParams) -> Sample:
        """The built-in generate function."""
        return await generate(self.engine, self.tokenizer, sample, sampling)

    def generate_call(
        self, sample: Sample, *, evaluation: bool = False, aborted: bool = False
    ) -> GenerateCall:
        """What a generate function gets."""
        return GenerateCall(
            sample=sample,
            sampling=dataclasses.replace(self.sampling, seed=mix_seed(0, sample.index or 0)),
            engine=self.engine,
            tokenizer=self.tokenizer,
            default=self.respond,
            evaluation=evaluation,
            args=self.args,
            is_aborted=lambda: aborted,
        )

    def finished_groups(self, num_groups: int = 3) -> list[Group]:
        """Groups as a step leaves them: answered, scored, in order; each has both rewards."""
        return asyncio.run(self._finished(num_groups))

    async def _finished(self, num_groups: int) -> list[Group]:
        groups: list[Group] = self.make_source().get_samples(num_groups)
        key = self.config.reward.reward_key
        for group in groups:
            for place, sample in enumerate(group):
                await self.respond(sample, self.generate_call(sample).sampling)
                sample.reward = {key: float(place % 2)} if key else float(place % 2)
        return groups

    def bound(self, slot: str, path: str) -> BoundHook:
        """The function at `path`, matched as a run would.

        A reward function that takes groups gets --group-rm, and its run is told so.
        """
        try:
            return bind(slot, path, self.args)
        except HookError as error:
            fault = str(error)
        if "--group-rm" in fault and not self.args.group_rm:
            self.args.learn(group_rm=True)
            return self.bound(slot, path)
        pytest.fail(fault, pytrace=False)

    def call(self, hook: BoundHook, *values: Any) -> Any:
        """What a run gets from the hook; meanwhile its engine answers HTTP too, where plugins look.

        A broken contract fails the test with the hook's own words.
        """
        try:
            return self._call(hook, values)
        except TimeoutError:
            fault = f"{hook.path} did not come back within {PATIENCE_S:.0f} s"
        except HookRunError as error:
            theirs = traceback.format_exception(error.__cause__) if error.__cause__ else []
            fault = "\n\n".join([str(error), "".join(theirs)]).rstrip()
        pytest.fail(fault, pytrace=False)

    def _call(self, hook: BoundHook, values: tuple[Any, ...]) -> Any:
        if hook.spec.slot not in CALLERS:
            return finish(hook(*values))

        async def served() -> Any:
            bridge = Bridge(lambda: self.engine, lambda: self.tokenizer, model="contract")
            server = with_sessions(bridge, self.args)
            server.start(asyncio.get_running_loop())
            try:
                got = hook(*values)
                return await got if inspect.isawaitable(got) else got
            finally:
                server.close()

        return finish(served())


def finish(result: Awaitable[T] | T) -> T:
    """The value, also of an awaitable.

    Raises:
        TimeoutError: it took longer than PATIENCE_S.
    """
    if not inspect.isawaitable(result):
        return result

    async def wait() -> T:
        return await asyncio.wait_for(result, PATIENCE_S)

    return asyncio.run(wait())


def frozen(groups: list[Group]) -> list[list[dict[str, Any]]]:
    """What is in the samples now, to compare with later."""
    return [[copy.deepcopy(sample.to_dict()) for sample in group] for group in groups]


def changed(before: list[list[dict[str, Any]]], groups: list[Group]) -> set[str]:
    """Names of the attributes that differ from `frozen`."""
    names: set[str] = set()
    for old_group, group in zip(before, groups, strict=True):
        for old, sample in zip(old_group, group, strict=True):
            new = sample.to_dict()
            names |= {name for name in {*old, *new} if old.get(name) != new.get(name)}
    return names


def check_answered(sample: Sample) -> None:
    """A response that training can use: every aligned field is."""
    where = f"sample {sample.index}"
    assert isinstance(sample, Sample), f"expected a Sample, got {type(sample).__name__}"
    assert sample.response_length > 0, f"{where} has no response tokens"
    assert len(sample.tokens) > sample.response_length, f"{where} has no prompt tokens"
    assert isinstance(sample.response, str), f"{where}: response is no text"
    for name in ("loss_mask", "rollout_log_probs"):
        values = getattr(sample, name)
        assert values is None or len(values) == sample.response_length, (
            f"{where}: {name} has {len(values)} entries for {sample.response_length} response "
            "tokens"
        )
    assert all(entry in (0, 1) for entry in sample.loss_mask or ()), f"{where}: loss_mask"
    # Some plugins assign the plain string.
    status = Sample.Status(sample.status)
    assert status is not Sample.Status.PENDING, f"{where} is still pending"
