"""A tiny tokenizer, and a cache folder of our own."""

from shared.text import bos_tokenizer, own_cache, shared_tokenizer, tiny_tokenizer, write_jsonl

__all__ = ["bos_tokenizer", "own_cache", "shared_tokenizer", "tiny_tokenizer", "write_jsonl"]
