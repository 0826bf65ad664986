import lightning.pytorch as pl
import pytest
import torch
from jsonargparse import ArgumentParser

from moka_pl.data import CommonsenseData, DataError, InstructionData, MixtureData, MokaDataModule
from moka_pl.data.sampler import EvalSampler, TrainSampler

YAML = """
data:
  class_path: moka_pl.data.MixtureData
  init_args:
    batch_size: 3
    parts:
      - class_path: moka_pl.data.InstructionData
        init_args: {prompt: alpaca, max_length: 256}
      - class_path: moka_pl.data.CommonsenseData
        init_args: {validation_limit: 2}
"""


class Model(pl.LightningModule):
    def __init__(self, tokenizer):
        super().__init__()
        self.tokenizer = tokenizer
        self.layer = torch.nn.Linear(1, 1)
        self.seen = []

    def training_step(self, batch, batch_idx):
        assert isinstance(self.trainer.train_dataloader.sampler, TrainSampler)
        return self.layer(torch.ones(1)).sum()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.seen.append((dataloader_idx, "item" in batch))

    test_step = predict_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder, **options):
    return pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )


def parse(text):
    parser = ArgumentParser()
    parser.add_subclass_arguments(MokaDataModule, "data")
    return parser.instantiate_classes(parser.parse_string(text)).data


def test_from_yaml(tiny_tokenizer):
    mixture = parse(YAML)
    assert isinstance(mixture, MixtureData)
    assert [part.max_length for part in mixture.parts] == [256, 512]
    mixture.connect(tiny_tokenizer)
    mixture.prepare_data()
    mixture.setup()
    assert mixture.report["train"].read == 115 + 224
    assert [name for name, _ in mixture.eval_sets] == ["instruction", "commonsense"]
    assert len(mixture.eval_sets[1][1]) == 8
    loaders = mixture.val_dataloader()
    assert ["item" in next(iter(loader)) for loader in loaders] == [False, True]
    assert next(iter(loaders[0]))["input_ids"].shape[0] == 3
    assert mixture.parts[1].report["validation"].read == 16
    rows = sum(batch["input_ids"].shape[0] for batch in mixture.train_dataloader())
    assert rows == mixture.report["train"].kept


def test_path_options_from_yaml():
    module = parse("data: {class_path: moka_pl.data.InstructionData, init_args: {path: [a.jsonl, b.jsonl]}}")
    assert list(map(str, module.path)) == ["a.jsonl", "b.jsonl"]
    assert parse("data: {class_path: moka_pl.data.InstructionData}").path == "sample"


def test_equal_names_are_numbered_and_mixtures_nest():
    inner = MixtureData([InstructionData(), InstructionData(prompt="alpaca")])
    mixture = MixtureData([inner, CommonsenseData(tasks=["boolean"])])
    assert mixture.eval_sets == [("instruction", []), ("instruction_2", []), ("commonsense", ["boolean"])]


@pytest.mark.parametrize(
    ("parts", "prompt"),
    [
        ([CommonsenseData(tasks=["boolean"])], "cloze"),
        ([InstructionData(prompt="alpaca"), CommonsenseData(tasks=["boolean"])], "alpaca"),
        ([InstructionData(), MixtureData([InstructionData()])], "chat"),
        ([InstructionData(), InstructionData(prompt="alpaca")], None),
    ],
)
def test_prompt_is_the_one_that_all_instructions_have(parts, prompt):
    assert MixtureData(parts).prompt == prompt


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_sets_are_those_of_the_dataloaders(tiny_tokenizer, write_jsonl, stage):
    path = write_jsonl("a.jsonl", [{"instruction": "Say it.", "output": "It."}])
    mixture = MixtureData([InstructionData(path, validation_share=0), CommonsenseData(tasks=["boolean"])])
    mixture.connect(tiny_tokenizer)
    mixture.setup(stage)
    loaders = mixture.val_dataloader() if stage in ("fit", "validate") else mixture.test_dataloader()
    assert ["item" in next(iter(loader)) for loader in loaders] == [True]
    assert mixture.eval_sets == [("commonsense", ["boolean"])]


def test_parts_without_validation_are_left_out(tiny_tokenizer, write_jsonl):
    path = write_jsonl("a.jsonl", [{"instruction": "Say it.", "output": "It."}])
    mixture = MixtureData([InstructionData(path, validation_share=0), InstructionData()])
    mixture.connect(tiny_tokenizer)
    mixture.setup()
    assert mixture.eval_sets == [("instruction", [])]
    assert len(mixture.val_dataloader()) == 1
    assert mixture.report["train"].read == 153


def test_no_parts():
    with pytest.raises(DataError, match="at least one part"):
        MixtureData([])


@pytest.mark.filterwarnings("ignore")
def test_with_a_trainer(tiny_tokenizer, tmp_path):
    model = Model(tiny_tokenizer)
    nested = MixtureData([InstructionData(max_length=256)], batch_size=2)
    mixture = MixtureData([nested, CommonsenseData(validation_limit=2)], batch_size=8)
    run = trainer(tmp_path, limit_train_batches=3)
    run.fit(model, datamodule=mixture)
    assert set(model.seen) == {(0, False), (1, True)}
    assert mixture.train_dataloader().epoch_batches == 3
    for action in (run.validate, run.test, run.predict):
        model.seen.clear()
        action(model, datamodule=mixture)
        assert set(model.seen) == {(0, False), (1, True)}
    assert all(isinstance(loader.sampler, EvalSampler) for loader in run.predict_dataloaders)


@pytest.mark.filterwarnings("ignore")
def test_trainer_without_validation_data(tiny_tokenizer, tmp_path, write_jsonl):
    path = write_jsonl("a.jsonl", [{"instruction": "Say it.", "output": "It."}])
    model = Model(tiny_tokenizer)
    trainer(tmp_path).fit(model, datamodule=InstructionData(path, validation_share=0))
    assert model.seen == []


@pytest.mark.filterwarnings("ignore")
def test_trainer_that_overfits(tiny_tokenizer, tmp_path):
    class Overfit(Model):
        def training_step(self, batch, batch_idx):
            assert batch["input_ids"].shape[0] == 1
            return self.layer(torch.ones(1)).sum()

    trainer(tmp_path, overfit_batches=2).fit(Overfit(tiny_tokenizer), datamodule=CommonsenseData())
