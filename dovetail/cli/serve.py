"""`dovetail serve`."""

from __future__ import annotations

import sys

from dovetail.cli.named_model import with_model
from dovetail.cli.settings import asks_for_help, read_settings, settings_help
from dovetail.config.check import check_serving
from dovetail.config.notes import SERVING_READS, serving_notes
from dovetail.config.resolve import Resolved
from dovetail.run.heap import unswept_heap
from dovetail.run.validate import validate_launch, validate_names

_DOC = """\
Serve a model over HTTP, without training, until Ctrl-C or SIGTERM: in the forms of SGLang
(/generate), OpenAI and vLLM (/v1/completions, /v1/chat/completions).

  dovetail serve MODEL_DIR --router-port 30000
  dovetail serve RUN_DIR                   the newest checkpoint of a run
  dovetail serve --hf-checkpoint DIR [--load CHECKPOINT]
  dovetail serve MODEL_DIR --rollout-engine vllm --rollout-num-engines 2

It reads [model], [engine], [router], [session], [runtime], the functions that a server calls,
--load, --rollout-max-context-len and, for the logs of engines, --run-dir."""
_FIRST = "[MODEL_DIR | RUN_DIR | CHECKPOINT] "


def serve(argv: list[str]) -> int:
    """Resolve and check first, load torch afterwards."""
    if asks_for_help(argv):
        sys.stdout.write(settings_help("serve", _DOC, _FIRST, SERVING_READS))
        return 0
    resolved = read_settings(with_model(argv, "serve"))
    check_serving(resolved.config)
    validate_names(resolved.config)
    launch_notes = validate_launch(resolved.config, resolved.passthrough)
    for note in [*resolved.notes, *serving_notes(resolved), *launch_notes]:
        sys.stderr.write(f"note: {note}\n")
    with unswept_heap():
        from dovetail.run.serve import run_serve

    run_serve(resolved, lambda url: tell(resolved, url), _say)
    return 0


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def tell(resolved: Resolved, url: str) -> None:
    """Where it listens, and what to type."""
    config = resolved.config
    variable = config.router.router_token_env
    header = "" if variable is None else f' -H "Authorization: Bearer ${variable}"'
    key = "any" if variable is None else f"${variable}"
    sys.stdout.write(
        f"serving {config.model.hf_checkpoint} at {url}\n"
        f"  curl {url}/generate{header} -H 'Content-Type: application/json' \\\n"
        """    -d '{"text": "Hello", "sampling_params": {"max_new_tokens": 16}}'\n"""
        f"  OpenAI clients: base_url {url}/v1, api_key {key}\n"
        f"  every route: {url}/openapi.json\n"
    )
    sys.stdout.flush()
