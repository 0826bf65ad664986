"""The numbers of a directory are those of the model that it was saved from."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moka_pl.adapters import moka_layers
from moka_pl.adapters.reading import CONFIG_NAME, WEIGHTS_NAME
from moka_pl.errors import AdapterError
from moka_pl.inspection import report
from moka_pl.inspection.comparison import compare
from moka_pl.inspection.report import inspect_adapter
from moka_pl.inspection.text import as_json, as_text

FILTERS = [
    {"filters": "diverse"},
    {"filters": "servable", "rank": 4, "target_modules": "all-linear"},
    {"filters": [[2, 2, 16, 16]], "gating": "sigmoid", "target_modules": ["q_proj"]},
    {"filters": [[4, 8, 8]], "gating": "none", "scaling": 2.0, "target_modules": ["q_proj"]},
    {"components": 1, "filters": "square"},
]


@pytest.mark.parametrize("options", FILTERS, ids=lambda o: str(o["filters"]))
def test_numbers_are_those_of_the_model(make_adapter: Callable, options: dict) -> None:
    path, model = make_adapter(**options)
    found = inspect_adapter(path)
    layers = moka_layers(model.requires_grad_(False))
    assert {n.name for n in found.layers} == set(layers)
    for n in found.layers:
        layer = layers[n.name]
        with torch.no_grad():
            delta = layer.get_delta_weight().double()
            gates = layer.gates()
        assert n.layer.update is not None
        assert (n.layer.update.m, n.layer.update.n) == tuple(delta.shape)
        torch.testing.assert_close(n.layer.alpha, gates)
        sizes = torch.linalg.svdvals(delta)
        assert n.norm == pytest.approx(float(delta.norm()), rel=1e-5)
        assert n.stable_rank == pytest.approx(float((delta.norm() / sizes[0]) ** 2), rel=1e-4)
        assert n.exact_lora_rank == layer.exact_lora_rank()
        products = [
            torch.kron(torch.eye(s.m_a) if a is None else a, b)[: delta.shape[0], : delta.shape[1]]
            for (a, b), s in zip(layer.factors(), layer.shapes, strict=True)
        ]
        norms = [float(layer.scaling * g * p.norm()) for g, p in zip(gates, products, strict=True)]
        assert n.component_norms == pytest.approx(norms, rel=1e-4)


def test_layers_of_moka_s_need_their_sizes(make_adapter: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    path, model = make_adapter(filters="prime")
    model.requires_grad_(False)
    sizes = {
        name: (report.Size(x.out_features, x.in_features), 2.0) for name, x in moka_layers(model).items()
    }
    told = inspect_adapter(path)
    assert not any("sizes" in line for line in told.left_out)
    monkeypatch.setattr(report, "base_weights", lambda path, base: sizes)
    based = inspect_adapter(path, "stored")
    assert based.left_out == []
    for n, t in zip(based.layers, told.layers, strict=True):
        norm = float(moka_layers(model)[n.name].get_delta_weight().norm())
        assert (n.norm, n.relative_norm, t.norm) == pytest.approx((norm, norm / 2, norm), rel=1e-5)
        assert t.exact_lora_rank == moka_layers(model)[n.name].exact_lora_rank()

    stored = json.loads((path / CONFIG_NAME).read_text())
    first = next(iter(sizes))
    lying = stored | {"layer_sizes": stored["layer_sizes"] | {first: [64, 96]}}
    (path / CONFIG_NAME).write_text(json.dumps(lying))
    with pytest.raises(AdapterError, match=f"does not fit together: the factors of {first} are "):
        inspect_adapter(path)
    del stored["layer_sizes"]  # as older versions wrote it
    (path / CONFIG_NAME).write_text(json.dumps(stored))
    old = inspect_adapter(path)
    assert [n.norm for n in old.layers] == [None] * 4
    assert any("sizes are unknown" in line for line in old.left_out)
    assert "norm" not in as_text(old).partition("left out")[0]


def test_relative_norms_are_those_of_the_base(tmp_path: Path, randomize: Callable, one_thread: None) -> None:
    from moka_pl.adapters import BaseModel, MokaConfig, inject_adapter, save_adapter
    from moka_pl.backbone import BackboneConfig, fingerprint, load_backbone
    from moka_pl.backbone.quantization import dense_weight

    base, config = BackboneConfig("tiny", weights="random"), MokaConfig(components=2)
    model = load_backbone(base).model
    inject_adapter(model, config)
    randomize(model)
    stored = BaseModel(base.name, None, fingerprint(model), base.options())
    path = save_adapter(tmp_path / "adapter", model, config, stored)
    layers = moka_layers(model)
    for n in inspect_adapter(path, "stored").layers:
        layer = layers[n.name]
        ratio = float(layer.get_delta_weight().norm() / dense_weight(layer.base_layer).float().norm())
        assert n.relative_norm == pytest.approx(ratio, rel=1e-4)


def test_what_takes_long_is_left_out_unless_asked_for(
    make_adapter: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = make_adapter()
    whole = inspect_adapter(path)
    monkeypatch.setattr(report, "_PATIENCE", 0)
    found = inspect_adapter(path)
    assert any("--spectra" in line for line in found.left_out)
    for n, w in zip(found.layers, whole.layers, strict=True):
        assert n.spectrum is None
        assert (n.norm, n.stable_rank) == pytest.approx((w.norm, w.stable_rank), rel=1e-4)
    assert all(n.spectrum is not None for n in inspect_adapter(path, spectra=True).layers)
    monkeypatch.setattr(report, "LARGEST", 10)
    found = inspect_adapter(path, spectra=True)
    assert [n.norm for n in found.layers] == [None] * 4
    assert "matrices of more than 10 entries" in found.left_out[-1]


def test_other_methods_have_facts_only(tmp_path: Path, make_llama: Callable) -> None:
    from moka_pl.adapters import BaseModel, FullFineTuning, inject_adapter, save_adapter

    model, config = make_llama(), FullFineTuning()
    inject_adapter(model, config)
    found = inspect_adapter(save_adapter(tmp_path / "full", model, config, BaseModel("tiny")))
    assert found.layers == []
    assert "they are MoKA's" in found.left_out[0]
    assert json.dumps(as_json(found))


def change(path: Path, change: Callable[[dict], None]) -> None:
    tensors = load_file(path / WEIGHTS_NAME)
    change(tensors)
    save_file(tensors, path / WEIGHTS_NAME)
    config = json.loads((path / CONFIG_NAME).read_text())
    config["trainable_parameters"] = sum(tensor.numel() for tensor in tensors.values())
    (path / CONFIG_NAME).write_text(json.dumps(config))


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop(f"{Q}.moka_gate"), "moka_gate is missing"),
        (lambda t: t.update({f"{Q}.moka_gate": torch.zeros(2)}), r"moka_gate is \(2,\), but components is 3"),
        (lambda t: t.pop(f"{Q}.moka_B.1"), "2 pairs of factors, but components is 3"),
        (lambda t: t.update({f"{Q}.moka_A.1": torch.ones(4)}), "2 pairs of factors"),
    ],
    ids=["no gate", "another gate", "no factor", "a vector"],
)
def test_tensors_that_do_not_fit_together_are_refused(
    make_adapter: Callable, damage: Callable[[dict], None], message: str
) -> None:
    path, _ = make_adapter()
    change(path, damage)
    with pytest.raises(AdapterError, match=message):
        inspect_adapter(path)


def test_factors_that_are_not_those_of_the_filters_are_refused(make_adapter: Callable) -> None:
    path, _ = make_adapter(filters=[[4, 8, 8]], gating="none", target_modules=["q_proj"])
    change(path, lambda t: t.update({f"{Q}.moka_B.1": torch.ones(8, 9)}))
    with pytest.raises(AdapterError, match=r"the factors of .*q_proj are"):
        inspect_adapter(path)


def test_a_comparison_is_that_of_the_matrices(make_adapter: Callable) -> None:
    first, one = make_adapter("one", 1)
    second, other = make_adapter("two", 2)
    compared = compare(inspect_adapter(first), inspect_adapter(second))
    assert compared.notes == []
    assert len(compared.layers) == 4
    for found in compared.layers:
        a, b = (moka_layers(model)[found.name].get_delta_weight().detach().double() for model in (one, other))
        assert found.norms == pytest.approx((float(a.norm()), float(b.norm())), rel=1e-5)
        assert found.cosine == pytest.approx(float((a * b).sum() / a.norm() / b.norm()), abs=1e-5)
        assert found.distance == pytest.approx(float((a - b).norm() / max(a.norm(), b.norm())), rel=1e-4)
        gates = (moka_layers(model)[found.name].gates().detach() for model in (other, one))
        moved = torch.sub(*gates)
        assert found.gates == pytest.approx(moved.tolist(), abs=1e-6)
        assert found.gate_distance == pytest.approx(float(moved.abs().sum() / 2), abs=1e-6)


def test_an_adapter_is_like_itself(make_adapter: Callable) -> None:
    found = inspect_adapter(make_adapter()[0])
    for layer in compare(found, found).layers:
        assert (layer.cosine, layer.distance) == (pytest.approx(1), pytest.approx(0, abs=1e-6))


def test_what_cannot_be_compared_is_said(make_adapter: Callable) -> None:
    first = inspect_adapter(make_adapter("one")[0])
    second = inspect_adapter(
        make_adapter("two", base="other", filters="servable", rank=4, target_modules=["q_proj", "k_proj"])[0]
    )
    compared = compare(first, second)
    assert [layer.gates for layer in compared.layers] == [[], []]
    assert all(layer.gate_distance is None for layer in compared.layers)
    told = "; ".join(compared.notes)
    assert "different bases" in told
    assert "only the first has 2" in told
    assert "only the second has 2" in told
    sizeless = replace(second, layers=[replace(n, norm=None) for n in second.layers])
    assert (
        "2 layers (first model.layers.0.self_attn.q_proj) are not compared"
        in compare(first, sizeless).notes[-1]
    )
