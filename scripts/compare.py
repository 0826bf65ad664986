#!/usr/bin/env python3
"""Compares adapters in the same training loop; ``--help`` says how.

python scripts/compare.py --suite tiny                                  # a minute on two CPU cores
python scripts/compare.py --suite commonsense-smollm2 --data FOLDER     # a GPU is advised
python scripts/compare.py --suite commonsense-smollm2 gates --data FOLDER --devices 2 --jobs 16 --minutes 60
python scripts/compare.py --report --results scripts/results/compare    # reports again, of what there is
"""

from pathlib import Path

from moka_pl.studies.compare.command import main

if __name__ == "__main__":
    main(Path(__file__).parent / "suites")
