"""Random rows of one length, already tokens, through the package's own data module and loader."""

import random

from moka_pl.data import EncodingReport, MokaDataModule
from moka_pl.data.encoding.examples import Encoded

#: Ids that every tokenizer and vocabulary has.
_FIRST, _LAST = 4, 259


class SyntheticData(MokaDataModule):
    """Training rows of exactly ``length`` random tokens, all of them trained on; no validation.

    Args:
        batch_size: Examples per device and micro-batch.
        length: Tokens of every example.
        batches: Batches of an epoch.
        num_workers: Processes per device that load batches.
        seed: Seed of the tokens and of the shuffling.
    """

    name = "synthetic"

    def __init__(
        self, batch_size: int = 8, length: int = 512, batches: int = 100, num_workers: int = 0, seed: int = 0
    ) -> None:
        super().__init__(batch_size=batch_size, max_length=max(2, length), num_workers=num_workers, seed=seed)
        self.length = length
        self.batches = batches

    def encode(self, split: str) -> Encoded | None:
        """Draws the training rows; there are no others."""
        if split != "train":
            return None
        from datasets import Dataset

        draw = random.Random(self.seed)
        count = self.batch_size * self.batches
        rows = [[draw.randint(_FIRST, _LAST) for _ in range(self.length)] for _ in range(count)]
        sizes = [self.length] * count
        table = Dataset.from_dict({"input_ids": rows, "labels": rows, "length": sizes, "slots": sizes})
        tokens = count * self.length
        report = EncodingReport(
            read=count,
            kept=count,
            truncated=0,
            dropped=0,
            tokens=tokens,
            trained=tokens - count,
            longest=self.length,
        )
        return Encoded(table, report)
