"""`utils.processing_utils`: tokenizers, processors, and images on their way to an engine."""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from dovetail.types.errors import ConfigError, DataError

log = logging.getLogger(__name__)

__all__ = [
    "build_processor_kwargs",
    "encode_image_for_rollout_engine",
    "load_processor",
    "load_tokenizer",
    "process_vision_info",
]

_MEDIA = ("images_kwargs", "videos_kwargs", "audio_kwargs")
_VIDEO_FILES = (".mp4", ".mkv", ".avi", ".mov", ".webm", ".gif")


def load_tokenizer(name_or_path: str, chat_template_path: str | None = None, **kwargs: Any) -> Any:
    """The tokenizer of a Hugging Face directory or name, with the chat template of a file if one is
    given.

    Raises:
        ConfigError: that file can't be read.
        OSError: there is no such tokenizer.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name_or_path, **kwargs)
    if chat_template_path:
        try:
            tokenizer.chat_template = Path(chat_template_path).read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"the chat template {chat_template_path} can't be read: {error.strerror}"
            ) from error
    return tokenizer


def load_processor(name_or_path: str, **kwargs: Any) -> Any:
    """The processor of a multimodal model; None of a model that takes only text."""
    return _load_processor(str(name_or_path), tuple(sorted(kwargs.items())))


@lru_cache(maxsize=8)
def _load_processor(name_or_path: str, kwargs: tuple[tuple[str, Any], ...]) -> Any:
    from transformers import AutoProcessor, ProcessorMixin

    try:
        processor = AutoProcessor.from_pretrained(name_or_path, **dict(kwargs))
    # What the library raises for a model without a processor differs by model.
    except (OSError, ValueError, KeyError, ImportError, AttributeError) as error:
        log.info("%s has no processor: %s", name_or_path, error)
        return None
    # For a text model the library gives its tokenizer.
    return processor if isinstance(processor, ProcessorMixin) else None


def build_processor_kwargs(multimodal_inputs: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Keywords for a call of a processor: the media, which become tensors; ids stay lists."""
    kwargs = dict(multimodal_inputs or {})
    kwargs["text_kwargs"] = {**kwargs.get("text_kwargs", {}), "return_tensors": None}
    for kind in _MEDIA:
        kwargs[kind] = {**kwargs.get(kind, {}), "return_tensors": "pt"}
    return kwargs


def encode_image_for_rollout_engine(image: Any) -> str:
    """An image as an engine takes it in `image_data`: a data URL of PNG; addresses stay as they
    are.

    Raises:
        DataError: it is no PIL image, bytes or text.
    """
    if isinstance(image, str):
        file = Path(image.removeprefix("file://"))
        if image.startswith(("data:", "http://", "https://")) or not file.is_file():
            return image
        image = file.read_bytes()
    if isinstance(image, bytes | bytearray):
        image = _opened(bytes(image))
    if not hasattr(image, "save"):
        raise DataError(f"an image is a PIL image, bytes, a path or a URL, got {type(image)}")
    if image.mode not in ("RGB", "RGBA", "L"):
        image = image.convert("RGB")
    file_in_memory = io.BytesIO()
    image.save(file_in_memory, format="PNG")
    text = base64.b64encode(file_in_memory.getvalue()).decode("ascii")
    return f"data:image/png;base64,{text}"


def process_vision_info(prompt: Any, processor: Any = None) -> dict[str, Any]:
    """The media of chat messages in the order in which they stand: `{"images", "videos"}`, each a
    list or None.

    An image is a PIL image, a path, a URL or a data URL; a video is a list of such frames.

    Raises:
        DataError: a video is a file (decode it to frames first), or an image can't be read.
    """
    images: list[Any] = []
    videos: list[Any] = []
    for part in _parts(prompt):
        kind = part.get("type")
        if kind in ("image", "image_url") or "image" in part:
            images.append(_image(part.get("image", part.get("image_url"))))
        elif kind == "video" or "video" in part:
            videos.append(_video(part.get("video")))
    return {"images": images or None, "videos": videos or None}


def _parts(prompt: Any) -> Iterator[Mapping[str, Any]]:
    messages = prompt if isinstance(prompt, Sequence) and not isinstance(prompt, str) else []
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, list):
            yield from (part for part in content if isinstance(part, Mapping))


def _image(value: Any) -> Any:
    from transformers.image_utils import load_image

    if isinstance(value, Mapping):
        value = value.get("url")
    if isinstance(value, bytes):
        value = _opened(value)
    if isinstance(value, str):
        value = value.removeprefix("file://")
    try:
        return load_image(value)
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"an image can't be read: {error}") from error


def _video(value: Any) -> list[Any]:
    if isinstance(value, list | tuple):
        return [_image(frame) for frame in value]
    kind = "file" if str(value).lower().endswith(_VIDEO_FILES) else type(value).__name__
    raise DataError(
        f"a video in a prompt is a list of frames (images or paths), got a {kind}: {value!r:.100}; "
        "decode it to frames when the data is made"
    )


def _opened(data: bytes) -> Any:
    return _image("data:image/png;base64," + base64.b64encode(data).decode("ascii"))
