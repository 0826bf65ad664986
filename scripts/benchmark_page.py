#!/usr/bin/env python3
"""Rewrites the tables of docs/benchmarks.md from results of the benchmark.

python scripts/benchmark.py --preset llama2-7b-h100 --json llama2-7b.json
python scripts/benchmark_page.py llama2-7b.json            # --check changes nothing and exits with 1
                                                           # where the page says something else
"""

from moka_pl.studies.benchmark.page import main

if __name__ == "__main__":
    main()
