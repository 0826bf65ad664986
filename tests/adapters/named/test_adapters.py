"""Named adapters on one base: switched, disabled, mixed, saved, and in different rows of one batch."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from shared.launches import Launches
from torch import Tensor

from moka_pl import MokaAdapters, attach, load_model
from moka_pl.adapters import MokaConfig, moka_layers, read_adapter
from moka_pl.adapters.named import rows, stacks
from moka_pl.adapters.named.rows import RowLinear
from moka_pl.backbone import BackboneConfig, load_backbone
from moka_pl.errors import AdapterError, MokaError
from moka_pl.ops.dispatch import can_fuse

IDS = torch.randint(4, 260, (5, 3), generator=torch.Generator().manual_seed(4))
LONG = torch.randint(4, 260, (5, 20), generator=torch.Generator().manual_seed(5))
CONFIGS = {
    "diverse": MokaConfig(components=3),
    "like it": MokaConfig(components=3, gating="sigmoid"),
    "servable": MokaConfig(2, filters="servable", rank=4, target_modules="all-linear"),
    "prime": MokaConfig(components=2, filters="prime", target_modules=["o_proj", "v_proj"]),
}


def logits(model: Callable, ids: Tensor = IDS, **options: object) -> Tensor:
    with torch.no_grad():
        return model(ids, **options).logits


@pytest.fixture(params=["nf4"])
def named(request: pytest.FixtureRequest, randomize: Callable) -> MokaAdapters:
    """Four adapters of different kinds on a tiny base, none of them active."""
    model = load_backbone(BackboneConfig("tiny", weights="random", quantization=request.param)).model
    model.config.use_cache = True
    named = MokaAdapters(model)
    for seed, (name, config) in enumerate(CONFIGS.items()):
        named.add_adapter(name, config)
        named.set_adapter(name)
        randomize(model, seed=seed)
    named.delete_adapter(name)
    named.add_adapter(name, config)
    named.set_adapter(name)
    randomize(model, seed=9)
    return named


def alone(named: MokaAdapters, name: str, ids: Tensor = IDS) -> Tensor:
    if name == "__base__":
        with named.disable_adapter():
            return logits(named.model, ids)
    named.set_adapter(name)
    return logits(named.model, ids)


@pytest.mark.parametrize("named", ["none", "nf4"], indirect=True)
def test_they_are_switched_disabled_and_deleted(named: MokaAdapters) -> None:
    every = [alone(named, name) for name in (*CONFIGS, "__base__")]
    assert all(not torch.allclose(a, b, atol=0.01) for i, a in enumerate(every) for b in every[:i])
    named.set_adapter("diverse")
    assert named.active_adapter == "diverse"
    with named.disable_adapter():
        assert not moka_layers(named.model)
        assert torch.equal(logits(named), every[-1])
    assert torch.equal(logits(named), every[0])
    assert len(moka_layers(named.model)) == 4
    named.delete_adapter("servable")
    assert torch.equal(logits(named), every[0])
    named.delete_adapter("diverse")
    assert named.active_adapter is None
    assert torch.equal(logits(named), every[-1])
    assert list(named.configs) == ["like it", "prime"]


@pytest.mark.parametrize("named", ["none", "nf4"], indirect=True)
@pytest.mark.parametrize(
    ("ids", "path"), [(IDS[:, :1], None), (IDS, None), (LONG, None), (LONG, "batched"), (LONG, "merged")]
)
def test_rows_have_adapters_of_their_own(
    ids: Tensor, path: str | None, named: MokaAdapters, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path is not None:
        monkeypatch.setattr(RowLinear, "choose_path", lambda self, x: path)
    named.set_adapter("prime")
    for names in (
        ["servable", "diverse", "__base__", "like it", "diverse"],
        ["prime"] * 5,
        ["diverse", "like it", "like it", "diverse", "like it"],
        ["__base__"] * 5,
    ):
        mixed = logits(named, ids, adapter_names=names)
        assert named.active_adapter == "prime"
        for row, name in enumerate(names):
            torch.testing.assert_close(mixed[row], alone(named, name, ids)[row], atol=1e-4, rtol=1e-4)
        named.set_adapter("prime")
    assert not [m for m in named.model.modules() if type(m).__name__ == "RowLinear"]


def launches(named: MokaAdapters, ids: Tensor, names: list[str]) -> tuple[int, int]:
    """Counts launches of the preparation and of a forward pass of a batch with an adapter for each row."""
    with Launches() as prepared:
        rows = named.rows(names)
        rows.__enter__()
    with torch.no_grad(), Launches() as forward:
        named.model(ids)
    rows.__exit__(None, None, None)
    return prepared.count, forward.count


@pytest.mark.parametrize("kind", ["diverse", "servable"])
@pytest.mark.parametrize("tokens", [1, 20])
def test_launches_do_not_grow_with_the_adapters(
    kind: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RowLinear, "choose_path", lambda self, x: "batched")  # what a GPU would
    model = load_backbone(BackboneConfig("tiny", weights="random")).model
    named = MokaAdapters(model)
    for i in range(8):
        named.add_adapter(str(i), CONFIGS[kind])
    ids = torch.full((8, tokens), 7)
    launches(named, ids, ["7"] * 8)  # what a first pass makes once
    with torch.no_grad(), Launches() as base:
        model(ids)
    counts = [launches(named, ids, [str(i % k) for i in range(8)]) for k in (1, 2, 8)]
    assert counts[0] == counts[1] == counts[2]
    assert counts[0][1] > base.count
    assert counts[0][0] <= 100  # two sizes of layers, however many layers there are


@pytest.mark.slow  # in the interpreter
def test_single_tokens_go_through_the_kernels_for_generating(
    monkeypatch: pytest.MonkeyPatch, randomize
) -> None:
    pytest.importorskip("triton")
    named = MokaAdapters(load_backbone(BackboneConfig("tiny", weights="random")).model)
    two = MokaConfig(components=2, backend="fused", target_modules=["v_proj", "up_proj"])
    thin = MokaConfig(1, filters="servable", rank=4, backend="fused", target_modules="all-linear")
    prime = MokaConfig(components=2, filters="prime", backend="fused", target_modules=["v_proj"])
    configs = {"a": two, "b": two, "c": thin, "d": prime}
    for seed, (name, config) in enumerate(configs.items()):
        named.add_adapter(name, config)
        named.set_adapter(name)
        randomize(named.model, seed=seed)
    decoded, original = [], RowLinear._decoded
    monkeypatch.setattr(
        RowLinear, "_decoded", lambda self, x, times: decoded.append(len(x)) or original(self, x, times)
    )
    for names in (["b", "a", "b", "a", "b"], ["d", "a", "__base__", "c", "a"], ["c"] * 5):
        before = len(decoded)
        mixed = logits(named, IDS[:, :1], adapter_names=names)
        assert len(decoded) > before
        for row, name in enumerate(names):
            torch.testing.assert_close(mixed[row], alone(named, name, IDS[:, :1])[row], atol=1e-4, rtol=1e-4)
    before = len(decoded)
    logits(named, adapter_names=["a"] * 5)  # several tokens
    named(IDS[:, :1], adapter_names=["a"] * 5)  # gradients may be wanted
    assert len(decoded) == before


@pytest.mark.slow  # in the interpreter
def test_thin_updates_of_all_adapters_take_one_launch(monkeypatch: pytest.MonkeyPatch, randomize) -> None:
    pytest.importorskip("triton")
    # Where there is no GPU, these kernels are not chosen otherwise.
    monkeypatch.setattr(rows, "can_fuse_thin", lambda x, compute, *rest: can_fuse(x, *rest))
    named = MokaAdapters(load_backbone(BackboneConfig("tiny", weights="random")).model)
    thin = MokaConfig(1, filters="servable", rank=4, backend="fused", target_modules="all-linear")
    wider = MokaConfig(1, filters="servable", rank=16, backend="fused", target_modules=["v_proj", "up_proj"])
    wide = MokaConfig(components=2, backend="fused", target_modules=["v_proj"])
    for seed, (name, config) in enumerate({"a": thin, "b": thin, "c": wider, "d": wide}.items()):
        named.add_adapter(name, config)
        named.set_adapter(name)
        randomize(named.model, seed=seed)
    taken, original = [], RowLinear._thin
    monkeypatch.setattr(
        RowLinear, "_thin", lambda self, x, times: taken.append(self.name) or original(self, x, times)
    )
    for names in (["b", "a", "b", "a", "b"], ["c", "a", "__base__", "c", "b"], ["d", "a", "c", "d", "a"]):
        taken.clear()
        mixed = logits(named, LONG, adapter_names=names)
        assert any("q_proj" in layer for layer in taken)
        assert any("v_proj" in layer for layer in taken) == ("d" not in names)
        for row, name in enumerate(names):
            torch.testing.assert_close(mixed[row], alone(named, name, LONG)[row], atol=1e-4, rtol=1e-4)
    taken.clear()
    named(LONG, adapter_names=["a"] * 5)  # gradients may be wanted
    assert not taken


def test_weights_of_all_adapters_are_built_at_once(monkeypatch: pytest.MonkeyPatch, randomize) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(RowLinear, "choose_path", lambda self, x: "built")
    named = MokaAdapters(load_backbone(BackboneConfig("tiny", weights="random")).model)
    fused = MokaConfig(components=2, backend="fused", target_modules=["v_proj"])
    other = MokaConfig(components=1, backend="fused", target_modules=["v_proj"])
    for seed, (name, config) in enumerate({"a": fused, "b": fused, "c": fused, "d": other}.items()):
        named.add_adapter(name, config)
        named.set_adapter(name)
        randomize(named.model, seed=seed)
    merges = []
    monkeypatch.setattr(RowLinear, "_merged", lambda self, x, times: merges.append(x))
    apart = {name: alone(named, name) for name in ("a", "b", "c", "d", "__base__")}
    for names in (["b", "a", "c", "a", "b"], ["d", "a", "__base__", "c", "a"], ["c"] * 5):
        mixed = logits(named, adapter_names=names)
        for row, name in enumerate(names):
            torch.testing.assert_close(mixed[row], apart[name][row], atol=1e-4, rtol=1e-4)
    assert not merges


def test_a_batch_of_the_same_names_sees_what_has_changed(named: MokaAdapters) -> None:
    names = ["servable", "diverse", "__base__", "like it", "diverse"]
    first = logits(named, adapter_names=names)
    assert torch.equal(logits(named, adapter_names=names), first)
    named.set_adapter("diverse")
    layers = moka_layers(named.model)
    for layer in layers.values():  # other numbers, which count no change
        layer.moka_B.data.mul_(2)
    second = logits(named, adapter_names=names)
    assert not torch.allclose(second[1], first[1], atol=1e-3)
    assert torch.equal(second[[0, 2, 3]], first[[0, 2, 3]])
    for layer in layers.values():  # other parameters
        layer.moka_B = torch.nn.Parameter(layer.moka_B.detach() / 2)
    torch.testing.assert_close(logits(named, adapter_names=names), first)
    for layer in layers.values():
        layer.scaling *= 3
    torch.testing.assert_close(logits(named, adapter_names=names)[1], alone(named, "diverse")[1])
    named.delete_adapter("diverse")
    named.add_adapter("diverse", CONFIGS["diverse"])  # an untrained one
    with named.disable_adapter():
        base = logits(named)
    torch.testing.assert_close(logits(named, adapter_names=names)[1], base[1])


def test_mixed_batches_generate_what_each_adapter_does(named: MokaAdapters) -> None:
    names = ["servable", "diverse", "__base__", "like it", "prime"]
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    for beams in ({}, {"num_beams": 2, "num_return_sequences": 2}):
        mixed = named.generate(IDS, adapter_names=names, **options, **beams)
        times = len(mixed) // 5
        for row, name in enumerate(names):
            if name == "__base__":
                with named.disable_adapter():
                    own = named.generate(IDS, **options, **beams)
            else:
                named.set_adapter(name)
                own = named.generate(IDS, **options, **beams)
            rows = slice(row * times, (row + 1) * times)
            length = min(own.shape[1], mixed.shape[1])
            assert torch.equal(own[rows, :length], mixed[rows, :length])


def test_a_mix_is_the_sum_of_its_adapters(named: MokaAdapters, tmp_path: Path) -> None:
    deltas: dict[str, Tensor] = {}
    for name, weight in (("diverse", 0.5), ("servable", -2.0), ("prime", 1.5)):
        named.set_adapter(name)
        for target, layer in moka_layers(named.model).items():
            deltas[target] = (
                deltas.get(target, torch.tensor(0.0)) + weight * layer.get_delta_weight().detach()
            )
    named.add_weighted_adapter(["diverse", "servable", "prime"], [0.5, -2.0, 1.5], "mix")
    named.set_adapter("mix")
    layers = moka_layers(named.model)
    assert layers.keys() == deltas.keys()
    for target, delta in deltas.items():
        torch.testing.assert_close(layers[target].get_delta_weight(), delta, atol=1e-5, rtol=1e-4)
    expected = logits(named)
    named.save_pretrained(tmp_path / "mix")
    named.load_adapter(tmp_path / "mix", "again")
    torch.testing.assert_close(alone(named, "again"), expected)
    with pytest.raises(AdapterError, match="2 adapters have 1 weights"):
        named.add_weighted_adapter(["mix", "prime"], [1.0], "other")
    with pytest.raises(AdapterError, match="a weight is nan"):
        named.add_weighted_adapter(["mix"], [float("nan")], "other")


def test_what_is_saved_is_the_active_adapter(named: MokaAdapters, tmp_path: Path) -> None:
    named.set_adapter("servable")
    named.model.save_pretrained(tmp_path / "servable")
    named.save_pretrained(tmp_path / "prime", "prime")
    assert read_adapter(tmp_path / "servable").config == CONFIGS["servable"]
    assert read_adapter(tmp_path / "prime").config == CONFIGS["prime"]
    assert named.active_adapter == "servable"
    with named.disable_adapter(), pytest.raises(AdapterError, match="no adapter is active"):
        named.save_pretrained(tmp_path / "none")


def test_a_loaded_model_gets_more_adapters(tmp_path: Path, randomize: Callable) -> None:
    config = BackboneConfig("tiny", weights="random", quantization="none")
    for name, seed in (("a", 1), ("b", 2)):
        model = load_backbone(config).model
        attach(model, CONFIGS["diverse"], base="tiny")
        randomize(model, seed=seed)
        saved = model.save_pretrained.__self__
        saved.base.options = config.options()
        model.save_pretrained(tmp_path / name)
    first, _ = load_model(tmp_path / "a", device="cpu")
    expected = logits(first)
    named = MokaAdapters(first, "a")
    named.load_adapter(tmp_path / "b", "b", dtype=torch.bfloat16)
    assert named.memory()["b"] * 2 == named.memory()["a"]
    assert torch.equal(logits(named), expected)
    other = MokaAdapters.from_pretrained(load_backbone(config).model, tmp_path / "b")
    torch.testing.assert_close(alone(named, "b"), logits(other), atol=0.2, rtol=0.05)
    assert not torch.allclose(alone(named, "b"), expected, atol=0.2)


def test_new_adapters_train_and_loaded_ones_do_not(named: MokaAdapters, tmp_path: Path) -> None:
    named.save_pretrained(tmp_path / "prime", "prime")
    named.load_adapter(tmp_path / "prime", "frozen")
    named.load_adapter(tmp_path / "prime", "trained", is_trainable=True)
    for name, trains in (("prime", True), ("frozen", False), ("trained", True)):
        named.set_adapter(name)
        found = {n.rpartition(".")[2] for n, p in named.model.named_parameters() if p.requires_grad}
        assert bool(found) == trains
        assert found <= {"moka_B", "moka_gate"}


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda named: named.set_adapter("x"), "no adapter is called 'x'; there are diverse, like it"),
        (lambda named: named.add_adapter("prime", CONFIGS["prime"]), "'prime' is taken or reserved"),
        (lambda named: named.add_adapter("__base__", CONFIGS["prime"]), "'__base__' is taken or reserved"),
        (lambda named: named(IDS, adapter_names=["prime"] * 4), "adapter_names has 4 rows; give one name"),
        (lambda named: named(IDS, adapter_names=[]), "adapter_names is empty"),
        (lambda named: named(IDS, adapter_names=["y"] * 5), "no adapter is called 'y'"),
        (lambda named: MokaAdapters(named.model, "__base__"), "is taken or reserved"),
        (
            lambda named: named.add_adapter("n", CONFIGS["prime"], "bfloat16"),
            "dtype must be .*not 'bfloat16'",
        ),
        (lambda named: named.add_adapter("n", CONFIGS["prime"], torch.int8), "dtype must be .*torch.int8"),
        (lambda named: named.load_adapter("n", "n", dtype="bfloat16"), "dtype must be .*not 'bfloat16'"),
        (
            lambda named: named.add_weighted_adapter(["servable", "prime"], [3e38, 1.0], "sum"),
            r"with weights \[3e\+38, 1.0\] factors of .*q_proj are not finite",
        ),
    ],
)
def test_what_cannot_be_is_refused(act: Callable, message: str, named: MokaAdapters) -> None:
    before = logits(named)
    with pytest.raises(MokaError, match=message):
        act(named)
    assert torch.equal(logits(named), before)
    assert not {"n", "sum"} & named.configs.keys()


def test_an_adapter_of_another_base_is_refused(named: MokaAdapters, tmp_path: Path) -> None:
    named.save_pretrained(tmp_path / "prime", "prime")
    other = load_backbone(BackboneConfig("tiny", weights="random", quantization="none", seed=5)).model
    with pytest.raises(AdapterError, match="was trained on another base"):
        MokaAdapters.from_pretrained(other, tmp_path / "prime")
    assert not moka_layers(other)


def test_factors_that_do_not_fit_leave_nothing_behind(named: MokaAdapters, monkeypatch) -> None:
    names = ["diverse", "servable", "diverse", "__base__", "prime"]
    before = logits(named.model)
    logits(named, adapter_names=names)
    stack, made = stacks._stack, []

    def fail(chunk):
        if made:
            raise torch.OutOfMemoryError("no memory")
        made.append(chunk)
        return stack(chunk)

    monkeypatch.setattr(stacks, "_stack", fail)
    with pytest.raises(torch.OutOfMemoryError):
        logits(named, adapter_names=names)
    assert all(one.factors.numel() == 0 for one in made[0].stacks)
    assert torch.equal(logits(named.model), before)
