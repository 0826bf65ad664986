"""The strategy ``sharded``: data-parallel training on a frozen base that no device holds as a whole."""

from typing import Any, TypeVar

import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from torch import Tensor
from torch.distributed.constants import default_pg_timeout

from moka_pl.backbone.blocks.frozen_tensors import decoder_blocks
from moka_pl.errors import ConfigError
from moka_pl.training.sharding.blocks import ShardedBlocks
from moka_pl.training.writing.checkpoint_files import stored_tensors

T = TypeVar("T")


class ShardedStrategy(DDPStrategy):
    """Data-parallel training, with 1/N of the frozen base's blocks, embedding and head on each of N ranks.

    Adapters are replicated, and their gradients averaged by ``DistributedDataParallel``: losses and
    checkpoints are those of ``ddp``. What is frozen has no gradient, so that sharding it takes nothing but
    gathering each block's bytes before it computes. Vectors stay whole on every rank.

    Args:
        offload: Whether each rank's part is kept in the CPU's memory and copied to the device block by block.
            On one device it is the whole base.
        **kwargs: What ``DDPStrategy`` takes.
    """

    strategy_name = "sharded"

    def __init__(self, offload: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.offload = offload
        self._wait = kwargs.get("timeout") or default_pg_timeout  # NCCL's own groups would wait less
        self._blocks: ShardedBlocks | None = None

    @property
    def blocks(self) -> ShardedBlocks | None:
        """The blocks of the base; None where one device keeps all of it, and before the ranks are joined."""
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if self._blocks is None and (several or self.offload):
            # Groups of their own: neither gradients nor metrics are waited for.
            group, control = None, None
            if several:
                group = dist.new_group(timeout=self._wait)
                control = dist.new_group(backend="gloo", timeout=self._wait)
            self._blocks = ShardedBlocks(group, control, self.offload, self.root_device)
        return self._blocks

    def setup(self, trainer: Trainer) -> None:
        """Prepares for training as ``ddp`` does."""
        if self.blocks is not None and not len(self.blocks):  # a module that has built its model before
            assert self.lightning_module is not None
            for block in decoder_blocks(self.lightning_module).values():
                self.blocks.add(block)
            self.blocks.add_ends(self.lightning_module)
        super().setup(trainer)

    def model_to_device(self) -> None:
        """Moves all but the blocks, which are moved as they are gathered."""
        if self._blocks is not None:
            self._blocks.empty()
        super().model_to_device()
        if self._blocks is not None:
            self._blocks.end_step()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Returns what checkpoints hold."""
        module = self.lightning_module
        assert module is not None
        return stored_tensors(module)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Computes a micro-batch, on all ranks at once; in parts, each rank as many as it needs."""
        if self._blocks is not None and not getattr(self.lightning_module, "halves_batches", False):
            self._blocks.begin_step()
        return super().training_step(*args, **kwargs)

    def backward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Computes gradients, after which no block is whole."""
        loss = super().backward(*args, **kwargs)
        if self._blocks is not None:
            self._blocks.end_step()
        return loss

    def serve(self) -> None:
        """Takes part in what other ranks gather, until all have come here; see :class:`ShardedBlocks`."""
        if self._blocks is not None:
            self._blocks.serve()

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Waits for all ranks, and serves them meanwhile, as every other collective here does."""
        self.serve()
        super().barrier(*args, **kwargs)

    def broadcast(self, obj: T, src: int = 0) -> T:
        """Returns what the rank ``src`` has."""
        self.serve()
        return super().broadcast(obj, src)

    def reduce(self, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        """Returns the sum or mean over all ranks."""
        self.serve()
        return super().reduce(tensor, *args, **kwargs)

    def all_gather(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the tensors of all ranks."""
        self.serve()
        return super().all_gather(tensor, *args, **kwargs)

    def teardown(self) -> None:
        """Ends as ``ddp`` does; no block is whole any more."""
        if self._blocks is not None:
            self._blocks.empty()
        super().teardown()
        if self._blocks is not None:
            self._blocks.end_step()


def check_shardable(keeps_base: bool, cuda_graphs: bool) -> None:
    """Refuses what needs the whole base on each device.

    Args:
        keeps_base: Whether the method leaves the base frozen.
        cuda_graphs: Whether steps are to be replayed.

    Raises:
        ConfigError: Naming it.
    """
    if not keeps_base:
        raise ConfigError(
            "--trainer.strategy sharded keeps the base frozen, but this method trains its weights; choose "
            "another --model.adapter, or --trainer.strategy ddp"
        )
    if cuda_graphs:
        raise ConfigError(
            "model.cuda_graphs is true, but a recorded step cannot gather the blocks of a sharded base; set "
            "it to false, or --trainer.strategy ddp"
        )


def register() -> None:
    """Registers the strategy's names with Lightning, once."""
    for name, offload in (("sharded", False), ("sharded_offload", True)):
        if name not in StrategyRegistry.available_strategies():
            where = "in the CPU's memory" if offload else "on its device"
            text = f"DDP, with a part of the frozen base of each rank {where}"
            StrategyRegistry.register(name, ShardedStrategy, description=text, offload=offload)


register()
