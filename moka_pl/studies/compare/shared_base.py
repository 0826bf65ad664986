"""One frozen base that adapters are put into and taken out of again."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from moka_pl.backbone import BackboneConfig, load_backbone
from moka_pl.backbone.load import Backbone
from moka_pl.studies.benchmark.bench import structure
from moka_pl.studies.memory import free_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Checksums = list[int]

#: Whole numbers by their size in bytes.
_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class _Loaded:
    backbone: Backbone
    children: list[tuple[nn.Module, dict[str, nn.Module | None]]]
    structure: list[tuple[object, ...]]
    checksums: Checksums
    attention: str


class SharedBase:
    """Loads a base once, for as long as runs ask for the same one and leave it as it was."""

    def __init__(self) -> None:
        self._config: BackboneConfig | None = None
        self._loaded: _Loaded | None = None
        self.loads = 0

    def get(self, config: BackboneConfig, device: torch.device | str) -> Backbone:
        """The base, on a device, frozen and without adapters.

        Args:
            config: Which base; another one than before takes its place.
            device: Where it is wanted.
        """
        if self._loaded is None or self._config != config:
            self.drop()
            backbone = load_backbone(config, device)
            model = backbone.model
            self._config = config
            self._loaded = _Loaded(
                backbone,
                [(module, dict(module._modules)) for module in model.modules()],
                structure(model),
                checksums(model),
                model.config._attn_implementation,
            )
            self.loads += 1
        self._loaded.backbone.model.to(device)
        return self._loaded.backbone

    def restore(self) -> bool:
        """Takes out whatever a run put in.

        The layers that adapters took the place of are put back; if the model then still differs in a module,
        a hook, a parameter or its way of attention, it is given up and loaded again for the next run.

        Returns:
            Whether the base is as it was.
        """
        if self._loaded is None:
            return False
        loaded, model = self._loaded, self._loaded.backbone.model
        for module, children in loaded.children:
            if module._modules != children:
                module._modules.clear()
                module._modules.update(children)
        vars(model).pop("peft_config", None)  # of PEFT's methods, which warn of it when they find it
        model.requires_grad_(False)
        model.zero_grad(set_to_none=True)
        if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            model.gradient_checkpointing_disable()
        if model.config._attn_implementation != loaded.attention:
            model.set_attn_implementation(loaded.attention)
        model.eval()
        clean = structure(model) == loaded.structure and checksums(model) == loaded.checksums
        if not clean:
            self.drop()
        return clean

    def drop(self) -> None:
        """Gives the model's memory back."""
        self._loaded = self._config = None
        free_memory()


@torch.no_grad()
def checksums(model: "PreTrainedModel") -> Checksums:
    """A sum of the bits of every parameter, which any training changes, shape (parameters,).

    Whole numbers, added where the parameters are: their order does not matter, and one copy brings them all.
    """
    return torch.stack([_sum(parameter) for parameter in model.parameters()]).tolist()


def _sum(tensor: Tensor) -> Tensor:
    whole = _WHOLE[tensor.element_size()]
    return tensor.detach().contiguous().view(whole).sum(dtype=torch.int64)
