"""Evaluation halves its batch on a GPU whose memory is short."""

import json

import pytest
import torch

pytestmark = pytest.mark.gpu

#: So many that their activations, not the weights and the allocator's blocks, fill the memory.
ROWS = 1024


@pytest.fixture
def validated(make_module, make_data, make_trainer, tmp_path):
    """Validates all rows in one batch with at most some bytes of the GPU's memory; returns the metrics."""
    path = tmp_path / "many.jsonl"
    rows = [{"instruction": f"{i} and so on " * 4, "output": f"answer {i} of many"} for i in range(ROWS)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))

    def run(limit):
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
        try:
            module = make_module()
            trainer = make_trainer(accelerator="gpu")
            data = make_data(validation_path=path, eval_batch_size=ROWS)
            trainer.validate(module, data, verbose=False)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return module.eval_values

    return run


def test_evaluation_goes_on_with_half_the_batch(validated, recwarn):
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    whole = validated(total)
    halved = validated(torch.cuda.max_memory_allocated() // 2)
    assert any(f"out of memory with {ROWS} rows" in str(warning.message) for warning in recwarn)
    assert halved == pytest.approx(whole, rel=1e-3)
