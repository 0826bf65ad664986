"""That 4-bit layers keep their weights, and that rows which bitsandbytes misreads are refused."""

import gc
import logging
import weakref

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from moka_pl.adapters import MokaConfig, inject_adapter
from moka_pl.backbone.quantization import (
    base_bytes,
    dense_weight,
    four_bit,
    frozen_output,
    is_quantised,
    keep_weights,
    kernel_weight,
    quantised_linear,
    weight_bytes,
    without_kept_scales,
)
from moka_pl.errors import BackboneError


def quantised(n: int, m: int = 64, **options) -> bnb.nn.Linear4bit:
    torch.manual_seed(0)
    dense = nn.Linear(n, m)
    layer = bnb.nn.Linear4bit(n, m, compute_dtype=torch.float32, quant_type="nf4", **options)
    layer.load_state_dict(dense.state_dict())
    layer.to("cpu").requires_grad_(False)
    # As on a CPU with bfloat16 instructions, whatever this one has.
    layer.support_avx512bf16_for_cpu = True
    return layer


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


def test_rows_that_are_misread_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(four_bit, "_reads_rows", lambda *_: False)
    keep_weights(nn.Sequential(quantised(128)))  # rows of whole blocks are not asked about
    with pytest.raises(BackboneError, match=r"0: .* rows of 96 entries .* block size 64.*quantization: none"):
        keep_weights(nn.Sequential(quantised(96)))
    monkeypatch.setattr(four_bit, "_reads_rows", lambda *_: True)
    keep_weights(nn.Sequential(quantised(96)))


@pytest.mark.parametrize("entries", [64, 96])
def test_the_trial_says_what_a_layer_does(entries: int) -> None:
    four_bit._reads_rows.cache_clear()
    layer = quantised(entries)
    state = layer.weight.quant_state
    scales = bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    numbers = torch.stack([layer.weight.data.flatten() >> 4, layer.weight.data.flatten() & 15], 1).flatten()
    expected = (state.code[numbers.long()] * scales.float().repeat_interleave(64)).view(64, entries)
    found = bnb.functional.dequantize_4bit(layer.weight.data, state)
    assert four_bit._reads_rows(entries, 64, "nf4") == torch.allclose(found, expected, atol=1e-5)


def test_other_layers_are_left_alone() -> None:
    layer = nn.Linear(96, 8)
    assert not is_quantised(layer)
    keep_weights(layer)
    assert not hasattr(layer, "support_avx512bf16_for_cpu")


def test_its_hint_at_another_package_is_kept_back(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    hints = logging.getLogger("bitsandbytes.backends.cpu.ops")
    caplog.set_level(logging.WARNING, hints.name)  # the command line raises it for the whole process
    monkeypatch.setattr(four_bit, "import_module", lambda name: hints.warning("%s: install kernels", name))
    four_bit.import_bitsandbytes()
    assert not caplog.records
    hints.warning("something else, later")
    assert [record.getMessage() for record in caplog.records] == ["something else, later"]


def test_other_storages_are_left_to_bitsandbytes() -> None:
    pytest.importorskip("triton")
    for kind, read in (("nf4", True), ("fp4", False)):
        layer = quantised_linear(nn.Linear(128, 32), torch.randn(32, 128), kind, True, torch.float32)
        assert (kernel_weight(layer, torch.float32, even=True) is not None) is read
    # What is not float32 would be rounded twice.
    half = quantised_linear(nn.Linear(128, 32), torch.randn(32, 128).half(), "nf4", True, torch.float16)
    assert kernel_weight(half, torch.bfloat16, even=True) is None


@pytest.mark.parametrize("double", [False, True])
def test_plain_scales_give_the_same_weight_and_product_bit_for_bit(double: bool) -> None:
    layer = quantised(128, compress_statistics=double)
    x = torch.randn(5, 128)
    for _ in range(2):  # the second time they are there already
        assert torch.equal(dense_weight(layer, often=True), dense_weight(layer))
        assert torch.equal(frozen_output(layer, False, x), layer.train()(x))
    new = bnb.nn.Params4bit(torch.randn(64, 128), requires_grad=False, compress_statistics=double)
    layer.weight = new.to("cpu")
    assert torch.equal(dense_weight(layer, often=True), dense_weight(layer))  # of the new weight
    kept = weakref.ref(layer)
    del layer, new
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize("double", [False, True])
def test_its_bytes_are_those_that_are_planned(double: bool) -> None:
    layer = quantised_linear(
        nn.Linear(512, 512, bias=False), torch.randn(512, 512), "nf4", double, torch.float32
    )
    assert base_bytes(layer) / 512**2 == pytest.approx(weight_bytes("nf4", double, torch.float32))


def test_the_bytes_below_an_adapter_of_peft_count_once() -> None:
    peft = pytest.importorskip("peft")
    layer = quantised_linear(nn.Linear(64, 64, bias=False), torch.randn(64, 64), "nf4", True, torch.float32)
    model = nn.ModuleDict({"q_proj": layer}).requires_grad_(False)
    model.is_loaded_in_4bit = True
    before = base_bytes(model)
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), model)
    assert base_bytes(model) == before


def test_no_scales_are_kept_where_a_weight_is_asked_for_once() -> None:
    layer = quantised(128, compress_statistics=True)
    with without_kept_scales():
        once = dense_weight(layer, often=True)
        assert layer not in four_bit._PLAINLY_SCALED
    assert torch.equal(once, dense_weight(layer, often=True))
    assert layer in four_bit._PLAINLY_SCALED
