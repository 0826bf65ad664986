"""Many adapters on one base: the measuring script."""

import re

import pytest

from moka_pl.studies.mixed_batches import main


@pytest.mark.slow
def test_it_tells_bytes_ratios_and_agreement(one_thread, capsys) -> None:
    arguments = ["--base", "tiny", "--rows", "4", "--adapters", "2", "--kept", "3", "--repeats", "1"]
    main(arguments)
    out = capsys.readouterr().out
    assert len(re.findall(r"ratio \d+\.\d\d", out)) == 6
    assert out.count("4 of 4 rows generate the tokens of their adapter alone") == 2
    held = [int(n.replace(",", "")) for n in re.findall(r"3 adapters hold ([\d,]+) bytes", out)]
    assert len(held) == 2
    assert all(size % 3 == 0 and size > 0 for size in held)
