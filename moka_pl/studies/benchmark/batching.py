"""Times training steps on the same examples in batches of different kinds.

``scripts/packing_speed.py`` runs it.
"""

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from moka_pl.data.batching.report import EpochReport, epoch_report
from moka_pl.data.batching.samplers import GlobalBatchSampler
from moka_pl.studies.benchmark.steps import synchronise
from moka_pl.studies.common import Parser, check_device, one_line_errors, positive_int

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from moka_pl.data import InstructionData

DESCRIPTION = """\
Measures what packing and bucketing gain: real tokens per second of a training step, on the same examples.

    python scripts/packing_speed.py --data alpaca.json --examples 128       # SmolLM2, float32, on the CPU
    python scripts/packing_speed.py --data alpaca.json --device cuda        # the same in NF4 and bfloat16
    python scripts/packing_speed.py --data alpaca.json --device cuda --shape llama2-7b --checkpointing

A step is forward and backward with MoKA adapters on q and v; loading is not counted. `random` are shuffled
batches padded to their longest example, `bucketed` those of similar lengths, `by tokens` the same with a
budget of tokens in place of a number of examples, `packed` rows of several examples. Each kind sees each
example once. Every round measures all kinds in turn. The ratio of processor times is the one to trust on a
CPU that has other work, with OMP_NUM_THREADS=1: waiting threads count as busy.
"""

KINDS: dict[str, dict[str, Any]] = {
    "random": {"bucket": False},
    "bucketed": {"bucket": True},
    "by tokens": {"bucket": True},
    "packed": {"packing": True},
}
"""Options of the data module for each kind of batch; those but the first are compared with the first."""


@one_line_errors("packing_speed")
def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a table and JSON.

    Args:
        arguments: Default: the process's.
    """
    from moka_pl.adapters import MokaConfig, inject_adapter
    from moka_pl.backbone import BackboneConfig, load_backbone
    from moka_pl.lm.attention import PackedAttention
    from moka_pl.lm.checkpointing import checkpoint_layers

    args = _parser().parse_args(arguments)
    check_device(args.device)
    base: dict[str, Any] = {"quantization": args.quantization or ("none" if args.device == "cpu" else "nf4")}
    if args.shape:
        base |= {"name": args.shape, "weights": "random"}
    loaded = load_backbone(BackboneConfig(**base), args.device)
    inject_adapter(loaded.model, MokaConfig())
    if args.checkpointing:
        checkpoint_layers(loaded.model)
    print(PackedAttention(loaded.model))
    tokenizer = loaded.tokenizer if args.shape is None else load_backbone(BackboneConfig()).tokenizer
    size = args.batch_size, args.max_length, args.rows
    data = {kind: data_of_kind(kind, tokenizer, args.data, *size) for kind in args.kinds}
    for module in data.values():
        limit_examples(module, args.examples)
    rounds: dict[str, list[Measured]] = {kind: [] for kind in args.kinds}
    for _ in range(args.rounds):
        for kind, module in data.items():
            epoch = measure_epoch(loaded.model, module)
            rounds[kind].append(epoch)
            print(f"{kind}: {epoch.seconds:.1f} s, {epoch.cpu_seconds:.1f} s of processor time", flush=True)
    results = {kind: summed(epochs) for kind, epochs in rounds.items()}
    print("\n".join(table(results)))
    report = {
        kind: {"tokens": r.report.tokens, "padding_share": r.report.padding_share, "seconds": r.seconds}
        for kind, r in results.items()
    }
    print(json.dumps(report))


class Measured(NamedTuple):
    """What the steps of an epoch took.

    Attributes:
        report: What the batches held.
        seconds: Forward and backward of all batches.
        cpu_seconds: Processor time of the same, over all threads: on a busy machine the better measure.
    """

    report: EpochReport
    seconds: float
    cpu_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Real tokens per second."""
        return self.report.tokens / self.seconds


def data_of_kind(
    kind: str,
    tokenizer: "PreTrainedTokenizerBase",
    path: str | Path,
    batch_size: int,
    max_length: int,
    rows: int | None = None,
) -> "InstructionData":
    """Alpaca-style data in batches of a kind.

    Args:
        kind: One of :data:`KINDS`.
        tokenizer: The model's tokenizer.
        path: File of instructions.
        batch_size: Examples of a batch.
        max_length: Most tokens of an example and of a packed row.
        rows: Rows of a packed batch, and in rows of ``max_length`` the tokens of a batch by tokens; None
            takes the batch size, so that all kinds need the memory of as many full rows.
    """
    from moka_pl.data import InstructionData

    rows = rows or batch_size
    options: dict[str, Any] = KINDS[kind] | {"batch_size": rows if kind == "packed" else batch_size}
    if kind == "by tokens":
        options["max_tokens"] = rows * max_length
    data = InstructionData(path, validation_share=0, prompt="alpaca", max_length=max_length, **options)
    data.connect(tokenizer)
    data.setup("fit")
    return data


def limit_examples(data: "InstructionData", count: int | None) -> None:
    """Keeps the first ``count`` training examples of a data module that is set up."""
    encoded = data._encoded["train"]
    if count is not None and encoded is not None:
        from moka_pl.data.encoding.examples import Encoded

        rows = encoded.rows.select(range(min(count, len(encoded.rows))))
        data._encoded["train"] = Encoded(rows, encoded.report)


def measure_epoch(model: "PreTrainedModel", data: "InstructionData") -> Measured:
    """Times forward and backward of every batch of an epoch, without the loading.

    Args:
        model: A model with trainable adapters.
        data: The training data, set up.
    """
    loader = data.train_dataloader()
    assert isinstance(loader.sampler, GlobalBatchSampler)
    report = epoch_report(loader.sampler)
    batches = list(loader)
    step = _Step(model)
    if step.device.type == "cuda":  # kernels are loaded and chosen before the clock starts
        for batch in batches[:2]:
            step(batch)
    seconds = cpu = 0.0
    for batch in batches:
        wall, used = step(batch)
        seconds += wall
        cpu += used
    return Measured(report, seconds, cpu)


class _Step:
    """Forward and backward of a batch, as in training."""

    def __init__(self, model: "PreTrainedModel") -> None:
        from moka_pl.lm.attention import PackedAttention

        self.model = model.train()
        self.device = model.get_input_embeddings().weight.device
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self.packed = PackedAttention(model)

    def __call__(self, batch: dict[str, Any]) -> tuple[float, float]:
        """Returns seconds and processor seconds."""
        import torch

        from moka_pl.lm.scoring import score_tokens

        moved = {key: x.to(self.device) if isinstance(x, torch.Tensor) else x for key, x in batch.items()}
        # A model of another tokenizer has other numbers for the words; for the time they take any do.
        vocabulary = self.model.config.vocab_size
        for name in ("input_ids", "labels"):
            moved[name] = moved[name].where(moved[name] < vocabulary, moved[name] % vocabulary)
        synchronise(self.device)
        begun, used = time.perf_counter(), time.process_time()
        inputs = self.packed.inputs(moved) if "position_ids" in moved else {}
        loss = score_tokens(self.model, moved["input_ids"], moved["labels"], **inputs).nll.sum()
        torch.autograd.backward(loss)
        synchronise(self.device)
        taken = time.perf_counter() - begun, time.process_time() - used
        for parameter in self.trainable:
            parameter.grad = None
        return taken


def table(results: dict[str, Measured]) -> Iterator[str]:
    """Lines of a table: one kind of batch each, compared with the first."""
    first: Measured | None = None
    yield (
        f"{'batches':<12}{'number':>8}{'rows':>8}{'padding':>9}{'seconds':>9}{'tokens/s':>10}{'ratio':>7}"
        f"{'CPU ratio':>11}"
    )
    for kind, measured in results.items():
        first = first or measured
        ratio, cpu = first.seconds / measured.seconds, first.cpu_seconds / measured.cpu_seconds
        yield (
            f"{kind:<12}{measured.report.batches:>8,}{measured.report.rows:>8,}"
            f"{100 * measured.report.padding_share:>8.1f}%{measured.seconds:>9.1f}"
            f"{measured.tokens_per_second:>10,.0f}{ratio:>7.2f}{cpu:>11.2f}"
        )


def summed(rounds: Sequence[Measured]) -> Measured:
    """Several measurements of the same batches as one, with the mean of their times."""
    return Measured(
        rounds[0].report,
        sum(r.seconds for r in rounds) / len(rounds),
        sum(r.cpu_seconds for r in rounds) / len(rounds),
    )


def _parser() -> Parser:
    parser = Parser("packing_speed", DESCRIPTION)
    parser.add_argument("--data", required=True, help="file of instructions in the Alpaca format")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--shape", help="shape with random weights, instead of SmolLM2 (llama2-7b, ...)")
    parser.add_argument("--quantization", help="nf4 or none; default nf4 on a GPU, none on a CPU")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--batch-size", type=positive_int, default=16, help="examples of a padded batch")
    parser.add_argument("--rows", type=positive_int, help="rows of a packed batch; default: the batch size")
    parser.add_argument(
        "--max-length", type=positive_int, default=512, help="tokens of an example and of a packed row"
    )
    parser.add_argument("--examples", type=positive_int, help="examples; default: all of the file")
    parser.add_argument("--rounds", type=positive_int, default=1, help="number of times to measure all kinds")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS, help="kinds of batches")
    return parser
