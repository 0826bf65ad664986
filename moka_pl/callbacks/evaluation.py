"""The table at the end of an evaluation."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import Callback, LightningModule, Trainer

from moka_pl.data.types import data_of
from moka_pl.errors import ConfigError
from moka_pl.evaluation.result_files import write_results
from moka_pl.evaluation.results import Counts, Results, Share, flat, macro
from moka_pl.training.module import MokaModule
from moka_pl.training.preflight import check_evaluation, evaluated_share


class EvaluationTable(Callback):
    """Prints the results of ``validate`` or ``test``, and writes them as JSON into the run's log folder.

    Each task has a line with its items, accuracy, accuracy by length-normalised likelihood (both with
    standard errors), and negative log-likelihood of the right option per token. Groups of tasks and the mean
    of the tasks follow. Plain text has perplexities. The file is ``validate.json`` or ``test.json``;
    where the folder has one already, the next is ``test_2.json`` and so on.
    """

    def __init__(self) -> None:
        self._evaluated = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begins anew."""
        self._evaluated = False

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses an evaluation without a batch, which Lightning passes over without a word.

        Raises:
            ConfigError: Saying what there was none of.
        """
        if stage not in ("validate", "test") or self._evaluated:
            return
        check_evaluation(trainer, stage)
        module = trainer.datamodule  # type: ignore[attr-defined]
        source, remedy = f"{type(module).__name__} has", "data.init_args.validation_path or validation_share"
        if module is None:
            source, remedy = "the dataloaders have", "some that have"
        split = "validation" if stage == "validate" else "test"
        raise ConfigError(f"nothing was evaluated: {source} no {split} data; give {remedy}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reports ``validate``."""
        if trainer.state.fn == "validate":
            self._report(trainer, pl_module, "validate")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reports ``test``."""
        self._report(trainer, pl_module, "test")

    def _report(self, trainer: Trainer, pl_module: LightningModule, command: str) -> None:
        assert isinstance(pl_module, MokaModule)
        self._evaluated = True
        log_dir = trainer.log_dir if trainer.loggers else None  # on every rank: Lightning broadcasts it
        if pl_module.eval_results is None or not trainer.is_global_zero:
            return
        print(results_text(pl_module.eval_results))
        partial = _partial(trainer, command, pl_module.eval_results)
        if partial is not None:
            counts = [f"{part['batches']} of {part['of'] or '?'} of {name}" for name, part in partial.items()]
            print(f"\nOnly a part of the data was evaluated. Batches: {', '.join(counts)}")
        if log_dir is None:
            return
        about = {"command": command, "partial": partial, **_about(trainer, pl_module)}
        described = about | results_dict(pl_module.eval_results)
        file = Path(log_dir) / f"{command}.json"
        written = write_results(file, json.dumps(described, indent=2) + "\n")
        earlier = "" if written == file else f"; {file.name} there is an earlier evaluation's"
        print(f"\nResults saved in {written}{earlier}")


def results_text(results: Results) -> str:
    """Writes the results as a table."""
    rows: list[tuple[str, float, Mapping[str, Share], str]] = []
    for task, counts in results.tasks.items():
        rows.append((task, counts.items, counts.shares(), _nll(counts)))
    for group, members in results.members().items():
        total = sum(members, Counts())
        rows.append((f"{group}, all items", total.items, total.shares(), _nll(total)))
        if len(members) > 1:
            mean = macro(counts.shares() for counts in members)
            rows.append((f"{group}, mean of {len(members)} tasks", total.items, mean, ""))
    tasks = results.tasks
    if len(tasks) > 1 and not any(len(members) == len(tasks) for members in results.members().values()):
        mean = macro(counts.shares() for counts in tasks.values())
        items = sum(counts.items for counts in tasks.values())
        rows.append((f"mean of {len(tasks)} tasks", items, mean, ""))
    lines = [""]
    if rows:
        titles = {"accuracy": "acc", "acc_norm": "acc_norm", "generated": "generated"}
        titles = {n: title for n, title in titles.items() if any(n in shares for _, _, shares, _ in rows)}
        width = max(24, *(len(row[0]) + 2 for row in rows))
        heads = "".join(f"{title + ' (%)':>16}" for title in titles.values())
        lines.append(f"{'task':<{width}}{'items':>7}{heads}{'nll':>9}")
        for title, items, shares, nll in rows:
            shown = "".join(f"{_percent(shares.get(name)):>16}" for name in titles)
            lines.append(f"{title:<{width}}{items:>7,.0f}{shown}{nll:>9}")
    for part in results.sets:
        if part.tokens and not part.tasks:
            metrics = {"loss": part.nll / part.tokens, **part.perplexities()}
            shown = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in metrics.items())
            lines.append(f"{part.name}: {shown} ({part.tokens:,.0f} tokens)")
    return "\n".join(lines)


def results_dict(results: Results) -> dict[str, Any]:
    """Returns JSON values: ``tasks``, ``groups`` (over items, and as ``macro``), ``mean`` and ``sets``."""
    tasks = results.tasks
    groups = {
        name: _described(sum(members, Counts()))
        | {"macro": flat(macro(counts.shares() for counts in members)), "tasks": len(members)}
        for name, members in results.members().items()
    }
    sets = {
        part.name: {"loss": part.nll / part.tokens, "tokens": int(part.tokens), **part.perplexities()}
        for part in results.sets
        if part.tokens
    }
    return {
        "tasks": {task: _described(counts) for task, counts in tasks.items()},
        "groups": groups,
        "mean": flat(macro(counts.shares() for counts in tasks.values())),
        "sets": sets,
    }


def _described(counts: Counts) -> dict[str, float]:
    nll = {"nll": counts.nll / counts.tokens} if counts.tokens else {}
    return {"items": int(counts.items), **flat(counts.shares()), **nll}


def _about(trainer: Trainer, pl_module: MokaModule) -> dict[str, Any]:
    """Returns the model and the data that were evaluated."""
    assert pl_module.base is not None
    module = trainer.datamodule  # type: ignore[attr-defined]
    data = data_of(trainer)
    return {
        "base": pl_module.base.name,
        "base_fingerprint": pl_module.base.fingerprint,
        "quantization": pl_module.backbone.quantization,
        "adapter": pl_module.adapter_path,
        "checkpoint": trainer.ckpt_path and str(trainer.ckpt_path),
        "data": None if module is None else type(module).__name__,
        "prompt": data.prompt,
        # What was read, cut and left out; of a mixture by its parts.
        "examples": [{"set": n, "split": split, **asdict(report)} for n, split, report in data.reports],
    }


def _partial(trainer: Trainer, command: str, results: Results) -> dict[str, dict[str, int | None]] | None:
    """Returns by set how many batches of how many each process evaluated; None if it was all of them."""
    limit = getattr(trainer, evaluated_share(command))
    if isinstance(limit, float) and limit == 1:
        return None
    counts, loaders = trainer.num_test_batches, trainer.test_dataloaders
    if command == "validate":
        counts, loaders = trainer.num_val_batches, trainer.val_dataloaders
    totals = [sized_len(loader) for loader in (loaders if isinstance(loaders, list) else [loaders])]
    if all(count == total for count, total in zip(counts, totals, strict=False)):
        return None
    names = [part.name for part in results.sets]
    return {
        name: {"batches": int(count), "of": total}
        for name, count, total in zip(names, counts, totals, strict=False)
    }


def _percent(share: Share | None) -> str:
    if share is None:
        return ""
    error = "" if share.stderr is None else f" ± {100 * share.stderr:.2f}"
    return f"{100 * share.value:.2f}{error}"


def _nll(counts: Counts) -> str:
    return f"{counts.nll / counts.tokens:.4f}" if counts.tokens else ""
