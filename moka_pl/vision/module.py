"""The LightningModule for images: a frozen classifier with adapters, and a head that is trained whole."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.nn import functional as F

from moka_pl.adapters import AdapterConfig, FullFineTuning, MokaConfig
from moka_pl.adapters.filters import AUTO
from moka_pl.backbone import BackboneConfig
from moka_pl.data.types import Batch, ChoiceBatch, EvalBatch
from moka_pl.errors import AdapterError, ConfigError
from moka_pl.lm.scoring import IGNORE_INDEX, TokenScores
from moka_pl.training.accidents.spikes import SpikeOptions
from moka_pl.training.course import Change
from moka_pl.training.learning_rates import LearningRateRatios
from moka_pl.training.module import MokaModule
from moka_pl.training.schedule import WarmupDecay
from moka_pl.vision.backbone import ImageBackbone, load_image_backbone, load_processor
from moka_pl.vision.classifier import adapter_labels
from moka_pl.vision.data import ImageBatch, ImageData

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedModel

_BACKBONE, _ADAPTER = BackboneConfig("vit-digits"), MokaConfig()
_RATIOS, _SPIKES = LearningRateRatios(), SpikeOptions()


class VisionModule(MokaModule):
    """Fine-tunes a frozen image classifier of transformers with adapters, and trains its head as a whole.

    The loss is the mean cross-entropy of the images of an optimizer step, −log p(class), in nats. Linear
    layers get adapters; convolutions and norms stay as they are. If the classes are not the base's own, its
    head is replaced by one that starts at zero.

    Args:
        backbone: The image classifier: a hub id or a folder, or with ``weights: random`` the shape
            ``vit-digits`` or a folder with a ``config.json``. ``kernels`` and ``compile`` are for language
            models.
        adapter: The adapter's configuration, as :class:`moka_pl.MokaModule` takes it. The head is added to
            its ``modules_to_save``, or to the modules of ``FullFineTuning``.
        adapter_path: An adapter directory to start from; its configuration replaces ``adapter``.
        labels: The classes in their order; None takes those of the data.
        optimizer: Builds the optimizer from the trainable parameters.
        lr_scheduler: Builds the learning-rate scheduler, stepped after every optimizer step.
        gradient_checkpointing: Recompute activations in the backward pass.
        learning_rate_ratios: Multiples of the optimizer's learning rate for the left factors, the right
            factors and the gates; the head has the optimizer's.
        allow_changes: What may differ from the run that a checkpoint resumes, as in
            :class:`moka_pl.MokaModule`.
        max_non_finite_steps: A step whose loss or gradient is not finite is skipped; this many in a row end
            the run.
        loss_spikes: Which losses are spikes, and what is done about them.

    Raises:
        ConfigError: If filters or start are to be chosen by a gradient, which a head of zeros lets through to
            no layer.
    """

    tokenizer = cast(Any, None)  # there is no text
    classifies = True
    next_command = "export {adapter} --to merged"

    def __init__(
        self,
        backbone: BackboneConfig = _BACKBONE,
        adapter: AdapterConfig = _ADAPTER,
        adapter_path: str | None = None,
        labels: list[str] | None = None,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.0),
        lr_scheduler: LRSchedulerCallable = lambda o: WarmupDecay(o),
        gradient_checkpointing: bool = False,
        learning_rate_ratios: LearningRateRatios = _RATIOS,
        allow_changes: list[Change] | None = None,
        max_non_finite_steps: int = 5,
        loss_spikes: SpikeOptions = _SPIKES,
    ) -> None:
        super().__init__(
            backbone=backbone,
            adapter=adapter,
            adapter_path=adapter_path,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            gradient_checkpointing=gradient_checkpointing,
            learning_rate_ratios=learning_rate_ratios,
            allow_changes=allow_changes,
            max_non_finite_steps=max_non_finite_steps,
            loss_spikes=loss_spikes,
        )
        if backbone.new_tokens:
            raise ConfigError(f"backbone.new_tokens {backbone.new_tokens} are for texts; leave them out")
        if self._deferred.pending:
            option = "filters: auto" if self.adapter.filters == AUTO else "start: gradient"
            raise ConfigError(
                f"{option} follows the first gradient, which a new head of zeros lets through to no layer; "
                "set filters: diverse and start: zero"
            )
        if labels is not None and len(set(labels)) < max(2, len(labels)):
            raise ConfigError(f"labels must be at least two different classes, not {labels}")
        self.labels = labels
        if adapter_path is not None:
            self._check_labels(adapter_labels(adapter_path), f"the adapter {adapter_path}")
        self._heads: list[str] = []

    @cached_property
    def image_processor(self) -> "BaseImageProcessor":
        """Resizes and normalises images as the model needs them (loaded without the model)."""
        return load_processor(self.backbone)

    @property
    def adapter_extra(self) -> dict[str, Any]:
        """The classes, which adapter directories keep."""
        return {"labels": self.labels}

    # Building

    def setup(self, stage: str) -> None:
        """Takes over the data's classes, and refuses before the model is loaded what cannot work."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, ImageData):
            self._check_labels(data.classes, f"data {type(data).__name__}")
        elif data is not None:
            raise ConfigError(
                f"VisionModule classifies images, and {type(data).__name__} has none; use "
                "moka_pl.ImageFolderData or moka_pl.DigitsData"
            )
        super().setup(stage)

    def _check_labels(self, found: Sequence[str], source: str) -> None:
        """Takes over classes, or refuses them where others are known already."""
        if self.labels is None:
            self.labels = list(found)
        if self.labels == list(found):
            return
        where = "" if self.adapter_path is None else f" of {self.adapter_path}"
        theirs, ours = (f"{len(names)} classes ({_few(names)})" for names in (found, self.labels))
        raise AdapterError(
            f"{source} has {theirs}, but the model{where} {ours}; give data of the same classes"
        )

    def load_base(self) -> ImageBackbone:
        """Loads the frozen classifier with a head for the classes."""
        if self.labels is None:
            raise ConfigError("the classes are not known: give labels, or fit with moka_pl's image data")
        loaded = load_image_backbone(self.backbone, self.labels, self.device)
        self._heads = loaded.heads
        if loaded.new_head and self.adapter_path is None:
            loaded.notes.append(f"a new head for {len(self.labels)} classes, which starts at zero")
        return loaded

    def _inject_into(self, model: "PreTrainedModel") -> None:
        if self.adapter_path is None:
            self.adapter = with_heads(self.adapter, self._heads)
        super()._inject_into(model)

    # Training and evaluation

    def logits(self, batch: ImageBatch) -> Tensor:
        """Computes the logits of a batch's images, (B, C), float32."""
        model = self.causal_lm
        return cast(Tensor, model(pixel_values=batch["pixel_values"].to(model.dtype)).logits).float()

    def token_scores(self, batch: Batch) -> TokenScores:
        """Scores the images of a batch: −log p of each one's class, and its row."""
        images = cast(ImageBatch, batch)
        rows = (images["labels"] != IGNORE_INDEX).nonzero()[:, 0]  # (N,)
        nll = F.cross_entropy(self.logits(images)[rows], images["labels"][rows], reduction="none")  # (N,)
        return TokenScores(nll, rows)

    def validation_step(self, batch: EvalBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Adds a batch to the metrics: each image is a question, and the classes are its options.

        Args:
            batch: Images with their classes.
            batch_idx: Unused.
            dataloader_idx: Number of the evaluation set.
        """
        assert self._metrics is not None
        images = cast(ImageBatch, batch)
        scores, labels = self.logits(images).log_softmax(1), images["labels"]  # (B, C), (B,)
        real = labels != IGNORE_INDEX  # (B,)
        classes = torch.arange(scores.shape[1], device=labels.device)  # (C,)
        right = labels[:, None] == classes  # (B, C)
        self._metrics.update_loss(dataloader_idx, -scores[right].sum(), real.sum())
        options = {
            "item": torch.arange(len(labels), device=labels.device).repeat_interleave(len(classes)),  # (B·C,)
            "task": torch.where(real, 0, -1).repeat_interleave(len(classes)),  # (B·C,)
            "is_answer": right.flatten(),  # (B·C,)
        }
        ones = torch.ones_like(options["item"])
        self._metrics.update_choices(
            dataloader_idx, scores.flatten(), cast(ChoiceBatch, options), tokens=ones
        )

    test_step = validation_step

    def predict_step(self, batch: EvalBatch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Returns ``log_probabilities`` of the classes, (B, C), and the ``names`` of the images.

        Args:
            batch: Images.
            batch_idx: Unused.
            dataloader_idx: Unused.
        """
        images = cast(ImageBatch, batch)
        return {"log_probabilities": self.logits(images).log_softmax(1), "names": images.get("names")}

    def single_rows(self, batch: Batch) -> list[Batch]:
        """Returns each image of a batch as a batch of its own."""
        images = cast(ImageBatch, batch)
        columns = (images["pixel_values"], images["labels"], self._names(images))
        return [
            cast(Batch, {"pixel_values": image[None], "labels": label[None], "names": [name]})
            for image, label, name in zip(*columns, strict=True)
            if label != IGNORE_INDEX
        ]

    def named_rows(self, batch: Batch, scored: list[int]) -> list[str]:
        """Returns what some of the scored images of a batch are called."""
        images = cast(ImageBatch, batch)
        rows = (images["labels"] != IGNORE_INDEX).nonzero()[:, 0].tolist()
        names = self._names(images)
        return list(dict.fromkeys(names[rows[number]] for number in scored))

    @staticmethod
    def _names(images: ImageBatch) -> list[str]:
        return images.get("names") or [f"image {row}" for row in range(len(images["labels"]))]


def with_heads(adapter: Any, heads: Sequence[str]) -> Any:
    """Returns an adapter's configuration with which the head of the classes is trained, too.

    Args:
        adapter: The configuration, of any method.
        heads: Full names of the head's linear layers.

    Raises:
        ConfigError: If its method cannot train a module as a whole.
    """
    if isinstance(adapter, FullFineTuning):
        targets = adapter.target_modules
        if isinstance(targets, list):
            return replace(adapter, target_modules=[*targets, *(h for h in heads if h not in targets)])
        return adapter
    if not hasattr(adapter, "modules_to_save"):
        raise ConfigError(
            f"{type(adapter).__name__} cannot train the head of new classes (it has no modules_to_save); use "
            "MokaConfig, peft.LoraConfig or another method"
        )
    changed = deepcopy(adapter)
    given = list(adapter.modules_to_save or ())
    changed.modules_to_save = [*given, *(head for head in heads if head not in given)]
    return changed


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
