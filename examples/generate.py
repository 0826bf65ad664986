"""Loads an adapter, answers with it and with the frozen base, and lists its gates.

python examples/generate.py lightning_logs/smollm2/version_0/adapters/best 'What is the capital of France?'
"""

import sys
from pathlib import Path

import torch

from moka_pl import load_model
from moka_pl.adapters import adapters_disabled, moka_layers


def answers(adapter: Path, prompt: str, max_new_tokens: int = 40) -> dict[str, str]:
    """Returns the answers of the adapted model and of its base; greedy, in the model's chat template."""
    model, tokenizer = load_model(adapter)
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    tokens = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(model.device)

    def answer() -> str:
        out = model.generate(**tokens, max_new_tokens=max_new_tokens, do_sample=False)
        return tokenizer.decode(out[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)

    adapted = answer()
    with adapters_disabled(model):
        base = answer()
    with torch.no_grad():
        for name, layer in moka_layers(model).items():
            print(f"{name:<44}", *(f"{alpha:.3f}" for alpha in layer.gates().tolist()))
    return {"adapted": adapted, "base": base}


if __name__ == "__main__":
    for who, text in answers(Path(sys.argv[1]), sys.argv[2]).items():
        print(f"[{who}] {text}")
