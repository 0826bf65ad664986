"""What rounding costs an export, whether its check tells that from mistakes, and what a large export takes.

``scripts/exports.py`` runs it.
"""

import copy
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moka_pl.adapters import BaseModel, MokaConfig, inject_adapter, moka_layers, save_adapter
from moka_pl.backbone import BackboneConfig, fingerprint
from moka_pl.backbone.random_weights import SHAPES, byte_tokenizer, shape_config
from moka_pl.backbone.weight_files import read_weight_files
from moka_pl.export.check import Measured, largest_difference, measure
from moka_pl.export.gguf import GgufType, read_back, write_model
from moka_pl.export.llama_cpp import LlamaCpp
from moka_pl.export.merged import Part, merged_parts, write_description, write_weights
from moka_pl.export.rounding import round_weights, to_dtype
from moka_pl.studies.common import Parser, one_line_errors, positive_int

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DESCRIPTION = """\
Measures merged exports of models with random weights.

    python scripts/exports.py [--layers 2 32] [--hidden 256 512] [--llama-cpp]
    python scripts/exports.py --large FOLDER [--shape llama2-7b] [--dtype float16]

The first form compares small models, merged and rounded, with their adapters; it also rounds the frozen base
alone, and puts mistakes into the merged weights. With --llama-cpp it compares what llama.cpp computes from
GGUF files. All differences are shares of the largest logit.

The second form writes a base of a given shape and an adapter into FOLDER, exports the adapter by
`python -m moka_pl export`, and prints when each line of its output came, and the peak of memory before it.
"""

#: Numbers of the adapters' factors, normal with this deviation: an update of some percent of the weight.
_FACTORS = 0.02
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
#: Size of a head of the small models.
_HEAD = 64
_PROMPTS, _TOKENS, _VOCABULARY = 8, 96, 2000
#: Seconds between two looks at a process.
_EVERY = 2.0


@one_line_errors("exports")
def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints.

    Args:
        arguments: Default: the process's.
    """
    parser = Parser("exports", DESCRIPTION)
    parser.add_argument(
        "--layers", type=positive_int, nargs="+", default=[2, 32], help="layers of small models"
    )
    parser.add_argument(
        "--hidden", type=positive_int, nargs="+", default=[256, 512], help="their hidden sizes"
    )
    parser.add_argument("--llama-cpp", action="store_true", help="compare GGUF files of the small models")
    parser.add_argument("--large", type=Path, metavar="FOLDER", help="export a large model, in this folder")
    parser.add_argument("--shape", default="llama2-7b", choices=SHAPES, help="its shape")
    parser.add_argument("--dtype", default="float16", help="the export's dtype")
    args = parser.parse_args(arguments)
    if any(hidden % _HEAD for hidden in args.hidden):
        parser.error(f"--hidden takes multiples of {_HEAD}, the size of a head")
    torch.set_num_threads(1)
    if args.large:
        write_large(args.large, args.shape)
        watch(args.large, args.dtype)
        return
    for layers in args.layers:
        for hidden in args.hidden:
            model, prompts = small_model(layers, hidden)
            print(f"{layers} layers, hidden size {hidden}:")
            for line in (gguf_files if args.llama_cpp else merged_models)(model, prompts):
                print(f"  {line}", flush=True)


# Small models.


def small_model(layers: int, hidden: int) -> tuple["PreTrainedModel", list[Tensor]]:
    """Makes a frozen model and prompts; the layers have the gain of LLaMA2-7B's random ones.

    Args:
        layers: Blocks of the model.
        hidden: Its hidden size.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig

    heads = hidden // _HEAD
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 43 // 16,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=_VOCABULARY,
        initializer_range=0.02 * (4096 / hidden) ** 0.5,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    return model, list(torch.randint(0, _VOCABULARY, (_PROMPTS, _TOKENS)))


def merged_models(model: "PreTrainedModel", prompts: list[Tensor]) -> Iterator[str]:
    """Gives a model an adapter, and compares merged weights of each dtype, right and wrong; yields lines."""
    plain = copy.deepcopy(model)

    def computed(tensors: dict[str, Tensor]) -> Measured:
        plain.load_state_dict(tensors)
        return measure(plain, prompts)

    base, frozen = measure(model, prompts), {key: t.clone() for key, t in model.state_dict().items()}
    expected, share = _adapted(model, prompts)
    merged = {part.name: part.make().clone() for part in merged_parts(model)}
    yield f"loss {expected.loss:.5f}, the update itself {share(base, expected)}"
    for dtype in _DTYPES:
        found, alone = computed(_rounded(merged, dtype)), computed(_rounded(frozen, dtype))
        yield (
            f"{str(dtype).removeprefix('torch.'):<9} the base alone {share(base, alone)}, the merged model "
            f"{share(expected, found)}, its loss {found.loss:.5f}"
        )
    round_weights(model, to_dtype(torch.bfloat16))
    reference = measure(model, prompts)
    for name, tensors in {"none": merged, **_mistakes(frozen, merged)}.items():
        found = computed(_rounded(tensors, torch.bfloat16))
        yield (
            f"mistake: {name:<34} in bfloat16 {share(expected, found)}, beyond rounding "
            f"{share(reference, found)}"
        )


def gguf_files(model: "PreTrainedModel", prompts: list[Tensor]) -> Iterator[str]:
    """Gives a model an adapter, and compares what llama.cpp makes of it; yields lines."""
    frozen = copy.deepcopy(model)
    kinds: tuple[GgufType, ...] = ("f32", "f16", "q8_0")
    for kind in kinds:
        model = copy.deepcopy(frozen)
        expected, share = _adapted(model, prompts)
        with TemporaryDirectory() as folder:
            write_model(Path(folder) / "model.gguf", model, merged_parts(model), kind)
            found = LlamaCpp(Path(folder) / "model.gguf").measure(prompts)
        round_weights(model, partial(read_back, kind=kind))
        rounded = measure(model, prompts)
        yield (
            f"{kind:<4} rounding the weights {share(expected, rounded)}, llama.cpp {share(expected, found)}, "
            f"beyond rounding {share(rounded, found)}"
        )


def _adapted(
    model: "PreTrainedModel", prompts: list[Tensor]
) -> tuple[Measured, Callable[[Measured, Measured], str]]:
    """Adds a random adapter; returns what it computes, and what says differences as shares of its logits."""
    inject_adapter(model, MokaConfig(components=10))
    randomize(model)
    expected = measure(model, prompts)
    largest = max(float(logits.abs().max()) for logits in expected.logits)
    return expected, lambda one, other: f"{largest_difference(one, other) / largest:.2g}"


def randomize(model: "PreTrainedModel") -> None:
    """Gives factors and gates random numbers."""
    generator = torch.Generator().manual_seed(1)
    for layer in moka_layers(model).values():
        for name, parameter in layer.named_parameters():
            if name.startswith("moka_"):
                std = 1.0 if name == "moka_gate" else _FACTORS
                parameter.data.normal_(0, std, generator=generator)


def _rounded(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: tensor.to(dtype).float() for name, tensor in tensors.items()}


def _mistakes(frozen: dict[str, Tensor], merged: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Wrong merged weights, by what is wrong."""
    adapted = [name for name in merged if not torch.equal(frozen[name], merged[name])]
    first, last = adapted[0], adapted[-1]
    wrong: dict[str, Callable[[str], Tensor]] = {
        "scaling 1% too large": lambda name: frozen[name] + 1.01 * (merged[name] - frozen[name]),
        "the update of one layer forgotten": lambda name: (frozen if name == last else merged)[name],
        "the update of one layer transposed": lambda name: (
            frozen[name] + (merged[name] - frozen[name]).T if name == first else merged[name]
        ),
    }
    return {what: merged | {name: made(name) for name in adapted} for what, made in wrong.items()}


# A large model.


def write_large(folder: Path, shape: str) -> None:
    """Writes ``base`` and ``adapter`` into a folder, unless they are there.

    Args:
        folder: The folder.
        shape: The base's shape.
    """
    from transformers import AutoModelForCausalLM

    base, adapter = folder / "base", folder / "adapter"
    if not base.exists():
        base.mkdir(parents=True)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(shape_config(shape))
        generator = torch.Generator().manual_seed(0)
        parts = [_drawn(part, generator) for part in merged_parts(model)]
        write_weights(base, parts, torch.bfloat16)
        write_description(base, model, byte_tokenizer(), torch.bfloat16)
    if not adapter.exists():
        backbone, config = BackboneConfig(str(base)), MokaConfig(components=10)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(shape_config(shape))
        files = read_weight_files(base)
        assert files is not None
        files.map_into(model)  # nothing of it is computed with
        frozen = BaseModel(backbone.name, None, fingerprint(model), backbone.options())
        inject_adapter(model, config)
        randomize(model)
        save_adapter(adapter, model, config, frozen, {"prompt": "alpaca"})


def _drawn(part: Part, generator: torch.Generator) -> Part:
    def make() -> Tensor:
        if len(part.shape) == 1:
            return torch.ones(part.shape)
        return torch.empty(part.shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)

    return Part(part.name, part.shape, make)


def watch(folder: Path, dtype: str) -> None:
    """Exports the adapter of a folder, and prints what that takes.

    Args:
        folder: The folder of :func:`write_large`.
        dtype: The export's dtype.
    """
    command = [sys.executable, "-m", "moka_pl", "export", str(folder / "adapter"), "--to", "merged"]
    command += ["--dtype", dtype, "--out", str(folder / "merged")]
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    peaks = {"RssAnon": 0.0, "VmHWM": 0.0}
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(_EVERY):
            for name, value in _memory(process.pid).items():
                peaks[name] = max(peaks[name], value)

    watcher = threading.Thread(target=look)
    watcher.start()
    assert process.stdout is not None
    for line in process.stdout:
        print(
            f"{time.monotonic() - started:6.0f} s, since the last line at most {peaks['RssAnon']:4.1f} GB "
            f"anonymous (peak of all {peaks['VmHWM']:.1f}): {line.rstrip()}",
            flush=True,
        )
        peaks["RssAnon"] = 0.0
    _, status, used = os.wait4(process.pid, 0)
    ended.set()
    watcher.join()
    print(
        f"exit {os.waitstatus_to_exitcode(status)}: {time.monotonic() - started:.0f} s, of the processor "
        f"{used.ru_utime + used.ru_stime:.0f} s"
    )


def _memory(process: int) -> dict[str, float]:
    """Memory of a process, GB; nothing once it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split(":") for line in lines if line.startswith(("RssAnon:", "VmHWM:")))
    return {name: int(value.split()[0]) * 1024 / 1e9 for name, value in pairs}
