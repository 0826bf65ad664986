#!/usr/bin/env python3
"""Measures trainings on several GPUs; ``--help`` says how."""

from moka_pl.studies.ranks.command import main

if __name__ == "__main__":
    main()
