"""Several data modules as one."""

from functools import reduce
from operator import add
from typing import Any

from torch.utils.data import DataLoader

from moka_pl.data.base import EvalLoaders, MokaDataModule
from moka_pl.data.choice_prompts import CHOICE_PROMPTS
from moka_pl.data.encode import Encoded
from moka_pl.data.errors import DataError


class MixtureData(MokaDataModule):
    """Trains on the examples of all parts, shuffled together, and evaluates every part on its own.

    Each part encodes its examples with its own options (paths, prompt, max_length, num_proc); how batches are
    made and loaded is this module's business, for training and evaluation.

    Args:
        parts: The data modules, in the order of their validation dataloaders.
        **options: batch_size, num_workers, seed, bucket, eval_batch_size (see MokaDataModule); max_length and
            num_proc have no effect here.
    """

    name = "mixture"

    def __init__(self, parts: list[MokaDataModule], **options: Any) -> None:
        super().__init__(**options)
        if not parts:
            raise DataError("A mixture needs at least one part.")
        self.parts = parts

    @property
    def prompt(self) -> str | None:  # type: ignore[override]
        """The parts' prompt, if it is one; beside instructions, the form of questions is not to ask in."""
        prompts = {part.prompt for part in self.parts if part.prompt is not None}
        prompts = prompts - CHOICE_PROMPTS.keys() or prompts
        return prompts.pop() if len(prompts) == 1 else None

    @property
    def prompt_key(self) -> str | None:
        """The prompts of all parts."""
        return " ".join(str(part.prompt) for part in self.parts)

    @property
    def generated_tokens(self) -> int:  # type: ignore[override]
        """Most tokens of an answer that any part generates."""
        return max(part.generated_tokens for part in self.parts)

    @property
    def task_groups(self) -> dict[str, list[str]]:
        """The groups of all parts."""
        return {name: tasks for part in self.parts for name, tasks in part.task_groups.items()}

    @property
    def eval_sets(self) -> list[tuple[str, list[str]]]:
        """(name, tasks) of every part with evaluation data; equal names are numbered from the second on."""
        sets: list[tuple[str, list[str]]] = []
        seen: dict[str, int] = {}
        for part in self.parts:
            for name, tasks in part.eval_sets:
                seen[name] = seen.get(name, 0) + 1
                sets.append((name if seen[name] == 1 else f"{name}_{seen[name]}", tasks))
        return sets

    def encode(self, split: str) -> Encoded | None:
        """The parts' encoded rows one after another (training), or nothing of its own (evaluation)."""
        from datasets import concatenate_datasets

        parts = [encoded for part in self._connected() if (encoded := part.encode(split)) is not None]
        if split != "train" or not parts:
            return None
        return Encoded(
            concatenate_datasets([encoded.rows for encoded in parts]),
            reduce(add, [part.report for part in parts]),
        )

    def setup(self, stage: str | None = None) -> None:
        """Set the parts up, then the mixture of their training rows."""
        for part in self._connected():
            part.setup(stage)
        super().setup(stage)

    def _connected(self) -> list[MokaDataModule]:
        for part in self.parts:
            part.connect(self.tokenizer, self.trained_prompt)
        return self.parts

    def _eval_loader(self, split: str) -> EvalLoaders:
        loaders: list[DataLoader[Any]] = []
        for part in self.parts:
            part.trainer = self.trainer
            part.num_workers, part.eval_batch_size = self.num_workers, self.eval_batch_size
            loader = part._eval_loader(split)
            loaders += loader if isinstance(loader, list) else [loader]
        return loaders
