import pytest

from dovetail.config.sections import DataConfig
from dovetail.data.build import build_source, load_eval_set
from dovetail.data.dataset import Row
from dovetail.data.prompt import PromptBuilder, PromptFormat, build_prompts
from dovetail.types.errors import DataError
from dovetail.types.sample import Sample

BOS, EOS = 1, 2


class CharTokenizer:
    """Code points as ids; bos in front when special tokens are asked for."""

    eos_token_id: int | None = EOS
    pad_token_id = 0
    chat_template: str | None = "yes"

    def encode(self, text, add_special_tokens=True):
        return [BOS] * add_special_tokens + [ord(c) for c in text]

    def decode(self, token_ids, skip_special_tokens=False):
        return "".join(chr(i) for i in token_ids if i > 2)

    def apply_chat_template(self, conversation, *, tools, tokenize, add_generation_prompt, **extra):
        assert tokenize is False
        if conversation[0]["role"] == "nobody":
            raise ValueError("unknown role nobody")
        text = "".join(f"<{m['role']}>{m['content']}" for m in conversation)
        text += f"|{len(tools)} tools" if tools else ""
        text += "".join(f"|{key}={value}" for key, value in extra.items())
        return text + ("<assistant>" if add_generation_prompt else "")


def row(**values):
    return Row(values, "rows.jsonl:7")


def build(values, tokenizer=None, **prompt_format):
    builder = PromptBuilder(tokenizer or CharTokenizer(), PromptFormat(**prompt_format))
    return builder.build(row(**values)).sample()


def test_text_is_encoded_with_the_tokenizers_special_tokens():
    sample = build({"input": "ab"})
    assert (sample.prompt, sample.tokens) == ("ab", [BOS, 97, 98])
    assert sample.status is Sample.Status.PENDING and sample.response_length == 0


def test_text_under_a_chat_template_is_one_user_message_and_gets_no_second_bos():
    sample = build({"input": "ab"}, apply_chat_template=True)
    assert sample.prompt == "<user>ab<assistant>"
    assert sample.tokens == [ord(c) for c in "<user>ab<assistant>"]


def test_messages_tools_and_template_arguments_reach_the_template():
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    values = {"input": messages, "tools": [{"name": "t"}], "metadata": {"level": 3}}
    sample = build(
        values, apply_chat_template=True, apply_chat_template_kwargs={"enable_thinking": False}
    )
    assert sample.prompt == "<system>s<user>u|1 tools|enable_thinking=False<assistant>"
    assert sample.metadata == {"level": 3, "tools": [{"name": "t"}]}
    assert sample.apply_chat_template_kwargs == {"enable_thinking": False}
    assert build({**values, "tools": '[{"name": "t"}]'}).metadata["tools"] == [{"name": "t"}]


def test_messages_without_the_flag_stay_messages_but_are_encoded_through_the_template():
    messages = [{"role": "user", "content": "u"}]
    sample = build({"input": messages})
    assert sample.prompt == messages
    assert sample.tokens == [ord(c) for c in "<user>u<assistant>"]


def test_a_message_to_be_continued_gets_no_generation_prompt():
    values = {"input": [{"role": "assistant", "content": "I"}]}
    kwargs = {"continue_final_message": True}
    sample = build(values, apply_chat_template=True, apply_chat_template_kwargs=kwargs)
    assert sample.prompt == "<assistant>I|continue_final_message=True"


def test_label_and_metadata_are_taken_from_their_columns():
    values = {"question": "q", "answer": 46, "extra": {"k": [1]}}
    sample = build(values, input_key="question", label_key="answer", metadata_key="extra")
    assert (sample.label, sample.metadata) == (46, {"k": [1]})


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ({"a": 1, "b": 2}, {}, r"no prompt column 'input' \(columns: a, b\); set --input-key"),
        ({"input": "x"}, {"label_key": "y"}, r"no label column 'y' .* --label-key"),
        ({"input": "x"}, {"metadata_key": "m"}, r"no metadata column 'm' .* --metadata-key"),
        ({"input": "x", "metadata": [1]}, {}, "holds list, expected an object"),
        ({"input": "x", "metadata": "{}"}, {}, "holds str, expected an object"),
        ({"input": 3}, {}, "neither text nor"),
        ({"input": []}, {}, "neither text nor"),
        ({"input": [{"content": "no role"}]}, {}, "neither text nor"),
        ({"input": None}, {"apply_chat_template": True}, "neither text nor"),
        ({"input": "x", "tools": 3}, {}, "expected a list of tool schemas"),
        ({"input": "x", "tools": "{"}, {}, "not JSON"),
        ({"input": [{"role": "nobody"}]}, {}, "refuses this prompt: ValueError: unknown role"),
    ],
)
def test_a_faulty_row_is_named_with_its_place_and_the_cure(values, options, message):
    with pytest.raises(DataError, match=message) as caught:
        build(values, **options)
    assert "rows.jsonl:7" in str(caught.value)


def test_an_empty_prompt_and_a_tokenizer_without_template_are_refused():
    tokenizer = CharTokenizer()
    tokenizer.encode = lambda text, add_special_tokens=True: [ord(c) for c in text]
    with pytest.raises(DataError, match="is empty"):
        build({"input": ""}, tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="has none"):
        build({"input": "x"}, tokenizer, apply_chat_template=True)


def test_siblings_share_nothing_that_can_be_changed():
    builder = PromptBuilder(CharTokenizer(), PromptFormat())
    prompt = builder.build(row(input="x", metadata={"deep": {"list": []}}))
    one, two = prompt.sample(), prompt.sample()
    one.tokens.append(9)
    one.metadata["deep"]["list"].append(9)
    assert two.tokens == [BOS, ord("x")] and two.metadata == {"deep": {"list": []}}


def test_over_long_prompts_are_dropped_and_counted():
    builder = PromptBuilder(CharTokenizer(), PromptFormat())
    rows = [row(input="x" * n) for n in (1, 5, 2, 9)]
    prompts = build_prompts(rows, builder, max_prompt_len=3)
    assert [sample.prompt for sample in prompts] == ["x", "xx"]
    assert prompts.num_dropped == 2
    with pytest.raises(DataError, match=r"all 4 prompts .* \(the shortest has 2\)"):
        build_prompts(rows, builder, max_prompt_len=1)


def test_sft_rows_are_finished_samples_that_end_with_eos():
    builder = PromptBuilder(CharTokenizer(), PromptFormat(label_key="label"))
    (sample,) = build_prompts([row(input="a", label="bc")], builder, sft=True)
    assert sample.tokens == [BOS, 97, 98, 99, EOS]
    assert (sample.response, sample.response_length, sample.loss_mask) == ("bc", 3, [1, 1, 1])
    assert sample.status is Sample.Status.COMPLETED and sample.prompt_length == 2


def test_sft_counts_prompt_and_response_against_the_limit():
    builder = PromptBuilder(CharTokenizer(), PromptFormat(label_key="label"))
    rows = [row(input="a", label="b" * n) for n in (1, 8)]
    prompts = build_prompts(rows, builder, max_prompt_len=5, sft=True)
    assert (len(prompts), prompts.num_dropped) == (1, 1)


def test_sft_needs_a_label_column_of_text_and_an_eos_token():
    tokenizer = CharTokenizer()
    with pytest.raises(DataError, match="--label-key"):
        PromptBuilder(tokenizer, PromptFormat()).build_sft(row(input="a"))
    builder = PromptBuilder(tokenizer, PromptFormat(label_key="label"))
    with pytest.raises(DataError, match="needs text in column 'label', got list"):
        builder.build_sft(row(input="a", label=["b"]))
    tokenizer.eos_token_id = None
    with pytest.raises(DataError, match="no eos token"):
        builder.build_sft(row(input="a", label="b"))


def test_a_source_is_built_from_the_data_section_with_the_smaller_limit(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"input": "{"x" * n}"}}\n' for n in (1, 4, 8)))
    data = DataConfig(prompt_data=str(path), rollout_max_prompt_len=6)
    source = build_source(data, 2, CharTokenizer(), 100)
    assert (len(source), source.num_dropped) == (2, 1)
    assert len(build_source(data, 2, CharTokenizer(), 3)) == 1
    with pytest.raises(DataError, match="--prompt-data"):
        build_source(DataConfig(), 2, CharTokenizer(), None)


def test_an_eval_set_has_one_sample_per_prompt_with_its_own_keys_and_metadata(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"q": "x", "a": "1"}\n{"q": "y", "a": "2"}\n')
    samples = load_eval_set(
        str(path),
        DataConfig(),
        CharTokenizer(),
        input_key="q",
        label_key="a",
        metadata={"rm_type": "math"},
    )
    assert [(s.index, s.group_index, s.prompt, s.label) for s in samples] == [
        (0, 0, "x", "1"),
        (1, 1, "y", "2"),
    ]
    assert all(s.metadata == {"rm_type": "math"} for s in samples)
