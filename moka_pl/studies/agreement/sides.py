"""The two sides of a comparison: the package's scores of the questions, and the harness'.

Both read copies of local data with some questions of every task only.
"""

import csv
import json
import shutil
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities import move_data_to_device

from moka_pl.data.base import MokaDataModule
from moka_pl.data.batching.collate import BatchRows
from moka_pl.data.readers import stream
from moka_pl.errors import DataError
from moka_pl.evaluation.lm_eval.run import run_harness
from moka_pl.evaluation.lm_eval.tasks import Selection
from moka_pl.studies.agreement.agreement import Item
from moka_pl.training.module import MokaModule

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def package_items(module: MokaModule, data: MokaDataModule, batch_size: int = 8) -> list[Item]:
    """The package's scores of a data module's test questions, by ``predict_step``.

    Args:
        module: A module whose model is built.
        data: Multiple-choice data.
        batch_size: Questions computed at once.

    Returns:
        The questions in the order of the data.

    Raises:
        DataError: If a question does not fit into ``max_length``: the harness would
            cut it elsewhere.
    """
    data.connect(module.tokenizer)
    encoded = data.encode("test")
    if encoded is None:
        raise DataError("the data have no test questions to compare")
    report = encoded.report
    if report.dropped or report.truncated or report.left_out:
        raise DataError(
            "the comparison needs every question whole, but some are longer than max_length "
            f"({data.max_length} tokens; the longest has {report.longest}); raise max_length"
        )
    return _score(module, encoded.rows, BatchRows(encoded.rows, data.pad_id, data.share_prefix), batch_size)


def _score(module: MokaModule, rows: "Dataset", batches: BatchRows, batch_size: int) -> list[Item]:
    from tqdm.auto import tqdm

    lengths = rows["length"][:]
    order = sorted(range(len(rows)), key=lengths.__getitem__, reverse=True)
    scores: dict[int, list[float]] = {}
    module.eval()
    with torch.inference_mode(), tqdm(total=len(rows), desc="The package's scores", unit="question") as bar:
        for number, start in enumerate(range(0, len(order), batch_size)):
            chosen = order[start : start + batch_size]
            batch = move_data_to_device(batches[chosen], module.device)
            predicted = module.predict_step(batch, number)
            pairs = zip(predicted["item"].tolist(), predicted["log_likelihood"].tolist(), strict=True)
            for item, score in pairs:
                scores.setdefault(chosen[item], []).append(score)
            bar.update(len(chosen))
    return [_package_item(row, scores[index]) for index, row in enumerate(rows)]


def harness_items(
    module: MokaModule, selection: Selection, max_length: int, batch_size: int = 8
) -> dict[str, list[Item]]:
    """The harness' scores of the selected tasks' questions, on the same model.

    Args:
        module: A module whose model is built.
        selection: Multiple-choice tasks.
        max_length: Most tokens of a question and an option.
        batch_size: Sequences computed at once.

    Returns:
        The questions by task, in the order of the data.
    """
    model = module.causal_lm.eval()
    results = run_harness(
        model,
        module.tokenizer,
        selection,
        batch_size=batch_size,
        max_length=max_length,
        log_samples=True,
    )
    return {
        task: [
            _harness_item(sample, module.tokenizer) for sample in sorted(samples, key=lambda s: s["doc_id"])
        ]
        for task, samples in results["samples"].items()
    }


def reported(module: MokaModule, data: MokaDataModule) -> dict[str, float]:
    """The metrics of Lightning's ``test`` on the same questions: what a user of the command line reads.

    Returns:
        Value by name, without the leading ``test/``.
    """
    from lightning.pytorch import Trainer

    trainer = Trainer(
        accelerator=module.device.type,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.test(module, datamodule=data, verbose=False)
    return {name.removeprefix("test/"): value for name, value in module.eval_values.items()}


def _package_item(row: dict[str, Any], scores: Sequence[float]) -> Item:
    prompt, options = row["prompt_ids"], row["option_ids"]
    return Item(
        tokens=[prompt + option for option in options],
        borders=[len(prompt)] * len(options),
        log_likelihoods=list(scores),
        chars=row["option_chars"],
        answer=row["answer"],
    )


def _harness_item(sample: dict[str, Any], tokenizer: "PreTrainedTokenizerBase") -> Item:
    # lm_eval's rule: the prompt's tokens are as many as the prompt has alone, and both texts get whatever
    # special tokens the tokenizer adds by itself.
    pairs = [tuple(pair) for pair in sample["arguments"]]
    return Item(
        tokens=[list(tokenizer.encode(context + option)) for context, option in pairs],
        borders=[len(tokenizer.encode(context)) for context, _ in pairs],
        log_likelihoods=[float(score) for score, _ in sample["filtered_resps"]],
        chars=[len(option.removeprefix(" ")) for _, option in pairs],
        answer=int(sample["target"]),
        acc=bool(sample["acc"]),
        # Tasks whose options are letters have no score per character.
        acc_norm=bool(sample["acc_norm"]) if "acc_norm" in sample else None,
    )


def copy_questions(source: Path, tasks: Sequence[str], chosen: range, target: Path) -> Path:
    """Copies a part of test.json of some tasks.

    Args:
        source: A folder with a sub-folder for every task.
        tasks: Names of the tasks.
        chosen: Which questions of every task, counted from 0; those that are not there are left out.
        target: The folder to make.

    Returns:
        ``target``.

    Raises:
        DataError: If a task is missing, its file cannot be read, or it has none of the questions.
    """
    for task in tasks:
        records = _records(source / task / "test.json", chosen)
        (target / task).mkdir(parents=True)
        (target / task / "test.json").write_text(json.dumps(records), encoding="utf-8")
    return target


def copy_mmlu_questions(source: Path, subjects: Sequence[str], chosen: range, target: Path) -> Path:
    """Copies a part of the test files of some MMLU subjects, and their few-shot examples.

    Args:
        source: A folder with dev/ and test/.
        subjects: Names of the subjects.
        chosen: Which questions of every subject, counted from 0; those that are not there are left out.
        target: The folder to make.

    Returns:
        ``target``.

    Raises:
        DataError: If a file is missing or cannot be read, or has none of the questions.
    """
    for split in ("dev", "test"):
        (target / split).mkdir(parents=True)
    for subject in subjects:
        shots = Path("dev", f"{subject}_dev.csv")
        if not (source / shots).is_file():
            raise DataError(f"{source / shots} does not exist; correct the subject, or give MMLU's folder")
        shutil.copyfile(source / shots, target / shots)
        questions = Path("test", f"{subject}_test.csv")
        records = _records(source / questions, chosen)
        with (target / questions).open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(records[0]))
            writer.writeheader()
            writer.writerows(records)
    return target


def _records(file: Path, chosen: range) -> list[dict[str, Any]]:
    records = [record for _, record in islice(stream(file), chosen.start, chosen.stop)]
    if not records:
        raise DataError(f"{file} has no questions from number {chosen.start} on; lower --skip")
    return records
