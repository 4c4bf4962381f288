"""Hooks of agents and of the sessions that they speak to."""

from __future__ import annotations

from dovetail.hooks.rows.families import MILES
from dovetail.hooks.spec import CallForm, HookSpec, OnError

_OWNER = "session server"
_MATCH = "dovetail.router.sessions.message_match"
_SAMPLES = "dovetail.router.sessions.samples"

SESSION: tuple[HookSpec, ...] = (
    HookSpec(
        slot="custom_agent_function",
        stage="rollout",
        process="rollout",
        owner=_OWNER,
        forms=(
            CallForm(
                families=MILES,
                named=("base_url", "prompt", "request_kwargs", "metadata"),
            ),
        ),
        default="none",
        returns="a dict that is merged into sample.metadata, or None",
        when="for every sample, with `--custom-generate-function-path agent`",
        on_error=OnError.KEEP,
        doc=(
            "Runs an agent that speaks the OpenAI form to base_url; the tokens of its turns are "
            "recorded there. `request_kwargs` are keywords for `client.chat.completions.create`. A "
            "plain function runs in a thread of its own. A function `abort(args)` beside it is "
            "called when a step ends before all of its agents. In a rehearsal "
            '`metadata["rehearsal"]` is true.'
        ),
        example=(
            "from openai import AsyncOpenAI\n\n\n"
            "async def agent(base_url, prompt, request_kwargs, metadata):\n"
            '    client = AsyncOpenAI(base_url=base_url, api_key="any", timeout=None)\n'
            '    asked = [{"role": "user", "content": str(prompt)}]\n'
            "    completion = await client.chat.completions.create(\n"
            '        model="policy", messages=asked, **request_kwargs\n'
            "    )\n"
            '    return {"answer": completion.choices[0].message.content}\n'
        ),
        example_name="agent",
        time_limit="agent_timeout_s",
    ),
    HookSpec(
        slot="session_message_matcher",
        leaf_name="session_message_matcher",
        stage="router",
        process="rollout",
        owner=_OWNER,
        forms=(CallForm(families=MILES, positional=("recorded", "sent")),),
        default="loose_tool_call",
        returns="true or false",
        when="for messages of an agent's request, as far as its session knows them",
        doc=(
            "Whether a message that an agent sent back is the recorded one, so that its tokens are "
            "those that were sampled. `strict` compares role, content, thoughts and calls; "
            "`loose_tool_call` takes other JSON for the same arguments of a call as equal; "
            "`role_content_only` leaves calls and thoughts out, so that other histories may pass."
        ),
        example=(
            "def same(recorded, sent):\n"
            '    return recorded["role"] == sent["role"] and recorded["content"] == '
            'sent["content"]\n'
        ),
        example_name="same",
        registered={
            name: f"{_MATCH}:{name}" for name in ("strict", "loose_tool_call", "role_content_only")
        },
        runs_async=False,
        time_limit=None,
    ),
    HookSpec(
        slot="session_sample_picker",
        stage="rollout",
        process="rollout",
        owner=_OWNER,
        forms=(CallForm(families=MILES, positional=("samples", "metadata")),),
        default="drop_retries",
        returns="those of the samples that are kept",
        when="when a session's samples are collected",
        doc=(
            "`samples` are the leaves of the session's tree of turns, `metadata` has the tree. "
            "`drop_retries` leaves out an answer whose very prompt was asked again later, "
            "`keep_all` nothing."
        ),
        example="def last(samples, metadata):\n    return samples[-1:]\n",
        example_name="last",
        registered={name: f"{_SAMPLES}:{name}" for name in ("drop_retries", "keep_all")},
        runs_async=False,
    ),
    HookSpec(
        slot="session_sample_postprocessor",
        stage="rollout",
        process="rollout",
        owner=_OWNER,
        forms=(CallForm(families=MILES, positional=("samples", "metadata")),),
        default="the samples stay as they are",
        returns="a list of Samples",
        when="after the session's samples were picked",
        doc="May change, split or join samples; `metadata` has what the agent gave back.",
        example=(
            "def note(samples, metadata):\n"
            "    for sample in samples:\n"
            '        sample.metadata["session"] = metadata.get("agent")\n'
            "    return samples\n"
        ),
        example_name="note",
        runs_async=False,
    ),
)
