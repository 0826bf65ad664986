"""Finds the layers to adapt in a model, and the adapted ones."""

import difflib
from collections.abc import Collection, Iterable

from torch import nn

from moka_pl.adapters.config import MokaConfig
from moka_pl.adapters.layer import MokaLayer
from moka_pl.adapters.patterns import Pattern, matching
from moka_pl.adapters.reach import text_reach
from moka_pl.adapters.schema import shown
from moka_pl.backbone.linear_layers import linearise
from moka_pl.errors import AdapterError
from moka_pl.lm.architecture import QUERY_VALUE, query_value_names
from moka_pl.lm.compiled import uncompiled
from moka_pl.lm.experts import split_experts, split_names

ALL_LINEAR = "all-linear"


def find_targets(model: nn.Module, config: MokaConfig, saved: Collection[str] | None = None) -> list[str]:
    """Returns the full names of the linear layers and embeddings that ``config`` adapts, in model order.

    Experts that it names are split into linear layers first, and Conv1D are replaced by such. Layers that no
    text passes through, such as those of a vision tower, count only if they are named by a regular
    expression, their full name, or that part's name. With ``ensure_weight_tying`` the embedding also
    stands for the output head that is tied to it.

    Args:
        model: The model, without adapters.
        config: The adapter's configuration.
        saved: Names of the layers of a saved adapter, which alone count; None for a new one.

    Raises:
        AdapterError: If nothing matches (naming the nearest names), a match cannot be adapted, the model has
            adapters already, or is a layer itself.
    """
    linearise(model)
    if _names_experts(split_names(model), config, saved):
        split_experts(model)
    modules = dict(model.named_modules())
    present = [name for name, module in modules.items() if isinstance(module, MokaLayer)]
    if present:
        raise AdapterError(f"the model already has adapters (at {present[0]}); unload them first")
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    if config.target_modules == ALL_LINEAR:
        head = output_head(model)
        targets = [name for name in linear if modules[name] is not head]
    else:
        targets = matching(filter(None, modules), own_targets(linear, config.target_modules))
    excluded = set(matching(targets, config.exclude_modules))
    kept = [name for name in targets if name not in excluded]
    if not kept:
        raise AdapterError(_nothing_matches(model, config, excluded=bool(targets)))
    if "" in kept:
        raise AdapterError(
            f"the model is a {type(model).__name__} itself, in whose place its adapter cannot be put; give "
            "the module that holds it, such as torch.nn.Sequential(layer)"
        )
    for name in kept:
        if not isinstance(modules[name], nn.Linear | nn.Embedding):
            raise AdapterError(
                f"target {name} is a {type(modules[name]).__name__}; only linear layers and embeddings can "
                "be adapted"
            )
    if config.ensure_weight_tying:
        kept = _tied_targets(model, kept, config)
    if saved is not None:
        return [name for name in kept if name in saved] or kept
    return suitable_targets(model, kept, config.target_modules)


def _names_experts(layers: list[str], config: MokaConfig, saved: Collection[str] | None) -> bool:
    """Whether a configuration, or a saved adapter, adapts some of the layers that experts would be."""
    if saved is not None:
        return not set(layers).isdisjoint(saved)
    named = layers if config.target_modules == ALL_LINEAR else matching(layers, config.target_modules)
    return len(named) > len(matching(named, config.exclude_modules))


def suitable_targets(model: nn.Module, names: list[str], pattern: Pattern) -> list[str]:
    """Returns those of some linear layers that text passes through and that can be adapted.

    Args:
        model: The model, without adapters.
        names: Full names of the layers that ``pattern`` matches.
        pattern: What ``target_modules`` says: ``all-linear`` leaves out what cannot be adapted.

    Raises:
        AdapterError: If a layer that is named cannot be adapted, or none is left.
    """
    unreached, unsuitable = text_reach(model)
    reached = [name for name in names if name not in unreached or _names_part(pattern, name, unreached[name])]
    if not reached:
        part = unreached[names[0]]
        raise AdapterError(
            f"target_modules {shown(pattern)} matches only layers that no text passes through (in {part}); "
            "name others, or give these by a regular expression"
        )
    refused = [name for name in reached if name in unsuitable]
    if refused and pattern != ALL_LINEAR:
        raise AdapterError(
            f"target {refused[0]} cannot be adapted: {unsuitable[refused[0]]}; add it to exclude_modules"
        )
    if len(refused) == len(reached):
        raise AdapterError(f"no linear layer can be adapted (first {refused[0]}: {unsuitable[refused[0]]})")
    return [name for name in reached if name not in unsuitable]


def own_targets(layers: Iterable[str], targets: Pattern) -> Pattern:
    """Returns ``target_modules`` with the family's own names in place of the default ones.

    Args:
        layers: Full names of the model's linear layers.
        targets: What the configuration says.
    """
    return query_value_names(layers) if targets == QUERY_VALUE else targets


def output_head(model: nn.Module) -> nn.Module | None:
    """Returns the model's output head, if it has one."""
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if callable(getter) else None


def _names_part(pattern: Pattern, name: str, part: str) -> bool:
    """Whether a pattern means a layer although no text passes through that part of the model."""
    if isinstance(pattern, str):
        return pattern != ALL_LINEAR
    own = part.rpartition(".")[2] if part != name else ""
    return any(entry == name or (own and own in entry.split(".")) for entry in pattern or ())


def vocabulary_ends(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the embedding, then the output head if there is one, by name."""
    names = {module: name for name, module in model.named_modules()}
    ends = [model.get_input_embeddings(), output_head(model)]  # type: ignore[operator]
    return {names[end]: end for end in ends if end is not None}


def tied_pair(model: nn.Module) -> tuple[str, str] | None:
    """Returns the names of the embedding and the output head whose frozen weights are one, if they are."""
    ends = {} if output_head(model) is None else vocabulary_ends(model)
    if len({id(getattr(end, "weight", end)) for end in ends.values()}) != 1:
        return None
    embedding, head = ends
    return embedding, head


def _tied_targets(model: nn.Module, names: list[str], config: MokaConfig) -> list[str]:
    """Puts the embedding in the place of it and of the head, which are to be adapted as one.

    Raises:
        AdapterError: If they are not tied, or neither is named.
    """
    tied = tied_pair(model)
    if tied is None:
        raise AdapterError(
            "ensure_weight_tying is set, but this model's output head has a weight of its own; leave the "
            "option out"
        )
    if set(names).isdisjoint(tied):
        raise AdapterError(
            f"ensure_weight_tying is set, but target_modules {shown(config.target_modules)} names neither "
            f"{tied[0]} nor {tied[1]}; name one, or leave the option out"
        )
    wanted = {*names, tied[0]} - {tied[1]}
    return [name for name, _ in model.named_modules() if name in wanted]


def moka_layers(model: nn.Module, shared: bool = False) -> dict[str, MokaLayer]:
    """Returns the layers of MoKA by name, in model order.

    Args:
        model: The model.
        shared: Whether a head that has the embedding's factors counts, too.
    """
    modules = uncompiled(model).named_modules()
    found = {name: module for name, module in modules if isinstance(module, MokaLayer)}
    return found if shared else {name: layer for name, layer in found.items() if layer.owns_factors}


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replaces a module.

    Args:
        model: The model that holds it.
        name: Its full name.
        module: The module to put there.
    """
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _nothing_matches(model: nn.Module, config: MokaConfig, excluded: bool) -> str:
    if excluded:
        return (
            f"exclude_modules {shown(config.exclude_modules)} excludes every layer that "
            f"target_modules {shown(config.target_modules)} matches"
        )
    known = [
        name
        for kind in (nn.Linear, nn.Embedding)
        for name, module in model.named_modules()
        if isinstance(module, kind)
    ]
    suffixes = list(dict.fromkeys(name.rpartition(".")[2] for name in known))
    targets = [config.target_modules] if isinstance(config.target_modules, str) else config.target_modules
    near = [
        match for target in targets for match in difflib.get_close_matches(target, suffixes, n=3, cutoff=0.4)
    ]
    named = list(dict.fromkeys(near)) or suffixes
    return (
        f"target_modules {shown(config.target_modules)} matches no layer of this model; "
        f"closest names: {', '.join(named[:8]) or 'none (the model has no linear layers)'}"
    )
