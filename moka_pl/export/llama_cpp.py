"""GGUF files as llama.cpp reads them, through ``llama-cpp-python`` where that is installed."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moka_pl.export.check import Measured, measured

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_F32 = 0  # ggml's number of float32, for the cache of keys and values
_GREEDY = 16
_PROBES = (
    "In 2024 it cost 1,234.50 €.",
    "  two  spaces\n\n\tand a tab ",
    "naïve café 你好 🙂",
    "I'm sure we'll see",
)


def version() -> str | None:
    """Returns the reader's name and version, or None if it is not installed."""
    try:
        import llama_cpp
    except ImportError:
        return None
    return f"llama-cpp-python {llama_cpp.__version__}"


@dataclass
class LlamaCpp:
    """A model of llama.cpp's on the CPU, in float32 where its weights are.

    Args:
        file: A GGUF model.
        adapter: A GGUF adapter to apply.
        context: Most tokens of a prompt with what is generated.
    """

    file: Path
    adapter: Path | None = None
    context: int = 128

    def __post_init__(self) -> None:
        """Loads the model."""
        from llama_cpp import Llama

        self._llama: Any = Llama(
            str(self.file),
            lora_path=None if self.adapter is None else str(self.adapter),
            n_ctx=self.context,
            n_gpu_layers=0,
            logits_all=True,
            type_k=_F32,
            type_v=_F32,
            verbose=False,
        )

    def logits(self, ids: Tensor) -> Tensor:
        """Returns the logits of a prompt, shape (T, V)."""
        self._llama.reset()
        self._llama.eval(ids.tolist())
        return torch.from_numpy(self._llama.scores[: len(ids)].copy())

    def measure(self, prompts: list[Tensor]) -> Measured:
        """Runs the model on every prompt."""
        return measured([self.logits(ids) for ids in prompts], prompts)

    def greedy(self, ids: Tensor, count: int = _GREEDY) -> list[int]:
        """Returns the likeliest next token, time after time."""
        last = self.logits(ids)[-1]
        made: list[int] = []
        while True:
            made.append(int(last.argmax()))
            if len(made) == count:
                return made
            self._llama.eval(made[-1:])
            last = torch.from_numpy(self._llama.scores[self._llama.n_tokens - 1])

    def other_tokens(self, tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> str | None:
        """Returns a text that llama.cpp reads into other tokens than the tokenizer, or None."""
        for text in [*texts, *_PROBES]:
            ours = list(tokenizer(text, add_special_tokens=False).input_ids)
            if self._llama.tokenize(text.encode(), add_bos=False, special=True) != ours:
                return text
        return None


@torch.no_grad()
def greedy(model: Any, ids: Tensor, count: int = _GREEDY) -> list[int]:
    """Returns transformers' likeliest next tokens, whatever ends an answer.

    Args:
        model: A causal language model.
        ids: Tokens of the prompt, shape (T,).
        count: How many to generate.
    """
    for _ in range(count):
        last = model(input_ids=ids[None].to(model.device)).logits[0, -1]  # (V,)
        ids = torch.cat([ids, last.argmax()[None].cpu()])  # (T + 1,)
    return [int(one) for one in ids[-count:]]
