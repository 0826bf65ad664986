"""Compares adapters: every method on the same batches, with its own learning rate, tested item by item."""
