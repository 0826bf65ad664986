"""PEFT's configuration classes and options: trained, saved and loaded as in PEFT, or refused at once."""

import dataclasses

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from moka_pl.adapters import (
    BaseModel,
    adapted_layers,
    adapters_disabled,
    inject_adapter,
    load_adapter,
    method_of,
    save_adapter,
    unload,
)
from moka_pl.errors import AdapterError, ConfigError

IDS = torch.randint(96, (2, 7), generator=torch.Generator().manual_seed(3))
#: Small values of options, for the classes that have them.
SMALL = {
    "r": 4,
    "target_modules": ["q_proj", "v_proj"],
    "feedforward_modules": [],
    "total_step": 10,
    "task_type": "CAUSAL_LM",
    "block_size": 8,
    "n_frequency": 20,
    "oft_block_size": 0,
    "token_indices": [1, 2],
    "num_virtual_tokens": 4,
    "num_tasks": 2,
}
#: What has to go on working, of the classes that the lowest and the newest PEFT have.
TRAINED = {"LORA", "LOHA", "LOKR", "IA3", "OFT", "BOFT", "HRA", "LN_TUNING", "FOURIERFT", "RANDLORA", "SHIRA"}
KINDS = {str(kind.value): config for kind, config in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items()}


def base(**more: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
    options = {"vocab_size": 96, "num_hidden_layers": 2, "max_position_embeddings": 64, **sizes, **more}
    return LlamaForCausalLM(LlamaConfig(**options, initializer_range=0.2)).float().eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def make(config: type) -> peft.PeftConfig:
    names = {field.name for field in dataclasses.fields(config)}
    options = {name: value for name, value in SMALL.items() if name in names}
    try:
        return config(**options)
    except ValueError:  # r and another size exclude each other
        return config(**{name: value for name, value in options.items() if name != "r"})


def check_trained(config: peft.PeftConfig, path) -> None:
    model, plain = base(), logits(base())
    inject_adapter(model, config)
    trained = [parameter for parameter in model.train().parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    assert all(parameter.grad is not None for parameter in trained)
    expected = logits(model.eval())
    assert (expected - plain).abs().max() > 1e-3
    save_adapter(path, model, config, BaseModel("tiny"))
    loaded = base()
    load_adapter(loaded, path)
    torch.testing.assert_close(logits(loaded), expected)
    torch.testing.assert_close(logits(peft.PeftModel.from_pretrained(base(), path).eval()), expected)
    with adapters_disabled(model):
        assert torch.equal(logits(model), plain)
    unload(model)
    assert torch.equal(logits(model), plain)
    assert not adapted_layers(model)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_every_method_of_peft_is_trained_as_there_or_refused_before_training(kind: str, tmp_path) -> None:
    config = make(KINDS[kind])
    refusal = ""
    try:
        inject_adapter(base(), config)
    except (AdapterError, ConfigError) as error:
        refusal = str(error)
    assert not (refusal and kind in TRAINED), refusal
    if refusal:
        assert "\n" not in refusal
    else:
        check_trained(config, tmp_path / "adapter")


LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
OPTIONS = {
    "a whole module": {"modules_to_save": ["lm_head"]},
    "embeddings": {"modules_to_save": ["embed_tokens"], "lora_dropout": 0.1},
    "single tokens": {"trainable_token_indices": [1, 2]},
    "some layers": {"layers_to_transform": [1]},
    "ranks by name": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1.*": 3}},
    "excluded": {"exclude_modules": r".*\.0\..*"},
    "regex": {"target_modules": r".*\.(q|v)_proj"},
    "all-linear": {"target_modules": "all-linear", "use_dora": True},
    "default targets": {"target_modules": None},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_of_lora_are_trained_as_in_peft(options: dict, tmp_path) -> None:
    check_trained(peft.LoraConfig(**(LORA | options)), tmp_path / "adapter")


REFUSED = {
    "AdaLoRA": (lambda: peft.AdaLoraConfig(total_step=10), "AdaLoraConfig changes its ranks while it trains"),
    "prompt": (lambda: peft.PromptTuningConfig(num_virtual_tokens=2), "PromptTuningConfig adapts the prompt"),
    "VeRA": (lambda: peft.VeraConfig(target_modules=["q_proj"]), "VeraConfig keeps tensors outside"),
    "polytropon": (lambda: peft.PolyConfig(target_modules=["q_proj"]), "PolyConfig needs a task id"),
    "biases": (lambda: peft.LoraConfig(**LORA, bias="all"), "bias 'all' changes more than"),
    "repeated layers": (lambda: peft.LoraConfig(**LORA, layer_replication=[[0, 2]]), "layer_replication"),
    "PiSSA": (lambda: peft.LoraConfig(**LORA, init_lora_weights="pissa"), "depends on the frozen weights"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_trained_is_refused_before_anything_is_loaded(make, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        method_of(make()).check_new()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_adapters_with_biases_are_read_as_before(bias: str, tmp_path) -> None:
    model = base(attention_bias=True)
    config = peft.LoraConfig(**LORA, bias=bias)
    inject_adapter(model, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    save_adapter(tmp_path / "adapter", model, config, BaseModel("tiny"))
    loaded = base(attention_bias=True)
    load_adapter(loaded, tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), logits(model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 10**9}, "r is 1000000000, but no layer has more than"),
        ({"target_modules": r"(\w|\w\w|[a-z._0-9])*!"}, "takes too long|matches no module"),
        ({"rank_pattern": {r"(([a-z]+)+)+!": 2}}, "is no simple expression"),
        ({"target_modules": "(q_proj"}, "is not a valid regular expression"),
    ],
)
def test_absurd_options_are_refused_and_the_model_stays_plain(options: dict, message: str) -> None:
    model = base()
    with pytest.raises(AdapterError, match=message):
        inject_adapter(model, peft.LoraConfig(**(LORA | options)))
    assert not adapted_layers(model)


def test_a_model_without_a_loss_over_tokens_is_adapted() -> None:
    from transformers import LlamaForSequenceClassification

    model = LlamaForSequenceClassification(base(pad_token_id=0).config).eval()
    assert len(inject_adapter(model, peft.LoraConfig(**LORA))) == 4
