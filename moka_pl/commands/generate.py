"""``moka-pl generate``: an answer from a base model with its adapter."""

import math
from pathlib import Path

from moka_pl.errors import ConfigError


def generate(
    adapter: Path,
    prompt: str,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    compare: bool = False,
    base: str | None = None,
) -> None:
    """Answer a prompt with a trained adapter.

    Args:
        adapter: An adapter directory.
        prompt: What the user says; the tokenizer's chat template is put around it where there is one.
        max_new_tokens: Most tokens to generate.
        temperature: Sampling temperature; 0 always takes the likeliest token.
        compare: Print the frozen base model's answer too.
        base: Where the base model lies, if not under the name that the adapter remembers.

    Raises:
        ConfigError: If an option has a value that cannot work.
        AdapterError: If the adapter cannot be read or is of another base model.
        BackboneError: If the base model cannot be had.
    """
    if not prompt:
        raise ConfigError("prompt is empty; say something")
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    if not 0 <= temperature < math.inf:
        raise ConfigError(f"temperature must be at least 0 and finite, not {temperature}")
    import torch

    from moka_pl.adapters import adapters_disabled
    from moka_pl.load import load_model

    model, tokenizer = load_model(adapter, base=base)
    text = prompt
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": prompt}]
        text = str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
    tokens = tokenizer(text, return_tensors="pt", add_special_tokens=text is prompt).to(model.device)
    sampling = {"do_sample": temperature > 0} | ({"temperature": temperature} if temperature > 0 else {})

    def answer() -> str:
        with torch.no_grad():
            out = model.generate(
                input_ids=tokens["input_ids"],
                attention_mask=tokens["attention_mask"],
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
                **sampling,
            )
        return str(tokenizer.decode(out[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True))

    if compare:
        with adapters_disabled(model):
            print(f"[base] {answer()}\n")
        print(f"[adapted] {answer()}")
    else:
        print(answer())
