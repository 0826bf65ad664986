"""Check the records of MMLU: those of its CSV files and those of the hub."""

from collections.abc import Collection
from typing import Any

from moka_pl.data.formats.choice import parse_choice
from moka_pl.errors import DataError

FORM = "Expected question, choice0 to choice3 (or a list, choices) and answer"
LETTERS = "ABCD"


def parse_mmlu(record: dict[str, Any], location: str, context: str) -> dict[str, Any]:
    """Check one question of MMLU.

    Args:
        record: With `question`, `choices` or `choice0` to `choice3`, and `answer`: 0 to 3, or A to D.
        location: Its position, for messages.
        context: The subject; a record without one (of the hub's joint split) names it in `subject`.

    Returns:
        A row with the columns of `choice_features`; the question without white space around it.

    Raises:
        DataError: A field is missing or of a wrong type, an option is empty, or the answer is none of them.
    """
    subject = context or record.get("subject")
    if not isinstance(subject, str) or not subject:
        raise DataError(f"{location}: field 'subject' must be a name, found {subject!r}.")
    choices = record.get("choices")
    if choices is None:
        names = [f"choice{number}" for number in range(len(LETTERS))]
        missing = [name for name in ("question", *names, "answer") if name not in record]
        if missing:
            found = ", ".join(map(str, record)) or "nothing"
            raise DataError(f"{location}: field {missing[0]!r} is missing; found: {found}. {FORM}.")
        choices = [record[name] for name in names]
        for name, choice in zip(names, choices, strict=True):
            if not isinstance(choice, str):
                kind = type(choice).__name__
                raise DataError(f"{location}: field {name!r} must be text, found {kind} {choice!r}.")
    row: dict[str, Any] = {name: record[name] for name in ("question", "answer") if name in record}
    row |= {"task": f"mmlu_{subject}", "choices": choices}
    if isinstance(row.get("question"), str):
        row["question"] = row["question"].strip()
    if "answer" in row:
        row["answer"] = _index(row["answer"], location)
    return parse_choice(row, location, "")


def _index(answer: object, location: str) -> object:
    """The number of the right option: CSV files hold it as text, some copies as a letter."""
    if not isinstance(answer, str):
        return answer
    text = answer.strip()
    if text.isascii() and text.removeprefix("-").isdigit():
        return int(text)
    if len(text) == 1 and text.upper() in LETTERS:
        return LETTERS.index(text.upper())
    raise DataError(
        f"{location}: field 'answer' is {answer!r}; it must be the number of the right option, 0 to 3, or "
        "its letter, A to D."
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
