import inspect
from itertools import islice

import pytest
import torch
from torch.nn import functional as F
from transformers import AttentionInterface, BloomConfig, BloomForCausalLM

from moka_pl.adapters import MokaConfig, inject_adapter
from moka_pl.backbone import BackboneConfig, load_backbone
from moka_pl.data.batching.collate import collate_packs, collate_tokens
from moka_pl.errors import ConfigError
from moka_pl.lm import attention
from moka_pl.lm.attention import VARLEN, PackedAttention, varlen_attention
from moka_pl.lm.scoring import score_tokens

LENGTHS = [9, 4, 17, 1, 6]
SIZES = [3, 2]  # examples a pack


def examples(lengths, vocabulary, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(vocabulary, (n,), generator=generator).tolist() for n in lengths]
    return [{"input_ids": row, "labels": row} for row in ids]


def pack(rows, sizes):
    examples = iter(rows)
    return collate_packs([list(islice(examples, size)) for size in sizes], [False] * len(sizes), 0)


def logits(model, packed, batch):
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], use_cache=False, **packed.inputs(batch)).logits


def spans(sizes, lengths, width):
    """(row, start, end) of every example."""
    found, rest = [], iter(lengths)
    for row, size in enumerate(sizes):
        start = 0
        for _ in range(size):
            end = start + next(rest)
            found.append((row, start, end))
            start = end
        assert start <= width
    return found


def check_apart(model, lengths, sizes, vocabulary, tolerance):
    """Packed logits are those of each example alone, and no neighbour changes a bit of them."""
    packed = PackedAttention(model)
    rows, others = examples(lengths, vocabulary), examples(lengths, vocabulary, seed=1)
    batch = pack(rows, sizes)
    found = logits(model, packed, batch)
    places = spans(sizes, lengths, found.shape[1])
    for number, (row, start, end) in enumerate(places):
        with torch.no_grad():
            alone = model(input_ids=torch.tensor([rows[number]["input_ids"]]), use_cache=False).logits[0]
        torch.testing.assert_close(found[row, start:end], alone, rtol=tolerance, atol=tolerance)
        mixed = [rows[i] if i == number else others[i] for i in range(len(rows))]
        changed = logits(model, packed, pack(mixed, sizes))
        assert torch.equal(changed[row, start:end], found[row, start:end])
        assert not torch.equal(changed, found)


@pytest.fixture(params=[{}, {"num_key_value_heads": 4}, {"attn_implementation": "eager"}])
def adapted(request, make_llama, randomize):
    """A tiny LLaMA with adapters: GQA, as many keys as queries, and eager attention."""
    model = make_llama(**request.param)
    inject_adapter(model, MokaConfig(components=3))
    randomize(model)
    return model


def test_examples_are_apart(adapted):
    check_apart(adapted, LENGTHS, SIZES, 96, 1e-4)


@pytest.fixture(scope="module")
def smollm2():
    return load_backbone(BackboneConfig(quantization="none", compute_dtype="float32")).model


@pytest.mark.slow
def test_examples_are_apart_in_smollm2(smollm2):
    # More than 512 tokens: SDPA then goes over the keys in several blocks, whole ones of which are masked.
    packed = PackedAttention(smollm2)
    lengths = [20, 10, 490, 15]
    rows = examples(lengths, 49152)
    batch = pack(rows, [4])
    found = logits(smollm2, packed, batch)[0]
    alone = logits(smollm2, packed, {**pack(rows[3:], [1])})[0, :15]
    torch.testing.assert_close(found[520:535], alone, rtol=1e-3, atol=1e-3)
    others = examples(lengths, 49152, seed=1)
    changed = logits(smollm2, packed, pack([*others[:3], rows[3]], [4]))[0]
    assert torch.equal(changed[520:535], found[520:535])
    assert not torch.equal(changed[30:520], found[100:580])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_padded_batch(adapted, checkpointing):
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    rows = examples(LENGTHS, 96)
    padded, packs = collate_tokens(rows, [False] * len(rows), 0), pack(rows, SIZES)
    expected = score_tokens(adapted, padded["input_ids"], padded["labels"]).nll
    wanted = torch.autograd.grad(expected.sum(), parameters)
    packed = PackedAttention(adapted)
    if checkpointing:
        adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        adapted.train()
    found = score_tokens(adapted, packs["input_ids"], packs["labels"], **packed.inputs(packs)).nll
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert len(found) == sum(LENGTHS) - len(LENGTHS)
    for mine, theirs in zip(torch.autograd.grad(found.sum(), parameters), wanted, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


def test_models_that_cannot(make_llama):
    config = BloomConfig(vocab_size=96, hidden_size=32, n_layer=1, n_head=2)
    with pytest.raises(ConfigError, match=r"BloomForCausalLM takes no position ids.*set packing: false"):
        PackedAttention(BloomForCausalLM(config))

    def leaky(module, query, key, value, attention_mask, scaling=None, **kwargs):
        key, value = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key, value))
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        return out.transpose(1, 2), None

    AttentionInterface.register("leaky", leaky)
    with pytest.raises(ConfigError, match=r"attention 'leaky' lets packed examples attend to each other"):
        PackedAttention(make_llama(attn_implementation="leaky"))


def test_says_why_there_is_no_variable_length_attention(make_llama):
    def reason(**options):
        return str(PackedAttention(make_llama(**options)))

    assert reason() == "block-diagonal attention mask (variable-length attention needs a GPU)"
    assert "attention is eager" in reason(attn_implementation="eager")
    assert "dropout" in reason(attention_dropout=0.1)


def test_training_mode_is_kept(tiny_llama):
    for training in (True, False):
        tiny_llama.train(training)
        PackedAttention(tiny_llama)
        assert tiny_llama.training is training


# The variable-length attention, with a plain one in the place of the GPU's.


def segmentwise(q, k, v, starts, scale):
    out = []
    for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        parts = [x[start:end].transpose(0, 1) for x in (q, k, v)]
        parts[1:] = [x.repeat_interleave(q.shape[1] // k.shape[1], dim=0) for x in parts[1:]]
        out.append(F.scaled_dot_product_attention(*parts, is_causal=True, scale=scale).transpose(0, 1))
    return torch.cat(out)


def later(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
    assert window_size == (-1, 0)
    assert enable_gqa or q.shape[1] == k.shape[1]
    assert cu_seq_q is cu_seq_k
    assert max_q == max_k == int(cu_seq_q.diff().max())
    return segmentwise(q, k, v, cu_seq_q, scale)


def first(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    assert window_size == (-1, 0)
    assert q.shape[1] == k.shape[1]
    return segmentwise(q, k, v, cu_seq_q, scale)


@pytest.fixture(params=[first, later])
def varlen(request, monkeypatch):
    """As if on a GPU, with torch's function in its first form and in a later one."""
    module = pytest.importorskip("torch.nn.attention.varlen")
    assert set(inspect.signature(request.param).parameters) - {"q", "k", "v"} <= set(
        inspect.signature(module.varlen_attn).parameters
    )
    monkeypatch.setattr(module, "varlen_attn", request.param)
    monkeypatch.setattr(attention, "_HALF", (torch.float32,))
    monkeypatch.setattr(attention, "_varlen_unsupported_reason", lambda model: None)


@pytest.mark.usefixtures("varlen")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_variable_length_attention_in_a_model(make_llama, randomize, checkpointing):
    def build():
        model = make_llama()
        inject_adapter(model, MokaConfig(components=3))
        randomize(model)
        return model

    model, plain = build(), build()
    rows = examples(LENGTHS, 96)
    padded, packs = collate_tokens(rows, [False] * len(rows), 0), pack(rows, SIZES)
    packed = PackedAttention(model)
    assert str(packed) == "variable-length attention"
    assert model.config._attn_implementation == VARLEN
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    mine, theirs = (
        score_tokens(model, packs["input_ids"], packs["labels"], **packed.inputs(packs)).nll,
        score_tokens(plain, padded["input_ids"], padded["labels"]).nll,
    )
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    mine.sum().backward()
    theirs.sum().backward()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        if b.requires_grad:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4 * float(b.grad.abs().max()))
    # What is not packed is computed as before, to the bit, with and without a mask.
    model.eval()
    mask = torch.ones_like(padded["input_ids"])
    mask[0, :3] = 0
    for extra in ({}, {"attention_mask": mask}):
        with torch.no_grad():
            ids = padded["input_ids"]
            assert torch.equal(model(input_ids=ids, **extra).logits, plain(input_ids=ids, **extra).logits)


@pytest.mark.usefixtures("varlen")
@pytest.mark.parametrize("scaling", [None, 0.7])
def test_scaling_of_the_scores(scaling):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 8, 16, generator=generator) for heads in (4, 2, 2))
    starts = torch.tensor([0, 8, 11, 16], dtype=torch.int32)
    out, _ = varlen_attention(
        None, q, k, v, None, scaling=scaling, cu_seq_lens_q=starts, max_length_q=8, cu_seq_lens_k=starts
    )
    flat = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
    expected = segmentwise(*flat, starts, scaling).view(2, 8, 4, 16)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
