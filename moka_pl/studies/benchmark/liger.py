"""Rows with Liger's kernels for norms, rotary embeddings and gated MLPs, by transformers' own switch."""

import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING

from moka_pl.studies.benchmark.cases import Remove, Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MISSING = "rows with Liger are left out: liger_kernel is not installed; pip install 'moka_pl[liger]'"


def installed() -> bool:
    """Whether the package is there."""
    return find_spec("liger_kernel") is not None


def with_liger(row: Row) -> Row:
    """The row on a model with Liger's kernels."""

    def put(model: "PreTrainedModel") -> Remove:
        from transformers.integrations.liger import apply_liger_kernel

        # Liger also replaces functions of the whole modelling module, which other models share.
        shared = vars(sys.modules[type(model).__module__])
        before = dict(shared)
        # The loss is computed outside the model (moka_pl.lm.scoring), so Liger's fused loss would never run.
        apply_liger_kernel(model, {"fused_linear_cross_entropy": False})
        try:
            remove = row.put(model)
        except BaseException:
            shared.update(before)
            raise

        def both() -> None:
            remove()
            shared.update(before)

        return both

    return Row(f"{row.name} + Liger", put, spoils=True)
