"""The configuration of a frozen base model."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

from moka_pl.backbone.products.float8 import Matmul
from moka_pl.backbone.quantization import Quantization
from moka_pl.errors import ConfigError
from moka_pl.lm.compiled import Compile
from moka_pl.lm.kernels import Kernels


@dataclass
class BackboneConfig:
    """The causal language model to fine-tune, and how its frozen weights are stored.

    Args:
        name: A hub id (``meta-llama/Llama-2-7b-hf``), a local folder, a ``.gguf`` file, or
            ``smollm2-135m-instruct`` (fetched from the package index). With ``weights: random``, a shape
            (``llama2-7b``, ``llama2-13b``, ``llama2-70b``, ``llama3-8b``, ``llama3-1b``, ``smollm2-135m``,
            ``tiny``) or a folder with a ``config.json``.
        revision: Branch, tag or commit of a hub model.
        weights: ``pretrained``, or ``random`` for benchmarks and tests (no download).
        quantization: ``nf4`` or ``fp4`` store linear weights in 4 bits and ``int8`` in 8 (bitsandbytes);
            ``int4`` and ``float8`` use torchao, ``hqq`` (4 bits) hqq; ``gptq`` and ``awq`` read checkpoints
            that are already in these formats; ``none`` keeps the compute dtype, which is faster but takes
            four times the memory of 4 bits (in float32 eight times).
        double_quantization: Also quantise the block scales of ``nf4`` and ``fp4``, which saves 0.4 bits per
            weight.
        compute_dtype: Dtype of activations and of unquantised weights. ``auto`` is bfloat16 on GPUs that
            support it, float16 on older GPUs, and float32 on CPUs (where bfloat16 is many times slower).
        attention: The attention implementation of transformers.
        cache_dir: Folder for converted models; ``null`` is ``$MOKA_PL_CACHE`` or the user's cache folder.
        seed: Seed for random weights.
        kernels: ``auto`` computes norms, rotary embeddings and gated MLPs with Liger's fused kernels on CUDA
            devices, with every adapter, in training and evaluation; ``none`` leaves all to transformers.
        compile: ``layers`` compiles the decoder layers and their adapters with ``torch.compile`` for training
            steps, in place of Liger's kernels. The first steps take seconds to compile.
        matmul: ``fp8`` computes the products of frozen 4-bit layers, forward and for the gradient of their
            input, in 8-bit floats (3 bits of mantissa) during training, on NVIDIA GPUs of compute capability
            8.9 or newer. ``bf16`` computes them in the compute dtype, as evaluation and generation always do.
        new_tokens: Tokens that the base does not know, to be added to its tokenizer. Their rows of the
            embedding and the output head are trained beside the adapters, and stored with them.
    """

    name: str = "smollm2-135m-instruct"
    revision: str | None = None
    weights: Literal["pretrained", "random"] = "pretrained"
    quantization: Quantization = "nf4"
    double_quantization: bool = True
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    cache_dir: str | None = None
    seed: int = 0
    kernels: Kernels = "auto"
    compile: Compile = "none"
    matmul: Matmul = "bf16"
    new_tokens: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Refuses values that cannot work.

        Raises:
            ConfigError: Naming the option, its value and what it may be.
        """
        for option, kind in get_type_hints(type(self)).items():
            value, choices = getattr(self, option), get_args(kind)
            if get_origin(kind) is Literal and value not in choices:
                raise ConfigError(f"backbone.{option} is {value!r}; choose one of {', '.join(choices)}")
        if not self.name:
            raise ConfigError("backbone.name is empty; give a hub id, a folder, a .gguf file or a short name")
        for number, token in enumerate(self.new_tokens):
            if not isinstance(token, str) or not token.strip():
                raise ConfigError(
                    f"backbone.new_tokens: {token!r} is no token; give texts that are not empty"
                )
            if token in self.new_tokens[:number]:
                raise ConfigError(f"backbone.new_tokens: {token!r} is there twice; name each token once")

    def options(self) -> dict[str, Any]:
        """The options that an adapter stores to rebuild its base: neither where it lies nor how it trains."""
        left_out = ["name", "revision", "cache_dir", "compile", "matmul"]
        left_out += [] if self.new_tokens else ["new_tokens"]
        return {key: value for key, value in asdict(self).items() if key not in left_out}
