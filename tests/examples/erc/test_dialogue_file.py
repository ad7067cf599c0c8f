import json
from pathlib import Path
from typing import Any

import pytest

from examples.erc.dialogue import Clip
from examples.erc.dialogue_file import DialogueFile, read
from examples.erc.errors import InputError
from examples.erc.source import Line
from examples.meld.corpus import repair


def table(folder: Path, text: str) -> Path:
    path = folder / "said.csv"
    path.write_text(text, encoding="utf-8")
    return path


def document(folder: Path, value: object) -> Path:
    path = folder / "said.json"
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def lines(file: DialogueFile) -> list[list[Line]]:
    return [[said.line for said in dialogue] for dialogue in file.dialogues]


def test_the_least_that_a_table_needs(tmp_path: Path) -> None:
    file = read(table(tmp_path, "Speaker,Utterance\nAda, Hi there. \nBo,\n"))
    assert lines(file) == [[Line("0", "0", "Ada", "Hi there."), Line("0", "1", "Bo", "")]]
    assert [(said.audio, said.visual) for said in file.dialogues[0]] == [(None, None)] * 2
    assert file.ignored == ()


def test_a_table_of_meld_is_read_as_it_is(tmp_path: Path) -> None:
    text = (
        "Sr No.,Utterance,Speaker,Emotion,Dialogue_ID,Utterance_ID,StartTime\n"
        '1,"It\u0092s, well.",Ada,joy,7,0,"00:16:16,059"\n'
        "2,No.,Bo,anger,3,0,0\n"
        "3,Yes.,Bo,anger,7,2,0\n"
    )
    file = read(table(tmp_path, text), repair=repair)
    assert lines(file) == [
        [Line("7", "0", "Ada", "It\u2019s, well."), Line("7", "2", "Bo", "Yes.")],
        [Line("3", "0", "Bo", "No.")],
    ]
    assert file.ignored == ("Sr No.", "Emotion", "StartTime")


def test_files_of_a_table(tmp_path: Path) -> None:
    text = (
        "Speaker,Utterance,Clip,Clip_Start,Clip_End,Audio,Video,Video_End,Side\n"
        "Ada,Hi.,a.mp4,1.5,2,,,,left\n"
        "Ada,Hi.,a.mp4,,,b.wav,,,\n"
        "Ada,Hi.,,,,b.wav,films/c.avi,4,right\n"
    )
    first, second, third = read(table(tmp_path, text)).dialogues[0]
    home = tmp_path.resolve()
    both = Clip(home / "a.mp4", 1.5, 2.0, "left")
    assert (first.audio, first.visual) == (both, both)
    assert (second.audio, second.visual) == (Clip(home / "b.wav"), Clip(home / "a.mp4"))
    assert (third.audio, third.visual) == (
        Clip(home / "b.wav"),
        Clip(home / "films" / "c.avi", None, 4.0, "right"),
    )


def test_json_of_one_dialogue(tmp_path: Path) -> None:
    said = [
        {"speaker": "Ada", "text": "Hi.", "clip": "a.mp4", "mood": "glad"},
        {"speaker": "Bo", "audio": {"file": "b.wav", "start": 1, "end": 2.5}, "id": 12},
    ]
    file = read(document(tmp_path, said))
    assert lines(file) == [[Line("0", "0", "Ada", "Hi."), Line("0", "12", "Bo", "")]]
    home = tmp_path.resolve()
    assert file.dialogues[0][0].visual == Clip(home / "a.mp4")
    assert file.dialogues[0][1].audio == Clip(home / "b.wav", 1.0, 2.5)
    assert file.dialogues[0][1].visual is None
    assert file.ignored == ("mood",)


def test_json_of_several_dialogues(tmp_path: Path) -> None:
    said = [
        {"id": "one", "utterances": [{"speaker": "Ada", "text": "Hi."}]},
        {"utterances": [{"speaker": "Bo", "text": "No."}]},
    ]
    assert lines(read(document(tmp_path, said))) == [
        [Line("one", "0", "Ada", "Hi.")],
        [Line("1", "0", "Bo", "No.")],
    ]


def test_places_are_relative_to_the_folder_of_clips(tmp_path: Path) -> None:
    clips = tmp_path / "clips"
    clips.mkdir()
    inside = clips / "b.mp4"
    text = f"Speaker,Utterance,Clip\nAda,Hi.,a.mp4\nAda,Hi.,{inside}\n"
    file = read(table(tmp_path, text), clips)
    found = [said.visual and said.visual.path for said in file.dialogues[0]]
    assert found == [clips.resolve() / "a.mp4", inside.resolve()]


@pytest.mark.parametrize("place", ["../secret.mp4", "/etc/passwd", "a/../../secret.mp4", "link/x"])
def test_nothing_outside_the_folder_is_named(tmp_path: Path, place: str) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "link").symlink_to(tmp_path)
    with pytest.raises(InputError, match=r"line 2: .*expected a file under .*--clips names"):
        read(table(home, f"Speaker,Utterance,Clip\nAda,Hi.,{place}\n"))
    with pytest.raises(InputError, match=r"utterance 0: .*expected a file under .*--clips names"):
        read(document(home, [{"speaker": "Ada", "text": "Hi.", "clip": place}]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Speaker,Text\nAda,Hi.\n", "expected one column 'Utterance'"),
        ("Speaker,Utterance\n", "expected at least one utterance"),
        ("Speaker,Utterance\n ,Hi.\n", "line 2, column 'Speaker': expected some text"),
        ("Speaker,Utterance,Clip,Clip\nA,B,c,d\n", "expected one column 'Clip', got it twice"),
        ("Speaker,Utterance,Clip,Clip_Start\nA,B,c,-1\n", "'Clip_Start': expected a finite"),
        ("Speaker,Utterance,Clip,Clip_Start\nA,B,,1\n", "expected no time without a file in Clip"),
        (
            "Speaker,Utterance,Clip,Clip_Start,Clip_End\nA,B,c,2,2\n",
            "to end after its start at 2 s",
        ),
        ("Speaker,Utterance,Clip,Clip_End\nA,B,c,0\n", "to end after its start at 0 s, got 0 s"),
        ("Speaker,Utterance,Side\nA,B,middle\n", "column 'Side': expected left, right or nothing"),
        ("Speaker,Utterance,Utterance_ID\nA,B,1\nA,B,1\n", "got '1' twice"),
        (f"Speaker,Utterance,Clip\nA,B,{'x' * 5000}\n", "expected the path of a file"),
    ],
)
def test_faults_of_a_table(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        read(table(tmp_path, text))
    assert message in str(caught.value)
    assert "said.csv" in str(caught.value)


GOOD: dict[str, Any] = {"speaker": "Ada", "text": "Hi."}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "expected a list of utterances, or of dialogues, got '{}'"),
        ([], "expected a list of utterances, or of dialogues"),
        (["Hi."], "utterance 0: expected an object with speaker and text"),
        ([{"text": "Hi."}], "got the keys 'text'; say who speaks"),
        ([{}], "say who speaks"),
        ([{"speaker": "", "text": "Hi."}], "utterance 0, speaker: expected some text"),
        ([{**GOOD, "text": 3}], "utterance 0, text: expected text, got '3'"),
        ([{**GOOD, "text": "\ud800"}], "utterance 0, text: expected text"),
        ([{**GOOD, "text": "a\0b"}], "utterance 0, text: expected text"),
        ([{**GOOD, "clip": 3}], "utterance 0, clip: expected a path, or an object with file"),
        ([{**GOOD, "clip": {"file": "a", "begin": 3}}], "expected a path, or an object with file"),
        ([{**GOOD, "clip": {"file": "a", "start": -1}}], "clip, start: expected a finite number"),
        ([{**GOOD, "clip": {"file": "a", "end": True}}], "clip, end: expected a finite number"),
        ([{**GOOD, "clip": {"file": "a", "end": 10**400}}], "clip, end: expected a finite number"),
        ([{**GOOD, "clip": {"file": "a", "end": float("nan")}}], "clip, end: expected a finite"),
        ([{**GOOD, "audio": {"file": "a", "start": 2, "end": 1}}], "the audio to end after its"),
        ([{**GOOD, "side": "up"}], "utterance 0, side: expected left or right"),
        ([{**GOOD, "id": "a"}, {**GOOD, "id": "a"}], "got 'a' twice"),
        ([{**GOOD, "id": True}], "utterance 0, id: expected text"),
        ([{"utterances": []}], "dialogue 0, utterances: expected a list of utterances"),
        ([{"utterances": [GOOD]}, {"id": "0", "utterances": [GOOD]}], "that no other dialogue has"),
        ([{"utterances": [GOOD]}, GOOD], "utterance 0: expected an object with speaker"),
    ],
)
def test_faults_of_json(tmp_path: Path, value: object, message: str) -> None:
    with pytest.raises(InputError) as caught:
        read(document(tmp_path, value))
    assert message in str(caught.value)
    assert "said.json" in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"[", b"\xff", b"[" * 100_000, b"nothing", b"9" * 5000])
def test_what_is_no_json(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "said.json"
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"said\.json: expected "):
        read(path)


def test_places_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="got a folder; only runs that were trained on extracted"):
        read(tmp_path)
    with pytest.raises(InputError, match=r"expected a CSV table, got an error"):
        read(tmp_path / "nowhere.csv")
    with pytest.raises(InputError, match="--clips: expected a folder"):
        read(table(tmp_path, "Speaker,Utterance\nA,B\n"), tmp_path / "nowhere")


def test_a_file_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("examples.erc.dialogue_file.MOST_ROWS", 2)
    with pytest.raises(InputError, match="expected at most 2 utterances, got 3"):
        read(table(tmp_path, "Speaker,Utterance\nA,B\nA,B\nA,B\n"))
