from pathlib import Path

import pytest

from moka_pl.errors import ConfigError
from moka_pl.studies.benchmark.page import BEGIN, END, main, section
from moka_pl.studies.common import replace_section

BEFORE, AFTER = "# name\n\nText.\n\n", "\n\n## More\n"


@pytest.fixture
def page(tmp_path):
    file = tmp_path / "page.md"
    file.write_text(f"{BEFORE}{BEGIN}\nold\n{END}{AFTER}")
    return file


@pytest.fixture
def given(results, tmp_path):
    file = tmp_path / "results.json"
    results.save(file)
    return str(file)


def status(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        main([*arguments])
    return end.value.code


def test_the_section_names_device_versions_and_command(results) -> None:
    text = section([results])
    assert "**llama2-7b on one NVIDIA H100.**" in text
    assert "torch 2.11.0, transformers 5.17.0, PEFT 0.21.0" in text.replace("\n", " ")
    assert f"```bash\n{results.command}\n```" in text
    assert "| MoKA r10 | 5 | 123 | 1.23 | 2.0 | 180 | 1.80 | 2.0 |" in text
    assert "| LoKr r64 q,v |  | failed: RuntimeError: a \\| b |  |  |  |  |  |" in text
    assert "| MoKA r10 | 12.0, 2.0 | out of memory |" in text
    assert "1.026 times a bare loop" in text.replace("\n", " ")
    assert "| frozen base | 3.50 | 1.00 |" in text
    assert max(len(line) for line in text.splitlines() if not line.startswith(("|", "python"))) <= 115


def test_rewriting_and_checking(page, given, results, capsys) -> None:
    assert status(given, "--page", str(page), "--check") == 1
    assert "differs from the results" in capsys.readouterr().err
    assert "old" in page.read_text()

    main([given, "--page", str(page)])
    text = page.read_text()
    assert text.startswith(BEFORE)
    assert text.endswith(AFTER)
    assert "old" not in text
    assert "NVIDIA H100" in text

    main([given, "--page", str(page), "--check"])
    main([given, "--page", str(page)])
    assert page.read_text() == text

    results.records[0].values["step_ms"] = 99.0
    results.save(page.with_name("other.json"))
    main([str(page.with_name("other.json")), given, "--page", str(page)])
    assert page.read_text().count("on one NVIDIA H100") == 2


@pytest.mark.parametrize(
    "text", ["", BEGIN, END, f"{END}\n{BEGIN}", f"{BEGIN}\n{END}\n{BEGIN}\n{END}"], ids=range(5)
)
def test_markers_must_be_there(text: str, page, given, capsys) -> None:
    with pytest.raises(ConfigError, match="needs one line <!-- performance -->"):
        replace_section(text, "new", BEGIN, END)
    page.write_text(text)
    assert status(given, "--page", str(page)) == 2
    assert f"error: {page} needs one line {BEGIN} and one line {END} below it" in capsys.readouterr().err
    assert page.read_text() == text


def test_errors_are_one_line(given, page, tmp_path, capsys) -> None:
    assert status(str(tmp_path / "no.json"), "--page", str(page)) == 2
    assert status(given, "--page", str(tmp_path / "NO.md")) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("benchmark_page: error: ") for line in lines)


def test_the_page_of_benchmarks_is_made_of_its_results(capsys) -> None:
    root = Path(__file__).parents[3]
    results = sorted(str(file) for file in (root / "scripts" / "results").glob("*.json"))
    assert results
    main([*results, "--page", str(root / "docs" / "benchmarks.md"), "--check"])
    assert "up to date" in capsys.readouterr().out
