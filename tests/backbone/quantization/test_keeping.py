"""That 4-bit layers compute with one W, also where bitsandbytes misreads rows on this CPU."""

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from shared.four_bits import quantised, read_by_hand
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from moka_pl.adapters import MokaConfig, inject_adapter
from moka_pl.backbone import BackboneConfig, load_backbone
from moka_pl.backbone.quantization import dense_weight, is_quantised, keep_weights, keeping
from moka_pl.backbone.random_weights import byte_tokenizer
from moka_pl.export.merged import merged_parts
from moka_pl.lm.replaced_forward import forward_maker

MISREAD = pytest.mark.usefixtures("misread")


@pytest.fixture(params=[False, True], ids=["as it is here", "as on CPUs that misread"])
def misread(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on any CPU: the forward method that reads right must be right everywhere."""
    if request.param:
        monkeypatch.setattr(keeping, "_reads_rows", lambda *_: False)


@pytest.mark.parametrize("double", [False, True])
def test_evaluation_leaves_the_weights_as_they_are(double: bool) -> None:
    layer = quantised(128, compress_statistics=double)
    before = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    keep_weights(layer)
    with torch.no_grad():
        layer.eval()(torch.randn(3, 128))
    after = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert after.dtype is torch.float32
    assert torch.equal(before, after)


def test_storage_of_an_earlier_evaluation_is_undone() -> None:
    layer = quantised(128)
    before = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    data, state = bnb.functional._convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
    layer.weight.data, layer.weight.quant_state = data, state
    keep_weights(layer)
    after = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    # The scales were rounded to bfloat16 on the way.
    torch.testing.assert_close(after, before, atol=1e-3, rtol=2e-2)


def test_adapters_switch_it_off_in_layers_that_come_from_elsewhere() -> None:
    model = nn.Sequential(nn.Linear(128, 128), quantised(128))
    inject_adapter(model, MokaConfig(target_modules=["1"]))
    assert model[1].base_layer.support_avx512bf16_for_cpu is False


@pytest.mark.parametrize("entries", [64, 96])
def test_the_trial_says_what_bitsandbytes_does(entries: int) -> None:
    keeping._reads_rows.cache_clear()
    layer = quantised(entries)
    found = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert keeping._reads_rows(entries, 64, "nf4") == torch.equal(found, read_by_hand(layer))


def test_other_layers_are_left_alone() -> None:
    layer = nn.Linear(96, 8)
    assert not is_quantised(layer)
    keep_weights(layer)
    assert not hasattr(layer, "support_avx512bf16_for_cpu")


def test_layers_that_bitsandbytes_reads_right_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "_reads_rows", lambda *_: False)
    even, uneven = quantised(128), quantised(96)
    keep_weights(even)  # rows of whole blocks are not asked about
    assert forward_maker(even) is None
    monkeypatch.setattr(keeping, "_reads_rows", lambda *_: True)
    keep_weights(uneven)
    assert type(uneven) is bnb.nn.Linear4bit


@MISREAD
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize(("m", "n"), [(40, 48), (40, 96), (24, 16), (7, 80), (4, 33)])
def test_uneven_rows_are_multiplied_right(m: int, n: int, kind: str, double: bool) -> None:
    layer = quantised(n, m, quant_type=kind, compress_statistics=double)
    keep_weights(layer)
    for _ in range(2):  # again: adapters ask for it, too
        keep_weights(layer)
    weight, x = read_by_hand(layer), torch.randn(2, 5, n, requires_grad=True)
    for training in (True, False):
        out = layer.train(training)(x)
        torch.testing.assert_close(out, F.linear(x, weight, layer.bias))
        torch.testing.assert_close(torch.autograd.grad(out.sum(), x)[0], weight.sum(0).expand_as(x))
    with torch.no_grad():
        assert layer(x.bfloat16()).dtype is torch.bfloat16
        torch.testing.assert_close(layer(x[0, 0]), F.linear(x[0, 0], weight, layer.bias))
    assert isinstance(layer, bnb.nn.Linear4bit)
    assert type(layer).__name__ == "Linear4bit"
    assert is_quantised(layer)


def test_all_block_sizes_are_read_right() -> None:
    for blocksize in (32, 128, 512, 4096):
        layer = quantised(80, 70)
        data, state = bnb.functional.quantize_4bit(torch.randn(70, 80), blocksize=blocksize, quant_type="nf4")
        layer.weight.data, layer.weight.quant_state = data, state
        keep_weights(layer)
        assert torch.equal(dense_weight(layer), read_by_hand(layer))
        torch.testing.assert_close(layer(torch.eye(80)).T - layer.bias[:, None], read_by_hand(layer))


def _pickled(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # type: ignore[no-any-return]


@MISREAD
@pytest.mark.parametrize("copied", [copy.deepcopy, _pickled])
def test_copies_read_right(copied: Any) -> None:
    layer = quantised(48, 40)
    keep_weights(layer)
    x = torch.randn(3, 48)
    assert torch.equal(copied(layer)(x), layer(x))


@MISREAD
def test_compiled_models_read_right() -> None:
    layer = quantised(48, 40)
    keep_weights(layer)
    x = torch.randn(3, 48, requires_grad=True)
    out = torch.compile(nn.Sequential(layer, nn.ReLU()), backend="aot_eager")(x)
    expected = F.linear(x, read_by_hand(layer), layer.bias).relu()
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), x)[0] for y in (out, expected)))


@pytest.fixture
def pair(make_llama: Callable, tmp_path: Path) -> tuple[Any, LlamaForCausalLM]:
    """A tiny model of uneven rows in nf4, and its dense twin with weights that are read by hand."""
    sizes = {"vocab_size": 261, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 1}
    twin = make_llama(**sizes)
    twin.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    model = load_backbone(BackboneConfig(str(tmp_path), quantization="nf4")).model
    layers = {name: layer for name, layer in model.named_modules() if is_quantised(layer)}
    assert len(layers) == 7
    for name, layer in layers.items():
        twin.get_submodule(name).weight.data = read_by_hand(layer)
    return model, twin.requires_grad_(False)


def _run(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and the gradient of the inputs."""
    inputs = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=inputs).logits
    return logits, torch.autograd.grad(logits.square().sum(), inputs)[0]


def test_a_model_of_uneven_rows_computes_with_its_own_weights(pair: tuple[Any, Any]) -> None:
    ids = torch.arange(4, 22).view(2, 9)
    for training in (True, False):
        found, expected = (_run(model.train(training), ids) for model in pair)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    first, second = (model.generate(ids, **options) for model in pair)
    assert torch.equal(first, second)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]], ids=str)
def test_adapters_fit_such_a_model(targets: Any, pair: tuple[Any, Any], randomize: Callable) -> None:
    ids, (model, twin) = torch.arange(4, 22).view(2, 9), pair
    for one in pair:
        inject_adapter(one, MokaConfig(components=2, target_modules=targets))
    torch.testing.assert_close(_run(model, ids), _run(twin, ids), atol=1e-4, rtol=1e-4)
    randomize(model)
    randomize(twin)
    for training in (True, False):
        found, expected = (_run(one.train(training), ids) for one in pair)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    merged, dense = ({part.name: part.make() for part in merged_parts(one)} for one in pair)
    torch.testing.assert_close(merged, dense)
