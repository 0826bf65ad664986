"""What a loaded base tells other libraries of itself."""

from pathlib import Path

import pytest

from moka_pl.backbone import BackboneConfig, load_backbone


@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
def test_others_see_that_a_base_is_quantised(quantization, model_folder: Path) -> None:
    model = load_backbone(BackboneConfig(str(model_folder), quantization=quantization)).model
    assert model.is_loaded_in_4bit  # by which PEFT chooses its layers
    assert model.is_quantized
    assert model.hf_quantizer.is_trainable  # for which the HF Trainer asks
    assert model.config.quantization_config.bnb_4bit_quant_type == quantization
