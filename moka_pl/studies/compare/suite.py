"""What is compared: rivals × learning rates × seeds."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

Settings = dict[str, Any]
Pick = Literal["first", "all"]

#: The row without training, in tables and as the start of every rival.
FROZEN = "frozen base"


@dataclass(frozen=True)
class Rival:
    """One of the things that are compared.

    Attributes:
        name: Its row in the table.
        adapter: What the module's option ``adapter`` takes.
        learning_rates: Rates that are tried.
        backbone: Options of the base for this rival only, over the suite's.
        learning_rate_ratios: The module's option of that name; empty for one rate.
    """

    name: str
    adapter: Settings
    learning_rates: tuple[float, ...]
    backbone: Settings = field(default_factory=dict)
    learning_rate_ratios: Settings = field(default_factory=dict)


@dataclass(frozen=True)
class Suite:
    """A comparison.

    Attributes:
        name: Name of its folder.
        about: A sentence for the report.
        backbone: Options of the base model.
        data: Data module (``class_path``, ``init_args``): its training data train, its validation data pick
            the learning rate.
        test: Data module whose test data are reported; None takes that of ``data``.
        training: ``trainer`` (options of Lightning's trainer), ``optimizer`` and ``lr_scheduler``
            (``class_path``, ``init_args``), ``gradient_checkpointing``, ``cuda_graphs``.
        seeds: Seeds of the order of the data and the start of the adapters.
        pick: The rate is picked by the validation loss of the ``first`` seed, or by its mean over ``all``.
        frozen: Test the base without training, too.
        reference: The rival that the others are compared with; None compares every pair.
        rivals: What is compared.
    """

    name: str
    about: str
    backbone: Settings
    data: Settings
    test: Settings | None
    training: Settings
    seeds: tuple[int, ...]
    pick: Pick
    frozen: bool
    reference: str | None
    rivals: tuple[Rival, ...]

    @property
    def pick_seeds(self) -> tuple[int, ...]:
        """The seeds that the learning rate is picked with."""
        return self.seeds[:1] if self.pick == "first" else self.seeds

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> "Suite":
        """A suite of what `dataclasses.asdict` made of it, and JSON perhaps kept."""
        rivals = (Rival(**{**r, "learning_rates": tuple(r["learning_rates"])}) for r in stored["rivals"])
        return cls(**{**stored, "seeds": tuple(stored["seeds"]), "rivals": tuple(rivals)})


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> Settings:
    """Nested mappings laid over each other; the result shares nothing with them.

    A mapping of another ``class_path`` takes the other's place: the options of one class are not another's.
    """
    result = copy.deepcopy(dict(below))
    for key, value in above.items():
        old = result.get(key)
        both = isinstance(old, dict) and isinstance(value, Mapping) and not _other_class(old, value)
        result[key] = merged(cast(Settings, old), value) if both else copy.deepcopy(value)
    return result


def _other_class(below: Mapping[str, Any], above: Mapping[str, Any]) -> bool:
    return "class_path" in above and below.get("class_path") != above["class_path"]
