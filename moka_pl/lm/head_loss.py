r"""Log-likelihoods of tokens from their last hidden states, without the logits of all tokens at a time.

A vocabulary is tens of times as wide as a hidden state, so that logits, their log-probabilities and gradients
can take more memory than everything else. Here a head sees a part of the tokens at a time. With

.. math::
    \ell_t = -\log p_t(y_t), \qquad p_t = \mathrm{softmax}(W h_t + b), \qquad
    \frac{\partial \ell_t}{\partial h_t} = W^\top (p_t - e_{y_t})

a frozen linear head needs no logits in the backward pass: the gradient of each token's loss is computed with
the loss, and multiplied by what comes from behind. Any other head is run again in the backward pass.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from moka_pl._compat import hook_count
from moka_pl.ops.dispatch import on_gpu_with_triton

IGNORE_INDEX = -100
#: Logits of a part, but no fewer tokens than these: smaller products waste a GPU. Adapted heads do more
#: work for each part.
_LOGITS, _FEWEST, _FEWEST_ADAPTED = 2**25, 512, 2048
#: Logits up to which a CPU, to which launches cost nothing, computes all at once.
_MOST_ON_CPU = 2**28


def nll_at_head(head: nn.Module, hidden: Tensor, wanted: Tensor) -> Tensor:
    """Returns -log p of tokens, nats, shape (N,), float32, differentiable once.

    Args:
        head: The output head, whose outputs are the model's logits.
        hidden: The last hidden states of the positions that predict the tokens, shape (N, d).
        wanted: The tokens; of ``IGNORE_INDEX`` the loss is 0, shape (N,).
    """
    weight = getattr(head, "weight", None)
    vocabulary = weight.shape[0] if isinstance(weight, Tensor) and weight.dim() == 2 else None
    whole = hidden.device.type == "cpu" and len(hidden) * (vocabulary or 0) <= _MOST_ON_CPU
    if whole or vocabulary is None or any(hook_count(module) for module in head.modules()):
        return token_nll(head(hidden), wanted)
    frozen = not any(parameter.requires_grad for parameter in head.parameters())
    if type(head) is nn.Linear and frozen and _product_dtype(hidden) != torch.float16:
        size = part_size(len(hidden), vocabulary)
        nll: Tensor = _LinearNll.apply(hidden, head.weight, head.bias, wanted, size)  # type: ignore[no-untyped-call]
        return nll
    size, fewer = part_size(len(hidden), vocabulary, adapted=True), part_size(len(hidden), vocabulary)
    draws = any(isinstance(module, nn.Dropout) and module.training and module.p for module in head.modules())
    parts = [
        checkpoint(_head_nll, head, part, ids, fewer, use_reentrant=False, preserve_rng_state=draws)
        for part, ids in zip(torch.split(hidden, size), torch.split(wanted, size), strict=True)
    ]
    return torch.cat(parts)


def token_nll(logits: Tensor, wanted: Tensor) -> Tensor:
    """Returns -log p of tokens, nats, shape (N,), float32.

    Args:
        logits: Logits of the positions that predict the tokens, shape (N, V).
        wanted: The tokens; of ``IGNORE_INDEX`` the loss is 0, shape (N,).
    """
    return F.cross_entropy(logits.float(), wanted, ignore_index=IGNORE_INDEX, reduction="none")


def _head_nll(head: nn.Module, hidden: Tensor, wanted: Tensor, size: int) -> Tensor:
    nll: Tensor = _LogitsNll.apply(head(hidden), wanted, size)  # type: ignore[no-untyped-call]
    return nll


def part_size(tokens: int, vocabulary: int, adapted: bool = False) -> int:
    """Returns how many tokens a head sees at a time, all parts being of about one size.

    Args:
        tokens: Their number.
        vocabulary: Logits of a token.
        adapted: Whether the head is adapted or trained.
    """
    parts = -(-tokens // max(_FEWEST_ADAPTED if adapted else _FEWEST, _LOGITS // vocabulary))
    return max(1, -(-tokens // max(1, parts)))


def _product_dtype(hidden: Tensor) -> torch.dtype:
    """Dtype of the head's product; float16 lacks the range for a gradient that is not scaled yet."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _nll(logits: Tensor, wanted: Tensor) -> Tensor:
    """-log p of tokens, (P,), float32, without gradients."""
    if not on_gpu_with_triton(logits):
        return token_nll(logits, wanted)
    from moka_pl.ops.triton import nll_of_logits

    return nll_of_logits(logits.contiguous(), wanted, IGNORE_INDEX)


def _nll_and_errors_(logits: Tensor, wanted: Tensor, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """-log p of tokens, (P,), float32, and its gradient to their logits, (P, V), which may overwrite these.

    Args:
        logits: The logits, (P, V), contiguous.
        wanted: The tokens, (P,).
        factor: What each token's gradient is multiplied by, (P,), float32; None for 1.
    """
    if on_gpu_with_triton(logits):
        from moka_pl.ops.triton import nll_of_logits

        return nll_of_logits(logits, wanted, IGNORE_INDEX, logits, factor), logits
    nll, errors = _nll_and_errors(logits, wanted)
    return nll, (errors if factor is None else errors.mul_(factor[:, None])).to(logits.dtype)


def _nll_and_errors(logits: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """-log p of tokens, (P,), and its gradient to their logits, p - e_y or 0, (P, V); both in float32."""
    known = wanted != IGNORE_INDEX  # (P,)
    tokens = wanted.where(known, 0)[:, None]  # (P, 1)
    # In place: every step but the first makes no more numbers of the vocabulary's size.
    numbers = logits.to(torch.float32, copy=True)
    numbers -= numbers.amax(-1, keepdim=True)
    chosen = numbers.gather(1, tokens)  # (P, 1)
    numbers.exp_()
    total = numbers.sum(-1, keepdim=True)  # (P, 1)
    numbers.div_(total)  # p
    numbers.scatter_(1, tokens, numbers.gather(1, tokens) - 1)
    return (total.log() - chosen)[:, 0].where(known, 0), numbers.masked_fill_(~known[:, None], 0)


class _LinearNll(torch.autograd.Function):
    """-log p of tokens by a frozen linear head, some tokens at a time."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: Tensor, size: int
    ) -> Tensor:
        nll = hidden.new_empty(len(hidden), dtype=torch.float32)  # (N,)
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None  # (N, d)
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            logits = F.linear(hidden[part], weight, bias)  # (P, V)
            if grad is None:
                nll[part] = _nll(logits, wanted[part])
                continue
            nll[part], errors = _nll_and_errors_(logits, wanted[part])
            del logits
            grad[part] = errors @ weight  # (P, d)
            del errors
        ctx.save_for_backward(grad)
        return nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (kept,) = ctx.saved_tensors
        return None if kept is None else (kept * grad[:, None]).to(kept.dtype), None, None, None, None


class _LogitsNll(torch.autograd.Function):
    """-log p of tokens from their logits, of which only some are held in float32 at a time."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, wanted: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(logits, wanted)
        ctx.size = size
        parts = zip(torch.split(logits, size), torch.split(wanted, size), strict=True)
        return torch.cat([_nll(part, ids) for part, ids in parts])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, wanted = ctx.saved_tensors
        errors = torch.empty_like(logits, memory_format=torch.contiguous_format)  # (N, V)
        for start in range(0, len(logits), ctx.size):
            part = slice(start, start + ctx.size)
            errors[part].copy_(logits[part])
            errors[part] = _nll_and_errors_(errors[part], wanted[part], grad[part])[1]
        return errors, None, None
