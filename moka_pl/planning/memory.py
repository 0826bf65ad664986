r"""The peak memory of training, from the sizes of the model and of a batch.

With T padded tokens of a micro-batch, N predicted ones, V the vocabulary, d the hidden and f the inner size,
h heads and k key-value heads of size c, e bytes of the compute dtype, and x the widths of the inputs that
adapted layers keep, a block keeps for its backward pass, in bytes

.. math::
    a = T\,(8 d + e\,(2 h c + 2 k c + 3 f + \textstyle\sum x))

two norms in float32; queries, keys, values and attention's result; the gate, its activation and the other
factor of the gated MLP. Frozen products keep nothing. A merged MoKA layer keeps its input, which layers that
read the same tensor share, and attention's result is there already. With Liger's kernels norms keep their
inputs as they are, and the MLP its two factors: ``T (2 e d + e (2 h c + 2 k c + 2 f + Σx))``, where Σx leaves
out the product of these, which is computed again, but in checkpointed blocks. The head keeps, with the last
norm, ``4 d T + e d N + 12 V N``: log-probabilities and two gradients in float32; where it sees C tokens at a
time, ``4 d T + 2 e d N + e V C`` on a GPU, and on a CPU ``4 V C`` more. Then

.. math::
    peak = weights + P\,(8 + s) + n\,a + head                    % without checkpointing
    peak = weights + P\,(8 + s) + n\,e\,d\,T + max(head, b)      % with it

for n blocks (3 where their inputs are offloaded) and P trained numbers (float32, with a gradient) of which
the optimizer keeps s bytes each. b is a, and on a GPU ``e T (d + f)`` more: a block that is computed again is
whole when its output and what its down projection reads have their gradients. Where the B bytes of the blocks
and the E of embedding and output head are spread over R ranks, each holds ``(B + E) / R`` of them (in the
host's memory if they are offloaded), two whole blocks, ``2 B / n``, beside b, and the rest of the head, H
bytes, beside *head*: the last term becomes ``max(head + H, b + 2 B / n)``, and without checkpointing
``max(head + H, 2 B / n)`` for *head*. Where embedding and head are one weight, several ranks keep it whole.

On a CPU glibc's heap does not give back all that is freed: without checkpointing a fifth of the activations
and the head comes on top; with it ``n (3 e f T - 2 e w)``, w the largest layer's weights where these are
quantised, unless ``e f T`` is so large (32 MiB) that tensors are mapped by themselves.
"""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moka_pl.adapters.injection import output_head
from moka_pl.backbone.quantization import weight_bytes
from moka_pl.errors import BackboneError
from moka_pl.lm.head_loss import part_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GIB = 2**30
#: What the CPU's process holds besides: Python with the libraries and the data.
_PROCESS = 0.85 * GIB
#: How much more the CPU's allocator keeps of what comes and goes, whose sizes differ from batch to batch.
_CPU_GAPS = 1.2
#: Bytes from which glibc maps memory by itself, and gives it back when it is freed.
_MAPPED = 2**25
#: cuBLAS's workspace on a Hopper GPU.
_WORKSPACE = 32 * 2**20
#: Inputs of blocks that are on the GPU at a time where they are offloaded.
_ON_GPU = 3
#: Blocks of a spread base that are whole at a time.
_WHOLE = 2
#: Bytes of a weight in doubly quantised NF4.
_NF4 = weight_bytes("nf4", True, torch.bfloat16)

#: Tensors that layers read, by the ends of the layers' names; attention's result is kept anyway.
_INPUTS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "qkv_proj"), "attention"),
    **dict.fromkeys(("gate_proj", "up_proj", "gate_up_proj"), "mlp"),
}
_KEPT_ANYWAY = ("o_proj",)


@dataclass(frozen=True)
class Sizes:
    """What of a model's sizes decides its memory.

    Attributes:
        hidden: d.
        inner: f.
        blocks: n.
        queries: h·c.
        keys: k·c.
        vocabulary: V.
        linear: Parameters of linear layers without the output head.
        other: All other parameters; tied ones count once.
        ends: Those of them that are the embedding's and the head's matrices.
        head: Those of these that are the head's.
        largest: Parameters of the largest linear layer.
        known: Whether the blocks are LLaMA's, as far as their sizes tell.
    """

    hidden: int
    inner: int
    blocks: int
    queries: int
    keys: int
    vocabulary: int
    linear: int
    other: int
    largest: int
    ends: int = 0
    head: int = 0
    known: bool = True


@dataclass(frozen=True)
class Setup:
    """How a model is trained.

    Attributes:
        tokens: T, padded tokens of a micro-batch.
        trained: N, those of them that are predicted.
        itemsize: e, bytes of the compute dtype.
        checkpointing: Whether blocks are computed again in the backward pass.
        linear: Bytes of a frozen linear weight with its scales; None where it is in the compute dtype.
        dequantised: Bytes that a weight of the largest layer takes while it is dequantised; None for those of
            the compute dtype.
        state: s, bytes of the optimizer for each trained number.
        gradients: Bytes of a gradient for each; DDP has a copy.
        stored: Bytes of weight files that a CPU maps; None on a GPU.
        fused: Whether norms, rotary embeddings and gated MLPs are Liger's.
        by_parts: Whether the head sees a part of the tokens at a time.
        offloaded: Whether the inputs of checkpointed blocks leave the GPU; it holds ``_ON_GPU`` of them.
        spread: R, ranks over which the weights are spread; None where each rank has all of them.
        base_offloaded: Whether a rank's part of them is kept in the host's memory.
    """

    tokens: int
    trained: int
    itemsize: int = 2
    checkpointing: bool = False
    linear: float | None = _NF4
    dequantised: float | None = None
    state: float = 8
    gradients: float = 4
    stored: int | None = None
    fused: bool = False
    by_parts: bool = False
    offloaded: bool = False
    spread: int | None = None
    base_offloaded: bool = False


@dataclass(frozen=True)
class Memory:
    """The parts of the peak, in bytes.

    Attributes:
        weights: The frozen base, with one layer's dense weights while it is used.
        adapters: Trained numbers.
        gradients: Their gradients.
        optimizer: The optimizer's state.
        activations: What blocks keep for the backward pass.
        logits: The output head, its loss and the gradient.
        process: On a CPU: Python, libraries, data and the weight files, mapped.
        host: What a rank of a GPU keeps of the base in the host's memory; no part of the peak.
    """

    weights: float
    adapters: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    process: float
    host: float = 0.0

    @property
    def peak(self) -> float:
        """The sum of what the device holds."""
        return float(sum(asdict(self).values())) - self.host


def sizes_of(model: "PreTrainedModel") -> Sizes:
    """Returns the sizes of a plain model, which may be on the meta device.

    Raises:
        BackboneError: If its configuration names no hidden size.
    """
    config: Any = model.config.get_text_config()
    hidden = getattr(config, "hidden_size", None)
    if not isinstance(hidden, int):
        raise BackboneError(
            f"memory cannot be planned: {config.model_type} names no hidden_size; give a LLaMA-like model"
        )
    head, embedding = output_head(model), model.get_input_embeddings()
    matrices = [end.weight for end in (head, embedding) if isinstance(end, nn.Linear | nn.Embedding)]
    weights = [m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    inner = getattr(config, "intermediate_size", None)
    heads = getattr(config, "num_attention_heads", 1)
    width = getattr(config, "head_dim", None) or hidden // heads
    experts = any(getattr(config, name, None) for name in ("num_local_experts", "num_experts"))
    return Sizes(
        hidden=hidden,
        inner=inner if isinstance(inner, int) else 4 * hidden,
        blocks=config.num_hidden_layers,
        queries=heads * width,
        keys=(getattr(config, "num_key_value_heads", None) or heads) * width,
        vocabulary=config.vocab_size,
        linear=sum(weights),
        other=sum(p.numel() for p in model.parameters()) - sum(weights),
        largest=max(weights, default=0),
        ends=sum({id(matrix): matrix.numel() for matrix in matrices}.values()),
        head=head.weight.numel() if isinstance(head, nn.Linear) else 0,
        known=isinstance(inner, int) and not experts,
    )


def merged_inputs(layers: dict[str, int]) -> int:
    """Returns Σx over all blocks: the widths of the inputs that merged layers keep, shared ones once.

    Args:
        layers: Input features of the adapted layers by name.
    """
    kept: dict[tuple[str, str], int] = {}
    for name, width in layers.items():
        parent, _, own = name.rpartition(".")
        if own not in _KEPT_ANYWAY:
            kept[parent, _INPUTS.get(own, own)] = width
    return sum(kept.values())


def estimate(sizes: Sizes, setup: Setup, parameters: int, kept: float, products: float = 0.0) -> Memory:
    """Estimates the peak of one rank.

    Args:
        sizes: The model.
        setup: How it is trained.
        parameters: P, trained numbers.
        kept: Bytes a token that adapted layers keep in all blocks together.
        products: Those of them that fused MLPs compute again, but in checkpointed blocks.
    """
    e, tokens, trained = setup.itemsize, setup.tokens, setup.trained
    linear = e if setup.linear is None else setup.linear
    dequantised = 0 if setup.linear is None else setup.dequantised or e
    attention = 2 * sizes.queries + 2 * sizes.keys
    norms, inner = (2 * e, 2) if setup.fused else (8, 3)
    kept -= products if setup.fused and not setup.checkpointing else 0
    block = tokens * (norms * sizes.hidden + e * (attention + inner * sizes.inner) + kept / sizes.blocks)
    logits = norms / 2 * sizes.hidden * tokens + e * sizes.hidden * trained
    if setup.by_parts:
        part = part_size(trained, sizes.vocabulary)
        entry = e if setup.stored is None else e + 4  # a GPU's kernel needs no copy in float32
        logits += e * sizes.hidden * trained + entry * sizes.vocabulary * part
    else:
        logits += 12 * sizes.vocabulary * trained
    activations = sizes.blocks * block
    on_gpu = setup.stored is None
    # A block that is computed again is whole when its output and what down reads have their gradients.
    recomputed = block + (e * tokens * (sizes.hidden + sizes.inner) if on_gpu else 0)
    weights, host = sizes.linear * linear + sizes.other * e, 0.0
    if setup.spread is not None:
        stays = sizes.ends == sizes.head and setup.spread > 1  # both are one weight
        spread = sizes.linear * linear + (0 if stays else sizes.ends * e)
        host = spread / setup.spread if setup.base_offloaded and on_gpu else 0.0
        weights += spread / setup.spread - spread - host
        head = 0 if stays else sizes.head * e * (1 if setup.base_offloaded else 1 - 1 / setup.spread)
        weights += _gathered(sizes, linear, head, recomputed if setup.checkpointing else 0, logits)
    weights += sizes.largest * dequantised
    gaps = 1 if on_gpu or setup.checkpointing else _CPU_GAPS
    if setup.checkpointing:
        inputs = min(_ON_GPU, sizes.blocks) if setup.offloaded else sizes.blocks
        activations = inputs * e * sizes.hidden * tokens + max(recomputed - logits, 0)
        activations += 0 if on_gpu else _holes(sizes, e * tokens, dequantised)
    return Memory(
        weights=weights + (_WORKSPACE if on_gpu else 0),
        adapters=4 * parameters,
        gradients=setup.gradients * parameters,
        optimizer=setup.state * parameters,
        activations=gaps * activations,
        logits=gaps * logits,
        process=0 if setup.stored is None else _PROCESS + setup.stored,
        host=host,
    )


def _gathered(sizes: Sizes, linear: float, head: float, block: float, logits: float) -> float:
    """What weights that are gathered for a while add to the peak.

    Args:
        sizes: The model.
        linear: Bytes of a linear weight.
        head: Bytes of the head without the rank's own part, where its device has that.
        block: What the activations take beside two whole blocks.
        logits: What they take beside the whole head, but for what they take beside both.
    """
    blocks = min(_WHOLE, sizes.blocks) * sizes.linear * linear / sizes.blocks
    return max(logits + head, block + blocks) - max(logits, block)


def _holes(sizes: Sizes, column: int, dequantised: float) -> float:
    """What a CPU's heap grows by in a checkpointed forward pass, as measured block by block.

    A block's output is kept above the memory that the block has freed. Smaller tensors of the next block fill
    a part of this, and its three largest ones, of the MLP, come on top of it; two dequantised weights of the
    largest layer have left some room for them. (1,200, 1,920 and 4,096 tokens of SmolLM2: 0.35, 0.76 and 1.96
    GiB were free after it, and 0.42, 0.79 and 1.91 are counted.)

    Args:
        sizes: The model.
        column: e T, bytes of one feature of all tokens.
        dequantised: Bytes of a weight of the largest layer while it is dequantised; 0 where it is not.
    """
    largest = column * sizes.inner
    room = 2 * sizes.largest * dequantised
    return sizes.blocks * max(3 * largest - room, 0) if largest < _MAPPED else 0
