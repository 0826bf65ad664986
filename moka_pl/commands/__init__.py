"""Commands beside Lightning's own: plain functions, exposed by :mod:`moka_pl.cli`."""

from moka_pl.commands.evaluate import evaluate
from moka_pl.commands.generate import generate
from moka_pl.commands.inspect import inspect

__all__ = ["evaluate", "generate", "inspect"]
