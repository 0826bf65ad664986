"""Log-likelihoods of the trained tokens of a batch."""

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from moka_pl.lm.causal import without_waiting
from moka_pl.lm.head_loss import IGNORE_INDEX as IGNORE_INDEX
from moka_pl.lm.head_loss import nll_at_head, token_nll
from moka_pl.lm.own_loss import has_plain_head, own_logits_at

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Tokens whose logits an evaluation computes at a time at most.
_PART = 4096


class TokenScores(NamedTuple):
    """Negative log-likelihoods of the predicted tokens of a batch, flat over rows.

    Attributes:
        nll: -log p(token | what stands before it), nats, shape (N,), float32.
        row: Row of the batch of each token, shape (N,).
    """

    nll: Tensor
    row: Tensor


class Predicted(NamedTuple):
    """The N tokens of a batch that have a label.

    Attributes:
        row: Rows of the positions that predict them, shape (N,).
        column: Columns of these, shape (N,).
        tokens: The tokens, shape (N,).
    """

    row: Tensor
    column: Tensor
    tokens: Tensor


def predicted(labels: Tensor) -> Predicted:
    """Finds the tokens that have a label; the first position of a row cannot be predicted.

    The labels, shape (B, T), had best lie on the CPU: a GPU would have to be waited for.
    """
    targets = labels[:, 1:]  # (B, T-1)
    row, column = (targets != IGNORE_INDEX).nonzero(as_tuple=True)  # (N,)
    return Predicted(row, column, targets[row, column])


def score_tokens(
    model: "PreTrainedModel", input_ids: Tensor, labels: Tensor | Predicted, **inputs: Any
) -> TokenScores:
    """Scores the N tokens that have a label (the first position of a row cannot be predicted).

    Sequences are padded on the right, where causal attention never looks, so no mask is passed; the output
    head runs over the labelled positions only.

    Args:
        model: A causal language model.
        input_ids: Token ids, shape (B, T).
        labels: The ids to predict at their own positions, -100 elsewhere, shape (B, T), or what ``predicted``
            has found of them.
        **inputs: What else the model is to be given (for packed rows what ``PackedAttention`` makes).
    """
    row, column, wanted = predicted(labels) if isinstance(labels, Tensor) else labels
    with nullcontext() if inputs else without_waiting(model):
        return TokenScores(nll_at(model, row, column, wanted, input_ids=input_ids, **inputs), row)


def nll_at(model: "PreTrainedModel", row: Tensor, column: Tensor, wanted: Tensor, **inputs: Any) -> Tensor:
    """Runs a model and returns -log p of tokens, nats, shape (N,), float32.

    The logits of all tokens, which can take gigabytes, are not held at a time where the model's logits are
    its head's.

    Args:
        model: A causal language model.
        row: Rows of the positions that predict the tokens, shape (N,).
        column: Their columns, shape (N,).
        wanted: The tokens; of ``IGNORE_INDEX`` the loss is 0, shape (N,).
        **inputs: What the model reads.
    """
    if not has_plain_head(model):
        return token_nll(own_logits_at(model, row, column, **inputs), wanted)
    hidden = _hidden_at(model, row, column, **inputs)  # (N, d)
    head = model.get_output_embeddings()
    if torch.is_grad_enabled():
        return nll_at_head(head, hidden, wanted)
    parts = zip(torch.split(hidden, _PART), torch.split(wanted, _PART), strict=True)
    return torch.cat([nll_at_head(head, part, ids) for part, ids in parts])


def logits_at(model: "PreTrainedModel", row: Tensor, column: Tensor, **inputs: Tensor) -> Tensor:
    """Runs a model and computes its logits, shape (N, V), at some positions only.

    Args:
        model: A causal language model.
        row: Rows of the positions, shape (N,).
        column: Their columns, shape (N,).
        **inputs: What the model reads.
    """
    if not has_plain_head(model):
        return own_logits_at(model, row, column, **inputs)
    logits: Tensor = model.get_output_embeddings()(_hidden_at(model, row, column, **inputs))
    return logits


def _hidden_at(model: "PreTrainedModel", row: Tensor, column: Tensor, **inputs: Tensor) -> Tensor:
    """The last hidden states at some positions, (N, d)."""
    hidden: Tensor = model.get_decoder()(**inputs, use_cache=False).last_hidden_state  # (B, T, d)
    return hidden[row, column]


def row_sums(scores: TokenScores, rows: int) -> Tensor:
    """Sums the scores of each row: -log p(completion | prompt), shape (rows,)."""
    return scores.nll.new_zeros(rows).index_add_(0, scores.row, scores.nll)
