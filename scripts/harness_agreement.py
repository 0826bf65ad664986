#!/usr/bin/env python3
"""Compares moka_pl's evaluation with the lm-evaluation-harness, item for item; ``--help`` says what else.

python scripts/harness_agreement.py --data FOLDER --items 500      # arc_easy/test.json and so on in it
python scripts/harness_agreement.py --mmlu FOLDER --items 100      # dev/ and test/ with MMLU's CSV files
"""

from moka_pl.studies.agreement.command import main

if __name__ == "__main__":
    main()
