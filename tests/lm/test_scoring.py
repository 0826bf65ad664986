import pytest
import torch
from torch.nn import functional as F
from transformers import Gemma2Config, Gemma2ForCausalLM

from moka_pl.adapters import MokaConfig, inject_adapter
from moka_pl.backbone import BackboneConfig, load_backbone
from moka_pl.lm.scoring import predicted, row_sums, score_tokens

LENGTHS = (9, 4, 12, 6)
PROMPTS = (3, 1, 11, 2)
VOCABULARY = 64


@pytest.fixture
def batch():
    """Token ids and labels of four rows of different lengths, padded on the right."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(VOCABULARY, (4, 16), generator=generator)
    labels = torch.full_like(ids, -100)
    for row, (prompt, length) in enumerate(zip(PROMPTS, LENGTHS, strict=True)):
        labels[row, prompt:length] = ids[row, prompt:length]
        ids[row, length:] = 0
    labels[2, 5] = ids[2, 5]  # a second trained stretch in one row
    return ids, labels


@pytest.fixture
def adapted(tiny_llama, randomize):
    inject_adapter(tiny_llama, MokaConfig(components=3))
    randomize(tiny_llama)
    return tiny_llama


def by_row(model, ids, labels):
    """Negative log-likelihoods from the full logits of one unpadded row after another."""
    found = []
    with torch.no_grad():
        for row, length in enumerate(LENGTHS):
            logits = model(input_ids=ids[row : row + 1, :length]).logits[0].float()
            logs = logits.log_softmax(-1)
            found += [
                (row, -logs[i - 1, labels[row, i]].item()) for i in range(1, length) if labels[row, i] >= 0
            ]
    return found


def check(model, batch):
    ids, labels = batch
    scores = score_tokens(model, ids, labels)
    rows, values = zip(*by_row(model, ids, labels), strict=True)
    assert len(values) == sum(LENGTHS) - sum(PROMPTS) + 1
    assert scores.row.tolist() == list(rows)
    assert scores.nll.dtype == torch.float32
    torch.testing.assert_close(scores.nll, torch.tensor(values), rtol=1e-4, atol=1e-5)


def test_an_evaluation_computes_few_logits_at_a_time(adapted, batch, monkeypatch):
    monkeypatch.setattr("moka_pl.lm.scoring._PART", 5)
    sizes = []
    adapted.get_output_embeddings().register_forward_hook(lambda _, args, out: sizes.append(len(out)))
    expected = score_tokens(adapted, *batch)
    assert sizes == [len(expected.nll)]
    with torch.no_grad():
        found = score_tokens(adapted, *batch)
    assert sizes[1:] == [5, 5, 5]
    torch.testing.assert_close(found.nll, expected.nll.detach(), rtol=1e-5, atol=1e-6)
    assert torch.equal(found.row, expected.row)


def test_no_labelled_token_is_no_error(adapted, batch):
    ids, labels = batch
    with torch.no_grad():
        assert score_tokens(adapted, ids, torch.full_like(labels, -100)).nll.shape == (0,)


def test_equals_the_models_cross_entropy(adapted, batch):
    check(adapted, batch)
    ids, labels = batch
    logits = adapted(input_ids=ids).logits[:, :-1].flatten(0, 1)
    whole = F.cross_entropy(logits, labels[:, 1:].flatten())
    torch.testing.assert_close(score_tokens(adapted, ids, labels).nll.mean(), whole)


def test_equals_the_cross_entropy_of_a_quantised_base(batch):
    check(load_backbone(BackboneConfig(name="tiny", weights="random")).model.eval(), batch)


def test_capped_logits_are_capped(batch):
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=0.5,
        initializer_range=0.5,
    )
    check(Gemma2ForCausalLM(config).eval(), batch)


def test_padding_changes_nothing(adapted, batch):
    ids, labels = batch
    before = score_tokens(adapted, ids, labels)
    other = ids.clone()
    for row, length in enumerate(LENGTHS):
        other[row, length:] = 17 + row
    after = score_tokens(adapted, other, labels)
    assert torch.equal(before.nll, after.nll)
    wider = torch.nn.functional.pad
    more = score_tokens(adapted, wider(ids, (0, 8), value=3), wider(labels, (0, 8), value=-100))
    torch.testing.assert_close(more.nll, before.nll)


def test_first_token_has_nothing_to_predict_it(adapted, batch):
    ids, labels = batch
    first = labels.clone()
    first[:, 0] = ids[:, 0]
    assert torch.equal(score_tokens(adapted, ids, first).nll, score_tokens(adapted, ids, labels).nll)


def test_gradients_equal_those_of_the_full_logits(adapted, batch):
    ids, labels = batch
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    own = torch.autograd.grad(score_tokens(adapted, ids, labels).nll.sum(), parameters)
    logits = adapted(input_ids=ids).logits[:, :-1].flatten(0, 1)
    full = torch.autograd.grad(F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum"), parameters)
    for mine, theirs in zip(own, full, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_batch_without_labels(adapted, batch):
    ids, labels = batch
    scores = score_tokens(adapted, ids, torch.full_like(labels, -100))
    total = scores.nll.sum()
    assert (scores.nll.shape, total.item()) == ((0,), 0.0)
    total.backward()  # a rank with fillers only still takes part in the backward pass
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)


def test_row_sums(adapted, batch):
    ids, labels = batch
    sums = row_sums(score_tokens(adapted, ids, labels), 4)
    expected = [0.0] * 4
    for row, value in by_row(adapted, ids, labels):
        expected[row] += value
    torch.testing.assert_close(sums, torch.tensor(expected), rtol=1e-4, atol=1e-5)
    labels = labels.clone()
    labels[3] = -100
    assert row_sums(score_tokens(adapted, ids, labels), 4)[3] == 0


def test_tokens_found_before_are_scored_alike(tiny_llama):
    ids = torch.arange(3, 25).view(2, 11)
    labels = ids.where(ids % 4 != 0, -100)
    found, expected = score_tokens(tiny_llama, ids, predicted(labels)), score_tokens(tiny_llama, ids, labels)
    assert torch.equal(found.nll, expected.nll)
    assert torch.equal(found.row, expected.row)
    assert torch.equal(predicted(labels).tokens, labels[:, 1:][labels[:, 1:] != -100])
