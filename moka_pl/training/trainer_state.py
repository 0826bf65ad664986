"""Where a trainer is in its run."""

from lightning.pytorch import Trainer


def between_steps(trainer: Trainer) -> bool:
    """Whether the batch that has just ended completed an optimizer step."""
    batches = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    if batches % trainer.accumulate_grad_batches == 0:
        return True
    return epoch_ends(trainer) and not trainer.strategy.handles_gradient_accumulation


def is_last_step(trainer: Trainer) -> bool:
    """Whether the optimizer step that has just ended was the last one of the run."""
    if not between_steps(trainer):
        return False
    if -1 < trainer.max_steps <= trainer.global_step:
        return True
    return epoch_ends(trainer) and -1 < (trainer.max_epochs or -1) <= trainer.current_epoch + 1


def epoch_ends(trainer: Trainer) -> bool:
    """Whether the batch at hand is the last one of its epoch."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    return bool(progress.is_last_batch or progress.current.ready == trainer.num_training_batches)


def is_trial(trainer: Trainer) -> bool:
    """Whether this is a trial run of a few batches (``fast_dev_run``)."""
    return bool(getattr(trainer, "fast_dev_run", False))


def in_training(trainer: Trainer) -> bool:
    """Whether this is a fit, and not the validation that Lightning tries before it trains."""
    return trainer.state.fn == "fit" and not trainer.sanity_checking
