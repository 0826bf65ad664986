"""Known settings of MoKA by their names; every option can still be changed."""

from dataclasses import dataclass

from moka_pl.adapters.config import MokaConfig
from moka_pl.ops.gating import Gating


@dataclass
class MokaUngated(MokaConfig):
    """MoKA without gates: every component has the weight 1/r (the paper's ablation)."""

    gating: Gating = "none"


@dataclass
class MokaS(MokaConfig):
    """MoKA_s: identity left factors and a prime size in every component, about 20% fewer parameters."""

    filters: str | list[list[int]] | dict[str, list[list[int]]] = "prime"


@dataclass
class KronA(MokaConfig):
    """KronA: a single Kronecker product, no gate, scaling 1."""

    components: int = 1
    filters: str | list[list[int]] | dict[str, list[list[int]]] = "square"
    gating: Gating = "none"
    scaling: float | None = 1.0
