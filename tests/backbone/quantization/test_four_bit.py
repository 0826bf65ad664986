"""bitsandbytes' 4-bit layers: which W they hold, and what of it is kept."""

import gc
import logging
import weakref

import bitsandbytes as bnb
import pytest
import torch
from shared.four_bits import quantised, read_by_hand
from torch import nn

from moka_pl.backbone.quantization import (
    base_bytes,
    dense_weight,
    four_bit,
    frozen_output,
    kernel_weight,
    quantised_linear,
    weight_bytes,
    without_kept_scales,
)


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


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize(("m", "n"), [(40, 48), (40, 96), (24, 16), (7, 80), (4, 33), (40, 56), (24, 64)])
def test_weights_are_codes_times_scales(m: int, n: int, kind: str, double: bool) -> None:
    layer = quantised(n, m, quant_type=kind, compress_statistics=double)
    by_hand = read_by_hand(layer)
    assert torch.equal(dense_weight(layer), by_hand)
    assert torch.equal(dense_weight(layer, often=True), by_hand)
