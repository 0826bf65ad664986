"""Milliseconds for a generated token."""

import statistics
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from moka_pl.studies.benchmark.bench import Bench
from moka_pl.studies.benchmark.cases import FROZEN, QV, Row, frozen, lora, moka
from moka_pl.studies.benchmark.presets import Preset
from moka_pl.studies.benchmark.records import Record, Values
from moka_pl.studies.benchmark.steps import quartiles, synchronise
from moka_pl.studies.memory import peak_gib, reset_peak

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

PROMPT = 16


def decode_rows() -> list[Row]:
    """The rows that generate; no adapter is merged."""
    return [
        frozen(),
        moka("MoKA r10"),
        lora("LoRA r64 q,v", 64, QV),
        frozen(f"{FROZEN} (again)"),
    ]


def measure_decode(bench: Bench, preset: Preset, rows: Sequence[Row]) -> Iterator[Record]:
    """Measures greedy generation at batch 1 with a key-value cache.

    Args:
        bench: The model.
        preset: How many tokens.
        rows: What to measure; ratios are to the row ``frozen base``, if it comes first.

    Returns:
        A record a row.
    """
    return bench.compare("decode", rows, "token_ms", lambda model, _: time_decode(model, preset.new_tokens))


def time_decode(model: "PreTrainedModel", new_tokens: int) -> Values:
    """Generates from a random prompt of 16 tokens, and measures each token after the first.

    Args:
        model: The model, with or without adapters.
        new_tokens: Measured tokens; as many are generated before.

    Returns:
        ``token_ms`` (median) with ``token_q1_ms``, ``token_q3_ms`` and ``token_mean_ms``, ``prompt_ms`` (the
        prompt and the first token), ``tokens_per_s``, ``peak_gib`` and ``trainable``.
    """
    import torch

    model.eval()
    device = model.get_input_embeddings().weight.device
    prompt = torch.randint(model.config.vocab_size, (1, PROMPT), device=device)
    with torch.no_grad():
        _generate(model, prompt, new_tokens)
        reset_peak(device)
        first, *times = _generate(model, prompt, new_tokens)
    low, median, high = quartiles(times)
    return {
        "token_ms": median,
        "token_q1_ms": low,
        "token_q3_ms": high,
        "token_mean_ms": statistics.mean(times),
        "prompt_ms": first,
        "tokens_per_s": 1e3 / median,
        "peak_gib": peak_gib(device),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def _generate(model: "PreTrainedModel", ids: "Tensor", new_tokens: int) -> list[float]:
    """Milliseconds of the prompt, and then of each of the further tokens."""
    device = model.get_input_embeddings().weight.device
    times, cache = [], None
    for _ in range(new_tokens + 1):
        synchronise(device)
        begun = time.perf_counter()
        out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        ids, cache = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values
        synchronise(device)
        times.append(1e3 * (time.perf_counter() - begun))
    return times
