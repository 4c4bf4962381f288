"""`rollout.generate_utils.openai_endpoint_utils`: a session for a generate function of the user's
own, which hands its address to whom it likes and collects what was recorded there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dovetail.rollout.session import sessions_of
from dovetail.router.fields import Fields
from dovetail.router.wanted import sglang_wanted
from dovetail.types import Sample


@dataclass
class SamplesReply:
    """A session's samples."""

    samples: list[Sample]
    session_metadata: dict[str, Any] = field(default_factory=dict)
    empty_reason: str | None = None
    """Why there are none: `no_records` or `all_truncated`."""


class OpenAIEndpointTracer:
    """One session of the run's server.

    Example:
        >>> tracer = await OpenAIEndpointTracer.create(args)  # doctest: +SKIP
        >>> await my_agent(tracer.base_url, sample.prompt)  # doctest: +SKIP
        >>> samples = (await tracer.collect_samples(sample)).samples  # doctest: +SKIP
    """

    def __init__(self, args: Any, session_id: str) -> None:
        self._sessions, self.session_id = sessions_of(args), session_id
        self.session_server_id = f"{args.session_server_ip}:{args.session_server_port}"
        self.router_url = f"http://{self.session_server_id}"
        self.base_url = f"{self.router_url}/sessions/{session_id}"
        self.session_server_instance_id: str | None = None

    @classmethod
    async def create(
        cls,
        args: Any,
        *,
        evaluation: bool = False,
        sampling_params: Mapping[str, Any] | None = None,
    ) -> OpenAIEndpointTracer:
        """Open a session; without `sampling_params` each request says how it samples.

        Raises:
            ConfigError: this run serves no sessions.
            RequestError: a sampling parameter is wrong, or there are too many sessions.
        """
        given = None if sampling_params is None else Fields(sampling_params, "sampling_params.")
        sampling = None if given is None else sglang_wanted(given).sampling
        session = sessions_of(args).store.open(sampling, evaluation=evaluation)
        return cls(args, session.session_id)

    async def collect_samples(
        self,
        input_sample: Sample,
        *,
        max_seq_len: int | None = None,
        agent_metadata: Mapping[str, Any] | None = None,
    ) -> SamplesReply:
        """End the session; the samples of what it recorded, the first of them `input_sample`."""
        session = self._sessions.store.end(self.session_id)
        if session is None:
            return SamplesReply([], empty_reason="no_records")
        input_sample.session_id = self.session_id
        samples = self._sessions.collect(
            session, input_sample, max_seq_len=max_seq_len, agent=agent_metadata
        )
        reason = None if samples else "all_truncated" if session.turns else "no_records"
        return SamplesReply(samples, {}, reason)
