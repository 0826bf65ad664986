"""Gate curves of a run, from its events."""

import pytest
from torch.utils.tensorboard import SummaryWriter

from moka_pl.studies.gates import main, read_gates, spread


@pytest.fixture
def run(tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        for step in range(3):
            writer.add_scalar("train/loss", 1.0, step)
            for layer, pull in (("layer00.q_proj", 0.05), ("layer01.v_proj", 0.1)):
                for i, sign in enumerate((-1, 1)):
                    tag = "α {1}/{0}/{2}: 4×4 ⊗ 8×8".format(*layer.split("."), i)
                    writer.add_scalar(tag, 0.5 + sign * pull * step, step)
    return tmp_path


def test_curves_by_layer_and_component(run) -> None:
    gates = read_gates(run)
    assert {layer: list(curves) for layer, curves in gates.items()} == {
        layer: ["alpha_0", "alpha_1"] for layer in ("layer00.q_proj", "layer01.v_proj")
    }
    assert [step for step, _ in gates["layer00.q_proj"]["alpha_0"]] == [0, 1, 2]
    assert spread(gates["layer01.v_proj"]) == pytest.approx(0.4)


def test_the_farthest_from_uniform_are_drawn_first(run, capsys) -> None:
    picture = run / "gates.png"
    main([str(run), "--out", str(picture)])
    assert capsys.readouterr().out == f"{picture}: layer01.v_proj, layer00.q_proj\n"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_what_is_not_there_is_refused(run, tmp_path, capsys) -> None:
    for options, message in (
        ([str(run), "--layers", "layer09.q_proj"], "unknown layers layer09.q_proj; choose some of layer00"),
        ([str(tmp_path / "nothing")], "has no gate curves"),
    ):
        with pytest.raises(SystemExit):
            main(options)
        assert message in capsys.readouterr().err
