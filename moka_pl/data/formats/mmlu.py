"""The questions of MMLU, as its CSV files and the hub hold them, and its subjects."""

from collections.abc import Collection
from typing import Any

from moka_pl.data.formats.base import Record, brief, require, require_text
from moka_pl.data.formats.choice import parse_choice
from moka_pl.errors import DataError

LETTERS = "ABCD"


def parse_mmlu(record: Record, context: str = "") -> dict[str, Any]:
    """Parses one question of MMLU as ``parse_choice`` does, without white space around the question.

    Args:
        record: With ``question``, ``choices`` or ``choice0`` to ``choice3``, and ``answer``: 0 to 3, or A to
            D.
        context: The subject; a record without one (of the hub's joint split) names it in ``subject``.

    Raises:
        DataError: The record is malformed, or names no subject.
    """
    subject = context or record.get("subject")
    if not isinstance(subject, str) or not subject:
        raise DataError(f"field 'subject' must be a name, found {brief(subject)}")
    question, choices = require(record, "question"), record.get("choices")
    if choices is None:
        choices = [require_text(record, f"choice{number}") for number in range(len(LETTERS))]
    row = {
        "task": f"mmlu_{subject}",
        "question": question.strip() if isinstance(question, str) else question,
        "choices": choices,
        "answer": _index(require(record, "answer")),
    }
    return parse_choice(row)


def _index(answer: object) -> object:
    """Returns the number of the right option: CSV files hold it as text, some copies as a letter."""
    if not isinstance(answer, str):
        return answer
    text = answer.strip()
    if text.isascii() and text.removeprefix("-").isdigit():
        return int(text)
    if len(text) == 1 and text.upper() in LETTERS:
        return LETTERS.index(text.upper())
    raise DataError(
        f"field 'answer' is {brief(answer)}; it must be the number of the right option, 0 to 3, or its "
        "letter, A to D"
    )


CATEGORIES: dict[str, tuple[str, ...]] = {
    "stem": (
        "abstract_algebra",
        "anatomy",
        "astronomy",
        "college_biology",
        "college_chemistry",
        "college_computer_science",
        "college_mathematics",
        "college_physics",
        "computer_security",
        "conceptual_physics",
        "electrical_engineering",
        "elementary_mathematics",
        "high_school_biology",
        "high_school_chemistry",
        "high_school_computer_science",
        "high_school_mathematics",
        "high_school_physics",
        "high_school_statistics",
        "machine_learning",
    ),
    "humanities": (
        "formal_logic",
        "high_school_european_history",
        "high_school_us_history",
        "high_school_world_history",
        "international_law",
        "jurisprudence",
        "logical_fallacies",
        "moral_disputes",
        "moral_scenarios",
        "philosophy",
        "prehistory",
        "professional_law",
        "world_religions",
    ),
    "social_sciences": (
        "econometrics",
        "high_school_geography",
        "high_school_government_and_politics",
        "high_school_macroeconomics",
        "high_school_microeconomics",
        "high_school_psychology",
        "human_sexuality",
        "professional_psychology",
        "public_relations",
        "security_studies",
        "sociology",
        "us_foreign_policy",
    ),
    "other": (
        "business_ethics",
        "clinical_knowledge",
        "college_medicine",
        "global_facts",
        "human_aging",
        "management",
        "marketing",
        "medical_genetics",
        "miscellaneous",
        "nutrition",
        "professional_accounting",
        "professional_medicine",
        "virology",
    ),
}
"""The 57 subjects of MMLU in their four published categories."""


def mmlu_groups(tasks: Collection[str]) -> dict[str, list[str]]:
    """Returns the tasks ``mmlu_SUBJECT`` of each category ``mmlu_CATEGORY`` that has any."""
    groups = {
        f"mmlu_{category}": [task for subject in subjects if (task := f"mmlu_{subject}") in tasks]
        for category, subjects in CATEGORIES.items()
    }
    return {category: members for category, members in groups.items() if members}
