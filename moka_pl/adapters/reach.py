"""Which linear layers of a model can be adapted to text, found by running a few tokens.

A vision tower is never reached by text. Some layers are not called, because their parent reads the weight
itself; others, such as routers, return something else than ``W x + b``.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moka_pl.adapters.vocabulary.embedding import scaled_rows
from moka_pl.backbone.quantization import is_quantised
from moka_pl.lm.scoring import score_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOKENS = 4
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


class Reach(NamedTuple):
    """The parts of a model that cannot be adapted to text.

    Attributes:
        unreached: For each module with weights that no text passes through the outermost such part of the
            model around it, as ``model.vision_tower``.
        unsuitable: Why a layer that text does reach cannot be adapted, by name.
    """

    unreached: dict[str, str]
    unsuitable: dict[str, str]


def text_reach(model: nn.Module) -> Reach:
    """Runs a few tokens through a model, as training does, and tells which layers they do not use.

    Random generators and modes are left as they were. A model that does not take plain token ids counts as
    reached everywhere.
    """
    modules = dict(model.named_modules())
    called: set[nn.Module] = set()
    unsuitable: dict[str, str] = {}
    names = {module: name for name, module in modules.items()}

    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        called.add(module)
        if isinstance(module, nn.Linear) and not _is_linear(module, args, output):
            unsuitable[names[module]] = f"a {type(module).__name__} computes more than W x + b"
        if isinstance(module, nn.Embedding) and not _is_lookup(module, args, output):
            unsuitable[names[module]] = f"a {type(module).__name__} computes more than the rows of W"

    hooks = [module.register_forward_hook(note) for module in modules.values()]
    try:
        with _training(model), torch.no_grad():
            ran = _run(model)
    finally:
        for hook in hooks:
            hook.remove()
    if not ran:
        return Reach({}, {})
    used = {name for module in called for name in _and_above(names[module])}
    outside = _around_decoder(model, names)
    unreached: dict[str, str] = {}
    uncalled: dict[str, str] = {}
    for name, module in modules.items():
        if name in used or next(module.parameters(recurse=False), None) is None:
            continue
        if _has_used_twin(name, modules, used):
            continue
        parent = _parent(name, modules)
        if parent not in used or parent in outside:
            unreached[name] = _outermost(name, used)
        elif isinstance(module, nn.Linear):
            uncalled[name] = type(modules[parent]).__name__
    read = _read_directly(model, [modules[name] for name in uncalled]) if uncalled else set()
    for name, kind in uncalled.items():
        if modules[name] in read:
            unsuitable[name] = f"{kind} reads its weight without calling it"
        else:  # as the keys and values of layers that take those of another one
            unreached[name] = name
    return Reach(unreached, unsuitable)


def runs_text(model: nn.Module) -> bool:
    """Whether the loss of plain token ids can be computed, as :func:`trains` does."""
    with _training(model), torch.no_grad():
        return _run(model, scored=True)


def trains(model: nn.Module) -> bool:
    """Whether a few tokens' loss has a gradient for any trainable tensor; errors of the model are raised."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ids = _few_tokens(model)
    with _training(model), torch.enable_grad():
        loss = score_tokens(cast("PreTrainedModel", model), ids, ids).nll.sum()
        gradients = torch.autograd.grad(loss, trained, allow_unused=True)
    return any(gradient is not None for gradient in gradients)


def _read_directly(model: nn.Module, layers: list[nn.Module]) -> set[nn.Module]:
    """Returns those of some layers that are not called whose weights the loss depends on all the same."""
    dense = [layer for layer in layers if layer.weight.is_floating_point()]  # type: ignore[operator]
    weights = [cast(Tensor, layer.weight) for layer in dense]
    before = [weight.requires_grad for weight in weights]
    ids = _few_tokens(model)
    try:
        with _training(model), torch.enable_grad():
            for weight in weights:
                weight.requires_grad_(True)
            loss = score_tokens(cast("PreTrainedModel", model), ids, ids).nll.sum()
            gradients = torch.autograd.grad(loss, weights, allow_unused=True)
    except Exception:  # it cannot be told
        return set(layers)
    finally:
        for weight, required in zip(weights, before, strict=True):
            weight.requires_grad_(required)
    return {layer for layer, gradient in zip(dense, gradients, strict=True) if gradient is not None}


def _few_tokens(model: nn.Module) -> Tensor:
    embedded: Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
    return torch.arange(_TOKENS, device=embedded.device)[None] % embedded.shape[0]  # (1, T)


def _run(model: nn.Module, scored: bool = False) -> bool:
    """Scores a few tokens, or at least runs them unless ``scored``; returns whether the model can."""
    if not hasattr(model, "get_input_embeddings") or any(p.is_meta for p in model.parameters()):
        return False
    if getattr(model, "main_input_name", "input_ids") != "input_ids":  # it reads images, or sound
        return False
    ids = _few_tokens(model)
    for run in (lambda: score_tokens(cast("PreTrainedModel", model), ids, ids), lambda: model(input_ids=ids)):
        try:
            run()
        except Exception:  # it needs more than token ids; whatever else is wrong shows where it is used
            if scored:
                break
            continue
        return True
    return False


def _is_linear(module: nn.Linear, args: tuple[Any, ...], output: Any) -> bool:
    """Whether a layer computed W x + b; quantised ones count, whatever they do to W."""
    if type(module).forward is nn.Linear.forward or is_quantised(module):
        return True
    if not isinstance(output, Tensor) or output.shape[-1:] != (module.out_features,):
        return False
    if not args or not module.weight.dtype.is_floating_point or module.weight.dtype.itemsize < 2:
        return True
    expected = F.linear(args[0].to(module.weight.dtype), module.weight, module.bias).float()
    return float((output.float() - expected).abs().max()) <= 0.05 * float(expected.abs().max())


def _is_lookup(module: nn.Embedding, args: tuple[Any, ...], output: Any) -> bool:
    """Whether an embedding returned the rows of the tokens it was given, as it scales them."""
    if not args or module.max_norm is not None or not isinstance(output, Tensor):
        return False
    rows = scaled_rows(module, F.embedding(args[0], module.weight)).float()
    return output.shape == rows.shape and torch.allclose(output.float(), rows, rtol=1e-2)


def _parent(name: str, modules: dict[str, nn.Module]) -> str:
    """Returns the name of the nearest module above that is more than a list of others."""
    parent = name.rpartition(".")[0]
    while parent and isinstance(modules[parent], _CONTAINERS):
        parent = parent.rpartition(".")[0]
    return parent


def _around_decoder(model: nn.Module, names: dict[nn.Module, str]) -> set[str]:
    """Returns the names of the modules around the part that reads tokens; what else they hold is not its."""
    name = names.get(getattr(model, "get_decoder", lambda: model)(), "")
    return {outer for outer in _and_above(name) if outer != name}


def _and_above(name: str) -> Iterator[str]:
    """Yields the name of a module and of all modules around it."""
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""


def _outermost(name: str, used: set[str]) -> str:
    """Returns the outermost module around a layer of which nothing was called."""
    return [outer for outer in _and_above(name) if outer not in used][-1]


def _has_used_twin(name: str, modules: dict[str, nn.Module], used: set[str]) -> bool:
    """Whether it is part of one of several alike in a list, such as experts, of which another was called."""
    for part in _and_above(name):
        around = modules[part.rpartition(".")[0]]
        if part and part not in used and isinstance(around, (nn.ModuleList, nn.ModuleDict)):
            above = part.rpartition(".")[0]
            twins = [key for key, twin in around.named_children() if type(twin) is type(modules[part])]
            if any(f"{above}.{key}".lstrip(".") in used for key in twins):
                return True
    return False


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """Puts a model into training mode, in which some layers are computed otherwise, and restores all."""
    modes = [(module, module.training) for module in model.modules()]
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=[device.index or 0 for device in devices]):
        model.train()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
