"""Steps and epochs of a run, as Lightning counts them from the trainer's options."""

import pytest

from moka_pl.planning.work import Run, _steps


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_epochs": 2}, (20, 2.0)),
        ({"max_epochs": 2, "max_steps": 25}, (20, 2.0)),
        ({"max_epochs": 3, "max_steps": 25}, (25, 2.5)),
        ({"max_epochs": -1, "max_steps": 25}, (25, 2.5)),
        ({"max_epochs": None, "max_steps": 25}, (25, 2.5)),
        ({"max_epochs": None}, (10_000, 1000.0)),
        ({"max_epochs": -1}, (None, 1.0)),
        ({"max_epochs": 2, "accumulate_grad_batches": 4}, (6, 2.0)),
    ],
)
def test_the_run_ends_at_whichever_limit_comes_first(
    options: dict, expected: tuple[int | None, float]
) -> None:
    assert _steps(10, Run(options=options)) == expected
