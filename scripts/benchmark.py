#!/usr/bin/env python3
"""Times a training step (forward and backward) of MoKA beside the frozen base and PEFT's adapters.

    python scripts/benchmark.py                              # SmolLM2's shape, two minutes on a CPU
    python scripts/benchmark.py --preset llama2-7b-h100      # LLaMA2-7B's shape on a GPU, 8 x 512 tokens

Weights are random (nothing is downloaded), linear layers NF4 with double quantisation. All rows run on one
machine in one process; a step's time is the median, its memory the peak. Adapters get random non-zero values.
"""

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PRESETS: dict[str, dict[str, Any]] = {
    "smollm2-cpu": {"shape": "smollm2-135m", "batch": 2, "length": 64, "steps": 3, "device": "cpu"},
    "smollm2-h100": {"shape": "smollm2-135m", "batch": 32, "length": 64, "steps": 20, "device": "cuda"},
    "llama2-7b-h100": {"shape": "llama2-7b", "batch": 8, "length": 512, "steps": 10, "device": "cuda"},
    "llama3-8b-h100": {"shape": "llama3-8b", "batch": 8, "length": 512, "steps": 10, "device": "cuda"},
}
FIVE = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]


def rows(device: str) -> dict[str, Callable[[Any], Callable[[], None]]]:
    """Each row puts its adapter into a model and returns what takes it out again."""
    from moka_pl.adapters import MokaConfig, inject_adapter, moka_layers, unload

    def moka(**options: Any) -> Callable[[Any], Callable[[], None]]:
        def put(model: Any) -> Callable[[], None]:
            inject_adapter(model, MokaConfig(**options))
            for layer in moka_layers(model).values():
                for factor in layer.moka_B:
                    torch.nn.init.normal_(factor, std=1e-3)
            return lambda: unload(model)

        return put

    def lora(rank: int, modules: list[str], **options: Any) -> Callable[[Any], Callable[[], None]]:
        def put(model: Any) -> Callable[[], None]:
            from peft import LoraConfig, get_peft_model

            peft = get_peft_model(
                model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=modules, **options)
            )
            for name, parameter in peft.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=1e-3)
            return lambda: peft.unload()

        return put

    table = {
        "frozen base": lambda model: lambda: None,
        "MoKA r10": moka(),
        "MoKA r10 dense": moka(backend="dense"),
        "MoKA r10 structured": moka(backend="structured"),
        "MoKA r1": moka(components=1),
        "MoKA r20": moka(components=20),
        "MoKA_s r10": moka(filters="prime"),
        "LoRA r8 q,v": lora(8, ["q_proj", "v_proj"]),
        "LoRA r64 q,v": lora(64, ["q_proj", "v_proj"]),
        "LoRA r32 q,k,v,up,down": lora(32, FIVE),
        "DoRA r64 q,v": lora(64, ["q_proj", "v_proj"], use_dora=True),
    }
    if device == "cuda":
        table["MoKA r10 fused"] = moka(backend="fused")
    return table


def measure(model: Any, ids: torch.Tensor, steps: int, frozen: bool) -> dict[str, float]:
    """Median time of forward and of forward and backward in ms, and peak memory in GiB."""
    from moka_pl.callbacks.throughput import peak_memory
    from moka_pl.scoring import score_tokens

    cuda = ids.is_cuda
    hook = None
    if frozen:  # a gradient that reaches the embeddings, as any adapter in the first layer needs
        embedding = model.get_input_embeddings()
        hook = embedding.register_forward_hook(lambda module, args, out: out.requires_grad_())

    def once() -> tuple[float, float]:
        if cuda:
            torch.cuda.synchronize()
        begun = time.perf_counter()
        loss = score_tokens(model, ids, ids).nll.mean()
        if cuda:
            torch.cuda.synchronize()
        between = time.perf_counter()
        loss.backward()
        if cuda:
            torch.cuda.synchronize()
        for parameter in model.parameters():
            parameter.grad = None
        return 1e3 * (between - begun), 1e3 * (time.perf_counter() - begun)

    for _ in range(3 if cuda else 1):
        once()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    times = [once() for _ in range(steps)]
    if hook is not None:
        hook.remove()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    step = statistics.median(t for _, t in times)
    return {
        "step_ms": step,
        "forward_ms": statistics.median(t for t, _ in times),
        "tokens_per_s": 1e3 * ids.numel() / step,
        "peak_gib": peak_memory(ids.device),
        "trainable": trainable,
    }


def run(preset: dict[str, Any], only: list[str], checkpointing: bool) -> list[dict[str, Any]]:
    """All rows on one model; a row that fails is kept with its error."""
    from moka_pl.backbone import BackboneConfig, load_backbone

    device = preset["device"]
    gc.collect()  # an earlier model's reference cycles would count as this one's memory
    model = load_backbone(BackboneConfig(preset["shape"], weights="random"), device).model
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = torch.randint(0, model.config.vocab_size, (preset["batch"], preset["length"]), device=device)
    results: list[dict[str, Any]] = []
    for name, put in rows(device).items():
        if only and name not in only:
            continue
        row: dict[str, Any] = {"row": name, "checkpointing": checkpointing}
        print(f"{name} ...", file=sys.stderr, flush=True)
        out = put(model)
        try:
            row |= measure(model, ids, preset["steps"], frozen=name == "frozen base")
        except (RuntimeError, ValueError) as error:
            row["error"] = str(error).splitlines()[0]
        out()
        model.requires_grad_(False)
        if device == "cuda":
            torch.cuda.empty_cache()
        results.append(row)
    return results


def show(results: list[dict[str, Any]]) -> str:
    """A Markdown table, ratios against the frozen base of the same kind."""
    lines = ["| adapter | checkpointing | step ms | forward ms | tokens/s | peak GiB | trainable | ratio |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    base = {r["checkpointing"]: r["step_ms"] for r in results if r["row"] == "frozen base" and "step_ms" in r}
    for r in results:
        kind = "on" if r["checkpointing"] else "off"
        if "error" in r:
            lines.append(f"| {r['row']} | {kind} | failed: {r['error']} | | | | | |")
            continue
        ratio = r["step_ms"] / base[r["checkpointing"]] if r["checkpointing"] in base else float("nan")
        lines.append(
            f"| {r['row']} | {kind} | {r['step_ms']:.0f} | {r['forward_ms']:.0f} | {r['tokens_per_s']:,.0f} "
            f"| {r['peak_gib']:.2f} | {r['trainable']:,} | {ratio:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Prints the table and writes JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, default="smollm2-cpu", help="model, batch and device")
    parser.add_argument("--checkpointing", choices=("off", "on", "both"), default="off")
    parser.add_argument("--rows", nargs="*", default=[], help="only these rows")
    parser.add_argument("--json", type=Path, help="file for the results with versions and device")
    args = parser.parse_args()
    results: list[dict[str, Any]] = []
    for checkpointing in {"off": [False], "on": [True], "both": [False, True]}[args.checkpointing]:
        results += run(PRESETS[args.preset], args.rows, checkpointing)
    print(show(results))
    if args.json:
        import bitsandbytes
        import peft
        import transformers

        packages = {p.__name__: p.__version__ for p in (torch, transformers, bitsandbytes, peft)}
        where = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
        versions = packages | {"python": platform.python_version()}
        data = {"preset": args.preset, "device": where, "versions": versions, "rows": results}
        args.json.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
