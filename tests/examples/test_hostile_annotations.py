"""Annotations that were damaged or made up: one line says what is wrong, and nothing leaks out.

``HYPOTHESIS_PROFILE=nightly`` tries 20,000 of them for each corpus.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.erc.check_report import manifest, summary
from examples.erc.errors import InputError
from tests.helpers.damage import Mutation, astray, audited, mutate, mutations

DRAWN = settings().max_examples
CHANGED = DRAWN if DRAWN >= 20_000 else min(DRAWN, 300)

MELD_HEADER = (
    "Sr No.,Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID,Season,Episode,"
    "StartTime,EndTime\n"
)
IEMOCAP_HEADER = "Utterance,Speaker,Dialogue_ID,Start_Time,End_Time,Wav_Path,Video_Path,Emotion\n"


def meld() -> dict[str, bytes]:
    table = MELD_HEADER + "".join(
        f'{row},"It\u0092s, well, {row}.",Speaker {row % 3},joy,positive,{row // 3},{row % 3},8,21,'
        f'"00:16:{row:02},059","00:16:{row + 1:02},731"\n'
        for row in range(7)
    )
    files = {f"{split}_sent_emo.csv": table.encode() for split in ("train", "dev", "test")}
    return files | {
        "train_splits/dia0_utt0.mp4": b"no film",
        "output_repeated_splits_test/final_videos_testdia0_utt1.mp4": b"",
    }


def iemocap_turns(dialogue: str) -> list[tuple[str, float, float, str]]:
    return [
        (
            f"{dialogue}_{'FM'[row % 2]}{row:03}",
            row + 0.25,
            row + 1.5,
            ("neu", "hap", "xxx")[row % 3],
        )
        for row in range(5)
    ]


def iemocap_texts() -> dict[str, bytes]:
    files = {}
    for dialogue in (
        "Ses01F_impro01", "Ses01M_impro01", "Ses02M_impro03", "Ses03F_impro04",
        "Ses04M_script01_1", "Ses05F_impro01",
    ):  # fmt: skip
        words, evaluation = ["M: Yes."], ["% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]"]
        for identity, start, end, label in iemocap_turns(dialogue):
            words.append(f"{identity} [{start:08.4f}-{end:08.4f}]: Well.")
            evaluation += [
                "",
                f"[{start:.4f} - {end:.4f}]\t{identity}\t{label}\t[2.5000, 2.5000, 2.5000]",
                "C-E2:\tNeutral;\t()",
            ]
        home = f"Session{int(dialogue[3:5])}/dialog"
        for folder, lines in (("transcriptions", words), ("EmoEvaluation", evaluation)):
            files[f"{home}/{folder}/{dialogue}.txt"] = "\n".join(lines).encode()
    return files


def iemocap_tables() -> dict[str, bytes]:
    files = {}
    for split, dialogue in (
        ("train", "Ses01F_impro01"), ("dev", "Ses01M_impro01"), ("test", "Ses05F_impro01"),
    ):  # fmt: skip
        table = IEMOCAP_HEADER + "".join(
            f"Well.,{identity},{dialogue},{start},{end},/etc/passwd,../../x.avi,hap\n"
            for identity, start, end, _ in iemocap_turns(dialogue)
        )
        files[f"IEMOCAP_{split}.csv"] = table.encode()
    wav = "Session1/sentences/wav/Ses01F_impro01/Ses01F_impro01_F000.wav"
    return files | iemocap_texts() | {wav: b"RIFF", "Session1/dialog/avi/DivX/x.avi": b"RIFF"}


CORPORA = {
    "meld": ("meld", meld()),
    "iemocap tables": ("iemocap", iemocap_tables()),
    "iemocap texts": ("iemocap", iemocap_texts()),
}

damaged = mutations(["remove", "folder", "link"])


def write(folder: Path, files: dict[str, bytes], changes: list[Mutation]) -> Path:
    """Write a corpus with its changes, beside a folder that nobody may look into."""
    root, outside = folder / "corpus", folder / "outside"
    outside.mkdir()
    (outside / "secret.mp4").write_bytes(b"secret")
    files, names = dict(files), list(files)
    special = {}
    for change in changes:
        name = names[change.file % len(names)]
        if change.action in ("remove", "folder", "link"):
            special[name] = change.action
        files[name] = mutate(files[name], change)
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if special.get(name) == "folder":
            path.mkdir()
        elif special.get(name) == "link":
            path.symlink_to(outside / "secret.mp4")
        elif special.get(name) != "remove":
            path.write_bytes(data)
    return root


@contextmanager
def scratch() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp())
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("corpus", CORPORA)
def test_the_corpora_are_read_as_they_are(corpus: str, tmp_path: Path) -> None:
    name, files = CORPORA[corpus]
    examination = import_module(f"examples.{name}.check").check(write(tmp_path, files, []))
    assert examination.status == 1
    assert {finding.kind for finding in examination.findings} >= {"count"}


def test_a_look_outside_would_be_noticed(tmp_path: Path) -> None:
    root = write(tmp_path, meld(), [])
    with audited() as paths:
        (root / "train_sent_emo.csv").read_bytes()
        assert not astray(paths, root)
        (root / "../outside/secret.mp4").resolve().read_bytes()
    assert astray(paths, root) == [str((tmp_path / "outside/secret.mp4").resolve())]


@pytest.mark.parametrize("corpus", CORPORA)
@settings(max_examples=CHANGED)
@given(changes=st.lists(damaged, min_size=1, max_size=4))
def test_any_damage_is_a_finding_or_one_line(corpus: str, changes: list[Mutation]) -> None:
    name, files = CORPORA[corpus]
    check = import_module(f"examples.{name}.check").check
    with scratch() as folder:
        root = write(folder, files, changes)
        with audited() as paths:
            try:
                examination = check(root)
            except InputError as error:
                examination = None
                (line,) = str(error).splitlines()
                assert str(root) in line
        assert not astray(paths, root)
        if examination is not None:
            text = summary(examination)
            assert text.isprintable() or {c for c in text if not c.isprintable()} <= {"\n"}
            assert json.loads(json.dumps(manifest(examination, root), allow_nan=False))
