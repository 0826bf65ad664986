"""``python -m moka_pl``."""

from moka_pl.cli import main

if __name__ == "__main__":
    main()
