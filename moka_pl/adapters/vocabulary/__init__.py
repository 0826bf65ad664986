"""Adapters of embeddings and output heads."""
