#!/usr/bin/env python3
"""Measures what packing and bucketing gain: real tokens per second of a training step, on the same examples.

    python scripts/packing_speed.py --data alpaca.json --examples 128       # SmolLM2, float32, on the CPU
    python scripts/packing_speed.py --data alpaca.json --device cuda        # the same in NF4 and bfloat16
    python scripts/packing_speed.py --data alpaca.json --device cuda --shape llama2-7b --checkpointing

A step is forward and backward with MoKA adapters on q and v; loading is not counted. `random` are shuffled
batches padded to their longest example, `bucketed` those of similar lengths, `by tokens` the same with a
budget of tokens in place of a number of examples, `packed` rows of several examples. Each kind sees each
example once. Every round measures all kinds in turn. The ratio of processor times is the one to trust on a
CPU that has other work, with OMP_NUM_THREADS=1: waiting threads count as busy.
"""

import argparse
import json

from moka_pl.adapters import MokaConfig, inject_adapter
from moka_pl.backbone import BackboneConfig, load_backbone
from moka_pl.lm.attention import PackedAttention
from moka_pl.studies.benchmark.batching import (
    KINDS,
    data_of_kind,
    limit_examples,
    measure_epoch,
    summed,
    table,
)


def main() -> None:
    """Prints a table and JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="file of instructions in the Alpaca form")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--shape", help="shape with random weights in place of SmolLM2 (llama2-7b, ...)")
    parser.add_argument("--quantization", help="nf4 or none; default nf4 on a GPU, none on a CPU")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--batch-size", type=int, default=16, help="examples of a padded batch")
    parser.add_argument("--rows", type=int, help="rows of a packed batch; default: the batch size")
    parser.add_argument(
        "--max-length", type=int, default=512, help="tokens of an example and of a packed row"
    )
    parser.add_argument("--examples", type=int, help="examples; default: all of the file")
    parser.add_argument("--rounds", type=int, default=1, help="times that all kinds are measured")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS, help="kinds of batches")
    args = parser.parse_args()

    quantization = args.quantization or ("none" if args.device == "cpu" else "nf4")
    source = {"name": args.shape, "weights": "random"} if args.shape else {}
    loaded = load_backbone(BackboneConfig(quantization=quantization, **source), args.device)
    inject_adapter(loaded.model, MokaConfig())
    if args.checkpointing:
        loaded.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    print(PackedAttention(loaded.model))
    tokenizer = loaded.tokenizer if args.shape is None else load_backbone(BackboneConfig()).tokenizer
    data = {
        kind: data_of_kind(kind, tokenizer, args.data, args.batch_size, args.max_length, args.rows)
        for kind in args.kinds
    }
    rounds = {kind: [] for kind in args.kinds}
    for module in data.values():
        limit_examples(module, args.examples)
    for _ in range(args.rounds):
        for kind, module in data.items():
            rounds[kind].append(measure_epoch(loaded.model, module))
            found = rounds[kind][-1]
            print(f"{kind}: {found.seconds:.1f} s, {found.cpu_seconds:.1f} s of processor time", flush=True)
    results = {kind: summed(found) for kind, found in rounds.items()}
    print("\n".join(table(results)))
    report = {
        kind: {"tokens": r.report.tokens, "padding_share": r.report.padding_share, "seconds": r.seconds}
        for kind, r in results.items()
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
