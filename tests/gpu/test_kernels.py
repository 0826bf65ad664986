"""Liger's kernels in a frozen base, beside plain transformers; run with ``pytest -m gpu``."""

import copy
from typing import Any

import pytest
import torch
import transformers as T
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from moka_pl.adapters import FullFineTuning, MokaConfig, inject_adapter
from moka_pl.backbone import BackboneConfig, load_backbone
from moka_pl.data.batching.collate import collate_packs
from moka_pl.inference import generate_texts
from moka_pl.lm.attention import PackedAttention
from moka_pl.lm.cuda_graphs import PATIENCE, StepCapture, fix_size
from moka_pl.lm.kernels import fuse_kernels, fused_modules
from moka_pl.lm.scoring import score_tokens
from moka_pl.studies.common import free_memory

pytestmark = pytest.mark.gpu

#: Of a model's gradients, relative: rounding errors of two ways of computing the same.
BOUNDS = {"float32": 1e-3, "bfloat16": 5e-2}
SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {
    "qwen2": (T.Qwen2Config, SIZES),
    "qwen3": (T.Qwen3Config, SIZES | {"head_dim": 16}),
    "gemma2": (T.Gemma2Config, SIZES | {"head_dim": 16, "query_pre_attn_scalar": 16}),
    "gemma3": (T.Gemma3TextConfig, SIZES | {"head_dim": 16, "query_pre_attn_scalar": 16}),
    "granite": (T.GraniteConfig, SIZES | {"logits_scaling": 4.0}),
    "phi3": (T.Phi3Config, SIZES),
}


Step = tuple[Tensor, list[Tensor]]
"""Loss and gradients."""


def adapted(kernels: Any, dtype: str = "float32", adapter: Any = None, quantization: str = "nf4") -> Any:
    """A base of two layers with adapters of ordinary size."""
    options: Any = {"weights": "random", "quantization": quantization, "compute_dtype": dtype}
    loaded = load_backbone(BackboneConfig("tiny", kernels=kernels, **options), "cuda")
    model = loaded.model
    assert any("fused kernels: Liger" in note for note in loaded.notes) == (kernels == "auto"), loaded.notes
    assert bool(fused_modules(model)) == (kernels == "auto")
    torch.manual_seed(0)
    model.is_loaded_in_4bit = quantization == "nf4"
    inject_adapter(model, adapter or MokaConfig(target_modules="all-linear", components=4))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and quantization == "nf4":
                parameter += 0.05 * torch.randn_like(parameter)
    return model.train()


def batch(rows: int = 3, length: int = 40) -> dict[str, Tensor]:
    ids = torch.randint(3, 320, (rows, length), generator=torch.Generator().manual_seed(rows)).cuda()
    labels = ids.clone()
    labels[:, : length // 2] = -100
    return {"input_ids": ids, "labels": labels}


def packs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, 320, (n,), generator=generator).tolist() for n in (30, 7, 13, 21)]
    rows: list[Any] = [{"input_ids": row, "labels": row} for row in ids]
    packed: Any = collate_packs([rows[:2], rows[2:]], [False] * 2, 0)
    return {key: x.cuda() if isinstance(x, Tensor) else x for key, x in packed.items()}


def step(model: Any, data: dict[str, Any]) -> Step:
    more = PackedAttention(model).inputs(data) if "position_ids" in data else {}
    loss = score_tokens(model, data["input_ids"], data["labels"], **more).nll.sum()
    return loss.detach(), list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))


def assert_same(found: Step, expected: Step, dtype: str) -> None:
    assert found[0].item() == pytest.approx(expected[0].item(), rel=BOUNDS[dtype])
    assert error(found, expected) < BOUNDS[dtype]


def error(found: Step, expected: Step) -> float:
    """Relative difference of the gradients."""
    differences = [(a.float() - b.float()).norm() for a, b in zip(found[1], expected[1], strict=True)]
    return float(
        torch.stack(differences).norm() / torch.stack([b.float().norm() for b in expected[1]]).norm()
    )


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_is_that_of_plain_transformers(dtype: str, packed: bool, checkpointing: bool) -> None:
    data, results = packs() if packed else batch(), []
    for kernels in ("auto", "none"):
        model = adapted(kernels, dtype)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        results.append(step(model, data))
    assert_same(results[0], results[1], dtype)


@pytest.mark.parametrize("name", ["LoRA", "DoRA", "IA3", "full"])
def test_other_methods_compute_the_same(name: str) -> None:
    peft = pytest.importorskip("peft")
    targets = {"target_modules": "all-linear"}
    make = {
        "LoRA": lambda: peft.LoraConfig(r=4, **targets),
        "DoRA": lambda: peft.LoraConfig(r=4, use_dora=True, **targets),
        "IA3": lambda: peft.IA3Config(target_modules=["k_proj", "up_proj"], feedforward_modules=["up_proj"]),
        "full": FullFineTuning,
    }[name]
    quantization = "none" if name == "full" else "nf4"
    results = [step(adapted(k, "float32", make(), quantization), batch()) for k in ("auto", "none")]
    assert_same(results[0], results[1], "float32")


@pytest.mark.parametrize("dtype", BOUNDS)
def test_a_replayed_step_is_that_of_plain_transformers(dtype: str) -> None:
    model, data = adapted("auto", dtype), batch()
    capture, params = StepCapture(model), [p for p in model.parameters() if p.requires_grad]
    for _ in range(PATIENCE + 2):
        loss = capture(fix_size(data))
        found = loss.detach(), list(torch.autograd.grad(loss, params))
    assert capture.graphs == 1
    assert_same(found, step(adapted("none", dtype), data), dtype)


def test_the_same_step_twice_has_the_same_bits_in_deterministic_mode() -> None:
    model = adapted("auto", "bfloat16")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        first, second = step(model, batch()), step(model, batch())
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


def test_generation_is_that_of_plain_transformers() -> None:
    texts = []
    for kernels in ("auto", "none"):
        config: Any = {"weights": "random", "quantization": "none", "compute_dtype": "float32"}
        loaded = load_backbone(BackboneConfig("tiny", kernels=kernels, **config), "cuda")
        inject_adapter(loaded.model, MokaConfig())
        ids = batch(rows=2, length=12)["input_ids"]
        mask = torch.ones_like(ids)
        mask[0, :5] = 0  # padded on the left
        texts.append(generate_texts(loaded.model, loaded.tokenizer, ids, mask, max_new_tokens=16))
    assert texts[0] == texts[1]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_kind_of_architecture_computes_the_same(name: str) -> None:
    kind, options = CONFIGS[name]
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(kind(**options), dtype=torch.bfloat16)
    model = model.cuda().eval().requires_grad_(False)
    exact = copy.deepcopy(model).float()
    reference = to_embeddings(exact)
    plain = to_embeddings(model)
    for one in (exact, model):
        assert fuse_kernels(one).startswith("fused kernels: Liger")
    assert_same(to_embeddings(exact), reference, "float32")
    # How far bfloat16 is off depends on the model: some magnify each rounding.
    assert error(to_embeddings(model), reference) < 1.5 * error(plain, reference)


def to_embeddings(model: Any) -> Step:
    """A loss, and its gradient to the embeddings."""
    embeddings = model.get_input_embeddings()(batch()["input_ids"]).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings, use_cache=False).logits.float()
    loss = logits.logsumexp(-1).sum()
    return loss.detach(), list(torch.autograd.grad(loss, embeddings))


def test_the_input_of_an_adapted_down_projection_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for keeping in (False, True, False):  # the first run makes what is made once for all
        free_memory()  # models of earlier runs, which would be given back in the middle of this one
        before = torch.cuda.memory_allocated()
        if keeping:
            monkeypatch.setattr("moka_pl.lm.kernels.without_product", lambda forward: forward)
        else:
            monkeypatch.undo()
        model, data = adapted("auto", "bfloat16"), batch(8, 256)
        loss = score_tokens(model, data["input_ids"], data["labels"]).nll.sum()
        held = torch.cuda.memory_allocated() - before
        grads = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
        results.append((held, loss.detach(), grads))
        del model, loss
    results = results[1:]
    config = BackboneConfig("tiny", weights="random")
    width = load_backbone(config, "cpu").model.config.intermediate_size
    assert results[0][0] - results[1][0] >= 2 * 8 * 256 * width * 2  # of both layers, in bfloat16
    assert torch.equal(results[0][1], results[1][1])
    assert all(torch.equal(one, other) for one, other in zip(results[0][2], results[1][2], strict=True))
