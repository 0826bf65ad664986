"""Two adapters, layer by layer."""

from dataclasses import dataclass
from typing import NamedTuple

from moka_pl.inspection.report import LARGEST, Inspection, LayerNumbers
from moka_pl.ops.spectrum import inner_product


class LayerDifference(NamedTuple):
    """How the updates of a layer differ.

    Attributes:
        name: The layer's full name.
        kind: As :attr:`Layer.kind`.
        number: As :attr:`Layer.number`.
        norms: ‖ΔW‖ and ‖ΔW'‖.
        cosine: ⟨ΔW, ΔW'⟩ / (‖ΔW‖ ‖ΔW'‖): 1 for updates of one direction, 0 for unrelated ones; None where one
            of them is 0.
        distance: ‖ΔW − ΔW'‖ / max(‖ΔW‖, ‖ΔW'‖), from 0 to 2; None where both are 0.
        gates: α'_i − α_i of each component; empty where the components' shapes differ.
    """

    name: str
    kind: str
    number: int
    norms: tuple[float, float]
    cosine: float | None
    distance: float | None
    gates: list[float]

    @property
    def gate_distance(self) -> float | None:
        """½ Σ |α'_i − α_i|, of softmax gates the share that has moved; None as ``gates``."""
        return sum(map(abs, self.gates)) / 2 if self.gates else None


@dataclass(frozen=True)
class Comparison:
    """Two adapters, compared.

    Attributes:
        layers: What both have, in the model's order.
        notes: Sentences on what cannot be compared.
    """

    layers: list[LayerDifference]
    notes: list[str]


def compare(first: Inspection, second: Inspection) -> Comparison:
    """Compares the updates and gates of the layers that two adapters share.

    Args:
        first: An adapter.
        second: Another one.
    """
    notes = []
    prints = [one.info.base.fingerprint for one in (first, second)]
    if all(prints) and prints[0] != prints[1]:
        notes.append(f"they are of different bases, with fingerprints {prints[0]} and {prints[1]}")
    other = {numbers.name: numbers for numbers in second.layers}
    shared, differing = [], []
    for numbers in first.layers:
        if (match := other.get(numbers.name)) is None:
            continue
        difference = _difference(numbers, match)
        if difference is None:
            differing.append(numbers.name)
        else:
            shared.append(difference)
    names = {numbers.name for numbers in first.layers}
    for count, told in (
        (len(names - other.keys()), "only the first has"),
        (len(other.keys() - names), "only the second has"),
    ):
        if count:
            notes.append(f"{told} {count} of the layers")
    if differing:
        notes.append(
            f"{len(differing)} layers (first {differing[0]}) are not compared: their sizes are unknown, "
            "differ, or are too large"
        )
    return Comparison(shared, notes)


def _difference(one: LayerNumbers, other: LayerNumbers) -> LayerDifference | None:
    first, second = one.layer.update, other.layer.update
    if first is None or second is None or one.norm is None or other.norm is None:
        return None
    if (first.m, first.n) != (second.m, second.n) or first.m * first.n > LARGEST:
        return None
    product, norms = inner_product(first, second), (one.norm, other.norm)
    square = max(0.0, norms[0] ** 2 + norms[1] ** 2 - 2 * product)
    both, largest = norms[0] * norms[1], max(norms)
    alike = first.shapes == second.shapes
    gates = (other.layer.alpha - one.layer.alpha).tolist() if alike else []
    return LayerDifference(
        one.name,
        one.layer.kind,
        one.layer.number,
        norms,
        product / both if both else None,
        square**0.5 / largest if largest else None,
        gates,
    )
