#!/usr/bin/env python3
"""Writes tasks whose answers are checked by rule; ``--help`` says how."""

from moka_pl.studies.reasoning import main

if __name__ == "__main__":
    main()
