"""Whether the package's loss of a model is the model's own: a few tokens are scored both ways.

Between decoder and output head, and after the head, architectures differ: scales, caps, further layers. A
model whose logits are the head's of the decoder's last hidden states can be scored without its own forward;
of all others the model itself computes the logits, its head seeing the wanted positions only.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Where a model remembers whether its logits are its head's.
_MARK = "_moka_plain_head"
_ROWS, _TOKENS, _PADDING = 2, 8, 3


class OwnForward(NamedTuple):
    """What a model's own forward says of a few tokens, whose rows differ in their padding only.

    Attributes:
        ids: The tokens, padded with other ones, shape (B, T).
        labels: The tokens, -100 at the padding, shape (B, T).
        loss: The model's own loss of them; None if it computes none.
    """

    ids: Tensor
    labels: Tensor
    loss: float | None


def has_plain_head(model: "PreTrainedModel") -> bool:
    """Whether the model's logits are known to be its head's of its decoder's last hidden states."""
    return getattr(model, _MARK, None) is True


def has_own_logits(model: "PreTrainedModel") -> bool:
    """Whether the model's logits are known to be something else than that."""
    return getattr(model, _MARK, None) is False


@torch.no_grad()
def run_own_forward(model: "PreTrainedModel") -> OwnForward:
    """Scores a few tokens as transformers does; the random generators stay as they are."""
    device = model.get_input_embeddings().weight.device
    ids = few_tokens(model).to(device)
    labels = ids.clone()
    labels[:, _TOKENS:] = -100
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        loss = _run(model, None, input_ids=ids, labels=labels).loss
    return OwnForward(ids, labels, None if loss is None else float(loss))


def own_logits_at(model: "PreTrainedModel", row: Tensor, column: Tensor, **inputs: Any) -> Tensor:
    """Runs a model's own forward, with an output head that sees some positions only.

    Args:
        model: A causal language model.
        row: Rows of the positions, shape (N,).
        column: Their columns, shape (N,).
        **inputs: What the model reads.

    Returns:
        The logits of those positions, shape (N, V).
    """
    logits: Tensor = _run(model, (row, column), **inputs).logits
    return logits


def _run(model: "PreTrainedModel", positions: tuple[Tensor, Tensor] | None, **inputs: Any) -> Any:
    """Runs the model, and remembers of a new one whether its head is plain."""
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    seen: dict[str, Any] = {}

    def after_decoder(module: nn.Module, args: Any, out: Any) -> None:
        seen["decoded"] = getattr(out, "last_hidden_state", None)

    def before_head(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        seen["given"] = args[0]
        return args if positions is None else (args[0][positions], *args[1:])

    def after_head(module: nn.Module, args: Any, out: Any) -> None:
        seen["scored"] = out

    handles = [head.register_forward_pre_hook(before_head), head.register_forward_hook(after_head)]
    if decoder is not model:
        handles.append(decoder.register_forward_hook(after_decoder))
    try:
        out = model(**inputs, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if not hasattr(model, _MARK):
        plain = _same(seen.get("decoded"), seen.get("given")) and _same(seen.get("scored"), out.logits)
        setattr(model, _MARK, plain)
    return out


def _same(first: Any, second: Any) -> bool:
    """Whether both are one tensor's numbers, bit for bit but for their dtype."""
    tensors = isinstance(first, Tensor) and isinstance(second, Tensor)
    return tensors and first.shape == second.shape and torch.equal(first.float(), second.float())


def few_tokens(model: "PreTrainedModel") -> Tensor:
    """Returns rows that begin alike and end differently, without tokens of a special meaning, (B, T)."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    special = _special_ids(model.config.to_dict())
    wanted = _TOKENS + _ROWS * _PADDING
    spread = [i * vocabulary // (4 * wanted) for i in range(4 * wanted)]
    usual = [i for i in dict.fromkeys(spread) if i not in special] or [0]
    # Neither in order nor evenly spaced, as far as the vocabulary allows.
    tokens = torch.tensor([usual[(7 * i + i * i) % len(usual)] for i in range(wanted)])
    start, ends = tokens[:_TOKENS], tokens[_TOKENS:].view(_ROWS, _PADDING)
    return torch.cat([start.expand(_ROWS, -1), ends], dim=1)


def _special_ids(config: dict[str, Any]) -> set[int]:
    """All ids that a configuration, or one inside it, gives a meaning of its own."""
    found: set[int] = set()
    for key, value in config.items():
        if isinstance(value, dict):
            found |= _special_ids(value)
        elif str(key).endswith(("_token_id", "_token_index", "_token_ids")):
            found |= {i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)}
    return found
