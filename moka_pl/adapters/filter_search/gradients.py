"""Gradients with respect to frozen weights, a few layers at a time."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moka_pl.errors import AdapterError, NonFiniteError

#: Bytes of gradients that are held at once; more layers than fit take another pass over the batches.
MEMORY = 2**31


def weight_gradients(
    model: nn.Module,
    names: Sequence[str],
    batches: Sequence[Any],
    loss: Callable[[Any], Tensor],
    memory: int = MEMORY,
) -> Iterator[tuple[str, Tensor]]:
    """Yields name and ∂L/∂W of linear layers, summed over batches, without training or unfreezing anything.

    For ``y = W x`` it is ``Σ_t (∂L/∂y_t) x_tᵀ``: hooks on the layers catch x and ∂L/∂y, so that 4-bit weights
    serve as well as dense ones. The layers of a pass share its forward and backward passes; their gradients
    are dropped before the next pass.

    The cost: a pass is a forward and backward over all batches on the model's device. It holds ``memory``
    bytes of gradients, the inputs of the pass's layers for one batch, and the activations of a training step.
    Of LLaMA2-7B, q and v make 4 GiB of gradients: two passes at the default; all linear layers make 24 GiB.

    Args:
        model: The model; it is put into evaluation mode meanwhile (no dropout), or, if it checkpoints its
            activations, into training mode, in which alone it does.
        names: Full names of linear layers.
        batches: Batches, gone through once a pass.
        loss: Maps a batch to the scalar L.
        memory: Bytes of gradients to hold at once; one layer at a time is the least.

    Yields:
        Name and gradient, (m, n), float32 (float64 for float64 activations); zeros for layers that L ignores.

    Raises:
        NonFiniteError: A gradient holds a NaN or an infinity.
    """
    layers = linear_layers(model, names)
    training = model.training
    # All of its modules, which transformers switches on and off one by one.
    model.train(any(getattr(module, "gradient_checkpointing", False) for module in model.modules()))
    try:
        for group in _groups(layers, memory):
            sums: dict[str, Tensor] = {}
            for batch in batches:
                for name, gradient in _of_batch({name: layers[name] for name in group}, batch, loss):
                    sums[name] = sums[name].add_(gradient) if name in sums else gradient
            for name in group:
                layer = layers[name]
                size = layer.out_features, layer.in_features
                gradient = sums.pop(name) if name in sums else torch.zeros(size, device=layer.weight.device)
                if not torch.isfinite(gradient).all():
                    raise NonFiniteError(
                        f"the gradient of {name} over the first batches is not finite, so nothing can be "
                        "chosen from it. Look at the base model and the first rows, or set filters: diverse "
                        "and start: zero"
                    )
                yield name, gradient
    finally:
        model.train(training)


def _of_batch(
    layers: dict[str, nn.Linear], batch: Any, loss: Callable[[Any], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yields the gradients of one batch; a layer that was called several times comes several times."""
    calls: list[tuple[str, Tensor, Tensor]] = []
    recording = True

    def catch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not output.requires_grad:  # nothing before this layer needs a gradient: it begins here
                output = output.detach().requires_grad_()
            if recording:
                calls.append((name, inputs[0].detach(), output))
            return output

        return hook

    handles = [layer.register_forward_hook(catch(name)) for name, layer in layers.items()]
    gradients: tuple[Tensor | None, ...] = ()
    try:
        with torch.enable_grad():
            value = loss(batch)
        recording = False  # checkpointed layers are called again; the hooks must then do the same to outputs
        if calls and value.requires_grad:
            # Not backward(): the model's own parameters shall get no gradient.
            gradients = torch.autograd.grad(value, [output for _, _, output in calls], allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    if not gradients:
        return
    for (name, x, _), gradient in zip(calls, gradients, strict=True):
        if gradient is not None:
            dtype = torch.promote_types(gradient.dtype, torch.float32)
            yield name, gradient.flatten(0, -2).to(dtype).mT @ x.flatten(0, -2).to(dtype)  # (m, n)


def linear_layers(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Linear]:
    """Returns the linear layers of these names; any other layer is an ``AdapterError``."""
    layers = {}
    for name in names:
        layer = model.get_submodule(name)
        if not isinstance(layer, nn.Linear):
            raise AdapterError(
                f"{name} is a {type(layer).__name__}; gradients are taken of linear layers only, so set "
                "other filters than auto and start: zero, or name it in exclude_modules"
            )
        layers[name] = layer
    return layers


def _groups(layers: dict[str, nn.Linear], memory: int) -> Iterator[list[str]]:
    """Cuts the layers, in order, into runs whose float32 gradients take at most ``memory`` bytes."""
    group: list[str] = []
    taken = 0
    for name, layer in layers.items():
        size = 4 * layer.out_features * layer.in_features
        if group and taken + size > memory:
            yield group
            group, taken = [], 0
        group.append(name)
        taken += size
    if group:
        yield group
