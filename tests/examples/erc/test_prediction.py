"""Predictions against what the run itself computed for the same utterances: to the bit."""

import csv
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from examples.erc import artifacts, encoding, finished
from examples.erc.command import make_command
from examples.erc.dialogue import Corpus, Dialogue
from examples.erc.features import FeatureSource
from examples.erc.finished import FinishedRun
from examples.erc.pipeline import run
from examples.erc.recipe import Recipe
from examples.erc.source import Source
from examples.erc.systems import TEACHER, System, methods
from examples.erc.training import Hardware
from examples.synthetic.script import Size
from examples.synthetic.source import SyntheticSource
from tests.examples.conftest import make_features, write_files

Write = Callable[..., Path]

SIZE = Size(train=9, dev=4, test=14)
EVERYTHING = System(("text", "audio", "visual"), "response+feature", "shifting")
COLUMNS = (
    "Dialogue_ID", "Utterance_ID", "Speaker", "Utterance", "Audio", "Video", "Video_Start",
    "Video_End",
)  # fmt: skip


@dataclass(frozen=True)
class Raw:
    """A run on a small synthetic corpus, and the dialogues of its test split."""

    name: str
    folder: Path
    root: Path
    test: tuple[Dialogue, ...]

    def stored(self, system: System) -> list[list[float]]:
        """What the run says about its test split, as probabilities."""
        folder = self.folder / "seed-0" / system.key.replace("/", "-")
        logits = load_file(folder / "outputs.safetensors")["test.logits"]
        probabilities: list[list[float]] = logits.softmax(dim=1).tolist()
        return probabilities


def train(source: Source, name: str, folder: Path, hardware: Hardware | None = None) -> None:
    recipe: Recipe = import_module(f"examples.{name}.recipes").RELEASED
    stages = {}
    for phase in ("teacher", "student", "fusion"):
        own = source.optimisation(phase)  # type: ignore[arg-type]
        assert own is not None
        brief = replace(own, epochs=1, batch_size=4)
        stages[phase] = replace(getattr(recipe, phase), optimisation=brief)
    run(source, replace(recipe, **stages), (0,), folder, hardware or Hardware("cpu"), "the command")


@pytest.fixture(scope="module", params=["meld", "iemocap"])
def raw(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Raw:
    name: str = request.param
    folder = tmp_path_factory.mktemp(name)
    modalities = ("text", "audio", "visual")
    train(SyntheticSource(name, name.upper(), folder, modalities, 0, SIZE), name, folder)
    (root,) = (folder / "corpus").iterdir()
    corpus: Corpus = import_module(f"examples.{name}.corpus").read(root)
    return Raw(name, folder, root, corpus.splits["test"])


def call(name: str, *words: str | Path) -> Result:
    return CliRunner().invoke(make_command(name, name.upper()), [str(word) for word in words])


def rows_of(dialogues: tuple[Dialogue, ...], root: Path) -> list[dict[str, object]]:
    rows = []
    for dialogue in dialogues:
        for said in dialogue.utterances:
            row: dict[str, object] = {
                "Dialogue_ID": dialogue.identity,
                "Utterance_ID": said.identity,
                "Speaker": said.name,
                "Utterance": said.text,
            }
            if said.audio:
                row["Audio"] = said.audio.path.relative_to(root)
            if said.visual:
                row["Video"] = said.visual.path.relative_to(root)
                row["Video_Start"] = said.visual.start
                row["Video_End"] = said.visual.end
            rows.append(row)
    return rows


def write_csv(path: Path, rows: list[dict[str, object]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return path


def predict(raw: Raw, path: Path, *words: str | Path) -> list[dict[str, Any]]:
    """Predict by the command; every utterance as the JSON has it."""
    folder = path.parent / "out"
    options = ("--output", folder, "--clips", raw.root, "--device", "cpu")
    result = call(raw.name, "predict", raw.folder, path, *options, *words)
    assert result.exit_code == 0, result.stderr
    document = json.loads((folder / "predictions.json").read_text(encoding="utf-8"))
    return [said for dialogue in document["dialogues"] for said in dialogue["utterances"]]


def values(said: dict[str, Any], system: System) -> list[float]:
    return list(said["probabilities"][system.key].values())


@pytest.mark.parametrize("which", [slice(None), slice(1, 2), slice(0, 1)])
def test_a_dialogue_of_the_corpus_gets_the_answers_of_the_run_to_the_bit(
    raw: Raw, which: slice, tmp_path: Path
) -> None:
    chosen = raw.test[which]
    assert chosen
    before = sum(len(dialogue.utterances) for dialogue in raw.test[: which.start or 0])
    path = write_csv(tmp_path / "said.csv", rows_of(chosen, raw.root))
    answers = predict(raw, path)
    assert len(answers) == sum(len(dialogue.utterances) for dialogue in chosen)
    systems = methods(("text", "audio", "visual"))
    for number, said in enumerate(answers):
        assert said["system"] == EVERYTHING.key
        assert {*said["probabilities"]} == {system.key for system in systems}
        for system in systems:
            assert values(said, system) == raw.stored(system)[before + number]


def test_words_alone_are_answered_by_the_teacher(raw: Raw, tmp_path: Path) -> None:
    said = [{"speaker": said.name, "text": said.text} for said in raw.test[0].utterances]
    path = tmp_path / "said.json"
    path.write_text(json.dumps(said), encoding="utf-8")
    answers = predict(raw, path)
    assert [each["system"] for each in answers] == ["text"] * len(said)
    assert [values(each, TEACHER) for each in answers] == raw.stored(TEACHER)[: len(said)]
    assert not (tmp_path / "out" / "ledger.json").exists()


def test_each_utterance_is_answered_by_what_it_has(raw: Raw, tmp_path: Path) -> None:
    rows = rows_of(raw.test[:1], raw.root)
    assert len(rows) >= 3
    del rows[0]["Audio"]
    for column in ("Audio", "Video", "Video_Start", "Video_End"):
        del rows[1][column]
    answers = predict(raw, write_csv(tmp_path / "said.csv", rows))
    fused = System(("text", "visual"), "response+feature", "shifting")
    assert [said["system"] for said in answers[:3]] == [fused.key, "text", EVERYTHING.key]
    assert [said["present"] for said in answers[:2]] == [["text", "visual"], ["text"]]
    assert values(answers[0], fused) == raw.stored(fused)[0]
    assert values(answers[1], TEACHER) == raw.stored(TEACHER)[1]
    assert values(answers[2], EVERYTHING) == raw.stored(EVERYTHING)[2]
    assert {*answers[1]["probabilities"]} == {"text"}
    ledger = json.loads((tmp_path / "out" / "ledger.json").read_text(encoding="utf-8"))
    for place in ledger["clips"]:
        assert place["rows"] == len(rows) == place["used"] + place["quarantined"]


@pytest.mark.parametrize("modality", ["audio", "visual"])
def test_a_student_answers_alone(raw: Raw, modality: str, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "said.csv", rows_of(raw.test[:1], raw.root))
    answers = predict(raw, path, "--modalities", modality)
    student = System((modality,), "response+feature")
    for row, said in enumerate(answers):
        assert (said["system"], {*said["probabilities"]}) == (student.key, {student.key})
        assert values(said, student) == raw.stored(student)[row]


def test_of_two_students_the_better_on_dev_answers(raw: Raw, tmp_path: Path) -> None:
    rows = rows_of(raw.test[:1], raw.root)
    for row in rows:
        row["Utterance"] = ""  # nobody wrote it down
    answers = predict(raw, write_csv(tmp_path / "said.csv", rows), "--modalities", "visual,audio")
    opened = FinishedRun(raw.folder, raw.name)
    students = [System((modality,), "response+feature") for modality in ("audio", "visual")]
    best = max(students, key=lambda each: finished.dev_score(opened.stages[each].record))
    assert {said["system"] for said in answers} == {best.key}
    assert {*answers[0]["probabilities"]} == {student.key for student in students}


@pytest.fixture
def broken(raw: Raw, tmp_path: Path) -> Path:
    """The first dialogue with its files beside it, the second one's sound in pieces."""
    rows = rows_of(raw.test[:1], raw.root)
    for number, row in enumerate(rows):
        source = raw.root / str(row["Audio"])
        target = tmp_path / f"sound-{number}{source.suffix}"
        shutil.copyfile(source, target)
        row |= {"Audio": target.name, "Video": "", "Video_Start": "", "Video_End": ""}
    (tmp_path / str(rows[1]["Audio"])).write_bytes(b"no sound")
    return write_csv(tmp_path / "said.csv", rows)


def test_a_broken_clip_costs_its_own_modality_of_its_own_row(raw: Raw, broken: Path) -> None:
    answers = predict(raw, broken, "--clips", broken.parent)
    fused = System(("text", "audio"), "response+feature", "shifting")
    assert [said["system"] for said in answers[:3]] == [fused.key, "text", fused.key]
    assert answers[1]["faults"]["audio"].startswith("broken: ")
    assert answers[0]["faults"] == {}
    assert values(answers[2], fused) == raw.stored(fused)[2]


def test_a_broken_clip_can_be_left_out(raw: Raw, broken: Path) -> None:
    whole = predict(raw, broken, "--clips", broken.parent)
    rest = predict(raw, broken, "--clips", broken.parent, "--bad-clips", "skip")
    assert rest == [whole[0], *whole[2:]]


def test_a_broken_clip_can_be_refused(raw: Raw, broken: Path) -> None:
    options = ("--bad-clips", "fail", "--output", broken.parent / "out")
    result = call(raw.name, "predict", raw.folder, broken, *options)
    assert result.exit_code == 2
    assert "utterance" in result.stderr.splitlines()[-1]
    assert "mend it, or mask or skip bad clips" in result.stderr
    assert not (broken.parent / "out" / "predictions.json").exists()


def test_files_that_are_all_missing_are_found_before_any_work(raw: Raw, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "said.csv", rows_of(raw.test[:1], raw.root))
    result = call(raw.name, "predict", raw.folder, path, "--output", tmp_path / "out")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "give the folder that they are relative to with --clips" in result.stderr
    assert not (tmp_path / "out").exists()


def test_the_run_folder_is_enough(raw: Raw, tmp_path: Path) -> None:
    """Elsewhere, without its corpus and without the encoders that it began with."""
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(
        raw.folder, elsewhere, ignore=shutil.ignore_patterns("corpus", "encoders", "clips")
    )
    path = write_csv(tmp_path / "said.csv", rows_of(raw.test[:1], raw.root))
    answers = predict(replace(raw, folder=elsewhere), path, "--clips", raw.root)
    assert [values(said, EVERYTHING) for said in answers] == raw.stored(EVERYTHING)[: len(answers)]


def test_a_cache_is_used_again(raw: Raw, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "said.csv", rows_of(raw.test[:1], raw.root))
    once = predict(raw, path, "--cache", tmp_path / "cache")
    shards = {shard: shard.stat().st_mtime_ns for shard in (tmp_path / "cache").glob("*.safe*")}
    assert len(shards) == 2
    assert predict(raw, path, "--cache", tmp_path / "cache") == once
    assert {shard: shard.stat().st_mtime_ns for shard in shards} == shards


def test_too_many_speakers_are_refused(raw: Raw, tmp_path: Path) -> None:
    rows = [{"Speaker": f"s{number}", "Utterance": "Well."} for number in range(12)]
    result = call(raw.name, "predict", raw.folder, write_csv(tmp_path / "said.csv", list(rows)))
    assert result.exit_code == 2
    assert "got 12; give the same name" in result.stderr


def test_blank_words_are_refused_where_words_are_used(raw: Raw, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"Speaker": "Ada", "Utterance": " "}]
    result = call(raw.name, "predict", raw.folder, write_csv(tmp_path / "said.csv", rows))
    assert result.exit_code == 2
    assert "dialogue 0, utterance 0: expected words, got none" in result.stderr


def test_the_table_says_who_answers(raw: Raw, tmp_path: Path) -> None:
    path = tmp_path / "said.csv"
    path.write_text("Speaker,Utterance,Mood\nAda,Well \x1b[2J then.,bad\n", encoding="utf-8")
    result = call(raw.name, "predict", raw.folder, path, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert "Well [2J then." in result.stdout
    assert "\x1b" not in result.stdout
    assert "  Text teacher, dev " in result.stdout
    assert ": 1 utterance\n" in result.stdout
    assert "not looked at: 'Mood'" in result.stderr
    names = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert names == ["dialogue-1-0.png", "predictions.csv", "predictions.json"]
    table = (tmp_path / "out" / "predictions.csv").read_text(encoding="utf-8")
    (row,) = csv.DictReader(table.splitlines())
    assert (row["text"], row["present"], row["system"]) == ("Well \x1b[2J then.", "text", "text")
    assert row["audio_emotion"] == ""


# Runs on features.


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on features, and the features beside it."""
    home = tmp_path_factory.mktemp("features")
    write_files(home / "features", make_features())
    train(FeatureSource(home / "features", "meld"), "meld", home / "run")
    return home


@pytest.fixture
def features(trained: Path, tmp_path: Path) -> Path:
    """The folder of a run on features, which stand beside it; both may be changed."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    return tmp_path / "run"


def cut(
    source: Path, target: Path, dialogue: int, spoil: Callable[..., object] | None = None
) -> Path:
    """Write a folder with one dialogue of another, without labels."""
    arrays = dict(np.load(source / "features.npz"))
    meta = json.loads((source / "meta.json").read_text(encoding="utf-8"))
    entry = meta["dialogues"][dialogue]
    rows = slice(entry["start"], entry["start"] + entry["length"])
    kept = {name: held[rows] for name, held in arrays.items() if name not in ("label", "split")}
    kept["dialogue"] = np.zeros(entry["length"], np.int16)
    document = {"dataset": "MELD", "dialogues": [{**entry, "start": 0}]}
    if spoil is not None:
        spoil(kept, document)
    target.mkdir()
    np.savez(target / "features.npz", **kept)
    (target / "meta.json").write_text(json.dumps(document), encoding="utf-8")
    return target


def predict_features(folder: Path, dialogue: Path, *words: str | Path) -> list[dict[str, Any]]:
    out = dialogue.parent / "out"
    result = call("meld", "predict", folder, dialogue, "--output", out, "--device", "cpu", *words)
    assert result.exit_code == 0, result.stderr
    (found,) = json.loads((out / "predictions.json").read_text())["dialogues"]
    return list(found["utterances"])


def test_features_of_a_dialogue_get_the_answers_of_the_run_to_the_bit(
    features: Path, tmp_path: Path
) -> None:
    # The third of the test split, after 8 and 3 rows, in batches of four.
    answers = predict_features(features, cut(tmp_path / "features", tmp_path / "one", 9))
    assert len(answers) == 10
    for system in methods(("text", "audio", "visual")):
        stored = Raw("meld", features, features, ()).stored(system)[11:]
        assert [values(said, system) for said in answers] == stored


@pytest.fixture
def any_precision() -> Iterator[None]:
    """Accelerate holds on to the first precision that it is told."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("any_precision")
def test_mixed_precision_is_that_of_the_run(write_features: Write, tmp_path: Path) -> None:
    source = FeatureSource(write_features(), "meld", ("text", "audio"))
    train(source, "meld", tmp_path / "run", Hardware("cpu", "bf16"))
    AcceleratorState._reset_state(reset_partial_state=True)
    answers = predict_features(tmp_path / "run", cut(tmp_path / "features", tmp_path / "one", 9))
    run = Raw("meld", tmp_path / "run", tmp_path, ())
    for system in methods(("text", "audio")):
        assert [values(said, system) for said in answers] == run.stored(system)[11:]


def test_masked_features_are_a_modality_that_is_not_there(features: Path, tmp_path: Path) -> None:
    def mask(arrays: dict[str, Any], meta: dict[str, Any]) -> None:
        arrays["audio_mask"] = np.arange(len(arrays["speaker"])) != 2

    answers = predict_features(features, cut(tmp_path / "features", tmp_path / "one", 9, mask))
    fused = System(("text", "visual"), "response+feature", "shifting")
    assert answers[2]["system"] == fused.key
    assert values(answers[2], fused) == Raw("meld", features, features, ()).stored(fused)[13]
    assert answers[1]["system"] == EVERYTHING.key


def test_a_modality_without_arrays_is_done_without(features: Path, tmp_path: Path) -> None:
    def drop(arrays: dict[str, Any], meta: dict[str, Any]) -> None:
        del arrays["audio_voice"], arrays["audio_pitch"]

    folder = cut(tmp_path / "features", tmp_path / "one", 9, drop)
    answers = predict_features(features, folder)
    assert {said["system"] for said in answers} == {"text+visual/shifting/response+feature"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arrays, meta: arrays.pop("audio_pitch"), "audio_pitch: expected 2 columns"),
        (
            lambda arrays, meta: arrays.update(audio_pitch=arrays["audio_voice"]),
            "audio_pitch: expected 2 columns, as those that the run was trained on, got 4 columns",
        ),
        (lambda arrays, meta: meta.update(dataset="IEMOCAP"), "expected the dataset meld"),
        (lambda arrays, meta: arrays.pop("speaker"), "got none called speaker"),
        (lambda arrays, meta: arrays["text_sentence"].fill(np.nan), "expected finite numbers"),
        (
            lambda arrays, meta: arrays["text_sentence"].fill(3e38),
            "expected features of a usual size",
        ),
        (
            lambda arrays, meta: [arrays.pop(name) for name in [*arrays] if "_" in name],
            "text: text_sentence [6]; audio: audio_pitch [2], audio_voice [4]; visual: ",
        ),
    ],
)
def test_features_that_do_not_fit_are_refused(
    features: Path, tmp_path: Path, change: Callable[..., object], message: str
) -> None:
    folder = cut(tmp_path / "features", tmp_path / "one", 9, change)
    result = call("meld", "predict", features, folder, "--output", tmp_path / "out")
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["predict", "mistakes"])
def test_an_output_that_is_a_file_is_found_before_any_work(
    features: Path, tmp_path: Path, command: str
) -> None:
    (tmp_path / "file").touch()
    words = [command, features, *([tmp_path / "features"] if command == "predict" else [])]
    result = call("meld", *words, "--output", tmp_path / "file" / "in it")
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"--output: expected a folder, got the file {tmp_path / 'file'}" in result.stderr


def test_a_run_on_text_alone_has_a_teacher_and_its_mistakes(
    write_features: Write, tmp_path: Path
) -> None:
    train(FeatureSource(write_features(), "meld", ("text",)), "meld", tmp_path / "run")
    answers = predict_features(tmp_path / "run", cut(tmp_path / "features", tmp_path / "one", 9))
    assert {said["system"] for said in answers} == {"text"}
    result = call("meld", "mistakes", tmp_path / "run")
    assert result.exit_code == 0, result.stderr
    assert "\nText teacher: " in result.stdout


@pytest.mark.parametrize("text", ["Speaker,Utterance\nAda,Well.\n", None])
def test_a_run_on_features_says_what_it_needs(
    features: Path, tmp_path: Path, text: str | None
) -> None:
    path = tmp_path / "said.csv"
    if text:
        path.write_text(text, encoding="utf-8")
    result = call("meld", "predict", features, path)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert "text: text_sentence [6]; audio: audio_pitch [2], audio_voice [4]" in line
    assert "train with --raw to predict from texts and clips" in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--modalities", "smell"], "--modalities: expected some of text, audio, visual"),
        (["--seed", "7"], "--seed: expected one of 0, which"),
        (["--clips", "."], "--clips: expected only with a run on clips"),
        (["--bad-clips", "skip"], "--bad-clips: expected only with a run on clips"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    features: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    result = call("meld", "predict", features, tmp_path / "features", *words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


def test_a_modality_that_the_run_lacks_is_refused(write_features: Write, tmp_path: Path) -> None:
    train(FeatureSource(write_features(), "meld", ("text", "audio")), "meld", tmp_path / "run")
    words = ("predict", tmp_path / "run", tmp_path / "features", "--modalities", "text,visual")
    result = call("meld", *words)
    assert result.exit_code == 2
    assert "expected some of text, audio, which" in result.stderr


# Runs that are not what they seem.


def spoil_weights(folder: Path) -> None:
    path = folder / "seed-0" / "audio-response+feature" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def swap_teachers(folder: Path) -> None:
    """A teacher that is whole, but not the one that the others were made with."""
    stage = folder / "seed-0" / "text" / "stage.json"
    document = artifacts.read_record(stage)
    document["settings"]["seed"] = 5
    document["fingerprint"] = artifacts.sha256(
        artifacts.canonical({"format": artifacts.FORMAT, **document["settings"]})
    )
    artifacts.write_record(stage, document)


def begin_anew(folder: Path) -> None:
    """The same folder, with other features, and not at its end yet."""
    record = artifacts.read_record(folder / "encoding" / "encoding.json")
    artifacts.write_record(folder / "encoding" / "encoding.json", {**record, "command": "other"})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "expected the folder of a run"),
        (lambda folder: shutil.rmtree(folder / "encoding"), "expected the folder of a run"),
        (lambda folder: (folder / "encoding/encoding.json").write_text("{}"), "is damaged"),
        (lambda folder: (folder / "encoding/scales.safetensors").unlink(), "is missing"),
        (lambda folder: shutil.rmtree(folder / "seed-0"), "without the stage seed-0/text+audio+"),
        (lambda folder: (folder / "finished.json").unlink(), "without finished.json; run 'the com"),
        (lambda folder: (folder / "finished.json").write_text("[]"), "but finished.json is damag"),
        (begin_anew, "without a finished.json of its own; run 'other' again"),
        (
            lambda folder: (folder / "seed-0/text/stage.json").unlink(),
            "without the stage seed-0/text that it made",
        ),
        (spoil_weights, "but model.safetensors is damaged"),
        (swap_teachers, "without the stage seed-0/text that it made"),
    ],
)
def test_a_run_that_is_not_whole_is_refused(
    features: Path, tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    spoil(features)
    result = call("meld", "predict", features, tmp_path / "features", "--output", tmp_path / "out")
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert message in line
    assert not (tmp_path / "out").exists()


def test_a_run_on_the_other_corpus_is_refused(features: Path, tmp_path: Path) -> None:
    result = call("iemocap", "predict", features, tmp_path / "features")
    assert result.exit_code == 2
    assert "got one on meld; use python -m examples.meld" in result.stderr


def test_the_seed_that_is_best_on_dev_is_taken(write_features: Write, tmp_path: Path) -> None:
    source = FeatureSource(write_features(), "meld", ("text", "audio"))
    recipe: Recipe = import_module("examples.meld.recipes").RELEASED
    stages = {
        phase: replace(
            getattr(recipe, phase),
            optimisation=replace(source.optimisation(phase), epochs=2),  # type: ignore[arg-type, type-var]
        )
        for phase in ("teacher", "student", "fusion")
    }
    folder = tmp_path / "run"
    results = run(source, replace(recipe, **stages), (0, 1, 2), folder, Hardware("cpu"), "command")
    systems: Any = results["systems"]
    (runs,) = (
        each["runs"] for each in systems if each["key"] == "text+audio/shifting/response+feature"
    )
    best = max(runs, key=lambda once: once["dev"]["weighted_f1"])["seed"]
    assert FinishedRun(folder, "meld").seed == best
    assert FinishedRun(folder, "meld", 2).seed == 2


def test_what_is_kept_appears_whole(features: Path, tmp_path: Path) -> None:
    record = encoding.read(features, "meld")
    assert record["threads"] == torch.get_num_threads()
    assert record["modalities"] == ["text", "audio", "visual"]
    assert not list(features.glob(".encoding*"))
