"""Options that share their prompt's computation, in bfloat16 on a GPU."""

import pytest
import torch

from moka_pl.adapters import MokaConfig, inject_adapter, moka_layers
from moka_pl.backbone import BackboneConfig, load_backbone
from moka_pl.data.batching.collate import collate_choices
from moka_pl.evaluation.shared_prompt import can_share, score_shared
from moka_pl.lm.scoring import row_sums, score_tokens

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 2e-2), ("float32", 1e-4)])
def test_shared_prompts_give_the_scores_of_whole_rows(dtype: str, bound: float) -> None:
    model = load_backbone(BackboneConfig("tiny", weights="random", compute_dtype=dtype), "cuda").model
    torch.manual_seed(0)
    inject_adapter(model, MokaConfig())
    with torch.no_grad():
        for layer in moka_layers(model).values():
            layer.moka_gate.normal_()
            layer.moka_B.normal_(std=0.02)
    generator = torch.Generator().manual_seed(1)

    def draw(count: int) -> list[int]:
        return torch.randint(1, 300, (count,), generator=generator).tolist()

    items = [
        {
            "prompt_ids": draw(prompt),
            "option_ids": [draw(option) for option in options],
            "option_chars": [1] * len(options),
            "answer": 0,
            "task": 0,
        }
        for prompt, options in ((200, (3, 9, 1, 5)), (120, (1, 1, 1, 1)), (75, (12, 4)))
    ]
    batch = collate_choices(items, [False] * len(items), 0, "auto")
    on_gpu = {name: x.cuda() for name, x in batch.items() if isinstance(x, torch.Tensor)}
    shared = {name: x.cuda() for name, x in batch["shared"].items()}
    with torch.no_grad():
        assert can_share(model)
        rows = len(batch["input_ids"])
        whole = row_sums(score_tokens(model, on_gpu["input_ids"], on_gpu["labels"]), rows)
        together = row_sums(score_shared(model, shared), rows)
    assert float((whole - together).abs().max() / whole.abs().max()) < bound
