"""Messages of other libraries, put into ours."""

from moka_pl.errors import one_line


def test_a_message_is_never_cut_before_its_end() -> None:
    long = "a reason\n\twith  white space " * 100 + "\nand at last the remedy"
    assert one_line(ValueError(long)).endswith("white space and at last the remedy")
    assert one_line(ValueError(long)).count("a reason with white space") == 100


def test_an_error_without_a_message_has_its_type() -> None:
    assert one_line(KeyboardInterrupt()) == "KeyboardInterrupt"
