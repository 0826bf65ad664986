"""``moka-pl predict``: a file of prompts answered into a file."""

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

from moka_pl.cli.answering.prompt_files import read_prompts
from moka_pl.cli.answering.sampling import Sampling
from moka_pl.cli.answering.session import check_format, open_session
from moka_pl.errors import ConfigError, end_interrupted
from moka_pl.prompts.asked import question
from moka_pl.prompts.choice import PromptFormat


def predict(
    adapter: Path,
    file: Path | None = None,
    output: Path | None = None,
    overwrite: bool = False,
    merge: bool = False,
    base: str | None = None,
    prompt_format: PromptFormat | None = None,
    system: str = "",
    batch_size: int = 8,
    **sampling: Any,
) -> None:
    """Answer a file of prompts with a trained adapter, and write the answers as JSON lines.

    Args:
        adapter: An adapter directory.
        file: A file of prompts: .txt with one on each line, or .jsonl, .json, .csv, .tsv or .parquet with
            prompt, instruction (and input), messages or conversations in each record. For an adapter of an
            image classifier, an image or a folder of images.
        output: The file to write: a line for each prompt, in the order of the prompts, with prompt,
            completion, prompt_tokens, completion_tokens and stop_reason (end_of_turn or length). It appears
            once it is whole; the same command goes on where an earlier one was interrupted. Of images: image,
            label, probability and probabilities.
        overwrite: Replace the output if it is there.
        merge: Compute with dense W + ΔW in place of the adapted layers, which takes more memory.
        base: Name or path of the base model. Default: the one stored with the adapter.
        prompt_format: Template for the prompts: chat (the tokenizer's chat template), alpaca (also
            llm_adapters), cloze ("Question: … Answer:"; also letters, with the options in the prompt) or raw
            (none). Default: the adapter's training prompt, else chat if the tokenizer has a template, else
            raw.
        system: A system message before each chat.
        batch_size: Prompts that are answered at a time.
        **sampling: Options of :class:`Sampling`.
    """
    chosen = Sampling(**sampling)
    if file is None or output is None:
        raise ConfigError("give --file PROMPTS and --output ANSWERS.jsonl")
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, not {batch_size}")
    check_format(prompt_format, "prompt_format")
    from moka_pl.adapters import read_adapter
    from moka_pl.adapters.reading import CARD_NAME, CONFIG_NAME, WEIGHTS_NAME
    from moka_pl.cli.answering.batches import answer_all
    from moka_pl.cli.answering.predictions import Predictions, check_output

    kept = [file, *(adapter / name for name in (CARD_NAME, CONFIG_NAME, WEIGHTS_NAME))]
    if read_adapter(adapter).labels:
        from moka_pl.vision.predict import find_images, predict_images

        if prompt_format or system or chosen != Sampling():
            raise ConfigError(
                f"options of prompts and answers are for texts, and {adapter} classifies images"
            )
        check_output(output, overwrite, [*kept, *find_images(file)])
        predict_images(adapter, file, output, batch_size, base, merge)
        return
    rows = read_prompts(file)
    check_output(output, overwrite, kept)
    asked = {"base": base, "format": prompt_format, "system": system, "merge": merge}
    session, prompts = open_session(
        adapter, chosen, rows, base=base, prompt_format=prompt_format, system=system, merged=merge
    )
    run = _digest(adapter, rows, asked | {"batch_size": batch_size} | asdict(chosen))
    with Predictions(output, run).opened() as predictions:
        if predictions.done:
            print(f"{len(predictions.done)} of {len(rows)} prompts are answered already", file=sys.stderr)
        try:
            for number, answer in answer_all(session, prompts, batch_size, set(predictions.done)):
                record = {
                    "prompt": _prompt(rows[number]),
                    "completion": answer.text,
                    "prompt_tokens": len(prompts[number]),
                    "completion_tokens": answer.tokens,
                    "stop_reason": answer.stop_reason,
                }
                predictions.add(number, record)
        except KeyboardInterrupt:
            known = f"{len(predictions.done)} of {len(rows)} answers are kept"
            end_interrupted(f"{known}; the same command goes on from there")
        predictions.finish()
    reasons = Counter(record["stop_reason"] for record in predictions.done.values())
    ended = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
    print(f"{len(rows)} answers saved in {output} ({ended})", file=sys.stderr)


def _prompt(row: Mapping[str, Any]) -> str | list[dict[str, Any]]:
    """What was asked: a text, or the messages of a chat."""
    if not row["messages"]:
        return question(row)
    return [{"role": turn["role"], "content": turn["content"]} for turn in row["messages"]]


def _digest(adapter: Path, rows: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> str:
    """Hashes all that decides about the answers."""
    from moka_pl.adapters.reading import CONFIG_NAME, WEIGHTS_NAME, local_adapter

    folder = local_adapter(adapter)
    digest = sha256(json.dumps([list(rows), options], sort_keys=True, default=str).encode())
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        with (folder / name).open("rb") as contents:
            digest.update(file_digest(contents, "sha256").digest())
    return digest.hexdigest()
