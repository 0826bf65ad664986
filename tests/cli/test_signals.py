"""Plain commands end on a scheduler's signals as on Ctrl-C: nothing is left half-written."""

import os
import signal
from pathlib import Path

import pytest

from moka_pl.cli import main as module
from moka_pl.cli.answering import chat
from moka_pl.cli.main import main
from moka_pl.errors import INTERRUPTED, Terminated
from moka_pl.utils import replaced_folder


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_command_that_is_ended_leaves_nothing_behind(number, tmp_path, monkeypatch, capsys) -> None:
    def write(out: Path) -> None:
        """Writes a folder.

        Args:
            out: Where.
        """
        with replaced_folder(out) as new:
            new.mkdir()
            (new / "half").write_text("half")
            os.kill(os.getpid(), number)
            pytest.fail("it went on")

    before = signal.signal(number, signal.SIG_DFL)  # nohup has its processes ignore SIGHUP
    try:
        monkeypatch.setitem(module.FUNCTIONS, "export", write)
        with pytest.raises(SystemExit) as ended:
            main(["export", str(tmp_path / "out")])
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert ended.value.code == INTERRUPTED
    assert capsys.readouterr().err.strip() == "interrupted"
    assert not list(tmp_path.iterdir())


def test_a_chat_ends_in_the_middle_of_an_answer(monkeypatch) -> None:
    def ended(*_: object) -> str:
        raise Terminated

    monkeypatch.setattr(chat, "print_tokens", ended)
    session = type("Session", (), {"ids": lambda self, row: [1]})()
    with pytest.raises(Terminated):
        chat._answer(session, [], "Hi")
