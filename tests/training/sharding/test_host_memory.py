"""What a rank takes of the host's memory while it reads its part, watched in processes of their own."""

import os
import platform
import subprocess
import sys

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from moka_pl.backbone.random_weights import byte_tokenizer

pytestmark = pytest.mark.slow

#: Prints how often it was looked, and by how many MiB a rank had grown: at the most by then, and in the end.
#: What quantising one weight takes for a moment, bitsandbytes' own, lies between two looks.
LOAD = """
import ctypes, datetime, gc, sys
from pathlib import Path
import torch
import torch.distributed as dist
from moka_pl.backbone import BackboneConfig, load_backbone
from moka_pl.training.sharding.blocks import ShardedBlocks

def held():
    ctypes.CDLL(None).malloc_trim(0)  # what the C library keeps of freed memory is nobody's
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) / 1024

class Watched(ShardedBlocks):
    # Looks where most is held: a block is whole before it is taken, and has its part beside it afterwards.
    def _take(self, *block, **options):
        seen.append(held())
        number = super()._take(*block, **options)
        seen.append(held())
        return number

folder, strategy, quantization, rank, store = sys.argv[1:]
group = None  # a rank alone keeps all in its own memory
if strategy == "sharded":
    dist.init_process_group(
        "gloo", f"file://{store}", rank=int(rank), world_size=2, timeout=datetime.timedelta(seconds=100)
    )
    group = dist.new_group()
blocks = Watched(group, group, group is None, torch.device("cpu"))
load_backbone(BackboneConfig("tiny", weights="random"))  # which imports everything
gc.collect()
before, seen = held(), []
model = load_backbone(BackboneConfig(folder, quantization=quantization), blocks=blocks).model
gc.collect()
print(len(seen), max(seen) - before, held() - before)
"""
BLOCK = 16.0  # MiB of a decoder block in float32: 4 x 512 x 512 + 3 x 512 x 2048
LAYERS = 20
#: MiB at most that loading a model leaves beside its weights.
FIXED = 10.0
#: Of a weight, as it is stored.
BITS = {"none": 32, "nf4": 4.13}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of 320 MiB in float32, which are 41 MiB in four bits, in files of four blocks."""
    folder = tmp_path_factory.mktemp("base")
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": LAYERS}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=320, num_attention_heads=8, **sizes))
    model.save_pretrained(folder, max_shard_size="67MB")
    byte_tokenizer().save_pretrained(folder)
    return folder


def load(folder, strategy, quantization, store):
    """Loads the base in two processes at once; returns what each printed."""
    # glibc then gives back what is freed, so that only what is held counts.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LOAD, str(folder), strategy, quantization]
    started = [
        subprocess.Popen([*command, str(rank), str(store)], stdout=subprocess.PIPE, env=environment)
        for rank in range(2)
    ]
    told = [process.communicate(timeout=200)[0] for process in started]
    assert not any(process.returncode for process in started)
    return [list(map(float, some.split()[-3:])) for some in told]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is another")
@pytest.mark.parametrize("quantization", BITS)
def test_a_rank_keeps_its_part_and_never_holds_more_than_some_blocks_beside(folder, tmp_path, quantization):
    base = LAYERS * BLOCK * BITS[quantization] / 32
    part, beside = base / 2, 2 * base / LAYERS
    for looks, most, kept in load(folder, "sharded", quantization, tmp_path / "store"):
        assert looks == 2 * (LAYERS + 2)  # with embedding and head
        assert part < kept < part + FIXED
        assert most < part + beside + FIXED
    for _, _, kept in load(folder, "alone", quantization, tmp_path / "store"):
        assert kept > part + FIXED  # all that is loaded
