"""Tables of a CSVLogger that another run goes on with."""

import csv

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from moka_pl.cli.csv_tables import keep_table


def log(folder, *rows, killed=False):
    logger = CSVLogger(folder, "moka", version=0)
    if killed:
        table = folder / "moka/version_0/metrics.csv"
        table.replace(table.with_name(".metrics.csv.kept"))
    keep_table(logger)
    for step, row in enumerate(rows):
        logger.log_metrics(row, step)
    logger.save()
    with (folder / "moka/version_0/metrics.csv").open(newline="") as file:
        return [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]


@pytest.mark.filterwarnings("error")
def test_rows_are_added(tmp_path):
    first = {"loss": "1.0", "step": "0"}
    assert log(tmp_path, {"loss": 1.0}) == [first]
    assert log(tmp_path, {"loss": 2.0}) == [first, first | {"loss": "2.0"}]
    # A column that is new stands where its name is sorted.
    assert log(tmp_path, {"a": 3.0})[1:] == [first | {"loss": "2.0"}, {"a": "3.0", "step": "0"}]
    assert len(log(tmp_path, {"loss": 4.0})) == 4


def test_nothing_is_logged(tmp_path):
    log(tmp_path, {"loss": 1.0})
    assert len(log(tmp_path)) == 1


def test_a_run_that_was_killed_while_its_logger_began(tmp_path):
    log(tmp_path, {"loss": 1.0})
    assert len(log(tmp_path, {"loss": 2.0}, killed=True)) == 2
    assert [path.name for path in (tmp_path / "moka/version_0").glob("*metrics*")] == ["metrics.csv"]


def test_other_loggers_and_new_folders_are_left_alone(tmp_path):
    for kind in (CSVLogger, TensorBoardLogger):
        keep_table(kind(tmp_path, "moka"))
    assert list(tmp_path.iterdir()) == []
