#!/usr/bin/env python3
"""Finds out what works with which family of models; ``--help`` says how."""

from moka_pl.studies.architectures.command import main

if __name__ == "__main__":
    main()
