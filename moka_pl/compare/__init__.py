"""Compares adapters: every rival on the same batches, with a learning rate of its own, tested item by item."""
