"""A tiny vision transformer in a folder, and coloured squares in folders of classes."""

from pathlib import Path

import numpy
import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification

from moka_pl.adapters import MokaConfig
from moka_pl.backbone import BackboneConfig
from moka_pl.callbacks import AdapterCheckpoint
from moka_pl.vision import ImageFolderData, VisionModule

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    # The usual 0.02 would make so small a network almost blind to its input.
    "initializer_range": 0.3,
}
CLASSES = ("blue", "red")


@pytest.fixture(scope="session")
def vit(tmp_path_factory) -> Path:
    """A random ViT for three classes of its own, saved by transformers; images of 8 × 8 pixels."""
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    ViTForImageClassification(ViTConfig(**SIZES, num_labels=3)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def squares(tmp_path_factory) -> Path:
    """Noisy squares, 9 of each colour, of several sizes and modes."""
    root, random = tmp_path_factory.mktemp("squares"), numpy.random.default_rng(0)
    for channel, name in ((2, "blue"), (0, "red")):
        (root / name / "more").mkdir(parents=True)
        for number in range(9):
            pixels = random.integers(0, 120, (8 + number, 9, 3))
            pixels[..., channel] += 130
            image = Image.fromarray(pixels.astype(numpy.uint8))
            folder = root / name if number % 2 else root / name / "more"
            image.convert("RGBA" if number == 3 else "RGB").save(folder / f"{number}.png")
    return root


@pytest.fixture
def make_images(squares):
    """Builds data modules of the squares; options go to ``ImageFolderData``."""

    def make(**options: object) -> ImageFolderData:
        shares = {"validation_share": 0.2, "test_share": 0.2}
        return ImageFolderData(**({"path": str(squares), "batch_size": 4} | shares | options))

    return make


@pytest.fixture
def make_vision(vit, one_thread):
    """Builds modules on the tiny ViT; options go to ``VisionModule``."""

    def make(adapter: object = None, lr: float = 1e-2, **options: object) -> VisionModule:
        defaults = {
            "backbone": BackboneConfig(str(vit), quantization="none"),
            "adapter": adapter or MokaConfig(components=2),
            "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0),
        }
        return VisionModule(**(defaults | options))

    return make


@pytest.fixture(scope="session")
def adapter(vit, squares, tmp_path_factory) -> Path:
    """The adapter directory of a module after two epochs, in all linear layers; not to be changed."""
    folder = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(0)
    module = VisionModule(
        BackboneConfig(str(vit), quantization="none"),
        MokaConfig(components=2, filters=[[2, 4]], target_modules="all-linear"),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    )
    options = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,
        callbacks=[AdapterCheckpoint(dirpath=str(folder))],
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=2,
        **options,
    )
    trainer.fit(module, ImageFolderData(str(squares), batch_size=4, validation_share=0.2, test_share=0.2))
    return folder / "last"
