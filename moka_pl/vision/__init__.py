"""Image classification: models, images and the LightningModule, with the adapters of the rest."""

from moka_pl.vision.classifier import load_classifier
from moka_pl.vision.data import ImageData
from moka_pl.vision.digits import DigitsData
from moka_pl.vision.folders import ImageFolderData
from moka_pl.vision.module import VisionModule

__all__ = ["DigitsData", "ImageData", "ImageFolderData", "VisionModule", "load_classifier"]
