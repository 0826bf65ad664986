"""Times training steps, forward and backward, and tokens of greedy generation."""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from moka_pl.studies.benchmark.bench import Bench, Record, Values, quartiles
from moka_pl.studies.benchmark.cases import (
    ALL,
    FROZEN,
    QV,
    Preset,
    Row,
    frozen,
    lora,
    moka,
    servable,
)
from moka_pl.studies.common import peak_gib, reset_peak

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    Loss = Callable[[], Tensor]
    MakeLoss = Callable[[PreTrainedModel, "Batch"], Loss]

#: Milliseconds of the forward pass, and of both.
_Times = tuple[float, float]

#: A row that exceeds its time is still given as many measured steps.
_FEWEST = 2


class Batch(NamedTuple):
    """Random tokens; every position predicts one, so that a single token is a batch, too.

    Attributes:
        ids: Token ids, shape (B, T).
        labels: Labels as ``score_tokens`` takes them, one position longer, shape (B, T + 1).
    """

    ids: "Tensor"
    labels: "Tensor"


def random_batch(vocabulary: int, batch: int, length: int, device: "torch.device") -> Batch:
    """Draws a batch of random tokens.

    Args:
        vocabulary: Number of different tokens.
        batch: Rows B.
        length: Tokens T of a row.
        device: Where the batch lies.
    """
    import torch

    labels = torch.randint(vocabulary, (batch, length + 1), device=device)
    return Batch(labels[:, :-1].contiguous(), labels)


def device_of(model: "PreTrainedModel") -> "torch.device":
    """Where a model computes; its embeddings alone may lie in the host's memory, as unsloth's do."""
    where: torch.device = model.device
    devices = (parameter.device for parameter in model.parameters())
    return next((device for device in devices if device.type != "cpu"), where)


def synchronise(device: "torch.device") -> None:
    """Waits for the GPU."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def time_steps(
    model: "PreTrainedModel",
    batch: int,
    length: int,
    warmup: int,
    steps: int,
    seconds: float,
    make_loss: "MakeLoss | None" = None,
    profiled: bool = False,
) -> Values:
    """Measures forward and backward of a batch.

    Where nothing in the model is trainable, a gradient flows back to the embeddings, as it does for an
    adapter in the first layer.

    Args:
        model: The model, with or without adapters.
        batch: Rows of the batch.
        length: Tokens of a row.
        warmup: Steps before the measured ones.
        steps: Measured steps.
        seconds: Longest time for the measured steps.
        make_loss: What makes the loss of a batch that is computed in every step; None for the mean over all
            tokens.
        profiled: Count what is launched on the GPU in one more step, and time it.

    Returns:
        ``step_ms`` (median) with ``step_q1_ms`` and ``step_q3_ms``, ``forward_ms`` (median; not where a graph
        holds both passes), ``tokens_per_s``, ``peak_gib``, ``trainable`` and ``steps``, the measured ones;
        ``launches`` and ``gpu_ms``, what the GPU's kernels and copies take, if asked for.
    """
    from moka_pl.lm.cuda_graphs import PATIENCE

    model.train()
    device = device_of(model)
    data = random_batch(model.config.vocab_size, batch, length, device)
    trainable = [p for p in model.parameters() if p.requires_grad]
    captured = make_loss is captured_loss
    with _gradient_everywhere(model, not trainable, captured):
        loss = (make_loss or plain_loss)(model, data)
        if captured:
            reset_peak(device)  # while it is recorded a graph's memory is counted, and not in its replays
        for _ in range(max(warmup, PATIENCE + 2) if captured else warmup):
            _step(loss, device, trainable)
        if not captured:
            reset_peak(device)
        times = _repeat(lambda: _step(loss, device, trainable), steps, seconds)
        peak = peak_gib(device)
        seen = _profile(lambda: _passes(loss, device)) if profiled else {}
        _change(trainable)
    forward: Values = {} if captured else {"forward_ms": statistics.median(forward for forward, _ in times)}
    return seen | forward | _summary([step for _, step in times], batch * length, peak, trainable)


def _summary(times: Sequence[float], tokens: int, peak: float, trainable: Sequence["Tensor"]) -> Values:
    first, median, third = quartiles(times)
    return {
        "step_ms": median,
        "step_q1_ms": first,
        "step_q3_ms": third,
        "tokens_per_s": 1e3 * tokens / median,
        "peak_gib": peak,
        "trainable": sum(p.numel() for p in trainable),
        "steps": len(times),
    }


@contextmanager
def _gradient_everywhere(model: "PreTrainedModel", wanted: bool, captured: bool) -> Iterator[None]:
    """Has a frozen model's gradient flow back to its first layer, as an adapter there would.

    Args:
        model: The model.
        wanted: Whether nothing in it is trainable.
        captured: Whether its step is recorded, for which a parameter must be trainable: the first vector.
    """
    if not wanted:
        yield
    elif captured:
        first = next(parameter for parameter in model.get_decoder().parameters() if parameter.dim() == 1)
        first.requires_grad_(True)
        try:
            yield
        finally:
            first.requires_grad_(False)
            first.grad = None
    else:
        hook = model.get_input_embeddings().register_forward_hook(lambda _, args, out: out.requires_grad_())
        try:
            yield
        finally:
            hook.remove()


def plain_loss(model: "PreTrainedModel", data: Batch) -> "Loss":
    """The mean over all tokens, as training computes it."""
    from moka_pl.lm.scoring import score_tokens

    return lambda: score_tokens(model, data.ids, data.labels).nll.mean()


def captured_loss(model: "PreTrainedModel", data: Batch) -> "Loss":
    """The same, with both passes replayed as a CUDA graph."""
    import torch

    from moka_pl.errors import ConfigError
    from moka_pl.lm.cuda_graphs import FixedBatch, StepCapture

    capture = StepCapture(model)
    everywhere = torch.arange(data.ids.numel(), device=data.ids.device)
    batch = FixedBatch(data.ids, everywhere, data.labels[:, 1:].flatten(), data.ids.numel())

    def loss() -> "Tensor":
        value = capture(batch) / batch.tokens
        if capture.unsupported_reason is not None:
            raise ConfigError(f"cannot capture the step as a CUDA graph: {capture.unsupported_reason}")
        return value

    return loss


def _step(loss: "Loss", device: "torch.device", trainable: list["Tensor"]) -> _Times:
    """One step, after which all parameters count as changed; returns the times of its passes."""
    times = _passes(loss, device)
    _change(trainable)
    return times


def _change(trainable: list["Tensor"]) -> None:
    """Ends a step as an optimizer would, neither timed nor profiled: nothing computed before serves again."""
    import torch

    with torch.no_grad():
        for parameter in trainable:
            parameter.grad = None
            parameter.mul_(1.0)


def _passes(loss: "Loss", device: "torch.device") -> _Times:
    """Both passes; returns the milliseconds of forward, and of forward and backward."""
    import torch

    cuda = device.type == "cuda"
    # The border between forward and backward is marked by events: to wait there would hold up the backward
    # pass of small models, whose time is that of launching kernels.
    marks = [
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        for _ in range(2 if cuda else 0)
    ]
    synchronise(device)
    begun = time.perf_counter()
    if cuda:
        marks[0].record()
    value = loss()
    if cuda:
        marks[1].record()
    between = time.perf_counter()
    torch.autograd.backward(value)
    synchronise(device)
    ended = time.perf_counter()
    forward = marks[0].elapsed_time(marks[1]) if cuda else 1e3 * (between - begun)
    return forward, 1e3 * (ended - begun)


def _repeat(step: Callable[[], _Times], steps: int, seconds: float) -> list[_Times]:
    """Times of as many steps as there is time for, but of two at least, if so many are wanted."""
    times: list[_Times] = []
    begun = time.perf_counter()
    while len(times) < steps and (len(times) < _FEWEST or time.perf_counter() - begun <= seconds):
        times.append(step())
    return times


#: Functions of CUDA's runtime and driver that start work on the GPU, as the profiler names them.
_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaMemcpy", "cudaMemset")


def _profile(work: Callable[[], object]) -> Values:
    """How often the work starts something on the GPU, and the milliseconds that this takes there."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    # The launches are calls of the CPU's, but only the GPU's activity records them.
    gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    with profile(activities=[ProfilerActivity.CPU, *gpu]) as profiler:
        work()
    events = profiler.key_averages()
    return {
        "launches": count_launches((event.key, event.count) for event in events),
        "gpu_ms": 1e-3 * sum(event.self_device_time_total for event in events if _on_gpu(event)),
    }


def _on_gpu(event: Any) -> bool:
    """Whether a profiler's event is a kernel or a copy, and not what a program calls a stretch of them."""
    return event.device_type.name == "CUDA" and not getattr(event, "is_user_annotation", False)


def count_launches(calls: Iterable[tuple[str, int]]) -> int:
    """Sums the calls that start a kernel, a graph or a copy; ``calls`` are names and numbers of functions."""
    return sum(count for name, count in calls if name.startswith(_LAUNCHES))


def teraflops(weights: int, tokens: int, milliseconds: float) -> float:
    r"""The rate of a step's frozen products.

    A product with P frozen weights takes ``2 P`` operations a token in the forward pass, and as many for the
    gradient of its input: :math:`4 P T / t`. What checkpointing computes again does not count, nor do
    attention, adapters and dequantising, so that rates compare as speeds do.

    Args:
        weights: P, of all linear layers with the output head.
        tokens: T, tokens of a batch.
        milliseconds: t, the step's.

    Returns:
        10¹² operations a second.
    """
    return 4e-9 * weights * tokens / milliseconds


def measure_steps(
    bench: Bench, preset: Preset, rows: Sequence[Row], profiled: bool = False, turns: int = 0
) -> Iterator[Record]:
    """Measures the rows on the same model and batch.

    Args:
        bench: The model.
        preset: Batch and steps.
        rows: What to measure; ratios are to the row ``frozen base``, if it comes first.
        profiled: Count what is launched on the GPU, too.
        turns: Measure each of them so many times in turns; 0 for one after another.

    Returns:
        A record a row.
    """

    def work(model: "PreTrainedModel", row: Row) -> Values:
        size = preset.batch, preset.length, preset.warmup, preset.steps, preset.seconds
        return time_steps(model, *size, captured_loss if row.captured else plain_loss, profiled)

    if turns:
        return bench.compare_in_turns("steps", rows, "step_ms", work, turns)
    return bench.compare("steps", rows, "step_ms", work)


PROMPT = 16


def decode_rows() -> list[Row]:
    """The rows that generate; no adapter is merged."""
    return [
        frozen(),
        moka("MoKA r10"),
        servable(),
        lora("LoRA r64 q,v", 64, QV),
        lora("LoRA r16 all linear", 16, ALL),
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
    device = device_of(model)
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
    device = device_of(model)
    times, cache = [], None
    for _ in range(new_tokens + 1):
        synchronise(device)
        begun = time.perf_counter()
        out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        ids, cache = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values
        synchronise(device)
        times.append(1e3 * (time.perf_counter() - begun))
    return times
