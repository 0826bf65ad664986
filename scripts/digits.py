#!/usr/bin/env python3
"""Adapts a small vision transformer to new digits by several methods; ``--help`` says how."""

from moka_pl.studies.digits import main

if __name__ == "__main__":
    main()
