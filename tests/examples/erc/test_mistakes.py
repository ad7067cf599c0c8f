import csv
import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from examples.erc.command import make_command
from examples.erc.dialogue import Corpus, Dialogue, Utterance
from examples.erc.errors import InputError
from examples.erc.features import FeatureSource
from examples.erc.finished import FinishedRun
from examples.erc.mistakes import Analysis, analyse, text
from examples.erc.pipeline import run
from examples.erc.recipe import Recipe
from examples.erc.report import write
from examples.erc.training import Hardware
from tests.examples.conftest import make_features, write_files

LABELS = ("glad", "sad", "calm")
KEYS = [
    "text", "audio/response+feature", "visual/response+feature",
    "text+audio+visual/shifting/response+feature",
]  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two seeds, its results, and its features beside it."""
    home = tmp_path_factory.mktemp("mistakes")
    write_files(home / "features", make_features())
    source = FeatureSource(home / "features", "meld")
    recipe: Recipe = import_module("examples.meld.recipes").RELEASED
    stages: dict[str, Any] = {}
    for phase in ("teacher", "student", "fusion"):
        own = source.optimisation(phase)  # type: ignore[arg-type]
        assert own is not None
        stages[phase] = replace(getattr(recipe, phase), optimisation=replace(own, epochs=2))
    results = run(
        source, replace(recipe, **stages), (0, 1), home / "run", Hardware("cpu"), "the command"
    )
    (home / "results.json").write_text(json.dumps(results))
    return home


@pytest.fixture(scope="module")
def analysis(home: Path) -> Analysis:
    return analyse(FinishedRun(home / "run", "meld", 0))


@pytest.mark.parametrize("split", ["dev", "test"])
def test_every_mistake_is_there_and_the_most_confident_first(home: Path, split: str) -> None:
    found = analyse(FinishedRun(home / "run", "meld", 1), split)
    source = FeatureSource(home / "features", "meld")
    truth = source.targets(split).tolist()
    assert [record.key for record in found.records] == KEYS
    assert [record.name for record in found.records] == ["text", "audio", "visual", "fusion"]
    for record in found.records:
        path = home / "run/seed-1" / record.key.replace("/", "-") / "outputs.safetensors"
        probabilities = load_file(path)[f"{split}.logits"].softmax(dim=1)
        expected = {
            (f"d{line.dialogue[1:]}", line.utterance): (
                LABELS[label], LABELS[int(row.argmax())], float(row.max()), float(row[label]),
            )
            for line, label, row in zip(source.lines(split), truth, probabilities, strict=True)
            if int(row.argmax()) != label
        }  # fmt: skip
        got = {
            (each.line.dialogue, each.line.utterance): (
                each.truth, each.said.emotion, each.said.probability, each.truth_probability,
            )
            for each in record.mistakes
        }  # fmt: skip
        assert got == expected
        confidence = [each.said.probability for each in record.mistakes]
        assert confidence == sorted(confidence, reverse=True)
        counted = Counter((true, said) for true, said, *_ in expected.values())
        assert {(pair.truth, pair.said): pair.count for pair in record.pairs} == counted
        for pair in record.pairs:
            assert pair.share == pair.count / truth.count(LABELS.index(pair.truth))


def test_what_the_others_say_is_beside_it(home: Path, analysis: Analysis) -> None:
    by_key = {record.key: record for record in analysis.records}
    wrong = {
        key: {(each.line.dialogue, each.line.utterance): each for each in record.mistakes}
        for key, record in by_key.items()
    }
    for key, record in by_key.items():
        for mistake in record.mistakes:
            assert {*mistake.others} == {*KEYS} - {key}
            for other, opinion in mistake.others.items():
                twin = wrong[other].get((mistake.line.dialogue, mistake.line.utterance))
                assert (opinion.emotion != mistake.truth) == (twin is not None)
                if twin is not None:
                    assert opinion == twin.said


def call(*words: str | Path) -> Result:
    return CliRunner().invoke(make_command("meld", "MELD"), [str(word) for word in words])


def test_the_command_prints_and_leaves_all(home: Path, analysis: Analysis, tmp_path: Path) -> None:
    result = call("mistakes", home / "run", "--seed", "0", "--top", "1", "--output", tmp_path)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith(text(analysis, 1))
    assert result.stdout.rstrip().endswith(str(tmp_path / "mistakes.json"))
    rows = list(csv.DictReader((tmp_path / "mistakes.csv").read_text("utf-8").splitlines()))
    document = json.loads((tmp_path / "mistakes.json").read_text("utf-8"))
    for record, system in zip(analysis.records, document["systems"], strict=True):
        own = [row for row in rows if row["system"] == record.key]
        assert [int(row["rank"]) for row in own] == list(range(1, len(record.mistakes) + 1))
        for mistake, row, entry in zip(record.mistakes, own, system["mistakes"], strict=True):
            assert float(row["probability"]) == entry["probability"] == mistake.said.probability
            assert row[f"{record.name}_predicted"] == entry["predicted"] == mistake.said.emotion
            assert row["text"] == ""
            assert entry["text"] is None
    titles = [line for line in result.stdout.splitlines() if line.endswith(" wrong")]
    assert len(titles) == 4


def annotated(home: Path, change: Callable[[list[int]], object] = lambda labels: None) -> Corpus:
    source = FeatureSource(home / "features", "meld")
    splits = {}
    for split in ("train", "dev", "test"):
        labels = source.targets(split).tolist()
        if split == "test":
            change(labels)
        dialogues: dict[str, list[Utterance]] = {}
        for row, (line, label) in enumerate(zip(source.lines(split), labels, strict=False)):
            said = Utterance(f"{row}", f"word {row}", 0, label, None, None, "Eve")
            dialogues.setdefault(line.dialogue, []).append(said)
        splits[split] = tuple(Dialogue(name, tuple(held)) for name, held in dialogues.items())
    return Corpus("meld", LABELS, splits)


def test_words_are_found_by_the_names_of_utterances(home: Path) -> None:
    """In another order than that of the features."""
    corpus = annotated(home)
    lines = FeatureSource(home / "features", "meld").lines("test")
    dialogues = []
    for dialogue in corpus.splits["test"]:
        said = [
            replace(row, identity=f"{lines[number].dialogue}_{lines[number].utterance}")
            for row in dialogue.utterances
            for number in (int(row.identity),)
        ]
        dialogues.append(Dialogue(dialogue.identity, tuple(reversed(said))))
    shuffled = replace(corpus, splits={**corpus.splits, "test": tuple(reversed(dialogues))})
    run = FinishedRun(home / "run", "meld")
    assert analyse(run, "test", shuffled) == analyse(run, "test", corpus)


def test_words_come_from_the_annotations(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("examples.meld.corpus.read", lambda root: annotated(home))
    result = call("mistakes", home / "run", "--annotations", home, "--output", home / "out")
    assert result.exit_code == 0, result.stderr
    assert "Utterance" in result.stdout
    table = (home / "out" / "mistakes.csv").read_text("utf-8").splitlines()
    rows = list(csv.DictReader(table))
    lines = FeatureSource(home / "features", "meld").lines("test")
    numbers = {(line.dialogue, line.utterance): number for number, line in enumerate(lines)}
    assert rows
    for row in rows:
        assert row["text"] == f"word {numbers[row['dialogue'], row['utterance']]}"
        assert row["speaker"] == "Eve"


@pytest.mark.parametrize(
    "change", [lambda labels: labels.pop(), lambda labels: labels.insert(0, (labels[0] + 1) % 3)]
)
def test_other_annotations_are_refused(home: Path, change: Callable[[list[int]], object]) -> None:
    with pytest.raises(InputError, match="--annotations: expected the 21 utterances"):
        analyse(FinishedRun(home / "run", "meld"), "test", annotated(home, change))


@pytest.mark.parametrize(
    ("content", "message"), [(None, "without finished.json"), ("{}", "is damaged")]
)
def test_a_run_without_its_labels_is_refused(
    home: Path, tmp_path: Path, content: str | None, message: str
) -> None:
    shutil.copytree(home / "run", tmp_path / "run")
    (tmp_path / "run" / "finished.json").unlink()
    if content is not None:
        (tmp_path / "run" / "finished.json").write_text(content)
    result = call("mistakes", tmp_path / "run")
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


def test_the_report_shows_the_most_confident(
    home: Path, analysis: Analysis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("examples.erc.plots.galleries", lambda results: [])
    results = json.loads((home / "results.json").read_text())
    page = write(results, tmp_path, analysis).read_text("utf-8")
    markdown = (tmp_path / "report.md").read_text("utf-8")
    for record in analysis.records:
        title = f"{record.title}: {len(record.mistakes)} of 21 wrong"
        assert title in page
        assert title in markdown
    assert page.count('<table class="mistakes">') == 4
    plain = write(results, tmp_path / "plain").read_text("utf-8")
    assert "mistakes" not in plain.partition("</style>")[2]


def test_a_system_without_mistakes_has_nothing_to_show(analysis: Analysis) -> None:
    spotless = replace(analysis.records[0], mistakes=(), pairs=())
    told = text(replace(analysis, records=(spotless, *analysis.records[1:])), 3)
    assert "Text teacher: 0 of 21 wrong\n\nAudio student" in told
