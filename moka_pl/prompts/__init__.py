"""Every text that a model is shown, and where in it an answer stands."""

from moka_pl.prompts.templates import alpaca_prompt

__all__ = ["alpaca_prompt"]
