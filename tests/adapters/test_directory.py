"""The adapter directory: round trips, damage, failing disks."""

import errno
import json
import math
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from shared.expressions import expressions
from torch import nn

from moka_pl.adapters import (
    AdapterInfo,
    BaseModel,
    MokaConfig,
    adapter_state,
    inject_adapter,
    load_adapter,
    load_adapter_state,
    merge,
    moka_layers,
    read_adapter,
    save_adapter,
)
from moka_pl.adapters.reading import CONFIG_NAME, FORMAT_VERSION, WEIGHTS_NAME
from moka_pl.errors import AdapterError
from moka_pl.utils import LFS_POINTER

BASE = BaseModel("someone/tiny-llama", "v1.2", "abc123", {"quantization": "nf4"})
VARIANTS = {
    "diverse": {"filters": "diverse"},
    "prime": {"filters": "prime"},
    "listed, ungated": {"filters": [[4, 8], [2, 3, 8, 9]], "gating": "none", "components": 2},
    "sigmoid": {"gating": "sigmoid"},
    "servable": {"filters": "servable", "rank": 4, "start": "zero_left", "target_modules": "all-linear"},
    "everything": {"target_modules": "all-linear", "exclude_modules": r".*\.1\..*"},
}


def config(**options: object) -> MokaConfig:
    return MokaConfig(**({"components": 3, "scaling": 1.7, "dropout": 0.1} | options))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def change_config(adapter: Path, **changes: object) -> None:
    """Overwrites entries of the stored config; None takes the entry out."""
    file = adapter / CONFIG_NAME
    stored = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in stored.items() if value is not None}))


def change_weights(adapter: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(adapter / WEIGHTS_NAME).items()}
    change(tensors)
    save_file(tensors, adapter / WEIGHTS_NAME)


@pytest.fixture
def adapted(make_llama, randomize) -> nn.Module:
    """The tiny LLaMA with random adapters."""
    model = make_llama()
    inject_adapter(model, config())
    randomize(model)
    return model


@pytest.fixture
def adapter(tmp_path: Path, adapted: nn.Module) -> Path:
    """Those adapters, saved."""
    return save_adapter(tmp_path / "runs" / "adapter", adapted, config(), BASE)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_round_trip_gives_identical_outputs(
    options: dict, tmp_path: Path, make_llama, randomize, token_ids
) -> None:
    saved, loaded = make_llama(), make_llama()
    inject_adapter(saved, config(**options))
    randomize(saved)
    path = tmp_path / "new" / "folders" / "adapter"
    extra = {"step": 12, "metrics": {"val_loss": 1.25}}
    assert save_adapter(path, saved, config(**options), BASE, extra) == path
    info = load_adapter(loaded, str(path), "abc123")
    assert info == AdapterInfo(config(**options), BASE, extra)
    assert (logits(loaded, token_ids) - logits(make_llama(), token_ids)).abs().max() > 0.1
    assert torch.equal(logits(loaded, token_ids), logits(saved, token_ids))


def test_only_factors_and_gates_are_stored(adapter: Path, adapted: nn.Module) -> None:
    assert sorted(file.name for file in adapter.iterdir()) == sorted([CONFIG_NAME, WEIGHTS_NAME, "README.md"])
    tensors = load_file(adapter / WEIGHTS_NAME)
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert {".".join(name.split(".")[:5]) for name in tensors} == {
        name.rpartition(".")[0] for name in trained
    }
    for name, parameter in trained.items():  # the trained vectors, factor by factor
        parts = [tensor.flatten() for key, tensor in tensors.items() if f"{key}.".startswith(f"{name}.")]
        assert torch.equal(torch.cat(parts), parameter)
    entries = sum(p.numel() for p in trained.values())
    assert json.loads((adapter / CONFIG_NAME).read_text())["trainable_parameters"] == entries
    assert (adapter / WEIGHTS_NAME).stat().st_size < 4 * entries + 200 * len(tensors)


def test_all_files_get_the_permissions_that_the_user_s_umask_gives(
    tmp_path: Path, adapted: nn.Module
) -> None:
    before = os.umask(0o027)
    try:
        path = save_adapter(tmp_path / "adapter", adapted, config(), BASE)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o640}
    assert stat.S_IMODE(path.stat().st_mode) == 0o750


def test_a_merged_model_saves_the_same_tensors(adapter: Path, tmp_path: Path, adapted: nn.Module) -> None:
    merge(adapted)
    other = save_adapter(tmp_path / "merged", adapted, config(), BASE)
    assert contents(other) == contents(adapter)


def test_loading_into_a_merged_model_changes_its_outputs(
    adapter: Path, adapted: nn.Module, randomize, token_ids
) -> None:
    expected = logits(adapted, token_ids)
    state = load_file(adapter / WEIGHTS_NAME)
    randomize(adapted, seed=77)
    merge(adapted)
    assert (logits(adapted, token_ids) - expected).abs().max() > 0.1
    load_adapter_state(adapted, state, adapter)
    torch.testing.assert_close(logits(adapted, token_ids), expected, rtol=1e-3, atol=1e-4)


def test_saving_again_replaces_the_older_adapter(adapter: Path, adapted: nn.Module, randomize) -> None:
    older = contents(adapter)
    (adapter / "README.md").unlink()
    randomize(adapted, seed=8)
    save_adapter(adapter, adapted, config(), BASE)
    newer = contents(adapter.parent)
    assert newer.keys() == {f"adapter/{name}" for name in older}  # nothing is left beside it
    assert newer[f"adapter/{WEIGHTS_NAME}"] != older[WEIGHTS_NAME]
    cards = [card.partition(b"Gates") for card in (newer["adapter/README.md"], older["README.md"])]
    assert cards[0][:2] == cards[1][:2]  # below, it tells what the gates have come to
    assert cards[0][2] != cards[1][2]


def add_own_files(adapter: Path) -> None:
    """What a user may put beside the adapter's own files."""
    (adapter / "notes.txt").write_text("mine")
    (adapter / ".hidden").write_text("mine, too")
    (adapter / "results" / "deep").mkdir(parents=True)
    (adapter / "results" / "deep" / "scores.json").write_text("{}")
    (adapter / "results" / "here").symlink_to("deep")
    (adapter / "elsewhere").symlink_to(adapter.parent)
    (adapter / "nowhere").symlink_to("gone")


def no_links(*_: object, **__: object) -> None:
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


@pytest.mark.parametrize("links", [True, False], ids=["linked", "copied"])
def test_saving_again_keeps_the_user_s_own_files(
    links: bool, adapter: Path, adapted: nn.Module, randomize, monkeypatch
) -> None:
    add_own_files(adapter)
    (adapter / "notes.txt").chmod(0o600)
    before = contents(adapter)
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    for seed in (8, 9):  # the second time they have been carried over before
        randomize(adapted, seed=seed)
        save_adapter(adapter, adapted, config(), BASE)
    after = contents(adapter)
    assert after.keys() == before.keys()
    # The card tells of the gates.
    assert {name for name in after if after[name] != before[name]} == {WEIGHTS_NAME, "README.md"}
    assert stat.S_IMODE((adapter / "notes.txt").stat().st_mode) == 0o600
    for name, target in (("results/here", "deep"), ("elsewhere", adapter.parent), ("nowhere", "gone")):
        assert (adapter / name).readlink() == Path(target)
    assert list(adapter.parent.iterdir()) == [adapter]


def test_an_empty_folder_is_taken(tmp_path: Path, adapted: nn.Module) -> None:
    save_adapter(tmp_path, adapted, config(), BASE)
    assert read_adapter(tmp_path).config == config()


def test_a_model_without_adapters_cannot_be_saved(tmp_path: Path, tiny_llama) -> None:
    with pytest.raises(AdapterError, match="no adapters to save"):
        save_adapter(tmp_path / "adapter", tiny_llama, config(), BASE)
    assert contents(tmp_path) == {}


# --- a write that fails ---------------------------------------------------------------------------------


def small_files(monkeypatch: pytest.MonkeyPatch) -> Callable[[], object]:
    """No file may grow above a kilobyte: the tensors break off half way."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)


def full_disk_at_sync(monkeypatch: pytest.MonkeyPatch) -> Callable[[], object]:
    def fsync(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    return monkeypatch.undo


def failing_config(monkeypatch: pytest.MonkeyPatch) -> Callable[[], object]:
    write = Path.write_text

    def write_text(self: Path, text: str, **options: object) -> int:
        if self.name == CONFIG_NAME:
            write(self, text[:20], **options)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, text, **options)

    monkeypatch.setattr(Path, "write_text", write_text)
    return monkeypatch.undo


def full_disk_at_copy(monkeypatch: pytest.MonkeyPatch) -> Callable[[], object]:
    def copy2(source: str | Path, target: str | Path, **_: object) -> None:
        Path(target).write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "link", no_links)
    monkeypatch.setattr(shutil, "copy2", copy2)
    return monkeypatch.undo


def failing_rename(error: BaseException) -> Callable[[pytest.MonkeyPatch], Callable[[], object]]:
    """Only moving the new folder into its place fails; moving the older one away and back works."""

    def arrange(monkeypatch: pytest.MonkeyPatch) -> Callable[[], object]:
        rename = Path.rename

        def fail(self: Path, target: Path) -> Path:
            if self.name == "new":
                raise error
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", fail)
        return monkeypatch.undo

    return arrange


FAILURES = {
    "file too large": (small_files, AdapterError, "File too large"),
    "full at fsync": (full_disk_at_sync, AdapterError, "No space left on device"),
    "full at config": (failing_config, AdapterError, "No space left on device"),
    "rename": (failing_rename(OSError(errno.EIO, "Input/output error")), AdapterError, "Input/output error"),
    "interrupt": (failing_rename(KeyboardInterrupt("stop")), KeyboardInterrupt, "stop"),
}


def test_own_files_that_cannot_be_carried_over_leave_all_as_it_was(
    adapter: Path, adapted: nn.Module, randomize, monkeypatch
) -> None:
    add_own_files(adapter)
    before = contents(adapter.parent)
    randomize(adapted, seed=8)
    mend = full_disk_at_copy(monkeypatch)
    with pytest.raises(AdapterError, match="No space left on device"):
        save_adapter(adapter, adapted, config(), BASE)
    mend()
    assert contents(adapter.parent) == before
    assert list(adapter.parent.iterdir()) == [adapter]


@pytest.mark.parametrize("existing", [True, False], ids=["older", "first"])
@pytest.mark.parametrize(("arrange", "error", "message"), FAILURES.values(), ids=FAILURES)
def test_a_failing_write_leaves_all_as_it_was(
    arrange, error, message: str, existing: bool, tmp_path: Path, adapted: nn.Module, randomize, monkeypatch
) -> None:
    path = tmp_path / "runs" / "adapter"
    path.parent.mkdir()
    if existing:
        save_adapter(path, adapted, config(), BASE)
        add_own_files(path)
    before = contents(tmp_path)
    randomize(adapted, seed=8)
    mend = arrange(monkeypatch)
    try:
        with pytest.raises(error, match=message):
            save_adapter(path, adapted, config(), BASE)
    finally:
        mend()
    assert contents(tmp_path) == before
    assert list(path.parent.iterdir()) == ([path] if existing else [])
    save_adapter(path, adapted, config(), BASE)  # and the next one works
    assert contents(tmp_path) != before


def test_a_place_below_a_file_cannot_be_written(tmp_path: Path, adapted: nn.Module) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(AdapterError, match=r"cannot save the adapter to \S+file/sub/adapter: "):
        save_adapter(tmp_path / "file" / "sub" / "adapter", adapted, config(), BASE)
    assert contents(tmp_path) == {"file": b"mine"}


def test_a_file_or_a_folder_of_other_things_is_not_replaced(tmp_path: Path, adapted: nn.Module) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = contents(tmp_path)
    for name in ("notes", "file"):
        with pytest.raises(AdapterError, match="would be overwritten"):
            save_adapter(tmp_path / name, adapted, config(), BASE)
    assert contents(tmp_path) == before


# --- a directory that is damaged, or of something else ----------------------------------------------------


def keep(file: str, share: float) -> Callable[[Path], object]:
    def cut(adapter: Path) -> None:
        content = (adapter / file).read_bytes()
        (adapter / file).write_bytes(content[: int(len(content) * share)])

    return cut


def put(file: str, content: bytes) -> Callable[[Path], object]:
    return lambda adapter: (adapter / file).write_bytes(content)


def missing(file: str) -> Callable[[Path], object]:
    return lambda adapter: (adapter / file).unlink()


DAMAGES = {
    "config missing": (missing(CONFIG_NAME), "no adapter_config.json"),
    "config empty": (keep(CONFIG_NAME, 0), "adapter_config.json is damaged"),
    "config cut": (keep(CONFIG_NAME, 0.5), "adapter_config.json is damaged"),
    "config not JSON": (put(CONFIG_NAME, b"components: 3\n"), "adapter_config.json is damaged"),
    "config not UTF-8": (put(CONFIG_NAME, b'{"peft_type": "\xff"}'), "adapter_config.json is damaged"),
    "config a pointer": (put(CONFIG_NAME, LFS_POINTER), "adapter_config.json is only Git LFS's pointer"),
    "tensors a pointer": (
        put(WEIGHTS_NAME, LFS_POINTER),
        "is only Git LFS's pointer .*; run git lfs pull in",
    ),
    "config a list": (put(CONFIG_NAME, b"[]"), "is not a moka_pl adapter .*'list'"),
    "other method": (lambda a: change_config(a, peft_type="LORA"), "is not a moka_pl adapter .*'LORA'"),
    "no method": (lambda a: change_config(a, peft_type=None), "is not a moka_pl adapter .*None"),
    "no format": (lambda a: change_config(a, format_version=None), "no format_version"),
    "newer format": (
        lambda a: change_config(a, format_version=FORMAT_VERSION + 1),
        f"adapter format {FORMAT_VERSION + 1}.*Upgrade moka_pl",
    ),
    "no base": (lambda a: change_config(a, base_model_name_or_path=None), "base_model_name_or_path"),
    "unknown option": (lambda a: change_config(a, gating="tanh"), "damaged: unknown gating 'tanh'"),
    "option of another type": (lambda a: change_config(a, dropout="much"), "adapter_config.json is damaged"),
    "weights missing": (missing(WEIGHTS_NAME), "no adapter_model.safetensors"),
    "weights empty": (keep(WEIGHTS_NAME, 0), "adapter_model.safetensors is truncated or damaged"),
    "weights cut in the header": (keep(WEIGHTS_NAME, 0.1), "truncated or damaged"),
    "weights cut": (keep(WEIGHTS_NAME, 0.9), "truncated or damaged"),
    "weights of other bytes": (put(WEIGHTS_NAME, b"\x80\x04" * 99), "truncated or damaged"),
    "tensor missing": (
        lambda a: change_weights(a, lambda t: t.pop("model.layers.1.self_attn.v_proj.moka_gate")),
        r"missing tensors: 1 \(first model\.layers\.1\.self_attn\.v_proj\.moka_gate\), unexpected tensors: 0",
    ),
    "tensor too many": (
        lambda a: change_weights(a, lambda t: t.update({"model.layers.9.moka_gate": torch.ones(3)})),
        r"missing tensors: 0, unexpected tensors: 1 \(first model\.layers\.9\.moka_gate\)",
    ),
    "tensor of another shape": (
        lambda a: change_weights(
            a, lambda t: t.update({"model.layers.1.self_attn.q_proj.moka_B.2": torch.ones(5, 7)})
        ),
        r"model\.layers\.1\.self_attn\.q_proj\.moka_B\.2 is \(5, 7\), the model expects \(\d+, \d+\)",
    ),
    "other components": (lambda a: change_config(a, components=2), r"unexpected tensors: \d+ \(first"),
    "other filters": (lambda a: change_config(a, filters=[[2, 2]]), "the model expects"),
    "other layers": (lambda a: change_config(a, target_modules=["nowhere"]), "matches no layer"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_adapter_is_refused_and_the_model_stays_plain(
    damage, message: str, adapter: Path, tiny_llama, token_ids
) -> None:
    expected, names = logits(tiny_llama, token_ids), list(tiny_llama.state_dict())
    damage(adapter)
    with pytest.raises(AdapterError, match=message):
        load_adapter(tiny_llama, adapter)
    assert list(tiny_llama.state_dict()) == names
    assert torch.equal(logits(tiny_llama, token_ids), expected)


@pytest.mark.parametrize(("place", "told"), [("nowhere", "no such folder"), ("file", "it is a file")])
def test_what_is_no_folder_is_told(place: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(AdapterError, match=f"{place} is not an adapter directory: {told}$"):
        read_adapter(tmp_path / place)


def test_what_is_beside_a_missing_adapter_is_told(adapter: Path) -> None:
    message = f"best is not an adapter directory: no such folder; found {adapter.name} beside it$"
    with pytest.raises(AdapterError, match=message):
        read_adapter(adapter.parent / "best")


def test_an_adapter_of_another_base_is_refused(adapter: Path, make_llama) -> None:
    with pytest.raises(AdapterError, match=r"another base model: 'someone/tiny-llama'.*abc123.*def456"):
        load_adapter(model := make_llama(), adapter, "def456")
    assert not moka_layers(model)
    for unknown in (None, ""):
        assert load_adapter(make_llama(), adapter, unknown).base == BASE
    change_config(adapter, base_fingerprint="")
    assert moka_layers(model) == {}
    load_adapter(model, adapter, "def456")  # an adapter that does not know its base fits any
    assert moka_layers(model)


def test_an_adapter_of_a_wider_model_is_refused(adapter: Path, make_llama) -> None:
    model = make_llama(hidden_size=48)
    with pytest.raises(AdapterError, match=r"model\.layers\.\d.*the model expects"):
        load_adapter(model, adapter)
    assert not moka_layers(model)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.pop("model.layers.1.self_attn.v_proj.moka_gate"),
        lambda state: state.update({"stray": torch.ones(1)}),
        lambda state: state.update({"model.layers.1.self_attn.v_proj.moka_gate": torch.ones(4)}),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_tensors_that_do_not_fit_leave_the_model_s_own(change, adapted: nn.Module) -> None:
    before = {name: tensor.clone() for name, tensor in adapter_state(adapted).items()}
    state = {name: tensor + 1 for name, tensor in before.items()}
    change(state)
    with pytest.raises(AdapterError, match=r"somewhere.*(v_proj\.moka_gate|stray)"):
        load_adapter_state(adapted, state, "somewhere")
    after = adapter_state(adapted)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


# --- what is written ----------------------------------------------------------------------------------------

words = st.text(min_size=1, max_size=8)


@settings(max_examples=100, deadline=None)
@given(
    options=st.fixed_dictionaries(
        {
            "components": st.integers(1, 20),
            "filters": st.sampled_from(["diverse", "square", "prime"])
            | st.lists(st.lists(st.integers(1, 9), min_size=2, max_size=2), min_size=1, max_size=1),
            "scaling": st.none() | st.floats(1e-9, 1e9),
            "dropout": st.floats(0, 1, exclude_max=True),
            "target_modules": expressions(words) | st.lists(words, min_size=1),
            "exclude_modules": st.none() | expressions(words) | st.lists(words),
        }
    ),
    name=words,
    revision=st.none() | words,
)
def test_any_config_and_base_name_are_read_back(options: dict, name: str, revision: str | None) -> None:
    model = nn.Sequential(nn.Linear(9, 9))
    inject_adapter(model, config(target_modules=["0"]))
    expected = AdapterInfo(config(**options), BaseModel(name, revision))
    with tempfile.TemporaryDirectory() as folder:
        path = save_adapter(Path(folder) / "adapter", model, expected.config, expected.base)
        assert read_adapter(path) == expected


@pytest.mark.parametrize("name", ["someone/tiny-llama", '/home/me/my "best": model', "модель"])
def test_the_model_card_tells_the_base_and_has_no_placeholder(name: str, tmp_path: Path, adapted) -> None:
    extra = {"metrics": {"val_loss": 1.23456, "acc": 0.5}}
    path = save_adapter(tmp_path / "adapter", adapted, config(), BaseModel(name), extra)
    card = (path / "README.md").read_text(encoding="utf-8")
    _, header, body = card.split("---\n", 2)
    local = name.startswith("/")  # where it lies is nobody's business
    assert yaml.safe_load(header).get("base_model") == (None if local else name)
    assert (name in body) is not local
    assert f"| trainable parameters | {sum(t.numel() for t in adapter_state(adapted).values()):,} |" in body
    assert "| target modules | q_proj, v_proj |" in body
    assert "| scaling | 1.7 |" in body
    assert body.index("| acc | 0.5000 |") < body.index("| val_loss | 1.2346 |")
    for placeholder in ("{", "}", "TODO", "None", "null", "[More"):
        assert placeholder not in card


@pytest.mark.parametrize(
    ("gating", "version", "equation"),
    [
        ("softmax", 1, "α = softmax(g)"),
        ("sigmoid", 3, "α_i = (2/r) sigmoid(g_i)"),
        ("none", 1, "α_i = 1/r"),
    ],
)
def test_gates_are_told_and_only_sigmoid_ones_need_a_newer_format(
    gating: str, version: int, equation: str, tmp_path: Path, tiny_llama
) -> None:
    inject_adapter(tiny_llama, config(gating=gating))
    path = save_adapter(tmp_path / "adapter", tiny_llama, config(gating=gating), BASE)
    stored = json.loads((path / CONFIG_NAME).read_text())
    assert (stored["format_version"], stored["gating"]) == (version, gating)
    card = (path / "README.md").read_text(encoding="utf-8")
    assert f"`{equation}`" in card
    assert f"| gating | {gating} |" in card


@pytest.mark.parametrize(
    ("options", "about"),
    [
        (
            {"components": 1, "filters": "servable", "rank": 4},
            "`y = W x + s (A ⊗ B) x`. In every adapted layer this is exactly a LoRA of rank 4.",
        ),
        (
            {"components": 1, "gating": "none"},
            "A Kronecker adapter for `someone/tiny-llama`: `y = W x + s (A",
        ),
        ({"components": 1, "gating": "sigmoid"}, "A gated mixture of Kronecker adapters for `someone/"),
        ({"gating": "none"}, "A mixture of Kronecker adapters for `someone/"),
        (
            {"components": 2, "filters": "servable", "rank": 4},
            "`α = softmax(g)`. In every adapted layer this is exactly a LoRA of rank 8.",
        ),
    ],
)
def test_a_card_tells_of_gates_only_where_there_are_some(
    options: dict, about: str, tmp_path: Path, tiny_llama
) -> None:
    inject_adapter(tiny_llama, config(**options))
    path = save_adapter(tmp_path / "adapter", tiny_llama, config(**options), BASE)
    card = (path / "README.md").read_text(encoding="utf-8")
    assert about in card
    still = options.get("components") == 1 and options.get("gating") != "sigmoid"
    assert ("| gating |" not in card) == ("α" not in card) == still


def test_an_adapter_keeps_the_scaling_that_was_applied(tmp_path: Path, tiny_llama) -> None:
    options = {"filters": "servable", "rank": 4, "components": 4, "scaling": None}
    inject_adapter(tiny_llama, config(**options))
    path = save_adapter(tmp_path / "adapter", tiny_llama, config(**options), BASE)
    file = path / CONFIG_NAME
    stored = json.loads(file.read_text())
    assert (stored["scaling"], stored["effective_scaling"]) == (None, 2.0)
    for applied, expected in ((2.0, None), (4.0, 4.0), (4, 4.0), (2, None)):
        file.write_text(json.dumps(stored | {"effective_scaling": applied}))
        assert read_adapter(path).config.scaling == expected
    file.write_text(json.dumps(stored | {"effective_scaling": -4.0}))
    with pytest.raises(AdapterError, match="scaling must be positive"):
        read_adapter(path)


@pytest.mark.parametrize("options", [{"filters": "servable", "rank": 4}, {"start": "zero_left"}])
def test_ranks_are_told_and_servable_filters_need_the_newest_format(
    options: dict, tmp_path: Path, tiny_llama
) -> None:
    inject_adapter(tiny_llama, config(**options))
    path = save_adapter(tmp_path / "adapter", tiny_llama, config(**options), BASE)
    stored = json.loads((path / CONFIG_NAME).read_text())
    ranks = [12, 12] if "rank" in options else [16, 32]  # v_proj has 16 outputs
    assert (stored["format_version"], stored["exact_lora_rank"]) == (4, ranks)
    assert read_adapter(path).exact_lora_rank == ranks
    shown = "12" if "rank" in options else "16 to 32"
    assert f"| exact LoRA rank | {shown} |" in (path / "README.md").read_text(encoding="utf-8")


def test_adapters_from_before_ranks_load(adapter: Path) -> None:
    change_config(adapter, rank=None, exact_lora_rank=None)
    assert "rank" not in (adapter / CONFIG_NAME).read_text()
    found = read_adapter(adapter)
    assert (found.config, found.exact_lora_rank) == (config(), [])


# --- accidents ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_never_saved(value: float, adapter: Path, adapted: nn.Module) -> None:
    before = contents(adapter.parent)
    name, parameter = next((n, p) for n, p in adapted.named_parameters() if p.requires_grad)
    with torch.no_grad():
        parameter.view(-1)[-1] = value
    with pytest.raises(AdapterError, match=rf"1 of its \d+ tensors hold a NaN or an infinity \(first {name}"):
        save_adapter(adapter, adapted, config(), BASE)
    assert contents(adapter.parent) == before


def test_an_adapter_whose_replacement_was_killed_is_found(adapter: Path) -> None:
    before = contents(adapter)
    adapter.rename(adapter.with_name(f"{adapter.name}.older-abcd1234"))
    with pytest.warns(UserWarning, match="a killed process had left it"):
        assert read_adapter(adapter).config == config()
    assert contents(adapter) == before


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run with the usual files, the second of two."""
    for number in (0, 1):
        for name in ("best", "last"):
            folder = tmp_path / "moka" / f"version_{number}" / "adapters" / name
            folder.mkdir(parents=True)
            (folder / CONFIG_NAME).write_text("{}")
            os.utime(folder / CONFIG_NAME, (number, number))
    run = tmp_path / "moka" / "version_1"
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "last.ckpt").touch()
    (run / "adapters" / "best" / WEIGHTS_NAME).touch()
    return run


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (".", "it has no adapter_config.json; give a folder in it, such as {run}/adapters/best"),
        ("adapters", "it has no adapter_config.json; give a folder in it, such as {run}/adapters/best"),
        ("..", "it has no adapter_config.json; give a folder in it, such as {run}/adapters/best"),
        ("../..", "it has no adapter_config.json; give a folder in it, such as {run}/adapters/best"),
        ("adapters/best/adapter_model.safetensors", "it is a file; give the folder {run}/adapters/best"),
        ("checkpoints/last.ckpt", "it is a file; give the folder {run}/adapters/best"),
        ("checkpoints", "it has no adapter_config.json"),
    ],
)
def test_what_is_near_is_named(given: str, told: str, run: Path) -> None:
    path = Path(os.path.normpath(run / given))
    with pytest.raises(AdapterError) as refused:
        read_adapter(path)
    assert str(refused.value) == f"{path} is not an adapter directory: {told.format(run=run)}"


def test_a_whole_model_is_no_adapter(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    with pytest.raises(AdapterError, match=r"it has no adapter_config.json; it holds a whole model$"):
        read_adapter(tmp_path)


@pytest.mark.parametrize("path", ["", "  "])
def test_an_empty_path_is_not_the_folder_where_one_is(adapter, monkeypatch, path):
    monkeypatch.chdir(adapter)
    with pytest.raises(AdapterError, match=r"\(adapter_path\) is empty; give an adapter directory, such as"):
        read_adapter(path)
    assert read_adapter(Path()) == read_adapter(adapter)
