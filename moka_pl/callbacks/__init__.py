"""Lightning callbacks, one a file."""

from moka_pl.callbacks.batch_statistics import BatchStatistics
from moka_pl.callbacks.checkpoints import AdapterCheckpoint
from moka_pl.callbacks.evaluation import EvaluationTable
from moka_pl.callbacks.gates import GateMonitor
from moka_pl.callbacks.interrupt import GracefulInterrupt
from moka_pl.callbacks.progress import ProgressBar
from moka_pl.callbacks.run_checkpoint import RunCheckpoint
from moka_pl.callbacks.summary import RunSummary
from moka_pl.callbacks.throughput import Throughput

__all__ = [
    "AdapterCheckpoint",
    "BatchStatistics",
    "EvaluationTable",
    "GateMonitor",
    "GracefulInterrupt",
    "ProgressBar",
    "RunCheckpoint",
    "RunSummary",
    "Throughput",
]
