import pytest

from examples.erc.terminal import fit, plain, width


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("Hi there.", "Hi there."),
        ("  a\tb\n\nc ", "a b c"),
        ("\x1b[2Jgone\x07", "[2Jgone"),
        ("right\u202eleft\u200b", "right left"),
        ("\ud800", ""),
        ("\u00a0caf\u00e9", "caf\u00e9"),
    ],
)
def test_what_is_not_to_be_seen_becomes_a_blank(value: str, shown: str) -> None:
    assert plain(value) == shown


@pytest.mark.parametrize(
    ("value", "columns", "shown"),
    [
        ("abc", 5, "abc  "),
        ("abcdef", 4, "abc…"),
        ("ab cdef", 4, "ab… "),
        ("\u4f60\u597d\u5417", 5, "\u4f60\u597d…"),
        ("\u4f60\u597d\u5417", 4, "\u4f60… "),
        ("e\u0301e\u0301", 2, "e\u0301e\u0301"),
        ("", 3, "   "),
    ],
)
def test_texts_fit_their_columns(value: str, columns: int, shown: str) -> None:
    assert fit(value, columns) == shown
    assert width(fit(value, columns)) == columns
