r"""Rows of an embedding and its output head that are trained as wholes, such as those of new tokens.

The frozen weight W, V × d, stays as it is. Tokens i of a list I have a row e_i of their own, in the place of
W's or, from V on, below them:

.. math::
    y_t = w_t, \qquad \mathrm{logit}_t(h) = w_t \cdot h + b_t, \qquad
    w_t = e_t \text{ if } t \in I, \text{ else } W_t

Where the head has the embedding's weight, it has its rows, too.
"""

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moka_pl.adapters.injection import vocabulary_ends
from moka_pl.adapters.layer import WrappedLayer
from moka_pl.adapters.vocabulary.embedding import scaled_rows
from moka_pl.backbone.quantization import is_quantised
from moka_pl.errors import AdapterError

#: What the rows are called in a layer, and on disk behind its name.
ROWS = "trainable_tokens"


class TokenRows(WrappedLayer):
    """What an embedding and an output head with trained rows have in common.

    Args:
        base_layer: The frozen layer, whose weight has a row for each token.
        indices: The tokens, k of them.

    Attributes:
        enabled: Whether the trained rows count; without them the tokens have the rows that they started with.
        indices: The tokens, ascending, (k,).
        start: The rows that they started with, (k, d).
    """

    indices: Tensor
    start: Tensor

    def __init__(self, base_layer: nn.Module, indices: Collection[int]) -> None:
        super().__init__(base_layer)
        weight: Any = base_layer.weight
        numbers = sorted(indices)
        self.inside = sum(number < len(weight) for number in numbers)
        self.register_buffer("indices", torch.tensor(numbers, device=weight.device), persistent=False)
        self.out_features = max(len(weight), numbers[-1] + 1)
        self.in_features = weight.shape[1]

    def _make_rows(self, dtype: torch.dtype) -> None:
        """Starts rows of W where they were, others at the mean of all."""
        with torch.no_grad():
            weight = self.base_layer.weight.detach()  # (V, d)
            old = weight[self.indices[: self.inside]].to(dtype)  # (in W, d)
            mean = weight.mean(0, dtype=torch.promote_types(weight.dtype, torch.float32)).to(dtype)  # (d,)
            rows = torch.cat([old, mean.expand(len(self.indices) - self.inside, -1)])  # (k, d)
        self.register_buffer("start", rows.clone(), persistent=False)
        self.trainable_tokens = nn.Parameter(rows)

    def rows(self) -> Tensor:
        """Returns the rows that count, (k, d)."""
        return self.trainable_tokens if self.enabled else self.start

    def _whole(self) -> nn.Parameter:
        """Returns all rows, (V', d), of W's dtype."""
        weight = self.base_layer.weight.detach()
        whole = weight.new_zeros(self.out_features, self.in_features)  # (V', d)
        whole[: len(weight)] = weight
        whole[self.indices] = self.trainable_tokens.detach().to(weight.dtype)
        return nn.Parameter(whole, requires_grad=False)

    def extra_repr(self) -> str:
        """Returns the numbers of rows for printing."""
        return f"{len(self.indices)} of {self.out_features} rows trained"


class TokenEmbedding(TokenRows):
    """An embedding with trained rows (see :mod:`moka_pl.adapters.vocabulary.token_rows`)."""

    def __init__(self, base_layer: nn.Embedding, indices: Collection[int], dtype: torch.dtype) -> None:
        super().__init__(base_layer, indices)
        self.frozen_vocabulary = len(base_layer.weight)
        self._make_rows(dtype)

    @property
    def num_embeddings(self) -> int:
        """Tokens V' that it takes."""
        return self.out_features

    @property
    def embedding_dim(self) -> int:
        """Features d of a token."""
        return int(self.in_features)

    def forward(self, ids: Tensor) -> Tensor:
        """Maps tokens, (...), to (..., d)."""
        if self.enabled and self.merged_layer is not None:
            return self.merged_layer(ids)  # type: ignore[no-any-return]
        slot = torch.searchsorted(self.indices, ids).clamp(max=len(self.indices) - 1)  # (...)
        own = self.indices[slot] == ids  # (...)
        result: Tensor = self.base_layer(ids.masked_fill(own, 0))  # (..., d)
        rows = scaled_rows(self.base_layer, F.embedding(slot, self.rows()))  # (..., d)
        return torch.where(own[..., None], rows.to(result.dtype), result)

    @torch.no_grad()
    def merge(self) -> None:
        """Makes a plain embedding of all rows, of the frozen one's class; that is unchanged."""
        if self.merged_layer is None:
            self.merged_layer = copy.deepcopy(self.base_layer, {id(self.base_layer.weight): self._whole()})
            self.merged_layer.num_embeddings = self.out_features


class TokenHead(TokenRows):
    """An output head with trained rows.

    Args:
        base_layer: The frozen head.
        indices: The tokens.
        dtype: Dtype of the rows.
        embedding: The embedding whose rows it has; None for rows of its own.
    """

    def __init__(
        self,
        base_layer: nn.Linear,
        indices: Collection[int],
        dtype: torch.dtype,
        embedding: TokenEmbedding | None = None,
    ) -> None:
        super().__init__(base_layer, indices)
        self._embedding = (embedding,)  # in a tuple it is no part of this layer
        if embedding is None:
            self._make_rows(dtype)

    @property
    def owns_factors(self) -> bool:  # type: ignore[override]
        """Whether the rows are its own, and not the embedding's."""
        return self._embedding[0] is None

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias, if there is one."""
        bias: Tensor | None = self.base_layer.bias
        return bias

    def rows(self) -> Tensor:
        """Returns the rows that count, (k, d)."""
        (embedding,) = self._embedding
        if embedding is None:
            return super().rows()
        return embedding.trainable_tokens if self.enabled else embedding.start

    def forward(self, hidden: Tensor) -> Tensor:
        """Maps hidden states, (..., d), to logits, (..., V')."""
        if self.enabled and self.merged_layer is not None:
            return self.merged_layer(hidden)  # type: ignore[no-any-return]
        logits: Tensor = self.base_layer(hidden)  # (..., V)
        own = F.linear(hidden, self.rows().to(hidden.dtype)).to(logits.dtype)  # (..., k)
        if self.inside:
            old, among = self.indices[: self.inside], own[..., : self.inside]
            among = among if self.bias is None else (among + self.bias[old]).to(logits.dtype)
            logits = logits.index_copy(-1, old, among)  # (..., V)
        return torch.cat([logits, own[..., self.inside :]], -1) if self.inside < own.shape[-1] else logits

    @torch.no_grad()
    def merge(self) -> None:
        """Makes a plain head of all rows; the frozen one is unchanged."""
        if self.merged_layer is not None:
            return
        (embedding,) = self._embedding
        if embedding is not None:
            embedding.merge()
        head = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        head.weight = self._whole() if embedding is None else embedding.merged_layer.weight
        if self.bias is not None:
            more = self.out_features - len(self.bias)
            head.bias = nn.Parameter(F.pad(self.bias.detach(), (0, more)), requires_grad=False)
        self.merged_layer = head


def token_rows(model: nn.Module) -> dict[str, TokenRows]:
    """Returns the layers with trained rows, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, TokenRows)}


def set_vocabulary(model: nn.Module, embedding: TokenEmbedding, size: int | None = None) -> None:
    """Has a model say how many tokens it has.

    Args:
        model: The model.
        embedding: Its embedding with trained rows, which keeps what the base said.
        size: The number; None is that of the rows, where these are more than before.
    """
    config: Any = model.config
    text = config.get_text_config()
    if size is None:
        embedding.frozen_vocabulary = text.vocab_size
        size = max(text.vocab_size, embedding.out_features)
    for holder in (config, text, model):
        if "vocab_size" in vars(holder):
            holder.vocab_size = size


def check_rows(model: nn.Module, indices: Sequence[int], adapted: Collection[str]) -> None:
    """Refuses rows that cannot be trained.

    Args:
        model: The model, without adapters.
        indices: The tokens.
        adapted: Names of the layers that are adapted otherwise.

    Raises:
        AdapterError: If rows between V and the last would be missing, or the embedding or the output head is
            adapted otherwise, too, or no plain layer.
    """
    ends = vocabulary_ends(model)
    for (name, layer), kind in zip(ends.items(), (nn.Embedding, nn.Linear), strict=False):
        if not isinstance(layer, kind) or is_quantised(layer):
            raise AdapterError(
                f"trainable_token_indices trains rows of {name}, which is a {type(layer).__name__}; leave it "
                "out"
            )
    rows = min(len(cast(Tensor, layer.weight)) for layer in ends.values())
    if both := sorted(set(adapted) & set(ends)):
        raise AdapterError(
            f"target_modules adapts {both[0]}, of which new tokens or trainable_token_indices train rows as "
            "wholes; leave one of both out"
        )
    new = sorted(number for number in indices if number >= rows)
    gap = next((rows + place for place, number in enumerate(new) if number != rows + place), None)
    if gap is not None:
        raise AdapterError(
            f"trainable_token_indices has {max(indices)}, but the embedding has rows 0 to {rows - 1}, and "
            f"row {gap} would be missing; add tokens one after another"
        )


@torch.no_grad()
def start_rows(model: nn.Module, pieces: Mapping[int, Sequence[int]], trained: bool = True) -> None:
    """Starts rows of tokens at the mean of the rows of other ones, such as the pieces they fell into before.

    Args:
        model: A model with trained rows; one without is left as it is.
        pieces: Those tokens, by the new one.
        trained: Whether the rows are to be trained from there; else only the frozen base has them.
    """
    for layer in model.modules():
        if not isinstance(layer, TokenRows) or not layer.owns_factors:
            continue
        weight = layer.base_layer.weight.detach()
        for slot, number in enumerate(layer.indices.tolist()):
            if known := pieces.get(number):
                layer.start[slot] = weight[list(known)].to(layer.start.dtype).mean(0)
                if trained:
                    layer.trainable_tokens[slot] = layer.start[slot]
