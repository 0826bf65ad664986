from moka_pl.studies.benchmark.tables import markdown, milliseconds, tables, write_figures


def test_a_line_a_row(results) -> None:
    lines = tables(results)["steps"].splitlines()
    assert lines[0].startswith("| adapter | checkpointing | step ms | forward ms | tokens/s | peak GiB |")
    assert lines[3] == "| MoKA r10 | off | 123 | 41.0 | 8,130 | 2.00 | 5 | 1.23 |"
    assert lines[4].startswith("| LoKr r64 q,v | off | failed: RuntimeError: a \\| b |")
    assert lines[6].startswith("| MoKA r10 | on | 180 |")
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1


def test_growth_has_a_column_a_setting(results) -> None:
    found = tables(results)
    assert found["components"].splitlines()[0] == "| adapter \\ components | 0 | 1 | 40 |"
    assert "| MoKA |  | 101, 2.0 | 130, 2.0 |" in found["components"]
    assert "| MoKA, checkpointing |  |  | 210, 2.0 |" in found["components"]
    assert found["tokens"].splitlines()[0] == "| adapter \\ tokens | 1 | 4,096 |"
    assert "| MoKA r10 | 12.0, 2.0 | out of memory |" in found["tokens"]
    assert found["sizes"].splitlines()[0] == "| adapter \\ shape | llama3-1b | llama2-7b |"


def test_fit_and_decode(results) -> None:
    found = tables(results)
    assert "| MoKA r10 fit | off | 40.0 | 39.0 | 1.026 | 42.0 | 39.5 | 1.063 | 3.00 |" in found["fit"]
    assert "| frozen base | 3.50 | 285.7 | 8.00 | 1.00 | 0 | 1.00 |" in found["decode"]


def test_only_what_was_measured_is_shown(results) -> None:
    assert "Note: rows with Liger are left out" in markdown(results)
    results.records = results.of("decode")
    assert list(tables(results)) == ["decode"]


def test_milliseconds() -> None:
    assert [milliseconds(ms) for ms in (1234.5, 99.94, 1.234)] == ["1,234", "99.9", "1.23"]


def test_time_and_memory_over_what_was_varied(results, tmp_path) -> None:
    written = write_figures(results, tmp_path / "new" / "folder")
    names = ["growth_components.png", "growth_tokens.png", "growth_sizes.png"]
    assert [file.name for file in written] == names
    for file in written:
        assert file.read_bytes().startswith(b"\x89PNG")
        assert file.stat().st_size > 10_000


def test_nothing_measured_nothing_drawn(results, tmp_path) -> None:
    results.records = results.of("steps") + [r for r in results.of("tokens") if r.error is not None]
    assert write_figures(results, tmp_path) == []
