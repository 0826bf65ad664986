"""A frozen linear layer with a gated mixture of Kronecker adapters beside it."""

import math

import torch
from torch import Tensor, nn

from moka_pl.adapters.base_weight import is_4bit, merged_linear
from moka_pl.adapters.config import MokaConfig
from moka_pl.filters import filter_shapes
from moka_pl.kronecker import delta_weight, kronecker_linear


class MokaLinear(nn.Module):
    """``y = W x + s · Σ_i α_i (A_i ⊗ B_i) x`` with W frozen and α = softmax(g).

    The left factors start Kaiming-uniform and the right ones at zero, so that ΔW = 0 exactly; the gate
    logits start at zero, so that α is uniform. Where the left factors are identities (MoKA_s) only the right
    ones exist.

    Args:
        base_layer: The frozen layer, ``nn.Linear`` or ``bitsandbytes.nn.Linear4bit``.
        config: The adapter's configuration.
        dtype: Dtype of factors and gates.
        name: Name of the layer, for messages.

    Attributes:
        moka_A: Left factors A_i, (m_a, n_a) each; empty for MoKA_s.
        moka_B: Right factors B_i, (m_b, n_b) each.
        moka_gate: Gate logits g, (r,), or None without gating.
        enabled: Whether the update is applied; without it the layer is the frozen base.

    Raises:
        ConfigError: Where a listed filter does not fit into the layer.
    """

    def __init__(
        self, base_layer: nn.Linear, config: MokaConfig, dtype: torch.dtype = torch.float32, name: str = ""
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.shapes = filter_shapes(config.filters, config.components, self.out_features, self.in_features)
        self.scaling = config.effective_scaling
        self.backend = config.backend
        self.dropout = nn.Dropout(config.dropout)
        self.enabled = True
        self.merged_layer: nn.Linear | None = None

        device = base_layer.weight.device
        left = [torch.empty(s.m_a, s.n_a, dtype=dtype, device=device) for s in self.shapes if not s.identity]
        right = [torch.empty(s.m_b, s.n_b, dtype=dtype, device=device) for s in self.shapes]
        self.moka_A = nn.ParameterList(map(nn.Parameter, left))
        self.moka_B = nn.ParameterList(map(nn.Parameter, right))
        self.moka_gate: nn.Parameter | None = None
        if config.gating == "softmax":
            self.moka_gate = nn.Parameter(torch.empty(config.components, dtype=dtype, device=device))
        self.reset_parameters()
        self.train(base_layer.training)  # a layer put into an evaluating model must not drop out

    def reset_parameters(self) -> None:
        """Puts factors and gates at their start: ΔW = 0, α uniform."""
        for factor in self.moka_A:
            nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
        for factor in self.moka_B:
            nn.init.zeros_(factor)
        if self.moka_gate is not None:
            nn.init.zeros_(self.moka_gate)

    @property
    def merged(self) -> bool:
        """Whether the update is folded into the weight."""
        return self.merged_layer is not None

    @property
    def components(self) -> int:
        """Number r of components."""
        return len(self.shapes)

    def gates(self) -> Tensor:
        """Returns α, shape (r,): softmax of the gate logits, or 1/r without gating."""
        if self.moka_gate is None:
            b = self.moka_B[0]
            return torch.full((self.components,), 1 / self.components, dtype=b.dtype, device=b.device)
        return self.moka_gate.softmax(0)

    def _factors(self) -> list[tuple[Tensor | None, Tensor]]:
        left = list(self.moka_A) or [None] * self.components
        return list(zip(left, self.moka_B, strict=True))

    def get_delta_weight(self) -> Tensor:
        """Returns ``ΔW = s · Σ_i α_i (A_i ⊗ B_i)``, shape (m, n), in the factors' dtype."""
        weights = self.gates() * self.scaling  # (r,)
        return delta_weight(weights, self._factors(), self.shapes, self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """Maps x of shape (..., n) to (..., m); the update is computed in the dtype of x (or of autocast)."""
        if self.merged_layer is not None and self.enabled:
            if is_4bit(self.base_layer):  # takes any input dtype and returns it; so must its dense copy
                return self.merged_layer(x.to(self.merged_layer.weight.dtype)).to(x.dtype)  # type: ignore[no-any-return]
            return self.merged_layer(x)  # type: ignore[no-any-return]
        result: Tensor = self.base_layer(x)  # (..., m)
        if not self.enabled:
            return result
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        update = kronecker_linear(
            self.dropout(x),
            self.gates() * self.scaling,
            self._factors(),
            self.shapes,
            self.out_features,
            self.backend,
        )  # (..., m)
        return result + update.to(result.dtype)

    @torch.no_grad()
    def merge(self) -> None:
        """Folds the update into a dense copy of the weight; the frozen layer itself is left as it is.

        A 4-bit weight is dequantised for it: the merged layer takes the memory of a dense one.
        """
        if self.merged_layer is None:
            self.merged_layer = merged_linear(self.base_layer, self.get_delta_weight())

    def unmerge(self) -> None:
        """Drops the merged copy: the frozen layer is again what it was, bit for bit."""
        self.merged_layer = None

    def extra_repr(self) -> str:
        """Sizes, components and gating for printing."""
        gating = "none" if self.moka_gate is None else "softmax"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"components={self.components}, gating={gating}, scaling={self.scaling:g}"
        )
