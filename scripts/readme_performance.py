#!/usr/bin/env python3
"""Rewrites the README's section on performance from results of the benchmark.

python scripts/benchmark.py --preset llama2-7b-h100 --json llama2-7b.json
python scripts/readme_performance.py llama2-7b.json            # --check changes nothing and exits with 1
                                                               # where the README says something else
"""

from moka_pl.studies.benchmark.readme import main

if __name__ == "__main__":
    main()
