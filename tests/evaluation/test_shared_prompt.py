import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from moka_pl.adapters import MokaConfig, inject_adapter
from moka_pl.backbone import BackboneConfig, load_backbone
from moka_pl.data.batching.collate import collate_choices
from moka_pl.evaluation.shared_prompt import block_mask, can_share, fits_window, score_shared
from moka_pl.lm.scoring import row_sums, score_tokens

TINY = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
ITEMS = st.lists(
    st.tuples(
        st.lists(st.integers(1, 60), min_size=1, max_size=12),
        st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=4), min_size=2, max_size=5),
    ),
    min_size=1,
    max_size=4,
)


def item(prompt, options):
    return {
        "prompt_ids": prompt,
        "option_ids": options,
        "option_chars": [1] * len(options),
        "answer": 0,
        "task": 0,
    }


def many(generator=None):
    """Items of different lengths, with one to five options of one to six tokens, and a filler."""
    generator = torch.Generator().manual_seed(4)

    def ids(count):
        return torch.randint(1, 60, (count,), generator=generator).tolist()

    return [item(ids(n), [ids(1 + (n + k) % 6) for k in range(1 + n % 5)]) for n in (6, 13, 1, 9, 23)]


def both(model, items, fillers=None):
    """The options' log-likelihoods in rows of their own, and behind a common prompt."""
    batch = collate_choices(items, fillers or [False] * len(items), 0, "auto")
    options = len(batch["input_ids"])
    with torch.no_grad():
        alone = row_sums(score_tokens(model, batch["input_ids"], batch["labels"]), options)
        together = row_sums(score_shared(model, batch["shared"]), options)
    return alone, together


@pytest.fixture(scope="module")
def one_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**TINY, **sizes, initializer_range=0.2)).eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_scores_are_those_of_whole_rows(make_llama, randomize, attention):
    model = make_llama(attn_implementation=attention)
    inject_adapter(model, MokaConfig(components=3))
    randomize(model)
    alone, together = both(model, many(), [False, False, False, True, False])
    assert alone.abs().max() > 5
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-4)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(items=ITEMS)
def test_any_items(one_llama, items):
    batch = collate_choices([item(*one) for one in items], [False] * len(items), 0, "auto")
    if "shared" not in batch:
        assert len(items) >= 1
        return
    options = len(batch["input_ids"])
    with torch.no_grad():
        alone = row_sums(score_tokens(one_llama, batch["input_ids"], batch["labels"]), options)
        together = row_sums(score_shared(one_llama, batch["shared"]), options)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-4)


def test_four_bit_layers():
    model = load_backbone(BackboneConfig(name="tiny", weights="random")).model
    alone, together = both(model, many())
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_a_neighbours_tokens_change_nothing(tiny_llama):
    items = [item([5, 9, 2], [[7, 8, 9], [4, 4]]), item([3, 1], [[6, 2], [1, 2, 3, 4]])]
    _, before = both(tiny_llama, items)
    items[0]["option_ids"][0] = [30, 31, 32]
    _, after = both(tiny_llama, items)
    assert torch.equal(before[1:], after[1:])
    assert before[0] != after[0]


def test_single_tokens_take_no_room(tiny_llama):
    letters = [item([5, 9, 2, 8, 1], [[7], [8], [9], [10]]), item([3, 1], [[7], [8], [9], [10]])]
    shared = collate_choices(letters, [False, False], 0, "auto")["shared"]
    assert "segments" not in shared
    assert shared["input_ids"].shape == (2, 8)
    assert len(shared["predictor_row"]) == 2  # one row of logits an item
    alone, together = both(tiny_llama, letters)
    torch.testing.assert_close(together, alone)


def test_whole_rows_where_they_are_smaller():
    # One item with long options makes all shared rows wide; alone its rows would be short.
    items = [item([1], [[2] * 15, [3] * 15]), *(item([1], [[2]]) for _ in range(4))]
    assert "shared" not in collate_choices(items, [False] * 5, 0, "auto")
    assert "shared" not in collate_choices(many(), [False] * 5, 0, "never")
    assert "shared" not in collate_choices(many(), [True] * 5, 0, "auto")
    assert "shared" in collate_choices(many(), [False] * 5, 0, "auto")


def test_mask(tiny_llama):
    segments = torch.tensor([[0, 0, 1, 2, -1]])
    seen = block_mask(tiny_llama, segments)[0, 0]
    expected = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], [1, 1, 0, 0, 1]]
    assert seen.int().tolist() == expected


def test_models_that_can(tiny_llama, make_llama):
    assert can_share(tiny_llama)
    assert can_share(make_llama(attn_implementation="eager"))
    torch.manual_seed(0)
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2))
    assert can_share(gpt.eval())
    alone, together = both(gpt, many())
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-3)


def test_models_that_cannot(tiny_llama, monkeypatch):
    torch.manual_seed(0)
    bloom = BloomForCausalLM(BloomConfig(**TINY, n_layer=2, n_head=4, initializer_range=0.2)).eval()
    mamba = MambaForCausalLM(MambaConfig(**TINY, state_size=4, initializer_range=0.2)).eval()
    assert not can_share(bloom)  # no position ids
    assert not can_share(mamba)  # carries a state
    # One that takes position ids and leaves them aside.
    decoder = tiny_llama.get_decoder()
    forward = decoder.forward

    def deaf(input_ids=None, attention_mask=None, position_ids=None, use_cache=None):
        return forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    monkeypatch.setattr(decoder, "forward", deaf)
    assert not can_share(tiny_llama)


def test_flash_attention_takes_no_such_mask(tiny_llama):
    tiny_llama.config._attn_implementation = "flash_attention_2"
    assert not can_share(tiny_llama)


def test_sliding_windows(tiny_llama):
    sizes = {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    windowed = MistralForCausalLM(MistralConfig(**TINY, **sizes, sliding_window=16))
    assert fits_window(windowed, 16)
    assert not fits_window(windowed, 17)
    assert fits_window(tiny_llama, 10_000)


def test_module_falls_back_to_whole_rows(make_module, make_commonsense, make_trainer, monkeypatch):
    calls = []
    original = score_shared
    monkeypatch.setattr("moka_pl.evaluation.module.score_shared", lambda *a: calls.append(1) or original(*a))

    def validated(**options):
        calls.clear()
        values = make_trainer().validate(make_module(), make_commonsense(**options), verbose=False)[0]
        return len(calls), values

    shared, values = validated(eval_batch_size=4)
    never, whole = validated(eval_batch_size=4, share_prefix="never")
    monkeypatch.setattr("moka_pl.evaluation.module.can_share", lambda model: False)
    fallback, same = validated(eval_batch_size=4)
    assert (shared, never, fallback) == (3, 0, 0)
    assert values == pytest.approx(whole, rel=1e-5)
    assert values == pytest.approx(same, rel=1e-5)
