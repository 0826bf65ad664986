"""Batches whose rows have adapters of their own, on a GPU; run with ``pytest -m gpu``."""

import pytest
import torch
from torch import Tensor

from moka_pl import MokaAdapters
from moka_pl.adapters import MokaConfig, moka_layers
from moka_pl.adapters.named.rows import RowLinear
from moka_pl.backbone import BackboneConfig, load_backbone
from moka_pl.ops.rows import alike
from moka_pl.studies.mixed_batches import fill

pytestmark = pytest.mark.gpu

CONFIGS = {
    "diverse": MokaConfig(components=10),
    "servable": MokaConfig(1, filters="servable", target_modules="all-linear"),
}
NAMES = [f"adapter {i % 3}" for i in range(7)]


@pytest.fixture(scope="module", params=CONFIGS)
def named(request: pytest.FixtureRequest) -> MokaAdapters:
    config = BackboneConfig("smollm2-135m", weights="random", compute_dtype="float32")
    named = MokaAdapters(load_backbone(config, "cuda").model.eval())
    fill(named, CONFIGS[request.param], 3)
    return named


def logits(named: MokaAdapters, ids: Tensor, **options: object) -> Tensor:
    with torch.no_grad():
        return named(input_ids=ids, **options).logits.float()


@pytest.mark.parametrize("tokens", [1, 3, 16, 64, 200])
def test_each_row_is_that_of_its_adapter(named: MokaAdapters, tokens: int) -> None:
    ids = torch.randint(4, 250, (len(NAMES), tokens), generator=torch.Generator().manual_seed(0)).cuda()
    mixed = logits(named, ids, adapter_names=NAMES)
    with named.disable_adapter():
        base = logits(named, ids)
    for name in dict.fromkeys(NAMES):
        rows = [i for i, row in enumerate(NAMES) if row == name]
        named.set_adapter(name)
        alone = logits(named, ids[rows])
        effect = (alone - base[rows]).norm()
        assert effect > 0
        assert (mixed[rows] - alone).norm() < 0.01 * effect


def test_every_way_computes_the_same(named: MokaAdapters, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(4, 250, (len(NAMES), 1), generator=torch.Generator().manual_seed(1)).cuda()
    named.set_adapter("adapter 0")
    found = {}
    thin = all(alike(layer.shapes, layer.out_features) for layer in moka_layers(named.model).values())
    for path in ("decoded", "batched", "separate", *(["thin"] if thin else [])):
        monkeypatch.setattr(RowLinear, "choose_path", lambda self, x, path=path: path)
        found[path] = logits(named, ids, adapter_names=NAMES)
    with named.disable_adapter():
        effect = (found["separate"] - logits(named, ids)).norm()
    for other in found:
        assert (found["decoded"] - found[other]).norm() < 0.01 * effect
