"""Local data in the known forms, and a small model with an adapter that does something."""

from shared.lm_eval import adapter, beginning_tokenizer, mmlu, offline, questions

__all__ = ["adapter", "beginning_tokenizer", "mmlu", "offline", "questions"]
