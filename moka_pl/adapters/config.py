"""The configuration of an adapter, and of MoKA."""

import json
import math
import sys
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from moka_pl.adapters.filters import (
    AUTO,
    DEFAULT_RANK,
    SERVABLE,
    check_rank,
    check_size,
    describe_filters,
    filter_shapes,
)
from moka_pl.adapters.patterns import compile_pattern
from moka_pl.adapters.schema import check_values, shown
from moka_pl.errors import ConfigError
from moka_pl.lm.architecture import QUERY_VALUE
from moka_pl.ops.dispatch import BACKENDS, Backend
from moka_pl.ops.gating import GATINGS, Gating
from moka_pl.ops.layout import Shape, exact_rank
from moka_pl.utils import expanded

Start = Literal["zero", "zero_left", "gradient"]


class AdapterConfig(ABC):
    """Base class of all adapter configurations, of this package and of PEFT.

    PEFT's configurations count as subclasses once PEFT is imported.
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
        components: Number r of Kronecker components per layer (not a rank); the number of parameters grows
            linearly with it. The paper uses 10.
        rank: Rank of each component with ``filters: servable``, the only filters that have this option;
            ``null`` is 16. A layer's components together are exactly a LoRA of rank components × rank, which
            may be at most 512. Squares (4, 16, 64, 256) take the parameters of rank 1.
        filters: Shapes of the factors. ``diverse`` cycles through five aspect ratios, ``square`` uses one
            shape, and ``prime`` is MoKA_s (identity left factors, about 20% fewer parameters). With
            ``servable`` every component is exactly a LoRA of rank ``rank`` (the family of CDKA, arXiv
            2602.01267). ``auto`` chooses each layer's shapes when a training run begins, from the gradient of
            the first rank's batches of the first 4 optimizer steps, and saves the choice. A list gives one
            shape for all components or one each: ``[m_a, n_a]``, ``[m_a, n_a, m_b, n_b]``, or
            ``[k, m_b, n_b]`` with an identity of size k on the left. A mapping of full layer names to lists,
            or a ``.json`` file of such a mapping, gives each layer its own list.
        gating: ``softmax`` trains one logit per component, α = softmax(g); the gates sum to 1. ``sigmoid``
            trains independent gates, α_i = (2/r) · sigmoid(g_i), each from 0 to 2/r. Both start at
            α_i = 1/r, and ``none`` keeps that value (the paper's ungated ablation).
        scaling: Factor s of the update. ``null`` is ``components``, which cancels the gates' 1/r so that
            common adapter learning rates (1e-3 to 4e-3) work; for ``filters: servable`` it is the square root
            of ``components``, with which the best rate stays the same from one component to four. ``1.0``
            follows the paper literally and, with ten components, needs about ten times higher rates.
        dropout: Dropout probability of the adapter's input features, at least 0 and below 1.
        target_modules: Layers to adapt: a list of name suffixes, a regular expression that matches whole
            names, or ``all-linear`` for every linear layer, including experts', except the output head. The
            head (``lm_head``) and embeddings (``embed_tokens``) are adapted only if you name them. The
            default is the paper's; in families with other names for queries and values, it means those
            (``query_key_value``, ``qkv_proj``, …). Few components on every layer learn more than many on two
            layers of each block.
        exclude_modules: Layers to leave out: a list of suffixes or a regular expression.
        ensure_weight_tying: If the output head shares the embedding's weight, adapt both as one weight with
            one update; naming either of them is enough. Otherwise each is adapted by itself, if it is named.
        trainable_token_indices: Numbers of the tokens whose rows of the embedding and the output head are
            trained, beside the adapters. ``backbone.new_tokens`` adds its tokens here; you can also list
            tokens that the base has, such as reserved ones.
        modules_to_save: Linear layers that are trained as a whole and stored with the adapter, by name
            suffixes, such as the head of a classifier.
        backend: How to compute the update. ``structured`` never forms an m × n matrix; ``dense`` forms one
            temporarily, which is faster for many tokens; ``thin`` uses two thin products, for components of
            small ranks; ``fused`` uses Triton kernels on a GPU; ``auto`` chooses.
        budget: For ``filters: auto``, total entries of the factors of all adapted layers; ``null`` is the
            total of ``diverse`` with as many components.
        start: How factors start; ΔW starts at 0 either way. ``zero``: random left factors (Kaiming-uniform)
            and zero right factors. ``zero_left``: zero left factors and random right ones. ``gradient``: left
            factors along the gradient of the first batches (the components of one shape take its best
            Kronecker products in order), scaled like random ones. ``start`` affects new training runs only: a
            resumed run, or one from ``adapter_path``, continues from what was saved. ``gradient`` does not
            work with ``prime``, whose left factors are all identities; ``zero_left`` works with no identity.
    """

    components: int = 10
    rank: int | None = field(default=None, kw_only=True)
    filters: str | list[list[int]] | dict[str, list[list[int]]] = "diverse"
    gating: Gating = "softmax"
    scaling: float | None = None
    dropout: float = 0.0
    target_modules: list[str] | str = field(default_factory=QUERY_VALUE.copy)
    exclude_modules: list[str] | str | None = None
    ensure_weight_tying: bool = field(default=False, kw_only=True)
    trainable_token_indices: list[int] | None = field(default=None, kw_only=True)
    backend: Backend = "auto"
    budget: int | None = None
    start: Start = "zero"
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        """Refuses invalid values before anything is loaded."""
        for option, names in (("gating", GATINGS), ("backend", BACKENDS), ("start", get_args(Start))):
            if (value := getattr(self, option)) not in names:
                raise ConfigError(f"unknown {option} {shown(value)}; choose one of {', '.join(names)}")
        check_values(type(self), {name: value for name, value in vars(self).items() if name != "filters"})
        self._check_rank()
        # A layer of any size reveals an unknown name or a malformed list; whether a listed filter fits
        # the real layers is checked once the model is loaded.
        if isinstance(self.filters, str) and self.filters.endswith(".json"):
            self.filters = _read_filters(expanded(self.filters))
        if isinstance(self.filters, dict):
            for name, filters in self.filters.items():
                try:
                    filter_shapes(filters, self.components, 1 << 30, 1 << 30)
                except ConfigError as error:
                    raise ConfigError(f"filters of layer {name}: {error}") from None
        else:
            size = 64 if self.filters == "prime" else 1 << 30
            known = "diverse" if self.filters == AUTO else self.filters
            filter_shapes(known, self.components, size, size, self.rank)
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout must be at least 0 and below 1, not {self.dropout}")
        if self.scaling is not None and not 0 < self.scaling < math.inf:
            raise ConfigError(f"scaling must be positive and finite, not {self.scaling}")
        if not self.target_modules:
            raise ConfigError("target_modules is empty; name at least one layer, or set all-linear")
        for pattern in (self.target_modules, self.exclude_modules):
            if isinstance(pattern, str):
                compile_pattern(pattern)
        self._check_start()
        tokens = self.trainable_token_indices
        if tokens is not None and (not tokens or min(tokens) < 0 or len(set(tokens)) < len(tokens)):
            raise ConfigError(
                f"trainable_token_indices is {shown(tokens)}; list numbers of tokens, from 0 on and each "
                "once, or leave it out"
            )

    def _check_rank(self) -> None:
        if self.filters == SERVABLE:
            self.rank = DEFAULT_RANK if self.rank is None else self.rank
            check_rank(self.rank, self.components)
        elif self.rank is not None:
            raise ConfigError(
                f"rank ({shown(self.rank)}) works only with filters: {SERVABLE}; set them instead of "
                f"{shown(describe_filters(self.filters))}, or remove rank"
            )

    def _check_start(self) -> None:
        if self.budget is not None and self.filters != AUTO:
            raise ConfigError(f"budget ({self.budget}) works only with filters: auto; remove it")
        if self.budget is not None and self.budget < 1:
            raise ConfigError(f"budget must be at least 1, not {self.budget}")
        if self.start == "zero":
            return
        listed = self.filters.values() if isinstance(self.filters, dict) else [self.filters]
        if self.filters == "prime":
            named = "filters: prime"
        elif self.start == "zero_left" and any(
            len(sizes) == 3 for filters in listed if not isinstance(filters, str) for sizes in filters
        ):
            named = "filters [k, m_b, n_b]"
        else:
            return
        raise ConfigError(
            f"start: {self.start} needs left factors, but those of {named} are identities; set start: zero"
        )

    @property
    def effective_scaling(self) -> float:
        """The applied factor s (:func:`applied_scaling`)."""
        return applied_scaling(self.scaling, self.filters, self.components)

    def exact_lora_rank(self, name: str, m: int, n: int) -> int:
        """Returns the rank R of the LoRA that a layer's update is exactly, whatever its factors are.

        ΔW = lora_B · lora_A with lora_A of R × n and lora_B of m × R entries; R is the sum of the components'
        ranks, and at most min(m, n).

        Args:
            name: The layer's full name.
            m: Its output features.
            n: Its input features.

        Raises:
            ConfigError: As :meth:`shapes_of`.
        """
        return exact_rank(self.shapes_of(name, m, n), m, n)

    def shapes_of(self, name: str, m: int, n: int) -> tuple[Shape, ...]:
        """Shapes of the r components of one layer.

        Args:
            name: The layer's full name.
            m: Its output features.
            n: Its input features.

        Raises:
            ConfigError: If the filters do not fit the layer, are listed by layer without it, or hold far more
                entries than the layer itself.
        """
        filters = self.filters
        if isinstance(filters, dict):
            if name not in filters:
                raise ConfigError(
                    f"filters lists {len(filters)} layers (first {next(iter(filters), 'none')}), but not "
                    f"{name or 'this layer'}; list every layer that target_modules adapts"
                )
            filters = filters[name]
        shapes = filter_shapes(filters, self.components, m, n, self.rank)
        check_size(shapes, m, n)
        return shapes

    def to_dict(self) -> dict[str, Any]:
        """Returns all options as plain JSON values."""
        return asdict(self)


def applied_scaling(scaling: float | None, filters: object, components: int) -> float:
    """Returns the factor s of an update.

    Args:
        scaling: The option; ``null`` is r, or √r for servable filters.
        filters: The filters.
        components: r.
    """
    if scaling is not None:
        return float(scaling)
    return math.sqrt(components) if filters == SERVABLE else float(components)


def _read_filters(file: Path) -> dict[str, list[list[int]]]:
    """Reads a mapping of layers to filters."""
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the filters file {file}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the filters file {file} is not JSON: {error}") from error
    if not isinstance(stored, dict) or not stored or not all(isinstance(v, list) for v in stored.values()):
        raise ConfigError(
            f"the filters file {file} is not a mapping of layer names to lists of filters; "
            "moka_pl.adapters.filter_search.choose_filters makes one"
        )
    return stored


# Named presets of MoKA; every option can still be changed.


@dataclass
class MokaUngated(MokaConfig):
    """MoKA without gates: every component has the weight 1/r (the paper's ablation)."""

    gating: Gating = "none"


@dataclass
class MokaS(MokaConfig):
    """MoKA_s: identity left factors and a prime size in every component, about 20% fewer parameters."""

    filters: str | list[list[int]] | dict[str, list[list[int]]] = "prime"


@dataclass
class MokaServable(MokaConfig):
    """One component in every linear layer: exactly a LoRA of rank 16, with about the parameters of rank 1."""

    components: int = 1
    rank: int | None = field(default=16, kw_only=True)
    filters: str | list[list[int]] | dict[str, list[list[int]]] = SERVABLE
    target_modules: list[str] | str = "all-linear"


@dataclass
class KronA(MokaConfig):
    """KronA: a single Kronecker product, no gate, scaling 1."""

    components: int = 1
    filters: str | list[list[int]] | dict[str, list[list[int]]] = "square"
    gating: Gating = "none"
    scaling: float | None = 1.0
