"""Options of generating, by the names that transformers gives them."""

import math
from dataclasses import dataclass
from typing import Any

from moka_pl.errors import ConfigError

_LARGEST_SEED = 2**63 - 1
#: Each beam is a sequence in memory.
_MOST_BEAMS = 1_000


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Args:
        max_new_tokens: Most tokens to generate; fewer if the model's context ends.
        do_sample: Sample the next token instead of taking the likeliest. Default: only if a temperature above
            0, top_p or top_k is given.
        temperature: Divides the logits before sampling; 0 takes the likeliest token.
        top_p: Sample from the likeliest tokens whose probabilities add up to this, above 0 and at most 1.
        top_k: Sample from this many of the likeliest tokens; 0 samples from all.
        repetition_penalty: Lowers the logits of tokens that are already in the text; 1 does nothing.
        num_beams: Number of beams; 1 means no beam search.
        seed: Seed for sampling, from 0. Default: a different one each time.
    """

    max_new_tokens: int = 128
    do_sample: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    num_beams: int = 1
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_beams"):
            if (count := getattr(self, name)) < 1:
                raise ConfigError(f"{name} must be at least 1, not {count}")
        if self.num_beams > _MOST_BEAMS:
            raise ConfigError(f"num_beams must be at most {_MOST_BEAMS}, not {self.num_beams}")
        if self.temperature is not None and not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature must be at least 0 and finite, not {self.temperature}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if self.top_k is not None and self.top_k < 0:
            raise ConfigError(f"top_k must be at least 0, not {self.top_k}")
        if self.repetition_penalty is not None and not 0 < self.repetition_penalty < math.inf:
            raise ConfigError(f"repetition_penalty must be above 0 and finite, not {self.repetition_penalty}")
        if self.seed is not None and not 0 <= self.seed <= _LARGEST_SEED:
            raise ConfigError(f"seed must be from 0 to {_LARGEST_SEED}, not {self.seed}")
        given = [name for name in ("temperature", "top_p", "top_k") if getattr(self, name)]
        if self.do_sample is False and given:
            raise ConfigError(f"{given[0]} has no effect with do_sample false; leave one of them out")
        if self.temperature == 0 and (self.do_sample or len(given) > 0):
            other = "do_sample" if self.do_sample else given[0]
            raise ConfigError(f"{other} has no effect with temperature 0; leave one of them out")

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn at random."""
        given = bool(self.temperature or self.top_p or self.top_k)
        return given if self.do_sample is None else self.do_sample

    def options(self) -> dict[str, Any]:
        """Returns what transformers' ``generate`` is given beside ``max_new_tokens``.

        What the user leaves open is as the model's own ``generation_config`` says.
        """
        names = ("temperature", "top_p", "top_k")
        # Without sampling, a chat model's sampling settings would cause warnings.
        drawing: dict[str, Any] = dict.fromkeys(names)
        if self.samples:
            drawing = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        penalty = self.repetition_penalty
        others = {} if penalty is None else {"repetition_penalty": float(penalty)}
        return {"do_sample": self.samples, "num_beams": self.num_beams, **drawing, **others}
