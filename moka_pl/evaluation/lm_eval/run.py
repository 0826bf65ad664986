"""Loads what is to be evaluated, and runs lm_eval on it."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from moka_pl import inference
from moka_pl.adapters import method_of, read_adapter
from moka_pl.backbone import BackboneConfig, fingerprint, load_backbone
from moka_pl.errors import ConfigError
from moka_pl.evaluation.lm_eval.results import versions, weights_fingerprint
from moka_pl.evaluation.lm_eval.tasks import Selection, silenced_lm_eval
from moka_pl.evaluation.memory import halved_until_it_fits
from moka_pl.prompts.rendering import check_template
from moka_pl.utils import expanded

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
        num_fewshot: Few-shot examples before each question; None uses each task's own number.
        limit: Most questions per task, the first ones; None takes all.
        batch_size: Sequences computed at once; half as many, from the beginning, where memory runs out.
        apply_chat_template: Put the tokenizer's chat template around the prompts.
        log_samples: Keep every question with the model's scores, in ``samples``.
        max_length: Most tokens of a sequence; None takes the model's own limit.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    if apply_chat_template and tokenizer.chat_template:
        check_template(tokenizer)
    # A cache of keys and values would be filled and thrown away with every batch; generating asks for it.
    model.config.use_cache = False

    def evaluate(size: int) -> Any:
        with silenced_lm_eval():
            wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size, max_length=max_length)
        return lm_eval.simple_evaluate(
            model=wrapped,
            tasks=selection.tasks,
            task_manager=selection.manager,
            num_fewshot=num_fewshot,
            limit=limit,
            batch_size=size,
            apply_chat_template=apply_chat_template,
            log_samples=log_samples,
        )

    return cast(dict[str, Any], halved_until_it_fits(batch_size, evaluate))


def check_chat_template(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuses a tokenizer without a chat template, or with one that does not come to an end.

    Raises:
        ConfigError: If there is none.
        DataError: If it takes too long, or too much memory.
    """
    if not tokenizer.chat_template:
        raise ConfigError(
            "--apply_chat_template is set, but the base model's tokenizer has no chat template; remove it"
        )
    check_template(tokenizer)


def load_described(
    adapter: Path | None,
    base: str | None,
    quantization: Any = None,
    before: "Callable[[PreTrainedTokenizerBase], None]" = lambda tokenizer: None,
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase", dict[str, Any]]:
    """Loads what is to be evaluated, and describes it for the results.

    Args:
        adapter: An adapter directory; None evaluates the base alone.
        base: Where the base lies; with an adapter, None is where the adapter says.
        quantization: How a base without an adapter is stored; None is ``nf4``.
        before: Is given the tokenizer before weights are loaded, to refuse what cannot work with it.

    Returns:
        The model, its tokenizer, and what the results say about both and about the libraries.
    """
    if adapter is None:
        config = BackboneConfig(str(base), quantization=quantization or "nf4")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        load = load_backbone if quantization else inference.load_base
        loaded = load(config, device, lambda unloaded: before(unloaded.tokenizer))
        config = loaded.config or config
        model, tokenizer = loaded.model, loaded.tokenizer
        described: dict[str, Any] = {"name": base, "revision": None, "options": config.options()}
        adapted = None
    else:
        info = read_adapter(adapter)
        model, tokenizer = inference.load_model(
            adapter, base=base, before=lambda preview: before(preview.tokenizer)
        )
        described = asdict(info.base) | ({"name": base, "revision": None} if base else {})
        del described["samples"]  # for loading only
        adapted = {
            "path": str(expanded(adapter).absolute()),
            "fingerprint": weights_fingerprint(adapter),
            "config": method_of(info.config).options(),
            "step": info.extra.get("step"),
            "prompt": info.extra.get("prompt"),
        }
    described |= {"fingerprint": fingerprint(model), "dtype": str(model.dtype).removeprefix("torch.")}
    return model, tokenizer, {"versions": versions(), "base": described, "adapter": adapted}
