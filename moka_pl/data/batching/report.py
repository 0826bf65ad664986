"""Counts of tokens and padding in the batches of an epoch."""

from dataclasses import dataclass

from moka_pl.data.batching.collate import padded
from moka_pl.data.batching.samplers import GlobalBatchSampler


@dataclass(frozen=True)
class EpochReport:
    """Counts over the batches of one epoch, all ranks together.

    Attributes:
        batches: Global batches.
        rows: Rows of all batches.
        examples: Examples in them.
        tokens: Tokens of the examples.
        padded_tokens: Tokens with the padding.
        widest: Tokens of the widest row, with its padding.
    """

    batches: int
    rows: int
    examples: int
    tokens: int
    padded_tokens: int
    widest: int

    @property
    def padding_share(self) -> float:
        """Share of the tokens that are padding."""
        return 1 - self.tokens / self.padded_tokens if self.padded_tokens else 0.0

    def __str__(self) -> str:
        rows = f" packed into {self.rows:,} rows" if self.rows < self.examples else ""
        return (
            f"{self.examples:,} examples{rows} in {self.batches:,} batches per epoch, rows of up to "
            f"{self.widest:,} tokens, {100 * self.padding_share:.1f}% padding"
        )


def epoch_report(sampler: GlobalBatchSampler) -> EpochReport:
    """Counts the batches of a sampler's current epoch, without fillers."""
    batches = sampler.global_batches()
    rows = padded_tokens = widest = 0
    for batch in batches:
        lengths = sampler.row_lengths(batch)
        rows += len(lengths)
        for rank in range(min(sampler.num_replicas, len(lengths))):
            share = lengths[rank :: sampler.num_replicas]
            width = padded(max(share))
            padded_tokens += width * len(share)
            widest = max(widest, width)
    examples, tokens = len(sampler.lengths), int(sampler.lengths.sum())
    return EpochReport(len(batches), rows, examples, tokens, padded_tokens, widest)
