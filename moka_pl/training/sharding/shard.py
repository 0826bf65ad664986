"""The frozen tensors of one decoder block as a row of bytes, of which each rank keeps a part."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moka_pl.backbone.blocks.frozen_tensors import frozen_tensors

#: Tensors begin at multiples of so many bytes, as if they had been allocated; kernels rely on it.
_ALIGNED = 256
#: Its name since torch 2.13, and the one before.
_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


class BlockShard:
    """A block's frozen tensors: one part of N on each rank, the whole only while the block computes.

    The whole is one row of bytes, and the block's tensors are views of it: nothing is cast, whatever the
    bytes mean, and none of the tensors is copied. In between, its memory is given back; the views stay what
    they are, so that a view that autograd has saved is right again in the backward pass.

    Args:
        block: A block whose weights are all there, some of them frozen. These are taken out.
        group: The ranks; None for one rank alone.
        offload: Whether the part is kept in the CPU's memory, page-locked where there is a GPU.
        stream: The stream of copies to the GPU.
        lends: Whether the part leaves its device while the whole is there, which holds it, too. It is copied
            back from there: worth it for what is large and gathered once or twice a step.

    Attributes:
        kept: This rank's part.
    """

    def __init__(
        self,
        block: nn.Module,
        group: dist.ProcessGroup | None,
        offload: bool,
        stream: "torch.cuda.Stream | None",
        lends: bool = False,
    ) -> None:
        self._group, self._stream = group, stream
        self._places = list(frozen_tensors(block))
        ranks, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
        sizes = [place.tensor.nbytes for place in self._places]
        starts, end = [], 0
        for size in sizes:
            starts.append(end)
            end += -(-size // _ALIGNED) * _ALIGNED
        share = -(-end // (ranks * _ALIGNED)) * _ALIGNED
        device = self._places[0].tensor.device
        self._whole = torch.zeros(share * ranks, dtype=torch.uint8, device=device)
        self._views = []
        for place, start, size in zip(self._places, starts, sizes, strict=True):
            tensor = place.tensor
            view = self._whole[start : start + size].view(tensor.dtype).view(tensor.shape)
            self._views.append(view.copy_(tensor))
        self._own = slice(rank * share, (rank + 1) * share)
        own = self._whole[self._own]
        if offload and device.type != "cpu":
            # Lightning builds models with the device as the default one, whose memory cannot be pinned.
            self.kept = torch.empty(share, dtype=torch.uint8, device="cpu", pin_memory=True).copy_(own)
        else:
            self.kept = own.clone()
        self._lends = lends and group is not None and not offload
        self._work: dist.Work | None = None
        self._staged: Tensor | None = None
        self._under_way = self.gathered = False
        self.release()

    @property
    def held(self) -> int:
        """Bytes of the block that this rank holds now."""
        return self.kept.untyped_storage().nbytes() + self._whole.untyped_storage().nbytes()

    @property
    def reserved(self) -> bool:
        """Whether there is memory for the whole, which may be empty, under way or gathered."""
        return self._whole.untyped_storage().nbytes() > 0

    def reserve(self) -> None:
        """Takes all memory that gathering needs, with nothing in it yet."""
        if not self.reserved:
            self._whole.untyped_storage().resize_(self._whole.nbytes)
        if self._staged is None and self.kept.device != self._whole.device:
            # Allocated and given back in the order of the computing stream, which the copies wait for.
            self._staged = (
                self._whole.data
                if self._group is None
                else torch.empty_like(self.kept, device=self._whole.device)
            )

    def start(self) -> None:
        """Begins to gather the whole from all ranks; a collective, if there are several."""
        if self._under_way or self.gathered:
            return
        self.reserve()  # what lacks memory fails here, with nothing under way
        self._under_way = True
        whole = self._whole.data  # whose changes do not count: autograd's saved views stay valid
        if self._staged is None:
            self._collect(whole, self.kept)
            return
        assert self._stream is not None
        self._stream.wait_stream(torch.cuda.current_stream(whole.device))
        with torch.cuda.stream(self._stream):
            self._staged.copy_(self.kept, non_blocking=True)
            if self._group is not None:
                self._collect(whole, self._staged)

    def _collect(self, whole: Tensor, part: Tensor) -> None:
        if self._group is None:
            whole.copy_(part)
        else:
            self._work = _gather(whole, part, self._group, async_op=True)

    def finish(self) -> None:
        """Waits until the whole is there, and puts the tensors into the block."""
        self.start()
        if self.gathered:
            return
        if self._work is not None:
            self._work.wait()
        if self._staged is not None and self._stream is not None:
            torch.cuda.current_stream(self._whole.device).wait_stream(self._stream)
        self._work = self._staged = None
        for place, view in zip(self._places, self._views, strict=True):
            place.put(view)
        self._under_way, self.gathered = False, True
        if self._lends:
            self.kept.untyped_storage().resize_(0)

    def release(self) -> None:
        """Takes the tensors out of the block and gives the whole's memory back."""
        if self._under_way:
            self.finish()
        if self._lends and self.gathered:
            if self.kept.untyped_storage().nbytes() == 0:  # a lack of memory leaves the whole as it is
                self.kept.untyped_storage().resize_(self.kept.nbytes)
            self.kept.copy_(self._whole.data[self._own])
        for place, view in zip(self._places, self._views, strict=True):
            place.withdraw(view)
        self._staged = None
        self._whole.untyped_storage().resize_(0)
        self.gathered = False

    def empty(self) -> None:
        """Leaves tensors without entries in the block, so that it can be moved."""
        self.release()
        for place, view in zip(self._places, self._views, strict=True):
            place.empty(view)
