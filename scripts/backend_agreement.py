#!/usr/bin/env python3
"""Do backends train alike? Compares their loss curves with the noise of the seed; ``--help`` says how."""

from moka_pl.studies.backends import main

if __name__ == "__main__":
    main()
