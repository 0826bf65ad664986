"""Checkpoints written while training goes on."""
