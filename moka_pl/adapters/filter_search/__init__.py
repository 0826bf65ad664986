"""Filters chosen from gradients: which shapes can express what a layer's weight wants to become."""
