from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.erc.errors import InputError
from examples.erc.table import Row, locate, read_table

COLUMNS = ("Utterance", "Count")


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return tmp_path / "table.csv"


def read(table: Path, data: bytes | str) -> list[Row]:
    table.write_bytes(data if isinstance(data, bytes) else data.encode())
    return read_table(table, COLUMNS)


def test_reads_cells_with_commas_and_quotation_marks(table: Path) -> None:
    rows = read(table, 'Utterance,Count,Other\n"Oh, ""no"".",1,x\nYes,2,y\n')

    assert [row.text("Utterance") for row in rows] == ['Oh, "no".', "Yes"]
    assert [row.line for row in rows] == [2, 3]


def test_a_byte_order_mark_carriage_returns_and_blank_lines_do_no_harm(table: Path) -> None:
    rows = read(table, b"\xef\xbb\xbfUtterance,Count\r\n\r\nYes,2\r\n\r\n")

    assert [(row.line, row.text("Utterance"), row.integer("Count")) for row in rows] == [
        (3, "Yes", 2)
    ]


def test_a_line_ends_at_a_line_feed_alone(table: Path) -> None:
    # U+0085 and U+2028 end a line for str.splitlines; in MELD the first is an ellipsis.
    rows = read(table, "Utterance,Count\nWell\u0085 I\u2028see,1\n")

    assert rows[0].cells["Utterance"] == "Well\u0085 I\u2028see"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("Utterance\nYes\n", r"line 1: expected one column 'Count', got 'Utterance';"),
        ("Count,Utterance,Count\n1,Yes,1\n", r"line 1: expected one column 'Count', got it twice"),
        ("", r"line 1: expected one column 'Utterance', got nothing"),
        ("Utterance,Count\n", r"line 2: expected at least one utterance, got none"),
        ("Utterance,Count\n\n\n", r"line 2: expected at least one utterance, got none"),
        (
            'Utterance,Count\nYes,1\n"No,2\nWhat,3\n',
            r"line 3, column 'Utterance': .*unexpected end",
        ),
        ('Utterance,Count\nYes,"1\n', r"line 2, column 'Count': .*close the quotation mark"),
        ('Utterance,Count\n"a, b"c,1\n', r"line 2, column 'Utterance': .*fault"),
        ('"Utterance,Count\nYes,1\n', r"line 1, column 1: .*close the quotation mark"),
        ("Utterance,Count\nYes,1,2\n", r"line 2, column 'Count': expected 2 cells .* got 3"),
        ("Utterance,Count\nYes\n", r"line 2, column 'Utterance': expected 2 cells .* got 1"),
        ("Utterance,Count\nY\0es,1\n", r"line 2, column 'Utterance': .*'Y\\x00es'.*NUL"),
        (f"Utterance,Count\n{'a' * 200_000},1\n", r"line 2, column 'Utterance': .*field"),
        (
            b"Utterance,Count\nYes,1\nIt\x92s,2\n",
            r"line 3, byte 3: expected UTF-8, got 0x92; save the table as UTF-8",
        ),
    ],
)
def test_a_fault_is_one_line_that_says_where(table: Path, data: bytes | str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read(table, data)

    assert str(caught.value).startswith(f"{table}, ")
    assert "\n" not in str(caught.value)


@given(
    edits=st.lists(
        st.tuples(st.integers(0, 80), st.integers(0, 3), st.binary(max_size=3)), max_size=5
    )
)
def test_no_damage_gives_anything_but_rows_or_an_input_error(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, int, bytes]]
) -> None:
    data = bytearray(b'Utterance,Count,Other\n"Oh, no",1,x\nYes,2,"y ""z"""\n"What?",3,\n')
    for place, length, bytes_ in edits:
        data[place : place + length] = bytes_
    table = tmp_path_factory.getbasetemp() / "damaged.csv"

    rows, message = [], ""
    try:
        rows = read(table, bytes(data))
    except InputError as error:
        message = str(error)

    assert bool(rows) != bool(message)
    assert message.isprintable()
    assert all(row.cells.keys() >= set(COLUMNS) for row in rows)


def test_a_table_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"missing\.csv: expected a CSV table, .*No such file"):
        read_table(tmp_path / "missing.csv", COLUMNS)


@pytest.mark.parametrize("value", ["", " ", "1.0", "-1", "+1", "1_0", "x", "\u0663", "9" * 5000])
def test_integer_refuses_everything_but_digits(value: str) -> None:
    row = Row(Path("t.csv"), 7, {"Count": value})

    with pytest.raises(
        InputError, match=r"t\.csv, line 7, column 'Count': expected .*; "
    ) as caught:
        row.integer("Count")
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("value", ["", "x", "nan", "inf", "-0.1", "1,5"])
def test_seconds_refuses_what_is_no_time(value: str) -> None:
    row = Row(Path("t.csv"), 7, {"Start": value})

    with pytest.raises(InputError, match=r"t\.csv, line 7, column 'Start': expected "):
        row.seconds("Start")


def test_index_refuses_an_unknown_label() -> None:
    row = Row(Path("t.csv"), 7, {"Emotion": "joyful"})

    assert Row(Path("t.csv"), 7, {"Emotion": " joy"}).index("Emotion", ("anger", "joy")) == 1
    with pytest.raises(
        InputError, match=r"line 7, column 'Emotion': expected one of anger, joy, got 'joyful'"
    ):
        row.index("Emotion", ("anger", "joy"))


def test_locate_accepts_a_root_that_is_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")

    assert locate(tmp_path / "link", "a/b.wav") == (tmp_path / "real/a/b.wav").resolve()


@pytest.mark.parametrize("name", ["../secret.wav", "a/../../secret.wav", "/etc/hostname", "out/x"])
def test_locate_refuses_to_leave_the_root(tmp_path: Path, name: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "out").symlink_to(tmp_path)

    with pytest.raises(InputError, match=r"expected a file under .*, got .*; put the file itself"):
        locate(root, name)
