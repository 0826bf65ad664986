"""Weight files, which are compared with the model that ``config.json`` describes before any is read."""

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from moka_pl.errors import BackboneError, one_line
from moka_pl.utils import unfetched_reason

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

_FLOATS = {"F64", "F32", "F16", "BF16"}


class Stored(NamedTuple):
    """A tensor in a file.

    Attributes:
        file: Name of the file.
        dtype: As safetensors calls it.
        shape: Its sizes.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]


class WeightFiles(NamedTuple):
    """The weight files of a folder.

    Attributes:
        folder: The folder.
        size: Their bytes.
        tensors: What safetensors files hold, by name; none of other files.
    """

    folder: Path
    size: int
    tensors: dict[str, Stored]

    def check(self, model: "PreTrainedModel", name: str, quantised: bool) -> None:
        """Refuses files that do not hold the model.

        Args:
            model: The model, on the meta device.
            name: Its name, for messages.
            quantised: Whether the files hold quantised weights, whose sizes and dtypes are others.

        Raises:
            BackboneError: Naming the first tensor that does not fit.
        """
        parameters = sum(parameter.numel() for parameter in model.parameters())
        if parameters > 4 * self.size:
            raise BackboneError(
                f"{name} cannot be loaded: config.json describes {parameters:,} parameters, but the weight "
                f"files have {self.size:,} bytes; copy the model again"
            )
        for key, parameter in () if quantised else model.named_parameters():
            stored = self.tensors.get(key)
            if stored is None:
                continue
            if stored.shape != tuple(parameter.shape):
                raise BackboneError(
                    f"{name} cannot be loaded: {key} is {stored.shape} in {stored.file}, but "
                    f"{tuple(parameter.shape)} by config.json; copy the model again"
                )
            if stored.dtype not in _FLOATS:
                raise BackboneError(
                    f"{name} cannot be loaded: {key} in {stored.file} has the dtype {stored.dtype}, but "
                    "config.json names no quantisation; copy the model again"
                )

    def map_into(self, model: "PreTrainedModel") -> None:
        """Gives a model on the meta device the weights that the files hold just as it has them.

        They are mapped, not read: only what is looked at comes from the disk.
        """
        from safetensors import safe_open

        names: dict[str, list[str]] = {}
        for key, parameter in model.named_parameters():
            stored = self.tensors.get(key)
            if stored is not None and stored.shape == tuple(parameter.shape) and stored.dtype in _FLOATS:
                names.setdefault(stored.file, []).append(key)
        state: dict[str, Tensor] = {}
        for file, keys in names.items():
            with safe_open(self.folder / file, "pt") as opened:
                state |= {key: opened.get_tensor(key) for key in keys}
        model.load_state_dict(state, strict=False, assign=True)
        model.tie_weights()


def read_weight_files(folder: Path) -> WeightFiles | None:
    """Reads the heads of a folder's weight files; None where it has none.

    Raises:
        BackboneError: If one is damaged.
    """
    files = [file for file in sorted(folder.glob("*.safetensors")) if file.is_file()]
    tensors = {name: stored for file in files for name, stored in read_head(file).items()}
    others = list(folder.glob("*.bin"))
    for file in others:
        if (reason := unfetched_reason(file)) is not None:
            raise BackboneError(f"{folder} cannot be loaded: {reason}")
    size = sum(file.stat().st_size for file in [*files, *others])
    return WeightFiles(folder, size, tensors) if size else None


def read_head(file: Path) -> dict[str, Stored]:
    """Reads what a safetensors file says that it holds, by name; again only once it has changed.

    Raises:
        BackboneError: If it is damaged.
    """
    state = file.stat()
    return _read_head(file, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=1024)
def _read_head(file: Path, size: int, modified: int) -> dict[str, Stored]:
    from safetensors import SafetensorError, safe_open

    tensors = {}
    try:
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                part = opened.get_slice(name)
                tensors[name] = Stored(file.name, str(part.get_dtype()), tuple(part.get_shape()))
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        reason = unfetched_reason(file) or f"{file.name} is damaged ({one_line(error)}). Copy the model again"
        raise BackboneError(f"{file.parent} cannot be loaded: {reason}") from error
    return tensors
