"""Lightning callbacks, one a file, and the logger that they write to."""

from moka_pl.callbacks.base_scores import BaseScores
from moka_pl.callbacks.board import BoardLogger
from moka_pl.callbacks.checkpoints import AdapterCheckpoint, RunCheckpoint
from moka_pl.callbacks.dashboard import Dashboard
from moka_pl.callbacks.evaluation import EvaluationTable
from moka_pl.callbacks.example import ExamplePrinter
from moka_pl.callbacks.gates import GateMonitor
from moka_pl.callbacks.interrupt import GracefulInterrupt
from moka_pl.callbacks.monitors import MonitorCheck
from moka_pl.callbacks.progress import ProgressBar
from moka_pl.callbacks.summary import RunSummary
from moka_pl.callbacks.throughput import BatchStatistics, Throughput

__all__ = [
    "AdapterCheckpoint",
    "BaseScores",
    "BatchStatistics",
    "BoardLogger",
    "Dashboard",
    "EvaluationTable",
    "ExamplePrinter",
    "GateMonitor",
    "GracefulInterrupt",
    "MonitorCheck",
    "ProgressBar",
    "RunCheckpoint",
    "RunSummary",
    "Throughput",
]
