"""A frozen linear layer with a gated mixture of Kronecker adapters.

::

                                y                                           (m)
                                ▲
                  ┌──────────── + ◄──────────── × s
                  │                             ▲
                  │                 ┌────────── Σ ──────────┐
                  │                 │                       │
                  │               × α_1         …         × α_r             α from the gate logits g (r)
                  │                 │                       │
        ┌─────────┴─────────┐ ┌─────┴─────┐           ┌─────┴─────┐
        │                   │ │           │           │           │
        │  W, frozen, m × n │ │ A_1 ⊗ B_1 │     …     │ A_r ⊗ B_r │         trained
        │  (4-bit or dense) │ │           │           │           │
        └─────────┬─────────┘ └─────┬─────┘           └─────┬─────┘
                  └─────────────────┴───────────┬───────────┘
                                                x                           (n)

One component is the matrix of m_a × n_a blocks, each the whole of B times an entry of A::

                     n_a blocks of n_b columns
                  ┌─────────┬─────────┬─────────┐
                  │ a_11 B  │ a_12 B  │ a_13 B  │                           A starts random, m_a × n_a
        A ⊗ B  =  ├─────────┼─────────┼─────────┤  m_a blocks of m_b rows
                  │ a_21 B  │ a_22 B  │ a_23 B  │                           B starts at 0,  m_b × n_b
                  └─────────┴─────────┴─────────┘

It should cover the layer: m_a m_b ≈ m and n_a n_b ≈ n (entries that stand out are cut, missing ones are 0). A
4096 × 4096 layer is covered by a 64 × 64 and a 64 × 64 factor: 8,192 entries for 16.8 million, at full rank.
Components differ in their block sizes (``filters``), so that each can express what the others cannot. With
``filters: prime`` (MoKA_s) A is the identity: blocks of one B along the diagonal. With ``filters: servable``
A is flat and B tall, a × n/b and m/a × b: A ⊗ B is exactly a LoRA of rank a·b (``MokaLinear.lora_factors``).
"""

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moka_pl.adapters.config import MokaConfig
from moka_pl.adapters.forward import ForwardPlan, is_decoding, merged_dtypes, merged_updates, plan_forward
from moka_pl.backbone.quantization import is_quantised_kind, keep_weights, merged_linear
from moka_pl.ops.dispatch import fixed_backend, resolve_backend
from moka_pl.ops.gating import Gating, gates_of
from moka_pl.ops.kronecker import delta_weight, kronecker_linear, lora_factors
from moka_pl.ops.layout import Pairs, exact_rank, left_sizes, right_sizes, unpack
from moka_pl.ops.merged_forward import DenseUpdates, MergedForward
from moka_pl.ops.operators import number_layer, operator_product
from moka_pl.ops.shared_input import call_sharing


class WrappedLayer(nn.Module, ABC):
    """A frozen layer with something trained beside it, in its place in the model.

    Args:
        base_layer: The frozen layer.

    Attributes:
        enabled: Whether what is trained counts; without it the layer is the frozen base.
        merged_layer: A plain layer of both; None if not merged.
    """

    #: Whether what is trained is the layer's own, and not another one's.
    owns_factors: ClassVar[bool] = True

    base_layer: Any
    merged_layer: Any

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.enabled = True
        self.merged_layer = None

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Gives the frozen layer its weight, which transformers' ``tie_weights`` sets again."""
        if name == "weight":
            self.base_layer.weight = param
        else:
            super().register_parameter(name, param)

    @property
    def weight(self) -> Tensor:
        """The frozen weight, or that of the merged layer: its dtype and device are what models ask for."""
        weight: Tensor = (self.base_layer if self.merged_layer is None else self.merged_layer).weight
        return weight

    @abstractmethod
    def merge(self) -> None:
        """Makes a plain layer of both; the frozen one is unchanged."""

    def unmerge(self) -> None:
        """Drops the merged layer, which restores the frozen one bit for bit."""
        self.merged_layer = None


class MokaLayer(WrappedLayer):
    """A frozen weight W, (m, n), with the update ``ΔW = s · Σ_i α_i (A_i ⊗ B_i)``, however it is computed.

    Of the gate logits g, α is ``softmax(g)``, or with ``gating: sigmoid`` ``α_i = (2/r) sigmoid(g_i)``;
    without gates α_i = 1/r.

    The left factors start Kaiming-uniform and the right ones at zero, or with ``start: zero_left`` the other
    way round, so that ΔW = 0 exactly; the gate logits start at zero, so that α is uniform. With left
    identities (MoKA_s), only right factors exist.

    Args:
        base_layer: The frozen layer.
        size: m and n, rows and columns of W.
        config: The adapter's configuration.
        dtype: Dtype of factors and gates.
        name: Name of the layer, for messages.

    Attributes:
        moka_A: All left factors A_i, (m_a, n_a) each, one after another as one vector; None for MoKA_s.
        moka_B: All right factors B_i, (m_b, n_b) each, likewise.
        moka_gate: Gate logits g, (r,), or None without gating.

    Raises:
        ConfigError: Where a listed filter does not fit into the layer.
    """

    moka_A: nn.Parameter | None  # noqa: N815
    moka_B: nn.Parameter  # noqa: N815
    moka_gate: nn.Parameter | None

    def __init__(
        self,
        base_layer: nn.Module,
        size: tuple[int, int],
        config: MokaConfig,
        dtype: torch.dtype = torch.float32,
        name: str = "",
    ) -> None:
        super().__init__(base_layer)
        self.out_features, self.in_features = size
        self.shapes = config.shapes_of(name, *size)
        self.scaling = config.effective_scaling
        self.start = config.start
        self.gating: Gating = config.gating
        self.backend = config.backend
        if self.owns_factors:
            self._make_factors(dtype)
        self.train(base_layer.training)  # a layer put into an evaluating model must not drop out

    def _make_factors(self, dtype: torch.dtype) -> None:
        device = self.base_layer.weight.device
        left, right = sum(left_sizes(self.shapes)), sum(right_sizes(self.shapes))
        gates = 0 if self.gating == "none" else self.components

        def vector(size: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(size, dtype=dtype, device=device))

        self.moka_A = vector(left) if left else None
        self.moka_B = vector(right)
        self.moka_gate = vector(gates) if gates else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises factors and gates: ΔW = 0, α uniform."""
        for left, right in self.factors():
            zero, random = (left, right) if self.start == "zero_left" and left is not None else (right, left)
            if random is not None:
                nn.init.kaiming_uniform_(random.detach(), a=math.sqrt(5))
            assert zero is not None
            nn.init.zeros_(zero.detach())
        if self.moka_gate is not None:
            nn.init.zeros_(self.moka_gate)

    @property
    def components(self) -> int:
        """Number r of components."""
        return len(self.shapes)

    def gates(self) -> Tensor:
        """Returns α, shape (r,)."""
        if self.moka_gate is None:
            return self.moka_B.new_full((self.components,), 1 / self.components)
        return gates_of(self.moka_gate, self.gating)

    def exact_lora_rank(self) -> int:
        """Returns the rank R of the LoRA that the update is exactly (:meth:`MokaConfig.exact_lora_rank`)."""
        return exact_rank(self.shapes, self.out_features, self.in_features)

    def factors(self) -> Pairs:
        """Returns the r pairs (A_i or None for an identity, B_i), views of the trained vectors."""
        return unpack(self.moka_A, self.moka_B, self.shapes)

    def tensors(self) -> dict[str, Tensor]:
        """Returns every trained tensor, detached, by its name on disk (``moka_A.i``, ``moka_B.i``, …)."""
        named = {} if self.moka_gate is None else {"moka_gate": self.moka_gate.detach()}
        for i, (a, b) in enumerate(self.factors()):
            named |= {} if a is None else {f"moka_A.{i}": a.detach()}
            named[f"moka_B.{i}"] = b.detach()
        return named

    def get_delta_weight(self) -> Tensor:
        """Returns ``ΔW = s · Σ_i α_i (A_i ⊗ B_i)``, shape (m, n), in the factors' dtype."""
        weights = self.gates() * self.scaling  # (r,)
        sizes = self.out_features, self.in_features
        return delta_weight(weights, self._left(), self.moka_B, self.shapes, *sizes)

    @torch.no_grad()
    def lora_factors(self) -> tuple[Tensor, Tensor]:
        """Returns the LoRA that the update is exactly: lora_A of (R, n) and lora_B of (m, R).

        ``lora_B @ lora_A`` is ΔW, with gates and scaling in lora_B; R is :meth:`exact_lora_rank`. PEFT's LoRA
        takes them with ``r`` = ``lora_alpha`` = R.
        """
        weights = self.gates() * self.scaling  # (r,)
        sizes = self.out_features, self.in_features
        return lora_factors(weights, self._left(), self.moka_B, self.shapes, *sizes)

    def _left(self) -> Tensor:
        return self.moka_B.new_empty(0) if self.moka_A is None else self.moka_A

    def extra_repr(self) -> str:
        """Returns sizes, components and gating for printing."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"components={self.components}, gating={self.gating}, scaling={self.scaling:g}"
        )


class MokaLinear(MokaLayer):
    """``y = W x + s · Σ_i α_i (A_i ⊗ B_i) x`` with W frozen (see :class:`MokaLayer`).

    Args:
        base_layer: The frozen layer, ``nn.Linear`` or ``bitsandbytes.nn.Linear4bit``.
        config: The adapter's configuration.
        dtype: Dtype of factors and gates.
        name: Name of the layer, for messages.

    Raises:
        ConfigError: Where a listed filter does not fit into the layer.
        BackboneError: Where the layer's weight is a tensor of torchao's own.
    """

    base_layer: nn.Linear
    merged_layer: nn.Linear | None

    def __init__(
        self, base_layer: nn.Linear, config: MokaConfig, dtype: torch.dtype = torch.float32, name: str = ""
    ) -> None:
        keep_weights(base_layer)
        super().__init__(base_layer, (base_layer.out_features, base_layer.in_features), config, dtype, name)
        self.dropout = nn.Dropout(config.dropout)
        self.dropout.train(self.training)
        self._number = number_layer(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Gives a copy a number of its own."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._number = number_layer(self)

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias, if there is one."""
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """Maps x of shape (..., n) to (..., m); the update is computed in the dtype of x (or of autocast)."""
        if not self.enabled:
            return self.base_layer(x)  # type: ignore[no-any-return]
        if self.merged_layer is not None:
            # A quantised layer takes any input dtype and returns it; so must its dense copy.
            if is_quantised_kind(type(self.base_layer)):
                return self.merged_layer(x.to(self.merged_layer.weight.dtype)).to(x.dtype)  # type: ignore[no-any-return]
            return self.merged_layer(x)  # type: ignore[no-any-return]
        if self.training and self.dropout.p > 0:  # the update's input is not the frozen layer's
            return self._separate_forward(x)
        if torch.compiler.is_compiling():
            return self._operator_forward(x)
        if is_decoding(self, x):
            return self._decode(x)
        plan = plan_forward(self, x)
        return self._separate_forward(x) if plan is None else self._merged_forward(x, plan)

    def _merged_forward(self, x: Tensor, plan: ForwardPlan) -> Tensor:
        """Returns ``(W + ΔW) x + bias``, (..., m)."""
        bias = self.base_layer.bias
        out = call_sharing(
            MergedForward,
            x.to(plan.compute),
            self.moka_gate,
            self._left(),
            self.moka_B,
            None if bias is None else bias.to(plan.compute),
            plan.updates,
            torch.is_grad_enabled(),
            keeps=True,
        )  # (T, m)
        return out.to(plan.result).view(*x.shape[:-1], self.out_features)  # (..., m)

    def _operator_forward(self, x: Tensor) -> Tensor:
        """Returns ``(W + ΔW) x + bias``, (..., m), by what a compiler need not look into."""
        m, dtype = self.out_features, self.moka_B.dtype
        backend = fixed_backend(self.backend, x, dtype, self.shapes, m)
        dtypes = merged_dtypes(self, x, backend, is_quantised_kind(type(self.base_layer)))
        if dtypes is None:
            return self._separate_forward(x)
        parts = self.moka_gate, self._left(), self.moka_B
        out = operator_product(x.to(dtypes[0]), *parts, self._number, self.shapes, m, self.backend)
        return out.to(dtypes[1])  # (..., m)

    def decode(self, x: Tensor) -> Tensor | None:
        """Computes x, (..., n), where this is generating on a GPU; else None."""
        return self._decode(x) if is_decoding(self, x) else None

    def updates_for(self, x: Tensor) -> tuple[DenseUpdates, Tensor | None]:
        """Returns what computes x, of the product's dtype, merged with W, and the bias in that dtype."""
        bias, dtype = self.base_layer.bias, self.moka_B.dtype
        backend = resolve_backend(self.backend, x, dtype, self.shapes, self.out_features)
        return merged_updates(self, x, x.dtype, backend), None if bias is None else bias.to(x.dtype)

    def _decode(self, x: Tensor) -> Tensor:
        """Returns ``W x + bias + ΔW x``, (..., m), for a few tokens on a GPU."""
        from moka_pl.ops.triton import add_decode_update_, layer_gates, make_plan

        result: Tensor = self.base_layer(x).contiguous()  # (..., m)
        plan = make_plan(self.shapes, self.out_features, self.in_features, x.device)
        add_decode_update_(
            plan,
            result.view(-1, self.out_features),
            x.reshape(-1, self.in_features).contiguous(),
            self._left(),
            self.moka_B,
            layer_gates(plan, self.moka_gate, self.scaling, self.gating),
        )
        return result

    def _separate_forward(self, x: Tensor) -> Tensor:
        """Returns ``W x + bias + ΔW x``, (..., m)."""
        result: Tensor = self.base_layer(x)  # (..., m)
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        update = kronecker_linear(
            self.dropout(x),
            self.gates() * self.scaling,
            self._left(),
            self.moka_B,
            self.shapes,
            self.out_features,
            self.backend,
        )  # (..., m)
        return result + update.to(result.dtype)

    @torch.no_grad()
    def merge(self) -> None:
        """Merges the update into a dense copy of the weight; the frozen layer is unchanged.

        A 4-bit weight is dequantised for it: the merged layer takes the memory of a dense one.
        """
        if self.merged_layer is None:
            self.merged_layer = merged_linear(self.base_layer, self.get_delta_weight())
