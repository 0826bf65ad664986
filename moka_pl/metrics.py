"""Validation metrics over all ranks: token-weighted loss and multiple-choice accuracy."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric, SumMetric


class EvalMetrics:
    """Gathers loss and accuracy of one or more validation sets.

    The loss of a set is the mean negative log-likelihood per token; for multiple choice only the right
    option's tokens count. The accuracy of a task counts items whose right option has the highest summed
    log-likelihood. Over several sets the loss, and over several tasks the accuracy, is the plain mean: a
    large set does not drown a small one.

    Numerators and denominators are sums, because ``torchmetrics.MeanMetric`` (1.9) drops its weights when it
    is told not to look for NaN, and hides NaN when it is not; here a NaN shows.

    Args:
        eval_sets: (name, tasks) of every set in dataloader order; no tasks for plain text.
        device: Where the sums are kept.
    """

    def __init__(
        self, eval_sets: Sequence[tuple[str, Sequence[str]]], device: torch.device | str = "cpu"
    ) -> None:
        def total() -> Metric:
            return SumMetric(nan_strategy="disable").set_dtype(torch.float64).to(device)

        self.device = torch.device(device)
        self.sets = [(name, list(tasks)) for name, tasks in eval_sets]
        self.nll = [total() for _ in self.sets]
        self.tokens = [total() for _ in self.sets]
        self.correct = [[total() for _ in tasks] for _, tasks in self.sets]
        self.items = [[total() for _ in tasks] for _, tasks in self.sets]

    def fits(self, eval_sets: Sequence[tuple[str, Sequence[str]]], device: torch.device) -> bool:
        """Whether these sums are for the same sets on the same device."""
        return self.device == device and self.sets == [(name, list(tasks)) for name, tasks in eval_sets]

    def update_loss(self, index: int, nll_sum: Tensor, tokens: Tensor) -> None:
        """Adds a batch's loss.

        Args:
            index: Number of the set.
            nll_sum: Summed negative log-likelihood in nats, scalar.
            tokens: Number of tokens, scalar.
        """
        self.nll[index].update(nll_sum)
        self.tokens[index].update(tokens)

    def update_choices(self, index: int, log_likelihood: Tensor, batch: dict[str, Tensor]) -> None:
        """Adds the multiple-choice items of a batch.

        Args:
            index: Number of the set.
            log_likelihood: Of every option, shape (B,).
            batch: With ``item``, ``task`` (-1 for fillers) and ``is_answer``, shape (B,) each.
        """
        item, task, is_answer = batch["item"], batch["task"], batch["is_answer"]
        items = int(item.max()) + 1
        zeros = torch.zeros(items, device=item.device)
        best = torch.full_like(zeros, -torch.inf).scatter_reduce(0, item, log_likelihood.float(), "amax")
        is_best = log_likelihood >= best[item]  # (B,)
        # A tie of the right option with a wrong one is no knowledge: it counts as wrong.
        alone = zeros.index_add(0, item, is_best.float()) == 1  # (items,)
        correct = zeros.index_add(0, item, (is_answer & is_best & alone[item]).float())  # (items,)
        task_of = torch.full_like(zeros, -1).long().scatter(0, item, task)  # (items,)
        for number in range(len(self.items[index])):
            own = task_of == number
            self.correct[index][number].update(correct[own].sum())
            self.items[index][number].update(own.sum())

    def compute(self) -> dict[str, float]:
        """Returns the metrics over everything added since the last reset, on all ranks.

        Returns:
            ``loss`` and, with tasks, ``accuracy`` over all sets; ``<set>/loss`` and ``<set>/accuracy`` where
            there are several sets; ``accuracy/<task>``. Sets and tasks without any example are left out.
        """
        values: dict[str, float] = {}
        losses: list[float] = []
        right_of: dict[str, float] = {}  # by task; one task in two sets is the same task
        count_of: dict[str, float] = {}
        for index, (name, tasks) in enumerate(self.sets):
            own = []
            for task, correct, items in zip(tasks, self.correct[index], self.items[index], strict=True):
                right, count = float(correct.compute()), float(items.compute())
                if count:
                    own.append(right / count)
                    right_of[task] = right_of.get(task, 0) + right
                    count_of[task] = count_of.get(task, 0) + count
            nll, tokens = float(self.nll[index].compute()), float(self.tokens[index].compute())
            if tokens:
                losses.append(nll / tokens)
            if len(self.sets) > 1:
                values |= {f"{name}/loss": nll / tokens} if tokens else {}
                values |= {f"{name}/accuracy": sum(own) / len(own)} if own else {}
        accuracies = {task: right / count_of[task] for task, right in right_of.items()}
        values |= {f"accuracy/{task}": value for task, value in accuracies.items()}
        if losses:
            values["loss"] = sum(losses) / len(losses)
        if accuracies:
            values["accuracy"] = sum(accuracies.values()) / len(accuracies)
        return values

    def reset(self) -> None:
        """Forgets everything added."""
        tasks = (metric for group in (*self.correct, *self.items) for metric in group)
        for metric in (*self.nll, *self.tokens, *tasks):
            metric.reset()
