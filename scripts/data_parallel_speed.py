#!/usr/bin/env python3
"""Measures how training speed grows with the number of GPUs; ``--help`` says how."""

from moka_pl.studies.benchmark.data_parallel import main

if __name__ == "__main__":
    main()
