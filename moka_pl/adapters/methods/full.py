"""Full fine-tuning, the reference that adapters are compared with."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from moka_pl.adapters.config import AdapterConfig
from moka_pl.adapters.methods.base import AdapterMethod, name_targets
from moka_pl.adapters.patterns import compile_pattern, matching
from moka_pl.adapters.reach import text_reach
from moka_pl.adapters.schema import check_fields, shown
from moka_pl.backbone.quantization import is_quantised
from moka_pl.errors import AdapterError

#: Where a model remembers which of its parameters were trained.
_MARK = "_moka_fully_trained"


@dataclass
class FullFineTuning(AdapterConfig):
    """Trains the weights of an unquantised base (``quantization: none``) instead of adapters.

    Trained weights are kept in float32, and checkpoints and adapter directories contain them all. For
    half-precision products set ``trainer.precision: bf16-mixed``.

    Args:
        target_modules: Modules to train: ``all`` (everything, embeddings and norms included), a list of name
            suffixes, or a regular expression that matches whole names.
    """

    target_modules: list[str] | str = "all"

    def __post_init__(self) -> None:
        """Refuses values of other types."""
        check_fields(self)
        if isinstance(self.target_modules, str):
            compile_pattern(self.target_modules)

    def to_dict(self) -> dict[str, Any]:
        """Returns all options as plain JSON values."""
        return asdict(self)


class FullMethod(AdapterMethod):
    """Full fine-tuning, which has no adapters: the trained model is already merged."""

    config_type = FullFineTuning
    config: FullFineTuning
    kind = "FULL"
    title = "full fine-tuning"
    keeps_base = False

    @classmethod
    def in_model(cls, model: nn.Module) -> Self | None:
        """Returns the method where a model remembers what was trained."""
        return cls(FullFineTuning()) if getattr(model, _MARK, None) else None

    @classmethod
    def layers(cls, model: nn.Module) -> dict[str, Any]:
        """Returns none: no layer holds an adapter."""
        return {}

    def inject(
        self, model: nn.Module, dtype: torch.dtype, saved: Mapping[str, Tensor] | None = None
    ) -> list[str]:
        """Makes the target modules trainable, except for parts that no text passes through.

        Args:
            model: The model.
            dtype: Dtype of the trainable tensors.
            saved: The tensors to be loaded next, if any.
        """
        targets = self.config.target_modules
        every = dict(model.named_modules())
        names = [""] if targets == "all" else matching(filter(None, every), targets)
        if not names:
            raise AdapterError(
                f"target_modules {shown(targets)} matches no module of this model; "
                "set all, or name some of its modules"
            )
        if self.in_model(model):
            raise AdapterError("the base's own weights are already trainable; load the base again")
        quantised = [
            name
            for name, module in every.items()
            if is_quantised(module) and any(not n or f"{name}.".startswith(f"{n}.") for n in names)
        ]
        if quantised:
            raise AdapterError(
                f"full fine-tuning cannot train quantised weights (first {quantised[0]} of "
                f"{len(quantised)}); set quantization: none, or use an adapter"
            )
        wanted = {parameter for name in names for parameter in every[name].parameters()}
        chosen = {name for name, parameter in model.named_parameters() if parameter in wanted}
        if saved is not None:
            chosen = chosen & saved.keys() or chosen
        elif not isinstance(targets, str) or targets == "all":
            unreached = tuple(f"{part}." for part in set(text_reach(model).unreached.values()))
            chosen = {name for name in chosen if not name.startswith(unreached)} or chosen
        model.requires_grad_(False)
        for name, parameter in model.named_parameters():
            if name in chosen:
                parameter.data = parameter.data.to(dtype)
                parameter.requires_grad_(True)
        if targets == "all":
            model.to(dtype)  # the model's dtype is that of what it computes
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        setattr(model, _MARK, trained)
        return names if targets != "all" else [name for name, m in every.items() if isinstance(m, nn.Linear)]

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """Returns all trained parameters by name."""
        parameters = dict(model.named_parameters())
        return {name: parameters[name].detach() for name in getattr(model, _MARK, [])}

    def options(self) -> dict[str, Any]:
        """Returns the configuration's fields."""
        return {"peft_type": self.kind, **self.config.to_dict()}

    def facts(self) -> dict[str, Any]:
        """Returns what is trained."""
        return {"method": self.title, "target modules": name_targets(self.config.target_modules)}
