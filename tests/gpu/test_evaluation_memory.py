"""Evaluation halves its batch on a GPU whose memory is short."""

import pytest
import torch

pytestmark = pytest.mark.gpu


@pytest.fixture
def validated(make_module, make_data, make_trainer):
    """Validates in batches of 5 rows with at most some bytes of the GPU's memory; returns the metrics."""

    def run(limit):
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
        try:
            module = make_module()
            trainer = make_trainer(accelerator="gpu")
            trainer.validate(module, make_data(eval_batch_size=5), verbose=False)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return module.eval_values

    return run


def test_evaluation_goes_on_with_half_the_batch(validated, recwarn):
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.reset_peak_memory_stats()
    whole = validated(total)
    peak = torch.cuda.max_memory_reserved()
    for share in (0.9, 0.8, 0.7, 0.6, 0.5):  # what five rows need, and one row does not
        halved = validated(int(share * peak))
        if any("out of memory with 5 rows" in str(warning.message) for warning in recwarn):
            break
    else:
        pytest.fail("half of the memory sufficed")
    assert halved == pytest.approx(whole, rel=1e-3)
