from __future__ import annotations

import base64
import importlib
import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dovetail.types import ConfigError, DataError
from tests.loop.tiny import make_tokenizer

pytestmark = pytest.mark.usefixtures("aliases_on")
RED = (255, 0, 0)


def _module(family: str = "slime") -> Any:
    return importlib.import_module(f"{family}.utils.processing_utils")


def _decoded(url: str) -> Image.Image:
    assert url.startswith("data:image/png;base64,")
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def test_a_tokenizer_takes_the_chat_template_of_a_file(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}!{% endfor %}")
    tokenizer = _module().load_tokenizer(str(tmp_path), chat_template_path=str(template))
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text == "hi!"
    with pytest.raises(ConfigError, match="missing"):
        _module().load_tokenizer(str(tmp_path), chat_template_path=str(tmp_path / "missing"))


def test_a_model_of_text_only_has_no_processor(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    assert _module("vime").load_processor(str(tmp_path), trust_remote_code=True) is None


def test_processor_keywords_give_tensors_of_media_and_lists_of_ids() -> None:
    image = Image.new("RGB", (2, 2), RED)
    kwargs = _module().build_processor_kwargs({"images": [image], "images_kwargs": {"x": 1}})
    assert kwargs["images"] == [image]
    assert kwargs["images_kwargs"] == {"x": 1, "return_tensors": "pt"}
    assert kwargs["text_kwargs"] == {"return_tensors": None}
    assert _module().build_processor_kwargs(None)["videos_kwargs"] == {"return_tensors": "pt"}


def test_an_image_becomes_a_data_url_and_an_address_stays(tmp_path: Path) -> None:
    encode = _module("miles").encode_image_for_rollout_engine
    image = Image.new("RGB", (2, 3), RED)
    file = tmp_path / "red.jpg"
    image.save(file)
    for given in (image, image.convert("P"), str(file), f"file://{file}", file.read_bytes()):
        decoded = _decoded(encode(given))
        assert decoded.size == (2, 3) and decoded.convert("RGB").getpixel((0, 0))[0] > 250
    assert encode("https://example.org/a.png") == "https://example.org/a.png"
    with pytest.raises(DataError, match="PIL image"):
        encode(3)
    with pytest.raises(DataError, match="can't be read"):
        encode(b"no image")


def test_media_are_taken_out_of_messages_in_order(tmp_path: Path) -> None:
    red, blue = Image.new("RGB", (2, 2), RED), Image.new("RGB", (2, 2), (0, 0, 255))
    file = tmp_path / "blue.png"
    blue.save(file)
    messages = [
        {"role": "system", "content": "text"},
        {
            "role": "user",
            "content": [
                {"type": "image", "image": red},
                {"type": "text", "text": "and"},
                {"type": "image_url", "image_url": {"url": str(file)}},
                {"type": "video", "video": [red, str(file)]},
            ],
        },
    ]
    found = _module().process_vision_info(messages, None)
    assert [image.getpixel((0, 0)) for image in found["images"]] == [RED, (0, 0, 255)]
    assert [[frame.size for frame in video] for video in found["videos"]] == [[(2, 2), (2, 2)]]
    assert _module().process_vision_info("text") == {"images": None, "videos": None}
    with pytest.raises(DataError, match="list of frames"):
        _module().process_vision_info(
            [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}]
        )
