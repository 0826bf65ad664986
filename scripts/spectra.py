#!/usr/bin/env python3
"""Prints effective ranks and singular spectra of trained updates; ``--help`` says how."""

from moka_pl.studies.spectra import main

if __name__ == "__main__":
    main()
