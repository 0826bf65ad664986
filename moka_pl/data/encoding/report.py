"""What became of the examples of a split."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EncodingReport:
    """Counts over one split.

    Attributes:
        read: Examples read.
        kept: Examples that are used, truncated ones included.
        truncated: Used examples that lost tokens to `max_length`.
        dropped: Examples left out because no trained (or scorable) token fits into `max_length`.
        tokens: Tokens of the kept examples; for multiple choice over all rows (prompt and option).
        trained: Those of them that are trained or scored.
        longest: Tokens of the longest example read, before any cut.
        shortened: Questions whose prompt lost solved examples (shots) to `max_length`.
        left_out: Shots that they lost, together.
    """

    read: int
    kept: int
    truncated: int
    dropped: int
    tokens: int
    trained: int
    longest: int
    shortened: int = 0
    left_out: int = 0

    def __str__(self) -> str:
        lost = f"; {self.left_out:,} shots left out of {self.shortened:,} prompts" if self.shortened else ""
        return (
            f"{self.read:,} examples read, {self.kept:,} kept ({self.truncated:,} of them truncated), "
            f"{self.dropped:,} dropped; {self.tokens:,} tokens, {self.trained:,} of them trained or scored; "
            f"longest example {self.longest:,} tokens{lost}"
        )

    def __add__(self, other: "EncodingReport") -> "EncodingReport":
        """The counts of both splits together."""
        return EncodingReport(
            read=self.read + other.read,
            kept=self.kept + other.kept,
            truncated=self.truncated + other.truncated,
            dropped=self.dropped + other.dropped,
            tokens=self.tokens + other.tokens,
            trained=self.trained + other.trained,
            longest=max(self.longest, other.longest),
            shortened=self.shortened + other.shortened,
            left_out=self.left_out + other.left_out,
        )
