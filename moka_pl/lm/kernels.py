"""Fused kernels for what a frozen base computes between its products: Liger's norms, RoPE and gated MLPs.

Plain transformers reads and writes a layer's activations a dozen times between two matrix products. Liger's
Triton kernels compute each of these steps at once, and keep fewer tensors for the backward pass. They are put
into one model: other models of the process, and the classes of transformers, stay as they are. The loss is
left alone; it is computed outside the model (``scoring.py``).
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from types import CellType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moka_pl.errors import one_line
from moka_pl.lm.gated_mlp import without_product
from moka_pl.lm.own_loss import few_tokens
from moka_pl.lm.replaced_forward import forward_maker, given, replace_forward

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Kernels = Literal["auto", "none"]

#: Model types of which Liger replaces norms, rotary embeddings and gated MLPs of one text decoder, no more.
_KNOWN = {
    *("exaone4", "gemma", "gemma2", "gemma3_text", "glm4", "granite", "hunyuan_v1_dense", "llama"),
    *("ministral", "mistral", "olmo2", "olmo3", "phi3", "qwen2", "qwen3", "smollm3"),
}
#: Where a table of cosines remembers those for all rows of a batch.
_MARK = "_moka_one_row"
_LOSSES: dict[str, Any] = {"cross_entropy": False, "fused_linear_cross_entropy": False}
#: Largest relative difference of the last hidden states, ‖fused - plain‖ / ‖plain‖, in 32 and in 16 bits.
_TOLERANCE, _TOLERANCE_HALF = 1e-3, 0.1


def fuse_kernels(model: "PreTrainedModel") -> str:
    """Puts fused kernels into a model where they can run, and tries them on a few tokens.

    Where they cannot, or compute something else than the model, it stays as it is.

    Args:
        model: A model without adapters, in evaluation mode.

    Returns:
        A sentence on what computes now, or on why nothing has changed.
    """
    reason = _unsupported_reason(model) or _put(model)
    if reason is not None:
        return f"no fused kernels: {reason}"
    return f"fused kernels: Liger {version('liger-kernel')} in {len(fused_modules(model))} modules"


def fused_modules(model: nn.Module) -> list[str]:
    """Names of the modules that compute by fused kernels."""
    return [name for name, module in model.named_modules() if forward_maker(module) in (given, _rotating)]


def knows(model: "PreTrainedModel") -> bool:
    """Whether Liger has kernels for the architecture of a model."""
    return model.config.model_type in _KNOWN


def _unsupported_reason(model: "PreTrainedModel") -> str | None:
    """Why Liger has no kernels for a model, or None."""
    if not knows(model):
        return f"Liger has none for the architecture {model.config.model_type}"
    for package in ("triton", "liger_kernel"):
        if find_spec(package) is None:
            return f"{package} is not installed"
    return None


@torch.no_grad()
def _put(model: "PreTrainedModel") -> str | None:
    """Puts the kernels in; returns why they are out again, or None."""
    ids = few_tokens(model).to(model.get_input_embeddings().weight.device)  # (B, T)
    plain = _last_hidden(model, ids)
    before = [(module, type(module), dict(vars(module))) for module in model.modules()]
    try:
        _apply(model)
        reason = _difference(model, plain, _last_hidden(model, ids))
    except Exception as error:  # whatever an architecture, a version or a compiler raises
        reason = f"Liger {version('liger-kernel')} fails: {type(error).__name__}: {one_line(error)}"
    if reason is not None:
        for module, kind, attributes in before:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(attributes)
    return reason


def _last_hidden(model: "PreTrainedModel", ids: Tensor) -> Tensor:
    hidden: Tensor = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    return hidden  # (B, T, d)


def _difference(model: "PreTrainedModel", plain: Tensor, fused: Tensor) -> str | None:
    """How the fused model differs from the plain one by more than rounding, or None."""
    for module in (m for m in model.modules() if forward_maker(m) is given):
        activation = getattr(module, "act_fn", None) or getattr(module, "activation_fn", None)
        gelu = "GEGLU" in type(module).forward.__qualname__
        if activation is not None and not _same_activation(activation, gelu):
            return f"Liger's gated MLP has another activation than {type(activation).__name__}"
    error = float((fused.float() - plain.float()).norm() / plain.float().norm())
    tolerance = _TOLERANCE if plain.dtype == torch.float32 else _TOLERANCE_HALF
    if not error <= tolerance:
        return f"Liger's differ from the model's own computation by {error:.1%}"
    return None


def _same_activation(activation: Any, gelu: bool) -> bool:
    """Whether Liger's MLP, which knows two activations, has a module's own."""
    x = torch.linspace(-4, 4, 33)
    expected = F.gelu(x, approximate="tanh") if gelu else F.silu(x)
    return bool(torch.allclose(activation(x), expected, rtol=1e-5, atol=1e-6))


def _apply(model: "PreTrainedModel") -> None:
    """Has Liger change a model's norms and MLPs, and has its attention call Liger's rotary embedding."""
    from liger_kernel.transformers.rope import liger_rotary_pos_emb
    from transformers.integrations.liger import apply_liger_kernel

    modelling = sys.modules[type(model).__module__]
    with _restored(modelling):
        apply_liger_kernel(model, _LOSSES)
        names = tuple(name for name, value in vars(modelling).items() if value is liger_rotary_pos_emb)
    for module in model.modules():
        kind = type(module)
        if isinstance(forward := vars(module).get("forward"), MethodType):
            for name in [key for key, value in vars(module).items() if isinstance(value, MethodType)]:
                delattr(module, name)  # how it prints itself, too
            replace_forward(module, given, without_product(forward.__func__))
        elif kind.__module__ == modelling.__name__ and _rotating(kind, *names) is not kind.forward:
            replace_forward(module, _rotating, *names)


def _rotating(kind: Any, *names: str) -> Any:
    """The forward method of a class, calling Liger's rotary embedding under these names."""
    return _rebound(kind.forward, dict.fromkeys(names, _rotate), set())


def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *_: Any, **__: Any) -> tuple[Tensor, ...]:
    """Rotates queries (B, H, T, c) and keys (B, K, T, c)."""
    from liger_kernel.ops import LigerRopeFunction

    if len(q) == 1:
        rotated: tuple[Tensor, ...] = LigerRopeFunction.apply(q, k, cos, sin)
        return rotated
    # Liger compiles a kernel for every number of rows: here all rows are one.
    tables = _one_row(cos, sin, q.shape[0])
    joined = [x.transpose(1, 2).flatten(0, 1)[None].transpose(1, 2) for x in (q, k)]  # (1, H, B·T, c)
    rotated = LigerRopeFunction.apply(*joined, *tables)
    apart = [x.transpose(1, 2).reshape(len(q), -1, x.shape[1], x.shape[3]) for x in rotated]  # (B, T, H, c)
    return tuple(x.transpose(1, 2) for x in apart)


def _one_row(cos: Tensor, sin: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The tables, (1, T, c) or (B, T, c), for the rows one after another, (1, B·T, c).

    They are made once for all layers, which are given the same tables.
    """
    kept: tuple[Tensor, Tensor] | None = getattr(cos, _MARK, None)
    if kept is None or kept[0].shape[1] != rows * cos.shape[1]:
        width = cos.shape[-1]
        kept = cos.expand(rows, -1, -1).reshape(1, -1, width), sin.expand(rows, -1, -1).reshape(1, -1, width)
        setattr(cos, _MARK, kept)
    return kept


@contextmanager
def _restored(module: Any) -> Iterator[None]:
    """Puts back what is replaced in a Python module meanwhile."""
    before = dict(vars(module))
    try:
        yield
    finally:
        vars(module).update(before)


def _rebound(function: Any, names: dict[str, Any], seen: set[int]) -> Any:
    """A copy of a function, and of those that it wraps, that finds other functions under some global names.

    The function itself is returned where it uses none of the names.

    Args:
        function: The function; what is none is returned as it is.
        names: The functions to find, by name.
        seen: Ids of functions that are being copied: some refer to themselves.
    """
    if not isinstance(function, FunctionType) or id(function) in seen:
        return function
    contents = [cell.cell_contents for cell in function.__closure__ or ()]
    copied = [_rebound(content, names, seen | {id(function)}) for content in contents]
    uses = names.keys() & set(function.__code__.co_names)
    if not uses and all(new is old for new, old in zip(copied, contents, strict=True)):
        return function
    cells = tuple(CellType(content) for content in copied)
    space = {**function.__globals__, **names} if uses else function.__globals__
    copy = FunctionType(function.__code__, space, function.__name__, function.__defaults__, cells)
    copy.__kwdefaults__ = function.__kwdefaults__
    vars(copy).update(vars(function))
    return copy
