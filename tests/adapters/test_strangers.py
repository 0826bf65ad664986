"""Adapter directories from strangers: whatever they hold, one line says so, soon and within little memory."""

import errno
import json
import os
import pickle
import random
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from moka_pl.adapters import (
    BaseModel,
    FullFineTuning,
    MokaConfig,
    inject_adapter,
    load_adapter,
    moka_layers,
    save_adapter,
)
from moka_pl.adapters.reading import CONFIG_NAME, WEIGHTS_NAME
from moka_pl.cli.inspect import inspect
from moka_pl.errors import AdapterError, MokaError

#: Seconds that any of them may take; the machine may be busy.
PATIENCE = 10.0


@pytest.fixture
def adapter(tmp_path: Path, make_llama) -> Path:
    model = make_llama()
    config = MokaConfig(components=2)
    inject_adapter(model, config)
    extra = {"metrics": {"val/loss": 1.5}, "step": 3, "prompt": "chat"}
    return save_adapter(tmp_path / "adapter", model, config, BaseModel("tiny", None, "abc"), extra)


def refusals(adapter: Path, make_llama) -> list[str]:
    """What loading and inspecting say against a directory; neither leaves anything in the model."""
    model, messages = make_llama(), []
    for use in (lambda: load_adapter(model, adapter), lambda: inspect(adapter)):
        start = time.monotonic()
        try:
            use()
        except MokaError as error:
            messages.append(str(error))
        assert time.monotonic() - start < PATIENCE
    assert not (messages and moka_layers(model)) or len(messages) == 1
    return messages


def configured(**changes: Any) -> Callable[[Path], None]:
    def change(adapter: Path) -> None:
        file = adapter / CONFIG_NAME
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def text(option: str, content: str, **changes: Any) -> Callable[[Path], None]:
    """Gives an option a value as text, which JSON's own writer would not write."""

    def change(adapter: Path) -> None:
        file = adapter / CONFIG_NAME
        stored = json.loads(file.read_text()) | {option: "HERE"} | changes
        file.write_text(json.dumps(stored).replace('"HERE"', content))

    return change


def tensors(edit: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def change(adapter: Path) -> None:
        file = adapter / WEIGHTS_NAME
        state = load_file(file)
        name = min(state)
        save_file(state | {name: edit(state[name]).contiguous()}, file)

    return change


def header(edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Replaces the header of the tensors' file."""

    def change(adapter: Path) -> None:
        file = adapter / WEIGHTS_NAME
        content = file.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        stored = json.loads(content[8 : 8 + length])
        written = json.dumps(edit(stored) or stored).encode()
        file.write_bytes(struct.pack("<Q", len(written)) + written + content[8 + length :])

    return change


def replaced(name: str, by: Callable[[Path], None]) -> Callable[[Path], None]:
    def change(adapter: Path) -> None:
        (adapter / name).unlink()
        by(adapter / name)

    return change


def length_of_header(adapter: Path) -> None:
    file = adapter / WEIGHTS_NAME
    file.write_bytes(struct.pack("<Q", 2**62) + file.read_bytes()[8:])


def eight_gib(adapter: Path) -> None:
    """A file of holes that fits its header and its configuration."""
    name, size = "model.layers.0.self_attn.q_proj.moka_B.0", 2**31
    entry = {name: {"dtype": "F32", "shape": [size], "data_offsets": [0, 4 * size]}}
    written = json.dumps(entry).encode()
    with (adapter / WEIGHTS_NAME).open("wb") as file:
        file.write(struct.pack("<Q", len(written)) + written)
        file.truncate(8 + len(written) + 4 * size)
    configured(trainable_parameters=size)(adapter)


NAN, INF = float("nan"), float("inf")
HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a billion components": (configured(components=10**9), "components must be at most 1024"),
    "more components than integers": (configured(components=10**30), "components must be at most 1024"),
    "a number of 5,000 digits": (text("components", "9" * 5000), "damaged"),
    "components a half": (configured(components=0.5), "components must be a whole number"),
    "components true": (configured(components=True), "components must be a whole number, not True"),
    "components negative": (configured(components=-5), "components must be at least 1, not -5"),
    "deep nesting": (text("components", "[" * 50_000 + "]" * 50_000), "damaged"),
    "scaling NaN": (text("scaling", "NaN"), "scaling must be positive and finite"),
    "scaling infinite": (text("scaling", "Infinity"), "scaling must be positive and finite"),
    "scaling true": (configured(scaling=True), "scaling must be a number or null"),
    "scaling beyond floats": (configured(scaling=10**400), "scaling must be a number or null"),
    "filters huge": (configured(filters=[[10**30, 2]]), "factor larger than the layer"),
    "filters without end": (configured(filters=[[1, 1]] * 9_999), "filters lists 9999 shapes"),
    "filters of another file": (configured(filters="/etc/passwd.json"), "filters is '/etc/passwd.json'"),
    "filters a number": (configured(filters=7), "filters must be a name, a list or a mapping"),
    "filters of layers, huge": (configured(filters={"x": [[2**40, 1]]}), "factor larger than the layer"),
    "filters named absurdly": (configured(filters="x" * 10**6), "unknown filters"),
    "a rank beyond any": (configured(filters="servable", rank=10**9), "rank must be at most 512"),
    "a rank of 1,000 digits": (configured(filters="servable", rank=10**1000), "rank must be at most 512"),
    "ranks beyond any": (configured(filters="servable", components=100, rank=500), "at most 512.*100 × 500"),
    "a rank beyond the layer": (
        configured(filters="servable", components=1, rank=512),
        "has at most rank 32, not 512",
    ),
    "a rank of a half": (configured(filters="servable", rank=0.5), "rank must be a whole number"),
    "a rank of other filters": (configured(rank=16), "rank .16. works only with filters: servable"),
    "told ranks a text": (configured(exact_lora_rank="16"), "exact_lora_rank must be a list"),
    "applied scaling a text": (configured(effective_scaling="4"), "effective_scaling must be a number"),
    "applied scaling a list": (configured(effective_scaling=[4.0]), "effective_scaling must be a number"),
    "applied scaling beyond floats": (
        configured(scaling=None, effective_scaling=10**400),
        "effective_scaling must be a number",
    ),
    "applied scaling infinite": (
        text("effective_scaling", "Infinity", scaling=None),
        "scaling must be|effective_scaling must be",
    ),
    "sizes of layers a list": (configured(layer_sizes=[1]), "layer_sizes must be a mapping"),
    "a size of three": (
        configured(layer_sizes={"x": [1, 2, 3]}),
        r"layer_sizes of 'x' cannot be \[1, 2, 3\]",
    ),
    "a layer of terabytes": (configured(layer_sizes={"x": [4, 10**9]}), "layer_sizes of 'x' cannot be"),
    "prime components": (configured(filters="prime", components=1024), "1024 components hold"),
    "regex": (configured(target_modules=r"(\w|\w\w|[a-z._0-9])*!"), "takes too long|matches no layer"),
    "regex excludes": (
        configured(exclude_modules=r"(([a-z_]|\w\w)+\.?)*[!]"),
        "takes too long|does not fit|^$",
    ),
    "regex nested": (configured(target_modules="(" * 5000 + ")" * 5000), "not a valid regular expression"),
    "regex long": (
        configured(target_modules="a|" * 10**6),
        "target_modules must be|has 2,000,000 characters",
    ),
    "targets numbers": (
        configured(target_modules=[1, 2]),
        "target_modules must be a list of texts",
    ),
    "targets a mapping": (configured(target_modules={"a": 1}), "target_modules must be"),
    "format negative": (configured(format_version=-5), "no format_version from 1 on, but -5"),
    "format true": (configured(format_version=True), "no format_version from 1 on, but True"),
    "format huge": (configured(format_version=10**30), "adapter format 1000"),
    "extra a list": (configured(extra=[1]), r"extra must be a mapping, not \[1\]"),
    "metrics a text": (configured(extra={"metrics": "good"}), "extra.metrics must be"),
    "metrics of texts": (configured(extra={"metrics": {"loss": "low"}}), "extra.metrics must be"),
    "prompt a list": (configured(extra={"prompt": ["chat"]}), "extra.prompt must be a text or null"),
    "step a text": (configured(extra={"step": "last"}), "extra.step must be"),
    "base a number": (configured(base_model_name_or_path=5), "base_model_name_or_path must be a text, not 5"),
    "base options a list": (configured(base_options=[]), "base_options must be a mapping"),
    "base option of a wrong type": (
        configured(base_options={"seed": "x"}),
        "seed must be a whole number",
    ),
    "base option of nobody": (
        configured(base_options={"cache_dir": "/"}),
        "cache_dir is no option of a base",
    ),
    "full fine-tuning of a number": (
        configured(peft_type="FULL", method="full", target_modules=5),
        "target_modules must be",
    ),
    "fingerprint a list": (configured(base_fingerprint=[1]), "base_fingerprint must be a text"),
    "method a list": (configured(peft_type=["MOKA"]), "is not a moka_pl adapter"),
    "PEFT without such a method": (configured(peft_type="NEW", method="new"), "has no method 'NEW'"),
    "count wrong": (configured(trainable_parameters=1), "numbers, but adapter_config.json says 1"),
    "NaN": (tensors(lambda t: t.fill_(NAN)), "1 of 20 tensors hold a NaN or an infinity .first .*moka_A.0.*"),
    "infinity": (tensors(lambda t: t.index_fill(0, torch.tensor([0]), INF)), "hold a NaN or an infinity"),
    "int8": (tensors(lambda t: t.to(torch.int8)), "holds int8 numbers, the model expects float32"),
    "bool": (tensors(lambda t: t > 0), "has BOOL numbers|holds BOOL|damaged"),
    "complex": (tensors(lambda t: t.to(torch.complex64)), "has C64 numbers|damaged"),
    "eight bits": (tensors(lambda t: t.to(torch.float8_e4m3fn)), "has F8_E4M3 numbers"),
    "header too long": (length_of_header, "truncated or damaged"),
    "header a list": (header(lambda h: [1]), "truncated or damaged"),
    "header with a negative shape": (
        header(lambda h: h[max(h)].update(shape=[-1, 2])),
        "truncated or damaged",
    ),
    "header with a huge shape": (
        header(lambda h: h[max(h)].update(shape=[2**62, 2**62])),
        "truncated or damaged",
    ),
    "header with offsets beyond": (
        header(lambda h: h[max(h)].update(data_offsets=[0, 2**40])),
        "truncated or damaged",
    ),
    "8 GiB of zeros": (eight_gib, "does not fit this model"),
    "a folder for the configuration": (replaced(CONFIG_NAME, Path.mkdir), "has no adapter_config.json"),
    "a folder for the tensors": (replaced(WEIGHTS_NAME, Path.mkdir), "has no adapter_model.safetensors"),
    "a pipe for the configuration": (replaced(CONFIG_NAME, os.mkfifo), "has no adapter_config.json"),
    "a pipe for the tensors": (replaced(WEIGHTS_NAME, os.mkfifo), "has no adapter_model.safetensors"),
    "a link to a device": (
        replaced(WEIGHTS_NAME, lambda file: file.symlink_to("/dev/zero")),
        "has no adapter_model.safetensors",
    ),
    "a link in circles": (replaced(CONFIG_NAME, lambda file: file.symlink_to(file)), "adapter_config.json"),
    "a configuration of 17 MiB": (
        lambda adapter: (adapter / CONFIG_NAME).write_bytes(b"[" + b" " * 17 * 2**20 + b"]"),
        "that of an adapter has at most",
    ),
    "PEFT: LoRA of a billion ranks": (
        configured(peft_type="LORA", method="LoRA", r=10**9, target_modules=["q_proj"]),
        "r must be at most 1,000,000",
    ),
    "PEFT: LoRA dropped out by NaN": (
        text("lora_dropout", "NaN", peft_type="LORA", method="LoRA"),
        "lora_dropout must be finite",
    ),
    "PEFT: LoRA of a wrong type": (
        configured(peft_type="LORA", method="LoRA", lora_dropout="much"),
        "lora_dropout must be a number",
    ),
    "PEFT: LoRA with an expression as rank": (
        configured(peft_type="LORA", method="LoRA", rank_pattern={"(([a-z]+)+)+!": 2}),
        "is no simple expression",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(*case, marks=[pytest.mark.slow] * name.startswith("PEFT"), id=name)
        for name, case in HOSTILE.items()
    ],
)
def test_a_hostile_directory_is_refused_in_one_line(damage, message: str, adapter: Path, make_llama) -> None:
    damage(adapter)
    said = refusals(adapter, make_llama)
    if message.endswith("^$") and not said:
        return
    assert said
    with pytest.raises(AdapterError, match=message):
        load_adapter(make_llama(), adapter)
    assert not any("\n" in line or len(line) > 2000 for line in said)


def test_names_are_printed_without_what_a_terminal_acts_upon(adapter: Path, capsys) -> None:
    configured(base_model_name_or_path="a\x1b[2Jb\u202e\ud800", extra={"metrics": {"\x07": 1.0}})(adapter)
    inspect(adapter)
    said = capsys.readouterr().out
    assert r"a\x1b[2Jb\u202e\ud800" in said
    assert said.replace("\n", "").isprintable()


def mutated(pick: random.Random, value: Any) -> Any:
    """A value of another type or size, or a container with one of its own mutated."""
    if isinstance(value, dict) and value and pick.random() < 0.8:
        key = pick.choice(sorted(value))
        return value | {key: mutated(pick, value[key])}
    if isinstance(value, list) and value and pick.random() < 0.5:
        index = pick.randrange(len(value))
        return [*value[:index], mutated(pick, value[index]), *value[index + 1 :]]
    numbers = [0, -1, 10**9, 10**30, 2**63, 1e308, -0.0, NAN, INF, True, None]
    texts = [
        "",
        "\0",
        "x" * 10_000,
        "../../etc",
        "\ud800",
        "(a|aa)+$",
        "²",
        "all-linear",
        "MOKA",
        "LORA",
        "FULL",
    ]
    nested: Any = 1
    for _ in range(pick.choice([1, 5, 200])):
        nested = [nested] if pick.random() < 0.5 else {"a": nested}
    return pick.choice(
        [*numbers, *texts, [], {}, nested, [value] * 3, {"a": value}, str(value), [1e400] * 1000]
    )


def scrambled(pick: random.Random, content: bytes) -> bytes:
    """Bytes with a few changed, cut, doubled or put in."""
    start = pick.randrange(len(content))
    way = pick.randrange(4)
    if way == 0:
        return content[:start]
    if way == 1:
        return content[:start] + bytes(pick.randrange(256) for _ in range(8)) + content[start + 8 :]
    if way == 2:
        return content[:start] + content[start // 2 :]
    return content[:start] + bytes([content[start] ^ (1 << pick.randrange(8))]) + content[start + 1 :]


ADAPTERS = {
    "MoKA": lambda: MokaConfig(components=2),
    "LoRA": lambda: peft.LoraConfig(r=2, target_modules=["q_proj"]),
    "SHiRA": lambda: peft.ShiraConfig(r=2, target_modules=["q_proj"]),
    "full fine-tuning": lambda: FullFineTuning(target_modules=["norm"]),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", ADAPTERS.values(), ids=ADAPTERS)
def test_a_mutated_directory_is_loaded_or_refused_in_one_line(make, tmp_path: Path, make_llama) -> None:
    pick, model, config = random.Random(13), make_llama(), make()
    inject_adapter(model, config)
    extra = {"metrics": {"val/loss": 1.5}, "step": 3, "prompt": "chat"}
    adapter = save_adapter(tmp_path / "adapter", model, config, BaseModel("tiny", None, "abc"), extra)
    files = {name: (adapter / name).read_bytes() for name in (CONFIG_NAME, WEIGHTS_NAME)}
    stored = json.loads(files[CONFIG_NAME])
    length = struct.unpack("<Q", files[WEIGHTS_NAME][:8])[0]
    head = json.loads(files[WEIGHTS_NAME][8 : 8 + length])
    for _ in range(80):
        changed = dict(files)
        way = pick.randrange(4)
        if way == 0:
            changed[CONFIG_NAME] = json.dumps(mutated(pick, stored)).encode()
        elif way == 1:
            written = json.dumps(mutated(pick, head)).encode()
            changed[WEIGHTS_NAME] = (
                struct.pack("<Q", len(written)) + written + files[WEIGHTS_NAME][8 + length :]
            )
        else:
            name = pick.choice(sorted(files))
            changed[name] = scrambled(pick, files[name])
        for name, content in changed.items():
            (adapter / name).write_bytes(content)
        said = refusals(adapter, make_llama)
        assert not any("\n" in line for line in said), said


class Trap:
    """Unpickled, it leaves a trace."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("unpickled",)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "pytorch_model.bin"])
def test_pickles_are_never_opened(name: str, adapter: Path, make_llama, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (adapter / name).write_bytes(pickle.dumps({"weight": Trap()}))
    load_adapter(make_llama(), adapter)  # beside its tensors
    (adapter / WEIGHTS_NAME).unlink()
    with pytest.raises(AdapterError, match="it has no adapter_model"):
        load_adapter(make_llama(), adapter)
    (adapter / name).rename(adapter / WEIGHTS_NAME)  # under their name
    with pytest.raises(AdapterError, match="truncated or damaged"):
        load_adapter(make_llama(), adapter)
    assert not Path("unpickled").exists()


@pytest.mark.parametrize("index", [-1, 10**6])
def test_an_index_beyond_the_layer_is_refused_before_a_kernel_reads_it(
    index: int, tmp_path, make_llama
) -> None:
    model, config = make_llama(), peft.ShiraConfig(r=2, target_modules=["q_proj"])
    inject_adapter(model, config)
    path = save_adapter(tmp_path / "adapter", model, config, BaseModel("tiny"))
    state = load_file(path / WEIGHTS_NAME)
    name = next(name for name in state if name.endswith("indices"))
    state[name][0, 0] = index
    save_file(state, path / WEIGHTS_NAME)
    with pytest.raises(AdapterError, match=r"indices points beyond the layer's weight of \(32, 32\)"):
        load_adapter(make_llama(), path)


@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
def test_a_file_that_may_not_be_read_is_not_called_damaged(
    name: str, adapter: Path, make_llama, monkeypatch
) -> None:
    may = {kind: getattr(Path, kind) for kind in ("open", "read_text")}

    def denied(kind: str) -> Callable[..., Any]:
        def act(file: Path, *args: Any, **options: Any) -> Any:
            if file.name == name:
                raise PermissionError(errno.EACCES, "Permission denied", str(file))
            return may[kind](file, *args, **options)

        return act

    for kind in may:
        monkeypatch.setattr(Path, kind, denied(kind))
    assert {f"cannot read {adapter / name}: Permission denied"} == set(refusals(adapter, make_llama))
