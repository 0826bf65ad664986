"""Speed and memory of MoKA beside the frozen base and PEFT's adapters; ``scripts/benchmark.py`` runs it."""
