"""When the blocks of a sharded base, its embedding and its head are gathered, and given back."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moka_pl.backbone.blocks.frozen_tensors import frozen_tensors
from moka_pl.errors import BackboneError, one_line
from moka_pl.training.sharding.ends import find_ends
from moka_pl.training.sharding.shard import BlockShard


class ShardedBlocks:
    """The blocks of a frozen base, each whole only while it computes.

    A block is gathered just before its forward pass, and again before its backward pass (a hook on the
    gradient of its output; checkpointing's second forward pass then finds it there). Whatever else is
    gathered is given back, so that two blocks at most are whole, however a pass ends.

    The embedding is gathered before the decoder's forward pass, and the output head after it: its weight is
    also read without a call, by the loss. It stays until another block is needed, as that of the backward
    pass is. Where both are one weight, that is gathered twice, or stays whole on several ranks. Nothing is
    gathered ahead beside the head: it is larger than a block, and would make the peak together with what a
    block or the loss computes.

    In a training step all ranks go through the same blocks in the same order: the next one is gathered while
    this one computes. Everywhere else they may not: batches of an evaluation are uneven, and the first rank
    may compute something alone. There a rank asks all others for each block, and a rank that has nothing to
    compute serves what they ask for (:meth:`serve`) before it enters another collective.

    Args:
        group: The ranks, for gathering; None for one rank alone.
        control: The same ranks on the CPU, for asking.
        offload: Whether the parts are kept in the CPU's memory.
        device: Where blocks compute.

    Attributes:
        in_step: Whether all ranks compute the same now.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        control: dist.ProcessGroup | None,
        offload: bool,
        device: torch.device,
    ) -> None:
        self.in_step = False
        self._group, self._control, self._offload = group, control, offload
        self._stream = _new_stream(device) if offload and device.type == "cuda" else None
        self._shards: list[BlockShard] = []
        self._modules: list[nn.Module] = []
        self._ends = 0  # of embedding and head, which come behind the blocks, those that are sharded
        self._held = False  # whether these are whole, whatever else is needed
        self._current: int | None = None

    def __len__(self) -> int:
        return len(self._shards) - self._ends

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # what copies of layers have in their hooks

    @property
    def share(self) -> float:
        """The share of the base that this rank keeps on its device."""
        if self._offload:
            return 0.0
        return 1.0 if self._group is None else 1 / dist.get_world_size(self._group)

    @property
    def held(self) -> int:
        """Bytes of all blocks, embedding and head that this rank holds now."""
        return sum(shard.held for shard in self._shards)

    def add(self, block: nn.Module) -> None:
        """Takes the frozen tensors out of the next block, of which this rank keeps its part."""
        if not any(frozen_tensors(block)):
            return
        index = self._take(block)
        block.register_forward_pre_hook(partial(self._before_forward, index))
        block.register_forward_hook(partial(self._after_forward, index))

    def add_ends(self, model: nn.Module) -> None:
        """Takes the frozen embedding and output head out of a model, or of what has one inside.

        All blocks are there by now. What stays whole :func:`~moka_pl.training.sharding.ends.find_ends` tells.
        """
        ends = find_ends(model)
        if ends is None or self._ends:
            return
        if ends.tied and self._group is not None:
            return  # while it is gathered, which both need, a rank's part would come on top of the whole
        inside = set(ends.decoder.modules())
        first = next((number for number, block in enumerate(self._modules) if block in inside), None)
        number = None
        if ends.embedding is not None:
            number = self._take_end(ends.embedding)
            # Models of images and texts call it themselves; layers that train tokens read its weight.
            for module in (ends.embedding, ends.decoder):
                module.register_forward_pre_hook(partial(self._before_tokens, number, first))
        if ends.head is not None:
            number = number if ends.tied and number is not None else self._take_end(ends.head)
            ends.decoder.register_forward_hook(partial(self._after_decoder, number))

    def _take_end(self, layer: nn.Module) -> int:
        self._ends += 1
        return self._take(layer, lends=True)

    def _take(self, block: nn.Module, lends: bool = False) -> int:
        """Takes the frozen tensors out of a block, and returns its number."""
        self._shards.append(BlockShard(block, self._group, self._offload, self._stream, lends))
        self._modules.append(block)
        return len(self._shards) - 1

    def reading(self, model: nn.Module) -> Callable[[str], None]:
        """Returns what has the parameter of a name gathered, for who reads weights outside a pass."""
        index = {id(block): number for number, block in enumerate(self._modules)}
        blocks = {name: index[id(m)] for name, m in model.named_modules() if id(m) in index}

        def ready(name: str) -> None:
            parts = name.split(".")
            outer = (".".join(parts[:end]) for end in range(1, len(parts)))
            for number in (blocks[prefix] for prefix in outer if prefix in blocks):
                self._need(number)

        return ready

    @contextmanager
    def by_layer(self) -> Iterator[None]:
        """Runs the body with blocks that are also gathered when one of their layers is called alone.

        Embedding and head are whole (:meth:`whole_ends`): new rows begin at theirs.
        """
        handles = [
            layer.register_forward_pre_hook(lambda *_, number=number: self._need(number))
            for number, block in enumerate(self._modules[: len(self)])
            for layer in {place.layer for place in frozen_tensors(block)}
        ]
        try:
            with self.whole_ends():
                yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def whole_ends(self) -> Iterator[None]:
        """Runs the body with embedding and head whole, for who reads their weights outside a pass.

        All ranks enter it, and leave it, together: none asks for what others hold.
        """
        self.serve()
        self.end_step()
        for shard in self._shards[len(self) :]:
            shard.finish()
        self._held = True
        try:
            yield
            self.serve()
        finally:
            self._held = False
            self.end_step()

    def begin_step(self) -> None:
        """Says that all ranks compute the same from here on, when all have come here."""
        self.serve()
        self.end_step()
        self.in_step = True

    def end_step(self) -> None:
        """Says that the ranks go their own ways from here on, and gives all blocks back."""
        self.in_step = False
        self._current = None
        for number, shard in enumerate(self._shards):
            if not self._holds(number):
                shard.release()

    def empty(self) -> None:
        """Leaves tensors without entries in all blocks, so that the model can be moved."""
        self.end_step()
        for shard in self._shards:
            shard.empty()

    def serve(self) -> None:
        """Takes part in what other ranks gather, until all of them have come here, too."""
        if self._control is None or self.in_step:
            return
        self.end_step()  # a block that is whole here would not be gathered for others
        while wanted := self._asked(0):
            self._gather_for_another(wanted - 1)

    def _asked(self, wanted: int) -> int:
        """What some rank wants, by its number from 1; 0 when all are served. Collective."""
        number = torch.tensor(wanted, device="cpu")  # whatever the default device is
        dist.all_reduce(number, dist.ReduceOp.MAX, self._control)
        return int(number)

    def _gather_for_another(self, index: int) -> None:
        try:
            self._shards[index].finish()
        except torch.OutOfMemoryError as error:  # to try a smaller part would keep them waiting
            raise BackboneError(
                f"no memory left for a block that another rank computes with ({one_line(error)}). Lower "
                "--data.init_args.eval_batch_size"
            ) from error
        self._shards[index].release()

    def _need(self, index: int, ahead: int | None = None) -> None:
        """Has a block whole.

        Args:
            index: Its number.
            ahead: Which one is needed next, if that is known.
        """
        if self._current != index:
            self._free_but(index)
            self._current = None  # until the block is there: a lack of memory may stop this
            if self.in_step or self._control is None:
                self._shards[index].finish()
            elif not self._shards[index].gathered:
                self._ask_for(index)
            self._current = index
        if ahead is not None and (self.in_step or self._control is None):
            self._shards[ahead].start()

    def _ask_for(self, index: int) -> None:
        self._shards[index].reserve()  # what lacks memory fails before the others take part
        while (wanted := self._asked(index + 1) - 1) != index:
            self._gather_for_another(wanted)
        self._shards[index].finish()

    def _free_but(self, index: int) -> None:
        for number, shard in enumerate(self._shards):
            if number != index and shard.reserved and not self._holds(number):
                shard.release()

    def _holds(self, index: int) -> bool:
        return self._held and index >= len(self)

    def _before_forward(self, index: int, *_: Any) -> None:
        if self._current != index:  # else it is computed again, in the backward pass
            self._need(index, index + 1 if index + 1 < len(self) else None)

    def _after_forward(self, index: int, module: nn.Module, inputs: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, Tensor) and first.requires_grad and not first.is_leaf:
            ahead = index - 1 if index > 0 else None
            first.register_hook(lambda gradient: self._need(index, ahead))  # type: ignore[no-untyped-call]

    def _before_tokens(self, index: int, first: int | None, *_: Any) -> None:
        self._need(index, first)

    def _after_decoder(self, index: int, *_: Any) -> None:
        self._need(index)


def _new_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
