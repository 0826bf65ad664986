"""Adapts a model in TRL's SFTTrainer (``pip install '.[trl]'``): ``python examples/trl_sft.py BASE``."""

import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

import moka_pl

SUMS = [
    {"prompt": f"{a} plus {b} is", "completion": f" {a + b}."} for a in range(2, 12) for b in range(2, 12)
]


def train(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[dict], out: Path, **options: object
) -> SFTTrainer:
    """Trains adapters on prompts and completions and saves them in ``out``; options go to ``SFTConfig``."""
    # Exactly a LoRA of rank 16, for whatever serves these.
    moka_pl.attach(model, moka_pl.MokaConfig(1, filters="servable", target_modules="all-linear"))
    defaults = {"learning_rate": 2e-3, "num_train_epochs": 1, "report_to": "none"}
    defaults["bf16"] = torch.cuda.is_available()  # SFTConfig would refuse to train on a CPU
    trainer = SFTTrainer(
        model,
        args=SFTConfig(str(out), **(defaults | options)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(str(out))  # an adapter directory
    return trainer


if __name__ == "__main__":
    base, tokenizer = (kind.from_pretrained(sys.argv[1]) for kind in (AutoModelForCausalLM, AutoTokenizer))
    train(base, tokenizer, SUMS, Path("trl_sft"), max_steps=100)
    adapted, tokenizer = moka_pl.load_model("trl_sft")  # from here on as any adapter of this package
