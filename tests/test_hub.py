"""Asking the hub: once, and then not again for a minute."""

import time
from contextlib import suppress

import huggingface_hub
import pytest

from moka_pl.hub import ask_hub, cache_if_unreachable


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict:
    """A hub: ``error`` is what asking it raises, ``asked`` what it was asked for, ``now`` the time."""
    hub: dict = {"error": None, "asked": [], "now": 100.0}

    def ask(url: str, timeout: object) -> None:
        hub["asked"].append(url)
        if hub["error"] is not None:
            raise hub["error"]

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", ask)
    monkeypatch.setattr(time, "monotonic", lambda: hub["now"])
    return hub


def test_a_silent_hub_is_asked_again_after_a_minute(hub: dict) -> None:
    hub["error"] = OSError("no route")
    for url in ("a", "b"):
        with pytest.raises(OSError, match="no route"):
            ask_hub(url)
    assert hub["asked"] == ["a"]
    hub["error"] = None
    hub["now"] += 61
    ask_hub("c")
    ask_hub("d")
    assert hub["asked"] == ["a", "c", "d"]


def test_an_answer_is_one_even_if_it_is_no(hub: dict) -> None:
    hub["error"] = OSError("no such file")
    hub["error"].response = type("Response", (), {"status_code": 404})
    for _ in range(2):
        with pytest.raises(OSError, match="no such file"):
            ask_hub("a")
    assert hub["asked"] == ["a", "a"]
    with cache_if_unreachable() as reason:
        assert reason is None
        assert not huggingface_hub.constants.is_offline_mode()


def test_offline_while_the_hub_is_out_of_reach(hub: dict) -> None:
    hub["error"] = OSError("no route")
    with suppress(ZeroDivisionError), cache_if_unreachable() as reason:
        assert reason is hub["error"]
        assert huggingface_hub.constants.is_offline_mode()
        raise ZeroDivisionError
    assert not huggingface_hub.constants.is_offline_mode()
