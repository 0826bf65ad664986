import pytest

from moka_pl.adapters.filters import filter_shapes
from moka_pl.backbone import BackboneConfig, load_backbone
from moka_pl.backbone.random_weights import SHAPES, shape_config
from moka_pl.errors import ConfigError
from moka_pl.lm.replaced_forward import given, replace_forward
from moka_pl.studies.benchmark import cases
from moka_pl.studies.benchmark.cases import PRESETS, find_preset
from moka_pl.studies.common import structure

ROWS = {row.name: row for row in cases.step_rows("cpu")}


@pytest.fixture
def model():
    return load_backbone(BackboneConfig("tiny", weights="random")).model


def test_the_frozen_base_comes_first_and_last() -> None:
    names = [row.name for row in cases.step_rows("cuda")]
    assert (names[0], names[-1]) == ("frozen base", "frozen base (again)")
    assert len(set(names)) == len(names)
    captured = {row.name for row in cases.step_rows("cuda") if row.captured}
    assert captured >= {"frozen base, CUDA graph", "MoKA r10, CUDA graph", "LoRA r8 q,v, CUDA graph"}
    others = {row.name: dict(row.backbone) for row in cases.step_rows("cuda") if row.backbone}
    assert others["LoRA r8 q,v, kernels none"] == {"kernels": "none"}
    assert set(names) - set(ROWS) == {"MoKA r10 fused"} | captured | others.keys()


def test_a_row_on_another_base_has_one_built(bench, monkeypatch) -> None:
    built = []
    monkeypatch.setattr(
        "moka_pl.backbone.load_backbone", lambda config, device: built.append(config) or load_backbone(config)
    )
    plain, other = cases.frozen(), cases.on_backbone(cases.moka("MoKA r10"), kernels="none")
    assert other.name == "MoKA r10, kernels none"
    for row in (plain, other, other, plain):
        assert bench.measure(row, lambda model: {"ok": 1.0}) == ({"ok": 1.0}, None)
    assert [config.kernels for config in built] == ["auto", "none", "auto"]


def test_the_row_of_unsloth_s_that_a_row_competes_with() -> None:
    assert cases.peer("MoKA r10") == cases.peer("MoKA r10, compile layers") == "unsloth LoRA r8 q,v"
    assert cases.peer("LoRA r32 q,k,v,up,down, kernels none") == "unsloth LoRA r32 q,k,v,up,down"
    assert cases.peer("frozen base") is None


@pytest.mark.parametrize("name", ROWS)
def test_a_row_goes_in_without_zeros_and_out_without_a_trace(name: str, model) -> None:
    before, frozen = structure(model), dict(model.named_parameters())
    remove = ROWS[name].put(model)
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert bool(trainable) == (not name.startswith("frozen"))
    for parameter, tensor in trainable.items():
        assert parameter.endswith("moka_gate") or tensor.any(), parameter
    remove()
    assert structure(model) == before
    assert all(p is frozen[n] for n, p in model.named_parameters())
    assert not hasattr(model, "peft_config")
    assert not hasattr(model, "is_loaded_in_4bit")


def test_peft_takes_its_layers_for_4_bits(model) -> None:
    from peft.tuners.lora.bnb import Linear4bit

    ROWS["LoRA r8 q,v"].put(model)
    adapted = [m for name, m in model.named_modules() if name.endswith(("q_proj", "v_proj"))]
    assert len(adapted) == 4
    assert all(isinstance(module, Linear4bit) for module in adapted)


def test_without_peft_its_rows_say_what_to_install(model, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ConfigError, match=r"pip install 'moka_pl\[studies\]'"):
        ROWS["LoRA r8 q,v"].put(model)


def test_random_values_are_small_and_only_in_zero_factors(model) -> None:
    ROWS["MoKA r10"].put(model)
    right = [p for name, p in model.named_parameters() if "moka_B" in name]
    assert right
    assert all(0 < float(p.detach().std()) < 2e-3 for p in right)
    assert all(not p.any() for name, p in model.named_parameters() if name.endswith("moka_gate"))


def test_choose() -> None:
    listed = list(ROWS.values())
    assert cases.choose(listed, []) == listed
    assert [row.name for row in cases.choose(listed, ["MoKA r1", "frozen base"])] == [
        "frozen base",
        "MoKA r1",
    ]


def test_liger_s_rows_have_its_kernels_and_the_others_do_not() -> None:
    rows = {row.name: row for row in cases.beside_liger(cases.step_rows("cuda"))}
    liger = {name for name, row in rows.items() if dict(row.backbone) == {"kernels": "auto"}}
    assert liger == {"frozen base + Liger", "MoKA r10 + Liger"}
    assert all(row.backbone["kernels"] == "none" for name, row in rows.items() if name not in liger)
    assert rows["MoKA r10, compile layers"].backbone["compile"] == "layers"


def test_a_base_without_liger_s_kernels_is_not_measured_under_its_name(model) -> None:
    row = cases.with_liger(ROWS["MoKA r10"])
    with pytest.raises(ConfigError, match="none of Liger's kernels, which need a GPU and liger-kernel"):
        row.put(model)
    replace_forward(model.model.norm, given, type(model.model.norm).forward)  # as Liger's is put in
    row.put(model)
    assert any("moka_B" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("name", PRESETS)
def test_every_shape_is_known(name: str) -> None:
    assert {PRESETS[name].shape, *PRESETS[name].shapes} <= set(SHAPES)


@pytest.mark.parametrize("preset", PRESETS.values(), ids=str)
def test_gpus_are_warmed_up_by_three_steps_or_more(preset) -> None:
    assert preset.device == "cpu" or preset.warmup >= 3


def test_an_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'llama-7b'; choose one of smollm2-cpu, .*llama2-7b-odd-h100"):
        find_preset("llama-7b")


def test_a_preset_of_a_gpu_needs_one(monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"llama2-7b-h100 needs a CUDA device.* choose smollm2-cpu"):
        find_preset("llama2-7b-h100")


@pytest.mark.parametrize("filters", ["diverse", "prime"])
def test_the_odd_shape_pads(filters: str) -> None:
    config = shape_config("llama2-7b-odd")
    m, n = config.num_attention_heads * config.head_dim, config.hidden_size
    odd = [shape for shape in filter_shapes(filters, 10, m, n) if (shape.rows, shape.cols) != (m, n)]
    assert len(odd) >= 6
