"""Evaluating in parts where the memory does not hold a batch."""

import pytest
import torch
from lightning.pytorch import Callback

from moka_pl.evaluation import module as evaluated
from moka_pl.evaluation.memory import Halving, OutOfMemoryError, halved_until_it_fits, is_out_of_memory

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 6.00 GiB.")


class Memory:
    """Holds some rows at a time; counts the rows of each computation that fitted."""

    def __init__(self, rows, error=FULL):
        self.rows, self.error, self.sizes = rows, error, []

    def limited(self, function, rows_of):
        def compute(*args, **options):
            rows = rows_of(*args, **options)
            if rows > self.rows:
                raise self.error
            self.sizes.append(rows)
            return function(*args, **options)

        return compute


@pytest.mark.parametrize("most", [1, 2, 3, 5, 7, 100])
def test_all_rows_are_computed_once_in_order(most, recwarn):
    memory, halving = Memory(most), Halving("rows", "Lower it")
    compute = memory.limited(lambda part: list(range(7))[part], lambda part: part.stop - part.start)
    for _ in range(2):
        assert [row for part in halving.parts(7, compute) for row in part] == list(range(7))
    assert [str(warning.message) for warning in recwarn] == (
        [f"out of memory with 7 rows at a time; the evaluation goes on with {halving.most}"]
        if most < 7
        else []
    )
    assert max(memory.sizes) <= most


def test_one_row_that_does_not_fit_and_other_errors():
    def fail(error):
        def compute(_):
            raise error

        return compute

    with pytest.raises(OutOfMemoryError, match=r"one of the rows alone does not fit: CUDA out .* Lower it"):
        Halving("rows", "Lower it").parts(4, fail(FULL))
    with (
        pytest.raises(OutOfMemoryError, match="a batch size of 1 does not fit"),
        pytest.warns(match="begins again"),
    ):
        halved_until_it_fits(2, fail(MemoryError()))
    with pytest.raises(RuntimeError, match="size mismatch"):
        Halving("rows", "").parts(4, fail(RuntimeError("size mismatch")))
    with pytest.warns(UserWarning, match="batch size of 8; the evaluation begins again with 4"):
        assert halved_until_it_fits(8, Memory(5).limited(lambda size: size, lambda size: size)) == 4


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("full"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate"), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_is_out_of_memory(error, expected):
    assert is_out_of_memory(error) == expected


class Kept(Callback):
    """Keeps what is predicted."""

    def __init__(self):
        self.values = []

    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self.values.append(outputs["log_likelihood"])


@pytest.fixture
def evaluate(make_module, make_trainer, monkeypatch):
    """Validates and predicts with a memory of some rows; returns the metrics, the predictions, the memory."""

    def run(data, rows=1000, shared=1000, error=FULL):
        memory, items = Memory(rows, error), Memory(shared, error)
        with monkeypatch.context() as patched:
            limited = memory.limited(evaluated.score_tokens, lambda model, ids, *rest: len(ids))
            patched.setattr(evaluated, "score_tokens", limited)
            limited = items.limited(evaluated.score_shared, lambda model, batch: len(batch["input_ids"]))
            patched.setattr(evaluated, "score_shared", limited)
            module, kept = make_module(), Kept()
            trainer = make_trainer(kept)
            trainer.validate(module, data(), verbose=False)
            trainer.predict(module, data(), return_predictions=False)
        return module.eval_values, torch.cat(kept.values), memory.sizes, items.sizes

    return run


@pytest.mark.filterwarnings("ignore:.*evaluation items are also")
def test_metrics_are_those_of_whole_batches(evaluate, make_data, make_commonsense, recwarn):
    values, predicted, _, _ = evaluate(lambda: make_data(eval_batch_size=5))
    halved, again, sizes, _ = evaluate(
        lambda: make_data(eval_batch_size=5), rows=2, error=RuntimeError("CUDA error: out of memory")
    )
    assert max(sizes) == 2
    assert halved == pytest.approx(values, rel=1e-5)
    assert torch.allclose(again, predicted, rtol=1e-4)
    said = [str(w.message) for w in recwarn if "out of memory" in str(w.message)]
    assert said == ["out of memory with 5 rows at a time; the evaluation goes on with 2"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*evaluation items are also", "ignore:out of memory")
def test_options_that_share_a_prompt(evaluate, make_commonsense):
    def data():
        return make_commonsense(eval_batch_size=4)

    values, predicted, _, sizes = evaluate(data)
    assert max(sizes) == 4
    halved, again, _, sizes = evaluate(data, shared=1)
    assert max(sizes) == 1
    alone, rows, sizes, _ = evaluate(data, shared=0, rows=2)  # then each option in a row of its own
    assert max(sizes) <= 2
    for other, log_likelihoods in ((halved, again), (alone, rows)):
        assert other == pytest.approx(values, rel=1e-4)
        assert torch.allclose(log_likelihoods, predicted, rtol=1e-4)
