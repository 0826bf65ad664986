"""What a chat template is given, and what becomes of what it does not write."""

import json
from functools import partial

import pytest
from shared.templates import LATEST_REASONING, TOOLS, USER_AND_ASSISTANT

from moka_pl.data.encoding.examples import SegmentEncoder
from moka_pl.data.formats.instruction import parse_instruction
from moka_pl.data.reading import parse_record
from moka_pl.errors import DataError
from moka_pl.prompts.chats import beside_text, conversation, left_out
from moka_pl.prompts.segments import alpaca, chat

WEATHER = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
WEATHER_TEXT = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = '<call>weather {"city": "Paris"}</call><|im_end|>'


def user(content, **more):
    return {"role": "user", "content": content, **more}


def answer(content, **more):
    return {"role": "assistant", "content": content, **more}


def row(*messages, **record):
    return parse_record(parse_instruction, {"messages": list(messages), **record}, "x.jsonl, line 1")


def trained(one, tokenizer, **options):
    return [segment.text for segment in chat(one, tokenizer, **options) if segment.trained]


@pytest.fixture
def tools_tokenizer(tiny_tokenizer):
    tiny_tokenizer.chat_template = TOOLS
    return tiny_tokenizer


@pytest.mark.parametrize(
    "asked",
    [
        answer("", tool_calls=[WEATHER]),
        answer(None, tool_calls=[WEATHER]),
        answer([], tool_calls=[WEATHER]),
        {"role": "assistant", "tool_calls": [WEATHER], "name": None},
        answer("", tool_calls=[WEATHER_TEXT]),
        answer("", tool_calls=json.dumps([WEATHER])),
        answer("", function_call=WEATHER["function"]),
        answer("", function_call=json.dumps(WEATHER_TEXT["function"])),
    ],
)
def test_calls_are_written_by_the_template(tools_tokenizer, asked):
    result = {"role": "tool", "content": "18", "tool_call_id": "1"}
    one = row(user("Warm?"), asked, result, answer("Yes."), tools=[TOOL])
    assert trained(one, tools_tokenizer) == [CALL, "Yes.<|im_end|>"]
    text = "".join(segment.text for segment in chat(one, tools_tokenizer))
    given = [user("Warm?"), answer("", tool_calls=[WEATHER]), result, answer("Yes.")]
    assert text == tools_tokenizer.apply_chat_template(given, tools=[TOOL], tokenize=False)
    assert left_out(one, tools_tokenizer) == {"messages[].tool_call_id": 1}


def test_tools_may_be_json(tools_tokenizer):
    texts = [
        "".join(segment.text for segment in chat(row(user("a"), answer("b"), tools=tools), tools_tokenizer))
        for tools in ([TOOL], json.dumps([TOOL]), [json.dumps(TOOL)], TOOL)
    ]
    assert len(set(texts)) == 1
    assert texts[0].startswith(f"<tools>{json.dumps(TOOL)}</tools>")


def test_calls_of_sharegpt_and_of_the_older_interface(tools_tokenizer):
    turns = [
        {"from": "human", "value": "Warm?"},
        {"from": "function_call", "value": json.dumps(WEATHER["function"])},
        {"from": "observation", "value": "18"},
        {"from": "gpt", "value": "Yes."},
    ]
    one = parse_record(parse_instruction, {"conversations": turns, "tools": "[]"}, "x.jsonl, line 1")
    assert trained(one, tools_tokenizer) == [CALL, "Yes.<|im_end|>"]
    older = row(user("Warm?"), {"role": "function", "name": "f", "content": "18"}, answer("Yes."))
    assert "<|im_start|>tool\n18" in chat(older, tools_tokenizer)[0].text


def test_arguments_that_a_template_writes_as_they_are_stay_text(tiny_tokenizer):
    tiny_tokenizer.chat_template = TOOLS.replace("arguments | tojson", "arguments")
    one = row(user("Warm?"), answer("", tool_calls=[WEATHER_TEXT]))
    assert trained(one, tiny_tokenizer) == [CALL]


def test_reasoning_is_trained(tools_tokenizer):
    one = row(user("2+2"), answer("4", reasoning_content="two and two"))
    assert trained(one, tools_tokenizer) == ["<think>two and two</think>4<|im_end|>"]
    assert not left_out(one, tools_tokenizer)


@pytest.mark.parametrize(
    ("record", "part"),
    [
        ({"messages": [user("a"), answer("", tool_calls=[WEATHER])]}, "'tool_calls' of message 2 of 2"),
        ({"messages": [user("a"), answer("b")], "tools": [TOOL]}, "the row's 'tools'"),
        ({"messages": [user("a"), answer("b")], "functions": [{"name": "f"}]}, "the row's 'tools'"),
        ({"messages": [user("a"), answer("b", reasoning_content="c")]}, "'reasoning_content' of message 2"),
        ({"messages": [user("a"), answer("b", thinking="c")]}, "'thinking' of message 2 .*weight 0"),
        (
            {"messages": [{"role": "developer", "content": "x"}, user("a"), answer("b")]},
            r"content of message 1 of 3 \(developer",
        ),
        (
            {"messages": [{"role": "system", "content": "x y"}, user("a"), answer("b")]},
            r"content of message 1 of 3 \(system",
        ),
        (
            {"messages": [user("a"), {"role": "tool", "content": "x y"}, answer("b")]},
            r"content of message 2 of 3 \(tool",
        ),
        ({"prompt": "a", "completion": "b", "system": "x y"}, r"content of message 1 of 3 \(system"),
    ],
)
def test_what_matters_and_is_not_written_is_refused_by_line(tiny_tokenizer, record, part):
    tiny_tokenizer.chat_template = USER_AND_ASSISTANT
    one = parse_record(parse_instruction, record, "x.jsonl, line 7")
    with pytest.raises(DataError, match=rf"^x\.jsonl, line 7: .*does not write .*{part}"):
        left_out(one, tiny_tokenizer)


def test_reasoning_of_earlier_answers_is_left_out_on_purpose(tiny_tokenizer):
    tiny_tokenizer.chat_template = LATEST_REASONING
    turns = [user("a"), answer("b", reasoning_content="c"), user("d"), answer("e", reasoning_content="f")]
    with pytest.raises(DataError, match="'reasoning_content' of message 2 of 4"):
        left_out(row(*turns), tiny_tokenizer)
    one = row(turns[0], turns[1] | {"weight": 0}, *turns[2:])
    assert not left_out(one, tiny_tokenizer)
    assert trained(one, tiny_tokenizer) == ["<think>f</think>e<|im_end|>"]


def test_a_system_prompt_that_the_template_has_itself_is_written(tiny_tokenizer):
    tiny_tokenizer.chat_template = "Be kind.\n" + USER_AND_ASSISTANT
    one = row({"role": "system", "content": "Be kind."}, user("a"), answer("b"))
    assert not left_out(one, tiny_tokenizer)


def test_a_content_that_gives_way_to_a_call_is_refused(tiny_tokenizer):
    tiny_tokenizer.chat_template = TOOLS.replace(
        "{{ message.content }}", "{% if not message.tool_calls %}{{ message.content }}{% endif %}"
    )
    with pytest.raises(DataError, match=r"does not write the content of message 2 of 2 \(assistant\)"):
        left_out(row(user("a"), answer("Let me see.", tool_calls=[WEATHER])), tiny_tokenizer)
    assert not left_out(row(user("a"), answer("", tool_calls=[WEATHER])), tiny_tokenizer)


def test_what_is_left_out_is_said_before_spans_that_are_not_found(tiny_tokenizer):
    tiny_tokenizer.chat_template = (
        "{% for message in messages if message.role != 'system' %}"
        "{% if loop.last and message.role == 'user' and messages[0].role == 'system' %}"
        "{{ messages[0].content }}{% endif %}<{{ message.role }}>{{ message.content }}<|im_end|>{% endfor %}"
    )
    one = row({"role": "system", "content": "Be kind."}, user("a"), answer("b"))
    parts = [partial(function, tokenizer=tiny_tokenizer) for function in (chat, left_out)]
    with pytest.raises(DataError, match=r"does not write the content of message 1 of 3 \(system\)"):
        SegmentEncoder(tiny_tokenizer, parts[0], 64, bos=False, left_out=parts[1])(one)


def test_what_does_not_matter_is_counted(tiny_tokenizer):
    one = row(user("a", name="Ann"), answer("b", mood="good"), user("c"), answer("d", mood="bad", x=None))
    assert left_out(one, tiny_tokenizer) == {"messages[].name": 1, "messages[].mood": 2}
    tiny_tokenizer.chat_template += "{{ messages[1].mood }}"
    assert left_out(one, tiny_tokenizer) == {"messages[].name": 1}


def test_options_of_the_template(tiny_tokenizer):
    tiny_tokenizer.chat_template += "{{ '' if thinking is undefined else thinking }}"
    one = row(user("a"), answer("b"), chat_template_kwargs={"thinking": "on", "loud": True})
    assert conversation(one, tiny_tokenizer).render().endswith("on")
    assert left_out(one, tiny_tokenizer) == {"loud": 1}
    one = row(user("a"), answer("b"), chat_template_kwargs={"chat_template": "{{ 1 }}"})
    with pytest.raises(DataError, match="line 1: field 'chat_template_kwargs' holds 'chat_template'"):
        chat(one, tiny_tokenizer)


def test_empty_answers(tools_tokenizer):
    turns = [user("a"), answer(" "), user("c"), answer("", mood="x"), user("e"), answer("f")]
    one = row(*turns)
    assert trained(one, tools_tokenizer, skip_empty=True) == ["f<|im_end|>"]
    assert left_out(one, tools_tokenizer, skip_empty=True)["empty answers"] == 2
    assert trained(one, tools_tokenizer) == [" <|im_end|>", "<|im_end|>", "f<|im_end|>"]
    called = row(user("a"), answer("", tool_calls=[WEATHER]))
    assert trained(called, tools_tokenizer, skip_empty=True) == [CALL]
    # Something is said, even if it is not in the field for it.
    assert trained(row(*turns[:3], answer("", reasoning_content="r")), tools_tokenizer, skip_empty=True) == [
        "<think>r</think><|im_end|>"
    ]
    blank = parse_record(parse_instruction, {"instruction": "a", "output": "\n"}, "x")
    assert [segment.trained for segment in alpaca(blank, skip_empty=True)] == [False, False]
    assert beside_text(blank, skip_empty=True) == {"empty answers": 1}


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "a", "output": "b", "tools": [TOOL]},
        {"messages": [user("a"), answer("b", reasoning_content="c")]},
        {"messages": [user("a"), answer("", tool_calls=[WEATHER])]},
        {"instruction": "a", "output": "b", "system": "S"},
        {"prompt": "a", "completion": "b", "history": [["c", "d"]]},
    ],
)
def test_the_alpaca_prompt_refuses_what_it_has_no_place_for(record):
    with pytest.raises(DataError, match=r"^x\.jsonl, line 1: .*Use `prompt: chat`"):
        alpaca(parse_record(parse_instruction, record, "x.jsonl, line 1"))


def test_fields_beside_a_text_are_counted():
    one = row(user("a", name="Ann"), answer("b", mood="good"))
    assert beside_text(one) == {"messages[].name": 1, "messages[].mood": 1}


def test_an_error_of_the_template_is_one_line(tools_tokenizer):
    one = row(user("a"), answer("", tool_calls=[{"type": "function"}]))
    with pytest.raises(DataError, match=r"^x\.jsonl, line 1: .* rejects these messages \(user, assistant\)"):
        left_out(one, tools_tokenizer)
