"""Captures the forward and backward pass of a training step as CUDA graphs.

A small model is bound by the launches of its thousands of kernels. Recorded once for every size of a batch,
they are launched together. Loss and gradients are computed by the same kernels as without.
"""

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from moka_pl._compat import copy_all_, multiplied
from moka_pl.errors import MokaWarning, one_line
from moka_pl.lm.architecture import causal_unsupported_reason, sliding_window
from moka_pl.lm.attention import VARLEN, varlen_inputs
from moka_pl.lm.causal import CAUSAL, causal, without_waiting
from moka_pl.lm.checkpointing import draws, is_checkpointed
from moka_pl.lm.experts import SplitExperts
from moka_pl.lm.scoring import IGNORE_INDEX, nll_at

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WIDTH = 32
"""Recorded batches are padded to a multiple of this many tokens a row."""

PATIENCE = 3
"""Number of ordinary steps of a size before it is captured; capturing costs about as much as a few steps."""

_FEWEST_LABELS = 256
_FEWEST_STARTS = 32
_MOST_GRAPHS = 32
_WARMUP = 2

Inputs = tuple[Tensor, ...]


class FixedBatch(NamedTuple):
    """A batch in one of few sizes.

    Attributes:
        ids: Token ids, padded on the right to a multiple of ``WIDTH``, shape (B, T).
        positions: Flat positions b·T + t that predict a token, filled up with zeros to a power of two, (N,).
        targets: The predicted tokens; ``IGNORE_INDEX`` where filled up, (N,).
        tokens: Number of predicted tokens.
        position_ids: Of packed rows: restart at each example, (B, T).
        starts: Of packed rows: where the examples and paddings begin in the flattened batch, filled up with
            the batch's end, B·T, to a power of two, (S,), int32.
    """

    ids: Tensor
    positions: Tensor
    targets: Tensor
    tokens: int
    position_ids: Tensor | None = None
    starts: Tensor | None = None

    @property
    def size(self) -> tuple[int, ...]:
        """B, T and N; of packed rows S, too."""
        rows, width = self.ids.shape
        packed = () if self.starts is None else (len(self.starts),)
        return rows, width, len(self.positions), *packed

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What a recording reads."""
        packed = () if self.position_ids is None or self.starts is None else (self.position_ids, self.starts)
        return self.ids, self.positions, self.targets, *packed

    def pinned(self) -> "FixedBatch":
        """Returns the batch in pinned memory."""
        ids, positions, targets = (t.pin_memory() for t in (self.ids, self.positions, self.targets))
        places, starts = (None if t is None else t.pin_memory() for t in (self.position_ids, self.starts))
        return FixedBatch(ids, positions, targets, self.tokens, places, starts)


def fix_size(batch: Mapping[str, Any]) -> FixedBatch:
    """Pads a batch of ``input_ids`` (B, T) and ``labels`` (B, T) to one of few sizes.

    Padding stands on the right, where causal attention never looks; what stands there predicts nothing. In
    packed rows it is a segment of its own. The batch had best lie on the CPU: a GPU would have to be waited
    for.
    """
    ids: Tensor = batch["input_ids"]
    length = ids.shape[1]
    width = -(-length // WIDTH) * WIDTH
    row, column = (batch["labels"][:, 1:] != IGNORE_INDEX).nonzero(as_tuple=True)  # (N,)
    tokens = len(row)
    size = max(_FEWEST_LABELS, 1 << max(0, tokens - 1).bit_length())
    positions = F.pad(row * width + column, (0, size - tokens))  # (N',)
    targets = F.pad(batch["labels"][row, column + 1], (0, size - tokens), value=IGNORE_INDEX)  # (N',)
    ids = F.pad(ids, (0, width - length))  # (B, T')
    if "position_ids" not in batch:
        return FixedBatch(ids, positions, targets, tokens)
    places = F.pad(batch["position_ids"], (0, width - length))  # (B, T')
    starts = _fixed_starts(batch["segment_starts"], len(ids), length, width)
    return FixedBatch(ids, positions, targets, tokens, places, starts)


def _fixed_starts(starts: Tensor, rows: int, length: int, width: int) -> Tensor:
    """Where segments begin once rows are wider, filled up to a power of two.

    Args:
        starts: Where they begin in rows of ``length``, and the end of the last, (S + 1,), int32.
        rows: Number of rows.
        length: Their tokens.
        width: Their tokens with the padding.

    Returns:
        Shape (S',), int32.
    """
    begins = starts[:-1]
    begins = begins // length * width + begins % length  # (S,)
    if width > length:
        padding = torch.arange(rows, dtype=starts.dtype, device=starts.device) * width + length  # (B,)
        begins = torch.cat([begins, padding]).sort().values  # (S + B,)
    size = max(_FEWEST_STARTS, 1 << len(begins).bit_length())
    return F.pad(begins, (0, size - len(begins)), value=rows * width)  # (S',)


class StepCapture:
    """Computes the summed loss of batches, with its gradients, by replaying CUDA graphs.

    Packed batches need a model that has the variable-length attention
    (:class:`moka_pl.lm.attention.PackedAttention`).

    A size is recorded when it has come a few times; until then, and where recording fails, the batch is
    computed as usual. Memory: the activations of the largest size once more, as recorded ones are kept apart.
    The model has its adapters already, is in training mode and on a CUDA device.

    Attributes:
        unsupported_reason: Why nothing is recorded; None where it is.
    """

    def __init__(self, model: "PreTrainedModel") -> None:
        self.model = model
        self.unsupported_reason = capture_unsupported_reason(model)
        self._params = [p for p in model.parameters() if p.requires_grad]
        self._graphs: dict[tuple[int, ...], _Recorded] = {}
        self._seen: Counter[tuple[int, ...]] = Counter()
        self._pool: Any = None
        self._loss: Tensor | None = None
        self._grads: list[Tensor] = []
        self.turn = 0

    @property
    def graphs(self) -> int:
        """Number of recorded sizes."""
        return len(self._graphs)

    def __call__(self, batch: FixedBatch) -> Tensor:
        """Returns the summed negative log-likelihood of the batch's predicted tokens, differentiable once."""
        size = batch.size
        self._seen[size] += 1
        if size not in self._graphs and self._worth_recording(size):
            self._record(batch)
        recorded = self._graphs.get(size)
        if recorded is None:
            with without_waiting(self.model) if batch.starts is None else nullcontext():
                return self._compute(*batch.tensors)
        for kept, new in zip(recorded.inputs, batch.tensors, strict=True):
            kept.copy_(new, non_blocking=True)
        recorded.graph.replay()
        self.turn += 1
        loss: Tensor = _Replayed.apply(self, *self._params)  # type: ignore[no-untyped-call]
        return loss

    def result(self) -> tuple[Tensor, list[Tensor]]:
        """Returns loss and gradients of the last replay; the next one overwrites them."""
        assert self._loss is not None
        return self._loss, self._grads

    def _worth_recording(self, size: tuple[int, ...]) -> bool:
        if self.unsupported_reason is not None or len(self._graphs) >= _MOST_GRAPHS:
            return False
        if self._seen[size] <= PATIENCE:
            return False
        if (window := sliding_window(self.model)) is not None and size[1] > window:
            return False  # not all earlier positions are seen
        if torch.is_autocast_enabled("cuda"):
            reason = self.unsupported_reason = "autocast caches weights across steps"
            warnings.warn(
                f"no CUDA graphs: {reason}; set --trainer.precision 32-true", MokaWarning, stacklevel=2
            )
            return False
        return torch.is_grad_enabled()

    def _compute(
        self,
        ids: Tensor,
        positions: Tensor,
        targets: Tensor,
        position_ids: Tensor | None = None,
        starts: Tensor | None = None,
    ) -> Tensor:
        width = ids.shape[1]
        column = positions % width  # (N,)
        inputs: dict[str, Any] = {"input_ids": ids}
        if starts is not None:
            # No segment is longer than a row, and a recording needs a number.
            inputs |= {"position_ids": position_ids, **varlen_inputs(starts, longest=width)}
        return nll_at(self.model, positions // width, column, targets, **inputs).sum()

    def _record(self, batch: FixedBatch) -> None:
        inputs = tuple(tensor.clone() for tensor in batch.tensors)
        stream = torch.cuda.current_stream(batch.ids.device)
        generator = torch.cuda.default_generators[stream.device_index]
        random = generator.clone_state()
        try:
            attention = causal(self.model) if batch.starts is None else nullcontext()
            with attention, _fresh_leaves(self.model) as leaves:
                self._warm_up(inputs, leaves)
                generator.set_state(random.get_state())  # warming up may have drawn from it
                graph = torch.cuda.CUDAGraph()
                # Other threads, such as one that pins memory, may go on meanwhile.
                side = _side_stream(batch.ids.device)
                with torch.cuda.graph(graph, self._pool, side, capture_error_mode="thread_local"):
                    self._forward_backward(inputs, leaves)
        except RuntimeError as error:
            # A recording that fails leaves its stream current, and the generator in a state of recording.
            torch.cuda.set_stream(stream)
            torch.cuda.synchronize(batch.ids.device)
            generator.graphsafe_set_state(random)
            self.unsupported_reason = _cause(error)
            warnings.warn(
                f"cannot capture the training step as a CUDA graph: {self.unsupported_reason}",
                MokaWarning,
                stacklevel=2,
            )
            return
        self._pool = graph.pool()
        self._graphs[batch.size] = _Recorded(graph, inputs)

    def _warm_up(self, inputs: Inputs, leaves: list[nn.Parameter]) -> None:
        """Compiles and loads everything, on a stream of its own as recording does."""
        stream = _side_stream(inputs[0].device)
        stream.wait_stream(torch.cuda.current_stream(inputs[0].device))
        with torch.cuda.stream(stream):
            for _ in range(_WARMUP):
                self._forward_backward(inputs, leaves)
        torch.cuda.current_stream(inputs[0].device).wait_stream(stream)

    def _forward_backward(self, inputs: Inputs, leaves: list[nn.Parameter]) -> None:
        """Leaves loss and gradients in the tensors that all sizes share."""
        loss = self._compute(*inputs)
        grads = torch.autograd.grad(loss, leaves)
        if self._loss is None:
            self._loss, self._grads = torch.empty_like(loss), [torch.empty_like(p) for p in self._params]
        self._loss.copy_(loss.detach())
        copy_all_(self._grads, grads)


@cache
def _side_stream(device: torch.device) -> Any:
    """The stream of all recordings: matrix products keep tens of megabytes for each stream that they saw."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _cause(error: BaseException) -> str:
    """The first of several errors, of which the last only says that recording has failed."""
    while error.__context__ is not None:
        error = error.__context__
    return one_line(error)


class _Recorded(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: Inputs


class _Replayed(torch.autograd.Function):
    """Hands the gradients of a replay to autograd."""

    @staticmethod
    def forward(ctx: Any, capture: StepCapture, *parameters: Tensor) -> Tensor:
        ctx.capture, ctx.turn = capture, capture.turn
        return capture.result()[0].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.turn != ctx.capture.turn:
            raise RuntimeError("another batch was computed before this batch's backward pass")
        return None, *multiplied(ctx.capture.result()[1], grad)


def capture_unsupported_reason(model: "PreTrainedModel") -> str | None:
    """Returns why a model's training step cannot be recorded, or None."""
    if any(isinstance(module, SplitExperts) for module in model.modules()):
        return "experts are computed one after another, as the tokens choose them"
    if model.get_input_embeddings().weight.device.type != "cuda":
        return "CUDA graphs need a GPU"
    if is_checkpointed(model) and draws(model):
        return "gradient checkpointing with dropout reads the state of random generators during capture"
    # Packed data have given the model their attention before; rows wider than a window are left out by size.
    return causal_unsupported_reason(model, CAUSAL, VARLEN, width=1)


@contextmanager
def _fresh_leaves(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """With other parameters over the trainable ones' memory, in the order of ``model.parameters()``.

    Where a loss of before is still held, autograd would have a recorded gradient wait for the stream of then,
    which recording forbids.
    """
    fresh = {id(p): nn.Parameter(p.detach()) for p in model.parameters() if p.requires_grad}
    trained = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
        if parameter.requires_grad
    ]
    for module, name, parameter in trained:
        setattr(module, name, fresh[id(parameter)])
    try:
        yield list(fresh.values())
    finally:
        for module, name, parameter in trained:
            setattr(module, name, parameter)
