"""Runs lm_eval on a model that is loaded already."""

from typing import TYPE_CHECKING, Any, cast

from moka_pl.evaluation.lm_eval.tasks import Selection, silenced_lm_eval

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def run_harness(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    selection: Selection,
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    apply_chat_template: bool = False,
    log_samples: bool = False,
    max_length: int | None = None,
) -> dict[str, Any]:
    """Scores a model, adapters left unmerged, on the selected tasks; progress goes to stderr.

    Args:
        model: A causal language model in evaluation mode.
        tokenizer: Its tokenizer.
        selection: The tasks.
        num_fewshot: Worked examples before every question; None takes each task's own number.
        limit: Most questions per task, the first ones; None takes all.
        batch_size: Sequences computed at once.
        apply_chat_template: Put the tokenizer's chat template around the prompts.
        log_samples: Keep every question with the model's scores, in ``samples``.
        max_length: Most tokens of a sequence; None takes the model's own limit.

    Returns:
        The results as lm_eval gives them.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    # A cache of keys and values would be filled and thrown away with every batch; generating asks for it.
    model.config.use_cache = False
    with silenced_lm_eval():
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length)
    results = lm_eval.simple_evaluate(
        model=wrapped,
        tasks=selection.tasks,
        task_manager=selection.manager,
        num_fewshot=num_fewshot,
        limit=limit,
        batch_size=batch_size,
        apply_chat_template=apply_chat_template,
        log_samples=log_samples,
    )
    return cast(dict[str, Any], results)
