"""Tables of a CSVLogger that a run goes on with."""

import csv
import warnings
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger, Logger

_NAME = "metrics.csv"
#: Where a table is while the logger begins; one that is found there is of a run that was killed just then.
_ASIDE = ".metrics.csv.kept"


def keep_table(logger: Logger) -> None:
    """Has a CSVLogger add to the table of its version, which Lightning (2.6) deletes when it begins.

    Args:
        logger: Any logger; of other kinds none is touched.
    """
    if not isinstance(logger, CSVLogger) or "://" in logger.log_dir:
        return
    table, aside = Path(logger.log_dir, _NAME), Path(logger.log_dir, _ASIDE)
    if aside.is_file() and not table.exists():
        aside.replace(table)
    if not table.is_file():
        return
    with table.open(newline="", encoding="utf-8", errors="replace") as file:
        names = next(csv.reader(file), [])
    table.replace(aside)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says that it will delete the table
            experiment = logger.experiment
    finally:
        aside.replace(table)
    experiment.metrics_keys = names
