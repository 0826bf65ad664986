#!/usr/bin/env python3
"""Times the scoring of options with and without a shared prompt; ``--help`` says how."""

from moka_pl.studies.shared_prompt import main

if __name__ == "__main__":
    main()
