"""The LightningModule: a frozen base with adapters, trained on completions."""

from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from lightning.pytorch.utilities import rank_zero_info

from moka_pl._compat import leave_out_of_ddp, trainer_of
from moka_pl.adapters import (
    AdapterConfig,
    BaseModel,
    MokaConfig,
    inject_adapter,
    load_adapter_state,
    method_of,
    read_adapter,
    unload,
)
from moka_pl.adapters.coverage import left_out, renamed
from moka_pl.adapters.methods.base import name_ranks
from moka_pl.adapters.reading import read_adapter_shapes, read_adapter_state
from moka_pl.adapters.vocabulary.token_rows import start_rows
from moka_pl.backbone import BackboneConfig, load_backbone, load_tokenizer
from moka_pl.backbone.linear_layers import describe_storage
from moka_pl.data.types import data_of
from moka_pl.errors import ConfigError
from moka_pl.lm.checkpointing import checkpoint_layers
from moka_pl.prompts.new_tokens import new_token_pieces
from moka_pl.training.accidents.spikes import SpikeOptions
from moka_pl.training.auto_filters import DeferredFilters
from moka_pl.training.base import describe_base, name_new_tokens, number_new_tokens, take_stored
from moka_pl.training.checkpoint import (
    StoredRun,
    check_checkpoint,
    check_run,
    complete_checkpoint,
    say_differences,
    set_rng_state,
)
from moka_pl.training.course import Change, Course, check_allowed, course_of, optimizer_course
from moka_pl.training.launches import compute_as, fuse_on_gpu, gradient_nodes
from moka_pl.training.learning_rates import LearningRateRatios, check_scheduler, make_optimizer
from moka_pl.training.preflight import check_room, check_trainer, trained_numbers
from moka_pl.training.resume import adjust_optimizer, begin_epoch_anew, begins_epoch_anew
from moka_pl.training.schedule import WarmupDecay
from moka_pl.training.sharding.strategy import ShardedStrategy, check_shardable
from moka_pl.training.steps import TrainedModule
from moka_pl.training.trial_optimizer import build_trial, refused_options, state_bytes
from moka_pl.training.writing.checkpoint_files import peek
from moka_pl.training.writing.whole_files import write_whole_files
from moka_pl.utils import warn

if TYPE_CHECKING:
    from lightning.pytorch.utilities.types import OptimizerLRScheduler
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from moka_pl.backbone.load import Backbone, Unloaded
    from moka_pl.training.sharding.blocks import ShardedBlocks

# Not None: the command line's help would then list none of their options.
_BACKBONE, _ADAPTER, _RATIOS, _SPIKES = BackboneConfig(), MokaConfig(), LearningRateRatios(), SpikeOptions()


class MokaModule(TrainedModule):
    """Fine-tunes a frozen causal language model with a mixture of Kronecker adapters.

    The loss of an optimizer step is the mean over all completion tokens of its batch, across accumulated
    micro-batches and ranks, however unevenly the tokens are spread.

    Args:
        backbone: The base model.
        adapter: The adapter's configuration. ``class_path`` and ``init_args`` select another method:
            ``moka_pl.adapters.MokaServable``, ``MokaS``, ``MokaUngated``, ``KronA`` or ``FullFineTuning``, or
            a PEFT configuration such as ``peft.LoraConfig``.
        adapter_path: An adapter directory to start from; its configuration replaces ``adapter``.
        optimizer: Builds the optimizer from the trainable parameters.
        lr_scheduler: Builds the learning-rate scheduler, stepped after every optimizer step.
        learning_rate_ratios: Multiples of the optimizer's learning rate for the left factors, the right
            factors and the gates.
        gradient_checkpointing: Recompute activations in the backward pass, which takes about a third more
            time and a fraction of the memory. ``offload`` also moves the layers' inputs to pinned host
            memory.
        cuda_graphs: Capture the forward and backward pass as a CUDA graph per batch size, and replay it. This
            is several times faster for models up to about a billion parameters, and costs the memory of one
            batch's activations. Packed batches need the variable-length attention (16 bits); CPUs, and
            dropout under gradient checkpointing, do not use graphs.
        allow_changes: What may differ from the run that a checkpoint resumes. All else that changes the
            course of training is refused. With ``data``, ``batch_size``, ``seed`` or ``ranks`` the epoch
            begins anew; ``optimizer`` of another class starts with an empty state; ``learning_rate``,
            ``scheduler``, ``accumulation``, ``adapter`` (scaling, dropout), ``precision``, ``quantization``
            and ``clipping`` take effect from there on.
        max_non_finite_steps: A step whose loss or gradient is not finite is skipped; this many in a row end
            the run.
        loss_spikes: Which losses are reported as spikes, and whether their steps are undone.
        halve_micro_batches: Compute a micro-batch that does not fit into memory in parts of half as many
            rows, with the gradient of the whole.

    Attributes:
        course: What decides the course of a fit, as its checkpoints hold it.
        checkpoint_path: The checkpoint that will be loaded, so that its run can be compared before the model
            is loaded.
        classifies: Whether it classifies images.
        next_command: What to do with a trained adapter, as a command without the program.
        resumes: Whether the next fit resumes from a checkpoint, so that ``filters: auto`` need not choose.
            (If False, the choice is made, and a loaded checkpoint's choice replaces it.)
    """

    resumes: bool = False
    checkpoint_path: Path | None = None
    classifies: bool = False
    next_command: str = "generate {adapter} 'Why does bread rise?'"

    def __init__(
        self,
        backbone: BackboneConfig = _BACKBONE,
        adapter: AdapterConfig = _ADAPTER,
        adapter_path: str | None = None,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=2e-4, weight_decay=0.0),
        lr_scheduler: LRSchedulerCallable = lambda o: WarmupDecay(o),
        gradient_checkpointing: bool | Literal["offload"] = False,
        cuda_graphs: bool = False,
        learning_rate_ratios: LearningRateRatios = _RATIOS,
        allow_changes: list[Change] | None = None,
        max_non_finite_steps: int = 5,
        loss_spikes: SpikeOptions = _SPIKES,
        halve_micro_batches: bool = False,
    ) -> None:
        super().__init__(
            learning_rate_ratios, cuda_graphs, max_non_finite_steps, loss_spikes, halve_micro_batches
        )
        self.backbone = replace(backbone)
        self.adapter: Any = deepcopy(adapter)
        method_of(adapter).check_new()  # what is no configuration shows before any loading
        self.adapter_path = adapter_path
        self.adapter_prompt: str | None = None  # what the adapter's training data were written in
        stored = None if adapter_path is None else read_adapter(adapter_path)  # a damaged folder shows now
        if stored is not None:
            self.adapter, self.adapter_prompt = stored.config, stored.extra.get("prompt")
        take_stored(self, stored)
        learning_rate_ratios.check_fits(self.adapter)
        if gradient_checkpointing not in (True, False, "offload"):
            raise ConfigError(
                f"gradient_checkpointing is {gradient_checkpointing!r}; choose one of true, false, offload"
            )
        self.allow_changes = frozenset(allow_changes or ())
        check_allowed(self.allow_changes)
        self.course: Course = {}
        self._resumed: dict[str, Any] | None = None
        self._epoch_anew = False
        self._deferred = DeferredFilters(self.adapter if adapter_path is None else None)
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.gradient_checkpointing = gradient_checkpointing
        # Checkpoints hold no frozen tensor; on_load_checkpoint checks that no trainable one is missing.
        self.strict_loading = False
        self.model: PreTrainedModel | None = None
        self.base: BaseModel | None = None
        self.adapted: list[str] = []
        self._schedule: WarmupDecay | None = None
        self._rng: dict[str, Any] | None = None
        self._nodes: list[Any] = []

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The base model's tokenizer (loaded without the model)."""
        return load_tokenizer(self.backbone)

    # Building

    def setup(self, stage: str) -> None:
        """Refuses before the model is loaded what optimizer, trainer or checkpoint would refuse later."""
        write_whole_files(self.trainer)
        number_new_tokens(self)
        if isinstance(self.trainer.strategy, ShardedStrategy):
            check_shardable(method_of(self.adapter).keeps_base, self.cuda_graphs)
        if stage == "fit":
            self.course = course_of(self, self.trainer)
            check_trainer(self.trainer)
            self._check_steps()
            self._check_backbone()
        if self.checkpoint_path is not None:
            expected = self.course | (optimizer_course(*build_trial(self)) if stage == "fit" else {})
            check_run(peek(self.checkpoint_path), self, expected, training=stage == "fit")

    def configure_model(self) -> None:
        """Loads the base onto this rank's device and injects the adapters (once).

        A new fit also resolves ``filters: auto`` and ``start: gradient`` here.

        Raises:
            BackboneError: If the base cannot be loaded.
            AdapterError: If the adapters do not fit it.
            ConfigError: If a gradient is needed and there are no batches for it.
        """
        if self.model is not None:
            if self._deferred.is_due(trainer_of(self), self.resumes):
                unload(self.model)
                self._inject(self.model)
            self._hold_nodes()
            return
        number_new_tokens(self)
        loaded = self.load_base()
        model = loaded.model
        self.tokenizer = loaded.tokenizer
        self.base = describe_base(loaded, self.backbone, self.device, self._blocks())
        storage = describe_storage(model, self.base.options["quantization"])
        if self.adapter_path is not None:
            stored = read_adapter(self.adapter_path)
            stored.check_base(self.base.fingerprint, self.adapter_path, self.base.samples)
        self._inject(model)
        if self.gradient_checkpointing:
            checkpoint_layers(model, offload=self.gradient_checkpointing == "offload")
        if self.adapter_path is not None:
            load_adapter_state(model, read_adapter_state(self.adapter_path), self.adapter_path)
        # Lightning keeps the mode it finds; a loaded model is in eval mode, which switches off
        # checkpointing and dropout.
        model.train()
        self.model = model
        self._hold_nodes()
        count = sum(p.numel() for p in self.parameters() if p.requires_grad)
        self._check_room(count)
        rank_zero_info(
            f"{self.backbone.name} on {self.device} in {self.base.options['compute_dtype']}, {storage}; "
            f"{method_of(self.adapter).title} in {len(self.adapted)} layers, {count:,} trainable parameters"
        )
        if ranks := method_of(self.adapter).lora_ranks(model):
            rank_zero_info(f"exact LoRA rank: {name_ranks(ranks)}")
        for note in loaded.notes:
            rank_zero_info(note)
        named = name_new_tokens(self.tokenizer, self.backbone.new_tokens)
        for told in (renamed(model, self.adapter), left_out(model, self.adapter), named):
            if told:
                rank_zero_info(told)

    def _inject(self, model: "PreTrainedModel") -> None:
        """Injects the adapters into a plain model, whose layers PEFT tries one by one."""
        blocks = self._blocks()
        with nullcontext() if blocks is None else blocks.by_layer():
            self._inject_into(model)

    def _inject_into(self, model: "PreTrainedModel") -> None:
        if self.adapter_path is None:
            self.adapter, self.adapted = self._deferred.inject(
                model, self.adapter, trainer_of(self), self.resumes
            )
        else:
            saved = read_adapter_shapes(self.adapter_path)
            self.adapted = inject_adapter(model, self.adapter, saved=saved)
        start_rows(model, new_token_pieces(self.tokenizer))
        # Every rank builds the same frozen tensors itself: DDP neither broadcasts nor watches them.
        frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
        frozen += [name for name, _ in model.named_buffers()]
        leave_out_of_ddp(self, [f"model.{name}" for name in frozen])

    def _hold_nodes(self) -> None:
        """Makes DDP's nodes on the stream that trains, before Lightning has it make them on another one."""
        trainer = trainer_of(self)
        several = trainer is not None and trainer.world_size > 1
        self._nodes = gradient_nodes(self.parameters()) if several else []

    def load_base(self) -> "Backbone":
        """Loads the frozen base onto this rank's device; subclasses may have one already."""
        return load_backbone(self.backbone, self.device, self._look, self._blocks())

    def _look(self, unloaded: "Unloaded") -> None:
        """Refuses, before weights are loaded, a fit whose adapters and checkpoints would fill the disk."""
        saved = None if self.adapter_path is None else read_adapter_shapes(self.adapter_path)
        if (trained := trained_numbers(unloaded.model, self.adapter, saved)) is not None:
            self._check_room(trained)

    def _check_room(self, trained: int) -> None:
        trainer = trainer_of(self)
        if trainer is not None and trainer.state.fn == "fit":
            check_room(trainer, trained, state_bytes(self.optimizer))

    def _blocks(self) -> "ShardedBlocks | None":
        """What keeps the blocks of the base; None where this rank has all of it."""
        strategy = getattr(trainer_of(self), "strategy", None)
        return strategy.blocks if isinstance(strategy, ShardedStrategy) else None

    @property
    def adapter_extra(self) -> dict[str, Any]:
        """Further values that adapter directories keep."""
        return {"prompt": data_of(self.trainer).prompt}

    @property
    def causal_lm(self) -> "PreTrainedModel":
        """The model with its adapters; a ``ConfigError`` before ``configure_model`` has built it."""
        if self.model is None:
            raise ConfigError("the model is not built yet; run it with a Trainer, or call configure_model()")
        return self.model

    def configure_optimizers(self) -> "OptimizerLRScheduler":
        """Builds optimizer and scheduler over the trainable parameters."""
        trainable = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        with refused_options():
            optimizer = make_optimizer(self.optimizer, trainable, self.learning_rate_ratios)
        if getattr(getattr(trainer_of(self), "precision_plugin", None), "scaler", None) is None:
            optimizer = fuse_on_gpu(optimizer)
        rates = [group["lr"] for group in optimizer.param_groups]
        scheduler = self.lr_scheduler(optimizer)
        if not self.learning_rate_ratios.alike:
            check_scheduler(scheduler, optimizer, rates)
        if isinstance(scheduler, WarmupDecay) and scheduler.total_steps is None:
            self._schedule = scheduler
        config: dict[str, Any] = {"scheduler": scheduler, "interval": "step"}
        if isinstance(scheduler, ReduceLROnPlateau):
            config |= {"monitor": scheduler.monitor, "interval": "epoch"}
        return {"optimizer": optimizer, "lr_scheduler": config}  # type: ignore[return-value]

    # Training

    def on_fit_start(self) -> None:
        """Prepares for packed batches, and warns if the trainer's precision would round the adapters.

        In a run that resumes with changes, the stored optimizer is adjusted before it is restored.
        """
        self._nodes = []  # DDP has them by now
        optimizer, scheduler = self.trainer.optimizers[0], self.trainer.lr_scheduler_configs[0].scheduler
        self.course |= optimizer_course(optimizer, scheduler)
        if self._resumed is not None:
            changed = check_run(self._resumed, self, self.course, training=True)
            say_differences(self._resumed, changed, self, training=True)
            adjust_optimizer(self._resumed, changed, optimizer, scheduler)
            compute_as(self._resumed, optimizer)
            self._resumed = None
        if data_of(self.trainer).packing:
            self._prepare_packing()
        if self.trainer.precision in ("bf16-true", "16-true"):
            warn(
                f"--trainer.precision {self.trainer.precision} rounds the adapters and their optimizer "
                "state; set it to 32-true, and set the base's dtype with backbone.compute_dtype"
            )

    def on_train_start(self) -> None:
        """Resets the token count, and restores the random generators in a resumed run."""
        if self._deferred.pending:
            raise ConfigError(
                "filters: auto or start: gradient expects a checkpoint, but none was loaded; "
                "set the module's resumes attribute to False"
            )
        self._set_schedule()
        if self._epoch_anew:
            self.trainer.fit_loop.epoch_loop.restarting = False
            self._epoch_anew = False
        if self._rng is not None:
            set_rng_state(self._rng, self.device, self.global_rank)
            self._rng = None
        self._begin_steps()

    def _set_schedule(self) -> None:
        """Tells the schedule the number of steps.

        Not in ``configure_optimizers``: asking for the number there makes Lightning (2.6) load the training
        data before it has read the loaders' state, so that a resumed run would begin its epoch anew.
        """
        if self._schedule is None:
            return
        total = self.trainer.estimated_stepping_batches
        if total == float("inf"):
            raise ConfigError(
                "the learning-rate schedule needs the length of the run, which is unlimited: set "
                "trainer.max_epochs, trainer.max_steps or the schedule's total_steps"
            )
        before = self._schedule.total_steps
        if before is not None and before != total:  # of the run that goes on
            rank_zero_info(f"the learning-rate schedule is stretched from {before} to {int(total)} steps")
        self._schedule.set_total_steps(int(total))

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the trainable tensors only, and adds what a resumed run needs."""
        complete_checkpoint(checkpoint, self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Checks that the checkpoint is of this run, and that its tensors are exactly the trainable ones."""
        stored = StoredRun.read(checkpoint)
        before, self.adapter = self.adapter, self._deferred.adopt(self.adapter, stored.adapter)
        if self.model is not None and self.adapter is not before:  # that run's filters, chosen by ``auto``
            unload(self.model)
            self._inject(self.model)
            self._hold_nodes()
        training = self.trainer.state.fn == "fit"
        changed = check_checkpoint(checkpoint, self, training)
        if not training:
            say_differences(checkpoint, changed, self, training)
            return
        self._resumed = checkpoint
        self._epoch_anew = begins_epoch_anew(changed)
        if self._epoch_anew:
            begin_epoch_anew(checkpoint)
        self._accidents = stored.accidents
        self._rng = stored.rng  # set when training begins: nothing before it may draw from them
