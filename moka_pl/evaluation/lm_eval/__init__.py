"""The lm-evaluation-harness on a base model and its adapter, and how far it agrees with our own scores."""
