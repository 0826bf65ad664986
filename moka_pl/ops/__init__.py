"""The mathematics of mixtures of Kronecker products, on plain tensors."""
