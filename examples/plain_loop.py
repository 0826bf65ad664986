"""Adapts a transformers model in a plain training loop, without Lightning: ``python examples/plain_loop.py``.

Any model with ``nn.Linear`` or bitsandbytes 4-bit layers will do. This one is tiny and random, and learns a
sentence.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from moka_pl import MokaConfig, inject_adapter
from moka_pl.adapters import adapters_disabled, merge


def adapt(model: PreTrainedModel, tokens: torch.Tensor, steps: int = 100, lr: float = 1e-2) -> list[float]:
    """Trains adapters on token ids of shape (examples, length) and returns the loss at every step."""
    layers = inject_adapter(model, MokaConfig(components=4, target_modules="all-linear"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    print(f"{len(layers)} layers, {sum(p.numel() for p in trained):,} trainable parameters")
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, initializer_range=0.2, **sizes))
    tokens = torch.tensor([list(b"Kronecker products are small, and of full rank.")])
    losses = adapt(model, tokens)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    with torch.no_grad(), adapters_disabled(model):
        print(f"frozen base: {model(input_ids=tokens, labels=tokens).loss:.3f}")
    merge(model)  # dense layers W + ΔW from here on
