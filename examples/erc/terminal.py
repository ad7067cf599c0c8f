"""Texts of others on a terminal: harmless, and as wide as they look."""

import re
import unicodedata
from collections.abc import Sequence


def plain(value: str) -> str:
    """A text that cannot steer a terminal: whatever is not to be seen becomes a blank."""
    shown = "".join(" " if unicodedata.category(letter)[0] in "CZ" else letter for letter in value)
    return re.sub(" +", " ", shown).strip()


def width(value: str) -> int:
    """How many columns a plain text takes; wide letters take two, combining marks none."""
    return sum(map(_columns, value))


def fit(value: str, columns: int) -> str:
    """Cut or fill a text to so many columns, >= 1."""
    value = plain(value)
    if width(value) > columns:
        room, cut = columns - 1, ""
        for letter in value:
            room -= _columns(letter)
            if room < 0:
                break
            cut += letter
        value = cut.rstrip() + "…"
    return value + " " * (columns - width(value))


def abbreviations(labels: Sequence[str]) -> list[str]:
    """Cut labels to three letters, or to four if three do not tell them apart."""
    short = [label[:3] for label in labels]
    return short if len({*short}) == len(labels) else [label[:4] for label in labels]


def _columns(letter: str) -> int:
    if unicodedata.combining(letter):
        return 0
    return 2 if unicodedata.east_asian_width(letter) in "WF" else 1
