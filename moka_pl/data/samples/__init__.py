"""Small corpora that come with the package, so that every command runs without a download."""

from importlib.resources import files
from pathlib import Path

from moka_pl.errors import DataError


def sample_path(name: str) -> Path:
    """Returns the path of the sample file with this name, with or without its suffix (``"chat_train"``).

    Raises:
        DataError: No sample has this name.
    """
    folder = Path(str(files(__name__)))
    path = folder / f"{name.removesuffix('.jsonl')}.jsonl"
    if not path.is_file():
        known = ", ".join(sorted(sample.stem for sample in folder.glob("*.jsonl")))
        raise DataError(f"there is no sample named {name!r}. Choose one of: {known}")
    return path
