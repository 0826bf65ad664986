"""The error that every problem with a user's data is reported as."""

from moka_pl.errors import MokaError


class DataError(MokaError):
    """Data that cannot be used: the message names the file, the line or row, the field and the remedy."""
