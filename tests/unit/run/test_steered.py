"""An embedded engine steered over HTTP, in SGLang's words: weights all or none, pauses, memory."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dovetail.checkpoint import hf
from dovetail.engines.embedded.engine import EmbeddedEngine
from dovetail.engines.http import EngineRefusedError, HttpClient
from dovetail.router import worker_control
from dovetail.router.bridge import Bridge
from dovetail.router.server import RouterServer
from dovetail.run.steered import SteeredEngine
from dovetail.types.errors import EngineBusyError
from tests.loop.tiny import make_model

CONTEXT = 256
GREEDY = {
    "input_ids": [5, 9, 14],
    "sampling_params": {"max_new_tokens": 12, "temperature": 0.0, "ignore_eos": True},
    "return_logprob": True,
}
LONG = {**GREEDY, "sampling_params": {"max_new_tokens": 240, "ignore_eos": True}}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    place = tmp_path_factory.mktemp("models")
    wild = {"initializer_range": 0.3}
    return make_model(place / "old", **wild), make_model(place / "new", seed=1, **wild)


@dataclass
class Served:
    client: HttpClient
    engine: EmbeddedEngine
    model: Any

    async def ids(self) -> list[int]:
        answer = await self.client.post("/generate", GREEDY)
        return list(answer["output_ids"])

    async def first_token(self) -> None:
        while not self.engine.stats.generated_tokens:
            await asyncio.sleep(0)

    async def load(self, path: Path | str, **more: Any) -> Any:
        body = {"model_path": str(path), **more}
        return await self.client.post("/update_weights_from_disk", body)


@asynccontextmanager
async def served(directory: Path) -> AsyncIterator[Served]:
    model, tokenizer = hf.load_model(directory, "float32"), hf.load_tokenizer(directory)
    engine = EmbeddedEngine(
        model, tokenizer, max_running=8, kv_tokens=2048, max_context_len=CONTEXT
    )
    bridge = Bridge(lambda: engine, lambda: tokenizer, model="m", limits=lambda: (CONTEXT, 78))
    steered = SteeredEngine(lambda: engine, lambda: model)
    server = RouterServer(bridge, routes=worker_control.routes(steered))
    await server.serve_here()
    client = HttpClient(server.url, timeout_s=30)
    try:
        yield Served(client, engine, model)
    finally:
        await client.close()
        await server.aclose()
        await engine.close()


def test_new_weights_are_those_of_the_directory_and_counted(models: tuple[Path, Path]) -> None:
    old, new = models

    async def work() -> None:
        async with served(old) as one, served(new) as other:
            assert await one.ids() != await other.ids()
            answer = await one.load(new, weight_version="7")
            assert answer == {
                "success": True,
                "message": "Succeeded to update model weights. Weight version updated to 7.",
                "num_paused_requests": 0,
            }
            assert await one.ids() == await other.ids()
            assert (await one.client.get("/model_info"))["weight_version"] == "7"
            await one.load(old)
            assert one.engine.weight_version == 8

    asyncio.run(work())


def test_the_description_tells_of_what_is_there_not_why_a_run_refuses_it(
    models: tuple[Path, Path],
) -> None:
    async def work() -> None:
        async with served(models[0]) as one:
            paths = (await one.client.get("/openapi.json"))["paths"]
        assert list(paths["/update_weights_from_disk"]) == ["post"]
        assert paths["/collective_rpc"]["get"]["summary"].startswith("Not to be had")

    asyncio.run(work())


def truncated(new: Path, place: Path) -> None:
    file = place / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def garbage(new: Path, place: Path) -> None:
    (place / "model.safetensors").write_bytes(b"\xff" * 1000)


def without_one(new: Path, place: Path) -> None:
    tensors = load_file(new / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, place / "model.safetensors", {"format": "pt"})


def one_too_many(new: Path, place: Path) -> None:
    tensors = load_file(new / "model.safetensors")
    save_file({**tensors, "extra": torch.zeros(3)}, place / "model.safetensors", {"format": "pt"})


def other_shape(new: Path, place: Path) -> None:
    tensors = load_file(new / "model.safetensors")
    tensors["model.norm.weight"] = torch.zeros(7)
    save_file(tensors, place / "model.safetensors", {"format": "pt"})


def last_of_several_missing(new: Path, place: Path) -> None:
    tensors = load_file(new / "model.safetensors")
    (place / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    index = {name: file for file, every in parts.items() for name in every}
    save_file({n: tensors[n] for n in parts["a.safetensors"]}, place / "a.safetensors")
    (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def nothing(new: Path, place: Path) -> None:
    (place / "model.safetensors").unlink()


def pickles(new: Path, place: Path) -> None:
    (place / "model.safetensors").rename(place / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (truncated, "damaged"),
        (garbage, "damaged"),
        (without_one, r"1 are missing, e\.g\. model\.norm\.weight"),
        (one_too_many, r"1 are none of this model's, e\.g\. extra"),
        (other_shape, "another shape"),
        (last_of_several_missing, r"lacks the weight file b\.safetensors"),
        (nothing, "no weights in"),
        (pickles, "pickle"),
    ],
)
def test_weights_that_are_not_whole_leave_the_old_ones(
    models: tuple[Path, Path], tmp_path: Path, spoil: Any, says: str
) -> None:
    old, new = models
    place = tmp_path / "spoilt"
    shutil.copytree(new, place)
    spoil(new, place)

    async def work() -> None:
        async with served(old) as one:
            before = await one.ids()
            with pytest.raises(EngineRefusedError, match=says) as found:
                await one.load(place, weight_version="3")
            assert found.value.status == 400
            assert "keeps the weights that it has" in str(found.value)
            assert await one.ids() == before and one.engine.weight_version == 0

    asyncio.run(work())


def test_weights_in_several_files_are_read(models: tuple[Path, Path], tmp_path: Path) -> None:
    old, new = models
    tensors = load_file(new / "model.safetensors")
    names = sorted(tensors)
    files = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, every in files.items():
        save_file({name: tensors[name] for name in every}, tmp_path / file)
    index = {name: file for file, every in files.items() for name in every}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))

    async def work() -> None:
        async with served(old) as one, served(new) as other:
            await one.load(tmp_path, weight_version=2)
            assert await one.ids() == await other.ids()

    asyncio.run(work())


def test_a_model_whose_files_have_other_names_takes_them(tmp_path: Path) -> None:
    moe = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
    moe |= {"initializer_range": 0.3}
    old = make_model(tmp_path / "old", "qwen3_moe", **moe)
    new = make_model(tmp_path / "new", "qwen3_moe", seed=1, **moe)

    async def work() -> None:
        async with served(old) as one, served(new) as other:
            assert await one.ids() != await other.ids()
            await one.load(new)
            assert await one.ids() == await other.ids()

    asyncio.run(work())


@pytest.mark.parametrize("mode", ["retract", "in_place", "abort"])
def test_a_pause_holds_or_ends_what_is_under_way(models: tuple[Path, Path], mode: str) -> None:
    async def work() -> None:
        async with served(models[0]) as one:
            task = asyncio.ensure_future(one.client.post("/generate", LONG))
            await one.first_token()
            await one.client.post("/pause_generation", {"mode": mode})
            await asyncio.sleep(0.2)
            assert task.done() == (mode == "abort")
            # Paused, it is well, and takes weights.
            await one.client.tell("/health_generate", method="GET")
            await one.load(models[1], weight_version="4")
            assert task.done() == (mode == "abort")
            await one.client.post("/continue_generation", {})
            meta = (await task)["meta_info"]
            if mode == "abort":
                assert meta["finish_reason"]["type"] == "abort"
                assert meta["completion_tokens"] < 240
            else:
                versions = meta["weight_versions"]
                assert [one["version"] for one in versions] == ["0", "4"]
                assert versions[-1]["end"] == meta["completion_tokens"] == 240

    asyncio.run(work())


def test_abort_with_an_update_ends_requests_and_goes_on(models: tuple[Path, Path]) -> None:
    async def work() -> None:
        async with served(models[0]) as one:
            task = asyncio.ensure_future(one.client.post("/generate", LONG))
            await one.first_token()
            await one.load(models[1], abort_all_requests=True)
            assert (await task)["meta_info"]["finish_reason"]["type"] == "abort"
            assert len(await one.ids()) == 12
            await one.load(models[1], keep_pause=True)
            held = asyncio.ensure_future(one.ids())
            await asyncio.sleep(0.1)
            assert not held.done()
            await one.client.post("/continue_generation", {})
            await held

    asyncio.run(work())


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/update_weight_version", {"new_version": "4"}),
        ("/update_weights_from_disk", {"abort_all_requests": True, "model_path": "old"}),
    ],
)
def test_what_aborts_in_a_pause_does_not_end_the_pause(
    models: tuple[Path, Path], path: str, body: dict[str, Any]
) -> None:
    async def work() -> None:
        async with served(models[0]) as one:
            await one.client.post("/pause_generation", {"mode": "in_place"})
            before = asyncio.ensure_future(one.client.post("/generate", LONG))
            while not one.engine.num_open:
                await asyncio.sleep(0)
            where = {"model_path": str(models[0])} if "model_path" in body else {}
            await one.client.post(path, {**body, **where})
            assert (await before)["meta_info"]["finish_reason"]["type"] == "abort"
            held = asyncio.ensure_future(one.ids())
            assert not (await asyncio.wait([held], timeout=1.0))[0]
            await one.client.post("/continue_generation", {})
            assert len(await held) == 12

    asyncio.run(work())


def test_memory_is_given_back_and_taken_again(models: tuple[Path, Path]) -> None:
    async def work() -> None:
        async with served(models[0]) as one:
            task = asyncio.ensure_future(one.client.post("/generate", LONG))
            await one.first_token()
            await one.client.post("/release_memory_occupation", {"tags": ["kv_cache"]})
            await one.client.post("/release_memory_occupation", {})
            assert not one.engine._core.cache._keys
            await one.client.post("/continue_generation", {})
            await asyncio.sleep(0.05)
            assert not task.done()
            await one.client.tell("/health_generate", method="GET")
            await one.client.post("/resume_memory_occupation", {})
            assert (await task)["meta_info"]["completion_tokens"] == 240
            assert len(await one.ids()) == 12

    asyncio.run(work())


def test_a_look_at_whether_it_works_draws_nothing(models: tuple[Path, Path]) -> None:
    unseeded = {**GREEDY, "sampling_params": {"max_new_tokens": 12, "ignore_eos": True}}

    async def ids(looks: int) -> list[int]:
        async with served(models[0]) as one:
            for _ in range(looks):
                await one.client.tell("/health_generate", method="GET")
            return list((await one.client.post("/generate", unseeded))["output_ids"])

    assert asyncio.run(ids(0)) == asyncio.run(ids(3))


def test_an_engine_that_does_not_work_says_so(models: tuple[Path, Path]) -> None:
    async def work() -> None:
        async with served(models[0]) as one:
            with torch.no_grad():
                next(one.model.parameters()).fill_(float("nan"))
            with pytest.raises(EngineBusyError, match=r"the engine does not work: .*not finite"):
                await one.client.tell("/health_generate", method="GET")

    asyncio.run(work())


def test_weights_are_checked(models: tuple[Path, Path]) -> None:
    async def work() -> None:
        async with served(models[0]) as one:
            check = one.client.post
            sums = (await check("/weights_checker", {}))["ranks"][0]["checksums"]
            assert sums.keys() == dict(one.model.named_parameters()).keys()
            with pytest.raises(EngineRefusedError, match="no snapshot"):
                await check("/weights_checker", {"action": "compare"})
            await check("/weights_checker", {"action": "snapshot"})
            assert (await check("/weights_checker", {"action": "compare"}))["success"]
            await check("/weights_checker", {"action": "reset_tensors"})
            with pytest.raises(EngineRefusedError, match="differ from the snapshot"):
                await check("/weights_checker", {"action": "compare"})
            await one.load(models[0])
            assert (await check("/weights_checker", {"action": "compare"}))["success"]
            assert (await check("/weights_checker"))["ranks"][0]["checksums"] == sums

    asyncio.run(work())


def test_a_version_may_be_set_alone(models: tuple[Path, Path]) -> None:
    async def work() -> None:
        async with served(models[0]) as one:
            answer = await one.client.post("/update_weight_version", {"new_version": "12"})
            assert (answer["success"], answer["new_version"]) == (True, "12")
            assert one.engine.weight_version == 12

    asyncio.run(work())


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/update_weights_from_disk", {}, "model_path"),
        ("/update_weights_from_disk", {"model_path": "relative/dir"}, "model_path"),
        ("/update_weights_from_disk", {"model_path": 3}, "model_path"),
        ("/update_weights_from_disk", {"model_path": "/x", "weight_version": "-1"}, "weight_v"),
        ("/update_weights_from_disk", {"model_path": "/x", "weight_version": "v2"}, "weight_v"),
        ("/update_weights_from_disk", {"model_path": "/x\0"}, "model_path"),
        ("/update_weights_from_disk", {"model_path": "/x", "weight_version": 2**63}, "weight_v"),
        ("/update_weights_from_disk", {"model_path": "/x", "load_format": "dummy"}, "load_form"),
        ("/update_weights_from_disk", {"model_path": "/x", "modl": 1}, "modl"),
        ("/update_weights_from_disk", {"model_path": "/x", "keep_pause": "no"}, "keep_pause"),
        ("/update_weight_version", {}, "new_version"),
        ("/pause_generation", {"mode": "keep"}, "mode"),
        ("/continue_generation", {"x": 1}, "x"),
        ("/release_memory_occupation", {"tags": ["cpu"]}, "tags"),
        ("/weights_checker", {"action": "burn"}, "action"),
    ],
)
def test_a_wrong_field_is_named(
    models: tuple[Path, Path], path: str, body: dict[str, Any], field: str
) -> None:
    async def work() -> None:
        async with served(models[0]) as one:
            with pytest.raises(EngineRefusedError, match=rf"400: {field}"):
                await one.client.post(path, body)

    asyncio.run(work())


def test_a_directory_that_is_not_there_is_said(models: tuple[Path, Path]) -> None:
    async def work() -> None:
        async with served(models[0]) as one:
            with pytest.raises(EngineRefusedError, match="no weights in /nowhere"):
                await one.load("/nowhere")
            with pytest.raises(EngineRefusedError, match=r"400: .*can't be read: File name too"):
                await one.load("/" + "x" * 300)

    asyncio.run(work())
