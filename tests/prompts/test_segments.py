import pytest

from moka_pl.data.encoding.examples import SegmentEncoder
from moka_pl.data.formats.instruction import parse_instruction
from moka_pl.data.reading import parse_record
from moka_pl.errors import DataError
from moka_pl.lm.scoring import IGNORE_INDEX
from moka_pl.prompts.segments import alpaca, chat, require_end

TURNS = [
    {"role": "system", "content": "You are a teacher."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "Three?\n"},
    {"role": "assistant", "content": "  Four, five. "},
]


def row(**record):
    return parse_record(parse_instruction, record, "x.jsonl, line 1")


def joined(segments):
    return "".join(segment.text for segment in segments)


def trained(segments):
    return [segment.text for segment in segments if segment.trained]


def test_alpaca_with_and_without_input():
    prompt, output = alpaca(row(instruction="Add {input}.", input="1 2", output="3"))
    assert prompt.text == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd {input}.\n\n### Input:\n1 2\n\n### Response:\n"
    )
    assert (output.text, output.trained, output.end, prompt.trained) == ("3", True, True, False)
    prompt, _ = alpaca(row(instruction="Hi.", output="Ho."))
    assert "### Input" not in prompt.text
    assert prompt.text.endswith("### Instruction:\nHi.\n\n### Response:\n")


def test_alpaca_takes_a_chat_of_two_messages_only():
    prompt, output = alpaca(row(messages=TURNS[1:3]))
    assert "### Instruction:\nOne?\n\n" in prompt.text
    assert output.text == "Two."
    with pytest.raises(DataError, match=r"line 1: the alpaca prompt.*Use `prompt: chat`"):
        alpaca(row(messages=TURNS))


def test_chat_trains_every_assistant_turn(tiny_tokenizer):
    segments = chat(row(messages=TURNS), tiny_tokenizer)
    assert joined(segments) == tiny_tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert trained(segments) == ["Two.<|im_end|>", "  Four, five. <|im_end|>"]


@pytest.mark.parametrize("default", [False, True])
def test_a_chat_may_begin_with_an_answer(tiny_tokenizer, default):
    if default:  # as SmolLM2's template, which writes a system prompt of its own
        tiny_tokenizer.chat_template = (
            "{% if messages[0].role != 'system' %}<|im_start|>system\nHelp.<|im_end|>\n{% endif %}"
            + tiny_tokenizer.chat_template
        )
    turns = [{"role": "assistant", "content": "All welcome!"}, *TURNS[1:3]]
    segments = chat(row(messages=turns), tiny_tokenizer)
    assert joined(segments) == tiny_tokenizer.apply_chat_template(turns, tokenize=False)
    assert trained(segments) == ["All welcome!<|im_end|>", "Two.<|im_end|>"]
    untrained = [{**turns[0], "weight": 0}, *turns[1:]]
    assert trained(chat(row(messages=untrained), tiny_tokenizer)) == ["Two.<|im_end|>"]


def test_chat_tokens(tiny_tokenizer):
    encoder = SegmentEncoder(tiny_tokenizer, lambda row: chat(row, tiny_tokenizer), 512, bos=False)
    columns = encoder(row(messages=TURNS))
    learned = [token for token in columns["labels"] if token != IGNORE_INDEX]
    assert tiny_tokenizer.decode(learned) == "Two.<|im_end|>  Four, five. <|im_end|>"
    full = tiny_tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert columns["input_ids"] == tiny_tokenizer(full, add_special_tokens=False).input_ids


def test_chat_of_an_alpaca_row(tiny_tokenizer):
    segments = chat(row(instruction="Add.", input="1 2", output="3"), tiny_tokenizer)
    assert "<|im_start|>user\nAdd.\n\n1 2<|im_end|>" in joined(segments)
    assert trained(segments) == ["3<|im_end|>"]


def test_content_parts_and_loss_weight(tiny_tokenizer):
    turns = [
        {
            "role": "user",
            "content": [{"type": "text", "value": "One"}, {"type": "text", "text": "?"}],
            "loss_weight": 1.0,
        },
        {"role": "assistant", "content": "No.", "loss_weight": 0.0},
        {"role": "tool", "content": "data"},
        {"role": "assistant", "content": [{"type": "text", "value": "Yes."}], "loss_weight": 1},
    ]
    segments = chat(row(messages=turns), tiny_tokenizer)
    assert "<|im_start|>user\nOne?<|im_end|>" in joined(segments)
    assert trained(segments) == ["Yes.<|im_end|>"]


def test_tokenizer_without_template(tiny_tokenizer):
    tiny_tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"no chat template.*`prompt: alpaca`"):
        chat(row(messages=TURNS), tiny_tokenizer)


def test_template_that_changes_earlier_turns(tiny_tokenizer):
    tiny_tokenizer.chat_template = (
        "{% for message in messages %}{{ '[' + message['role'] + ']' }}"
        "{% if loop.last or message['role'] != 'assistant' %}{{ message['content'] }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    with pytest.raises(DataError, match=r"x\.jsonl, line 1: .* renders message 3 of 5 differently"):
        chat(row(messages=TURNS), tiny_tokenizer)
    turns = [*TURNS[:2], {**TURNS[2], "loss_weight": 0}, *TURNS[3:]]
    assert trained(chat(row(messages=turns), tiny_tokenizer)) == ["  Four, five."]


def test_template_that_refuses_roles(tiny_tokenizer):
    tiny_tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"line 1: .*rejects these messages \(system, .*roles must alternate"):
        chat(row(messages=TURNS), tiny_tokenizer)


LOOP = "{%- for m in messages %}"
PROMPTED = "{%- if add_generation_prompt %}assistant:{% endif %}"
TURN = LOOP + "{{ m.role + ':' + m.content }}"
OPENS = LOOP + "{% if m.role == 'user' and not loop.first %}{{ eos_token }}{% endif %}"
BETWEEN = OPENS + TURN.removeprefix(LOOP) + "{% endfor %}" + PROMPTED
NEWLINE = LOOP + "{{ m.role + ': ' + m.content }}\n{% endfor %}" + PROMPTED


@pytest.mark.parametrize(
    ("template", "text", "learned"),
    [
        # The line break is the template's own, and comes after the appended token.
        (NEWLINE, "assistant: Two.<|im_end|>\nuser:", [" Two.", "  \n Four\n"]),
        (TURN + "{% endfor %}" + PROMPTED, "Two.<|im_end|>user:", ["Two.", " \n Four\n"]),
        (BETWEEN, "Two.<|im_end|>user:", ["Two.", " \n Four\n"]),  # not a second time there
    ],
)
def test_a_template_without_an_end_token(template, text, learned, tiny_tokenizer):
    tiny_tokenizer.chat_template = template
    turns = [*TURNS[1:4], {"role": "assistant", "content": " \n Four\n"}]
    encoder = SegmentEncoder(
        tiny_tokenizer, lambda row: chat(row, tiny_tokenizer, append_eos=True), 512, False
    )
    columns = encoder(row(messages=turns))
    assert text in tiny_tokenizer.decode(columns["input_ids"])
    found = tiny_tokenizer.decode([token for token in columns["labels"] if token != IGNORE_INDEX])
    assert found == "".join(f"{answer}<|im_end|>" for answer in learned)
    without = encoder.segments(row(messages=turns))
    plain = chat(row(messages=turns), tiny_tokenizer)
    assert joined(plain) == joined(without) == tiny_tokenizer.apply_chat_template(turns, tokenize=False)
    assert not any(segment.end for segment in plain)


def test_a_template_with_an_end_token_needs_no_other(tiny_tokenizer):
    turns = row(messages=TURNS)
    assert chat(turns, tiny_tokenizer, append_eos=True) == chat(turns, tiny_tokenizer)
    for choice in (None, True, False):
        require_end(tiny_tokenizer, choice)


def test_a_template_without_an_end_token_is_refused(tiny_tokenizer):
    tiny_tokenizer.chat_template = NEWLINE
    with pytest.raises(DataError, match=r"no end-of-turn token .*Set `append_eos: true` .*'<\|im_end\|>'"):
        require_end(tiny_tokenizer, None)
    require_end(tiny_tokenizer, True)
    tiny_tokenizer.eos_token = None
    require_end(tiny_tokenizer, False)
    with pytest.raises(DataError, match="no end-of-sequence token to append"):
        require_end(tiny_tokenizer, True)
    tiny_tokenizer.chat_template = "{{ raise_exception('no') }}"  # shows when the rows are read
    require_end(tiny_tokenizer, None)
