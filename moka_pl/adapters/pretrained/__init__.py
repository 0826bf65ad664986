"""Adapters by the habits of transformers and PEFT: attached in other training loops, and on the hub."""
