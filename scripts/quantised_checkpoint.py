#!/usr/bin/env python3
"""Has GPTQModel write a GPTQ or AWQ checkpoint; ``--help`` says how."""

from moka_pl.studies.quantised_checkpoint import main

if __name__ == "__main__":
    main()
