"""Results of an evaluation, kept on disk for runs that would compute the same, bit for bit."""

import contextlib
import json
import platform
import re
import warnings
from collections.abc import Iterable
from dataclasses import asdict
from functools import cache
from hashlib import blake2b
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moka_pl.adapters.layer import MokaLinear
from moka_pl.backbone.quantization import dense_weight, is_quantised
from moka_pl.data.batching.collate import BatchRows
from moka_pl.data.batching.samplers import EvalSampler
from moka_pl.data.encoding.digest import rows_digest
from moka_pl.errors import MokaWarning
from moka_pl.evaluation.results import Counts, Results, SetCounts
from moka_pl.utils import replaced_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: What computes, beside this package.
_LIBRARIES = ("torch", "transformers", "bitsandbytes", "peft", "liger-kernel", "triton", "lightning")
_PACKAGE = Path(__file__).parents[1]
#: Words of a tensor that are summed at a time: on a CPU in its cache, on a GPU in few launches.
_WORDS, _GPU_WORDS = 1 << 16, 1 << 22
#: The polynomial's argument, odd: 2⁶⁴ by the golden ratio, as a signed number.
_BASE = -7046029254386353131


class KeptResults:
    """The file of one evaluation: what decides its results, these, and a hash of both.

    Args:
        folder: Where all such files are.
        settings: Everything that decides the results, as JSON values.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self._settings = json.loads(json.dumps(settings))
        self.file = folder / f"{_hash(self._settings)}.json"

    def read(self) -> Results | None:
        """Returns the results; None where there are none. A damaged file is removed, with a warning."""
        try:
            stored = json.loads(self.file.read_bytes())
            if stored.pop("hash") != _hash(stored) or stored["settings"] != self._settings:
                raise ValueError("its hash is not that of its contents")
            return _results(stored["results"])
        except OSError:
            return None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            warnings.warn(f"{self.file} is damaged ({error}); it is computed anew", MokaWarning, stacklevel=2)
            with contextlib.suppress(OSError):
                self.file.unlink()
            return None

    def write(self, results: Results) -> None:
        """Keeps results if they are finite; where the disk cannot be written, the next run computes them."""
        contents = {"settings": self._settings, "results": asdict(results)}
        with contextlib.suppress(OSError, ValueError):
            text = json.dumps(contents | {"hash": _hash(contents)}, indent=1, allow_nan=False)
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with replaced_file(self.file) as file:
                file.write(text.encode())


def _hash(contents: Any) -> str:
    text = json.dumps(contents, sort_keys=True)
    return blake2b(text.encode(), digest_size=16).hexdigest()


def _results(stored: dict[str, Any]) -> Results:
    """Builds results from their fields."""
    sets = [
        SetCounts(**(one | {"tasks": {name: Counts(**counts) for name, counts in one["tasks"].items()}}))
        for one in stored["sets"]
    ]
    return Results(sets, stored["groups"])


# What decides results


def model_hash(model: "PreTrainedModel") -> str:
    """Returns a hash of a model's configuration and of all weights, quantised ones as what they stand for.

    The adapter of a layer whose update is zero is left out.
    """
    names, sums = [], []
    keys = _keys(model.device)
    for name, module in model.named_modules():
        still = isinstance(module, MokaLinear) and _is_zero(module)
        for own, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if own == "weight" and is_quantised(module):
                tensor = dense_weight(module)
            names.append(f"{name}.{own} {tuple(tensor.shape)} {tensor.dtype}")
            if not (still and own.startswith("moka_")):
                sums.append(_checksum(tensor.detach().to(keys.device), keys))
    # A GPU is waited for once.
    return _hash([model.config.to_json_string(use_diff=False), names, torch.stack(sums).tolist()])


def _is_zero(layer: MokaLinear) -> bool:
    factors = [factor for factor in (layer.moka_A, layer.moka_B) if factor is not None]
    return not all(bool(factor.any()) for factor in factors)


def _keys(device: torch.device) -> Tensor:
    """Draws odd numbers of 64 bits, always the same, for the words that are summed at a time."""
    count = _WORDS if device.type == "cpu" else _GPU_WORDS
    keys = torch.randint(-(1 << 63), (1 << 63) - 1, (count,), generator=torch.Generator().manual_seed(0))
    return (keys | 1).to(device)


def _checksum(tensor: Tensor, keys: Tensor) -> Tensor:
    """Returns a sum mod 2⁶⁴ over the words x of 4 bytes: another if any one of them differs.

    Of each part of K words it is ``Σ k_i x_i`` with the keys k, and those of parts are the coefficients of a
    polynomial. Keys without a pattern tell apart what differs in one, such as a matrix and its double.
    """
    raw = tensor.contiguous().flatten().view(torch.uint8)  # (bytes,)
    if len(raw) % 4:  # padding by nothing would be a copy, too
        raw = F.pad(raw, (0, -len(raw) % 4))
    words = (raw if raw.data_ptr() % 4 == 0 else raw.clone()).view(torch.int32)  # (words,)
    total = keys.new_zeros(())
    for start in range(0, len(words), len(keys)):
        part = words[start : start + len(keys)]
        total = total * _BASE + (part * keys[: len(part)]).sum()
    return total


def batch_settings(loaders: Iterable[Any]) -> list[Any] | None:
    """Describes the batches of evaluation; None where loaders are not the package's own."""
    found = []
    for loader in loaders:
        rows, sampler = getattr(loader, "dataset", None), getattr(loader, "sampler", None)
        if not isinstance(rows, BatchRows) or not isinstance(sampler, EvalSampler):
            return None
        batches = [batch.tolist() for batch in sampler.global_batches()]
        found.append([rows_digest(rows.rows), rows.pad_id, str(rows.share), _hash(batches)])
    return found


def machine_settings(device: torch.device) -> dict[str, Any]:
    """Describes what computes: this package's code, the libraries and the device with its switches."""
    name: list[Any]
    if device.type == "cuda":
        name = [torch.cuda.get_device_name(device), torch.version.cuda]
    else:
        name = [_processor(), torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()]
    return {
        "code": _code(),
        "libraries": {name: _version(name) for name in _LIBRARIES},
        "device": [device.type, *name],
        "products": [
            torch.get_float32_matmul_precision(),
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
            torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
            torch.are_deterministic_algorithms_enabled(),
        ],
    }


@cache
def _code() -> str:
    """Returns a hash of the package's source but for its studies."""
    digest = blake2b(digest_size=16)
    for file in sorted(_PACKAGE.rglob("*.py")):
        path = file.relative_to(_PACKAGE).as_posix()
        if not path.startswith("studies/"):
            digest.update(path.encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


@cache
def _processor() -> str:
    with contextlib.suppress(OSError):  # elsewhere than on Linux
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        if (found := re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)) is not None:
            return found[1]
    return platform.processor() or platform.machine()


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None
