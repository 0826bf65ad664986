"""The formats of records, in the order in which a record is tried for them.

To add one, write it in a file of its own beside this one and name it here.
"""

from typing import Any

from moka_pl.data.formats.base import Format
from moka_pl.data.formats.chats import CONVERSATIONS, MESSAGES, TURNS
from moka_pl.data.formats.common import COMMON, Item
from moka_pl.data.formats.hub_tasks import HUB_TASK
from moka_pl.data.formats.llm_adapters import LLM_ADAPTERS
from moka_pl.data.formats.pairs import PAIRS

INSTRUCTION_FORMATS: tuple[Format[dict[str, Any]], ...] = (MESSAGES, CONVERSATIONS, PAIRS, TURNS)
"""Instructions and chats: each gives columns of ``instruction_features``."""

CHOICE_FORMATS: tuple[Format[Item], ...] = (HUB_TASK, LLM_ADAPTERS, COMMON)
"""Multiple-choice questions."""
