from moka_pl.studies.benchmark.tables import write_figures


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
