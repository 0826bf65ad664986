#!/usr/bin/env python3
"""Measures how long a fit takes from its command to its first step, and names the parts.

python scripts/startup.py --config configs/smollm2.yaml
"""

from moka_pl.studies.benchmark.startup import main

if __name__ == "__main__":
    main()
