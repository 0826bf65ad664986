"""What an export takes beside its loaded base, watched in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from moka_pl.adapters import BaseModel, MokaConfig, inject_adapter, save_adapter
from moka_pl.backbone import BackboneConfig, fingerprint, load_backbone
from moka_pl.backbone.random_weights import byte_tokenizer

#: Prints by how many MiB a process grew at the most once it had its base, for which older versions of
#: transformers need more. It has imported everything before.
EXPORT = """
import sys, threading, time
from pathlib import Path
from types import SimpleNamespace
import psutil
from moka_pl.__main__ import main
import moka_pl.export.run as run
from moka_pl.backbone import BackboneConfig, load_backbone

def anonymous():
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) / 1024

def look():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.005)

psutil.virtual_memory = lambda: SimpleNamespace(available=2 * 2**20)  # what is written is read layer by layer
load_backbone(BackboneConfig("tiny", weights="random"))
export = run.export_merged

def watched(*arguments):
    global peak, before
    peak = before = anonymous()
    threading.Thread(target=look, daemon=True).start()
    export(*arguments)

run.export_merged = watched
main(sys.argv[1:])
print(peak - before)
"""


@pytest.fixture
def adapter(tmp_path: Path, randomize, one_thread: None) -> Path:
    """An adapter of a model of 24 MiB in four bits, and of 196 MiB in float32, that are one shard."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8}
    LlamaForCausalLM(LlamaConfig(vocab_size=320, **sizes)).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    base = BackboneConfig(str(tmp_path / "base"))
    model, config = load_backbone(base).model, MokaConfig(components=2)
    inject_adapter(model, config)
    randomize(model)
    remembered = BaseModel(base.name, None, fingerprint(model), base.options())
    (tmp_path / "prompts").write_text("one\nand another\n")
    return save_adapter(tmp_path / "adapter", model, config, remembered, {"prompt": "raw"})


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells anonymous memory")
@pytest.mark.parametrize("options", [["--dtype", "float32"], ["--dtype", "bfloat16"]], ids="-".join)
def test_a_shard_is_never_in_memory(options: list[str], adapter: Path) -> None:
    command = [sys.executable, "-c", EXPORT, "export", str(adapter), "--to", "merged", *options]
    command += ["--prompts", str(adapter.with_name("prompts"))]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "wrote model.safetensors (1 of 1, " in told
    assert float(told.split()[-1]) < 98  # the smaller of both shards
