"""Scores of a model with its adapters."""
