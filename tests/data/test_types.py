import ast
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

import moka_pl
from moka_pl.data import CommonsenseData, InstructionData, MixtureData, MmluData, TextData
from moka_pl.data.types import DataDefaults, HasTokenizer, ModuleProtocol, data_of
from moka_pl.training.module import MokaModule

OFFERED = {
    name
    for protocol in (DataDefaults, ModuleProtocol, HasTokenizer)
    for name in vars(protocol)
    if not name.startswith("_")
}


class ForeignData(pl.LightningDataModule):
    """Another's data module, which knows nothing of the contract."""

    def __init__(self, batch):
        super().__init__()
        self.batch = batch

    def val_dataloader(self):
        return DataLoader([self.batch, self.batch], batch_size=None)


def trainer_of(datamodule):
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.datamodule = datamodule
    return trainer


def test_the_contract_names_what_it_should():
    assert {"packing", "eval_sets", "task_groups", "generated_tokens", "prompt", "report"} < OFFERED
    assert {"tokenizer", "adapter_prompt", "prepare_batch"} < OFFERED


def test_nobody_looks_what_the_contract_offers_up_by_name():
    """Mypy sees to the contract only where attributes are written as such."""
    for file in Path(moka_pl.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id
            name = node.args[1:2] if called in ("getattr", "hasattr") else []
            if name and isinstance(name[0], ast.Constant):
                assert name[0].value not in OFFERED | {"datamodule"}, f"{file}, line {node.lineno}"


@pytest.mark.parametrize("kind", [CommonsenseData, InstructionData, MmluData, TextData])
def test_our_data_modules_are_asked_themselves(kind):
    data = kind(path="sample", packing=True)
    assert data_of(trainer_of(data)) is data
    assert data_of(trainer_of(data)).packing
    mixture = MixtureData([data], packing=True)
    assert data_of(trainer_of(mixture)) is mixture


@pytest.mark.parametrize("data", [None, ForeignData({})])
def test_all_others_are_taken_for_one_set_of_labelled_tokens(data):
    offered = data_of(trainer_of(data))
    assert type(offered) is DataDefaults
    assert (offered.packing, offered.generated_tokens, offered.prompt) == (False, 0, None)
    assert (offered.eval_sets, offered.task_groups) == ([("data", [])], {})
    assert (dict(offered.report), offered.reports) == ({}, [])


def test_the_package_s_module_offers_all_that_data_modules_ask_for():
    assert {"adapter_prompt", "prepare_batch", "tokenizer"} <= set(vars(MokaModule())) | set(dir(MokaModule))


def test_data_modules_work_with_a_module_that_has_a_tokenizer_only(tiny_tokenizer):
    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.tokenizer = tiny_tokenizer

    module = Module()
    assert isinstance(module, HasTokenizer)
    assert not isinstance(module, ModuleProtocol)
    data = InstructionData()
    data.trainer = trainer_of(data)
    data.trainer.strategy.connect(module)
    assert data.tokenizer is tiny_tokenizer
    assert data.trained_prompt is None
    batch = {"input_ids": torch.zeros(1, 8), "labels": torch.zeros(1, 8)}
    assert data.on_before_batch_transfer(batch, 0) is batch


def test_another_s_data_module_and_plain_loaders_are_evaluated(make_module):
    ids = torch.arange(8)[None]
    batch = {"input_ids": ids, "labels": ids}
    module = make_module()
    data = ForeignData(batch)
    results = [
        trainer_of(None).validate(module, datamodule=data, verbose=False),
        trainer_of(None).validate(module, data.val_dataloader(), verbose=False),
    ]
    assert results[0] == results[1]
    assert results[0][0].keys() == {"val/loss"}


@pytest.mark.parametrize("kind", [CommonsenseData, InstructionData, TextData])
def test_sources_are_named_without_their_folders(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "private.jsonl").write_text("")
    for path, named in [
        ("~/private.jsonl", "private.jsonl"),
        ([str(tmp_path / "private.jsonl"), "me/corpus"], "private.jsonl, me/corpus"),
        (["a/b"] * 6, "a/b, a/b, a/b, a/b and 2 more"),
    ]:
        assert kind(path=path).source == f"{kind.__name__}: {named}"
