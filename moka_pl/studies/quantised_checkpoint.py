"""GPTQ and AWQ checkpoints, which ``scripts/quantised_checkpoint.py`` has GPTQModel write."""

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moka_pl.errors import ConfigError
from moka_pl.studies.common import Parser, one_line_errors, positive_int
from moka_pl.utils import make_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DESCRIPTION = """\
Writes a model as a GPTQ or AWQ checkpoint with GPTQModel, which is not part of this package.

    pip install 'moka_pl[demo]' gptqmodel
    python scripts/quantised_checkpoint.py gptq --texts alpaca.json --out smollm2-135m-gptq
    python scripts/quantised_checkpoint.py awq --texts alpaca.json --samples 10 --out smollm2-135m-awq

The texts calibrate the rounding. Each is the instruction and the answer of a row, in the model's chat
template where it has one; for AWQ, whose search takes longer, they are joined and cut to windows.
"""

#: What GPTQModel writes beside the weights.
_WRITTEN = "quantize_config.json"


@one_line_errors("quantised_checkpoint")
def main(arguments: Sequence[str] | None = None) -> None:
    """Quantises a model and saves it.

    Args:
        arguments: Default: the process's.
    """
    parser = Parser("quantised_checkpoint", DESCRIPTION)
    parser.add_argument("kind", choices=["gptq", "awq"])
    parser.add_argument("--model", default="smollm2-135m-instruct", help="as backbone.name, unquantised")
    parser.add_argument("--texts", type=Path, required=True, help="JSON file of rows in the Alpaca format")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder of the checkpoint: a new or empty one, or that of an older checkpoint",
    )
    parser.add_argument(
        "--samples", type=positive_int, default=128, help="rows to take from it (default: 128)"
    )
    parser.add_argument("--max-length", type=positive_int, default=512, help="tokens of a row (default: 512)")
    parser.add_argument(
        "--group-size", type=positive_int, default=64, help="entries that share a scale (default: 64)"
    )
    parser.add_argument("--desc-act", action="store_true", help="GPTQ in the order of activations")
    args = parser.parse_args(arguments)
    write(args, read_rows(args.texts, args.samples))


def read_rows(file: Path, samples: int) -> list[Mapping[str, str]]:
    """Reads the first rows of a file.

    Args:
        file: JSON, a list of objects with ``instruction`` and ``output``.
        samples: How many.

    Raises:
        ConfigError: If the file is missing or no such list.
    """
    try:
        rows: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--texts {file} cannot be read as JSON: {error}") from error
    known = isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
    if not known or not all({"instruction", "output"} <= row.keys() for row in rows):
        raise ConfigError(f"--texts {file} must be a list of objects with instruction and output")
    if not 0 < samples <= len(rows):
        raise ConfigError(f"--samples must be 1 to {len(rows)}, the rows of {file}, not {samples}")
    found: list[Mapping[str, str]] = rows[:samples]
    return found


def calibration(
    rows: Sequence[Mapping[str, str]], tokenizer: "PreTrainedTokenizerBase", max_length: int
) -> list[dict[str, list[int]]]:
    """Tokenises rows as the model would be shown them.

    Args:
        rows: Alpaca's: ``instruction``, perhaps ``input``, and ``output``.
        tokenizer: The model's.
        max_length: Most tokens of a row; the rest is cut off.

    Returns:
        ``input_ids`` and ``attention_mask`` of each.
    """
    examples = []
    for row in rows:
        asked = "\n".join(part for part in (row["instruction"], row.get("input")) if part)
        if tokenizer.chat_template is None:
            text = f"{asked}\n{row['output']}"
        else:
            turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]
            text = str(tokenizer.apply_chat_template(turns, tokenize=False))
        plain = tokenizer.chat_template is None  # a template has the special tokens in its text
        encoded = tokenizer(text, truncation=True, max_length=max_length, add_special_tokens=plain)
        examples.append({name: list(encoded[name]) for name in ("input_ids", "attention_mask")})
    return examples


def windows(examples: Sequence[Mapping[str, list[int]]], length: int) -> list[dict[str, list[int]]]:
    """Joins examples and cuts them to windows of the same length; a shorter last one is left out.

    GPTQModel searches AWQ's scales on the last example alone where their lengths differ.
    """
    ids = [token for example in examples for token in example["input_ids"]]
    starts = range(0, len(ids) - length + 1, length)
    return [{"input_ids": ids[i : i + length], "attention_mask": [1] * length} for i in starts]


def options(kind: str, group_size: int, desc_act: bool) -> dict[str, Any]:
    """Options of GPTQModel's ``QuantizeConfig``: its defaults of GPTQ, and AWQ as AutoAWQ writes it.

    Args:
        kind: ``gptq`` or ``awq``.
        group_size: Neighbouring entries of a row that share a scale.
        desc_act: Whether GPTQ takes the inputs in the order of their activations.
    """
    chosen: dict[str, Any] = {"bits": 4, "group_size": group_size, "device": "cpu", "offload_to_disk": False}
    if kind == "awq":
        return chosen | {"method": "awq", "format": "gemm", "sym": False}
    return chosen | {"desc_act": desc_act}


def write(args: argparse.Namespace, rows: Sequence[Mapping[str, str]]) -> None:
    """Quantises the model and saves it.

    Raises:
        ConfigError: If GPTQModel is missing, the folder cannot be written to, or it holds other files.
    """
    if args.out.is_dir() and any(args.out.iterdir()) and not (args.out / _WRITTEN).is_file():
        raise ConfigError(f"--out {args.out} holds files, and no older checkpoint; choose another folder")
    if find_spec("gptqmodel") is None:
        raise ConfigError(
            "GPTQModel is not installed; pip install gptqmodel, best in an environment of its own"
        )
    make_folder(args.out, "--out")
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # by default too few for it on two cores
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    from moka_pl.backbone import BackboneConfig
    from moka_pl.backbone.load import load_tokenizer, model_location

    base = BackboneConfig(args.model, quantization="none")
    tokenizer = load_tokenizer(base)
    texts = calibration(rows, tokenizer, args.max_length)
    if args.kind == "awq":
        texts = windows(texts, args.max_length)
    print(f"{len(texts)} texts of {sum(len(text['input_ids']) for text in texts):,} tokens")
    folder = model_location(base, whole=False)["pretrained_model_name_or_path"]
    config = QuantizeConfig(**options(args.kind, args.group_size, args.desc_act))
    model = GPTQModel.load(folder, config, dtype=torch.bfloat16)
    model.quantize(texts, batch_size=1)
    model.save(str(args.out))
