"""A limit to a GPU's memory, with the GPU replaced."""

from types import SimpleNamespace

from moka_pl.studies.ranks.limited import run_limited


def test_a_limit_is_set_on_each_rank_before_the_command_line_runs(monkeypatch) -> None:
    done = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(
        "torch.cuda.get_device_properties", lambda device: SimpleNamespace(total_memory=80 * 2**30)
    )
    monkeypatch.setattr(
        "torch.cuda.set_per_process_memory_fraction", lambda share, device: done.append((share, device))
    )
    monkeypatch.setattr("moka_pl.cli.main.main", done.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    run_limited(["24", "fit", "--config", "x.yaml"])
    assert done == [(0.3, 1), ["fit", "--config", "x.yaml"]]
    run_limited(["100", "fit"])  # more than there is
    assert done[2] == (1.0, 1)
