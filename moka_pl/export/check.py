"""Compares what was exported with the adapter that it came from, on a set of prompts."""

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moka_pl.backbone.quantization import without_kept_scales
from moka_pl.errors import AdapterError, ConfigError
from moka_pl.prompts.ends import prompt_ids
from moka_pl.prompts.templates import alpaca_prompt, chat_prompt, cloze_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Share of the tokens of a model with experts that have to agree.
_USUAL = 0.95
_SAMPLES, _MOST_PROMPTS, _MOST_TOKENS = "instruction_heldout.jsonl", 8, 96
#: Bounds of a file of prompts.
_MOST_LINES, _MOST_BYTES = 64, 1 << 20
#: Largest difference of logits, as a share of the largest logit, and of losses, by the coarsest dtype. What
#: rounding alone makes of the logits depends on the model; float32's bound holds where that is known.
BOUNDS = {
    torch.float32: (1e-4, 1e-4),
    torch.float16: (1e-2, 2e-3),
    torch.bfloat16: (5e-2, 1e-2),
    torch.int8: (1e-1, 2e-2),
}


#: What rounds less than bfloat16 or 8 bits do.
_FINER = {torch.float16: "float16", torch.float32: "float32"}


@dataclass(frozen=True)
class Measured:
    """What a model makes of the prompts.

    Attributes:
        logits: One tensor (T, V) a prompt, float32, on the CPU.
        loss: Mean -log p of the tokens after each prompt's first, nats.
    """

    logits: list[Tensor]
    loss: float


def prompt_set(tokenizer: "PreTrainedTokenizerBase", trained: str | None, file: Path | None) -> list[Tensor]:
    """Returns the tokens of some questions with their answers, in the format of the adapter's training.

    Args:
        tokenizer: The tokenizer.
        trained: The prompt format; None takes the chat template if there is one.
        file: A text file with a prompt a line; None takes the package's own held-out samples.

    Raises:
        ConfigError: If the file cannot be read or has no text.
    """
    chosen = trained or ("chat" if tokenizer.chat_template else "raw")
    texts = [_around(question, chosen, tokenizer) + answer for question, answer in _questions(file)]
    ids = [prompt_ids(tokenizer, text, chosen, chosen == trained)[:_MOST_TOKENS] for text in texts]
    kept = [torch.tensor(one) for one in ids if len(one) > 1]
    if not kept:
        raise ConfigError(f"--prompts {file} has no prompt of at least two tokens; give longer texts")
    return kept


def _questions(file: Path | None) -> list[tuple[str, str]]:
    if file is None:
        samples = resources.files("moka_pl.data.samples").joinpath(_SAMPLES).read_text(encoding="utf-8")
        rows = [json.loads(line) for line in samples.splitlines()]
        return [(row["instruction"], row["output"]) for row in rows if not row["input"]][:_MOST_PROMPTS]
    lines = [line for line in _text(file).splitlines() if line.strip()]
    if len(lines) > _MOST_LINES:
        raise ConfigError(
            f"--prompts {file} has {len(lines):,} prompts, which are computed at once; "
            f"give at most {_MOST_LINES}"
        )
    return [(line, "") for line in lines]


def _text(file: Path) -> str:
    """Reads a small text file; what is none is refused before it is read.

    Raises:
        ConfigError: Naming it.
    """
    try:
        size = file.stat().st_size
        if file.is_file() and size <= _MOST_BYTES:
            return file.read_text(encoding="utf-8-sig")
        reason = f"it has {size:,} bytes" if file.is_file() else "it is a folder, a pipe or a device"
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
    raise ConfigError(f"--prompts {file} cannot be read: {reason}; give a small text file")


def _around(question: str, chosen: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    if chosen == "chat":
        return chat_prompt(question, tokenizer)
    if chosen in ("alpaca", "llm_adapters"):
        return alpaca_prompt(question)
    return f"{cloze_prompt(question)} " if chosen in ("cloze", "letters") else f"{question}\n"


@torch.no_grad()
def measure(model: "PreTrainedModel | Any", prompts: list[Tensor]) -> Measured:
    """Runs a model on all prompts at once, padded on the right, so that weights are dequantised only once."""
    lengths = [len(ids) for ids in prompts]
    device = torch.device("cpu") if model.device.type == "meta" else model.device  # whose weights are on disk
    ids = nn.utils.rnn.pad_sequence(prompts, batch_first=True)  # (I, T)
    mask = torch.arange(ids.shape[1])[None] < torch.tensor(lengths)[:, None]  # (I, T)
    with without_kept_scales():
        logits = model(input_ids=ids.to(device), attention_mask=mask.long().to(device)).logits  # (I, T, V)
    rows = zip(logits, lengths, strict=True)
    return measured([row[:length].float().cpu() for row, length in rows], prompts)


def measured(logits: list[Tensor], prompts: list[Tensor]) -> Measured:
    """Adds the loss to logits of whatever engine."""
    pairs = zip(logits, prompts, strict=True)
    nll = torch.cat([F.cross_entropy(x[:-1], ids[1:], reduction="none") for x, ids in pairs])
    return Measured(logits, float(nll.mean()))


def largest_difference(one: Measured, other: Measured) -> float:
    """Largest absolute difference of two models' logits; infinite where the vocabularies differ."""
    pairs = list(zip(one.logits, other.logits, strict=True))
    if any(a.shape != b.shape for a, b in pairs):
        return float("inf")
    return max(float((a - b).abs().nan_to_num(torch.inf).max()) for a, b in pairs)


def usual_difference(one: Measured, other: Measured) -> float:
    """As :func:`largest_difference`, but of the 95% of the tokens at which two finite models differ least."""
    if largest_difference(one, other) == float("inf"):
        return float("inf")
    pairs = zip(one.logits, other.logits, strict=True)
    largest = torch.cat([(a - b).abs().amax(-1) for a, b in pairs])  # (tokens,)
    return float(largest.quantile(_USUAL, interpolation="higher"))


def check(
    expected: Measured,
    found: Measured,
    reader: str,
    *dtypes: torch.dtype,
    rounded: Measured | None = None,
    routed: bool = False,
    what: str = "prompts",
) -> str:
    """Compares an export, as its reader computes it, with the adapter; returns the comparison in words.

    Args:
        expected: The adapter's.
        found: The export's.
        reader: Name and version of what read it.
        *dtypes: Of the export and of the computation; the coarsest decides on the bounds of ``BOUNDS``.
        rounded: The adapter's where its merged weights are rounded as the export's, the first of
            ``dtypes``, and both compute in float32: the logits are compared with these, by float32's bound,
            and that of the coarsest is for the loss alone, which says what rounding costs.
        routed: Whether tokens choose experts: rounding has a few of them choose others, so that in half
            precision one token in twenty may differ by more.
        what: What both were given.

    Raises:
        AdapterError: If the logits or the loss differ by more.
    """
    share, loss_share = max(BOUNDS[dtype] for dtype in dtypes)
    finer = [name for dtype, name in _FINER.items() if BOUNDS[dtype] < (share, loss_share)]
    largest = max(float(one.abs().max()) for one in expected.logits)
    difference, most, beyond = largest_difference(expected, found), "", ""
    decisive, bound = difference, share * largest
    if rounded is not None:
        decisive = largest_difference(rounded, found)
        bound = BOUNDS[torch.float32][0] * largest
        beyond = f"; beyond rounding to {_name(dtypes[0])} {decisive:.2g}"
    elif routed and max(dtypes, key=BOUNDS.__getitem__) != torch.float32:
        decisive = difference = usual_difference(expected, found)
        most = " of 95% of the tokens"
    loss_bound = loss_share * max(expected.loss, 1.0)
    told = (
        f"{reader}, {len(expected.logits)} {what}: largest logit difference{most} {difference:.2g}{beyond} "
        f"(bound {bound:.2g}, largest logit {largest:.1f}); "
        f"loss {expected.loss:.5f} before, {found.loss:.5f} after"
    )
    differs = not decisive <= bound
    if differs or not abs(expected.loss - found.loss) <= loss_bound:
        # What rounding does not explain stays in another dtype.
        names = [] if differs and rounded is not None else finer
        remedy = f"Export in {' or '.join(names)}, or report it" if names else "Report it"
        raise AdapterError(f"the export is not what was trained, and nothing was written: {told}. {remedy}")
    return told


def _name(dtype: torch.dtype) -> str:
    return "q8_0" if dtype == torch.int8 else str(dtype).removeprefix("torch.")
