"""Named adapters on one base model, by PEFT's names."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from moka_pl.adapters.config import MokaConfig
from moka_pl.adapters.directory import save_adapter
from moka_pl.adapters.injection import moka_layers, replace_module
from moka_pl.adapters.layer import MokaLayer
from moka_pl.adapters.methods.base import check_dtype, check_tensors
from moka_pl.adapters.methods.moka import MokaMethod
from moka_pl.adapters.methods.registry import adapted_layers
from moka_pl.adapters.named.mix import check_weights, mixed
from moka_pl.adapters.named.rows import RowBatch
from moka_pl.adapters.pretrained.attach import base_of, hand_over_saving, saving_of
from moka_pl.adapters.reading import (
    BaseModel,
    local_adapter,
    read_adapter,
    read_adapter_shapes,
    read_adapter_state,
)
from moka_pl.backbone import weight_samples
from moka_pl.errors import AdapterError
from moka_pl.lm.compiled import uncompiled

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: The name of rows without an adapter, as PEFT has it.
BASE = "__base__"


class MokaAdapters:
    """Named MoKA adapters on one frozen base model.

    One of them is active, and with it the model is an ordinary adapted one, to generate with, train, merge
    and save. The others take the memory of their factors only. A batch may have another adapter in each row.

    Args:
        model: A model of transformers, plain or with MoKA adapters from :func:`moka_pl.load_model` or
            :func:`moka_pl.attach`.
        adapter_name: A name for the adapter that the model already has.

    Attributes:
        model: The model.
        configs: The adapters' configurations by name.

    Raises:
        AdapterError: If the model has adapters of another or an unknown method.
    """

    def __init__(self, model: "PreTrainedModel", adapter_name: str = "default") -> None:
        self.model = model = uncompiled(model)
        self.configs: dict[str, MokaConfig] = {}
        self._layers: dict[str, dict[str, MokaLayer]] = {}
        self._bases: dict[str, BaseModel] = {}
        self._extras: dict[str, dict[str, Any]] = {}
        self._last_batch: RowBatch | None = None
        self._active: str | None = None
        if not adapted_layers(model):
            model.requires_grad_(False)
            return
        saving = saving_of(model)
        if saving is None or not isinstance(saving.config, MokaConfig):
            raise AdapterError(
                "the model has other adapters than MoKA's from load_model or attach; give it without them"
            )
        self._check_new(adapter_name)
        _check_apart(saving.config)
        self._keep(adapter_name, saving.config, moka_layers(model), saving.base, trainable=None)
        self._extras[adapter_name] = saving.extra
        self._active = adapter_name

    @classmethod
    def from_pretrained(
        cls, model: "PreTrainedModel", model_id: str | Path, adapter_name: str = "default", **options: Any
    ) -> Self:
        """Loads an adapter onto a plain base model and makes it active.

        Args:
            model: The base model.
            model_id: An adapter directory, or the hub id of one.
            adapter_name: A name for it.
            options: Further ones of :meth:`load_adapter`.

        Raises:
            AdapterError: As :meth:`load_adapter`.
        """
        adapters = cls(model)
        adapters.load_adapter(model_id, adapter_name, **options)
        adapters.set_adapter(adapter_name)
        return adapters

    @property
    def active_adapter(self) -> str | None:
        """The active adapter's name; None where the model is the frozen base."""
        return self._active

    def load_adapter(
        self,
        model_id: str | Path,
        adapter_name: str,
        is_trainable: bool = False,
        revision: str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Loads an adapter, without making it active.

        Args:
            model_id: An adapter directory, or the hub id of one.
            adapter_name: A new name for it.
            is_trainable: Whether its tensors require gradients.
            revision: Branch, tag or commit on the hub.
            dtype: Dtype of its tensors; bfloat16 halves their memory.

        Raises:
            AdapterError: If the name is taken, the directory is damaged, of another base or not MoKA's.
            ConfigError: If nothing trains in this dtype.
        """
        self._check_new(adapter_name)
        check_dtype(dtype)
        path = local_adapter(model_id, revision)
        info = read_adapter(path)
        if not isinstance(info.config, MokaConfig):
            raise AdapterError(
                f"{path} is no MoKA adapter but a {type(info.config).__name__}; load it by itself"
            )
        _check_apart(info.config)
        with self._bare():
            current = base_of(self.model, None)
            info.check_base(current.fingerprint, path, weight_samples(self.model))
            shapes = read_adapter_shapes(path)
            layers = MokaMethod(info.config).build(self.model, dtype, shapes)
        state = read_adapter_state(path)
        own = {f"{name}.{key}": t for name, layer in layers.items() for key, t in layer.tensors().items()}
        check_tensors(state, own, path)
        for name, tensor in own.items():
            tensor.copy_(state[name])
        self._keep(adapter_name, info.config, layers, info.base, is_trainable)
        self._extras[adapter_name] = info.extra

    def add_adapter(self, adapter_name: str, config: MokaConfig, dtype: torch.dtype = torch.float32) -> None:
        """Adds a new, untrained adapter, without making it active.

        Args:
            adapter_name: A new name for it.
            config: Its configuration, which need not resemble the others'.
            dtype: Dtype of its tensors.

        Raises:
            AdapterError: If the name is taken, no layer matches or a match cannot be adapted.
            ConfigError: If a filter does not fit a layer, or nothing trains in this dtype.
        """
        self._check_new(adapter_name)
        check_dtype(dtype)
        _check_apart(config)
        with self._bare():
            layers = MokaMethod(config).build(self.model, dtype)
        self._keep(adapter_name, config, layers, base_of(self.model, None), trainable=True)

    def add_weighted_adapter(
        self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str
    ) -> None:
        """Adds the exact sum ``ΔW = Σ_k w_k ΔW_k`` of adapters, without making it active.

        The sum is an adapter like any other, with the components of all of them: it can be saved and loaded.
        The adapters may differ in everything. Later changes to them do not affect it.

        Args:
            adapters: Their names.
            weights: w of each, of either sign.
            adapter_name: A new name for the sum.

        Raises:
            AdapterError: If a name is unknown or taken, or the weights are not one finite number each.
            ConfigError: If there are more than 1024 components, or factors larger than a layer.
        """
        self._check_new(adapter_name)
        self._check_known(adapters)
        check_weights(adapters, weights)
        config, layers = mixed([self._layers[name] for name in adapters], weights)
        self._keep(adapter_name, config, layers, self._bases[adapters[0]])

    def set_adapter(self, adapter_name: str) -> None:
        """Makes an adapter the active one.

        Raises:
            AdapterError: If there is none of this name.
        """
        self._check_known([adapter_name])
        self._put(adapter_name)
        config, base = self.configs[adapter_name], self._bases[adapter_name]
        hand_over_saving(self.model, config, base, self._extras[adapter_name])

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter; without the active one the model is the frozen base.

        Raises:
            AdapterError: If there is none of this name.
        """
        self._check_known([adapter_name])
        if adapter_name == self._active:
            self._put(None)
        self._last_batch = None
        for kept in (self.configs, self._layers, self._bases, self._extras):
            del kept[adapter_name]

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Makes the model the frozen base within the block."""
        with self._bare():
            yield

    @contextmanager
    def rows(self, adapter_names: Sequence[str]) -> Iterator[None]:
        """Gives each row of the batches within the block an adapter of its own, without gradients for these.

        Args:
            adapter_names: A name for each row; ``__base__`` stands for the frozen base.

        Raises:
            AdapterError: If a name is unknown, or while the model runs, if a batch has other rows.
        """
        used = [name for name in dict.fromkeys(adapter_names) if name != BASE]
        self._check_known(used)
        if not adapter_names:
            raise AdapterError("adapter_names is empty; give one name for each row of the batch")
        targets = list(dict.fromkeys(layer for name in used for layer in self._layers[name]))
        with self._bare():
            bases: dict[str, nn.Module] = {target: self.model.get_submodule(target) for target in targets}
            batch = self._row_batch(adapter_names, bases)
            try:
                batch.stacks.fill()
                for target, layer in batch.layers.items():
                    replace_module(self.model, target, layer)
                yield
            finally:
                for target, base in bases.items():
                    replace_module(self.model, target, base)
                batch.stacks.clear()

    def __call__(self, *args: Any, adapter_names: Sequence[str] | None = None, **options: Any) -> Any:
        """Runs the model, with an adapter for each row if they are named, else with the active one."""
        if adapter_names is None:
            return self.model(*args, **options)
        with self.rows(adapter_names):
            return self.model(*args, **options)

    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **options: Any) -> Any:
        """Generates as the model does, with an adapter for each row if they are named.

        Each beam and each returned sequence of a row has the row's adapter.
        """
        if adapter_names is None:
            return self.model.generate(*args, **options)
        with self.rows(adapter_names):
            return self.model.generate(*args, **options)

    def save_pretrained(self, save_directory: str | Path, adapter_name: str | None = None) -> Path:
        """Writes the directory of an adapter, by default of the active one, and returns its path.

        Raises:
            AdapterError: If there is none of this name, or as :func:`moka_pl.save_adapter`.
        """
        name = adapter_name or self._active
        if name is None:
            raise AdapterError("no adapter is active; give adapter_name")
        self._check_known([name])
        before = self._active
        self._put(name)
        try:
            parts = self.configs[name], self._bases[name], self._extras[name]
            return save_adapter(save_directory, self.model, *parts)
        finally:
            self._put(before)

    def memory(self) -> dict[str, int]:
        """Returns the bytes of each adapter's tensors."""
        return {
            name: sum(t.nbytes for layer in layers.values() for t in layer.tensors().values())
            for name, layers in self._layers.items()
        }

    @contextmanager
    def _bare(self) -> Iterator[None]:
        """Takes the active adapter out of the model within the block."""
        before = self._active
        self._put(None)
        try:
            yield
        finally:
            self._put(before)

    def _put(self, name: str | None) -> None:
        """Puts an adapter's layers into the model in the place of the active one's."""
        for target, layer in self._layers.get(self._active or "", {}).items():
            replace_module(self.model, target, layer.base_layer)
        self._active = None
        for target, layer in self._layers.get(name or "", {}).items():
            _put_over(layer, self.model.get_submodule(target))
            replace_module(self.model, target, layer.train(self.model.training))
        self._active = name

    def _row_batch(self, names: Sequence[str], bases: dict[str, nn.Module]) -> RowBatch:
        """Returns the batch whose rows have these adapters over these frozen layers; the last one is kept."""
        if self._last_batch is None or not self._last_batch.serves(names, bases):
            used = [name for name in dict.fromkeys(names) if name != BASE]
            layers = {
                target: {name: self._layers[name][target] for name in used if target in self._layers[name]}
                for target in bases
            }
            for target, base in bases.items():
                for layer in layers[target].values():
                    _put_over(layer, base)
            self._last_batch = RowBatch(names, bases, layers)
        return self._last_batch

    def _keep(
        self,
        name: str,
        config: MokaConfig,
        layers: dict[str, MokaLayer],
        base: BaseModel,
        trainable: bool | None = False,
    ) -> None:
        self.configs[name], self._layers[name] = config, layers
        self._bases[name], self._extras[name] = base, {}
        for layer in layers.values():
            for tensor in layer.parameters(recurse=False):
                tensor.requires_grad_(tensor.requires_grad if trainable is None else trainable)

    def _check_new(self, name: str) -> None:
        if not name or name == BASE or name in self.configs:
            raise AdapterError(f"adapter_name {name!r} is taken or reserved; choose another one")

    def _check_known(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self.configs:
                raise AdapterError(
                    f"no adapter is called {name!r}; there are {', '.join(self.configs) or 'none'}"
                )


def _put_over(layer: MokaLayer, base: Any) -> None:
    """Gives an adapted layer its frozen one, which may have been moved or exchanged meanwhile."""
    if layer.base_layer is not base:
        layer.base_layer = base
    device = base.weight.device
    if layer.moka_B.device != device:
        for tensor in layer.parameters(recurse=False):
            tensor.data = tensor.data.to(device)


def _check_apart(config: MokaConfig) -> None:
    """Refuses adapters whose layers are not independent of one another."""
    for option in ("ensure_weight_tying", "trainable_token_indices", "modules_to_save"):
        if getattr(config, option):
            raise AdapterError(
                f"an adapter with {option} is not kept beside others; load it by itself (load_model)"
            )
