"""What an export and its base's loading take, watched in processes of their own."""

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from moka_pl.adapters import BaseModel, MokaConfig, inject_adapter, save_adapter
from moka_pl.backbone import BackboneConfig, fingerprint, load_backbone
from moka_pl.backbone.random_weights import byte_tokenizer

#: Watches a process's memory from now on; it has imported everything before.
WATCH = """
import sys, threading, time
from pathlib import Path
from types import SimpleNamespace
import psutil
from moka_pl.__main__ import main
import moka_pl.export.run
from moka_pl.backbone import BackboneConfig, load_backbone
from moka_pl.export.memory.allocator import return_freed_memory

def anonymous():
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) / 1024

def look():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.005)

load_backbone(BackboneConfig("tiny", weights="random"))
peak = before = anonymous()
threading.Thread(target=look, daemon=True).start()
"""

EXPORT = """
psutil.virtual_memory = lambda: SimpleNamespace(available=2 * 2**20)  # what is written is read layer by layer
main(sys.argv[1:])
"""

LOAD = """
return_freed_memory()
load_backbone(BackboneConfig(sys.argv[1]), by_layers=True)
"""

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="only Linux tells anonymous memory"
)


def watched(code: str, *arguments: str) -> tuple[str, float]:
    """What a process prints, and by how many MiB it grows at the most."""
    command = [sys.executable, "-c", f"{WATCH}{code}print(peak - before)", *arguments]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return told, float(told.split()[-1])


def write_base(folder: Path, **sizes: int) -> BackboneConfig:
    LlamaForCausalLM(LlamaConfig(vocab_size=320, num_attention_heads=8, **sizes)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return BackboneConfig(str(folder))


@pytest.fixture
def adapter(tmp_path: Path, randomize, one_thread: None) -> Path:
    """An adapter of a model of 24 MiB in four bits, and of 196 MiB in float32, that are one shard."""
    base = write_base(tmp_path / "base", hidden_size=512, intermediate_size=2048, num_hidden_layers=12)
    model, config = load_backbone(base).model, MokaConfig(components=2)
    inject_adapter(model, config)
    randomize(model)
    remembered = BaseModel(base.name, None, fingerprint(model), base.options())
    (tmp_path / "prompts").write_text("one\nand another\n")
    return save_adapter(tmp_path / "adapter", model, config, remembered, {"prompt": "raw"})


@pytest.mark.parametrize("options", [["--dtype", "float32"], ["--dtype", "bfloat16"]], ids="-".join)
def test_a_shard_is_never_in_memory(options: list[str], adapter: Path) -> None:
    prompts = ["--prompts", str(adapter.with_name("prompts"))]
    told, peak = watched(EXPORT, "export", str(adapter), "--to", "merged", *options, *prompts)
    assert "wrote model.safetensors (1 of 1, " in told
    assert peak < 98  # the smaller of both shards


def test_a_base_is_quantised_layer_by_layer(tmp_path: Path) -> None:
    base = write_base(tmp_path, hidden_size=512, intermediate_size=16384, num_hidden_layers=2)
    _, peak = watched(LOAD, base.name)
    assert peak < 96  # half of its matrices in float32, of 32 MiB each; transformers takes 135
