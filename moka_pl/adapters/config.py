"""The configuration of an adapter, and of MoKA."""

import json
import math
import sys
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from moka_pl.adapters.filters import AUTO, filter_shapes
from moka_pl.errors import ConfigError
from moka_pl.ops.dispatch import BACKENDS
from moka_pl.ops.gating import GATINGS, Gating
from moka_pl.ops.layout import Shape


class AdapterConfig(ABC):
    """What a configuration of any adapter is: one of this package's classes, or of PEFT's.

    PEFT's do not derive from it, but count as if they did, once PEFT is imported.
    """

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Returns all options as plain values."""

    @classmethod
    def __subclasshook__(cls, other: type) -> bool:
        peft = sys.modules.get("peft")
        counts = cls is AdapterConfig and peft is not None and issubclass(other, peft.PeftConfig)
        return True if counts else NotImplemented


@dataclass
class MokaConfig(AdapterConfig):
    """A gated mixture of Kronecker adapters: ``y = W x + scaling · Σ_i α_i (A_i ⊗ B_i) x``.

    Args:
        components: Number r of Kronecker components in a layer (not a rank). More components add parameters
            linearly; the paper uses 10.
        filters: Shapes of the factors: ``diverse`` (five aspect ratios in turn), ``square`` (one shape),
            ``prime`` (MoKA_s: identity left factors, about 20% fewer parameters), ``auto`` (chosen layer by
            layer when a training run begins, from the gradient of its first 4 optimizer steps' batches, the
            first rank's share of them; the choice is what the run then has and saves), or a list of
            ``[m_a, n_a]``, ``[m_a, n_a, m_b, n_b]`` or, with an identity of size k on the left,
            ``[k, m_b, n_b]``: one for all components or one each. A mapping gives every layer, by its full
            name, a list of its own; so does the path of a ``.json`` file of such a mapping.
        gating: ``softmax`` trains one logit a component, α = softmax(g): the gates share a sum of 1.
            ``sigmoid`` trains independent gates, α_i = (2/r) · sigmoid(g_i), each from 0 to 2/r. Both start
            at α_i = 1/r; ``none`` fixes that (the paper's ungated ablation).
        scaling: Factor s on the update. The default, ``null``, is ``components``: it undoes the gates'
            division by r, so that a usual adapter learning rate (1e-3 to 4e-3) works. ``1.0`` is the paper's
            letter and needs about ten times that.
        dropout: Probability of zeroing an input feature of the adapter in training, 0 to below 1.
        target_modules: Layers to adapt: a list of name suffixes, one regular expression over whole names, or
            ``all-linear`` for every linear layer but the output head. The default is the paper's; with few
            parameters, few components on every layer learn more than many on two of each block.
        exclude_modules: Layers to leave out: a list of suffixes or one regular expression.
        backend: How the update is computed: ``structured`` (never forms an m × n matrix), ``dense`` (forms
            one for a moment, cheaper for many tokens), ``fused`` (the same with Triton kernels, on a GPU) or
            ``auto``.
        budget: For ``filters: auto``, entries of all factors of all adapted layers together; ``null`` is what
            ``diverse`` takes with as many components.
        start: How factors start, ΔW being 0 in either case. ``zero``: left ones random (Kaiming-uniform),
            right ones at zero. ``gradient``: left ones along the same batches' gradient (among components of
            one shape the first takes the best Kronecker product's, the second the next one's, ...), as large
            as random ones. Only a training run that begins does that: a resumed one, or one from
            ``adapter_path``, goes on from what was saved. Identities stay what they are; ``prime``, which has
            no other left factors, refuses it.
    """

    components: int = 10
    filters: str | list[list[int]] | dict[str, list[list[int]]] = "diverse"
    gating: Gating = "softmax"
    scaling: float | None = None
    dropout: float = 0.0
    target_modules: list[str] | str = field(default_factory=lambda: ["q_proj", "v_proj"])
    exclude_modules: list[str] | str | None = None
    backend: Literal["auto", "structured", "dense", "fused"] = "auto"
    budget: int | None = None
    start: Literal["zero", "gradient"] = "zero"

    def __post_init__(self) -> None:
        """Refuses values that cannot work, before anything is loaded."""
        # The shapes of some layer tell an unknown name or a malformed list; whether a listed filter fits
        # into the real layers is checked when the model is there.
        if isinstance(self.filters, str) and self.filters.endswith(".json"):
            self.filters = _read_filters(Path(self.filters))
        if isinstance(self.filters, dict):
            for name, filters in self.filters.items():
                try:
                    filter_shapes(filters, self.components, 1 << 30, 1 << 30)
                except ConfigError as error:
                    raise ConfigError(f"filters of layer {name}: {error}") from None
        else:
            size = 64 if isinstance(self.filters, str) else 1 << 30
            known = "diverse" if self.filters == AUTO else self.filters
            filter_shapes(known, self.components, size, size)
        for option, names in (("gating", GATINGS), ("backend", BACKENDS), ("start", ("zero", "gradient"))):
            if (value := getattr(self, option)) not in names:
                raise ConfigError(f"unknown {option} {value!r}; choose one of {', '.join(names)}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout must be at least 0 and below 1, not {self.dropout}")
        if self.scaling is not None and not 0 < self.scaling < math.inf:
            raise ConfigError(f"scaling must be positive and finite, not {self.scaling}")
        if not self.target_modules:
            raise ConfigError("target_modules is empty; name at least one layer, or use all-linear")
        self._check_start()

    def _check_start(self) -> None:
        if self.budget is not None and self.filters != AUTO:
            raise ConfigError(f"budget ({self.budget}) works only with filters: auto; leave it out")
        if self.budget is not None and self.budget < 1:
            raise ConfigError(f"budget must be at least 1, not {self.budget}")
        if self.start == "gradient" and self.filters == "prime":
            raise ConfigError(
                "start: gradient sets left factors, but those of filters: prime are identities; "
                "set start: zero"
            )

    @property
    def effective_scaling(self) -> float:
        """The factor s that is applied: ``scaling``, or ``components`` where that is ``null``."""
        return float(self.components if self.scaling is None else self.scaling)

    def shapes_of(self, name: str, m: int, n: int) -> tuple[Shape, ...]:
        """Shapes of the r components of one layer.

        Args:
            name: The layer's full name.
            m: Its output features.
            n: Its input features.

        Raises:
            ConfigError: Where the filters do not fit into the layer, or are listed by layer without this one.
        """
        filters = self.filters
        if isinstance(filters, dict):
            if name not in filters:
                raise ConfigError(
                    f"filters lists {len(filters)} layers (first {next(iter(filters), 'none')}), but not "
                    f"{name or 'this one'}; list every layer that target_modules adapts"
                )
            filters = filters[name]
        return filter_shapes(filters, self.components, m, n)

    def to_dict(self) -> dict[str, Any]:
        """Returns all options as plain JSON values."""
        return asdict(self)


def _read_filters(file: Path) -> dict[str, list[list[int]]]:
    """Reads a mapping of layers to filters."""
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the filters file {file}: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"the filters file {file} is not JSON: {error}") from error
    if not isinstance(stored, dict) or not stored or not all(isinstance(v, list) for v in stored.values()):
        raise ConfigError(
            f"the filters file {file} is not a mapping of layer names to lists of filters; "
            "moka_pl.adapters.filter_search.choose_filters finds one"
        )
    return stored


# Known settings of MoKA by their names; every option can still be changed.


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
