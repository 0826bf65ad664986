import random

import pytest
import torch

from moka_pl.adapters import MokaConfig
from moka_pl.errors import AdapterError
from moka_pl.training.checkpoint import StoredRun, check_same_factors, rng_state, set_rng_state

CPU = torch.device("cpu")


def draw():
    return torch.rand(3).tolist(), random.random()


def test_generators_go_on_where_they_were(tmp_path):
    torch.manual_seed(1)
    random.seed(2)
    torch.save(rng_state(CPU), tmp_path / "rng.pt")
    expected = draw()
    torch.manual_seed(3)
    random.seed(4)
    assert draw() != expected
    set_rng_state(torch.load(tmp_path / "rng.pt", weights_only=True), CPU, rank=0)
    assert draw() == expected


def test_other_ranks_get_generators_of_their_own():
    torch.manual_seed(1)
    state = rng_state(CPU)
    own = draw()[0]
    found = []
    for rank in (1, 2, 1):
        set_rng_state(state, CPU, rank)
        found.append(draw()[0])
    assert found[0] == found[2]
    assert found[0] != found[1]
    assert own not in found


def test_other_factors_of_the_same_sizes_are_refused() -> None:
    own = MokaConfig(filters="square", components=4).to_dict()
    check_same_factors(own, own)
    written = MokaConfig(filters="diverse", components=4).to_dict()
    with pytest.raises(AdapterError, match=r"adapter.filters is 'diverse', this model's is 'square'"):
        check_same_factors(written, own)


def test_another_rank_is_refused_though_its_factors_have_as_many_entries() -> None:
    own, written = (MokaConfig(filters="servable", components=1, rank=rank) for rank in (4, 16))
    sizes = [[s.num_parameters for s in config.shapes_of("", 64, 64)] for config in (own, written)]
    assert sizes[0] == sizes[1]
    with pytest.raises(AdapterError, match=r"adapter.rank is 16, this model's is 4"):
        check_same_factors(written.to_dict(), own.to_dict())


def test_gates_of_another_kind_are_refused_though_their_logits_fit() -> None:
    own, written = MokaConfig(gating="sigmoid").to_dict(), MokaConfig(gating="softmax").to_dict()
    with pytest.raises(AdapterError, match=r"adapter.gating is 'softmax', this model's is 'sigmoid'"):
        check_same_factors(written, own)


def test_what_an_older_checkpoint_lacks_has_a_default() -> None:
    assert StoredRun.read({"state_dict": {}}) == StoredRun()
    stored = StoredRun.read({"moka_adapter": {"components": 3}, "moka_unknown": 1})
    assert stored == StoredRun(adapter={"components": 3})
    assert stored.learning_rate_ratios == {"left": 1.0, "right": 1.0, "gate": 1.0}
