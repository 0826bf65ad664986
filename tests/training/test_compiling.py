"""Fits whose decoder layers are compiled."""

from functools import partial

import pytest
import torch
from torch._dynamo import reset
from torch._dynamo.utils import counters

from moka_pl.backbone import BackboneConfig
from moka_pl.errors import ConfigError
from moka_pl.lm.compiled import compile_layers
from moka_pl.lm.replaced_forward import forward_maker
from moka_pl.training import steps


@pytest.mark.slow
def test_a_fit_that_compiles_trains_the_same(make_module, make_data, make_trainer, monkeypatch) -> None:
    monkeypatch.setattr(steps, "compile_layers", partial(compile_layers, backend="eager"))
    reset()
    counters.clear()
    trained = []
    for compiles in ("none", "layers"):
        backbone = BackboneConfig(name="tiny", weights="random", compile=compiles)
        assert "compile" not in backbone.options()
        module = make_module(backbone=backbone)
        make_trainer(max_steps=3, limit_val_batches=1).fit(module, make_data(bucket=False))
        trained.append(module.state_dict())
        assert bool(counters["stats"]["unique_graphs"]) == (compiles == "layers")
        assert not any(map(forward_maker, module.causal_lm.model.layers))
    plain, compiled = trained
    assert plain.keys() == compiled.keys()
    assert all(torch.equal(plain[name], compiled[name]) for name in plain if "moka_" in name)


def test_inputs_of_layers_that_leave_are_refused(make_module, make_data, make_trainer, no_weights) -> None:
    no_weights()
    backbone = BackboneConfig(name="tiny", weights="random", compile="layers")
    module = make_module(backbone=backbone, gradient_checkpointing="offload")
    with pytest.raises(ConfigError, match=r"^gradient_checkpointing is offload, which .*compile none$"):
        make_trainer(max_steps=1).fit(module, make_data())
