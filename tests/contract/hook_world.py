"""What the owner of each slot calls it with, what written functions answer, what must come of it.

A function of every form notes its values in SEEN; `source_of` writes it as a plugin author might.
"""

import textwrap
from types import SimpleNamespace

import torch

from dovetail.types import (
    CorrectionCall,
    DataSourceCall,
    DynamicFilterOutput,
    EvalOutput,
    GenerateCall,
    LossCall,
    ReducerCall,
    RolloutCall,
    RolloutOutput,
    Sample,
    SamplingParams,
)

STYLES = ("def", "async def", "class", "class with args", "object", "partial")
BUFFER_INPUT = SimpleNamespace(args=None, unused_handler_fn=None)


def siblings(group_index=0):
    return [
        Sample(
            group_index=group_index,
            index=2 * group_index + i,
            prompt="1+1=",
            tokens=[1, 2, 3],
            response="2",
            response_length=2,
            label="2",
            reward=i,
            status=Sample.Status.COMPLETED,
        )
        for i in range(2)
    ]


async def answered(sample, sampling):
    sample.rollout_log_probs, sample.loss_mask = [-0.1, -0.2], [1, 1]
    sample.append_response_tokens(tokens=[1], log_probs=[-0.1], text="ok")
    return sample


class Letters:
    def encode(self, text, add_special_tokens=True):
        return [ord(letter) for letter in text]


class Prompts:
    """A built-in source."""

    def __init__(self):
        self.given, self.back = 0, []

    def get_samples(self, num_samples):
        self.given += num_samples
        return [siblings(i) for i in range(num_samples)]

    def add_samples(self, samples):
        self.back += samples

    def state_dict(self):
        return {"given": self.given}

    def load_state_dict(self, state):
        self.given = state["given"]


def step_call(output):
    async def default(rollout_id):
        return output

    return RolloutCall(rollout_id=4, data_source="source", default=default, weight_version=3)


def generate_call():
    return GenerateCall(
        sample=siblings()[0],
        sampling=SamplingParams(seed=9),
        engine=None,
        tokenizer=Letters(),
        default=answered,
        evaluation=True,
    )


def train_data():
    return {
        "tokens": [[1, 2, 3], [4, 5]],
        "response_lengths": [2, 1],
        "rewards": [1.0, -1.0],
        "loss_masks": [torch.tensor([1, 1]), torch.tensor([1])],
        "advantages": [torch.tensor([5.0, -5.0]), torch.tensor([1.0])],
        "returns": [torch.zeros(2), torch.zeros(1)],
    }


def loss_call():
    logprobs = [torch.tensor([-1.0, -2.0], requires_grad=True), torch.tensor([-1.0])]
    return LossCall(
        logprobs=logprobs,
        old_logprobs=[one.detach() for one in logprobs],
        advantages=[torch.tensor([1.0, 1.0]), torch.tensor([-3.0])],
        loss_masks=[torch.ones(2), torch.ones(1)],
        reduce=lambda values: sum(one.mean() for one in values),
    )


def correction_call():
    return CorrectionCall(
        pg_loss=torch.tensor([1.0, 2.0, 3.0]),
        train_log_probs=[torch.tensor([-1.0, -1.0]), torch.tensor([-1.0])],
        rollout_log_probs=[torch.tensor([-1.0, -1.0]), torch.tensor([-3.0])],
        loss_masks=[torch.ones(2), torch.ones(1)],
        total_lengths=[3, 2],
        response_lengths=[2, 1],
    )


def reducer_call():
    return ReducerCall([3, 2], [2, 1], [torch.tensor([1, 0]), torch.tensor([1])], per_token=True)


async def respond(request):
    return SimpleNamespace(headers={})


EVAL_DATA = {"set": {"rewards": [1.0, 0.0], "truncated": [False, False], "samples": siblings()}}

GIVEN = {
    "data_source": lambda: (DataSourceCall(default=Prompts),),
    "buffer_filter": lambda: ([siblings(0), siblings(1)], 1),
    "rollout_function": lambda: (step_call(RolloutOutput([siblings()])),),
    "eval_function": lambda: (step_call(EvalOutput({"set": siblings()})),),
    "custom_generate_function": lambda: (generate_call(),),
    "rollout_sample_hook": lambda: (siblings()[1], 4, True),
    "dynamic_sampling_filter": lambda: (siblings(),),
    "rollout_sample_filter": lambda: ([siblings(0), siblings(1)],),
    "rollout_all_samples_process": lambda: ([siblings(0), siblings(1)], Prompts()),
    "custom_rollout_log_function": lambda: (4, siblings(), {"mean": 0.5}, 2.5),
    "custom_eval_rollout_log_function": lambda: (4, EVAL_DATA, {"mean": 0.5}),
    "custom_rm": lambda: (siblings()[1],),
    "custom_rm batched": lambda: (siblings(),),
    "custom_reward_post_process": lambda: (siblings(),),
    "custom_convert_samples_to_train_data": lambda: (siblings(),),
    "rollout_data_postprocess": lambda: (4, train_data(), siblings()),
    "custom_advantage_function": lambda: (train_data(),),
    "custom_loss_function": lambda: (loss_call(),),
    "custom_loss_function of logits": lambda: ({"rewards": [1.0]}, "logits", "reducer"),
    "custom_tis_function": lambda: (correction_call(),),
    "custom_pg_loss_reducer_function": lambda: (reducer_call(),),
    "custom_megatron_init": lambda: (),
    "custom_megatron_before_log_prob_hook": lambda: ("model", "ref_"),
    "custom_megatron_before_train_step_hook": lambda: (4, 1, "model", "optimizer", "scheduler"),
    "custom_megatron_post_save_hook": lambda: (4, "dir", None),
    "custom_model_provider": lambda: (True, False),
    "router_middleware": lambda: ("request", respond),
    "router_middleware class": lambda: ("app", "router"),
    "custom_agent_function": lambda: ("http://there", "hello", {}, {"a": 1}),
    "session_message_matcher": lambda: (
        {"role": "user", "content": "a"},
        {"role": "user", "content": "a"},
    ),
    "session_sample_picker": lambda: (siblings(), {}),
    "session_sample_postprocessor": lambda: (siblings(), {}),
    "generate_tool_specs": lambda: (),
    "generate_execute_tool_function": lambda: ("add", {"a": 1, "b": 2}),
    "custom_update_weight_post_write": lambda: ("dir", ["engine"]),
    "sglang_custom_pull_weights_pre_read_hook": lambda: ("dir", 3),
    "vllm_custom_pull_weights_pre_read_hook": lambda: ("dir", 3),
    "custom_async_data_buffer": lambda: (BUFFER_INPUT,),
}

ANSWERS = {
    "data_source": "Made()",
    "buffer_filter": "[BUFFER.pop(0)]",
    "rollout_function": "[[Sample(index=0), Sample(index=1)]]",
    "eval_function": "{'set': {'rewards': [1.0, 0.0], 'truncated': [False, False]}}",
    "custom_generate_function": "Sample(index=0)",
    "rollout_sample_hook": "Sample(index=77)",
    "dynamic_sampling_filter": "1",
    "custom_rollout_log_function": "1",
    "custom_eval_rollout_log_function": "1",
    "custom_rm": "0.5",
    "custom_rm batched": "[0.5, 0.25]",
    "custom_reward_post_process": "([0.0, 1.0], [-1.0, 1.0])",
    "custom_convert_samples_to_train_data": (
        "{'tokens': [[1, 2]], 'response_lengths': [1], 'rewards': [0.5], 'mine': ['x']}"
    ),
    "custom_advantage_function": (
        "([torch.ones(2), torch.ones(1)], [torch.zeros(2), torch.ones(1)])"
    ),
    "custom_loss_function": "torch.tensor(2.5, requires_grad=True), {'mine': 1.0}",
    "custom_loss_function of logits": "torch.tensor([2.5], requires_grad=True), {'mine': 1.0}",
    "custom_tis_function": "torch.zeros(3), [torch.zeros(2), torch.ones(1)], {'w': 1.0}",
    "custom_pg_loss_reducer_function": "lambda values: values.sum() / 10",
    "router_middleware class": "Made()",
    "custom_async_data_buffer": "Made()",
}
"""What the written functions give back; others: 'done'."""

MADE = """
def get_samples(self, num_samples):
    return [[Sample(index=5)] for _ in range(num_samples)]
def add_samples(self, samples):
    SEEN.append({"added": samples})
def save(self, rollout_id):
    SEEN.append({"saved": rollout_id})
def load(self, rollout_id=None):
    SEEN.append({"loaded": rollout_id})
async def dispatch(self, request, call_next):
    return "handled"
async def __call__(self, scope, receive, send): ...
def put(self): ...
def get(self): ...
def get_metrics(self): ...
"""
HEAD = "import torch\nfrom functools import partial\nfrom dovetail.types import Sample\nSEEN = []\n"


def styles_of(form):
    """The kinds of callables that a form can be written as."""
    if form.shown:
        return ()
    if form.construct is not None:
        return ("class",)
    return tuple(style for style in STYLES if not (form.makes and style == "class with args"))


def case_of(spec, form):
    """The name under which this form's values and answers stand above."""
    if form.batched:
        return f"{spec.slot} batched"
    if spec.slot == "custom_loss_function" and "logits" in form.positional:
        return f"{spec.slot} of logits"
    if spec.slot == "router_middleware" and form.makes:
        return f"{spec.slot} class"
    return spec.slot


def source_of(form, case, style):
    """A user's file in which `hook`, a callable of this form and kind, notes what it got."""
    values = (*form.positional, *form.named, *form.keywords)
    names = [*form.positional, *form.named, *(f"{name}=None" for name in form.keywords)]
    noted = ", ".join(f"{name}={name}" for name in values)
    buffer = "samples" if "samples" in form.positional else "buffer"
    answer = ANSWERS.get(case, "'done'").replace("BUFFER", buffer)
    if case in ("rollout_sample_filter", "rollout_data_postprocess"):
        answer = "None"
    note = f"SEEN.append(dict({noted}))\n"
    body = f"{note}    return {answer}\n"
    head = HEAD + "class Made:\n" + textwrap.indent(MADE, "    ")
    if style in ("def", "async def"):
        return head + f"{style} hook({', '.join(names)}):\n    {body}"
    if style == "partial":
        return head + f"def make(fixed, {', '.join(names)}):\n    {body}hook = partial(make, 7)\n"
    init, method = "", f"def __call__(self, {', '.join(names)}):\n    {body}"
    if form.makes and style == "class":
        method = f"def __init__(self, {', '.join(names)}):\n    {note}{MADE}"
    if style == "class with args":
        init = "def __init__(self, args):\n    SEEN.append(args.lr)\n"
    if form.construct is not None:
        init = f"def __init__(self, {form.construct[0]}):\n    SEEN.append({form.construct[0]})\n"
    made = "hook = Hook()\n" if style == "object" else "hook = Hook\n"
    return head + "class Hook:\n" + textwrap.indent(init + method, "    ") + made


def check(case, result, given):
    """What the owner gets, and what became of what it handed over."""
    if case == "data_source":
        assert [group[0].index for group in result.get_samples(2)] == [5, 5]
        assert result.state_dict() == {"foreign": True}
    elif case == "buffer_filter":
        assert [group[0].group_index for group in result] == [0]
        # The documented forms say what stays: nothing else did.
        assert [group[0].group_index for group in given[0]] in ([1], [])
    elif case == "rollout_function":
        assert isinstance(result, RolloutOutput)
        assert [[s.index for s in group] for group in result.samples] == [[0, 1]]
    elif case == "eval_function":
        assert isinstance(result, EvalOutput) and list(result.data) == ["set"]
        assert result.metrics["eval/set/reward"] == 0.5
    elif case == "custom_generate_function":
        assert isinstance(result, Sample)
    elif case == "rollout_sample_hook":
        assert result.index == 77
    elif case == "dynamic_sampling_filter":
        assert isinstance(result, DynamicFilterOutput) and result.keep
    elif case in ("custom_rollout_log_function", "custom_eval_rollout_log_function"):
        assert result is True
    else:
        check_training(case, result, given)


def check_training(case, result, given):
    if case == "custom_rm":
        assert result == 0.5
    elif case == "custom_rm batched":
        assert result == [0.5, 0.25]
    elif case == "custom_reward_post_process":
        assert result == ([0.0, 1.0], [-1.0, 1.0])
    elif case == "custom_convert_samples_to_train_data":
        assert result["mine"] == ["x"] and result["tokens"] == [[1, 2]]
    elif case == "custom_advantage_function":
        assert [a.tolist() for a in given[0]["advantages"]] == [[1.0, 1.0], [1.0]]
        assert [r.tolist() for r in given[0]["returns"]] == [[0.0, 0.0], [1.0]]
    elif case.startswith("custom_loss_function"):
        assert result[0].shape == () and result[0].item() == 2.5 and result[1] == {"mine": 1.0}
    elif case == "custom_tis_function":
        assert result[0].tolist() == [0.0] * 3 and result[2] == {"w": 1.0}
    elif case == "custom_pg_loss_reducer_function":
        assert result(torch.tensor([4.0, 6.0])).item() == 1.0
    elif case in ("router_middleware class", "custom_async_data_buffer"):
        assert callable(result.dispatch) and callable(result.get_metrics)
    elif case in (
        "rollout_sample_filter",
        "rollout_all_samples_process",
        "rollout_data_postprocess",
    ):
        assert result is None
    else:
        assert result == "done"
