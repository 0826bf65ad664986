"""Messages of other libraries, put into ours."""

import errno

from moka_pl.errors import listed, one_line, system_failure


def test_a_message_is_never_cut_before_its_end() -> None:
    long = "a reason\n\twith  white space " * 100 + "\nand at last the remedy"
    assert one_line(ValueError(long)).endswith("white space and at last the remedy")
    assert one_line(ValueError(long)).count("a reason with white space") == 100


def test_an_error_without_a_message_has_its_type() -> None:
    assert one_line(KeyboardInterrupt()) == "KeyboardInterrupt"


def test_failures_of_the_system_are_one_line_with_a_remedy():
    full = OSError(errno.ENOSPC, "No space left on device", "a/b")
    assert system_failure(full) == (
        "a/b: No space left on device; free some space, or choose a folder on another disk"
    )
    wrapped = RuntimeError("saving failed")
    wrapped.__cause__ = PermissionError(errno.EACCES, "Permission denied", "a", None, "b")
    assert system_failure(wrapped) == (
        "a -> b: Permission denied; choose a place that you have the permission for"
    )
    assert "ulimit -n" in str(system_failure(OSError(errno.EMFILE, "Too many open files")))
    for other in (RuntimeError("no"), OSError("no number"), ConnectionResetError(errno.ECONNRESET, "reset")):
        assert system_failure(other) is None


def test_names_are_listed_up_to_a_number():
    assert listed([], 2) == ""
    assert listed(["a", "b"], 2) == "a, b"
    assert listed(["a", "b", "c"], 2) == "a, b and 1 more"
    assert listed(["a"] * 1235, 1) == "a and 1,234 more"
