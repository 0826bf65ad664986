#!/usr/bin/env python3
"""Measures what packing and bucketing gain; ``--help`` says how."""

from moka_pl.studies.benchmark.batching import main

if __name__ == "__main__":
    main()
