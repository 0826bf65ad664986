"""The methods of PEFT: LoRA, rsLoRA, DoRA, LoHa, LoKr and whatever else it puts into layers.

PEFT is imported only where it is used already, or asked for: it need not be installed.
"""

import copy
import json
import sys
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Self

import torch
from torch import Tensor, nn

from moka_pl._compat import disable_adapters
from moka_pl.adapters.methods.base import AdapterMethod, name_targets
from moka_pl.backbone.quantization import is_quantised, layer_compute_dtype
from moka_pl.errors import AdapterError, ConfigError, one_line

#: PEFT's own prefix of tensor names on disk: such a folder can be read by PEFT, too.
_PREFIX = "base_model.model."
#: Starts that change the frozen weights, which an adapter directory does not hold.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "eva", "lora_ga", "mica")
#: Where a merged layer's ``forward`` waits while its adapter is disabled.
_ASIDE = "_moka_merged_forward"
#: Fields that say nothing of what is trained.
_PASSING = ("peft_version", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode")


class PeftMethod(AdapterMethod):
    """A method of PEFT.

    Raises:
        ConfigError: If it adapts the prompt and no layers, or its start changes the frozen weights.
    """

    def __init__(self, config: Any) -> None:
        start = getattr(config, "init_lora_weights", True)
        if isinstance(start, str) and start.startswith(_CHANGES_BASE):
            raise ConfigError(
                f"init_lora_weights {start!r} depends on the frozen weights, which are not saved with an "
                "adapter; set true, gaussian or orthogonal"
            )
        if config.is_prompt_learning or config.is_adaption_prompt:
            raise ConfigError(
                f"{type(config).__name__} adapts the prompt; use a PEFT method that adapts layers, such as "
                "LoraConfig"
            )
        super().__init__(config)
        self.kind = str(getattr(config.peft_type, "value", config.peft_type))
        self.title = _title(config)

    @classmethod
    def accepts(cls, config: Any) -> bool:
        """Whether it is a configuration of PEFT's."""
        if "peft" not in sys.modules:
            return False
        from peft import PeftConfig

        return isinstance(config, PeftConfig)

    @classmethod
    def read_config(cls, stored: Mapping[str, Any]) -> Any:
        """Builds a configuration of PEFT's; what is no option of that type is left aside.

        Raises:
            AdapterError: If PEFT is not installed, or has no such method.
        """
        kind = stored["peft_type"]
        try:
            from peft import PEFT_TYPE_TO_CONFIG_MAPPING
        except ImportError as error:
            raise AdapterError(f"{kind} needs PEFT: pip install 'moka_pl[peft]'") from error
        config = {str(k.value): v for k, v in PEFT_TYPE_TO_CONFIG_MAPPING.items()}.get(kind)
        if config is None:
            raise AdapterError(f"the installed PEFT has no method {kind!r}; upgrade PEFT")
        names = {field.name for field in fields(config) if field.init} - {*_PASSING, "peft_type"}
        return config(**{name: value for name, value in stored.items() if name in names})

    @classmethod
    def in_model(cls, model: nn.Module) -> Self | None:
        """Returns the method that PEFT remembers in the model."""
        return cls(model.peft_config["default"]) if cls.layers(model) else None  # type: ignore[index]

    @classmethod
    def layers(cls, model: nn.Module) -> "dict[str, PeftLayer]":
        """Returns PEFT's layers."""
        if "peft" not in sys.modules:
            return {}
        from peft.tuners.tuners_utils import BaseTunerLayer

        modules = model.named_modules()
        return {name: PeftLayer(name, m) for name, m in modules if isinstance(m, BaseTunerLayer)}

    def inject(
        self, model: nn.Module, dtype: torch.dtype, saved: Mapping[str, Tensor] | None = None
    ) -> list[str]:
        """Lets PEFT wrap the target layers, with its own random start.

        Args:
            model: The model.
            dtype: Dtype of the trainable tensors.
            saved: The tensors to be loaded next, if any.
        """
        from peft import inject_adapter_in_model

        four_bit = any(is_quantised(module) for module in model.modules())
        marked = "is_loaded_in_4bit" in vars(model)
        if four_bit and not marked:
            model.is_loaded_in_4bit = True  # type: ignore[assignment]  # PEFT chooses its layers by this mark
        try:
            # PEFT writes the names that it has found into the configuration.
            inject_adapter_in_model(copy.deepcopy(self.config), model)
            names = list(self.layers(model))
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype)
            self._try_layers(model)
        except Exception as error:  # PEFT and bitsandbytes raise all kinds
            self.unload(model, merge=False)  # the model is left as it was
            remedy = " It may not support 4-bit layers: set quantization: none" if four_bit else ""
            reason = f"{type(error).__name__}: {one_line(error).rstrip('. ')}"
            raise AdapterError(
                f"PEFT cannot inject {self.title} into this model: {reason}.{remedy}"
            ) from error
        finally:
            if four_bit and not marked:
                del model.is_loaded_in_4bit
        return names

    def _try_layers(self, model: nn.Module) -> None:
        """Runs one token through a layer of each kind: what cannot work shows before any training."""
        tried = set()
        for wrapped in self.layers(model).values():
            layer, base = wrapped.module, wrapped.base_layer
            layout = (type(layer), type(base), getattr(base, "weight", torch.empty(0)).shape)
            if not isinstance(base, nn.Linear) or layout in tried:
                continue
            tried.add(layout)
            dtype = torch.float32 if is_quantised(base) else base.weight.dtype
            x = torch.zeros(1, base.in_features, dtype=dtype, device=base.weight.device, requires_grad=True)
            training = layer.training
            layer.eval()  # no dropout: no random number is drawn
            with torch.enable_grad():
                torch.autograd.grad(layer(x).float().sum(), x, allow_unused=True)
            layer.train(training)

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """Returns what PEFT itself would save, under its own names."""
        from peft import get_peft_model_state_dict

        saved: dict[str, Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
        return {f"{_PREFIX}{name}": tensor.detach() for name, tensor in saved.items()}

    def copy_state(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        """Lets PEFT put the tensors back."""
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(model, {name.removeprefix(_PREFIX): t for name, t in state.items()})

    def unload(self, model: nn.Module, merge: bool) -> None:
        """Takes PEFT's layers out, and its note on them, which would make it warn of a second adapter."""
        super().unload(model, merge)
        model.__dict__.pop("peft_config", None)

    def options(self) -> dict[str, Any]:
        """Returns PEFT's own dictionary, with plain values."""
        return {name: value for name, value in _plain_options(self.config).items() if name not in _PASSING}

    def facts(self) -> dict[str, Any]:
        """Returns the method, its size, and the options that are not the method's defaults."""
        defaults = _plain_options(type(self.config)())
        facts = {
            name: value
            for name, value in self.options().items()
            if name == "r" or (name != "peft_type" and value != defaults.get(name))
        }
        targets = facts.pop("target_modules", None)
        if targets is not None:
            facts["target modules"] = name_targets(targets)
        return {"method": self.title} | facts


class PeftLayer:
    """A layer of PEFT's, as an :class:`moka_pl.adapters.methods.base.AdaptedLayer`."""

    def __init__(self, name: str, module: Any) -> None:
        self.name = name
        self.module = module

    @property
    def enabled(self) -> bool:
        """Whether the adapter is applied."""
        return not self.module.disable_adapters

    @enabled.setter
    def enabled(self, enabled: bool) -> None:
        # Not PEFT's enable_adapters, which changes what requires gradients.
        disable_adapters(self.module, not enabled)
        source, target = (_ASIDE, "forward") if enabled else ("forward", _ASIDE)
        if (forward := self.module.__dict__.pop(source, None)) is not None:
            self.module.__dict__[target] = forward

    @property
    def base_layer(self) -> nn.Module:
        """The frozen layer."""
        base: nn.Module = self.module.get_base_layer()
        return base

    @property
    def merged_layer(self) -> nn.Linear | None:
        """The dense layer that stands for both, if they are merged."""
        name = self._merged_name()
        return None if name is None else self.module.__dict__[name].dense

    def _merged_name(self) -> str | None:
        """Returns the attribute that holds the merged layer's ``forward``."""
        attributes = self.module.__dict__
        return next((n for n in ("forward", _ASIDE) if isinstance(attributes.get(n), _MergedForward)), None)

    def merge(self) -> None:
        """Lets the layer compute as one dense layer, without touching its frozen weight.

        PEFT's own merging changes the frozen weight, which in four bits is rounded again and cannot be had
        back. Every linear layer with an adapter maps x to ``W' x + b'``: W' is what it makes of the identity.

        Raises:
            AdapterError: If the layer is not linear.
        """
        if self.merged_layer is not None:
            return
        layer, base = self.module, self.base_layer
        if not isinstance(base, nn.Linear):
            raise AdapterError(f"{self.name} is a {type(base).__name__}; only linear layers can be merged")
        dtype = layer_compute_dtype(base) if is_quantised(base) else base.weight.dtype
        was_training = layer.training
        layer.eval()
        with torch.no_grad():
            eye = torch.eye(base.in_features, dtype=dtype, device=base.weight.device)
            bias = layer(eye.new_zeros(1, base.in_features))  # (1, m)
            weight = layer(eye) - bias  # (n, m)
        layer.train(was_training)
        dense = nn.Linear(base.in_features, base.out_features, device="meta")
        dense.weight = nn.Parameter(weight.T.contiguous(), requires_grad=False)
        dense.bias = nn.Parameter(bias[0], requires_grad=False)
        layer.__dict__["forward"] = _MergedForward(dense, any_dtype=is_quantised(base))

    def unmerge(self) -> None:
        """Undoes :meth:`merge`."""
        if (name := self._merged_name()) is not None:
            del self.module.__dict__[name]


class _MergedForward:
    """Stands in for a layer's ``forward``."""

    def __init__(self, dense: nn.Linear, any_dtype: bool) -> None:
        self.dense = dense
        self.any_dtype = any_dtype  # 4-bit layers take any dtype and return it

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        out: torch.Tensor
        out = self.dense(x.to(self.dense.weight.dtype)).to(x.dtype) if self.any_dtype else self.dense(x)
        return out


def _plain_options(config: Any) -> dict[str, Any]:
    options: dict[str, Any] = json.loads(json.dumps(config.to_dict(), default=_plain))
    return options


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
    return "LoRA" if name == "Lora" else name
