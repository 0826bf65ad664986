"""The interface of adapter methods."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn

from moka_pl.adapters.injection import replace_module
from moka_pl.errors import AdapterError, ConfigError

_REMEDY = "It was saved with other target_modules, components or filters, or for another base model"


def check_dtype(dtype: Any) -> None:
    """Refuses what adapters cannot be trained in.

    Raises:
        ConfigError: If it is no floating-point dtype of 16 bits or more.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise ConfigError(f"dtype must be a floating-point dtype such as torch.bfloat16, not {dtype!r}")


def check_tensors(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str | Path, remedy: str = _REMEDY
) -> None:
    """Refuses tensors that do not have exactly the names, shapes and kinds of the expected ones.

    Args:
        state: Tensors by name.
        expected: The model's own tensors by name.
        source: Origin of ``state``, for messages.
        remedy: The last sentence of messages.
    """
    missing, unexpected = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or unexpected:
        counts = ", ".join(
            f"{kind} tensors: {len(names)}{f' (first {names[0]})' if names else ''}"
            for kind, names in (("missing", missing), ("unexpected", unexpected))
        )
        raise AdapterError(f"{source} does not fit this model: {counts}. {remedy}")
    for name, tensor in expected.items():
        if tensor.shape != state[name].shape:
            raise AdapterError(
                f"{source} does not fit this model: {name} is {tuple(state[name].shape)}, "
                f"the model expects {tuple(tensor.shape)}. {remedy}"
            )
        held, wanted = (str(dtype).removeprefix("torch.") for dtype in (state[name].dtype, tensor.dtype))
        if held != wanted and not ("float" in held and "float" in wanted):
            raise AdapterError(
                f"{source} does not fit this model: {name} holds {held} numbers, the model expects {wanted}. "
                f"{remedy}"
            )


class AdaptedLayer(Protocol):
    """A frozen layer with an adapter.

    Attributes:
        enabled: Whether the adapter is applied.
    """

    enabled: bool

    @property
    def base_layer(self) -> nn.Module:
        """The frozen layer."""

    @property
    def merged_layer(self) -> nn.Module | None:
        """The merged dense layer; None if not merged."""

    def merge(self) -> None:
        """Merges the update into a dense copy of the weight."""

    def unmerge(self) -> None:
        """Drops the dense copy."""


class AdapterMethod(ABC):
    """One way to adapt a model: MoKA, a method of PEFT, or training the base itself.

    To add one, write a subclass in a new file and list it in ``METHODS`` of
    :mod:`moka_pl.adapters.methods.registry`.

    Args:
        config: The method's configuration.

    Attributes:
        config_type: Class of the configuration, a dataclass whose fields are stored by their names.
        kind: The method's name on disk, ``peft_type`` in ``adapter_config.json``.
        title: The method's display name.
        tags: Further tags for model hubs.
        keeps_base: Whether the base stays frozen and can be restored.
    """

    config_type: ClassVar[type[Any]]
    kind: str
    title: str
    tags: ClassVar[tuple[str, ...]] = ()
    keeps_base: ClassVar[bool] = True

    def __init__(self, config: Any) -> None:
        self.config = config

    def check_new(self) -> None:  # noqa: B027  # most methods have nothing to refuse
        """Refuses, with a ``ConfigError``, what adapters on disk may have but none is to be trained with."""

    @classmethod
    def accepts(cls, config: Any) -> bool:
        """Whether a configuration is for this method."""
        return isinstance(config, cls.config_type)

    @classmethod
    def read_config(cls, stored: Mapping[str, Any]) -> Any | None:
        """Builds a configuration from ``adapter_config.json``; None where that is of another method."""
        if stored["peft_type"] != cls.kind:
            return None
        return cls.config_type(
            **{f.name: stored[f.name] for f in fields(cls.config_type) if f.name in stored}
        )

    @classmethod
    def in_model(cls, model: nn.Module) -> Self | None:
        """Returns this method where it adapted the model, of whatever options; else None."""
        return cls(cls.config_type()) if cls.layers(model) else None

    @classmethod
    @abstractmethod
    def layers(cls, model: nn.Module) -> Mapping[str, AdaptedLayer]:
        """Returns the adapted layers by name, in model order."""

    @abstractmethod
    def inject(
        self, model: nn.Module, dtype: torch.dtype, saved: Mapping[str, Tensor] | None = None
    ) -> list[str]:
        """Freezes the model and puts trainable tensors in; returns the adapted modules' names.

        Args:
            model: The model.
            dtype: Dtype of the trainable tensors.
            saved: The tensors to be loaded next, perhaps without contents: they tell which layers were
                adapted, and nothing is built that they do not fit. None for a new adapter.

        Raises:
            AdapterError: If this model cannot be adapted in this way, or ``saved`` does not fit.
        """

    @abstractmethod
    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """Returns the trained tensors of an injected model by their names on disk, detached."""

    @abstractmethod
    def options(self) -> dict[str, Any]:
        """Returns all options as plain JSON values, enough to build the configuration again."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Returns the main options for display."""

    def lora_ranks(self, model: nn.Module) -> list[int]:
        """Returns the rank of the LoRA that each layer's update is exactly; nothing where none is told."""
        return []

    def about(self, base: str) -> str:
        """Returns a sentence, in Markdown, on an adapter of this method for the base model of this name."""
        return f"Trained weights of {self.title} for `{base}`."

    def copy_state(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        """Copies tensors into the model that have the names and shapes of :meth:`state`."""
        for name, tensor in self.state(model).items():
            tensor.copy_(state[name])

    def unload(self, model: nn.Module, merge: bool) -> None:
        """Replaces the adapted layers by the merged or the frozen ones."""
        for name, layer in self.layers(model).items():
            if merge:
                layer.merge()
            kept = layer.merged_layer if merge else layer.base_layer
            assert kept is not None
            replace_module(model, name, kept)


def name_ranks(ranks: Sequence[int]) -> str:
    """Returns the smallest and the largest of some ranks as a few words."""
    return f"{ranks[0]}" if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"


def name_targets(target_modules: list[str] | str) -> str:
    """Returns ``target_modules`` as a line of text."""
    return target_modules if isinstance(target_modules, str) else ", ".join(target_modules)
