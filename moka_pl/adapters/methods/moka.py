"""MoKA as one of the methods."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from moka_pl.adapters.config import MokaConfig
from moka_pl.adapters.filters import describe_filters
from moka_pl.adapters.injection import (
    find_targets,
    moka_layers,
    replace_module,
    tied_pair,
    vocabulary_ends,
)
from moka_pl.adapters.layer import MokaLayer, MokaLinear
from moka_pl.adapters.methods.base import AdaptedLayer, AdapterMethod, check_tensors, name_targets
from moka_pl.adapters.schema import shown
from moka_pl.adapters.trained import TrainedLinear, find_trained, trained_layers, trained_sizes
from moka_pl.adapters.vocabulary.embedding import MokaEmbedding, MokaTiedHead, weight_size
from moka_pl.adapters.vocabulary.token_rows import (
    ROWS,
    TokenEmbedding,
    TokenHead,
    TokenRows,
    check_rows,
    set_vocabulary,
    token_rows,
)
from moka_pl.errors import AdapterError, ConfigError
from moka_pl.ops.gating import GATINGS, can_move


class MokaMethod(AdapterMethod):
    """Gated mixtures of Kronecker adapters."""

    config_type = MokaConfig
    config: MokaConfig
    kind = "MOKA"
    title = "MoKA"
    tags = ("kronecker",)

    @classmethod
    def read_config(cls, stored: Mapping[str, Any]) -> Any | None:
        """Builds a configuration; what is stored names no further file."""
        if stored["peft_type"] == cls.kind and str(stored.get("filters")).endswith(".json"):
            raise ConfigError(f"filters is {shown(stored['filters'])}, which is none of an adapter's")
        return super().read_config(stored)

    @classmethod
    def layers(cls, model: nn.Module) -> Mapping[str, AdaptedLayer]:
        """Returns the layers of MoKA, a tied head included, those with rows of tokens, and whole ones."""
        found: dict[str, AdaptedLayer] = dict(moka_layers(model, shared=True))
        return found | token_rows(model) | trained_layers(model)

    def inject(
        self, model: nn.Module, dtype: torch.dtype, saved: Mapping[str, Tensor] | None = None
    ) -> list[str]:
        """Freezes the model and wraps its target layers.

        Args:
            model: The model.
            dtype: Dtype of the trainable tensors.
            saved: The tensors to be loaded next, if any.
        """
        wrapped = self.build(model, dtype, saved)
        rows = self._build_rows(model, dtype)
        whole = find_trained(model, self.config.modules_to_save)
        model.requires_grad_(False)  # the new factors and gates are not in it yet
        for name, adapted in {**wrapped, **rows}.items():
            replace_module(model, name, adapted)
        for layer in rows.values():
            if isinstance(layer, TokenEmbedding):
                set_vocabulary(model, layer)
        for name in whole:
            replace_module(model, name, TrainedLinear(cast(nn.Linear, model.get_submodule(name)), dtype))
        return list(wrapped)

    def build(
        self, model: nn.Module, dtype: torch.dtype, saved: Mapping[str, Tensor] | None = None
    ) -> dict[str, MokaLayer]:
        """Returns adapted layers over a model's own, by name; the model is left as it is.

        Args:
            model: The model, without adapters.
            dtype: Dtype of the trainable tensors.
            saved: The tensors to be loaded next, if any.
        """
        layers = None if saved is None else {name.rpartition(".moka_")[0] for name in saved}
        whole = find_trained(model, self.config.modules_to_save)
        names = [name for name in find_targets(model, self.config, layers) if name not in whole]
        if not names:
            raise AdapterError(
                f"target_modules {shown(self.config.target_modules)} matches only {', '.join(whole)}, which "
                "modules_to_save trains as a whole; name other layers, or use FullFineTuning"
            )
        if self.config.trainable_token_indices:
            check_rows(model, self.config.trainable_token_indices, names)
        if saved is not None:
            check_tensors(saved, self._sizes(model, names) | trained_sizes(model, whole), "the adapter")
        wrapped: dict[str, MokaLayer] = {}
        for name in names:
            layer = model.get_submodule(name)
            with _naming(name):
                if isinstance(layer, nn.Embedding):
                    wrapped[name] = MokaEmbedding(layer, self.config, dtype, name)
                else:
                    assert isinstance(layer, nn.Linear)
                    wrapped[name] = MokaLinear(layer, self.config, dtype, name)
        if self.config.ensure_weight_tying and (tied := tied_pair(model)) is not None:
            head, embedding = model.get_submodule(tied[1]), wrapped[tied[0]]
            assert isinstance(head, nn.Linear)
            assert isinstance(embedding, MokaEmbedding)
            wrapped[tied[1]] = MokaTiedHead(head, embedding, self.config, tied[0])
        return wrapped

    def _build_rows(self, model: nn.Module, dtype: torch.dtype) -> dict[str, TokenRows]:
        """Returns embedding and output head with trained rows, by name; nothing where there are none."""
        indices = self.config.trainable_token_indices
        if not indices:
            return {}
        ends, tied = vocabulary_ends(model), tied_pair(model)
        (first, embedding), *heads = ends.items()
        assert isinstance(embedding, nn.Embedding)
        new = TokenEmbedding(embedding, indices, dtype)
        built: dict[str, TokenRows] = {first: new}
        for name, head in heads:
            assert isinstance(head, nn.Linear)
            built[name] = TokenHead(head, indices, dtype, None if tied is None else new)
        return built

    def _sizes(self, model: nn.Module, names: list[str]) -> dict[str, Tensor]:
        """Returns what :meth:`state` will be, without contents."""
        sizes: dict[str, tuple[int, ...]] = {}
        for name in names:
            with _naming(name):
                shapes = self.config.shapes_of(name, *weight_size(model.get_submodule(name)))
            for i, shape in enumerate(shapes):
                if not shape.identity:
                    sizes[f"{name}.moka_A.{i}"] = shape[:2]
                sizes[f"{name}.moka_B.{i}"] = shape[2:4]
            if self.config.gating != "none":
                sizes[f"{name}.moka_gate"] = (self.config.components,)
        for name, layer in vocabulary_ends(model).items() if self.config.trainable_token_indices else ():
            if (tied := tied_pair(model)) is None or name != tied[1]:
                sizes[f"{name}.{ROWS}"] = (
                    len(self.config.trainable_token_indices or ()),
                    weight_size(layer)[1],
                )
        return {name: torch.empty(size, device="meta") for name, size in sizes.items()}

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """Returns factors and gate logits; views of the parameters."""
        state = {
            f"{name}.{key}": tensor
            for layers in (moka_layers(model), trained_layers(model))
            for name, layer in layers.items()
            for key, tensor in layer.tensors().items()
        }
        rows = {name: layer for name, layer in token_rows(model).items() if layer.owns_factors}
        return state | {f"{name}.{ROWS}": layer.trainable_tokens.detach() for name, layer in rows.items()}

    def unload(self, model: nn.Module, merge: bool) -> None:
        """Replaces the adapted layers; without its new rows a model has the vocabulary that it had."""
        embeddings = [layer for layer in token_rows(model).values() if isinstance(layer, TokenEmbedding)]
        super().unload(model, merge)
        for layer in embeddings if not merge else ():
            set_vocabulary(model, layer, layer.frozen_vocabulary)

    def lora_ranks(self, model: nn.Module) -> list[int]:
        """Returns :meth:`MokaLinear.exact_lora_rank` of each layer, in model order."""
        return [layer.exact_lora_rank() for layer in moka_layers(model).values()]

    def options(self) -> dict[str, Any]:
        """Returns the configuration's fields."""
        return self.config.to_dict()

    def facts(self) -> dict[str, Any]:
        """Returns components, filters, gates (unless α is always 1), scaling and targets."""
        config = self.config
        rank = "" if config.rank is None else f", rank {config.rank}"
        weighted = config.components > 1 or can_move(config.gating, config.components)
        return {
            "components": config.components,
            "filters": describe_filters(config.filters) + rank,
            **({"gating": config.gating} if weighted else {}),
            "scaling": config.effective_scaling,
            "target modules": name_targets(config.target_modules),
            **({"trained tokens": len(tokens)} if (tokens := config.trainable_token_indices) else {}),
            **({"trained whole": ", ".join(config.modules_to_save)} if config.modules_to_save else {}),
        }

    def about(self, base: str) -> str:
        """Returns the equation of the adapted layers."""
        config = self.config
        if config.components == 1 and not can_move(config.gating, 1):
            told = f"A Kronecker adapter for `{base}`: `y = W x + s (A ⊗ B) x`."
        else:
            kind = "mixture" if config.gating == "none" else "gated mixture"
            told = f"A {kind} of Kronecker adapters for `{base}`: `y = W x + s Σ α_i (A_i ⊗ B_i) x`, "
            told += f"`{GATINGS[config.gating]}`."
        if config.rank is not None:
            told += (
                f" In every adapted layer this is exactly a LoRA of rank {config.components * config.rank}."
            )
        return told


@contextmanager
def _naming(layer: str) -> Iterator[None]:
    """Names the layer in what is refused within the block."""
    try:
        yield
    except ValueError as error:
        raise type(error)(f"{layer}: {error}") from None
