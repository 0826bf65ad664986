"""The methods of PEFT: LoRA, rsLoRA, DoRA, LoHa, LoKr and whatever else it puts into layers.

PEFT is imported only where it is used already, or asked for: it need not be installed.
"""

import copy
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Self

import torch
from torch import Tensor, nn

from moka_pl.adapters.injection import replace_module
from moka_pl.adapters.methods.base import AdapterMethod, check_tensors, name_targets
from moka_pl.adapters.methods.peft_layers import PeftLayer, SavedModule, keep_dtype
from moka_pl.adapters.methods.peft_targets import explicit_config
from moka_pl.adapters.reach import runs_text, trains
from moka_pl.adapters.schema import check_values, shown
from moka_pl.backbone.quantization import is_four_bit, is_quantised, weight_count
from moka_pl.errors import AdapterError, ConfigError, one_line

#: PEFT's own prefix of tensor names on disk: such a folder can be read by PEFT, too.
_PREFIX = "base_model.model."
#: Starts that change the frozen weights, which an adapter directory does not hold.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "eva", "lora_ga", "mica")
#: Ranks and other sizes up to this, and numbers up to that, are nobody's mistake, however small the model is.
_ANY_RANK, _ANY_SIZE = 4096, 2**20
_MOST_ENTRIES, _LARGEST, _MOST_TERMS = 10_000, 1_000_000, 100
#: Fields that say nothing of what is trained.
_PASSING = ("peft_version", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode")


#: Methods that a plain training loop cannot run, and why.
_UNFIT = {
    "POLY": "needs a task id with every example",
    "SHADOW": "trains a second network beside the model",
    "XLORA": "mixes adapters that are trained already",
}
#: Methods that keep tensors outside of the layers; PEFT before 0.21 has no ``uses_shared_state`` to say so.
_SHARED = ("VERA", "VBLORA")
#: Options that do more than put tensors into layers, unless they are None.
_BEYOND_LAYERS = ("layer_replication", "alora_invocation_tokens", "megatron_config", "arrow_config")


class PeftMethod(AdapterMethod):
    """A method of PEFT.

    Raises:
        ConfigError: If it does not adapt layers alone, keeps state outside of them, changes while it trains,
            or its start changes the frozen weights.
    """

    def __init__(self, config: Any) -> None:
        start = getattr(config, "init_lora_weights", True)
        if isinstance(start, str) and start.startswith(_CHANGES_BASE):
            raise ConfigError(
                f"init_lora_weights {start!r} depends on the frozen weights, which are not saved with an "
                "adapter; set true, gaussian or orthogonal"
            )
        super().__init__(config)
        self.kind = str(getattr(config.peft_type, "value", config.peft_type))
        self.title = _title(config)
        if (reason := _unfit_reason(config, self.kind)) is not None:
            raise ConfigError(
                f"{type(config).__name__} {reason}; use a PEFT method that adapts layers, such as LoraConfig"
            )
        for option in _BEYOND_LAYERS:
            if (value := getattr(config, option, None)) is not None:
                raise ConfigError(
                    f"{type(config).__name__}: {option} {shown(value)} changes more than the adapted layers; "
                    "set null"
                )

    def check_new(self) -> None:
        """Refuses trained biases, which the base would not get back; adapters that have some are read."""
        if (bias := getattr(self.config, "bias", "none")) != "none":
            raise ConfigError(
                f"{type(self.config).__name__}: bias {shown(bias)} changes more than the adapted layers; "
                "set none"
            )

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
        options = {name: value for name, value in stored.items() if name in names}
        check_values(config, options)
        for name, value in options.items():
            _check_option(name, value)
        return config(**options)

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
        from peft.utils import ModulesToSaveWrapper

        kinds = {BaseTunerLayer: PeftLayer, ModulesToSaveWrapper: SavedModule}
        return {
            name: kind(name, module)
            for name, module in model.named_modules()
            for base, kind in kinds.items()
            if isinstance(module, base)
        }

    def inject(
        self, model: nn.Module, dtype: torch.dtype, saved: Mapping[str, Tensor] | None = None
    ) -> list[str]:
        """Lets PEFT wrap the target layers, with its own random start.

        Args:
            model: The model.
            dtype: Dtype of the trainable tensors.
            saved: The tensors to be loaded next, if any.
        """
        if saved is not None:
            saved = {name.removeprefix(_PREFIX): tensor for name, tensor in saved.items()}
        config = explicit_config(self.config, model, saved)
        runs = saved is None and runs_text(model)
        quantised = any(is_quantised(module) for module in model.modules())
        four_bit = any(is_four_bit(module) for module in model.modules())
        marked = "is_loaded_in_4bit" in vars(model)
        if four_bit and not marked:
            model.is_loaded_in_4bit = True  # type: ignore[assignment]  # PEFT chooses its layers by this mark
        try:
            self._check_size(config, model, saved)
            self._wrap(config, model)
            names = list(self.layers(model))
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype)
            self._try_layers(model)
            if runs and not trains(model):
                raise AdapterError("no tensor of it takes part in computing a loss")
            self._try_saving(model)
        except Exception as error:  # PEFT and bitsandbytes raise all kinds
            self.unload(model, merge=False)  # the model is left as it was
            if isinstance(error, AdapterError) and saved is not None:
                raise
            remedy = " It may not support quantised layers: set quantization: none" if quantised else ""
            reason = one_line(error).rstrip(". ")
            if not isinstance(error, AdapterError):
                reason = f"{type(error).__name__}: {reason}"
            raise AdapterError(
                f"PEFT cannot inject {self.title} into this model: {reason}.{remedy}"
            ) from error
        finally:
            if four_bit and not marked:
                del model.is_loaded_in_4bit
        return names

    def _wrap(self, config: Any, model: nn.Module, empty: bool = False) -> None:
        """Lets PEFT wrap the target layers; ``empty`` makes tensors without contents or memory."""
        from peft import inject_adapter_in_model

        # PEFT writes the names that it has found into the configuration.
        inject_adapter_in_model(copy.deepcopy(config), model, low_cpu_mem_usage=empty)
        for layer in self.layers(model).values():
            layer.module.train(layer.base_layer.training)  # PEFT's dropout is on in an evaluating model, too
            if is_quantised(layer.base_layer):
                layer.module.register_forward_hook(keep_dtype)

    def _check_size(self, config: Any, model: nn.Module, saved: Mapping[str, Tensor] | None) -> None:
        """Refuses absurd sizes, and those of another adapter than the saved one, before they take memory."""
        weights = [m for m in model.modules() if isinstance(m, nn.Linear)]
        largest = max([_ANY_RANK, *(max(m.in_features, m.out_features) for m in weights)])
        for option in ("r", "init_r", "target_r"):
            rank = getattr(config, option, 0)
            if isinstance(rank, int) and rank > largest and self.kind != "LOKR":  # which caps it itself
                raise AdapterError(
                    f"{option} is {shown(rank)}, but no layer has more than {largest} features"
                )
        numbers = [value for value in vars(config).values() if isinstance(value, int)]
        if saved is None and max(numbers, default=0) <= _ANY_RANK:
            return
        sizes = self._sizes(config, model)
        if sizes is not None and saved is not None:
            check_tensors(saved, sizes, "the adapter")
        total = sum(tensor.numel() for tensor in (sizes or {}).values())
        if total > max(sum(weight_count(m.weight) for m in weights), _ANY_SIZE):
            raise AdapterError(
                f"{self.title} would hold {total:,} numbers, more than the model; set a smaller r"
            )

    def _sizes(self, config: Any, model: nn.Module) -> dict[str, Tensor] | None:
        """Returns what :meth:`state` will be, without contents; None where PEFT cannot tell."""
        with torch.random.fork_rng(devices=[]):
            try:
                with torch.device("meta"):
                    self._wrap(config, model, empty=True)
                return {name.removeprefix(_PREFIX): t.to("meta") for name, t in self.state(model).items()}
            except (RuntimeError, NotImplementedError):  # it reads the contents of what it makes
                return None
            finally:
                self.unload(model, merge=False)

    def _try_saving(self, model: nn.Module) -> None:
        """Does what the first save will do: what cannot work shows before any training."""
        self.facts()
        saved = {tensor.data_ptr() for tensor in self.state(model).values()}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and parameter.data_ptr() not in saved:
                raise AdapterError(f"it trains {name}, but does not save it")

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
        seen: set[int] = set()
        state = {}
        for name, tensor in saved.items():  # what layers share is saved with each of them
            shared = tensor.data_ptr() in seen and not tensor.is_meta
            state[f"{_PREFIX}{name}"] = tensor.detach().clone() if shared else tensor.detach()
            seen.add(tensor.data_ptr())
        return state

    def copy_state(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        """Lets PEFT put the tensors back."""
        from peft import set_peft_model_state_dict

        self._check_indices(model, state)
        set_peft_model_state_dict(model, {name.removeprefix(_PREFIX): t for name, t in state.items()})

    def _check_indices(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Refuses indices, which some methods save, beyond a layer's weight: kernels do not check them."""
        layers = self.layers(model)
        for name, tensor in state.items():
            if tensor.is_floating_point() or tensor.numel() == 0:
                continue
            own = next(layer for key, layer in layers.items() if name.startswith(f"{_PREFIX}{key}."))
            weight: Any = own.base_layer.weight
            sizes = [*weight.shape] if len(tensor) == weight.dim() else [weight.numel()]
            rows = tensor.reshape(len(sizes), -1).cpu()
            if bool((rows < 0).any()) or bool((rows.amax(1) >= torch.tensor(sizes)).any()):
                raise AdapterError(f"{name} points beyond the layer's weight of {tuple(weight.shape)}")

    def unload(self, model: nn.Module, merge: bool) -> None:
        """Takes PEFT's layers out, and its note on them, which would make it warn of a second adapter."""
        from peft.utils import AuxiliaryTrainingWrapper

        super().unload(model, merge)
        for name, module in list(model.named_modules()):
            if isinstance(module, AuxiliaryTrainingWrapper):  # of single tokens; its layer is out already
                replace_module(model, name, module.token_adapter)
        model.__dict__.pop("peft_config", None)

    def options(self) -> dict[str, Any]:
        """Returns PEFT's own dictionary, with plain values."""
        options = _plain_value(self.config.to_dict())
        return {name: value for name, value in options.items() if name not in _PASSING}

    def facts(self) -> dict[str, Any]:
        """Returns the method, its size, and the options that are not the method's defaults."""
        defaults = {
            field.name: field.default_factory() if callable(field.default_factory) else field.default
            for field in fields(self.config)
        }
        facts = {
            name: value
            for name, value in self.options().items()
            if name == "r" or (name != "peft_type" and value != _plain_value(defaults.get(name)))
        }
        targets = facts.pop("target_modules", None)
        if targets is not None:
            facts["target modules"] = name_targets(targets)
        return {"method": self.title} | facts


def _check_option(name: str, value: Any) -> None:
    """Refuses a stranger's option that would take very long or much memory, or compute NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name} must be finite, not {value}")
    if isinstance(value, (list, dict)) and len(value) > _MOST_ENTRIES:
        raise ConfigError(f"{name} has {len(value):,} entries; at most {_MOST_ENTRIES:,}")
    largest = _MOST_TERMS if name.endswith("_terms") else _LARGEST
    free = any(word in name for word in ("seed", "key", "step", "alpha"))
    if isinstance(value, int) and abs(value) > largest and not free:
        raise ConfigError(f"{name} must be at most {largest:,}, not {shown(value)}")


def _plain_value(value: Any) -> Any:
    return json.loads(json.dumps(value, default=_plain))


def _plain(value: Any) -> Any:
    if isinstance(value, set | frozenset | tuple):
        return sorted(value)
    return getattr(value, "value", None) or str(value)


def _unfit_reason(config: Any, kind: str) -> str | None:
    """Returns why a method of PEFT cannot be trained here, or None."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    if config.is_prompt_learning or config.is_adaption_prompt:
        return "adapts the prompt"
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)
    if hasattr(tuner, "update_and_allocate") and getattr(config, "use_asa", True):
        return "changes its ranks while it trains, which PEFT's own loop has to tell it to"
    if getattr(tuner, "uses_shared_state", False) or kind in _SHARED:
        return "keeps tensors outside of the layers, which are not saved"
    return _UNFIT.get(kind)


def _title(config: Any) -> str:
    name = type(config).__name__.removesuffix("Config")
    if getattr(config, "use_dora", False):
        return "DoRA"
    if getattr(config, "use_rslora", False):
        return "rsLoRA"
    return "LoRA" if name == "Lora" else name
