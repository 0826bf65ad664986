"""What lies in a model folder, checked before anything else of it is read: cheap, however large it is."""

import json
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from moka_pl.backbone.weight_files import read_head, read_weight_files
from moka_pl.errors import BackboneError, one_line
from moka_pl.utils import unfetched_reason

#: Each kind of weight files: the one file that is taken where it is there, and the index of several.
_WEIGHTS = {
    "model.safetensors": "model.safetensors.index.json",
    "pytorch_model.bin": "pytorch_model.bin.index.json",
}
#: Files of a tokenizer that hold JSON.
_TOKENIZER_JSON = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "added_tokens.json")
#: What a tokenizer's vocabulary may lie in.
_VOCABULARIES = ("tokenizer.json", "*.model", "vocab.*", "tekken.json", "*.tiktoken")


def check_folder(folder: Path) -> None:
    """Refuses a model folder that holds an adapter, too, or an index that names files elsewhere.

    Raises:
        BackboneError: Naming the file and the value.
    """
    if not (folder / "config.json").is_file():
        raise BackboneError(f"{folder} is not a model folder: it has no config.json")
    if (folder / "adapter_config.json").exists():
        raise BackboneError(
            f"{folder} holds an adapter beside the model (adapter_config.json), which transformers would put "
            "into it; merge it into the model, or move it elsewhere"
        )
    for name in _WEIGHTS.values():
        if not (folder / name).is_file():
            continue
        try:
            outside = [file for file in _indexed(folder / name).values() if _is_outside(file)]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BackboneError(
                f"{folder} cannot be loaded: {name} is damaged ({one_line(error)}); copy the model again"
            ) from error
        if outside:
            raise BackboneError(
                f"{folder} cannot be loaded: {name} names {min(outside)!r}, outside of the folder"
            )


def check_weights(folder: Path, name: str) -> None:
    """Refuses a folder whose weight files are missing, damaged, or not what their index says.

    Of the files only the heads are read.

    Args:
        folder: The folder.
        name: The model's name, for messages.

    Raises:
        BackboneError: Naming the file.
    """
    if read_weight_files(folder) is None:
        raise BackboneError(
            f"{name} cannot be loaded: it has no weights ({' or '.join(_WEIGHTS)}); copy or "
            "download the model again"
        )
    for single, index in _WEIGHTS.items():
        if (folder / single).is_file():
            return  # it is taken, whatever an index says
        if not (folder / index).is_file():
            continue
        for key, file in _indexed(folder / index).items():
            if not (folder / file).is_file():
                raise BackboneError(
                    f"{name} cannot be loaded: {file}, which {index} names, is not there; copy or download "
                    "the model again"
                )
            if file.endswith(".safetensors") and key not in read_head(folder / file):
                raise BackboneError(
                    f"{name} cannot be loaded: {file} has no {key}, which {index} says it has; copy or "
                    "download the model again"
                )
        return


def tokenizer_fault(folder: Path) -> str | None:
    """Tells what is wrong with the files of a tokenizer that cannot be loaded; None if nothing shows."""
    for name in _TOKENIZER_JSON:
        file = folder / name
        if not file.is_file():
            continue
        if (reason := unfetched_reason(file)) is not None:
            return reason
        try:
            if not isinstance(json.loads(file.read_text(encoding="utf-8")), dict):
                return f"{name} is damaged (it holds no object); copy it again"
        except (OSError, ValueError, RecursionError) as error:
            return f"{name} is damaged ({one_line(error)}); copy it again"
    if not any(file.is_file() for pattern in _VOCABULARIES for file in folder.glob(pattern)):
        return "it has no tokenizer.json (or tokenizer.model); copy it from where the model is from"
    return None


def _indexed(file: Path) -> Mapping[str, str]:
    """Reads an index: the file of each tensor."""
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
    return dict(found.items())


def _is_outside(file: str) -> bool:
    return PurePath(file).name != file or "\\" in file
