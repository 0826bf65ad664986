"""Scores options whose common prompt is computed once, where the model can do that."""

from typing import TYPE_CHECKING

import torch
from lightning.fabric.utilities import move_data_to_device

from moka_pl._compat import attention_implementation
from moka_pl.data.batching.collate import share_prompts
from moka_pl.data.types import SharedPrompts
from moka_pl.evaluation.memory import is_out_of_memory
from moka_pl.lm.architecture import decoder_inputs, sliding_window
from moka_pl.lm.attention import VARLEN, block_mask
from moka_pl.lm.scoring import IGNORE_INDEX, TokenScores, logits_at, row_sums, score_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTIONS = ("sdpa", "eager", VARLEN)
"""The attention implementations that support arbitrary masks."""


def score_shared(model: "PreTrainedModel", shared: SharedPrompts) -> TokenScores:
    """Scores the tokens of options that stand behind their prompt in one row.

    Every option sees the prompt and itself, and its positions go on from the prompt's end, so that each token
    gets the score that it has in a row of its own. The model must be one for which ``can_share`` is true;
    ``row`` of the N scores is the option's number in the batch.
    """
    inputs = {"input_ids": shared["input_ids"]}
    if "segments" in shared:
        inputs["position_ids"] = shared["position_ids"]
        inputs["attention_mask"] = block_mask(model, shared["segments"])
    logits = logits_at(model, shared["predictor_row"], shared["predictor_column"], **inputs).float()  # (P, V)
    # The first tokens of all options have one predictor in common: the normaliser is computed once.
    predictor, target = shared["predictor"], shared["target"]
    nll = logits.logsumexp(-1)[predictor] - logits[predictor, target]  # (N,)
    return TokenScores(nll, shared["option"])


def select_items(shared: SharedPrompts, items: slice) -> SharedPrompts:
    """Returns some items of a batch, whose options keep their numbers in all of it."""
    if items.start == 0 and items.stop == len(shared["input_ids"]):
        return shared
    rows = shared["predictor_row"]
    kept = (rows >= items.start) & (rows < items.stop)  # (P,)
    number = kept.cumsum(0) - 1  # of each kept position among those that are kept
    scored = kept[shared["predictor"]]  # (N,)
    selected = SharedPrompts(
        input_ids=shared["input_ids"][items],
        position_ids=shared["position_ids"][items],
        predictor_row=rows[kept] - items.start,
        predictor_column=shared["predictor_column"][kept],
        predictor=number[shared["predictor"][scored]],
        target=shared["target"][scored],
        option=shared["option"][scored],
    )
    if "segments" in shared:
        selected["segments"] = shared["segments"][items]
    return selected


@torch.no_grad()
def can_share(model: "PreTrainedModel") -> bool:
    """Whether options of one row get the scores that they have in rows of their own.

    A model must take position ids and a mask of any pattern; those that read positions off the order of the
    tokens, or carry a state along them, cannot. As that is hard to tell from a configuration, a few tokens
    are scored both ways.
    """
    if attention_implementation(model) not in ATTENTIONS:
        return False
    if not {"position_ids", "attention_mask"} <= decoder_inputs(model):
        return False
    prompt, options = [9, 4, 21, 12, 6, 30], [[7, 11, 13], [17, 5, 29], [3, 19, 2]]
    rows = share_prompts([{"prompt_ids": prompt, "option_ids": options}], [False], pad_id=0)
    shared = move_data_to_device(rows, model.device)
    ids = torch.tensor([prompt + option for option in options], device=model.device)  # (3, 9)
    labels = ids.clone()
    labels[:, : len(prompt)] = IGNORE_INDEX
    try:
        alone = row_sums(score_tokens(model, ids, labels), len(options))
        together = row_sums(score_shared(model, shared), len(options))
    except (TypeError, ValueError, RuntimeError) as error:
        if is_out_of_memory(error):  # which tells nothing of the model
            raise
        return False
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.5
    return bool((alone - together).abs().max() < tolerance)


def fits_window(model: "PreTrainedModel", longest: int) -> bool:
    """Whether rows of ``longest`` tokens fit into the model's sliding window, which a mask would replace."""
    window = sliding_window(model)
    return window is None or longest <= window
