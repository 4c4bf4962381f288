"""Hooks of parts that only some runs have: a run without the part refuses them by name."""

from __future__ import annotations

from dovetail.hooks.rows.families import ALL, MILES
from dovetail.hooks.spec import CallForm, HookSpec, Kind

_NOTHING = "nothing"


def _megatron(
    slot: str, positional: tuple[str, ...], process: str = "trainer", **row: str
) -> HookSpec:
    return HookSpec(
        slot=slot,
        stage="trainers",
        process=process,
        owner="megatron",
        forms=(CallForm(families=ALL, positional=positional),),
        default=_NOTHING,
        returns=_NOTHING,
        runs_async=False,
        when=row["when"],
        doc=row["doc"],
        example=row["example"],
        example_name="hook",
    )


MEGATRON: tuple[HookSpec, ...] = (
    _megatron(
        "custom_megatron_init",
        ("args",),
        when="once per trainer process, after Megatron is initialised",
        doc="For settings of libraries in the trainer's processes.",
        example="def hook(args):\n    args.my_trainer_is_ready = True\n",
    ),
    _megatron(
        "custom_megatron_before_log_prob_hook",
        ("args", "model", "store_prefix"),
        when="before each pass that only computes logprobs",
        doc='`store_prefix` says whose: "" the policy\'s, "ref_" the reference\'s.',
        example="def hook(args, model, store_prefix):\n    args.last_prefix = store_prefix\n",
    ),
    _megatron(
        "custom_megatron_before_train_step_hook",
        ("args", "rollout_id", "step_id", "model", "optimizer", "opt_param_scheduler"),
        when="before each optimizer step, gradients being zero",
        doc="For probes of the model and optimizer.",
        example=(
            "def hook(args, rollout_id, step_id, model, optimizer, opt_param_scheduler):\n"
            "    args.last_step = (rollout_id, step_id)\n"
        ),
    ),
    _megatron(
        "custom_megatron_post_save_hook",
        ("args", "rollout_id", "checkpoint_dir", "hf_checkpoint_dir"),
        process="rollout",
        when="when a checkpoint of all ranks is there, once",
        doc=(
            "With --async-save that is a step or more after it was begun. hf_checkpoint_dir is "
            "None unless --save-hf has {rollout_id} in it, which exports at every save."
        ),
        example=(
            "def hook(args, rollout_id, checkpoint_dir, hf_checkpoint_dir):\n"
            "    args.last_checkpoint = checkpoint_dir\n"
        ),
    ),
    HookSpec(
        slot="custom_model_provider",
        stage="trainers",
        process="trainer",
        owner="megatron",
        forms=(
            CallForm(
                families=ALL,
                named=("pre_process", "post_process"),
                keywords=("vp_stage", "config", "pg_collection"),
                to_var_keywords=True,
            ),
        ),
        default="the model of hf_checkpoint's architecture",
        returns="a Megatron module",
        when="once per trainer process and virtual pipeline stage",
        doc="pre_process and post_process say whether this stage embeds and whether it has logits.",
        example=(
            "def provider(pre_process=True, post_process=True, vp_stage=None):\n"
            '    return {"embeds": pre_process, "has_logits": post_process}\n'
        ),
        example_name="provider",
        runs_async=False,
    ),
)

ROUTER: tuple[HookSpec, ...] = (
    HookSpec(
        slot="router_middleware",
        stage="router",
        process="rollout",
        owner="router",
        repeatable=True,
        leaf_name="router_middleware_paths",
        forms=(
            CallForm(families=("native",), positional=("request", "call_next")),
            CallForm(
                families=("native", "slime", "miles"),
                positional=("app",),
                named=("router",),
                makes=("dispatch",),
                origin="class",
            ),
            CallForm(
                families=("native", "slime", "miles"),
                positional=("app",),
                named=("router",),
                makes=("__call__",),
                origin="ASGI class",
            ),
            CallForm(
                families=("native",),
                positional=("app",),
                makes=("__call__",),
                origin="ASGI class",
            ),
        ),
        default="requests go straight to an engine",
        returns="the response",
        when="for every request to the router",
        doc=(
            "`await call_next(request)` hands the request on. The class is constructed once with "
            "(app, router=router), or (app) if it takes no router, and its `dispatch(request, "
            "call_next)` is awaited; one without is an ASGI application, `__call__(scope, receive, "
            "send)`. Several stand in the order in which they are named, the first outermost."
        ),
        example=(
            "async def count(request, call_next):\n"
            "    response = await call_next(request)\n"
            '    response.headers["x-seen"] = "1"\n'
            "    return response\n"
        ),
        example_name="count",
        time_limit=None,
    ),
)

MULTI_TURN: tuple[HookSpec, ...] = (
    HookSpec(
        slot="generate_tool_specs",
        stage="rollout",
        process="rollout",
        owner="multi-turn generate",
        kind=Kind.OBJECT,
        forms=(CallForm(families=MILES, shown="a list of tool specifications"),),
        default="no tools",
        returns="a list of dicts in the OpenAI form of tools",
        when="once, before the first step",
        doc=(
            "The tools that the chat template shows the model, with "
            "`--custom-generate-function-path multi_turn`: turns of the model and its tools, what "
            "tools answer is not trained on (`generate_max_turns`, `generate_tool_call_parser`)."
        ),
        example=(
            "tools = [\n"
            '    {"type": "function", "function": {"name": "add", "parameters": {}}},\n'
            "]\n"
        ),
        example_name="tools",
        runs_async=False,
        time_limit=None,
    ),
    HookSpec(
        slot="generate_execute_tool_function",
        stage="rollout",
        process="rollout",
        owner="multi-turn generate",
        forms=(CallForm(families=MILES, positional=("name", "params")),),
        default="none",
        returns="a string: what the model is shown",
        when="for every tool call of the model",
        doc="Runs one tool, with `--custom-generate-function-path multi_turn`.",
        example=(
            "async def execute(name, params):\n"
            '    return str(params["a"] + params["b"]) if name == "add" else "no such tool"\n'
        ),
        example_name="execute",
    ),
)


def _before_reading(engine: str) -> HookSpec:
    return HookSpec(
        slot=f"{engine}_custom_pull_weights_pre_read_hook",
        leaf_name=f"{engine}_custom_pull_weights_pre_read_hook",
        stage="weights",
        process="engine",
        owner="weights on disk",
        forms=(CallForm(families=ALL, positional=("delta_dir", "target_version")),),
        default=_NOTHING,
        returns=_NOTHING,
        when="in the engine, before it reads published weights",
        doc="E.g. to fetch the files from where they were written.",
        example="def fetch(delta_dir, target_version):\n    return None\n",
        example_name="fetch",
        runs_async=False,
    )


WEIGHTS: tuple[HookSpec, ...] = (
    HookSpec(
        slot="custom_update_weight_post_write",
        stage="weights",
        process="trainer",
        owner="weights on disk",
        forms=(CallForm(families=ALL, positional=("args", "version_dir", "rollout_engines")),),
        default=_NOTHING,
        returns=_NOTHING,
        when="after the weights of a version were written",
        doc="E.g. to copy version_dir to where the engines read it.",
        example="def copy(args, version_dir, rollout_engines):\n    return None\n",
        example_name="copy",
        runs_async=False,
    ),
    _before_reading("sglang"),
    _before_reading("vllm"),
    HookSpec(
        slot="custom_async_data_buffer",
        stage="data",
        process="rollout",
        owner="asynchronous runtime",
        kind=Kind.FACTORY,
        forms=(
            CallForm(families=MILES, positional=("input",), makes=("put", "get", "get_metrics")),
        ),
        default="a buffer in order of arrival",
        returns="an object with put, get and get_metrics",
        when="once, before the first step of a run with --max-lag",
        doc=(
            "What finished groups wait in until a step takes them; `input` has args and "
            "unused_handler_fn, which takes the prompt_group of an entry that the buffer throws "
            "out. `put` gets entries with prompt_group, group and weight_version, `get` gives one "
            "of them back and is called only while there are any; both may be async. Entries that "
            "are too old when they come out go as async_unused_samples_handler says."
        ),
        example=(
            "class Buffer:\n"
            "    def __init__(self, input):\n"
            "        self.args, self.waiting = input.args, []\n"
            "\n"
            "    def put(self, entry):\n"
            "        self.waiting.append(entry)\n"
            "\n"
            "    def get(self):\n"
            "        return self.waiting.pop(0)\n"
            "\n"
            "    def get_metrics(self):\n"
            '        return {"waiting": len(self.waiting)}\n'
        ),
        example_name="Buffer",
        runs_async=False,
        time_limit=None,
    ),
)
