"""What many adapters on one base cost: memory, and batches whose rows have different ones.

``scripts/mixed_batches.py`` runs it.
"""

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from moka_pl.adapters import MokaAdapters, MokaConfig
from moka_pl.backbone import BackboneConfig, load_backbone
from moka_pl.backbone.random_weights import SHAPES
from moka_pl.studies.common import Parser, one_line_errors, positive_int

DESCRIPTION = """\
Measures what many adapters on one 4-bit base cost.

    python scripts/mixed_batches.py [--rows 32] [--adapters 8] [--kept 100] [--repeats 5]
    python scripts/mixed_batches.py --base llama2-7b --tokens 1 64 512 --kinds servable

Prints the bytes of base and adapters, the time of a batch with different adapters in its rows over that of
the same batch with one, and whether each row greedily generates what its adapter does alone. Times are
medians of alternating turns; on a CPU they are the process's CPU seconds, on one thread.
"""

#: The demo's adapter, and the servable one.
KINDS = {
    "diverse, q and v": MokaConfig(components=10),
    "servable, all linear": MokaConfig(1, filters="servable", target_modules="all-linear"),
}

#: The kinds by one word.
SHORT = {kind.partition(",")[0]: kind for kind in KINDS}


@one_line_errors("mixed_batches")
def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints.

    Args:
        arguments: Default: the process's.
    """
    parser = Parser("mixed_batches", DESCRIPTION)
    parser.add_argument(
        "--base", default="smollm2-135m-instruct", help="the base, or a shape with random weights"
    )
    parser.add_argument("--rows", type=positive_int, default=32, help="rows of a batch")
    parser.add_argument("--adapters", type=positive_int, default=8, help="adapters of a batch")
    parser.add_argument("--kept", type=positive_int, default=100, help="adapters on the base")
    parser.add_argument("--tokens", type=positive_int, nargs="+", default=[1, 8, 64], help="tokens of a row")
    parser.add_argument("--repeats", type=positive_int, default=5, help="turns")
    parser.add_argument("--kinds", nargs="+", default=list(SHORT), choices=SHORT, help="kinds of adapters")
    parser.add_argument("--no-agreement", action="store_true", help="generate nothing")
    parser.add_argument(
        "--profile", action="store_true", help="list the operations of a mixed batch that take longest"
    )
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weights = "random" if args.base in SHAPES else "pretrained"
    model = load_backbone(BackboneConfig(args.base, weights=weights), device).model  # type: ignore[arg-type]
    model.config.use_cache = True
    print(f"base: {sum(p.nbytes for p in model.parameters()):,} bytes")
    ids = torch.randint(4, 250, (args.rows, max(args.tokens)), generator=torch.Generator().manual_seed(0))
    ids = ids.to(device)  # (I, T)
    for kind in (SHORT[short] for short in args.kinds):
        config = KINDS[kind]
        adapters = MokaAdapters(model)
        fill(adapters, config, args.kept)
        held = sum(adapters.memory().values())
        print(f"{kind}: {args.kept} adapters hold {held:,} bytes")
        names = [f"adapter {i % args.adapters}" for i in range(args.rows)]
        for tokens in args.tokens:
            one, mixed = compare(adapters, ids[:, :tokens], names, args.repeats)
            print(
                f"  {tokens:>3} tokens a row: one {one:.4f} s, {args.adapters} mixed {mixed:.4f} s, ", end=""
            )
            print(f"ratio {mixed / one:.2f}", flush=True)
            if args.profile:
                print(profiled(adapters, ids[:, :tokens], names))
        if not args.no_agreement:
            right = agreeing(adapters, ids[:, :8], names)
            print(f"  {right} of {args.rows} rows generate the tokens of their adapter alone", flush=True)
        adapters.set_adapter(names[0])
        adapters.delete_adapter(names[0])


def fill(adapters: MokaAdapters, config: MokaConfig, count: int) -> None:
    """Adds adapters with random factors and gates.

    Args:
        adapters: Where they are added.
        config: The configuration of each.
        count: How many.
    """
    for i in range(count):
        adapters.add_adapter(f"adapter {i}", config)
        adapters.set_adapter(f"adapter {i}")
        generator = torch.Generator().manual_seed(i)
        for parameter in adapters.model.parameters():
            if parameter.requires_grad:
                values = torch.randn(parameter.shape, generator=generator) * 0.1
                parameter.data.copy_(values)


@torch.no_grad()
def compare(adapters: MokaAdapters, ids: Tensor, names: Sequence[str], repeats: int) -> tuple[float, float]:
    """Returns the seconds of a forward pass with one adapter, and with one for each row.

    Args:
        adapters: The adapters.
        ids: Tokens, shape (I, T).
        names: The adapter of each row.
        repeats: Turns.
    """
    adapters.set_adapter(names[0])
    runs: tuple[Callable[[], Any], ...] = (
        lambda: adapters(input_ids=ids),
        lambda: adapters(input_ids=ids, adapter_names=names),
    )
    clock = time.perf_counter if ids.is_cuda else time.process_time
    seconds: list[list[float]] = [[], []]
    for turn in range(repeats + 1):
        for found, run in zip(seconds, runs, strict=True):
            start = clock()
            run()
            if ids.is_cuda:
                torch.cuda.synchronize()
            if turn:  # the first one warms up
                found.append(clock() - start)
    return median(seconds[0]), median(seconds[1])


@torch.no_grad()
def profiled(adapters: MokaAdapters, ids: Tensor, names: Sequence[str]) -> str:
    """Returns a table of what takes longest in a mixed batch, on the GPU if there is one.

    Args:
        adapters: The adapters.
        ids: Tokens, shape (I, T).
        names: The adapter of each row.
    """
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if ids.is_cuda:
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as profile:
        adapters(input_ids=ids, adapter_names=names)
    order = "self_cuda_time_total" if ids.is_cuda else "self_cpu_time_total"
    return str(profile.key_averages().table(sort_by=order, row_limit=15, max_name_column_width=50))


def agreeing(adapters: MokaAdapters, ids: Tensor, names: Sequence[str]) -> int:
    """Returns how many rows of a mixed batch generate what their adapter alone does.

    Args:
        adapters: The adapters.
        ids: Prompts, shape (I, T).
        names: The adapter of each row.
    """
    options: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    mask = torch.ones_like(ids)
    mixed = adapters.generate(ids, attention_mask=mask, adapter_names=names, **options)
    right = 0
    for name in dict.fromkeys(names):
        rows = [i for i, row in enumerate(names) if row == name]
        adapters.set_adapter(name)
        own = adapters.generate(ids[rows], attention_mask=mask[rows], **options)
        right += int((own == mixed[rows]).all(1).sum())
    return right
