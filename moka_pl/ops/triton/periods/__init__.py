"""Kernels over tiles of ΔW that components of several shapes share."""
