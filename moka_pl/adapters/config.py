"""The configuration of a MoKA adapter."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from moka_pl.backends import BACKENDS
from moka_pl.errors import ConfigError
from moka_pl.filters import filter_shapes


@dataclass
class MokaConfig:
    """A gated mixture of Kronecker adapters: ``y = W x + scaling · Σ_i α_i (A_i ⊗ B_i) x``.

    Args:
        components: Number r of Kronecker components in a layer (not a rank). More components add parameters
            linearly; the paper uses 10.
        filters: Shapes of the factors: ``diverse`` (five aspect ratios in turn), ``square`` (one shape),
            ``prime`` (MoKA_s: identity left factors, about 20% fewer parameters), or a list of
            ``[m_a, n_a]`` or ``[m_a, n_a, m_b, n_b]``, one for all components or one each.
        gating: ``softmax`` trains one logit a component, α = softmax(g), starting uniform; ``none`` fixes
            α_i = 1/r (the paper's ungated ablation).
        scaling: Factor s on the update. The default, ``null``, is ``components``: it undoes the gates'
            division by r, so that a usual adapter learning rate (1e-3 to 4e-3) works. ``1.0`` is the paper's
            letter and needs about ten times that.
        dropout: Probability of zeroing an input feature of the adapter in training, 0 to below 1.
        target_modules: Layers to adapt: a list of name suffixes, one regular expression over whole names, or
            ``all-linear`` for every linear layer but the output head.
        exclude_modules: Layers to leave out: a list of suffixes or one regular expression.
        backend: How the update is computed: ``structured`` (never forms an m × n matrix), ``dense`` (forms
            one for a moment, cheaper for many tokens), ``fused`` (the same with Triton kernels, on a GPU) or
            ``auto``.
    """

    components: int = 10
    filters: str | list[list[int]] = "diverse"
    gating: Literal["softmax", "none"] = "softmax"
    scaling: float | None = None
    dropout: float = 0.0
    target_modules: list[str] | str = field(default_factory=lambda: ["q_proj", "v_proj"])
    exclude_modules: list[str] | str | None = None
    backend: Literal["auto", "structured", "dense", "fused"] = "auto"

    def __post_init__(self) -> None:
        """Refuses values that cannot work, before anything is loaded.

        Raises:
            ConfigError: Naming the option, its value and what it may be.
        """
        # The shapes of some layer tell an unknown name or a malformed list; whether a listed filter fits
        # into the real layers is checked when the model is there.
        size = 64 if isinstance(self.filters, str) else 1 << 30
        filter_shapes(self.filters, self.components, size, size)
        if self.gating not in ("softmax", "none"):
            raise ConfigError(f"unknown gating {self.gating!r}; choose softmax or none")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout must be at least 0 and below 1, not {self.dropout}")
        if self.scaling is not None and not 0 < self.scaling < math.inf:
            raise ConfigError(f"scaling must be positive and finite, not {self.scaling}")
        if self.backend not in BACKENDS:
            raise ConfigError(f"unknown backend {self.backend!r}; choose one of {', '.join(BACKENDS)}")
        if not self.target_modules:
            raise ConfigError("target_modules is empty; name at least one layer, or use all-linear")

    @property
    def effective_scaling(self) -> float:
        """The factor s that is applied: ``scaling``, or ``components`` where that is ``null``."""
        return float(self.components if self.scaling is None else self.scaling)

    def to_dict(self) -> dict[str, Any]:
        """All options as plain JSON values."""
        return asdict(self)
