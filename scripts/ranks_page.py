#!/usr/bin/env python3
"""Rewrites the table on several GPUs of docs/tuning.md from results of data_parallel_speed.py."""

from moka_pl.studies.ranks.page import main

if __name__ == "__main__":
    main()
