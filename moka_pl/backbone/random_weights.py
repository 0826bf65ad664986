"""Models with random weights, built layer by layer so that the whole is never held in full precision."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from moka_pl.backbone.config import BackboneConfig
from moka_pl.backbone.shapes import shape_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def random_model(config: BackboneConfig, dtype: torch.dtype, device: torch.device) -> "PreTrainedModel":
    """Builds a causal language model of a known shape with random weights.

    Linear weights are normal with the configuration's ``initializer_range``; each is quantised as soon as it
    is drawn. The same seed gives the same weights on devices of one kind.

    Args:
        config: Backbone options; ``name`` is a shape.
        dtype: Compute dtype.
        device: Where the model lives.

    Returns:
        The model.

    Raises:
        BackboneError: For an unknown shape.
    """
    from transformers import AutoModelForCausalLM

    shape = shape_config(config.name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape, dtype=dtype, attn_implementation=config.attention)
    generator = torch.Generator(device).manual_seed(config.seed)
    std = getattr(shape, "initializer_range", 0.02)
    head = model.get_output_embeddings()

    def draw(like: torch.Tensor) -> torch.Tensor:
        return torch.empty(like.shape, dtype=dtype, device=device).normal_(0, std, generator=generator)

    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not head and config.quantization != "none":
            model.set_submodule(name, _quantised(module, draw(module.weight), config, dtype))
        elif isinstance(module, nn.Linear | nn.Embedding):
            module.weight = nn.Parameter(draw(module.weight), requires_grad=False)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias = nn.Parameter(torch.zeros_like(module.bias, device=device), requires_grad=False)
        elif "rotary" in type(module).__name__.lower():
            # Its buffers are computed, not drawn; on the meta device they were not.
            with torch.device(device):
                model.set_submodule(name, type(module)(shape))
        else:
            for key, weight in module.named_parameters(recurse=False):  # norms
                ones = torch.ones(weight.shape, dtype=dtype, device=device)
                setattr(module, key, nn.Parameter(ones, requires_grad=False))
    model.tie_weights()
    return model


def _quantised(
    layer: nn.Linear, weight: torch.Tensor, config: BackboneConfig, dtype: torch.dtype
) -> nn.Module:
    import bitsandbytes as bnb

    with torch.device("meta"):
        quantised = bnb.nn.Linear4bit(
            layer.in_features, layer.out_features, bias=layer.bias is not None, compute_dtype=dtype
        )
    quantised.weight = bnb.nn.Params4bit(
        weight,
        requires_grad=False,
        quant_type=config.quantization,
        compress_statistics=config.double_quantization,
        module=quantised,
    ).to(weight.device)
    if layer.bias is not None:
        quantised.bias = nn.Parameter(torch.zeros_like(layer.bias, device=weight.device), requires_grad=False)
    return quantised  # type: ignore[no-any-return]
