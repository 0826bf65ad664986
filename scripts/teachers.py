#!/usr/bin/env python3
"""Do gates find structure? Trains one layer towards updates of known structure; ``--help`` says how.

python scripts/teachers.py --json teachers.json --figure teachers.png
"""

from moka_pl.studies.teachers.command import main

if __name__ == "__main__":
    main()
