"""``moka_pl plan``: the numbers are those of the run that it speaks of; nothing is fetched or written."""

import json
import re
from pathlib import Path

import pytest

from moka_pl.cli.main import main

ROOT = Path(__file__).parents[2]


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    capsys.readouterr()
    main(["plan", *arguments, "--json"])
    out = capsys.readouterr().out
    return json.loads(out[out.index("{") :])


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, corpus: Path, dataset_cache: Path) -> list[str]:
    """Options of a run of the tiny random model on local data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(dataset_cache))
    return [
        *("--model.backbone.name=tiny", "--model.backbone.weights=random"),
        *("--data=InstructionData", f"--data.path={corpus}", "--data.batch_size=2"),
        *("--trainer.accelerator=cpu", "--trainer.max_epochs=3", "--trainer.accumulate_grad_batches=2"),
    ]


def test_local_data_are_counted_exactly(
    tiny: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    told = plan(capsys, *tiny, "--tokens_per_second=100")
    work = told["work"]
    assert work["examples"] == 13
    assert work["epoch_batches"] == 7
    assert work["steps"] == 3 * 4
    assert work["tokens"] == 3 * work["epoch_tokens"]
    assert told["seconds"] == work["tokens"] / 100
    assert told["batch"]["trained"] < told["batch"]["tokens"]
    assert (
        sum(row["count"] * row["parameters"] for row in told["adapters"]["layers"])
        == (told["adapters"]["parameters"])
    )
    parts = {name: size for name, size in told["memory"].items() if name not in ("peak", "needed")}
    assert told["memory"]["peak"] == pytest.approx(sum(parts.values()), abs=10)
    assert not list(tmp_path.glob("*")), "no folder of a run was made"


def test_the_adapter_s_size_on_disk_is_exact(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model.backbone.name=tiny", "--model.backbone.weights=random", "--data=InstructionData"]
    told = plan(capsys, *options, "--model.adapter.components=3", "--trainer.accelerator=cpu")
    assert told["adapters"]["file_bytes"] == (adapter / "adapter_model.safetensors").stat().st_size
    loaded = plan(capsys, *options, f"--model.adapter_path={adapter}", "--trainer.accelerator=cpu")
    assert loaded["adapters"] == told["adapters"]


def test_ranks_share_the_work(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    alone = plan(capsys, *tiny)
    both = plan(capsys, *tiny, "--trainer.devices=2", "--trainer.strategy=ddp")
    assert both["ranks"] == 2
    assert both["work"]["epoch_batches"] == 4
    assert both["memory"]["gradients"] == 2 * alone["memory"]["gradients"]
    main(["plan", *tiny, "--trainer.devices=2", "--trainer.num_nodes=2", "--trainer.strategy=ddp"])
    told = capsys.readouterr().out
    peak, machine = (
        float(re.search(rf"{name} +([\d.]+) GiB", told)[1]) for name in ("peak", "the machine needs")
    )
    assert machine == pytest.approx(2 * peak, abs=0.02)


def test_a_strategy_that_spreads_the_base_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--config", str(ROOT / "configs" / "llama2_70b_sharded.yaml"), "--trainer.accelerator=gpu")
    whole = plan(capsys, *options, "--trainer.devices=2", "--trainer.strategy=ddp")["memory"]
    spread = plan(capsys, *options, "--trainer.devices=2", "--trainer.strategy=sharded")["memory"]
    assert spread["weights"] < 0.6 * whole["weights"]
    by_class = "--trainer.strategy=moka_pl.training.sharding.strategy.ShardedStrategy"
    assert plan(capsys, *options, "--trainer.devices=2", by_class)["memory"] == spread
    options_too = by_class, "--trainer.strategy.offload=true"
    offloaded = plan(capsys, *options, "--trainer.devices=2", *options_too)["memory"]
    assert offloaded["weights"] < 0.5 * spread["weights"]
    assert spread["activations"] == whole["activations"]
    graphs = "--model.cuda_graphs=true"
    main(["plan", *options, "--trainer.devices=1", "--trainer.strategy=sharded_offload", graphs])
    out = capsys.readouterr().out
    assert "besides, in the host" in out
    assert "cuda_graphs keeps a batch's activations" in out


def test_known_models_need_no_network(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    told = plan(capsys, "--config", str(ROOT / "configs" / "llama2_servable.yaml"))
    ranks = {row["exact_lora_rank"] for row in told["adapters"]["layers"]}
    assert len(ranks) == 1
    assert told["parameters"] == 6_738_415_616
    assert told["work"]["examples"] is None
    assert "tokenizer" in told["work"]["unknown"]
    assert any("known shape llama2-7b" in note for note in told["notes"])


def test_an_unknown_model_out_of_reach_is_one_line(
    no_network: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit):
        main(["plan", "--model.backbone.name=somebody/new-model", "--data=InstructionData"])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "somebody/new-model" in error
    assert "config.json in a folder" in error
    assert "llama2-7b" in error


def test_a_machine_too_small_is_told_what_to_lower(
    tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    main(["plan", *tiny, "--model.backbone.name=llama2-13b", "--data.batch_size=4096"])
    out = capsys.readouterr().out
    assert "warning: this machine has" in out
    assert "gradient_checkpointing: true" in out


def test_a_rate_must_be_positive(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", *tiny, "--tokens_per_second=0"])
    assert "tokens_per_second must be above 0" in capsys.readouterr().err


def test_lora_is_planned(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft")
    lora = [
        "--model.adapter=peft.LoraConfig",
        "--model.adapter.r=4",
        "--model.adapter.target_modules=[q_proj]",
    ]
    told = plan(capsys, *tiny, *lora)
    assert told["adapters"]["parameters"] == 2 * 4 * (64 + 64)
