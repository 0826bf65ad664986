"""``python -m moka_pl``."""

from moka_pl.cli.main import main

if __name__ == "__main__":
    main()
