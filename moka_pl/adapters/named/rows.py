"""A frozen layer under rows of a batch that have adapters of their own."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moka_pl.adapters.forward import asks_for_kernels, plan_forward
from moka_pl.adapters.layer import MokaLayer, MokaLinear
from moka_pl.adapters.named.grouping import Rows
from moka_pl.adapters.named.stacks import LayerStacks, Stack
from moka_pl.adapters.vocabulary.embedding import MokaEmbedding
from moka_pl.errors import AdapterError
from moka_pl.ops.dispatch import can_fuse, can_fuse_thin
from moka_pl.ops.kronecker import kronecker_linear
from moka_pl.ops.rows import alike, batched_cost, merged_cost, rounds_once, rows_update

#: Tokens of a row from which on each adapter's rows are computed by themselves: then its own backend is
#: faster than batched products with small factors.
_MANY_TOKENS = 16


#: How a layer computes its rows: the updates of all adapters at once, by the kernels for generating, by the
#: one for thin products or in batched products, with W + ΔW of each built in one launch, each adapter by
#: itself with W + ΔW, or each update by itself.
Path = Literal["decoded", "thin", "batched", "built", "merged", "separate"]

#: Rows of one token from which on batched products take less time than the kernels for generating.
_MANY_ROWS = 128

#: Bytes of W + ΔW of all adapters that a layer builds at once at most.
_BUILT = 2**31


class RowLayer(nn.Module):
    """A frozen layer, the rows of a batch, and the adapted layers over it that these have.

    Args:
        name: The layer's full name, for messages.
        base_layer: The frozen layer.
        adapters: The adapted layers over it, by adapter; rows of other names get the frozen layer alone.
        rows: The rows of the batch.
    """

    base_layer: Any

    def __init__(
        self, name: str, base_layer: nn.Module, adapters: Mapping[str, MokaLayer], rows: Rows
    ) -> None:
        super().__init__()
        self.name = name
        self.base_layer = base_layer
        self.rows = rows
        self.names = rows.used(adapters)
        self.adapters = [adapters[name] for name in self.names]

    @property
    def weight(self) -> Tensor:
        """The frozen weight W: its dtype and device are what models ask for."""
        weight: Tensor = self.base_layer.weight
        return weight


class RowLinear(RowLayer):
    """``y = W x + ΔW_k x`` where k is the adapter of the row that x lies in (see :class:`RowLayer`).

    ``W x`` is computed once for all rows, and the updates of adapters of the same shapes in the same few
    products, however many they are. Where each adapter's rows are computed faster by themselves, as long ones
    are, they are.

    Args:
        name: The layer's full name, for messages.
        base_layer: The frozen layer.
        adapters: The adapted layers over it, by adapter; rows of other names get the frozen layer alone.
        rows: The rows of the batch.
        stacks: The factors of these adapters.
    """

    base_layer: nn.Linear

    def __init__(
        self,
        name: str,
        base_layer: nn.Linear,
        adapters: Mapping[str, MokaLayer],
        rows: Rows,
        stacks: Sequence[Stack],
    ) -> None:
        super().__init__(name, base_layer, adapters, rows)
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.stacks = stacks
        for stack in stacks:  # a first forward pass makes nothing: it may be recorded as a graph
            rows.of(stack.names, self.weight.device)
            rows.by_adapter(stack.names, self.weight.device)

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias, if there is one."""
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """Maps x of shape (N, ..., n) to (N, ..., m); N may be a multiple of the rows, as with beams.

        Raises:
            AdapterError: If x has no rows, or a number of them that is no such multiple.
        """
        times = _times(self.name, x, self.rows.count, 3)
        flat = x.reshape(len(x), -1, self.in_features)  # (N, T, n)
        compute = {
            "decoded": self._decoded,
            "thin": self._thin,
            "batched": self._batched,
            "built": self._built,
            "merged": self._merged,
            "separate": self._separate,
        }
        total = compute[self.choose_path(flat)](flat, times)
        return total.view(*x.shape[:-1], self.out_features)

    def choose_path(self, x: Tensor) -> Path:
        """Chooses how x, (N, T, n), is computed: what its updates take, not its numbers, decides on a GPU."""
        rows, tokens, n = x.shape
        if tokens == 1 and self._decodes(x):
            return "decoded"
        if not torch.is_grad_enabled() and self._is_thin(x):
            return "thin"
        if tokens < _MANY_TOKENS:
            return "batched"
        if not x.is_cuda:
            return "separate"
        m, tokens = self.out_features, rows * tokens
        batched = sum(batched_cost(stack.shapes, m, n, tokens * x.itemsize) for stack in self.stacks)
        builds = not torch.is_grad_enabled() and all(map(self._builds, self.stacks))
        launches = 4 * len(self.stacks) if builds else 5 * len(self.adapters)
        if batched <= merged_cost(len(self.adapters), m, n, tokens, x.itemsize, launches):
            return "batched"
        if not all(map(_merges, self.adapters)):
            return "separate"
        return "built" if builds else "merged"

    def _builds(self, stack: Stack) -> bool:
        """Whether W + ΔW of a stack's adapters fit into memory, and these have about as many rows each."""
        size = 2 * len(stack.names) * self.out_features * self.in_features
        return size <= _BUILT and self.rows.is_even(stack.names)

    def _decodes(self, x: Tensor) -> bool:
        """Whether the kernels for generating serve x, (N, 1, n): on a GPU, without gradients."""
        if torch.is_grad_enabled() or not 0 < len(x) < _MANY_ROWS:
            return False
        return all(asks_for_kernels(layer, x) for layer in self.adapters) and all(
            can_fuse(x, stack.factors.dtype, stack.shapes, self.out_features) for stack in self.stacks
        )

    def _is_thin(self, x: Tensor) -> bool:
        """Whether the kernel for thin products serves x, (N, T, n), on its GPU."""
        return all(asks_for_kernels(layer, x) for layer in self.adapters) and all(
            alike(stack.shapes, self.out_features)
            and can_fuse_thin(x, x.dtype, stack.factors.dtype, stack.shapes, self.out_features)
            for stack in self.stacks
        )

    def _decoded(self, x: Tensor, times: int) -> Tensor:
        """Adds updates of all adapters at once to one token a row, (N, 1, m)."""
        from moka_pl.ops.triton import Gates, add_decode_update_, make_plan

        total: Tensor = self.base_layer(x).contiguous()  # (N, 1, m)
        for stack in self.stacks:
            rows, adapter = self.rows.of(stack.names, x.device, times)
            every = len(rows) == len(x)
            chosen, out = (x, total) if every else (x.index_select(0, rows), total.index_select(0, rows))
            plan = make_plan(stack.shapes, self.out_features, self.in_features, x.device)
            left, right, weights = stack.packed
            parts = chosen.contiguous().view(-1, self.in_features), left, right, Gates(weights)
            add_decode_update_(plan, out.view(-1, self.out_features), *parts, adapter)
            if not every:
                total.index_copy_(0, rows, out)
        return total

    def _thin(self, x: Tensor, times: int) -> Tensor:
        """Adds the updates of all adapters of a shape in one launch, (N, T, m)."""
        from moka_pl.ops.triton import add_thin_rows_, make_plan

        total: Tensor = self.base_layer(x).contiguous()  # (N, T, m)
        if total.dtype != x.dtype:  # under autocast
            return self._added_in_batches(total, x, times)
        x = x.contiguous()
        for stack in self.stacks:
            plan = make_plan(stack.shapes, self.out_features, self.in_features, x.device)
            rows = self.rows.of(stack.names, x.device, times)
            add_thin_rows_(plan, total, x, stack.factors, stack.shapes[0], *rows)
        return total

    def _batched(self, x: Tensor, times: int) -> Tensor:
        """Adds updates of all adapters at once, (N, T, m).

        Those of few tokens are computed in single precision at least, as that takes no time; others in the
        dtype of the layer's output.
        """
        return self._added_in_batches(self.base_layer(x), x, times)

    def _added_in_batches(self, total: Tensor, x: Tensor, times: int) -> Tensor:
        """The same, given the frozen layer's output, (N, T, m)."""
        dtype, m = total.dtype, self.out_features
        for stack in self.stacks:
            rows, adapter = self.rows.of(stack.names, x.device, times)
            every = len(rows) == len(x)
            chosen = x if every else x.index_select(0, rows)
            if x.shape[1] < _MANY_TOKENS:
                dtype = torch.promote_types(dtype, stack.factors.dtype)
            with _without_autocast(x.device.type):
                inputs = chosen.to(dtype), stack.of_rows(adapter, dtype), stack.shapes, m
                if every and _takes(total, dtype) and rounds_once(stack.shapes, m):
                    rows_update(*inputs, out=total)
                else:
                    total = _added(total, rows, rows_update(*inputs))
        return total

    def _separate(self, x: Tensor, times: int) -> Tensor:
        """Adds each adapter's update by itself, (N, T, m)."""
        total: Tensor = self.base_layer(x)  # (N, T, m)
        for layer, name in zip(self.adapters, self.names, strict=True):
            rows, _ = self.rows.of((name,), x.device, times)
            total = _added(total, rows, _alone(layer, x[rows]))
        return total

    def _merged(self, x: Tensor, times: int) -> Tensor:
        """Computes each adapter's rows as they are alone, with W + ΔW, and other ones as W x, (N, T, m)."""
        others = self.rows.others(self.names, x.device, times)
        total = x.new_empty(*x.shape[:2], self.out_features)
        for layer, name in zip((*self.adapters, self.base_layer), (*self.names, ""), strict=True):
            rows = self.rows.of((name,), x.device, times)[0] if name else others
            if len(rows):
                total = _placed(total, rows, layer(x.index_select(0, rows)))
        return total

    def _built(self, x: Tensor, times: int) -> Tensor:
        """As :meth:`_merged`, with the W + ΔW of all adapters built at once and one product, (N, T, m)."""
        parts = [(stack, plan_forward(self._of(stack.names[0]), x)) for stack in self.stacks]
        others = self.rows.others(self.names, x.device, times)
        total = None
        for stack, plan in parts:
            if plan is None or not hasattr(plan.updates, "weights"):
                return self._merged(x, times)
            rows, _ = self.rows.of(stack.names, x.device, times)
            order, back = self.rows.by_adapter(stack.names, x.device, times)  # (K R,), (I,)
            with _without_autocast(x.device.type):
                weights = plan.updates.weights(*stack.packed, plan.compute)  # (K, m, n)
                grid = x.index_select(0, order).to(plan.compute).view(len(weights), -1, self.in_features)
                product = torch.bmm(grid, weights.mT).view(len(order), -1, self.out_features)  # (K R, T, m)
                part = product.index_select(0, back)  # (I, T, m)
                if self.bias is not None:
                    part += self.bias
            if len(rows) == len(x):
                return part.to(plan.result)
            total = x.new_empty(*x.shape[:2], self.out_features) if total is None else total
            total = _placed(total, rows, part.to(plan.result))
        assert total is not None
        return _placed(total, others, self.base_layer(x[others])) if len(others) else total

    def _of(self, name: str) -> MokaLinear:
        """The adapted layer of an adapter."""
        layer = self.adapters[self.names.index(name)]
        assert isinstance(layer, MokaLinear)
        return layer


class RowEmbedding(RowLayer):
    """``y = W[t] + ΔW_k[t]`` where k is the adapter of the row of token t (see :class:`RowLayer`)."""

    def forward(self, ids: Tensor) -> Tensor:
        """Maps tokens, (N, T), to (N, T, d); N may be a multiple of the rows, as with beams.

        Raises:
            AdapterError: If there are no rows, or a number of them that is no such multiple.
        """
        times = _times(self.name, ids, self.rows.count, 2)
        out: Tensor = self.base_layer(ids)  # (N, T, d)
        for layer, name in zip(self.adapters, self.names, strict=True):
            assert isinstance(layer, MokaEmbedding)
            rows, _ = self.rows.of((name,), ids.device, times)
            out = out.index_add(0, rows, layer.update(ids[rows]).to(out))
        return out


class RowBatch:
    """The layers of a model whose rows have adapters of their own; made once for batches of the same names.

    Args:
        names: The adapter's name of each row.
        bases: The frozen layers by name.
        adapters: The adapted layers over each, by the layer's and the adapter's name.

    Attributes:
        names: As given.
        layers: The layers by name.
        stacks: The factors of their adapters.
    """

    def __init__(
        self, names: Sequence[str], bases: Mapping[str, Any], adapters: Mapping[str, Mapping[str, MokaLayer]]
    ) -> None:
        self.names = tuple(names)
        rows = Rows(names)
        linear = {name: adapters[name] for name, base in bases.items() if not isinstance(base, nn.Embedding)}
        self.stacks = LayerStacks(linear)
        self.layers: dict[str, RowLayer] = {
            name: RowEmbedding(name, base, adapters[name], rows)
            if isinstance(base, nn.Embedding)
            else RowLinear(name, base, adapters[name], rows, self.stacks.of[name])
            for name, base in bases.items()
        }
        self._bases = [(base, base.weight.device) for base in bases.values()]

    def serves(self, names: Sequence[str], bases: Mapping[str, Any]) -> bool:
        """Whether this is the batch of these rows over these frozen layers, and nothing has been moved.

        Args:
            names: The adapter's name of each row.
            bases: The frozen layers by name.
        """
        return (
            self.names == tuple(names)
            and all(
                base is known and base.weight.device == device
                for base, (known, device) in zip(bases.values(), self._bases, strict=True)
            )
            and self.stacks.current
        )


def _times(name: str, x: Tensor, rows: int, dims: int) -> int:
    """Returns how often each row stands in a batch; refuses other numbers of rows."""
    times, rest = divmod(len(x), rows)
    if x.dim() < dims or rest:
        raise AdapterError(
            f"{name} is given {' × '.join(map(str, x.shape))} numbers, but adapter_names has "
            f"{rows} rows; give one name for each row of the batch"
        )
    return times


def _alone(layer: MokaLayer, x: Tensor) -> Tensor:
    """Returns the update of one adapter's rows, (N, T, m)."""
    left = layer.moka_B.new_empty(0) if layer.moka_A is None else layer.moka_A
    parts = layer.gates() * layer.scaling, left, layer.moka_B
    return kronecker_linear(x, *parts, layer.shapes, layer.out_features, layer.backend)


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    """Turns autocast off, where it is on: the products' dtype is chosen, and a call takes time."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _merges(layer: MokaLayer) -> bool:
    """Whether a layer by itself computes what it should here, where nothing is dropped out."""
    return isinstance(layer, MokaLinear) and not (layer.training and layer.dropout.p > 0)


def _takes(total: Tensor, dtype: torch.dtype) -> bool:
    """Whether updates of a dtype can be added to the layer's output where it lies."""
    return total.dtype == dtype and total.is_contiguous() and not torch.is_grad_enabled()


def _added(total: Tensor, rows: Tensor, update: Tensor) -> Tensor:
    """Adds the update of some rows, which ascend, to all; in place unless there are gradients."""
    if total.requires_grad or update.requires_grad:
        return total.index_add(0, rows, update.to(total.dtype))
    if len(rows) == len(total):
        return total.add_(update)
    return total.index_copy_(0, rows, total.index_select(0, rows).add_(update))


def _placed(total: Tensor, rows: Tensor, part: Tensor) -> Tensor:
    """Puts some rows where they belong."""
    return total.to(part.dtype).index_copy_(0, rows, part)
