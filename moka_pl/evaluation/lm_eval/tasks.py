"""From the names that a user gives to lm_eval's tasks, with their data read."""

import difflib
import importlib.util
import logging
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moka_pl.errors import ConfigError, MokaError, listed, one_line
from moka_pl.evaluation.lm_eval.local_data import local_tasks, write_task_files
from moka_pl.hub import cache_if_unreachable, unasked
from moka_pl.utils import silenced

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

_NEAR, _LISTED = 5, 30


def require_lm_eval() -> None:
    """Raises ``ConfigError`` if lm_eval is not installed, without importing it (which takes seconds)."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "the lm-evaluation-harness is not installed: pip install 'moka_pl[eval]' (or pip install lm_eval)"
        )


# lm_eval's warnings: that a task is local, that a model is built already.
silenced_lm_eval = partial(silenced, "lm_eval", below=logging.ERROR)


@dataclass(frozen=True)
class Selection:
    """Tasks that are ready to run.

    Attributes:
        names: Names of tasks and groups, patterns replaced by what they match.
        tasks: The loaded tasks and groups, as lm_eval's ``simple_evaluate`` takes them.
        manager: A manager of lm_eval's, which its functions ask for.
    """

    names: list[str]
    tasks: list[Any]
    manager: "TaskManager"


def select_tasks(
    wanted: Sequence[str], data: Path | None = None, num_fewshot: int | None = None
) -> Selection:
    """Finds tasks by name, those of local data first, then lm_eval's own, and reads their data.

    Args:
        wanted: Names of tasks or groups, or patterns such as ``mmlu_*``.
        data: A folder of local data, see ``local_data``. Its tasks take the place of
            tasks of lm_eval of the same name.
        num_fewshot: Few-shot examples before each question; None uses each task's own number.

    Raises:
        ConfigError: A name is unknown or names a task twice, or one of lm_eval's tasks has no data.
        DataError: Local data cannot be used.
    """
    local = {} if data is None else local_tasks(data, num_fewshot)
    if not wanted:
        raise ConfigError(f"no tasks given; set --tasks to names separated by commas{_listing(local)}")
    from lm_eval.tasks import TaskManager

    # The files are read into memory when tasks are loaded; nothing asks for them later.
    with tempfile.TemporaryDirectory(prefix="moka_pl-tasks-") as folder, silenced_lm_eval():
        write_task_files(local, Path(folder))
        ours = TaskManager(include_path=folder, include_defaults=False)
        managers = dict(pair for name in wanted for pair in _match(name, ours, local))
        return Selection(list(managers), _load(managers, ours), ours)


@cache
def _library_tasks() -> "TaskManager":
    """Returns the manager of lm_eval's tasks; looking through their thousands takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _match(name: str, ours: "TaskManager", local: dict[str, Any]) -> list[tuple[str, "TaskManager"]]:
    """Returns the tasks that a name or pattern means, each with the manager that loads it."""
    if matched := ours.match_tasks([name]):
        return [(task, ours) for task in matched]
    if matched := _library_tasks().match_tasks([name]):
        return [(task, _library_tasks()) for task in matched]
    near = difflib.get_close_matches(name, local, _NEAR, 0.5) or difflib.get_close_matches(
        name, _library_tasks().all_tasks, _NEAR
    )
    hint = f"; did you mean {', '.join(near)}?" if near else ""
    raise ConfigError(f"unknown task {name!r}{hint}{_listing(local)}")


def _listing(local: dict[str, Any]) -> str:
    if not local:
        return ""
    return f" (the local data has {listed(list(local), _LISTED)})"


def _load(managers: "dict[str, TaskManager]", ours: "TaskManager") -> list[Any]:
    loaded: list[Any] = []
    chosen_by: dict[str, str] = {}
    for name, manager in managers.items():
        content = _content(name, manager, local=manager is ours)
        for task in content["tasks"]:
            if task in chosen_by:
                raise ConfigError(
                    f"the task {task} is selected twice, by {chosen_by[task]} and by {name}; remove one"
                )
            chosen_by[task] = name
        groups = content.get("groups", {})
        loaded += [groups[name]] if name in groups else content["tasks"].values()
    return loaded


def _content(name: str, manager: "TaskManager", local: bool) -> dict[str, Any]:
    """Loads a task; unless it is local, its data are on the hub or in the cache of ``datasets``."""
    with nullcontext(None) if local else cache_if_unreachable() as reason:
        try:
            return dict(manager.load([name]))
        except MokaError:
            raise
        # The hub's client, `datasets` and tasks of others raise whatever they like.
        except Exception as error:
            failure, remedy = one_line(error), "connect to the network"
            if reason is not None and isinstance(error, ConnectionError):
                why, remedy = unasked(reason)
                failure = f"its data are not in the cache of `datasets`, and {why}"
            raise ConfigError(
                f"lm_eval cannot load the task {name}: {failure}; {remedy}, or give local data with --data"
            ) from error
