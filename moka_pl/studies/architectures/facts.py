"""What works with a family: each fact is computed twice, by the package and in the plain way."""

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moka_pl.adapters import (
    BaseModel,
    MokaConfig,
    inject_adapter,
    merge,
    moka_layers,
    save_adapter,
    unload,
    unmerge,
)
from moka_pl.adapters.coverage import adapted_share
from moka_pl.adapters.injection import vocabulary_ends
from moka_pl.backbone import Backbone, BackboneConfig, load_backbone
from moka_pl.backbone.linear_layers import quantised_share
from moka_pl.data.batching.collate import collate_packs, share_prompts
from moka_pl.errors import MokaError
from moka_pl.evaluation.shared_prompt import can_share, score_shared
from moka_pl.export.run import Request, run_lora, run_merged
from moka_pl.inference.generation import GREEDY, complete
from moka_pl.lm.attention import PackedAttention
from moka_pl.lm.checkpointing import checkpoint_layers
from moka_pl.lm.scoring import IGNORE_INDEX, row_sums, score_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: What a fact that holds is called.
YES = "yes"
#: How the reason begins for which something is refused.
REFUSED = "refused"
_RELATIVE, _ABSOLUTE = 2e-3, 2e-4
#: Tokens of the byte tokenizer that are no bytes.
_SPECIAL = [0, 1, 2, 3]
_SEED, _NEW_TOKENS = 3, 6


class WrongError(MokaError):
    """Two computations of the same differ."""


@dataclass(frozen=True)
class Facts:
    """What works with a family. What is not refused was compared with its plain computation.

    Attributes:
        defaults: The layers that are adapted where nothing is said, by the last parts of their names.
        share: Share of the linear weights that ``all-linear`` adapts.
        nf4: Share of the linear weights that NF4 stores.
        packing: Whether packed examples stay apart; else refused.
        shared: Whether options of a question share its prompt; else each is computed whole.
        merged: Whether transformers alone reads the merged export.
        lora: Whether PEFT reads the LoRA export.
    """

    defaults: str
    share: float
    nf4: float
    packing: str
    shared: str
    merged: str
    lora: str


def family_facts(folder: Path) -> Facts:
    """Finds out all facts of the model in a folder, and checks what must hold for every model.

    Args:
        folder: A folder as :func:`moka_pl.studies.architectures.families.write_family` writes it.

    Raises:
        WrongError: If a loss, gradient, score, completion or merge differs from its plain computation.
    """
    from transformers import AutoModelForCausalLM

    loaded = load_backbone(BackboneConfig(str(folder), quantization="none"))
    check_loss(loaded.model, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())
    nf4 = load_backbone(BackboneConfig(str(folder), quantization="nf4")).model
    stored = quantised_share(nf4)
    check_adapters(nf4)
    model = loaded.model
    defaults = default_layers(model)
    check_adapters(model, both_ends)
    unload(model)
    share = check_adapters(model)
    packing, shared = refused(lambda: check_packing(model)), check_sharing(model)
    check_generation(loaded)
    adapter = _saved(loaded, folder)
    merged = refused(lambda: _export(run_merged, adapter, "merged"))
    lora = refused(lambda: _export(run_lora, adapter, "lora"))
    return Facts(defaults, share, stored, packing, shared, merged, lora)


def check_loss(model: "PreTrainedModel", own: "PreTrainedModel") -> None:
    """Compares the loss of a model with the one that transformers computes of the same weights."""
    ids = _tokens(2, 24)
    with torch.no_grad():
        _same("loss", score_tokens(model, ids, ids).nll.mean(), own(input_ids=ids, labels=ids).loss)


def default_layers(model: "PreTrainedModel") -> str:
    """Returns the last parts of the names of the layers that are adapted by default."""
    names = inject_adapter(model, MokaConfig(components=2))
    unload(model)
    return ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))


def both_ends(model: "PreTrainedModel") -> list[str]:
    """Returns the full names of the embedding and the output head."""
    return list(vocabulary_ends(model))


def check_adapters(
    model: "PreTrainedModel", layers: Callable[["PreTrainedModel"], list[str] | str] = lambda _: "all-linear"
) -> float:
    """Adapts layers, and compares the loss, gradients with and without checkpointing, and merged logits.

    Args:
        model: The model, without adapters; it keeps them.
        layers: Which.

    Returns:
        The share of the linear weights that is adapted.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        inject_adapter(model, MokaConfig(components=2, target_modules=layers(model)))
        for layer in moka_layers(model).values():
            layer.moka_B.data.normal_(0, 0.05)
    check_loss(model, model)
    ids = _tokens(2, 12)
    plain = _gradients(model, ids)
    checkpoint_layers(model)
    again = _gradients(model, ids)
    model.gradient_checkpointing_disable()
    for name, gradient in plain.items():
        _same(f"gradient of {name} with checkpointing", again[name], gradient)
    with torch.no_grad():
        adapted = model(input_ids=ids).logits
        merge(model)
        _same("merged logits", model(input_ids=ids).logits, adapted)
        unmerge(model)
    return adapted_share(model)


def check_packing(model: "PreTrainedModel") -> None:
    """Compares the scores of packed examples with those that each has alone, or raises what refuses it."""
    attention = PackedAttention(model)
    examples = [row.tolist() for row in (_tokens(1, 7)[0], _tokens(1, 12)[0], _tokens(1, 5)[0])]
    rows = [{"input_ids": row, "labels": row} for row in examples]
    packed = collate_packs([rows], [False], 0)
    ids, labels = packed["input_ids"], packed["labels"]
    with torch.no_grad():
        together = score_tokens(model, ids, labels, **attention.inputs(packed)).nll
        alone = [score_tokens(model, one, one).nll for one in (torch.tensor([row]) for row in examples)]
    _same("scores of packed examples", together, torch.cat(alone))


def check_sharing(model: "PreTrainedModel") -> str:
    """Compares the scores of options behind a shared prompt with those of whole rows, if they can share."""
    if not can_share(model):
        return "computed whole"
    prompt, options = _tokens(1, 17)[0].tolist(), [_tokens(1, size)[0].tolist() for size in (3, 6, 4)]
    rows = share_prompts([{"prompt_ids": prompt, "option_ids": options}], [False], pad_id=0)
    with torch.no_grad():
        together = row_sums(score_shared(model, rows), len(options))
        alone = []
        for option in options:
            ids = torch.tensor([prompt + option])
            labels = ids.clone()
            labels[:, : len(prompt)] = IGNORE_INDEX
            alone.append(score_tokens(model, ids, labels).nll.sum())
    _same("scores of options behind a shared prompt", together, torch.stack(alone))
    return YES


def check_generation(loaded: Backbone) -> None:
    """Compares greedy completions, with a cache and padded, with those of whole rows, token by token."""
    model, prompts = loaded.model, [_tokens(1, size)[0].tolist() for size in (5, 9)]
    options = {"suppress_tokens": _SPECIAL, **GREEDY}
    found = complete(model, loaded.tokenizer, prompts, _NEW_TOKENS, **options)
    for prompt, completion in zip(prompts, found, strict=True):
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(_NEW_TOKENS):
                logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]  # (V,)
                logits[_SPECIAL] = -torch.inf
                ids.append(int(logits.argmax()))
        expected = loaded.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
        if completion.text != expected:
            raise WrongError(f"generated {completion.text!r}, where single steps give {expected!r}")


def refused(work: Callable[[], None]) -> str:
    """Does something; returns ``yes``, or the reason for which it was refused."""
    try:
        work()
    except WrongError:
        raise
    except MokaError as error:
        return f"{REFUSED}: {error}"
    return YES


def _saved(loaded: Backbone, folder: Path) -> Path:
    """Saves the adapter of a model beside the folder of its base."""
    config = MokaConfig(components=2, target_modules="all-linear")
    base = BaseModel(str(folder), options=BackboneConfig(str(folder), quantization="none").options())
    return save_adapter(folder.parent / f"{folder.name}-adapter", loaded.model, config, base)


def _export(run: Callable[[Request], None], adapter: Path, kind: str) -> None:
    """Exports an adapter; the export itself compares with what its reader computes."""
    with contextlib.redirect_stdout(io.StringIO()):
        run(Request(adapter, adapter.parent / f"{adapter.name}-{kind}", dtype="float32"))


def _gradients(model: "PreTrainedModel", ids: Tensor) -> dict[str, Tensor]:
    """Returns the gradients of all that is trained, in training mode; the model is left evaluating."""
    model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)  # GPT-2 and OPT drop out
        score_tokens(model, ids, ids).nll.mean().backward()  # type: ignore[no-untyped-call]
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            if parameter.grad is None:
                raise WrongError(f"{name} has no gradient")
            found[name], parameter.grad = parameter.grad, None
    model.eval()
    return found


def _tokens(rows: int, length: int) -> Tensor:
    """Tokens without a special meaning, others for every length, (rows, length)."""
    return torch.randint(len(_SPECIAL), 260, (rows, length), generator=torch.Generator().manual_seed(length))


def _same(what: str, found: Tensor, expected: Tensor) -> None:
    if not torch.allclose(found, expected, _RELATIVE, _ABSOLUTE):
        difference = float((found - expected).abs().max())
        raise WrongError(f"{what}: {difference:.2g} from the plain computation")
