"""Completions of prompts in batches."""

from types import SimpleNamespace

import pytest
import torch

from moka_pl.adapters import MokaConfig, inject_adapter, merge, unmerge
from moka_pl.inference import complete, context_window
from moka_pl.inference.generation import GREEDY

PROMPTS = [[5, 9, 2, 8, 30, 11], [3, 1], [17, 4, 6], [40] * 12]


class Numbers:
    """Decodes every token to its number."""

    pad_token_id = 0

    def decode(self, tokens, skip_special_tokens):
        return " ".join(map(str, tokens))


@pytest.fixture
def model(tiny_llama):
    tiny_llama.generation_config.eos_token_id = None
    return tiny_llama


def completed(model, prompts=PROMPTS, most=6, **options):
    return complete(model, Numbers(), prompts, most, **(GREEDY | options))


def test_a_batch_has_the_completions_of_its_prompts_alone(model):
    together = completed(model)
    assert together == [completed(model, [prompt])[0] for prompt in PROMPTS]
    assert len({one.text for one in together}) == len(PROMPTS)
    assert {(one.tokens, one.stop_reason) for one in together} == {(6, "length")}


def test_they_are_the_likeliest_tokens(model):
    [found] = completed(model, [PROMPTS[0]])
    ids = torch.tensor([PROMPTS[0]])
    for _ in range(6):
        ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert found.text == Numbers().decode(ids[0, 6:].tolist(), True)


@pytest.mark.parametrize("beams", [1, 2])
def test_every_end_ends_a_turn_and_is_counted(model, beams):
    free = [list(map(int, one.text.split())) for one in completed(model)]
    ends = sorted({free[0][2], free[1][4]})  # two tokens that end a turn
    model.generation_config.eos_token_id = ends
    for tokens, found in zip(free, completed(model), strict=True):
        stop = next((i for i, token in enumerate(tokens) if token in ends), None)
        assert found.text == Numbers().decode(tokens[: None if stop is None else stop + 1], True)
        assert found.stop_reason == ("length" if stop is None else "end_of_turn")
        assert found.tokens == len(found.text.split())
    for found in completed(model, num_beams=beams):
        last = int(found.text.split()[-1])
        assert (last in ends) == (found.stop_reason == "end_of_turn")


@pytest.mark.parametrize("beams", [1, 2])
def test_the_context_ends_each_prompt_by_its_own_length(model, beams):
    window = context_window(model)
    assert window == 64
    # The padding is an end token as well: what the context cuts off did not end its turn.
    model.generation_config.eos_token_id = Numbers.pad_token_id
    with torch.no_grad():
        model.lm_head.weight[0] = 0  # it is never the likeliest
    long, short = [7, 3] * 31, [3, 1]
    found = completed(model, [long, short, long[:60]], 10, num_beams=beams)
    assert [(one.tokens, one.stop_reason) for one in found] == [(2, "length"), (10, "length"), (4, "length")]
    if beams == 1:
        assert found[0] == completed(model, [long], 2)[0]
        assert found[1] == completed(model, [short], 10)[0]


def test_a_model_without_positions_has_no_window(model):
    model.config = SimpleNamespace(get_text_config=SimpleNamespace)
    assert context_window(model) is None


def test_merged_and_unmerged_have_the_same_tokens(model, randomize):
    base = completed(model, most=16)
    inject_adapter(model, MokaConfig(components=3))
    randomize(model)
    adapted = completed(model, most=16)
    merge(model)
    assert completed(model, most=16) == adapted != base
    unmerge(model)
    assert completed(model, most=16) == adapted


def test_options_of_transformers_are_passed_on(model):
    def drawn(seed):
        torch.manual_seed(seed)
        return completed(model, do_sample=True, temperature=3.0, top_k=50)

    assert drawn(0) == drawn(0) != drawn(1)
    repeated = completed(model, most=20)[1].text.split()
    varied = completed(model, most=20, repetition_penalty=5.0)[1].text.split()
    assert len(set(varied)) > len(set(repeated))
