"""`dovetail serve`."""

from __future__ import annotations

import sys

from dovetail.cli.settings import asks_for_help, read_settings, settings_help
from dovetail.config.check import check_serving
from dovetail.config.notes import serving_notes
from dovetail.config.resolve import Resolved
from dovetail.run.heap import unswept_heap
from dovetail.run.validate import validate_names

_DOC = """\
Serve a model over HTTP, without training, until Ctrl-C or SIGTERM: in the forms of SGLang
(/generate), OpenAI and vLLM (/v1/completions, /v1/chat/completions).

  dovetail serve --hf-checkpoint DIR --router-port 30000
  dovetail serve --hf-checkpoint DIR --load RUN_DIR        with the weights of a run's checkpoint
  dovetail serve --hf-checkpoint DIR --rollout-engine vllm --rollout-num-engines 2

It reads [model], [engine], [router], [session], [runtime], the functions that a server calls,
--load, --rollout-max-context-len and, for the logs of engines, --run-dir."""


def serve(argv: list[str]) -> int:
    """Resolve and check first, load torch afterwards."""
    if asks_for_help(argv):
        sys.stdout.write(settings_help("serve", _DOC))
        return 0
    resolved = read_settings(argv)
    check_serving(resolved.config)
    validate_names(resolved.config)
    for note in [*resolved.notes, *serving_notes(resolved.config)]:
        sys.stderr.write(f"note: {note}\n")
    with unswept_heap():
        from dovetail.run.serve import run_serve

    run_serve(resolved, lambda url: _tell(resolved, url), _say)
    return 0


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def _tell(resolved: Resolved, url: str) -> None:
    """Where it listens, and what to type."""
    sys.stdout.write(
        f"serving {resolved.config.model.hf_checkpoint} at {url}\n"
        f"  curl {url}/generate -H 'Content-Type: application/json' \\\n"
        """    -d '{"text": "Hello", "sampling_params": {"max_new_tokens": 16}}'\n"""
        f"  OpenAI clients: base_url {url}/v1\n"
    )
    sys.stdout.flush()
