"""A frozen embedding with a gated mixture of Kronecker adapters, and an output head that shares it.

ΔW has the embedding's own sizes, tokens × features. An embedding and an output head whose frozen weights are
one (tied) may be adapted alone or each by itself, and the two then compute with different weights; with
``ensure_weight_tying`` they share one ΔW and stay tied.
"""

import copy
from typing import ClassVar

import torch
from torch import Tensor, nn

from moka_pl.adapters.config import MokaConfig
from moka_pl.adapters.layer import MokaLayer, MokaLinear
from moka_pl.backbone.quantization import merged_weight
from moka_pl.ops.kronecker import delta_rows


class MokaEmbedding(MokaLayer):
    """``y_t = W[t] + ΔW[t]`` of token t, with ``ΔW = s · Σ_i α_i (A_i ⊗ B_i)`` and W, V × d, frozen.

    Row t of a component is ``A[⌊t / m_b⌋] ⊗ B[t mod m_b]``: ΔW is not formed. An embedding that scales its
    rows, such as Gemma 3's, scales the update, too. Dropout is that of linear layers only, as in PEFT.

    Args:
        base_layer: The frozen embedding.
        config: The adapter's configuration.
        dtype: Dtype of factors and gates.
        name: Name of the layer, for messages.

    Raises:
        ConfigError: Where a listed filter does not fit into the layer.
    """

    base_layer: nn.Embedding
    merged_layer: nn.Embedding | None

    def __init__(
        self, base_layer: nn.Embedding, config: MokaConfig, dtype: torch.dtype = torch.float32, name: str = ""
    ) -> None:
        super().__init__(base_layer, weight_size(base_layer), config, dtype, name)

    @property
    def num_embeddings(self) -> int:
        """Tokens V."""
        return self.out_features

    @property
    def embedding_dim(self) -> int:
        """Features d of a token."""
        return self.in_features

    def forward(self, ids: Tensor) -> Tensor:
        """Maps tokens, (...), to (..., d)."""
        if self.enabled and self.merged_layer is not None:
            return self.merged_layer(ids)  # type: ignore[no-any-return]
        result: Tensor = self.base_layer(ids)  # (..., d)
        return result + self.update(ids).to(result.dtype) if self.enabled else result

    def update(self, ids: Tensor) -> Tensor:
        """Returns ΔW of tokens as the embedding scales it, (..., d), in the factors' dtype."""
        weights = self.gates() * self.scaling  # (r,)
        rows = delta_rows(ids, weights, self._left(), self.moka_B, self.shapes, self.in_features)
        return scaled_rows(self.base_layer, rows)

    @torch.no_grad()
    def merge(self) -> None:
        """Merges the update into a copy of the embedding; the frozen one is unchanged."""
        if self.merged_layer is None:
            weight = self.base_layer.weight  # (V, d)
            total = merged_weight(weight, self.get_delta_weight())
            self.merged_layer = copy.deepcopy(self.base_layer, {id(weight): total})  # of its own class


class MokaTiedHead(MokaLinear):
    """An output head on the weight of an adapted embedding, with the same ΔW.

    Args:
        base_layer: The frozen head.
        embedding: The adapted embedding.
        config: The adapter's configuration.
        name: Name of the embedding, for messages.
    """

    owns_factors: ClassVar[bool] = False

    def __init__(
        self, base_layer: nn.Linear, embedding: MokaEmbedding, config: MokaConfig, name: str = ""
    ) -> None:
        super().__init__(base_layer, config, name=name)
        self._embedding = (embedding,)  # in a tuple it is no part of this layer

    @property
    def moka_A(self) -> nn.Parameter | None:  # type: ignore[override]  # noqa: N802
        """The embedding's left factors."""
        return self._embedding[0].moka_A

    @property
    def moka_B(self) -> nn.Parameter:  # type: ignore[override]  # noqa: N802
        """The embedding's right factors."""
        return self._embedding[0].moka_B

    @property
    def moka_gate(self) -> nn.Parameter | None:  # type: ignore[override]
        """The embedding's gate logits."""
        return self._embedding[0].moka_gate

    @torch.no_grad()
    def merge(self) -> None:
        """Takes the weight of the merged embedding."""
        if self.merged_layer is None:
            (embedding,) = self._embedding
            embedding.merge()
            assert embedding.merged_layer is not None
            bias = self.base_layer.bias is not None
            self.merged_layer = nn.Linear(self.in_features, self.out_features, bias=bias, device="meta")
            self.merged_layer.weight = embedding.merged_layer.weight
            self.merged_layer.bias = self.base_layer.bias


def weight_size(layer: nn.Module) -> tuple[int, int]:
    """Returns m and n of the weight of a linear layer, or V and d of an embedding's."""
    if isinstance(layer, nn.Embedding):
        rows, features = layer.weight.shape
        return rows, features
    assert isinstance(layer, nn.Linear)
    return layer.out_features, layer.in_features


def scaled_rows(embedding: nn.Module, rows: Tensor) -> Tensor:
    """Scales rows, (..., d), as an embedding does its own (``embed_scale`` in transformers)."""
    scale = getattr(embedding, "embed_scale", None)
    if scale is None:
        return rows
    scale = torch.as_tensor(scale, device=rows.device).to(embedding.weight.dtype)  # type: ignore[arg-type]
    return rows * scale.to(rows.dtype)
