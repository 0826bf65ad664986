"""Single trainings of a suite, told apart by a hash of everything that decides about them."""

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from moka_pl.studies.compare.suite import FROZEN, Rival, Settings, Suite, merged

#: Part of every hash: raised when the same settings come to mean another training.
_FORMAT = 2
#: An adapter that has learnt nothing changes nothing; this one fits any base.
_UNTRAINED: Settings = {"components": 1, "target_modules": "all-linear"}
#: Options of the trainer that a test without training heeds, too.
_EVALUATION = ("accelerator", "precision", "limit_test_batches")


@dataclass(frozen=True)
class Run:
    """One training of one rival.

    Attributes:
        rival: Name of the rival.
        rate: Learning rate; None for the frozen base.
        seed: Seed of the data's order and the adapters' start.
        settings: ``backbone``, ``adapter``, ``data``, ``training`` of the run, and ``learning_rate_ratios``
            where it has some.
        test: The data module whose test data are reported.
    """

    rival: str
    rate: float | None
    seed: int
    settings: Settings
    test: Settings

    @cached_property
    def key(self) -> str:
        """Hash of what is trained, 12 hexadecimal digits; names are no part of it."""
        # The frozen base's adapter has learnt nothing, and decides about nothing.
        settings = self.settings if self.rate is not None else self.settings | {"adapter": {}}
        return _hash([_FORMAT, settings, self.rate, self.seed])

    @cached_property
    def test_key(self) -> str:
        """Hash of what is tested."""
        return _hash([_FORMAT, self.test])

    @property
    def folder(self) -> str:
        """Name of its folder: words to read, and the key that identifies it."""
        words = re.sub(r"[^a-z0-9]+", "-", self.rival.lower()).strip("-")
        rate = "" if self.rate is None else f"_lr{self.rate:g}"
        return f"{words}{rate}_seed{self.seed}_{self.key}"

    def __str__(self) -> str:
        if self.rate is None:
            return self.rival
        return f"{self.rival}, lr {self.rate:g}, seed {self.seed}"


def run_of(suite: Suite, rival: Rival, rate: float, seed: int) -> Run:
    """The training of a rival with a rate and a seed."""
    settings: dict[str, Any] = {
        "backbone": merged(suite.backbone, rival.backbone),
        "adapter": rival.adapter,
        "data": suite.data,
        "training": suite.training,
    }
    if rival.learning_rate_ratios:  # not in the hashes of runs without
        settings["learning_rate_ratios"] = rival.learning_rate_ratios
    return Run(rival.name, rate, seed, settings, suite.test or suite.data)


def frozen_run(suite: Suite) -> Run:
    """The test of the base without training."""
    trainer = suite.training.get("trainer", {})
    kept = {option: trainer[option] for option in _EVALUATION if option in trainer}
    training = {"trainer": kept} if kept else {}
    settings = {"backbone": suite.backbone, "adapter": _UNTRAINED, "data": suite.data, "training": training}
    return Run(FROZEN, None, suite.seeds[0], settings, suite.test or suite.data)


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
