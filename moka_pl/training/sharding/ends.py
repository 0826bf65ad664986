"""The embedding and the output head of a causal language model, as far as they can be sharded."""

from typing import Any, NamedTuple

from torch import nn

_GETTERS = ("get_input_embeddings", "get_output_embeddings", "get_decoder")


class Ends(NamedTuple):
    """What reads and writes the tokens of a model.

    Attributes:
        decoder: What turns tokens into the hidden states that the head reads; the head is no part of it.
        embedding: The frozen embedding; None where it stays whole.
        head: The frozen output head; None where it stays whole.
    """

    decoder: nn.Module
    embedding: nn.Embedding | None
    head: nn.Linear | None

    @property
    def tied(self) -> bool:
        """Whether both have one weight."""
        return self.embedding is not None and self.head is not None and _are_tied(self.embedding, self.head)


def find_ends(root: nn.Module) -> Ends | None:
    """Finds embedding and output head, beneath the adapters that they may have.

    What is trained, is no plain layer, or is not known to compute in or after a decoder stays whole.

    Args:
        root: A causal language model, or what has one inside.

    Returns:
        None where there is no such model, or both stay whole.
    """
    model: Any = next(
        (m for m in root.modules() if all(callable(getattr(m, n, None)) for n in _GETTERS)), None
    )
    decoder = None if model is None else model.get_decoder()
    if not isinstance(decoder, nn.Module) or decoder is model:
        return None
    first, last = _frozen(model.get_input_embeddings()), _frozen(model.get_output_embeddings())
    embedding = first if isinstance(first, nn.Embedding) else None
    inside = set(decoder.modules())
    head = last if isinstance(last, nn.Linear) and last not in inside else None
    if (embedding is None) != (head is None) and _are_tied(first, last):
        return None
    found = [layer for layer in (embedding, head) if layer is not None]
    weights = {id(layer.weight) for layer in found}
    others = (m for m in model.modules() if m not in found)
    if not found or any(id(p) in weights for m in others for p in m.parameters(recurse=False)):
        return None
    return Ends(decoder, embedding, head)


def _frozen(layer: Any) -> nn.Module | None:
    """The layer of the base beneath adapters; None if there is none, or it is trained."""
    while isinstance(inner := getattr(layer, "base_layer", None), nn.Module):
        layer = inner
    weight = getattr(layer, "weight", None)
    known = isinstance(layer, nn.Module) and isinstance(weight, nn.Parameter) and not weight.requires_grad
    return layer if known else None


def _are_tied(first: nn.Module | None, second: nn.Module | None) -> bool:
    weights = [getattr(layer, "weight", layer) for layer in (first, second)]
    return weights[0] is not None and weights[0] is weights[1]
