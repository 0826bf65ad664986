"""Which tokens belong to an answer, for every kind of tokenizer and any white space."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shared.tokenizer_kinds import END, KINDS, tokenizer_of

from moka_pl.data.encoding.choices import ChoiceEncoder
from moka_pl.data.encoding.examples import SegmentEncoder
from moka_pl.data.encoding.pieces import tokenize_pieces
from moka_pl.lm.scoring import IGNORE_INDEX
from moka_pl.prompts.segments import alpaca, chat

_WORDS = [
    "a",
    "return",
    " ",
    "  ",
    "\n",
    "\n\n",
    "\t",
    "1",
    "23",
    "3.14",
    "é",
    "日本",
    "👍🏽",
    "x = 1",
    " foo",
    ".",
]
_ODD = st.lists(st.sampled_from([*_WORDS, "\u00a0", "\u3000", "e\u0301", "ﬁ", "İ"]), max_size=6).map("".join)
ODD = _ODD | st.text(st.characters(codec="utf-8", exclude_characters="<▁"), max_size=8)


def plain(tokenizer, ids):
    return tokenizer.decode(ids)


def trained(tokenizer, columns):
    return plain(tokenizer, [label for label in columns["labels"] if label != IGNORE_INDEX])


def row(**fields):
    return {"location": "x", "instruction": "", "input": "", "output": "", "messages": []} | fields


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(pieces=st.lists(ODD, min_size=1, max_size=4))
def test_every_piece_ends_where_a_tokenizer_that_knew_no_more_would_end(kind, pieces):
    tokenizer = tokenizer_of(kind)
    found, known, text = tokenize_pieces(tokenizer, pieces), [], ""
    assert len(found) == len(pieces)
    for ids, piece in zip(found, pieces, strict=True):
        known, text = known + ids, text + piece
        if kind == "normalized":  # composes characters across borders
            continue
        assert plain(tokenizer, known) == plain(
            tokenizer, tokenizer(text, add_special_tokens=False).input_ids
        )


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "normalized"])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(answer=ODD, second=ODD)
def test_what_is_trained_is_the_answer_with_its_end(kind, answer, second):
    tokenizer = tokenizer_of(kind)
    encoder = SegmentEncoder(tokenizer, alpaca, 10_000, bos=True)
    columns = encoder(row(instruction="Say:", output=answer))
    prompt = tokenizer(alpaca(row(instruction="Say:"))[0].text, add_special_tokens=False).input_ids
    assert columns["input_ids"][: len(prompt) + 1] == [tokenizer.bos_token_id, *prompt]
    assert columns["trained"] == len(columns["input_ids"]) - len(prompt) - 1
    assert plain(tokenizer, columns["input_ids"][1:]).endswith(f"\n{answer}{END}")
    # A chat trains two answers, and nothing between them.
    turns = [("user", "One?"), ("assistant", answer), ("user", " "), ("assistant", second)]
    messages = [{"role": role, "content": text, "trained": role == "assistant"} for role, text in turns]
    encoder = SegmentEncoder(tokenizer, lambda one: chat(one, tokenizer), 10_000, bos=False)
    ends = trained(tokenizer, encoder(row(messages=messages))).split(END)
    # SentencePiece writes the first space of a text that stands alone with the word after it.
    assert [text.lstrip(" ") for text in ends] == [answer.lstrip(" "), second.lstrip(" "), ""]


@pytest.mark.parametrize(
    ("kind", "answer"),
    [
        ("trimmed digits", "1 2 3  4"),  # a token of one space, whose offsets are empty
        ("trimmed", "def f():\n    return 1\n"),
        ("trimmed", "    indented"),  # grows together with the line break before it
        ("trimmed digits", "\n\n 1\n"),
        ("trimmed", " \t "),
        ("byte level", "\nx"),
        ("prefix space", "  x"),
        ("metaspace first", "\n    if a:"),
    ],
)
def test_white_space_of_an_answer_is_trained(kind, answer):
    tokenizer = tokenizer_of(kind)
    columns = SegmentEncoder(tokenizer, alpaca, 10_000, bos=False)(row(instruction="Say:", output=answer))
    assert trained(tokenizer, columns) == answer + END
    prompt = alpaca(row(instruction="Say:"))[0].text
    assert (
        columns["input_ids"][: -columns["trained"]] == tokenizer(prompt, add_special_tokens=False).input_ids
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", ["Answer:", "Answer:\n", "Answer: "])
def test_options_are_scored_whole(kind, prompt):
    tokenizer = tokenizer_of(kind)
    options = [" 1 2  3", " \n", "  é x", " a", "33"]
    encoder = ChoiceEncoder(tokenizer, lambda _: prompt, lambda _: options, 512, False, ("t",))
    columns = encoder({"task": "t", "answer": 0})
    assert columns["prompt_ids"] == tokenizer(prompt, add_special_tokens=False).input_ids
    whole = [plain(tokenizer, columns["prompt_ids"] + ids) for ids in columns["option_ids"]]
    assert whole == [
        plain(tokenizer, tokenizer(prompt + one, add_special_tokens=False).input_ids) for one in options
    ]
    assert min(map(len, columns["option_ids"])) > 0
