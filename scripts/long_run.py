#!/usr/bin/env python3
"""Watches a training of many minutes; ``--help`` says how."""

from moka_pl.studies.long_run.command import main

if __name__ == "__main__":
    main()
