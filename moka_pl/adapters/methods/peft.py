"""The methods of PEFT: LoRA, rsLoRA, DoRA, LoHa, LoKr and whatever else it puts into layers."""

import copy
import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from moka_pl.adapters.injection import replace_module
from moka_pl.adapters.methods.peft_layers import peft_layers
from moka_pl.backbone.quantization import is_4bit
from moka_pl.errors import AdapterError, ConfigError

#: PEFT's own prefix of tensor names on disk: such a folder can be read by PEFT, too.
_PREFIX = "base_model.model."
#: Starts that change the frozen weights, which an adapter directory does not hold.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "eva", "lora_ga", "mica")
#: Fields that say nothing of what is trained.
_PASSING = ("peft_version", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode")


class PeftMethod:
    """A method of PEFT; see :class:`moka_pl.adapters.methods.base.AdapterMethod`.

    Args:
        config: A configuration of PEFT's, such as ``peft.LoraConfig``.

    Raises:
        ConfigError: For prompt learning, which adapts no layers, and for starts that change the base.
    """

    def __init__(self, config: Any) -> None:
        start = getattr(config, "init_lora_weights", True)
        if isinstance(start, str) and start.startswith(_CHANGES_BASE):
            raise ConfigError(
                f"init_lora_weights {start!r} changes or examines the frozen weights, which are not saved "
                "with an adapter; choose true, gaussian or orthogonal"
            )
        if config.is_prompt_learning or config.is_adaption_prompt:
            raise ConfigError(
                f"{type(config).__name__} adapts the prompt; only methods of PEFT that adapt layers are taken"
            )
        self.config = config
        self.kind = str(getattr(config.peft_type, "value", config.peft_type))
        self.title = _title(config)

    def inject(self, model: nn.Module, dtype: torch.dtype) -> list[str]:
        """Lets PEFT wrap the target layers, with its own random start."""
        from peft import inject_adapter_in_model

        four_bit = any(is_4bit(module) for module in model.modules())
        marked = "is_loaded_in_4bit" in vars(model)
        if four_bit and not marked:
            model.is_loaded_in_4bit = True  # type: ignore[assignment]  # PEFT chooses its layers by this mark
        try:
            # PEFT writes the names that it has found into the configuration.
            inject_adapter_in_model(copy.deepcopy(self.config), model)
            names = list(peft_layers(model))
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype)
            self._try(model)
        except Exception as error:  # PEFT and bitsandbytes raise all kinds
            for name, layer in peft_layers(model).items():  # the model is left as it was
                replace_module(model, name, layer.get_base_layer())
            model.__dict__.pop("peft_config", None)
            raise AdapterError(self._refusal(error, four_bit)) from error
        finally:
            if four_bit and not marked:
                del model.is_loaded_in_4bit
        return names

    def _try(self, model: nn.Module) -> None:
        """One token through a layer of each kind: what cannot work shows before any training."""
        kinds = set()
        for layer in peft_layers(model).values():
            base = layer.get_base_layer()
            kind = (type(layer), type(base), getattr(base, "weight", torch.empty(0)).shape)
            if not isinstance(base, nn.Linear) or kind in kinds:
                continue
            kinds.add(kind)
            dtype = torch.float32 if is_4bit(base) else base.weight.dtype
            x = torch.zeros(1, base.in_features, dtype=dtype, device=base.weight.device, requires_grad=True)
            training = layer.training
            layer.eval()  # no dropout: no random number is drawn
            with torch.enable_grad():
                torch.autograd.grad(layer(x).float().sum(), x, allow_unused=True)
            layer.train(training)

    def _refusal(self, error: Exception, four_bit: bool) -> str:
        reason = " ".join(str(error).split())[:300].rstrip(". ")
        remedy = " On 4-bit layers it may not work at all: use quantization: none" if four_bit else ""
        return f"PEFT cannot put {self.title} into this model: {type(error).__name__}: {reason}.{remedy}"

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """What PEFT itself would save, under its own names."""
        return {f"{_PREFIX}{name}": tensor.detach() for name, tensor in _saved(model).items()}

    def load_state(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        """Lets PEFT put the tensors back; merged layers are merged anew."""
        from peft import set_peft_model_state_dict

        from moka_pl.adapters.methods.peft_layers import is_merged, merge_layer, unmerge_layer

        set_peft_model_state_dict(model, {name.removeprefix(_PREFIX): t for name, t in state.items()})
        for name, layer in peft_layers(model).items():
            if is_merged(layer):
                unmerge_layer(layer)
                merge_layer(layer, name)

    def options(self) -> dict[str, Any]:
        """PEFT's own dictionary, with plain values."""
        found: dict[str, Any] = json.loads(json.dumps(self.config.to_dict(), default=_plain))
        return {name: value for name, value in found.items() if name not in _PASSING}

    def facts(self) -> dict[str, Any]:
        """The method, its size, and the options that are not the method's defaults."""
        defaults = json.loads(json.dumps(type(self.config)().to_dict(), default=_plain))
        told = {
            n: v for n, v in self.options().items() if (v != defaults.get(n) and n != "peft_type") or n == "r"
        }
        targets = told.pop("target_modules", None)
        if targets is not None:
            told["target modules"] = targets if isinstance(targets, str) else ", ".join(targets)
        return {"method": self.title} | told


def peft_config(described: Mapping[str, Any]) -> Any:
    """Builds a configuration of PEFT's from its options.

    Args:
        described: At least ``peft_type``; what is no option of that type is left aside.

    Raises:
        AdapterError: If PEFT is not installed or does not know the type.
    """
    try:
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    except ImportError as error:
        raise AdapterError(f"{described['peft_type']} needs PEFT: pip install 'moka_pl[peft]'") from error
    kind = {str(k.value): v for k, v in PEFT_TYPE_TO_CONFIG_MAPPING.items()}.get(described["peft_type"])
    if kind is None:
        raise AdapterError(f"this version of PEFT knows no method {described['peft_type']!r}; upgrade PEFT")
    names = {field.name for field in fields(kind) if field.init} - {*_PASSING, "peft_type"}
    return kind(**{name: value for name, value in described.items() if name in names})


def _saved(model: nn.Module) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    found: dict[str, Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, set | frozenset | tuple):
        return sorted(value)
    return getattr(value, "value", None) or str(value)


def _title(config: Any) -> str:
    name = type(config).__name__.removesuffix("Config")
    if getattr(config, "use_dora", False):
        return "DoRA"
    if getattr(config, "use_rslora", False):
        return "rsLoRA"
    return {"Lora": "LoRA", "LoHa": "LoHa", "LoKr": "LoKr"}.get(name, name)
