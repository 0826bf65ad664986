"""The byte tokenizer of models with random weights."""

from hypothesis import example, given
from hypothesis import strategies as st

from moka_pl.backbone.random_weights import byte_tokenizer

TOKENIZER = byte_tokenizer()
SPECIAL = ["<|pad|>", "<|end|>", "<|im_start|>", "<|im_end|>"]


@given(st.text())
@example(" leading and trailing ")
@example("\r\n\t\0")
@example("don't , un - do  spaces .")
def test_any_text_comes_back(text: str) -> None:
    ids = TOKENIZER(text).input_ids
    assert len(ids) == len(text.encode())  # one token a byte, and no special ones around
    assert TOKENIZER.decode(ids, clean_up_tokenization_spaces=False) == text


def test_it_fits_the_tiny_shape() -> None:
    assert len(TOKENIZER) == 260
    assert sorted(TOKENIZER.get_vocab().values()) == list(range(260))


def test_special_tokens() -> None:
    assert TOKENIZER.convert_tokens_to_ids(SPECIAL) == [0, 1, 2, 3]
    assert (TOKENIZER.pad_token_id, TOKENIZER.eos_token_id, TOKENIZER.bos_token_id) == (0, 1, None)
    ids = TOKENIZER("a<|im_end|>b").input_ids
    assert ids[1] == 3
    assert len(ids) == 3
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == "ab"


def test_padding_is_masked() -> None:
    batch = TOKENIZER(["abc", "a"], padding=True)
    assert batch["attention_mask"] == [[1, 1, 1], [1, 0, 0]]
    assert batch["input_ids"][1][1:] == [0, 0]


def test_the_chat_template_is_chatml() -> None:
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    whole = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    assert TOKENIZER.apply_chat_template(chat, tokenize=False) == whole
    prompt = TOKENIZER.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert prompt == whole + "<|im_start|>assistant\n"
    ids = TOKENIZER.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert ids.count(2) == 3
    assert ids.count(3) == 2
