"""Where a written model is read to: into memory, or layer by layer when it computes."""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

#: Bytes of a model, or of the part of a larger one, that are held in memory on a CPU.
_HELD = 2**31
#: The part of a tensor's name that its whole layer has.
_LAYER = re.compile(r".*?\.\d+\.")


def largest_layer(sizes: Iterable[tuple[str, int]]) -> int:
    """Returns the size of the largest decoder layer, or of a tensor outside them that is larger.

    Args:
        sizes: Name and size of each tensor.
    """
    layers: Counter[str] = Counter()
    for name, size in sizes:
        found = _LAYER.match(name)
        layers[found[0] if found else name] += size
    return max(layers.values(), default=0)


def placement(folder: Path, device: torch.device, size: int, layer: int) -> dict[str, Any]:
    """Tells transformers where to put a model beside the one that it came from.

    What has no room stays in its files: every layer is read when it computes. As all prompts are computed at
    once, that takes no longer than loading the model.

    Args:
        folder: The model's folder.
        device: Where it computes.
        size: Bytes that it takes there.
        layer: Bytes of its largest layer.
    """
    import psutil

    if device.type == "cuda":
        torch.cuda.empty_cache()
        room = 3 * torch.cuda.mem_get_info(device)[0] // 4  # the rest is for activations
        memory: dict[int | str, int] = {device.index or 0: room, "cpu": 0}
    else:
        room = min(psutil.virtual_memory().available // 2, _HELD)
        # accelerate keeps room for the largest layer, and before 1.15 takes no model of which nothing else
        # is in memory.
        memory = {"cpu": max(room, 2 * layer)}
    if size <= room:
        return {"device_map": {"": device}}
    return {"device_map": "auto", "max_memory": memory, "offload_folder": str(folder.parent / "offload")}
