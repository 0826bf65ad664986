"""Converts GGUF files once into an ordinary model folder, which loads in seconds."""

import hashlib
import json
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from moka_pl.backbone.gguf_tokenizer import (
    check_tokenizer,
    count_weights,
    read_metadata,
    read_tokenizer,
    set_special_tokens,
)
from moka_pl.backbone.loading import check_room, loading, progress_bars, writable
from moka_pl.errors import BackboneError
from moka_pl.utils import replaced_folder, unfetched_reason

_LAYOUT = 2  # raise when a conversion of the same file would come out differently
_FLOAT32 = 4  # bytes of a converted weight


def convert_gguf(file: Path, cache: Path) -> Path:
    """Dequantises a GGUF file into a folder of float32 safetensors, configuration and tokenizer.

    The folder lies in ``cache``, named after the file and its size and time, and after the versions of what
    converts it: another one may read a file differently. Several processes may convert at once; one does the
    work. The tokenizer is compared with what the file says about it.

    Raises:
        BackboneError: If the file is missing or cannot be read, the ``gguf`` package is absent, or the
            tokenizer comes out as another one.
    """
    if not file.is_file():
        raise BackboneError(f"{file}: no such GGUF file")
    status = file.stat()
    converters = " ".join(f"{name} {_version(name)}" for name in ("transformers", "gguf", "tokenizers"))
    key = hashlib.sha256(
        f"{_LAYOUT} {converters} {file.resolve()} {status.st_size} {status.st_mtime_ns}".encode()
    )
    target = cache / "converted" / f"{file.stem}-{key.hexdigest()[:12]}"
    if target.is_dir():
        return target
    from filelock import FileLock

    with writable(target.parent), FileLock(str(target) + ".lock"):
        if not target.is_dir():
            _convert(file, target)
    return target


def _convert(file: Path, target: Path) -> None:
    if find_spec("gguf") is None:
        raise BackboneError(
            "reading a GGUF file needs the gguf package: pip install 'moka_pl[demo]' (or pip install gguf)"
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if (reason := unfetched_reason(file)) is not None:
        raise BackboneError(f"{file} cannot be loaded: {reason}")
    with loading(str(file)):
        check_room(target, _FLOAT32 * count_weights(file))
    print(f"Converting {file.name} once (cached in {target}) ...", flush=True)
    with progress_bars(show=False):
        with loading(str(file)):
            metadata = read_metadata(file)
            tokenizer = read_tokenizer(file, metadata)
            model = AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, dtype=torch.float32
            )
            set_special_tokens(tokenizer, model, metadata)
        # The weights are plain float32 now; with the GGUF entry transformers would refuse to save them.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer = None
        with replaced_folder(target) as new:
            model.save_pretrained(new)
            tokenizer.save_pretrained(new)
            with loading(str(file)):
                check_tokenizer(AutoTokenizer.from_pretrained(new), metadata, file)
            _drop_unknown_tokens(new / "tokenizer.json", model.get_input_embeddings().weight.shape[0])


def _drop_unknown_tokens(file: Path, rows: int) -> None:
    """Takes out tokens that transformers added and the model has no embedding for."""
    if file.is_file():
        content = json.loads(file.read_text(encoding="utf-8"))
        content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < rows]
        file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"
