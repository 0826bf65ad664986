"""The tokens around prompts and behind answers."""

from types import SimpleNamespace

import pytest
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing

from moka_pl.prompts.ends import adds_bos, end_tokens, open_prompts, prompt_ids, stop_at_ends, template_ends

SAVED = {
    "bos and eos": (["<s>", "$A", "<|im_end|>"], ["<s>"]),
    "eos": (["$A", "<|im_end|>"], []),
    "bos": (["<s>", "$A"], ["<s>"]),
    "two ends": (["$A", "<|im_end|>", "<|im_end|>"], []),
    "another token": (["<|im_start|>", "$A"], []),
    "nothing": (["$A"], []),
}


@pytest.mark.parametrize("saved", SAVED)
def test_a_tokenizer_puts_around_a_prompt_what_training_does(saved, tiny_tokenizer):
    pieces, opening = SAVED[saved]
    specials = [(name, tiny_tokenizer.convert_tokens_to_ids(name)) for name in set(pieces) - {"$A"}]
    tiny_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=pieces, pair=[*pieces, "$B:1"], special_tokens=specials
    )
    bos = adds_bos(tiny_tokenizer)
    assert bos == bool(opening)
    open_prompts(tiny_tokenizer)
    plain = tiny_tokenizer("Say:\n", add_special_tokens=False).input_ids
    assert tiny_tokenizer("Say:\n").input_ids == [tiny_tokenizer.bos_token_id] * bos + plain
    assert adds_bos(tiny_tokenizer) == bos


def test_a_beginning_that_is_the_end_as_well(tiny_tokenizer):
    tiny_tokenizer.bos_token = tiny_tokenizer.eos_token
    end = (tiny_tokenizer.eos_token, tiny_tokenizer.eos_token_id)
    tiny_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=["$A", end[0]], special_tokens=[end]
    )
    assert not adds_bos(tiny_tokenizer)
    open_prompts(tiny_tokenizer)
    assert tiny_tokenizer("a").input_ids == tiny_tokenizer("a", add_special_tokens=False).input_ids


@pytest.mark.parametrize(
    ("turn", "ends"),
    [
        ("{{ m.content }}<|im_end|>\n", ["<|im_end|>"]),
        ("{{ m.content | trim }} <eot>\n<|im_end|>", ["<eot>", "<|im_end|>"]),
        ("{{ eos_token + m.content }}\n", []),  # only before the answer
        ("{{ m.content }}\n", []),
        ("{{ m.content }}</s>", []),  # text, no token of this tokenizer
        ("{{ raise_exception('no') }}", None),
        ("{{ m.nothing.at_all }}", None),
        ("nothing", None),
    ],
)
def test_the_ends_of_a_template(turn, ends, tiny_tokenizer):
    tiny_tokenizer.add_tokens(AddedToken("<eot>", special=False))
    tiny_tokenizer.chat_template = f"{{% for m in messages %}}{turn}{{% endfor %}}"
    found = template_ends(tiny_tokenizer)
    assert found == (None if ends is None else tiny_tokenizer.convert_tokens_to_ids(ends))
    assert end_tokens(tiny_tokenizer)[0] == tiny_tokenizer.eos_token_id
    tiny_tokenizer.eos_token = None
    assert end_tokens(tiny_tokenizer) == (found or [])


@pytest.mark.parametrize(
    ("own", "expected"), [(None, [2, 1]), (7, [7, 2, 1]), ([7, 1], [7, 1, 2]), ([1, 2], [1, 2])]
)
def test_a_model_stops_at_all_ends(own, expected, tiny_tokenizer):
    tiny_tokenizer.chat_template = "{{ messages[1].content }}<|im_start|>" if own != 0 else None
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=own))
    stop_at_ends(model, tiny_tokenizer)
    assert model.generation_config.eos_token_id == expected


def test_a_model_without_any_end(tiny_tokenizer):
    tiny_tokenizer.eos_token = tiny_tokenizer.chat_template = None
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=None))
    stop_at_ends(model, tiny_tokenizer)
    assert model.generation_config.eos_token_id is None
    stop_at_ends(SimpleNamespace(generation_config=None), tiny_tokenizer)


def test_prompts_begin_as_in_training(tiny_tokenizer):
    plain = tiny_tokenizer("Hi", add_special_tokens=False).input_ids
    bos, eos = tiny_tokenizer.bos_token_id, tiny_tokenizer.eos_token_id
    assert prompt_ids(tiny_tokenizer, "Hi", "raw", is_trained=False) == plain
    assert prompt_ids(tiny_tokenizer, "Hi", "alpaca", is_trained=True) == plain
    assert prompt_ids(tiny_tokenizer, "Hi", "raw", is_trained=True) == [bos, *plain]  # as windows of text
    assert prompt_ids(tiny_tokenizer, "<s>Hi", "raw", is_trained=True) == [bos, *plain]
    tiny_tokenizer.bos_token = None
    assert prompt_ids(tiny_tokenizer, "Hi", "raw", is_trained=True) == [eos, *plain]


@pytest.mark.parametrize("kind", ["raw", "chat", "alpaca"])
def test_the_special_tokens_of_a_chat_are_the_templates(kind, bos_tokenizer):
    plain = bos_tokenizer("Hi", add_special_tokens=False).input_ids
    ids = prompt_ids(bos_tokenizer, "Hi", kind, is_trained=True)
    assert ids == ([] if kind == "chat" else [bos_tokenizer.bos_token_id]) + plain
