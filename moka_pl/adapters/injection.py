"""Finds the layers to adapt in a model, and the adapted ones."""

import difflib
import re

from torch import nn

from moka_pl.adapters.config import MokaConfig
from moka_pl.adapters.layer import MokaLinear
from moka_pl.errors import AdapterError


def matches(name: str, pattern: list[str] | str | None) -> bool:
    """Whether a module's full name matches a pattern: a list of dotted suffixes, or a regex."""
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in pattern or ())


def find_targets(model: nn.Module, config: MokaConfig) -> list[str]:
    """Returns the full names of the linear layers that ``config`` adapts, in model order.

    Raises:
        AdapterError: If nothing matches (naming the nearest names), a match is not a linear layer, or the
            model has adapters already.
    """
    for pattern in (config.target_modules, config.exclude_modules):
        if isinstance(pattern, str):
            try:
                re.compile(pattern)
            except re.error as error:
                raise AdapterError(f"{pattern!r} is not a valid regular expression: {error}") from error
    modules = dict(model.named_modules())
    present = [name for name, module in modules.items() if isinstance(module, MokaLinear)]
    if present:
        raise AdapterError(f"the model already has adapters (at {present[0]}); unload them first")
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    if config.target_modules == "all-linear":
        getter = getattr(model, "get_output_embeddings", None)
        head = getter() if callable(getter) else None
        targets = [name for name in linear if modules[name] is not head]
    else:
        targets = [name for name in modules if name and matches(name, config.target_modules)]
    kept = [name for name in targets if not matches(name, config.exclude_modules)]
    if not kept:
        raise AdapterError(_nothing_matches(config, linear, excluded=bool(targets)))
    for name in kept:
        if not isinstance(modules[name], nn.Linear):
            raise AdapterError(
                f"target {name} is a {type(modules[name]).__name__}; only linear layers can be adapted"
            )
    return kept


def moka_layers(model: nn.Module) -> dict[str, MokaLinear]:
    """Returns the layers of MoKA by name, in model order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MokaLinear)}


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replaces a module.

    Args:
        model: The model that holds it.
        name: Its full name.
        module: The module to put there.
    """
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _nothing_matches(config: MokaConfig, linear: list[str], excluded: bool) -> str:
    if excluded:
        return (
            f"exclude_modules {config.exclude_modules!r} excludes every layer that "
            f"target_modules {config.target_modules!r} matches"
        )
    suffixes = list(dict.fromkeys(name.rpartition(".")[2] for name in linear))
    targets = [config.target_modules] if isinstance(config.target_modules, str) else config.target_modules
    near = [
        match for target in targets for match in difflib.get_close_matches(target, suffixes, n=3, cutoff=0.4)
    ]
    named = list(dict.fromkeys(near)) or suffixes
    return (
        f"target_modules {config.target_modules!r} matches no layer of this model; "
        f"closest names: {', '.join(named[:8]) or 'none (the model has no linear layers)'}"
    )
