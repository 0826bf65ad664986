#!/usr/bin/env python3
"""Chooses each layer's filters from the gradient of a run's own training data; ``--help`` says how."""

from moka_pl.studies.filters import main

if __name__ == "__main__":
    main()
