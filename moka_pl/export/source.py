"""The adapter to export, in its model, and what it makes of the prompts."""

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from moka_pl.adapters import AdapterInfo, load_adapter, read_adapter
from moka_pl.backbone import BackboneConfig, fingerprint, load_backbone
from moka_pl.backbone.quantization import QuantisedError
from moka_pl.backbone.smollm2 import SHORT_NAME
from moka_pl.errors import ConfigError
from moka_pl.export.check import Measured, measure, prompt_set
from moka_pl.inference import Preview, load_model
from moka_pl.lm.experts import SplitExperts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Source:
    """An adapter in its model.

    Attributes:
        info: What the adapter directory says.
        model: Its base with the adapter, evaluating.
        tokenizer: The base's tokenizer.
        prompts: Tokens of the prompts, shape (T,) each.
        expected: What the adapter makes of them.
        base_name: Hub id or folder of the base, as other libraries find it.
        asked_name: Its name here, which may be a GGUF file or a short name.
    """

    info: AdapterInfo
    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    prompts: list[Tensor]
    expected: Measured
    base_name: str
    asked_name: str

    @property
    def revision(self) -> str | None:
        """Hub revision of the base; None for another one than the stored."""
        stored = self.info.base
        return stored.revision if self.asked_name == stored.name else None


def open_source(
    adapter: Path,
    base: str | None = None,
    prompts: Path | None = None,
    before: Callable[[Preview], None] | None = None,
    loaded: "Callable[[PreTrainedModel], None] | None" = None,
) -> Source:
    """Loads an adapter with its base and measures it.

    Args:
        adapter: An adapter directory.
        base: Name or folder of the base; None is the stored one.
        prompts: A text file with a prompt a line; None takes the package's own.
        before: Is called before the base's weights are loaded, to refuse what cannot work.
        loaded: Is given the model before it computes.

    Raises:
        ConfigError: If ``prompts`` cannot be used.
    """
    info = read_adapter(adapter)
    ids: list[Tensor] = []

    def look(preview: Preview) -> None:
        ids.extend(prompt_set(preview.tokenizer, info.extra.get("prompt"), prompts))
        if before is not None:
            before(preview)
        say(f"loading {base or info.base.name} ...")

    model, tokenizer = load_model(adapter, base=base, before=look)
    if loaded is not None:
        loaded(model)
    say(f"computing {len(ids)} prompts with the adapter ...")
    name = base or info.base.name
    own = name == SHORT_NAME or name.endswith(".gguf")  # which only this package converts
    others = model.name_or_path if own else name
    return Source(info, model, tokenizer, ids, measure(model, ids), others, name)


def onto_original(adapter: Path, source: Source, base: str | None) -> Source:
    """Puts the same adapter onto the unquantised weights of its base, and measures it there.

    Args:
        adapter: The adapter directory.
        source: The adapter on the weights that it was trained on, which are given up.
        base: Name or folder of the base; None is the stored one.

    Raises:
        ConfigError: If the base was not quantised in training, or is stored quantised.
    """
    stored = source.info.base
    check_original(source.info)
    options = stored.options | {"quantization": "none", "compute_dtype": "auto"}
    config = BackboneConfig(base or stored.name, None if base else stored.revision, **options)
    device = source.model.device
    del source.model
    gc.collect()
    try:
        loaded = load_backbone(config, device)
    except QuantisedError as error:
        raise stored_quantised(config.name) from error
    load_adapter(loaded.model, adapter, fingerprint(loaded.model))
    model = loaded.model.eval()
    return replace(source, model=model, expected=measure(model, source.prompts))


def check_original(info: AdapterInfo) -> None:
    """Refuses an adapter whose base has no other original weights.

    Raises:
        ConfigError: If the base was not quantised in training.
    """
    if info.base.options.get("quantization", "none") == "none":
        raise ConfigError("--onto original: the base was not quantised in training; leave the option out")


def stored_quantised(name: str) -> ConfigError:
    """The refusal of a base whose files hold quantised weights only."""
    return ConfigError(
        f"--onto original: {name} is stored quantised; give its unquantised original by --base"
    )


def check_no_experts(model: "PreTrainedModel", layers: Iterable[str]) -> None:
    """Refuses to write a LoRA of a block's experts.

    Raises:
        ConfigError: Naming the block.
    """
    blocks = {name for name, module in model.named_modules() if isinstance(module, SplitExperts)}
    for name in layers:
        if (block := name.rsplit(".", 2)[0]) in blocks:
            raise ConfigError(
                f"no engine reads a LoRA of {block}, whose weights are one tensor in {type(model).__name__}; "
                r"export --to merged, or train with exclude_modules '.*\.experts\..*'"
            )


def say(line: str) -> None:
    """Prints a line of progress at once."""
    print(line, flush=True)
