"""Data modules: instructions and chats, multiple-choice questions, plain text, and mixtures of them."""

from moka_pl.data.base import MokaDataModule
from moka_pl.data.commonsense import CommonsenseData
from moka_pl.data.encoding.report import EncodingReport
from moka_pl.data.instruction import InstructionData
from moka_pl.data.mixture import MixtureData
from moka_pl.data.mmlu import MmluData
from moka_pl.data.text import TextData
from moka_pl.errors import DataError

__all__ = [
    "CommonsenseData",
    "DataError",
    "EncodingReport",
    "InstructionData",
    "MixtureData",
    "MmluData",
    "MokaDataModule",
    "TextData",
]
