"""Hand-written stand-ins for the seams of a rollout."""

from __future__ import annotations

import asyncio
import hashlib

from dovetail.types import FinishReason, GenerateRequest, GenerateResult, Sample, VersionSpan


class FakeTokenizer:
    """One id per character: its code point."""

    eos_token_id = 0
    pad_token_id = 0

    def encode(self, text, add_special_tokens=True):
        return [ord(character) for character in text]

    def decode(self, token_ids, skip_special_tokens=False):
        return "".join(chr(i) for i in token_ids)

    def apply_chat_template(self, conversation, **kwargs):
        return self.encode("".join(message["content"] for message in conversation))


class FakeEngine:
    """Letters that depend on (seed, position) alone, one per loop turn, up to `length(seed)`.

    `abort` ends what is in flight; the tokens made until then are kept.
    """

    def __init__(self, length=lambda seed: 4, version=1):
        self.length, self.version = length, version
        self.requests, self.aborts = [], 0

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        self.requests.append(request)
        generation, tokens, reason = self.aborts, [], FinishReason.LENGTH
        sampling = request.sampling
        while len(tokens) < sampling.max_new_tokens:
            position = request.num_generated + len(tokens)
            if position >= self.length(sampling.seed):
                reason = FinishReason.STOP
                break
            await asyncio.sleep(0)
            if self.aborts != generation:
                reason = FinishReason.ABORT
                break
            tokens.append(letter(sampling.seed, position))
        return GenerateResult(
            request.request_id,
            tokens,
            [-0.5] * len(tokens),
            reason,
            text="".join(map(chr, tokens)),
            version_spans=(VersionSpan(self.version, 0, len(tokens)),) if tokens else (),
            prompt_tokens=len(request.prompt_ids),
        )

    async def abort(self, request_ids=None):
        self.aborts += 1

    async def close(self):
        pass


def letter(seed, position):
    """The fake policy's token at `position`."""
    return ord("a") + hashlib.blake2b(repr((seed, position)).encode()).digest()[0] % 26


class FakeSource:
    """Numbers groups upward; what comes back is served first."""

    def __init__(self, n_samples_per_prompt=2, num_groups=None):
        self.n, self.num_groups = n_samples_per_prompt, num_groups
        self.next_group, self.buffer, self.issued = 0, [], []

    def get_samples(self, num_samples):
        groups, self.buffer = self.buffer[:num_samples], self.buffer[num_samples:]
        while len(groups) < num_samples and self.next_group != self.num_groups:
            groups.append(self._fresh(self.next_group))
            self.next_group += 1
        self.issued += [group[0].group_index for group in groups]
        return groups

    def _fresh(self, number):
        prompt = f"{number}?"
        return [
            Sample(
                group_index=number,
                index=number * self.n + i,
                prompt=prompt,
                tokens=[ord(character) for character in prompt],
            )
            for i in range(self.n)
        ]

    def add_samples(self, samples):
        self.buffer += samples

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class FakeScorer:
    """The reward is `rule(sample)`; remembers what it was asked."""

    def __init__(self, rule=lambda sample: float(sample.index % 2)):
        self.rule, self.scored, self.groups = rule, [], []

    async def score(self, sample):
        self.scored.append(sample.index)
        sample.reward = self.rule(sample)

    async def score_group(self, samples):
        self.groups.append([sample.index for sample in samples])
        for sample in samples:
            sample.reward = self.rule(sample)
