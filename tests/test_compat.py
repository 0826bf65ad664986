"""Private names of other libraries: used in one place only, and there as its docstrings say."""

import ast
import csv
import subprocess
import threading
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

from moka_pl import _compat

ROOT = Path(__file__).parents[1]
FENCE = "moka_pl/_compat.py"

#: Private names of other libraries outside the fence, by file: methods that a class has to override in place.
ALLOWED = {"moka_pl/callbacks/progress.py": {"_should_update"}}
#: Named tuples and ``os`` have these as public names.
PUBLIC = {"_asdict", "_exit", "_fields", "_replace"}

#: Python gives these to classes of a kind.
IMPLIED = {"_abc_impl", "_backward_cls", "_is_protocol", "_is_runtime_protocol"}
#: What a class calls its own objects.
OWNERS = ("self", "cls")
#: Python's functions that take an attribute's name.
ACCESSORS = ("getattr", "setattr", "hasattr", "delattr")

FILES = sorted((*ROOT.glob("moka_pl/**/*.py"), *ROOT.glob("scripts/*.py")))
TREES = {file.relative_to(ROOT).as_posix(): ast.parse(file.read_text(encoding="utf-8")) for file in FILES}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def is_name(node: ast.expr, names: tuple[str, ...]) -> bool:
    return isinstance(node, ast.Name) and node.id in names


def defined_names(tree: ast.Module) -> Iterator[str]:
    """Private names that a file gives to functions, classes, fields and attributes of its own objects."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and is_name(node.value, OWNERS)
        ):
            yield node.attr


def private_names(tree: ast.Module) -> Iterator[str]:
    """Private names that a file asks other objects and modules for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            yield node.attr
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("moka_pl"):
            parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            yield from filter(is_private, parts)
        elif isinstance(node, ast.Import):
            yield from filter(is_private, ".".join(alias.name for alias in node.names).split("."))
        elif isinstance(node, ast.Call) and is_name(node.func, ACCESSORS):
            names = [argument.value for argument in node.args[1:2] if isinstance(argument, ast.Constant)]
            yield from filter(is_private, names)


OWN = {name for file, tree in TREES.items() if file != FENCE for name in defined_names(tree)} | PUBLIC


def overridden_names() -> dict[str, set[str]]:
    """Private names of other libraries' classes that ours define anew, by file."""
    found: dict[str, set[str]] = {}
    for file, tree in TREES.items():
        kinds = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
        if not kinds or not file.startswith("moka_pl/"):
            continue
        module = import_module(file.removesuffix(".py").replace("/", "."))
        for kind in (getattr(module, name) for name in kinds):
            others = [base for base in kind.__mro__ if not base.__module__.startswith("moka_pl")]
            theirs = {name for base in others for name in vars(base) if is_private(name)}
            if names := theirs & vars(kind).keys() - IMPLIED:
                found[file] = found.get(file, set()) | names
    return found


def test_private_names_of_other_libraries_stay_in_the_fence() -> None:
    found = {file: set(private_names(tree)) - OWN for file, tree in TREES.items() if file != FENCE}
    for file, names in overridden_names().items():
        found[file] |= names
    assert {file: names for file, names in found.items() if names} == ALLOWED, f"fence them in {FENCE}"


def test_nothing_is_patched_in_modules_of_other_libraries() -> None:
    patched = set()
    for tree in TREES.values():
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
        theirs = [node for node in imports if not getattr(node, "module", "").startswith("moka_pl")]
        names = {(alias.asname or alias.name).split(".")[0] for node in theirs for alias in node.names}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                written = ast.unparse(node)
                if written.split(".")[0] in names:
                    patched.add(written)
    # A worker process's streams, and hooks that Python documents for this purpose.
    hooks = {"threading.excepthook", "warnings.formatwarning", "warnings.showwarning"}
    # Public switches, put back when the hub's cache has been read; docs/global-changes.md tells of them.
    switches = {"constants.HF_HUB_OFFLINE", "config.HF_HUB_OFFLINE"}
    assert patched == {"sys.stdout", "sys.stderr"} | hooks | switches


def test_every_function_of_the_fence_is_documented_and_used() -> None:
    text = "".join(file.read_text(encoding="utf-8") for file in FILES if file != ROOT / FENCE)
    for node in TREES[FENCE].body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            docstring = ast.get_docstring(node) or ""
            assert "Without it" in docstring or "see :func:" in docstring, node.name
            assert node.name in text, node.name


# torch


def test_hooks_of_every_kind_are_counted() -> None:
    layer = nn.Linear(2, 2)
    assert _compat.hook_count(layer) == 0
    layer.register_forward_hook(lambda *_: None)
    layer.register_forward_pre_hook(lambda *_: None)
    layer.register_full_backward_hook(lambda *_: None)
    handle = layer.register_full_backward_pre_hook(lambda *_: None)
    assert _compat.hook_count(layer) == 4
    handle.remove()
    assert _compat.hook_count(layer) == 3


def test_many_tensors_are_multiplied_and_copied_at_once() -> None:
    tensors, factor = [torch.ones(3), torch.full((2, 2), 2.0)], torch.tensor(3.0)
    products = _compat.multiplied(tensors, factor)
    assert [t.sum().item() for t in (*tensors, *products)] == [3, 8, 9, 24]
    _compat.multiply_all_(tensors, factor)
    assert [t.sum().item() for t in tensors] == [9, 24]
    _compat.copy_all_(tensors, (torch.zeros(3), torch.ones(2, 2)))
    assert [t.sum().item() for t in tensors] == [0, 4]


def test_a_fused_step_is_skipped_by_a_flag() -> None:
    weight = nn.Parameter(torch.ones(3))
    for fused, left in ((True, 1.0), (False, 0.5)):
        optimizer = torch.optim.AdamW([weight], lr=0.5, weight_decay=0.0, fused=fused)
        weight.grad = torch.ones(3)
        assert _compat.skip_on_device(optimizer, torch.tensor(True)) is fused
        optimizer.step()
        torch.testing.assert_close(weight.detach(), torch.full((3,), left))
        assert [float(state["step"]) for state in optimizer.state.values()] == [0.0 if fused else 1.0]


def test_ddp_leaves_out_what_it_is_told_to(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[0].requires_grad_(False)
    _compat.leave_out_of_ddp(module, ["0.weight", "0.bias"])
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert DistributedDataParallel(module).parameters_to_ignore == {"0.weight", "0.bias"}
    finally:
        torch.distributed.destroy_process_group()


def test_a_checkpoint_is_made_and_not_written(tmp_path: Path) -> None:
    quiet = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar"], False)
    trainer = Trainer(accelerator="cpu", fast_dev_run=1, default_root_dir=tmp_path, **quiet)
    model = BoringModel()
    trainer.fit(model)
    found = _compat.dump_checkpoint(trainer)
    assert found["state_dict"].keys() == model.state_dict().keys()
    assert {"loops", "optimizer_states", "global_step"} <= found.keys()
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_moments_checkpoints_are_made_once(tmp_path: Path) -> None:
    class Save(Callback):
        def on_train_batch_end(self, trainer: Trainer, *of_batch: object) -> None:
            with _compat.dumped_once(trainer):
                for name in "ab":
                    trainer.save_checkpoint(tmp_path / name)
                trainer.save_checkpoint(tmp_path / "c", weights_only=True)
                other = threading.Thread(target=_compat.dump_checkpoint, args=[trainer])
                other.start()
                other.join()
            trainer.save_checkpoint(tmp_path / "d")

        def on_save_checkpoint(self, *of_checkpoint: object) -> None:
            made.append(threading.current_thread() is threading.main_thread())

    made: list[bool] = []
    quiet = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar"], False)
    Trainer(accelerator="cpu", max_steps=1, callbacks=[Save()], default_root_dir=tmp_path, **quiet).fit(
        BoringModel()
    )
    assert made == [True, False, True]  # none for weights only
    a, c = (torch.load(tmp_path / name, weights_only=True) for name in "ac")
    assert "optimizer_states" in a
    assert "optimizer_states" not in c


def test_metrics_are_logged_under_the_number_of_an_earlier_step(tmp_path: Path) -> None:
    class Late(Callback):
        def on_train_batch_end(self, trainer: Trainer, *of_batch: object) -> None:
            if trainer.global_step == 3:
                _compat.log_metrics(trainer, {"late": torch.tensor(0.5)}, 1)

    quiet = dict.fromkeys(["enable_checkpointing", "enable_progress_bar"], False)
    logger = CSVLogger(tmp_path)
    trainer = Trainer(accelerator="cpu", max_steps=3, callbacks=[Late()], logger=logger, **quiet)
    trainer.fit(BoringModel())
    assert trainer.logged_metrics["late"] == 0.5
    text = Path(logger.log_dir, "metrics.csv").read_text(encoding="utf-8")
    (row,) = csv.DictReader(text.splitlines())
    assert row == {"late": "0.5", "step": "1"}


# transformers, datasets, PEFT


def test_a_models_attention_can_be_asked_for_and_put_back(tiny_llama) -> None:
    tiny_llama.set_attn_implementation("eager")
    assert _compat.attention_implementation(tiny_llama) == "eager"
    tiny_llama.set_attn_implementation("sdpa")
    assert _compat.attention_implementation(tiny_llama) == "sdpa"
    _compat.set_attention(tiny_llama, "eager")
    assert _compat.attention_implementation(tiny_llama) == "eager"
    assert tiny_llama.model.layers[0].self_attn.config._attn_implementation == "eager"
    assert _compat.supports_flash_attention(tiny_llama)


def test_tensors_are_unused_that_neither_model_nor_class_names(tiny_llama) -> None:
    tiny_llama._keys_to_ignore_on_load_unexpected = {r"^model\.layers\.9\."}
    ignored = ["model.layers.9.norm.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"]
    stored = ["model.norm.weight", *ignored, "model.layers.2.norm.weight"]
    assert _compat.unused_tensors(tiny_llama, stored) == ["model.layers.2.norm.weight"]


def test_a_trainer_takes_a_marked_model_as_adapted(tiny_llama) -> None:
    from transformers.trainer_utils import validate_quantization_for_training

    tiny_llama.is_quantized = True
    with pytest.raises(ValueError, match="purely quantized"):
        validate_quantization_for_training(tiny_llama)
    tiny_llama.hf_quantizer = SimpleNamespace(is_trainable=True, is_qat_trainable=False)
    _compat.mark_as_adapted(tiny_llama, ["lm_head.weight"])
    validate_quantization_for_training(tiny_llama)
    assert tiny_llama._keys_to_ignore_on_save == {"lm_head.weight"}
    _compat.mark_as_adapted(tiny_llama, None)
    with pytest.raises(ValueError, match="purely quantized"):
        validate_quantization_for_training(tiny_llama)
    assert tiny_llama._keys_to_ignore_on_save == set(type(tiny_llama)._keys_to_ignore_on_save or ())


def test_rows_have_a_fingerprint_of_what_they_are() -> None:
    rows, same = (Dataset.from_dict({"number": [1, 2, 3]}) for _ in range(2))
    assert _compat.rows_fingerprint(rows) == _compat.rows_fingerprint(same)
    assert _compat.rows_fingerprint(rows) != _compat.rows_fingerprint(rows.select([0, 2]))


def test_a_layer_of_peft_computes_as_its_base_and_keeps_what_is_trained(tiny_llama, token_ids) -> None:
    peft = pytest.importorskip("peft")
    before = tiny_llama(token_ids).logits
    model = peft.get_peft_model(
        tiny_llama, peft.LoraConfig(init_lora_weights=False, target_modules=["q_proj"])
    )
    layers = [m for m in model.modules() if isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer)]
    trained = [p.requires_grad for p in model.parameters()]
    assert not torch.equal(model(token_ids).logits, before)
    for layer in layers:
        _compat.disable_adapters(layer, True)
        assert layer.disable_adapters
    assert torch.equal(model(token_ids).logits, before)
    assert [p.requires_grad for p in model.parameters()] == trained
    for layer in layers:
        _compat.disable_adapters(layer, False)
    assert not torch.equal(model(token_ids).logits, before)


# Lightning, TensorBoard


class Squares(LightningModule):
    """Fits one number."""

    def __init__(self) -> None:
        super().__init__()
        self.number = nn.Parameter(torch.ones(1))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return ((batch - self.number) ** 2).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Probe(Callback):
    """Notes the training's loader, and saves ``last.ckpt`` after the first step."""

    def __init__(self, checkpoints: ModelCheckpoint) -> None:
        self.checkpoints = checkpoints
        self.loader: object = None
        self.written: list[list[str]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        assert _compat.trainer_of(pl_module) is trainer
        make_loader = _compat.training_loader(trainer)
        assert make_loader is not None
        self.loader = make_loader()

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        if trainer.global_step == 1:
            _compat.save_last_checkpoint(self.checkpoints, trainer)
            self.written.append(sorted(file.name for file in Path(self.checkpoints.dirpath).iterdir()))


def test_the_training_loader_is_found_and_the_last_checkpoint_written_at_any_step(tmp_path: Path) -> None:
    checkpoints = ModelCheckpoint(tmp_path, "{step}", save_last=True, every_n_train_steps=1)
    probe = Probe(checkpoints)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=1,
        callbacks=[probe, checkpoints],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(torch.arange(4.0))
    module = Squares()
    assert _compat.trainer_of(module) is None
    trainer.fit(module, loader)
    assert probe.loader is loader
    # The regular checkpoint of the same step is still written.
    assert probe.written == [["last.ckpt"]]
    assert {file.name for file in tmp_path.iterdir()} == {"last.ckpt", "step=1.ckpt"}


def test_ranks_do_not_ask_each_other_for_a_signal_before_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the loop of this version would, if it has a method of that name."""
    loop = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False).fit_loop.epoch_loop
    kind, name, asked = type(loop), "_broadcast_sigterm_tensor", []
    monkeypatch.setattr(kind, name, lambda self: asked.append(self), raising=False)
    with _compat.without_sigterm_broadcast(loop.trainer):
        getattr(loop, name)()
    assert asked == []
    getattr(loop, name)()
    assert asked == [loop]
    monkeypatch.delattr(kind, name)
    with _compat.without_sigterm_broadcast(loop.trainer):
        assert not hasattr(loop, name)


def test_the_event_writer_opens_again_after_it_was_closed(tmp_path: Path) -> None:
    experiment = SummaryWriter(str(tmp_path))
    first = _compat.event_writer(experiment)
    assert _compat.event_writer(experiment) is first
    experiment.close()
    assert _compat.event_writer(experiment).get_logdir() == str(tmp_path)
    experiment.close()


def test_lightning_s_observer_kills_nobody_any_more() -> None:
    child = subprocess.Popen(["false"])
    child.wait()
    observer = _ChildProcessObserver(main_pid=0, child_processes=[child], sleep_period=0)
    threads = [observer, threading.current_thread()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading, "enumerate", lambda: threads)
        _compat.without_process_observer()
        patch.setattr(observer, "_terminate_all", lambda: pytest.fail("killed"))
        assert observer._run()
