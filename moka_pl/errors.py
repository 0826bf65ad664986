"""Errors that a user can mend; the command line prints them without a traceback."""

#: The status that a shell reports of a program that Ctrl-C has ended.
INTERRUPTED = 130


class MokaError(ValueError):
    """Base of all errors about what the user gave; the message names the value and the remedy."""


class ConfigError(MokaError):
    """An option has a value that cannot work."""


class BackboneError(MokaError):
    """The base model cannot be found, loaded or quantised."""


class AdapterError(MokaError):
    """An adapter cannot be injected, read or written."""
