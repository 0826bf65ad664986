#!/usr/bin/env python3
"""Measures many adapters on one base, and batches with several of them; ``--help`` says how."""

from moka_pl.studies.mixed_batches import main

if __name__ == "__main__":
    main()
