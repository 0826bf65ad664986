"""Images as batches: splits, labels, flips, resuming, and folders that cannot be used."""

import shutil

import numpy
import pytest
import torch
from PIL import Image

from moka_pl.backbone import BackboneConfig
from moka_pl.errors import DataError, MokaWarning
from moka_pl.vision import DigitsData, ImageFolderData
from moka_pl.vision.backbone import load_processor
from moka_pl.vision.data import hold_out
from moka_pl.vision.images import check_header, open_image


@pytest.fixture
def connected(make_images, vit):
    """Builds data modules with the tiny ViT's image processor, set up."""

    def make(**options: object) -> ImageFolderData:
        data = make_images(**options)
        data.connect(load_processor(BackboneConfig(str(vit))))
        data.setup()
        return data

    return make


def batches(data):
    return [(batch["names"], batch["pixel_values"]) for batch in data.train_dataloader()]


def pixels_by_name(loader):
    return {n: p for batch in loader for n, p in zip(batch["names"], batch["pixel_values"], strict=True)}


def names(loader):
    return [name for batch in loader for name in batch["names"]]


def test_every_image_is_in_one_split_with_its_class(connected):
    data = connected()
    loaders = [data.train_dataloader(), data.val_dataloader(), data.test_dataloader()]
    found = [names(loader) for loader in loaders]
    assert [len(split) for split in found] == [10, 4, 4]
    assert len({name for split in found for name in split}) == 18
    for loader in loaders:
        for batch in loader:
            labels = [data.classes[label] for label in batch["labels"]]
            assert labels == [name.split("/")[0] for name in batch["names"]]
    assert [names(loader) for loader in loaders] == found
    assert data.epoch_length() == 3


def test_pixels_are_resized_and_normalised(connected, squares):
    data = connected(batch_size=18, validation_share=0, test_share=0)
    (batch,) = data.train_dataloader()
    assert batch["pixel_values"].shape == (18, 3, 8, 8)
    exact = batch["names"].index("red/more/0.png")  # 8 × 9 pixels: narrowed, but not shortened
    image = Image.open(squares / "red/more/0.png").resize((8, 8), Image.Resampling.BILINEAR)
    expected = numpy.asarray(image).transpose(2, 0, 1) / 127.5 - 1
    numpy.testing.assert_allclose(batch["pixel_values"][exact].numpy(), expected, atol=1e-5)


def test_flips_are_drawn_anew_in_each_epoch_and_again_for_the_same(connected):
    plain, data = pixels_by_name(connected().train_dataloader()), connected(flip=True)
    loader = data.train_dataloader()
    first = pixels_by_name(loader)
    flipped = {name for name, pixels in first.items() if torch.equal(pixels, plain[name].flip(2))}
    assert 0 < len(flipped) < len(first)
    assert all(torch.equal(pixels, plain[name]) for name, pixels in first.items() if name not in flipped)
    again = pixels_by_name(connected(flip=True).train_dataloader())
    assert all(torch.equal(pixels, again[name]) for name, pixels in first.items())
    loader.sampler.set_epoch(1)
    second = pixels_by_name(loader)
    assert not all(torch.equal(pixels, second[name]) for name, pixels in first.items())


def test_a_loader_goes_on_in_the_middle_of_an_epoch(connected):
    whole = batches(connected(flip=True))
    loader = connected(flip=True).train_dataloader()
    next(iter(loader))
    state = loader.state_dict()
    resumed = connected(flip=True).train_dataloader()
    resumed.load_state_dict(state)
    rest = [(batch["names"], batch["pixel_values"]) for batch in resumed]
    assert [n for n, _ in rest] == [n for n, _ in whole[1:]]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(rest, whole[1:], strict=True))
    other = connected(batch_size=3).train_dataloader()
    with pytest.raises(DataError, match="batch_size 4, now 3, flip True, now False"):
        other.load_state_dict(state)


def test_folders_of_splits_are_used(connected, squares, tmp_path):
    for split in ("train", "val"):
        (tmp_path / split).symlink_to(squares)
    data = connected(path=str(tmp_path))
    assert len(names(data.val_dataloader())) == 18
    assert len(names(data.train_dataloader())) == 14  # a share is for tests, as there is no such folder
    (tmp_path / "test/red").mkdir(parents=True)
    with pytest.raises(DataError, match="test has no such class: blue; give every split the same classes"):
        connected(path=str(tmp_path))


def test_splits_are_known_in_any_case_and_never_taken_for_classes(connected, squares, tmp_path):
    (tmp_path / "Test").symlink_to(squares)
    with pytest.raises(
        DataError, match=r"has a folder Test and none called train, .*; call the training images'"
    ):
        connected(path=str(tmp_path))
    (tmp_path / "Train").symlink_to(squares)
    data = connected(path=str(tmp_path))
    assert data.classes == ["blue", "red"]
    assert len(names(data.test_dataloader())) == 18
    (tmp_path / "other").symlink_to(squares)
    with pytest.warns(MokaWarning, match=r"taken from Train, Test alone, not from .* \(first other\)"):
        connected(path=str(tmp_path))
    (tmp_path / "training").symlink_to(squares)
    with pytest.raises(DataError, match="two folders for one split, Train and training; remove one of them"):
        connected(path=str(tmp_path))


def test_a_class_may_be_called_train(connected, squares, tmp_path):
    for name in ("bus", "train"):
        (tmp_path / name).symlink_to(squares / "red/more")
    assert connected(path=str(tmp_path)).classes == ["bus", "train"]
    (tmp_path / "bus").rename(tmp_path / "val")
    with pytest.raises(DataError, match="train has no folders of classes"):
        connected(path=str(tmp_path))


SHADES = numpy.linspace(0, 65535, 64).astype(numpy.uint16).reshape(8, 8)


@pytest.mark.parametrize("ending", ["png", "tiff", "pgm"])
def test_sixteen_bits_are_not_cut_off_at_eight(ending, tmp_path):
    file = tmp_path / f"grey.{ending}"
    if ending == "pgm":
        file.write_bytes(b"P5 8 8 65535 " + SHADES.astype(">u2").tobytes())
    else:
        Image.fromarray(SHADES).save(file)
    check_header(file)
    image = open_image(file)
    numpy.testing.assert_array_equal(numpy.asarray(image.convert("L")), SHADES >> 8)
    numpy.testing.assert_array_equal(numpy.asarray(image.convert("RGB"))[..., 1], SHADES >> 8)


@pytest.mark.parametrize("dtype", [numpy.float32, numpy.int32])
def test_pixels_without_a_range_are_refused_before_training(dtype, tmp_path):
    file = tmp_path / "grey.tiff"
    Image.fromarray(SHADES.astype(dtype)).save(file)
    for read in (check_header, open_image):
        with pytest.raises(DataError, match=r"grey.tiff .* 32-bit numbers, .*; use 8 or 16 bits"):
            read(file)


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda folder: None, r"has no folders of classes; give a folder with one folder for each"),
        (lambda folder: (folder / "red").mkdir(), r"has only the class 'red'"),
        (
            lambda folder: [(folder / name).mkdir() for name in ("blue", "red")],
            r"blue holds no images; add some \(files with the endings .bmp",
        ),
        (lambda folder: folder.rmdir(), r"is no folder; give one with a folder of images for each class"),
    ],
)
def test_refuses_folders_without_images(spoil, error, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    spoil(folder)
    with pytest.raises(DataError, match=error):
        ImageFolderData(str(folder)).setup()


def test_names_what_cannot_be_read(connected, squares, tmp_path):
    root = tmp_path / "squares"
    shutil.copytree(squares, root)
    (root / "notes.txt").write_text("no folder")
    cut = root / "red/1.png"
    cut.write_bytes(cut.read_bytes()[:-60])
    data = connected(path=str(root), validation_share=0, test_share=0)
    with pytest.raises(DataError, match=r"red/1\.png cannot be read as an image \(.*\); repair or remove it"):
        batches(data)
    (root / "red/9.png").write_bytes(b"no image")
    with pytest.raises(
        DataError, match=r"red/9\.png is no image of a format that Pillow knows"
    ):  # before any training
        connected(path=str(root))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"validation_share": 1.0}, "validation_share must be at least 0 and below 1, got 1.0"),
        ({"validation_share": 0.5, "test_share": 0.5}, "leave no images to train on"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"digits": [3]}, r"at least two different ones from 0 to 9, got \[3\]"),
        ({"digits": [3, 3]}, "at least two different ones"),
        ({"digits": [3, 12]}, "at least two different ones"),
    ],
)
def test_refuses_options(options, error):
    with pytest.raises(DataError, match=error):
        DigitsData(**options)


@pytest.mark.slow
def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    data = DigitsData([7, 1], validation_share=0, test_share=0, batch_size=400)
    data.connect(load_processor(BackboneConfig("vit-digits", weights="random")))
    data.setup()
    stored = load_digits()
    (batch,) = data.train_dataloader()
    order = [int(name.removeprefix("digit ")) for name in batch["names"]]
    assert sorted(order) == [i for i, target in enumerate(stored.target) if target in (1, 7)]
    assert [data.digits[label] for label in batch["labels"]] == stored.target[order].tolist()
    expected = stored.images[order][:, None] / 8 - 1  # (N, 1, 8, 8)
    numpy.testing.assert_allclose(batch["pixel_values"].numpy(), expected, atol=0.005)


def test_shares_are_of_every_class_and_depend_on_names_alone(connected):
    images = connected(validation_share=0, test_share=0)._sets["train"]
    parts = hold_out(images, {"test": 0.3, "validation": 0.2})
    counts = {split: [part.labels.count(label) for label in (0, 1)] for split, part in parts.items()}
    assert counts == {"train": [4, 4], "test": [3, 3], "validation": [2, 2]}
    shuffled = images.select(list(reversed(range(18))))
    again = hold_out(shuffled, {"test": 0.3, "validation": 0.2})
    assert {s: set(p.names) for s, p in again.items()} == {s: set(p.names) for s, p in parts.items()}
