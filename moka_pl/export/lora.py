"""An adapter as a LoRA: exact where the rank allows it, else truncated by singular values.

``A ⊗ B = (A ⊗ I)(I ⊗ B)`` is a LoRA of rank ``min(n_a m_b, m_a n_b)``, or of ``rank(A) rank(B)`` where a
factor has a lower rank of its own. Components lie side by side; gates and scaling are in lora_B.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moka_pl.adapters.layer import MokaLayer
from moka_pl.adapters.vocabulary.embedding import scaled_rows
from moka_pl.errors import ConfigError

#: What is left to do with a LoRA of too high a rank.
_MERGED = "export the merged model (--to merged, or --to gguf --gguf_type q8_0)"


@dataclass(frozen=True)
class LoraForm:
    """One LoRA for all layers, of one rank r.

    Attributes:
        rank: r.
        needed: The rank at which it is exact.
        factors: lora_A, shape (r, n), and lora_B, shape (m, r), by the layer's name; float32, on the CPU.
        lost: Share of ``‖ΔW‖²`` that truncation took from each layer; empty if the LoRA is exact.
    """

    rank: int
    needed: int
    factors: dict[str, tuple[Tensor, Tensor]]
    lost: dict[str, float]

    def size(self, dtype: torch.dtype) -> int:
        """Returns the bytes of the factors in a dtype."""
        return sum(a.numel() + b.numel() for a, b in self.factors.values()) * dtype.itemsize

    def rounded(self, dtype: torch.dtype) -> "LoraForm":
        """Returns the same with factors as a dtype holds them."""
        factors = {name: (a.to(dtype).float(), b.to(dtype).float()) for name, (a, b) in self.factors.items()}
        return replace(self, factors=factors)

    def negative(self) -> "LoraForm":
        """Returns the LoRA of the opposite update."""
        factors = {name: (lora_a, -lora_b) for name, (lora_a, lora_b) in self.factors.items()}
        return replace(self, factors=factors)


def needed_rank(layer: MokaLayer) -> int:
    """Returns the rank of the LoRA that a layer's update is exactly, at least 1."""
    ranks = 0
    for (a, b), shape in zip(layer.factors(), layer.shapes, strict=True):
        ranks += (shape.m_a if a is None else _rank(a)) * _rank(b)
    return max(1, min(ranks, layer.exact_lora_rank()))


def stored_rank(state: Mapping[str, Tensor], most: int | None) -> int | None:
    """Returns the largest rank that a layer of a saved adapter needs; None where only its base tells.

    Args:
        state: The adapter's tensors by name.
        most: Largest rank by the shapes alone, as stored with the adapter.
    """
    ranks: dict[str, int] = {}
    for name, b in state.items():
        layer, found, number = name.partition(".moka_B.")
        if not found:
            continue
        a = state.get(f"{layer}.moka_A.{number}")
        if a is None or most is None:
            return most
        ranks[layer] = ranks.get(layer, 0) + _rank(a) * _rank(b)
    return min(max(ranks.values(), default=0), most) if most is not None else None


def _rank(factor: Tensor) -> int:
    return int(torch.linalg.matrix_rank(factor.detach().float()))


def check_rank(needed: int, rank: int | None, energy: float | None, max_rank: int) -> None:
    """Refuses ranks that do not go together.

    Args:
        needed: The rank at which the LoRA is exact.
        rank: The rank to truncate to; None for none.
        energy: The share of ``‖ΔW‖²`` to keep; None for no truncation by it.
        max_rank: Largest rank that the reader takes.

    Raises:
        ConfigError: Naming the rank and what to do instead.
    """
    if rank is not None and not 1 <= rank <= needed:
        raise ConfigError(f"--rank must be from 1 to {needed}, the rank that this adapter needs, not {rank}")
    asked = rank if rank is not None else needed
    if asked > max_rank and energy is None:
        raise ConfigError(
            f"this adapter is a LoRA of rank {asked}, above --max_rank {max_rank}; truncate it by --rank "
            f"{max_rank} or --energy 0.99, raise --max_rank if the reader takes it, or {_MERGED}"
        )


def truncated(lora_a: Tensor, lora_b: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the best LoRA of a rank k for ``ΔW = lora_B lora_A``: factors (k, n), (m, k), singular values.

    With ``lora_Aᵀ = Q_A R_A`` and ``lora_B = Q_B R_B``, the singular values of ΔW are those of the small
    ``R_B R_Aᵀ``. Where R is near m or n, ΔW itself is decomposed. Eckart and Young: no other matrix of rank
    k is nearer in the Frobenius norm.

    Args:
        lora_a: lora_A, shape (R, n).
        lora_b: lora_B, shape (m, R).
        rank: Largest k; it is lower where there are fewer singular values.
    """
    r, n, m = *lora_a.shape, len(lora_b)
    if 2 * r > min(m, n):
        u, s, vh = torch.linalg.svd(lora_b @ lora_a, full_matrices=False)  # (m, p), (p), (p, n)
    else:
        (q_a, r_a), (q_b, r_b) = (
            torch.linalg.qr(lora_a.T),
            torch.linalg.qr(lora_b),
        )  # (n, R), (R, R); (m, R), …
        u, s, vh = torch.linalg.svd(r_b @ r_a.T)  # (R, R), (R), (R, R)
        u, vh = q_b @ u, vh @ q_a.T  # (m, R), (R, n)
    root = s[:rank].sqrt()  # (k)
    return root[:, None] * vh[:rank], u[:, :rank] * root, s


@torch.no_grad()
def lora_form(
    layers: Mapping[str, MokaLayer],
    rank: int | None = None,
    energy: float | None = None,
    max_rank: int = 512,
) -> LoraForm:
    """Writes the updates of layers as one LoRA of one rank.

    Without ``rank`` and ``energy`` it is exact. Layers that need less are padded by zeros; truncated,
    every layer keeps the whole rank, since readers store and compute it anyway.

    Args:
        layers: The adapted layers by name.
        rank: Rank to truncate to.
        energy: Share of ``‖ΔW‖²`` that every layer is to keep; the lowest rank with that is taken.
        max_rank: Largest rank that the reader takes.

    Raises:
        ConfigError: If the rank is below 1, above the needed one or above ``max_rank``.
    """
    ranks = {name: needed_rank(layer) for name, layer in layers.items()}
    needed = max(ranks.values())
    check_rank(needed, rank, energy, max_rank)
    most = min(needed, max_rank if rank is None else rank)
    factors, values = {}, {}
    for name, layer in layers.items():
        lora_a, lora_b = (tensor.float() for tensor in layer.lora_factors())  # (R, n), (m, R)
        if len(lora_a) > (most if energy is None else 0):
            lora_a, lora_b, values[name] = truncated(lora_a, lora_b, most)
        factors[name] = lora_a.cpu(), lora_b.cpu()
    final = most if energy is None else _rank_for(energy, values, max_rank)
    lost = {}
    if final < needed:
        lost = {name: _lost(values[name], final) if name in values else 0.0 for name in layers}
    return LoraForm(final, needed, {name: _resized(*pair, final) for name, pair in factors.items()}, lost)


def _lost(values: Tensor, rank: int) -> float:
    squares = values.double().square()
    return float(squares[rank:].sum() / squares.sum().clamp_min(torch.finfo(torch.double).tiny))


def _rank_for(energy: float, values: Mapping[str, Tensor], max_rank: int) -> int:
    """The lowest rank with which every layer keeps the energy."""
    rank = 1
    for spectrum in values.values():
        while rank < len(spectrum) and _lost(spectrum, rank) > 1 - energy:
            rank += 1
    if rank > max_rank:
        raise ConfigError(
            f"--energy {energy:g} needs rank {rank}, above --max_rank {max_rank}; lower --energy, raise "
            f"--max_rank if the reader takes it, or {_MERGED}"
        )
    return rank


def _resized(lora_a: Tensor, lora_b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Cuts factors to a rank, or pads them by zeros: (r, n), (m, r)."""
    more = max(0, rank - len(lora_a))
    return F.pad(lora_a[:rank], (0, 0, 0, more)), F.pad(lora_b[:, :rank], (0, more))


@contextmanager
def lora_applied(model: nn.Module, form: LoraForm) -> Iterator[None]:
    """Adds a LoRA to the layers of a frozen or an adapted model within the block."""

    def hook_of(lora_a: Tensor, lora_b: Tensor) -> Any:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            frozen = getattr(layer, "base_layer", layer)
            if isinstance(frozen, nn.Embedding):
                rows = F.embedding(inputs[0], lora_b) @ lora_a  # (..., d)
                return output + scaled_rows(frozen, rows).to(output.dtype)
            x = inputs[0].to(lora_a.dtype)  # (..., n)
            return output + F.linear(F.linear(x, lora_a), lora_b).to(output.dtype)  # (..., m)

        return hook

    handles = []
    for name, (lora_a, lora_b) in form.factors.items():
        layer = model.get_submodule(name)
        device = next(layer.parameters()).device
        handles.append(layer.register_forward_hook(hook_of(lora_a.to(device), lora_b.to(device))))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
