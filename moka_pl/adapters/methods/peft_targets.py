"""What PEFT is told to adapt: the layers that text passes through, or those of a saved adapter.

Its own search for layers runs any regular expression, however long it takes; here names are given instead.
"""

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from moka_pl.adapters.injection import ALL_LINEAR, output_head, suitable_targets
from moka_pl.adapters.patterns import is_simple, matching
from moka_pl.adapters.schema import shown
from moka_pl.errors import AdapterError
from moka_pl.lm.architecture import query_value_names

#: Options whose keys or entries PEFT takes for regular expressions.
_PATTERNS = ("rank_pattern", "alpha_pattern", "layers_pattern")
#: PEFT tries each with each layer, and compiles it anew.
_MOST_PATTERNS = 2_000


def explicit_config(config: Any, model: nn.Module, saved: Mapping[str, Tensor] | None) -> Any:
    """Returns a copy of a configuration of PEFT's that names what to adapt, and leaves out what cannot be.

    Args:
        config: The configuration; it is not changed.
        model: The model, without adapters.
        saved: The tensors of a saved adapter, named as in the model; None for a new one.

    Raises:
        AdapterError: If an expression is invalid, takes too long or matches nothing, or a layer that is named
            cannot be adapted.
    """
    config = copy.deepcopy(config)
    for option in _PATTERNS:
        patterns = _entries(getattr(config, option, None))
        if len(patterns) > _MOST_PATTERNS:
            raise AdapterError(f"{option} has {len(patterns):,} entries; at most {_MOST_PATTERNS:,}")
        for pattern in patterns:
            if not is_simple(str(pattern)):
                raise AdapterError(
                    f"{option} {shown(pattern)} is no simple expression: give a layer's name, or at most "
                    "three repetitions, none of a group"
                )
    _expand(config, model)
    head = output_head(model)
    linear = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
    _name_defaults(config, model, linear)
    targets = getattr(config, "target_modules", None)
    pattern = ALL_LINEAR if targets is None or isinstance(targets, str) else list(targets)
    named = linear if pattern == ALL_LINEAR else matching(linear, pattern)
    if not named:
        return config
    if saved is None:
        kept = suitable_targets(model, named, pattern)
    else:
        layers = {part for name in saved for part in _above(name)}
        kept = [name for name in named if name in layers] or named
    if left_out := set(named) - set(kept):
        config.exclude_modules = [*_entries(getattr(config, "exclude_modules", None)), *sorted(left_out)]
    return config


def _name_defaults(config: Any, model: nn.Module, linear: list[str]) -> None:
    """Gives a LoRA without targets those of PEFT's own table, or of families that it does not have."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    given = getattr(config, "target_modules", None) or getattr(config, "target_parameters", None)
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if config.peft_type == "LORA" and not given:
        config.target_modules = KNOWN.get(kind) or query_value_names(linear)


def _expand(config: Any, model: nn.Module) -> None:
    """Replaces regular expressions by the full names that they match."""
    names = [name for name, _ in model.named_modules() if name]
    for option in ("target_modules", "exclude_modules"):
        pattern = getattr(config, option, None)
        if not isinstance(pattern, str) or pattern == ALL_LINEAR:
            continue
        found = matching(names, pattern)
        if not found and option == "target_modules":
            raise AdapterError(f"target_modules {shown(pattern)} matches no module of this model")
        setattr(config, option, found or None)


def _entries(value: Any) -> list[Any]:
    return [value] if isinstance(value, str) else list(value or ())


def _above(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]
