"""Images in folders that are named after their classes, as torchvision's ImageFolder has them."""

from collections.abc import Mapping
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from moka_pl.errors import DataError
from moka_pl.utils import expanded, warn
from moka_pl.vision.data import ImageData, ImageSet
from moka_pl.vision.images import ENDINGS, check_header, is_hidden, open_image

#: Folders of the splits, of which ``train`` has to be there.
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}


class ImageFolderData(ImageData):
    """Images below folders that are named after their classes: ``path/cat/1.png``, ``path/dog/2.png``.

    With a folder ``train`` (and ``val``, ``test``) in ``path``, those hold the classes:
    ``path/train/cat/1.png``. Classes are numbered in the order of their names. Further folders below a class
    belong to it.

    Args:
        path: The folder.
        **options: batch_size, eval_batch_size, num_workers, seed, validation_share, test_share, flip (see
            ImageData).

    Raises:
        DataError: There are no images, fewer than two classes, other classes in ``val`` and ``test``, or
            these without ``train``.
    """

    name = "images"

    def __init__(self, path: str, **options: Any) -> None:
        super().__init__(**options)
        self.path = path

    @cached_property
    def classes(self) -> list[str]:
        """Names of the folders with training images."""
        folder = self._folders["train"]
        names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not is_hidden(entry))
        if len(names) < 2:
            found = f"only the class {names[0]!r}" if names else "no folders of classes"
            raise DataError(
                f"{folder} has {found}; give a folder with one folder for each of at least two classes"
            )
        return names

    @cached_property
    def _folders(self) -> dict[str, Path]:
        """The folder of each split that has its own; ``train`` is always there."""
        root = expanded(self.path)
        if not root.is_dir():
            raise DataError(f"{root} is no folder; give one with a folder of images for each class")
        found = _split_folders(root)
        if found and "train" not in found:
            raise DataError(
                f"{root} has a folder {next(iter(found.values())).name} and none called train, so that they "
                "could be splits or classes; call the training images' folder train, or rename that class"
            )
        return found or {"train": root}

    def load(self) -> Mapping[str, ImageSet]:
        """Finds the images of every split, and looks at the beginning of each file."""
        return {split: self._find(folder) for split, folder in self._folders.items()}

    def _find(self, folder: Path) -> ImageSet:
        present = {entry.name for entry in folder.iterdir() if entry.is_dir() and not is_hidden(entry)}
        if other := sorted(present.symmetric_difference(self.classes)):
            has = "a class that the training images do not have" if other[0] in present else "no such class"
            raise DataError(f"{folder} has {has}: {other[0]}; give every split the same classes")
        files: list[Path] = []
        labels: list[int] = []
        ignored: list[Path] = []
        for number, name in enumerate(self.classes):
            every = sorted(
                file for file in (folder / name).rglob("*") if file.is_file() and not is_hidden(file)
            )
            own = [file for file in every if file.suffix.lower() in ENDINGS]
            ignored += [file for file in every if file.suffix.lower() not in ENDINGS]
            if not own:
                raise DataError(
                    f"{folder / name} holds no images; add some (files with the endings "
                    f"{', '.join(ENDINGS)}), or remove the folder"
                )
            files += own
            labels += [number] * len(own)
        if ignored:
            warn(f"{folder}: {len(ignored)} files are no images by their names (first {ignored[0]})")
        digest = sha256()
        for file in files:
            digest.update(f"{file.relative_to(folder)}\n{check_header(file)}\n".encode())
        names = [file.relative_to(folder).as_posix() for file in files]
        return ImageSet(names, labels, digest.hexdigest(), files, open_image)


def _split_folders(root: Path) -> dict[str, Path]:
    """Returns the folder of each split, whatever case its name has; none where there are only classes.

    Beside other folders, one that is called train and holds images alone is a class like these.

    Raises:
        DataError: If two folders are called after one split.
    """
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir() and not is_hidden(entry))
    known = {name for names in _SPLITS.values() for name in names}
    others = [folder.name for folder in folders if folder.name.lower() not in known]
    found: dict[str, Path] = {}
    for split, names in _SPLITS.items():
        named = [folder for folder in folders if folder.name.lower() in names]
        named = [folder for folder in named if not others or _holds_folders(folder)]
        if len(named) > 1:
            raise DataError(
                f"{root} has two folders for one split, "
                f"{named[0].name} and {named[1].name}; remove one of them"
            )
        if named:
            found[split] = named[0]
    if "train" in found and others:
        splits = ", ".join(folder.name for folder in found.values())
        warn(f"{root}: images are taken from {splits} alone, not from the folders beside (first {others[0]})")
    return found


def _holds_folders(folder: Path) -> bool:
    return any(entry.is_dir() and not is_hidden(entry) for entry in folder.iterdir())
