"""Kernels of updates that are two thin products: an adapter's, and those of a batch with several."""
