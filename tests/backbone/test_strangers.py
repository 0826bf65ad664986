"""Model folders of strangers: nothing in them is run, and what is wrong is said in one line, soon."""

import json
import os
import pickle
import random
import re
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from moka_pl.backbone import BackboneConfig, load_backbone, load_tokenizer
from moka_pl.backbone.random_weights import byte_tokenizer
from moka_pl.errors import BackboneError

Change = Callable[[Path], None]


def refusal(folder: Path, **options: object) -> str:
    """The one line with which a folder is refused, within the time and the memory that it may take."""
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BackboneError) as caught:
        load_backbone(BackboneConfig(str(folder), **{"quantization": "none", **options}))
    assert time.monotonic() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2 * 2**20  # KiB
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(folder))
    return str(caught.value)


def config(**entries: object) -> Change:
    """Changes entries of ``config.json``."""
    return edit("config.json", lambda content: content | entries)


def edit(name: str, change: Callable[[dict], object]) -> Change:
    def apply(folder: Path) -> None:
        (folder / name).write_text(json.dumps(change(json.loads((folder / name).read_text()))))

    return apply


def tensors(change: Callable[[dict], dict]) -> Change:
    """Changes the weights."""

    def apply(folder: Path) -> None:
        file = folder / "model.safetensors"
        save_file(change(load_file(file)), file, metadata={"format": "pt"})

    return apply


def write(name: str, content: str | bytes) -> Change:
    return lambda folder: (
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode()) and None
    )


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.file}",)


def code(folder: Path) -> None:
    """Puts code beside the model, which leaves a file behind when it is run."""
    text = f"open({str(folder / 'ran')!r}, 'w').close()\n"
    for name in ("configuration_own.py", "modeling_own.py", "tokenization_own.py"):
        (folder / name).write_text(text)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(text)


def own_code(folder: Path) -> None:
    code(folder)
    auto = {"AutoConfig": "configuration_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}
    config(model_type="own", auto_map=auto)(folder)


def own_tokenizer(folder: Path) -> None:
    code(folder)
    mapping = {"AutoTokenizer": ["tokenization_own.Own", "tokenization_own.OwnFast"]}
    entries = {"tokenizer_class": "OwnTokenizer", "auto_map": mapping}
    edit("tokenizer_config.json", lambda content: content | entries)(folder)


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Payload(folder / "ran")}))


def sharded(files: object) -> Change:
    def apply(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        shutil.move(folder / "model.safetensors", folder.parent / "outside.safetensors")
        mapping = dict.fromkeys(weights, files) if isinstance(files, str) else files
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": mapping})
        )

    return apply


def lying_head(folder: Path) -> None:
    """Says that a tensor is as long as no file."""
    head = json.dumps(
        {"lm_head.weight": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
    ).encode()
    (folder / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head)


BAD: dict[str, tuple[Change, str]] = {
    "a billion layers": (config(num_hidden_layers=10**9), "num_hidden_layers in config.json is 1000000000"),
    "layers beyond words": (config(num_hidden_layers=10**30), "num_hidden_layers in config.json is 1000"),
    "no layers": (config(num_hidden_layers=0), "config.json has 0 layers"),
    "negative layers": (config(num_hidden_layers=-1), "config.json has -1 layers"),
    "a huge width": (config(hidden_size=10**9), "hidden_size in config.json is 1000000000"),
    "a huge inner width": (config(intermediate_size=10**12), "intermediate_size in config.json"),
    "a huge head": (config(head_dim=10**9), "head_dim in config.json"),
    "a billion heads": (config(num_attention_heads=10**9), "num_attention_heads in config.json"),
    "a huge vocabulary": (config(vocab_size=10**12), "parameters, but the weight files have"),
    "a nested bomb": (config(text_config={"num_hidden_layers": 10**9}), "num_hidden_layers in config.json"),
    "experts": (config(model_type="mixtral", num_local_experts=10**9), "num_local_experts in config.json"),
    "too few layers": (config(num_hidden_layers=1), "hold layers that config.json leaves out"),
    "another width": (config(hidden_size=32), r"is \(261, 64\) in model.safetensors, but \(261, 32\) by"),
    "a word for a number": (config(hidden_size="many"), "cannot be loaded"),
    "no model type": (config(model_type=None, architectures=None), "cannot be loaded"),
    "a list": (write("config.json", "[1]"), "cannot be loaded"),
    "deep nesting": (write("config.json", "[" * 10**5), "cannot be loaded"),
    "not UTF-8": (write("config.json", b"\xff\xfe{"), "cannot be loaded"),
    "code of its own": (own_code, r"code of its own \(auto_map\)"),
    "a tokenizer's code": (own_tokenizer, r"code of its own \(auto_map\)"),
    "a pickle": (pickled, "cannot be loaded"),
    "a shard elsewhere": (
        sharded("../outside.safetensors"),
        "'../outside.safetensors', outside of the folder",
    ),
    "an absolute shard": (sharded("/etc/passwd"), "'/etc/passwd', outside of the folder"),
    "an absent shard": (sharded("model-00001-of-00002.safetensors"), "cannot be loaded"),
    "an index without a map": (sharded(None), "model.safetensors.index.json is damaged"),
    "an index of numbers": (sharded({"a": 1}), "model.safetensors.index.json is damaged"),
    "an adapter beside it": (write("adapter_config.json", "{}"), "holds an adapter beside the model"),
    "a lying head": (lying_head, "model.safetensors is damaged"),
    "a head of nothing": (write("model.safetensors", b"\xff" * 64), "model.safetensors is damaged"),
    "a missing tensor": (
        tensors(lambda t: {k: v for k, v in t.items() if "up_proj" not in k}),
        "2 of its weights are missing",
    ),
    "a tensor of another shape": (
        tensors(lambda t: t | {"lm_head.weight": t["lm_head.weight"][:, :3].contiguous()}),
        r"lm_head.weight is \(261, 3\) in model.safetensors",
    ),
    "whole numbers": (
        tensors(lambda t: t | {"lm_head.weight": t["lm_head.weight"].to(torch.int64)}),
        "has the dtype I64",
    ),
    "complex numbers": (
        tensors(lambda t: t | {"lm_head.weight": t["lm_head.weight"].to(torch.complex64)}),
        "has the dtype C64",
    ),
    "NaN": (
        tensors(lambda t: t | {"lm_head.weight": t["lm_head.weight"] * float("nan")}),
        "its weights hold NaN or inf",
    ),
    "GPTQ": (config(quantization_config={"quant_method": "gptq", "bits": 4}), "quantised already, as gptq"),
    "AWQ": (config(quantization_config={"quant_method": "awq", "bits": 4}), "quantised already, as awq"),
    "eight bits": (
        config(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
        "quantised already, as int8",
    ),
    "quantised by nobody": (config(quantization_config={"a": 1}), "by an unnamed method"),
    "an end beyond the vocabulary": (config(eos_token_id=10**6), "eos_token_id of config.json is 1000000"),
    "one of several ends": (config(eos_token_id=[1, 999]), "eos_token_id of config.json is 999"),
    "an end of generation beyond it": (
        edit("generation_config.json", lambda content: content | {"eos_token_id": [1, 999]}),
        "eos_token_id of generation_config.json is 999",
    ),
    "a negative end": (config(eos_token_id=-1), "eos_token_id of config.json is -1"),
    "a negative beginning": (config(bos_token_id=-5), "bos_token_id of config.json is -5"),
    "negative padding": (config(pad_token_id=-1), "pad_token_id of config.json is -1"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of two layers with nothing wrong."""
    folder = tmp_path_factory.mktemp("good")
    torch.manual_seed(0)
    sizes = {"vocab_size": 261, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A copy of it, to be spoilt."""
    return Path(shutil.copytree(good, tmp_path / "model"))


@pytest.mark.parametrize("name", BAD)
def test_a_bad_folder_is_refused_in_one_line_and_nothing_of_it_is_run(name: str, folder: Path) -> None:
    change, reason = BAD[name]
    change(folder)
    message = refusal(folder)
    assert re.search(reason, message), message
    assert not (folder / "ran").exists()


def test_code_beside_a_model_that_transformers_knows_is_not_run(folder: Path) -> None:
    code(folder)
    config(auto_map={"AutoConfig": "configuration_own.Own", "AutoModelForCausalLM": "modeling_own.Own"})(
        folder
    )
    shutil.rmtree(folder / "custom_generate")
    load_backbone(BackboneConfig(str(folder), quantization="none"))
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("weights", ["pretrained", "random"])
def test_a_tokenizer_larger_than_the_embedding(weights: str, folder: Path) -> None:
    tokenizer = load_tokenizer(BackboneConfig(str(folder)))
    tokenizer.add_tokens(["<one>", "<two>"])
    tokenizer.save_pretrained(folder)
    for quantization in ("none", "nf4"):
        message = refusal(folder, weights=weights, quantization=quantization)
        assert "vocab_size is 261, but the tokenizer has 262 tokens" in message


def test_tensors_that_the_model_does_not_have_are_named(folder: Path) -> None:
    tensors(lambda t: t | {"vision.proj.weight": torch.zeros(3, 3)})(folder)
    notes = load_backbone(BackboneConfig(str(folder), quantization="none")).notes
    assert len(notes) == 1
    assert "1 tensors of its weight files are no part of the model" in notes[0]
    assert "(first vision.proj.weight)" in notes[0]


MUTATED = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")


@pytest.mark.slow
def test_mutated_folders_load_or_are_refused_in_one_line(folder: Path, tmp_path: Path) -> None:
    draw = random.Random(0)
    values = [10**9, 10**30, -1, 0, 2.5, float("nan"), True, None, "x", "", [], [[]], {}, {"a": 1}]
    for number in range(150):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        name = draw.choice(
            ["config.json", "config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]
        )
        content = bytearray((copy / name).read_bytes())
        if name.endswith(".json") and number % 3:
            stored = json.loads(content)
            key = draw.choice(sorted(stored))
            (copy / name).write_text(json.dumps(stored | {key: draw.choice(values)}))
        else:
            for _ in range(draw.randint(1, 4)):
                content[draw.randrange(min(len(content), 3000))] = draw.randrange(256)
            (copy / name).write_bytes(content[: draw.randint(1, len(content))] if number % 2 else content)
        start = time.monotonic()
        try:
            load_backbone(BackboneConfig(str(copy), quantization="none"))
            message = ""
        except BackboneError as error:
            message = str(error)
        assert "\n" not in message
        assert time.monotonic() - start < 10
