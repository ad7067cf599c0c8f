import csv
import io
import re

import pytest
from docutils.core import publish_doctree
from docutils.nodes import literal_block, system_message, table
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.erc.comparison import Column, Difference, Probability, Row, Spread, Table
from examples.experiments.exports import csv_table, escape_latex, latex, rst

TABLE = Table(
    "the_key",
    "50 % & more_",
    "What {it} is.",
    (
        Column("what", "What #1"),
        Column("score", "Score", ranked=True),
        Column("gap", "Gap"),
        Column("p", "p < 1"),
    ),
    (
        Row("a", ("a_b, “c”", Spread(0.5, 0.0125, 2), None, None)),
        Row("b", ("b*", Spread(0.25, None, 1), Difference(-0.25, 0.01, 2), Probability(0.0004))),
    ),
)
ACTIVE = {
    r"\textbackslash{}": "\\",
    r"\textasciitilde{}": "~",
    r"\textasciicircum{}": "^",
    r"{\char34}": '"',
    "$<$": "<",
    "$>$": ">",
    "$|$": "|",
    **{rf"\{sign}": sign for sign in "{}&%$#_"},
}
"""What LaTeX prints, sign by sign, for the commands of ASCII."""


def printed(escaped: str) -> str:
    """Read LaTeX as LaTeX would; fail on any active sign that is left."""
    pattern = re.compile("|".join(map(re.escape, ACTIVE)))
    rest = pattern.sub("", escaped)
    assert not set(rest) & set('\\{}&%$#_~^<>|"')
    return pattern.sub(lambda found: ACTIVE[found[0]], escaped)


@given(st.text(st.characters(min_codepoint=0, max_codepoint=126)))
@settings(max_examples=200, deadline=None)
def test_every_sign_of_ascii_stands_for_itself_in_latex(text: str) -> None:
    expected = "".join(sign if sign.isprintable() else " " for sign in text)
    assert printed(escape_latex(text)) == expected


def test_signs_without_a_letter_become_mathematics() -> None:
    assert escape_latex("−1 ± 2 – 3") == r"$-$1 $\pm$ 2 -- 3"


def test_a_latex_table_has_the_rules_of_booktabs_and_as_many_cells_as_columns() -> None:
    assert latex(TABLE, "A & B").splitlines() == [
        r"\begin{table}",
        r"\centering",
        r"\caption{A \& B: 50 \% \& more\_. What \{it\} is.}",
        r"\label{tab:a-b-the-key}",
        r"\begin{tabular}{lrrr}",
        r"\toprule",
        r"What \#1 & Score & Gap & p $<$ 1 \\",
        r"\midrule",
        r"a\_b, “c” & \textbf{50.00 $\pm$ 1.25} &  &  \\",
        r"b* & 25.00 & $-$25.00 $\pm$ 1.00 & $<$ 0.001 \\",
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]


def test_csv_keeps_numbers_and_gives_deviations_a_column() -> None:
    rows = list(csv.DictReader(io.StringIO(csv_table(TABLE))))
    assert rows == [
        {
            "What #1": "a_b, “c”",
            "Score": "50.0",
            "Score, sd": "1.25",
            "Gap": "",
            "Gap, sd": "",
            "p < 1": "",
        },
        {
            "What #1": "b*",
            "Score": "25.0",
            "Score, sd": "",
            "Gap": "-25.0",
            "Gap, sd": "1.0",
            "p < 1": "0.0004",
        },
    ]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::PendingDeprecationWarning")
def test_restructuredtext_is_a_table_that_docutils_reads() -> None:
    text = rst(TABLE, "Corpus::")
    tree = publish_doctree(text, settings_overrides={"report_level": 1, "halt_level": 5})
    assert not list(tree.findall(system_message))
    assert not list(tree.findall(literal_block))
    (found,) = tree.findall(table)
    cells = [entry.astext() for entry in found.findall(lambda node: node.tagname == "entry")]
    assert cells[:4] == ["What #1", "Score", "Gap", "p < 1"]
    assert cells[4:] == [
        *("a_b, “c”", "50.00 ± 1.25", "", ""),
        *("b*", "25.00", "−25.00 ± 1.00", "< 0.001"),
    ]
