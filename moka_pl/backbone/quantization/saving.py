"""What transformers reads of a model that it saved: the layers as they are stored, or nothing is written.

transformers knows from ``quantization_config`` which layers of a folder are quantised. Merging changes that,
and it never knew of layers that are quantised here.
"""

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moka_pl.backbone.quantization.four_bit import is_four_bit
from moka_pl.backbone.quantization.kinds import loading_options
from moka_pl.backbone.quantization.layers import layer_compute_dtype, quantization_of
from moka_pl.backbone.quantization.stored import QuantisedLinear
from moka_pl.errors import AdapterError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: The ``quant_method`` of the layers that are described here.
_METHOD = "bitsandbytes"


def settle_saving(model: nn.Module, merged: bool) -> None:
    """Has a model without its adapters say how its layers are stored, and save only what can be read back.

    Args:
        model: The model; what is none of transformers' is left as it is.
        merged: Whether layers may have become dense.
    """
    if not hasattr(model, "save_pretrained") or not hasattr(model, "config"):
        return
    pretrained: Any = model
    if not _quantised_layers(model):
        _forget_quantization(pretrained)
        return
    if merged or _stated(pretrained) is None:
        _describe_layers(pretrained)
    checked = _CheckedSaving(pretrained)
    pretrained.save_pretrained, pretrained.push_to_hub = checked.save_pretrained, checked.push_to_hub


def release_saving(model: nn.Module) -> None:
    """Has a model that gets adapters again save as it did before :func:`settle_saving`."""
    checked = getattr(vars(model).get("save_pretrained"), "__self__", None)
    if isinstance(checked, _CheckedSaving):
        checked.hand_back()


class _CheckedSaving:
    """``save_pretrained`` and ``push_to_hub`` of a model until its quantised layers are found readable."""

    def __init__(self, model: "PreTrainedModel") -> None:
        self.model = model
        self.before = {name: vars(model).get(name) for name in ("save_pretrained", "push_to_hub")}

    def save_pretrained(self, *args: Any, **options: Any) -> Any:
        """Saves the model, or refuses before anything is written."""
        _check_readable(self.model)
        self.hand_back()
        return self.model.save_pretrained(*args, **options)

    def push_to_hub(self, *args: Any, **options: Any) -> Any:
        """Uploads the model, or refuses before a repository is made."""
        _check_readable(self.model)
        self.hand_back()
        return self.model.push_to_hub(*args, **options)

    def hand_back(self) -> None:
        """Gives the model the methods that it had before."""
        for name, method in self.before.items():
            delattr(self.model, name)
            if method is not None:
                setattr(self.model, name, method)


def _check_readable(model: "PreTrainedModel") -> None:
    """Refuses a model of which transformers would read a layer otherwise than it is stored.

    Raises:
        AdapterError: Naming the first such layer, and what to do instead.
    """
    here, there = _quantised_layers(model), _quantised_layers(_as_read(model))
    wrong = [name for name in [*here, *there] if here.get(name) != there.get(name)]
    if wrong:
        raise AdapterError(
            f"the model cannot be saved: transformers would not read {wrong[0]} back as it is stored, "
            f"{here.get(wrong[0], 'dense')}; save the adapter before you unload it, then run "
            "python -m moka_pl export ADAPTER --to merged"
        )


def _quantised_layers(model: nn.Module) -> dict[str, str]:
    """Returns how the quantised layers of a model are stored, by name."""
    named = ((name, _storage(module)) for name, module in model.named_modules())
    return {name: storage for name, storage in named if storage is not None}


def _storage(module: nn.Module) -> str | None:
    if isinstance(module, QuantisedLinear):
        return f"in {module.stored.kind}"
    if is_four_bit(module):
        return "in 4 bits"
    if any(kind.__name__ == "Linear8bitLt" for kind in type(module).__mro__):
        return "in 8 bits"
    return None


def _stated(model: "PreTrainedModel") -> Any:
    """What a model's configuration says of its quantisation, perhaps as a dictionary; None if nothing."""
    return getattr(model.config, "quantization_config", None)


def _as_read(model: "PreTrainedModel") -> nn.Module:
    """Builds the model that transformers would fill from a folder, without memory for weights."""
    from transformers.quantizers import AutoHfQuantizer

    kind: Any = type(model)
    with torch.device("meta"):
        empty = kind(copy.deepcopy(model.config))
    if (stated := copy.deepcopy(_stated(model))) is not None:
        quantizer: Any = AutoHfQuantizer.from_config(stated, pre_quantized=True)
        quantizer.preprocess_model(model=empty, dtype=model.dtype, device_map=None)
    return empty  # type: ignore[no-any-return]


def _describe_layers(model: "PreTrainedModel") -> None:
    """Names the dense layers that transformers would take for quantised ones."""
    from transformers.quantizers.auto import AutoQuantizationConfig

    stated = _stated(model)
    if stated is None:
        four = next((module for module in model.modules() if is_four_bit(module)), None)
        if four is None:  # which transformers has no word for
            return
        options = loading_options(*quantization_of(model), layer_compute_dtype(four))
        if (stated := options.get("quantization_config")) is None:
            return
    elif isinstance(stated, dict):
        stated = AutoQuantizationConfig.from_dict(stated)
    if getattr(stated, "quant_method", None) != _METHOD:
        return
    new = copy.copy(stated)  # with the old one its user may load another model
    dense = [name for name, module in model.named_modules() if _would_be_quantised(module)]
    new.llm_int8_skip_modules = list(dict.fromkeys([*(stated.llm_int8_skip_modules or ()), *dense]))
    model.config.quantization_config = new
    if (quantizer := getattr(model, "hf_quantizer", None)) is not None:
        quantizer.quantization_config = new


def _would_be_quantised(module: nn.Module) -> bool:
    """Whether it is a dense layer of a kind that transformers replaces by a quantised one."""
    linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    return linear and _storage(module) is None


def _forget_quantization(model: "PreTrainedModel") -> None:
    """Takes every word of bitsandbytes out of a model whose layers are all dense."""
    stated = _stated(model)
    method = stated.get("quant_method") if isinstance(stated, dict) else getattr(stated, "quant_method", None)
    if method != _METHOD:
        return
    if (quantizer := getattr(model, "hf_quantizer", None)) is not None:
        quantizer.remove_quantization_config(model)
    else:
        del model.config.quantization_config
    for mark in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        vars(model).pop(mark, None)
