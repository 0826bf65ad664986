#!/usr/bin/env python3
"""Measures merged exports of models with random weights; ``--help`` says how."""

from moka_pl.studies.exports import main

if __name__ == "__main__":
    main()
