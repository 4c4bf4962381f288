"""Hugging Face directories in and out: local, safetensors only, nothing asked of the network.

A model is loaded whole or not at all: a tensor that the weights lack or that has another shape is
an error, never a random start. An export appears under its name in one step, as a checkpoint does.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dovetail.checkpoint.files import (
    free_bytes,
    put_in_place,
    readable_bytes,
    remove_tree,
    writing_failed,
)
from dovetail.checkpoint.weight_files import first_line, weight_files
from dovetail.config.leaves import cure
from dovetail.observe.atomic import fsync_directory
from dovetail.types.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")

EXPORT_MARK = "dovetail_export.json"
"""Marks a directory that `save_hf` wrote and may replace."""
_FLAG = "--hf-checkpoint (TOML: model.hf_checkpoint)"
_REF_CURE = f"Give a directory in Hugging Face form to {_FLAG}"
_PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
    "chat_template.jinja",
)
_UNFINISHED, _REPLACED = ".unfinished-", ".replaced-"


def load_model(
    path: Path | str,
    dtype: torch.dtype | str,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The language model in directory `path`, in eval mode, as `dtype` on `device`: with its vision
    tower where it has one.

    Raises:
        ConfigError: `path` is no directory, or has no usable config.
        CheckpointError: the weights are missing, damaged, incomplete or of other shapes.
    """
    import torch

    directory = model_directory(path)
    weight_files(directory, _REF_CURE)
    kind = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise ConfigError(f"unknown type of weights {dtype!r}; use --dtype bfloat16 or float32")

    def read() -> tuple[PreTrainedModel, dict[str, Any]]:
        return _auto_class(directory, trust_remote_code).from_pretrained(
            str(directory),
            dtype=kind,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            # Reported below as an error; without this, transformers raises one without names.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )

    model, found = read_in_silence(read, f"model in {directory}")
    _check_complete(directory, found)
    return model.to(device).eval()


def load_skeleton(
    path: Path | str,
    dtype: torch.dtype | str,
    trust_remote_code: bool = False,
    needs_weights: bool = True,
    with_buffers: bool = False,
) -> PreTrainedModel:
    """As `load_model`, without the numbers: names, shapes and types of the weights, on no device.
    `with_buffers`: what a model computes when it is made, and no file has, is on the CPU.

    Raises:
        ConfigError: `path` is no directory, or has no usable config.
        CheckpointError: weight files are missing or damaged; not without `needs_weights`.
    """
    import torch
    from transformers import AutoConfig, GenerationConfig

    from dovetail.checkpoint.on_meta import weights_on_meta

    directory = model_directory(path)
    if needs_weights:
        weight_files(directory, _REF_CURE)

    def make() -> PreTrainedModel:
        config = AutoConfig.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=trust_remote_code
        )
        with weights_on_meta() if with_buffers else torch.device("meta"):
            made: PreTrainedModel = _auto_class(directory, trust_remote_code).from_config(
                config, dtype=dtype, trust_remote_code=trust_remote_code
            )
        if (directory / "generation_config.json").is_file():
            made.generation_config = GenerationConfig.from_pretrained(str(directory))
        return made

    return read_in_silence(make, f"model in {directory}")


def _auto_class(directory: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(
        str(directory), local_files_only=True, trust_remote_code=trust_remote_code
    )
    return AutoModelForImageTextToText if takes_images(config) else AutoModelForCausalLM


def takes_images(config: Any) -> bool:
    """Whether a model of this configuration reads images beside text."""
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    own = getattr(config, "auto_map", None) or {}
    known = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return "AutoModelForImageTextToText" in own or (
        known and getattr(config, "vision_config", None) is not None
    )


def load_tokenizer(path: Path | str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer in directory `path`.

    Raises:
        ConfigError: `path` is no directory, or has no tokenizer files.
        CheckpointError: the tokenizer files are damaged.
    """
    from transformers import AutoTokenizer

    directory = model_directory(path)
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
    if not any((directory / name).is_file() for name in names):
        raise ConfigError(
            f"no tokenizer in {directory}: expected one of {', '.join(names)}. "
            f"Save one there with tokenizer.save_pretrained, or change {_FLAG}"
        )

    def read() -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=trust_remote_code
        )

    return read_in_silence(read, f"tokenizer in {directory}")


def context_len(path: Path | str, trust_remote_code: bool = False) -> int | None:
    """Most tokens that the model in directory `path` can look at; None where it names no limit.

    Raises:
        ConfigError: `path` is no directory, or has no usable config.
        CheckpointError: its config is damaged.
    """
    from transformers import AutoConfig

    directory = model_directory(path)

    def read() -> Any:
        return AutoConfig.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=trust_remote_code
        )

    config = read_in_silence(read, f"config of the model in {directory}").get_text_config()
    return getattr(config, "max_position_embeddings", None)


def eos_token_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Ids that end a response, sorted.

    Those of the generation config (of the model config if it has none), and the tokenizer's.
    """
    ids: set[int] = set()
    for config in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        value = getattr(config, "eos_token_id", None)
        if value is not None:
            ids.update([value] if isinstance(value, int) else value)
            break
    own = getattr(tokenizer, "eos_token_id", None)
    if own is not None:
        ids.add(own)
    return tuple(sorted(ids))


def check_export_path(path: Path | str, leaf: str = "save_hf") -> None:
    """Refuse, before a run, a place that `save_hf` would refuse at its end; `leaf` named it.

    Raises:
        ConfigError: there is something that is not an export of ours.
    """
    path = Path(path)
    if not path.exists() or (path / EXPORT_MARK).is_file():
        return
    if not path.is_dir() or any(path.iterdir()):
        raise ConfigError(
            f"{path} exists and is not an export of an earlier run; it is not overwritten. "
            f"Choose another {cure(leaf)}"
        )


def save_hf(
    model: PreTrainedModel,
    tokenizer: Any,
    path: Path | str,
    beside: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
    leaf: str = "save_hf",
) -> Path:
    """Write model and tokenizer as a Hugging Face directory that appears whole under `path`; the
    files of the model's image processor come from where the model was loaded.

    An earlier export under the same name is replaced. `beside`: further safetensors files by name.
    `leaf`: the setting that named the place.

    Raises:
        ConfigError: something else is there.
        CheckpointError: it can't be written; an earlier export is as it was.
    """
    from safetensors.torch import save_file

    def write(aside: Path) -> None:
        model.save_pretrained(aside)
        for name, tensors in (beside or {}).items():
            save_file(dict(tensors), aside / name)

    return put_export(model, tokenizer, path, write, leaf)


def put_export(
    model: PreTrainedModel,
    tokenizer: Any,
    path: Path | str,
    write: Callable[[Path], None],
    leaf: str = "save_hf",
) -> Path:
    """As `save_hf`, whose weights and configuration `write` puts into the directory it is given."""
    path = Path(path).absolute()
    check_export_path(path, leaf)
    needed = sum(p.numel() * p.element_size() for p in model.parameters()) + (1 << 20)
    aside = path.with_name(f"{_UNFINISHED}{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_tree(aside)
        with _quiet():
            write(aside)
            if tokenizer is not None:
                tokenizer.save_pretrained(aside)
        if model.name_or_path:
            _copy_processor(Path(model.name_or_path), aside)
        mark = {"format": "dovetail-export", "parameters": model.num_parameters()}
        (aside / EXPORT_MARK).write_text(json.dumps(mark) + "\n")
        _fsync_tree(aside)
        put_in_place(aside, path, path.with_name(f"{_REPLACED}{path.name}"))
    except BaseException as error:
        remove_tree(aside)
        failure = _as_os_error(error, path, needed)
        if failure is None:
            raise
        remedy = f"Free space or choose another {cure(leaf)}."
        raise writing_failed("the exported model", path, failure, needed, remedy) from error
    return path


def _copy_processor(origin: Path, target: Path) -> None:
    for name in _PROCESSOR_FILES:
        if (origin / name).is_file() and not (target / name).exists():
            shutil.copyfile(origin / name, target / name)


def model_directory(path: Path | str) -> Path:
    """`path`, if a model's configuration is there.

    Raises:
        ConfigError: it is no directory, or has no config.json.
        CheckpointError: that file is damaged.
    """
    directory = Path(path)
    if not directory.exists():
        raise ConfigError(
            f"no model at {path}: a local directory is expected, names on a hub are not looked up. "
            f"{_REF_CURE}"
        )
    if not directory.is_dir():
        raise ConfigError(f"{path} is a file; a model directory is expected. {_REF_CURE}")
    config = directory / "config.json"
    try:
        content = json.loads(config.read_bytes())
    except FileNotFoundError as error:
        raise ConfigError(f"no config.json in {directory}. {_REF_CURE}") from error
    except OSError as error:
        raise CheckpointError(f"{config} can't be read: {error.strerror}. {_REF_CURE}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{config} is not JSON: {error}. {_REF_CURE}") from error
    if not isinstance(content, dict) or not isinstance(content.get("model_type"), str):
        raise CheckpointError(f"{config} names no model_type. {_REF_CURE}")
    return directory


def read_in_silence(read: Callable[[], T], what: str) -> T:
    """Call `read` in silence; what a library raises becomes an error that says what to do."""
    try:
        with _quiet():
            return read()
    except OSError as error:
        raise CheckpointError(
            f"the {what} can't be read: {first_line(error)}. {_REF_CURE}"
        ) from error
    # transformers, tokenizers and safetensors raise bare Exception subclasses on damaged files.
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise ConfigError(
                f"the {what} comes with Python code of its own, which is not run by default; "
                "if you trust it, pass --trust-remote-code (TOML: model.trust_remote_code = true)"
            ) from error
        raise CheckpointError(
            f"the {what} can't be loaded: {type(error).__name__}: {first_line(error)}. {_REF_CURE}"
        ) from error


def _check_complete(directory: Path, found: dict[str, Any]) -> None:
    wrong = {
        "are missing": sorted(found.get("missing_keys", ())),
        "have another shape": sorted(str(key) for key in found.get("mismatched_keys", ())),
    }
    for how, names in wrong.items():
        if names:
            raise CheckpointError(
                f"the weights in {directory} do not fit its config.json: {len(names)} tensors "
                f"{how}, e.g. {', '.join(names[:3])}; they would start at random. {_REF_CURE}"
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the progress bars and notes of transformers off the terminal, and restore them after."""
    from transformers.utils import logging as hf_logging

    verbosity = hf_logging.get_verbosity()
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(hf_logging.CRITICAL)
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()


def _fsync_tree(directory: Path) -> None:
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
    fsync_directory(directory)


def _as_os_error(error: BaseException, path: Path, needed: int) -> OSError | None:
    """The operating system's error behind `error`; safetensors wraps it as text of its own kind."""
    if isinstance(error, OSError):
        return error
    if type(error).__name__ != "SafetensorError":
        return None
    free = free_bytes(path)
    note = "" if free >= needed else f" with {readable_bytes(free)} free"
    return OSError(0, f"{first_line(error)}{note}")
