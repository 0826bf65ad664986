"""Adapts a model in transformers' own Trainer: ``python examples/hf_trainer.py HUB-ID-OR-FOLDER TEXTS``."""

import sys
from pathlib import Path

import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import moka_pl


def train(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], out: Path, **options: object
) -> transformers.Trainer:
    """Trains adapters on texts and saves them in ``out``; options go to ``TrainingArguments``.

    Goes on from the last checkpoint in ``out``, if there is one: give each training a folder of its own.
    """
    moka_pl.attach(model, moka_pl.MokaConfig(components=10))
    defaults = {"learning_rate": 2e-3, "num_train_epochs": 1, "report_to": "none"}
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(str(out), **(defaults | options)),
        train_dataset=[tokenizer(text, truncation=True, max_length=512) for text in texts],
        data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    trainer.train(resume_from_checkpoint=any(out.glob("checkpoint-*")))
    trainer.save_model(str(out))  # an adapter directory, as in every checkpoint
    return trainer


if __name__ == "__main__":
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    lines = Path(sys.argv[2]).read_text(encoding="utf-8").splitlines()
    train(AutoModelForCausalLM.from_pretrained(sys.argv[1]), tokenizer, lines, Path("hf_trainer"))
    adapted, tokenizer = moka_pl.load_model("hf_trainer")  # from here on as any adapter of this package
