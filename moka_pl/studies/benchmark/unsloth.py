"""Unsloth's LoRA as rows of the benchmark.

Unsloth patches transformers for the whole process, so that its rows run in one of their own: it reads a
request from its standard input and writes an answer a row, each a line of JSON, on its standard output. Its
model is the benchmark's, written to a temporary folder.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from moka_pl.errors import ConfigError
from moka_pl.studies.benchmark import context
from moka_pl.studies.benchmark.bench import Bench, Record, Setting, Values
from moka_pl.studies.benchmark.cases import FIVE, QV, Preset
from moka_pl.studies.benchmark.steps import Batch, time_steps
from moka_pl.studies.common import first_line, free_memory, versions
from moka_pl.utils import expanded

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from transformers import PreTrainedModel

MISSING = (
    "rows of unsloth are left out: it is not installed; pip install unsloth, or name where it is with "
    "--unsloth WHERE"
)
_ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

Answer = dict[str, Any]


class UnslothRow(NamedTuple):
    """A LoRA of unsloth's.

    Attributes:
        name: The row's name.
        rank: The rank; the scaling is 2.
        modules: Target modules.
    """

    name: str
    rank: int
    modules: list[str]


ROWS = (
    UnslothRow("unsloth LoRA r8 q,v", 8, QV),
    UnslothRow("unsloth LoRA r16 all linear", 16, _ALL),
    UnslothRow("unsloth LoRA r32 q,k,v,up,down", 32, FIVE),
)

CONTEXT_ROWS = ROWS[:2]


class Home(NamedTuple):
    """Where unsloth is installed.

    Attributes:
        python: The interpreter that runs it.
        folder: A folder of packages that this interpreter does not know of.
    """

    python: str = sys.executable
    folder: str | None = None

    @classmethod
    def parse(cls, place: str) -> "Home":
        """Reads what the command line names: an interpreter, a folder of packages, or nothing.

        Raises:
            ConfigError: If it is not there.
        """
        if not place:
            return cls()
        path = expanded(place).absolute()  # not resolved: the links of environments matter
        if path.is_file():
            return cls(python=str(path))
        if (path / "unsloth").is_dir():
            return cls(folder=str(path))
        raise ConfigError(
            f"--unsloth {place}: neither a Python interpreter nor a folder with the package unsloth"
        )

    @property
    def lacks_unsloth(self) -> bool:
        """Whether it is known not to be there."""
        return self == Home() and find_spec("unsloth") is None


def measure_unsloth(
    bench: Bench,
    preset: Preset,
    checkpointing: Sequence[bool],
    names: Sequence[str],
    home: Home,
    profiled: bool = False,
) -> Iterator[Record | str]:
    """Measures unsloth's LoRA on the same weights, batch and steps.

    Args:
        bench: Whose model is written to a folder; it is closed, since the other process needs the memory.
        preset: Batch and steps.
        checkpointing: Without and with, in this order; with unsloth's own kind, which offloads activations.
        names: Only these rows, or all for none.
        home: Where unsloth is installed.
        profiled: Count what is launched on the GPU, too.

    Yields:
        A note on versions and settings; a record a row. If unsloth is not installed, one note says so.
    """
    wanted = [_asked(row, "steps", kind, {}) for kind in checkpointing for row in _chosen(ROWS, names)]
    pace = {name: getattr(preset, name) for name in ("batch", "length", "warmup", "steps", "seconds")}
    request = {"pace": pace, "profiled": profiled, "length": preset.length}
    yield from _measure(bench, home, request, wanted)


def measure_unsloth_context(
    bench: Bench, search: context.Search, names: Sequence[str], home: Home
) -> Iterator[Record | str]:
    """Searches the longest rows of tokens of unsloth's LoRA, with its own checkpointing.

    Args:
        bench: As in :func:`measure_unsloth`.
        search: What to search.
        names: Only these rows, or all for none.
        home: Where unsloth is installed.

    Yields:
        A note; a record a row and card.
    """
    rows = _chosen(CONTEXT_ROWS, names)
    wanted = [
        _asked(row, context.MEASURE, True, {"gib": card}) for row in rows for card in sorted(search.cards)
    ]
    request = {"search": asdict(search), "length": context.MOST}
    yield from _measure(bench, home, request, wanted)


def _chosen(rows: Sequence[UnslothRow], names: Sequence[str]) -> list[UnslothRow]:
    return [row for row in rows if not names or row.name in names]


def _asked(row: UnslothRow, measure: str, checkpointing: bool, setting: Setting) -> tuple[UnslothRow, Record]:
    """A row, and its record before it is measured."""
    return row, Record(measure, row.name, checkpointing, setting)


def _measure(
    bench: Bench, home: Home, request: Answer, wanted: Sequence[tuple[UnslothRow, Record]]
) -> Iterator[Record | str]:
    """Asks for what is wanted; what is not answered says why."""
    if not wanted:
        return
    if home.lacks_unsloth:
        yield MISSING
        return
    rows = [row._asdict() | {"checkpointing": record.checkpointing} for row, record in wanted]
    request["rows"] = [row for i, row in enumerate(rows) if row not in rows[:i]]
    left = [record for _, record in wanted]
    problem = "its process ended without an answer"
    try:
        with tempfile.TemporaryDirectory() as folder:
            write_model(bench, Path(folder))
            for answer in ask(home, request | {"folder": folder}):
                if "row" not in answer:
                    yield about(answer)
                    continue
                values, error = answer.pop("values"), answer.pop("error")
                for record in [record for record in left if answer.items() <= asdict(record).items()]:
                    left.remove(record)
                    yield replace(record, values=values, error=error)
    except Exception as error:
        problem = first_line(error)
    for record in left:
        yield replace(record, error=problem)


def about(answer: Mapping[str, str]) -> str:
    """A sentence on versions and settings of unsloth's process."""
    names = ("unsloth", "unsloth_zoo", "torch", "transformers", "bitsandbytes", "triton")
    told = ", ".join(f"{name} {answer[name]}" for name in names if name in answer)
    return (
        f"rows of unsloth: {told}; FastLanguageModel with the same NF4 weights, autocast to bfloat16, LoRA "
        "without dropout and bias, its own loss and, with checkpointing, its kind that offloads activations; "
        f"FlashAttention {answer['flash_attention']}, xformers {answer['xformers']}"
    )


def write_model(bench: Bench, folder: Path) -> None:
    """Writes the bench's model as a checkpoint that is quantised already, with a tokenizer of bytes.

    Args:
        bench: The bench, which is closed afterwards.
        folder: Where to.

    Raises:
        OSError: If the disk is full.
    """
    from transformers import BitsAndBytesConfig

    from moka_pl.backbone.random_weights import byte_tokenizer

    model = bench.built()
    model.config.quantization_config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=model.dtype,
    )
    try:
        model.save_pretrained(folder)
    finally:
        del model.config.quantization_config
    byte_tokenizer().save_pretrained(folder)
    bench.close()


def ask(home: Home, request: Mapping[str, Any]) -> Iterator[Answer]:
    """Starts unsloth's process and yields its answers as they come.

    Raises:
        ConfigError: If it fails as a whole.
    """
    package = str(Path(__file__).parents[3])
    paths = filter(None, [package, os.environ.get("PYTHONPATH"), home.folder])
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HUB_OFFLINE": "1",
        "UNSLOTH_DISABLE_STATISTICS": "1",
    }
    command = [home.python, "-m", "moka_pl.studies.benchmark.unsloth"]
    # Unsloth writes the code that it compiles into the working folder.
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=request["folder"],
        env=environment,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            json.dump(request, process.stdin)
            process.stdin.close()
            for line in process.stdout:
                yield check(json.loads(line))
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        raise ConfigError(f"unsloth's process ended with status {process.returncode}")


def check(answer: Answer) -> Answer:
    """Returns an answer of the process, or raises a ``ConfigError`` if it says that all has failed."""
    if "failed" in answer:
        raise ConfigError(f"unsloth cannot be run: {answer['failed']}")
    return answer


def serve() -> None:
    """Answers one request; all that libraries print goes to the standard error."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        try:
            for answer in answer_all(json.load(sys.stdin)):
                print(json.dumps(answer), file=answers, flush=True)
        except Exception as error:
            print(json.dumps({"failed": first_line(error)}), file=answers, flush=True)


def answer_all(request: Mapping[str, Any]) -> Iterator[Answer]:
    """Measures what a request names.

    Args:
        request: ``folder`` of the model, ``length`` (most tokens of a row) and ``rows``, each with ``name``,
            ``rank``, ``modules`` and ``checkpointing``; ``pace`` (arguments of ``time_steps``) and
            ``profiled``, or ``search`` (the options of a ``context.Search``).

    Yields:
        Versions and settings; then ``row``, ``checkpointing``, ``setting``, ``values`` and ``error`` of what
        was measured. An error without a setting is that of all settings that are left.
    """
    unsloth = import_module("unsloth")  # before transformers, which it patches
    attention = sys.modules.get("unsloth.models._utils")
    yield versions("unsloth", "unsloth_zoo") | {
        "flash_attention": "yes" if getattr(attention, "HAS_FLASH_ATTENTION", False) else "no",
        "xformers": "yes" if find_spec("xformers") else "no",
    }
    for row in request["rows"]:
        told = {"row": row["name"], "checkpointing": row["checkpointing"]}
        try:
            model = build(unsloth, request["folder"], row, request["length"])
            for setting, values in _work(model, request):
                yield told | {"setting": setting, "values": values, "error": None}
        except Exception as error:
            yield told | {"values": {}, "error": first_line(error)}
        model = None
        free_memory()


def _work(model: "PreTrainedModel", request: Mapping[str, Any]) -> Iterator[tuple[Setting, Values]]:
    """The settings and values of a row."""
    if "pace" in request:
        yield {}, time_steps(model, **request["pace"], make_loss=own_loss, profiled=request["profiled"])
        return
    for card, values in context.find_limits(model, own_loss, context.Search(**request["search"])):
        yield {"gib": card}, values


def build(unsloth: Any, folder: str, row: Mapping[str, Any], length: int) -> "PreTrainedModel":
    """Loads the model with a LoRA, as unsloth's documentation has it.

    Args:
        unsloth: The module.
        folder: The model's.
        row: ``rank``, ``modules`` and ``checkpointing``.
        length: Most tokens of a row.
    """
    import torch

    checkpointing = "unsloth" if row["checkpointing"] else False
    base = unsloth.FastLanguageModel.from_pretrained(
        folder,
        max_seq_length=length,
        dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32,
        load_in_4bit=True,
        use_gradient_checkpointing=checkpointing,
    )[0]
    model: PreTrainedModel = unsloth.FastLanguageModel.get_peft_model(
        base,
        r=row["rank"],
        lora_alpha=2 * row["rank"],
        target_modules=row["modules"],
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing=checkpointing,
        random_state=0,
    )
    return model


def own_loss(model: "PreTrainedModel", data: Batch) -> "Callable[[], Tensor]":
    """The loss as unsloth computes it."""
    import torch

    device: torch.device = data.ids.device

    def loss() -> "Tensor":
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            value: Tensor = model(input_ids=data.ids, labels=data.ids).loss
        return value

    return loss


if __name__ == "__main__":
    serve()
