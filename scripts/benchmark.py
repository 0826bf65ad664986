#!/usr/bin/env python3
"""Times a training step of MoKA beside the frozen base and PEFT's adapters; ``--help`` says what else.

python scripts/benchmark.py                              # SmolLM2's shape, two minutes on two CPU cores
python scripts/benchmark.py --preset llama2-7b-h100      # LLaMA2-7B's shape on a GPU, 8 x 512 tokens
"""

from moka_pl.studies.benchmark.command import main

if __name__ == "__main__":
    main()
