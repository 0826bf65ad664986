"""The variable-length attention on a GPU; run with ``pytest -m gpu``."""

import pytest
import torch
from torch import nn

from moka_pl.adapters import MokaConfig, inject_adapter, moka_layers
from moka_pl.backbone import BackboneConfig, load_backbone
from moka_pl.backbone.quantization import is_quantised
from moka_pl.data.batching.collate import collate_packs, collate_tokens
from moka_pl.lm.attention import VARLEN, PackedAttention
from moka_pl.lm.scoring import score_tokens

pytestmark = pytest.mark.gpu

LENGTHS, SIZES = [130, 57, 300, 5, 64, 191], [3, 3]
# bfloat16 keeps 8 bits: a rounding error is 2**-9 of a value, and those of a dozen roundings a layer on the
# way add up like a random walk. Two ways of computing the same then differ by some 2**-9 * sqrt(12 * layers):
# 1% at 2 layers, 4% at 30. Examples that see each other differ by tens of per cents.
LOOSE = {"tiny": 2e-2, "llama3-1b": 5e-2, "smollm2-135m-instruct": 5e-2}


def _model(name: str, dtype: str = "bfloat16", quantization: str = "nf4") -> nn.Module:
    """A base with adapters of ordinary size on q and v."""
    weights = "pretrained" if name == "smollm2-135m-instruct" else "random"
    options = {"weights": weights, "quantization": quantization, "compute_dtype": dtype}
    model = load_backbone(BackboneConfig(name=name, **options), "cuda").model
    torch.manual_seed(0)
    inject_adapter(model, MokaConfig())
    with torch.no_grad():
        for layer in moka_layers(model).values():
            layer.moka_gate.normal_()
            layer.moka_B.normal_(std=0.005)
    return model


def _examples(vocabulary: int, seed: int = 0) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(vocabulary, (n,), generator=generator).tolist() for n in LENGTHS]
    return [{"input_ids": row, "labels": row} for row in ids]


def _batch(rows: list[dict], packed: bool) -> dict:
    packs = [rows[:3], rows[3:]]
    assert [len(pack) for pack in packs] == SIZES
    batch = collate_packs(packs, [False] * 2, 0) if packed else collate_tokens(rows, [False] * len(rows), 0)
    return {key: x.cuda() if isinstance(x, torch.Tensor) else x for key, x in batch.items()}


def _spans() -> list[tuple[int, int, int]]:
    """(row, start, end) of every example."""
    found, rest = [], iter(LENGTHS)
    for row, size in enumerate(SIZES):
        start = 0
        for _ in range(size):
            end = start + next(rest)
            found.append((row, start, end))
            start = end
    return found


def _error(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float((value.double() - reference.double()).norm() / reference.double().norm())


def _widen(model: nn.Module) -> None:
    """Lets a model compute in float32 with the same weights."""
    nn.Module.float(model)  # transformers' own refuses where there are 4-bit weights
    for module in model.modules():
        if is_quantised(module):
            module.compute_dtype = torch.float32


@pytest.mark.parametrize("name", LOOSE)
def test_packed_logits_are_those_of_single_examples(name: str) -> None:
    model = _model(name)
    vocabulary = model.config.vocab_size
    rows, others = _examples(vocabulary), _examples(vocabulary, seed=1)
    with torch.no_grad():
        alone = [model(torch.tensor([row["input_ids"]], device="cuda")).logits[0] for row in rows]
        packed = PackedAttention(model)
        assert packed.unsupported_reason is None
        assert model.config._attn_implementation == VARLEN
        batch = _batch(rows, packed=True)
        found = model(batch["input_ids"], **packed.inputs(batch)).logits
        for number, (row, start, end) in enumerate(_spans()):
            mixed = _batch([rows[i] if i == number else others[i] for i in range(len(rows))], packed=True)
            changed = model(mixed["input_ids"], **packed.inputs(mixed)).logits
            # The same shapes: every row of a product and every example's attention is computed alike.
            assert torch.equal(changed[row, start:end], found[row, start:end])
            assert not torch.equal(changed, found)
        _widen(model)
        exact = [model(torch.tensor([row["input_ids"]], device="cuda")).logits[0] for row in rows]
    # No farther from float32 than bfloat16 is anyway.
    noise = [_error(value, reference) for value, reference in zip(alone, exact, strict=True)]
    bounds = [1.5 * error + 1e-3 for error in noise]
    if name == "smollm2-135m-instruct":
        # Trained weights make a few large values, whose rounding moves an example by up to a factor of four
        # from one order of summation to another: the largest error of all examples is the measure.
        bounds = len(noise) * [3 * max(noise) + 1e-3]
    for reference, bound, (row, start, end) in zip(exact, bounds, _spans(), strict=True):
        assert _error(found[row, start:end], reference) < bound


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["tiny", "smollm2-135m-instruct"])
def test_packed_gradients_are_those_of_the_padded_batch(name: str, checkpointing: bool) -> None:
    model = _model(name)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    rows = _examples(model.config.vocab_size)
    padded, packs = _batch(rows, packed=False), _batch(rows, packed=True)
    expected = score_tokens(model, padded["input_ids"], padded["labels"]).nll
    wanted = torch.autograd.grad(expected.sum(), parameters)
    packed = PackedAttention(model)
    found = score_tokens(model, packs["input_ids"], packs["labels"], **packed.inputs(packs)).nll
    got = torch.autograd.grad(found.sum(), parameters)
    assert found.shape == expected.shape
    assert _error(found, expected) < LOOSE[name]
    # Both round. A gate's gradient is a difference of large sums, which rounding may spoil on its own.
    assert _error(*(torch.cat([g.flatten() for g in grads]) for grads in (got, wanted))) < 2 * LOOSE[name]
    errors = {name: _error(*pair) for name, *pair in zip(names, got, wanted, strict=True)}
    assert max(error for name, error in errors.items() if "gate" not in name) < 0.25


def test_float16_uses_it_too() -> None:
    packed = PackedAttention(_model("tiny", dtype="float16"))
    assert packed.unsupported_reason is None


def test_float32_has_a_block_mask() -> None:
    model = _model("tiny", dtype="float32", quantization="none")
    packed = PackedAttention(model)
    assert "bfloat16 or float16, not float32" in str(packed)
    rows = _examples(model.config.vocab_size)
    batch = _batch(rows, packed=True)
    with torch.no_grad():
        found = model(batch["input_ids"], **packed.inputs(batch)).logits
        for number, (row, start, end) in enumerate(_spans()):
            alone = model(torch.tensor([rows[number]["input_ids"]], device="cuda")).logits[0]
            torch.testing.assert_close(found[row, start:end], alone, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (9, 3)])
@pytest.mark.parametrize("size", [64, 128, 248])
def test_kernel_agrees_with_float64(heads: tuple[int, int], size: int) -> None:
    from torch.nn import functional as F

    from moka_pl.lm.attention import varlen_attention

    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(2, count, 96, size) for count in (heads[0], heads[1], heads[1])]
    q, k, v = (
        torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=generator).requires_grad_()
        for shape in shapes
    )
    starts = torch.tensor([0, 40, 41, 96, 192], dtype=torch.int32, device="cuda")
    out, _ = varlen_attention(
        nn.Identity(), q, k, v, None, scaling=size**-0.5, cu_seq_lens_q=starts, max_length_q=96
    )
    upstream = torch.randn(out.shape, device="cuda", dtype=torch.bfloat16, generator=generator)
    found = [out, *torch.autograd.grad(out, (q, k, v), upstream)]

    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    flat = [x.transpose(1, 2).flatten(0, 1) for x in wide]
    flat[1:] = [x.repeat_interleave(heads[0] // heads[1], dim=1) for x in flat[1:]]
    parts = [
        F.scaled_dot_product_attention(*(x[a:b].transpose(0, 1) for x in flat), is_causal=True)
        for a, b in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)
    ]
    target = torch.cat([part.transpose(0, 1) for part in parts]).view(out.shape)
    wanted = [target, *torch.autograd.grad(target, wide, upstream.double())]
    assert all(_error(mine, theirs) < 1e-2 for mine, theirs in zip(found, wanted, strict=True))


def test_fit_packs_on_a_4bit_model(tmp_path) -> None:
    import lightning.pytorch as pl

    from moka_pl.data import InstructionData
    from moka_pl.training.module import MokaModule

    module = MokaModule(
        BackboneConfig(name="tiny", weights="random", compute_dtype="bfloat16"),
        MokaConfig(),
        optimizer=lambda p: torch.optim.AdamW(p, lr=2e-2),
        gradient_checkpointing=True,
    )
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="gpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
    )
    data = InstructionData("sample", prompt="alpaca", packing=True, batch_size=4)
    trainer.validate(module, datamodule=data)
    before = module.eval_values["val/loss"]
    trainer.fit(module, datamodule=data)
    assert module.causal_lm.config._attn_implementation == VARLEN
    assert module.eval_values["val/loss"] < before
