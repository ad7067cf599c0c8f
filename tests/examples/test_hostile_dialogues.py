"""Dialogue files that were damaged or made up: one line says what is wrong, and nothing leaks out.

``HYPOTHESIS_PROFILE=nightly`` tries many more of them.
"""

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.erc import dialogue_file
from examples.erc.errors import InputError
from examples.meld.corpus import repair
from tests.helpers.damage import Mutation, mutate, mutations

TABLE = (
    "Speaker,Utterance,Dialogue_ID,Utterance_ID,Clip,Clip_Start,Clip_End,Audio,Side\n"
    + "".join(
        f'Ada {row % 2},"It\u0092s, well, {row}.",{row // 3},{row % 3},clip{row}.mp4,{row},'
        f"{row + 1.5},,left\n"
        for row in range(7)
    )
).encode()

DOCUMENT = json.dumps(
    [
        {
            "id": f"dialogue {number}",
            "utterances": [
                {
                    "speaker": "Ada",
                    "text": "Well.",
                    "clip": {"file": f"clip{row}.mp4", "start": row, "end": row + 1},
                    "audio": "voice.wav",
                    "side": "left",
                }
                for row in range(3)
            ],
        }
        for number in range(2)
    ]
).encode()


@pytest.mark.parametrize(("name", "whole"), [("said.csv", TABLE), ("said.json", DOCUMENT)])
@given(changes=st.lists(mutations(), min_size=1, max_size=4))
def test_a_spoiled_file_is_one_line(name: str, whole: bytes, changes: list[Mutation]) -> None:
    data = whole
    for change in changes:
        data = mutate(data, change)
    check(name, data)


@pytest.mark.parametrize("name", ["said.csv", "said.json"])
@given(data=st.binary(max_size=200))
def test_noise_is_one_line(name: str, data: bytes) -> None:
    check(name, data)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from([*dialogue_file.KEYS, "utterances", "file", "start", "end", "x"]), inner,
        max_size=4,
    ),
    max_leaves=12,
)  # fmt: skip


@given(value=json_values)
def test_any_json_is_one_line(value: object) -> None:
    check("said.json", json.dumps(value).encode())


def check(name: str, data: bytes) -> None:
    """Read a file; what comes out is sound, or one line that a terminal can show."""
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch).resolve() / "home"
        home.mkdir()
        path = home / name
        path.write_bytes(data)
        try:
            file = dialogue_file.read(path, repair=repair)
        except InputError as error:
            (line,) = str(error).splitlines()
            assert str(home) in line
            return
        assert file.dialogues
        for dialogue in file.dialogues:
            assert dialogue
            assert len({said.line.utterance for said in dialogue}) == len(dialogue)
            for said in dialogue:
                "".join((*said.line[:3], said.line.text or "")).encode()
                for clip in (said.audio, said.visual):
                    if clip is not None:
                        assert clip.path.is_relative_to(home)
                        assert clip.end is None or clip.end > (clip.start or 0.0)
