"""Data that are read and tokenised once for all runs."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningDataModule

from moka_pl.data import MokaDataModule
from moka_pl.studies.compare.build import backbone_of, build_data
from moka_pl.studies.compare.suite import Suite, merged

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PreparedData(LightningDataModule):
    """Loaders of a data module that is set up already, in an order that a seed decides.

    Args:
        data: The data module.
        tokenizer: The base model's.
        stage: ``fit`` for training and validation data, ``test`` for test data.
    """

    def __init__(self, data: MokaDataModule, tokenizer: "PreTrainedTokenizerBase", stage: str) -> None:
        super().__init__()
        data.connect(tokenizer)
        data.setup(stage)
        self.data = data
        self.packing = data.packing
        self.eval_sets = data.eval_sets
        self.task_groups = data.task_groups

    def order(self, seed: int) -> "PreparedData":
        """Sets the seed of the training order."""
        self.data.seed = seed
        return self

    def train_dataloader(self) -> Any:
        """Shuffled batches; a new loader, which knows of no earlier run."""
        return self.data.train_dataloader()

    def val_dataloader(self) -> Any:
        """Every validation example once."""
        return self.data.val_dataloader()

    def test_dataloader(self) -> Any:
        """Every test example once."""
        return self.data.test_dataloader()

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Lets the module see a batch while it is on the CPU."""
        self.data.trainer = self.trainer
        return self.data.on_before_batch_transfer(batch, dataloader_idx)


def prepare_data(suites: Sequence[Suite]) -> None:
    """Reads and tokenises the data of all suites, so that every process finds them in the cache.

    Args:
        suites: The suites; data that they have in common are prepared once.

    Raises:
        MokaError: If data or tokenizers cannot be had.
    """
    from moka_pl.backbone import load_tokenizer

    seen = set()
    for suite in suites:
        backbones = [merged(suite.backbone, rival.backbone) for rival in suite.rivals] or [suite.backbone]
        for backbone in backbones:
            for settings, stage in ((suite.data, "fit"), (suite.test or suite.data, "test")):
                key = json.dumps(
                    [settings, stage, backbone.get("name"), backbone.get("revision")], sort_keys=True
                )
                if key not in seen:
                    seen.add(key)
                    tokenizer = load_tokenizer(backbone_of(backbone))
                    PreparedData(build_data(settings), tokenizer, stage)
