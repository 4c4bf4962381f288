"""A coding-agent style plugin trains in a real run: adapter, session, several turns, samples."""

from __future__ import annotations

import json
from pathlib import Path

from dovetail.cli.main import main
from tests.loop.good_run import Place, make_shared
from tests.loop.tiny import read_metrics

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}: {{ m.content }}<eos>{% endfor %}a: "
PLUGIN = """
import aiohttp

from slime.agent.adapters import OpenAIAdapter
from slime.agent.aiohttp_threaded import FilteredAccessLogger, run_app_in_thread
from slime.utils.mask_utils import MultiTurnLossMaskGenerator
from slime.utils.misc import SingletonMeta
from slime.utils.processing_utils import load_tokenizer
from slime.utils.trace_utils import trace_span
from slime.rollout.rm_hub import batched_async_rm
from slime.utils.types import Sample


class Service(metaclass=SingletonMeta):
    def __init__(self, args):
        self.tokenizer = load_tokenizer(args.hf_checkpoint, trust_remote_code=True)
        self.tokenizer.chat_template = args.agent_template
        self.adapter = OpenAIAdapter(
            tokenizer=self.tokenizer,
            sglang_url=f"http://{args.sglang_router_ip}:{args.sglang_router_port}",
            fork_threshold_tokens=None,
        )
        self.handle = run_app_in_thread(
            self.adapter.app,
            host="127.0.0.1",
            port=0,
            thread_name="adapter",
            runner_kwargs={"handler_cancellation": True, "access_log_class": FilteredAccessLogger},
        )
        self.url = f"http://127.0.0.1:{self.handle.port}/v1/chat/completions"


async def generate(args, sample, sampling_params):
    service = Service(args)
    sid = f"agent-{sample.index}-{sample.group_index}"
    service.adapter.open_session(sid, sampling_defaults=sampling_params, max_context_tokens=120)
    messages = [{"role": "user", "content": sample.prompt}]
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {sid}"}) as client:
        for turn in range(2):
            with trace_span(sample, "turn", attrs={"turn": turn}):
                async with client.post(service.url, json={"messages": messages}) as answer:
                    assert answer.status == 200, await answer.text()
                    said = (await answer.json())["choices"][0]["message"]
            messages += [said, {"role": "user", "content": "again"}]
    samples = await service.adapter.finish_session(sid, base_sample=sample)
    for one, reward in zip(samples, await batched_async_rm(args, samples)):
        one.reward = reward
    return samples


async def reward(args, sample, **kwargs):
    return float(sum(map(str.isdigit, sample.response)))
"""


def test_an_agent_behind_chat_completions_trains(tmp_path: Path) -> None:
    place = Place(make_shared(tmp_path), tmp_path)
    plugin = place.write("agent_plugin.py", PLUGIN)
    argv = place.train(
        custom_generate_function_path=f"{plugin}:generate",
        custom_rm_path=f"{plugin}:reward",
        plugin_args=json.dumps({"agent_template": TEMPLATE}),
        num_rollout=2,
        rollout_max_response_len=8,
        lr=1e-3,
        trace=True,
    )
    assert main(argv) == 0
    rows = read_metrics(place.run_dir)
    assert len(rows) == 2 and all(row["train/grad_norm"] > 0 for row in rows)
    text = (place.run_dir / "samples" / "step_000002.jsonl").read_text(encoding="utf-8")
    samples = [json.loads(line) for line in text.splitlines()]
    for sample in samples:
        # Two turns; between them stand "u: again", <eos> and "a: ", and before those the <eos> of a
        # response that ended by its length. No token of them is trained, and every other one is.
        assert sample["loss_mask"].count(0) in (12, 13)
        assert sample["loss_mask"][0] == sample["loss_mask"][-1] == 1
        assert sample["weight_versions"] == ["1", "1"]
    assert len(samples) == 4
    document = json.loads((place.run_dir / "trace" / "step_000002.json").read_bytes())
    turns = [event for event in document["traceEvents"] if event["name"] == "turn"]
    assert len(turns) >= 8 and {event["args"]["turn"] for event in turns} == {0, 1}
