"""What works with which family, and that the page says so."""

from pathlib import Path

import pytest
import torch
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS

from moka_pl.lm import scoring
from moka_pl.lm.scoring import score_tokens
from moka_pl.studies.architectures import command
from moka_pl.studies.architectures.command import find_rows, row, stored_rows, table
from moka_pl.studies.architectures.facts import Facts, WrongError, check_loss, default_layers, refused
from moka_pl.studies.architectures.families import FAMILIES, Family, tiny_model

PAGE = Path(__file__).parents[3] / "docs" / "models.md"
BY_NAME = {family.name: family for family in FAMILIES}


@pytest.fixture(scope="module")
def rows() -> dict[str, str]:
    return stored_rows(PAGE)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_family_has_its_own_loss_and_layers_to_adapt(family: Family, rows: dict[str, str]) -> None:
    model = tiny_model(family)
    check_loss(model, model)
    layers = default_layers(model)
    told = ", ".join(f"`{name}`" for name in layers.split(", "))
    assert f"| {family.name} | `{family.model_type}` | {told} |" in rows[family.name]
    if family.model_type in PEFT_TARGETS:
        assert set(layers.split(", ")) == set(PEFT_TARGETS[family.model_type])


def test_the_page_has_every_family(rows: dict[str, str]) -> None:
    assert list(rows) == list(BY_NAME)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_page_is_true(rows: dict[str, str]) -> None:
    assert find_rows() == list(rows.values())


def test_a_head_that_is_passed_by_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The values of the families' scales and caps are such that a loss without them is another one."""
    for name in ("Cohere", "Granite", "Gemma 2"):
        model = tiny_model(BY_NAME[name])
        with monkeypatch.context() as patch:
            patch.setattr(scoring, "has_plain_head", lambda model: True)
            with pytest.raises(WrongError, match=r"^loss: .* from the plain computation$"):
                check_loss(model, model)


def test_refusals_are_told_and_mistakes_are_not_hidden() -> None:
    def wrong() -> None:
        raise WrongError("loss: 1 from the plain computation")

    with pytest.raises(WrongError):
        refused(wrong)
    facts = Facts("c_attn", 1.0, 0.123, "refused: because", "yes", "yes", "computed whole")
    line = row(BY_NAME["GPT-2"], facts)
    assert line == "| GPT-2 | `gpt2` | `c_attn` | 100% | 12% | refused | yes | yes | computed whole |"
    assert line in table([line])


def test_the_table_is_written_into_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "models.md"
    page.write_text(f"# a\n\n{command.BEGIN}\n{command.END}\n\nb\n", encoding="utf-8")
    monkeypatch.setattr(command, "_PAGE", page)
    monkeypatch.setattr(command, "find_rows", lambda: ["| x | `y` |"])
    command.main(["--write"])
    assert stored_rows(page) == {"x": "| x | `y` |"}
    assert page.read_text(encoding="utf-8").endswith(f"{command.END}\n\nb\n")
    command.main([])
    assert "| x | `y` |" in capsys.readouterr().out
    page.write_text("nothing", encoding="utf-8")
    with pytest.raises(SystemExit):
        command.main(["--write"])
    assert "needs one line <!-- families -->" in capsys.readouterr().err


def test_packed_examples_of_a_model_without_a_mask_of_its_own_stay_apart() -> None:
    from moka_pl.lm.attention import PackedAttention

    model = tiny_model(BY_NAME["OPT"])
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        packed = PackedAttention(model)
        assert packed.explicit
        positions = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 0, 0, 1]])
        ids = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]])
        labels = ids.masked_fill(positions == 0, -100)
        with torch.no_grad():
            found = score_tokens(model, ids, labels, **packed.inputs({"position_ids": positions})).nll
            parts = [ids[:1, :3], ids[:1, 3:], ids[1:, :2], ids[1:, 3:]]
            expected = torch.cat([score_tokens(model, part, part).nll for part in parts])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
