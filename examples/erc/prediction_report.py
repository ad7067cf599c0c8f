"""Predictions for people and for programs: a table for the terminal, CSV, JSON and pictures."""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from examples.erc import terminal
from examples.erc.finished import FinishedRun, dev_score
from examples.erc.prediction import Answer, emotion_of
from examples.erc.systems import System
from examples.erc.terminal import abbreviations, fit, plain

FORMAT = 1
"""Raised whenever the JSON changes its form."""

TABLE = "predictions.csv"
DOCUMENT = "predictions.json"

MOST_PICTURES = 20
"""Dialogues that are drawn; the files have all."""

_MOST_PRINTED = 200
"""Utterances that are printed."""

_NARROWEST = 100
"""Columns of the table on a narrow terminal."""

_UTTERANCE, _SPEAKER = 20, 14
"""Columns for the name of an utterance and of a speaker, at most."""


def write(run: FinishedRun, answers: Sequence[Answer], folder: Path) -> list[Path]:
    """Write the files; each appears whole or not at all.

    Args:
        run: Who answered.
        answers: Dialogue after dialogue.
        folder: Where they go; made if absent.

    Returns:
        The paths: ``predictions.csv``, ``predictions.json``, and a picture for each of the first
        dialogues.
    """
    from examples.erc import emotion_plot
    from examples.erc.artifacts import replace

    pictures = {
        name: picture
        for number, (dialogue, held) in enumerate(list(by_dialogue(answers))[:MOST_PICTURES])
        for name, picture in emotion_plot.draw(
            _stem(number, dialogue), f"Dialogue {dialogue}, emotions over time", held, run.labels
        )
    }
    files = {
        TABLE: _table(run, answers).encode(),
        DOCUMENT: _document(run, answers, list(pictures)).encode(),
        **pictures,
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        replace(folder / name, partial(Path.write_bytes, data=content))
    return [folder / name for name in files]


def by_dialogue(answers: Iterable[Answer]) -> Iterator[tuple[str, list[Answer]]]:
    """The dialogues one after another, each with its answers."""
    for name, held in groupby(answers, key=lambda each: each.line.dialogue):
        yield name, list(held)


def text(run: FinishedRun, answers: Sequence[Answer], width: int) -> str:
    """Write predictions as plain text, for a terminal.

    Args:
        run: Who answered.
        answers: Dialogue after dialogue.
        width: Columns of the terminal; a narrow one gets 100 all the same.

    Returns:
        Several lines without a final line break.
    """
    seeds = f", the best on dev of {len(run.seeds)}" if len(run.seeds) > 1 else ""
    lines = [f"{run.title}: emotions by {run.folder}, seed {run.seed}{seeds}; probabilities in %"]
    printed = 0
    for name, held in by_dialogue(answers):
        if printed and printed + len(held) > _MOST_PRINTED:
            break
        shown = held[:_MOST_PRINTED]
        lines += ["", f"Dialogue {plain(name)}", *_grid(run, shown, max(width, _NARROWEST))]
        printed += len(shown)
    if printed < len(answers):
        lines += ["", f"... and {len(answers) - printed} more utterances in {TABLE}"]
    spoken = Counter(each.system for each in answers)
    lines += ["", "Who answers"]
    for system in [*run.stages, None]:
        if spoken[system]:
            title = system.title if system else "nobody: there is nothing to go by"
            score = f", dev {100 * dev_score(run.stages[system].record):.2f}" if system else ""
            count = spoken[system]
            lines.append(f"  {title}{score}: {count} utterance{'s' if count > 1 else ''}")
    faults = [(each, kind, why) for each in answers for kind, why in each.faults.items()]
    if faults:
        lines += ["", "Clips"]
        for each, kind, why in faults[:10]:
            where = f"dialogue {each.line.dialogue}, utterance {each.line.utterance}"
            lines.append(f"  {plain(where)}, {kind}: {plain(why)}")
        if len(faults) > 10:
            lines.append(f"  ... and {len(faults) - 10} more in {DOCUMENT}")
    return "\n".join(lines)


def _grid(run: FinishedRun, answers: Sequence[Answer], width: int) -> list[str]:
    """The table of one dialogue."""
    short = abbreviations(run.labels)
    number = min(_UTTERANCE, max(1, *(len(plain(each.line.utterance)) for each in answers)))
    name = min(_SPEAKER, max(7, *(len(plain(each.line.speaker)) for each in answers)))
    emotion = max(7, *map(len, run.labels))
    seen = max(4, *(len(_seen(each.system)) for each in answers))
    fixed = number + name + emotion + seen + 5 * len(short) + 10
    said = width - fixed
    spoken = any(each.line.text for each in answers)
    if spoken:
        longest = max(terminal.width(plain(each.line.text or "")) for each in answers)
        said = max(min(said, longest), len("Utterance"))

    def line(cells: Sequence[str]) -> str:
        return "  ".join(cell for cell in cells if cell).rstrip()

    head = [
        "#".rjust(number),
        fit("Speaker", name),
        fit("Utterance", said) if spoken else "",
        fit("Emotion", emotion),
        "".join(word.rjust(5) for word in short),
        "Seen".ljust(seen),
    ]
    lines = [line(head)]
    lines.append("-" * len(lines[0]))
    for each in answers:
        said_most = emotion_of(each, run.labels)
        lines.append(
            line(
                [
                    fit(each.line.utterance, number).strip().rjust(number),
                    fit(each.line.speaker, name),
                    fit(each.line.text or "", said) if spoken else "",
                    fit(said_most or "-", emotion),
                    "".join(
                        f"{'*' if label == said_most else ''}{100 * share:.0f}".rjust(5)
                        for label, share in zip(run.labels, each.shares, strict=False)
                    ).rjust(5 * len(short)),
                    _seen(each.system).ljust(seen),
                ]
            )
        )
    return lines


def _seen(system: System | None) -> str:
    return "nothing" if system is None else "+".join(system.modalities)


def _table(run: FinishedRun, answers: Sequence[Answer]) -> str:
    """A line for each utterance: the answer, and what each modality's own system says."""
    alone = [system for system in run.stages if not system.fusion]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        [
            "dialogue", "utterance", "speaker", "text", "present", "system", "emotion",
            "probability",
            *run.labels,
            *(
                f"{system.modalities[0]}_{part}"
                for system in alone
                for part in ("emotion", "probability")
            ),
            "faults",
        ]
    )  # fmt: skip
    for each in answers:
        cells: list[object] = [*each.line[:3], each.line.text or "", "+".join(each.present)]
        cells += [each.system.key if each.system else "", *_best(each.shares, run.labels)]
        cells += each.shares or [""] * len(run.labels)
        for system in alone:
            cells += _best(each.probabilities.get(system, ()), run.labels)
        cells.append("; ".join(f"{kind}: {why}" for kind, why in each.faults.items()))
        writer.writerow(cells)
    return text.getvalue()


def _best(probabilities: Sequence[float], labels: Sequence[str]) -> list[object]:
    if not probabilities:
        return ["", ""]
    index = max(range(len(labels)), key=lambda index: probabilities[index])
    return [labels[index], probabilities[index]]


def _document(run: FinishedRun, answers: Sequence[Answer], pictures: list[str]) -> str:
    document: dict[str, Any] = {
        "format": FORMAT,
        "corpus": run.record["corpus"],
        "run": str(run.folder),
        "seed": run.seed,
        "labels": list(run.labels),
        "systems": [
            {
                "key": system.key,
                "title": system.title,
                "modalities": list(system.modalities),
                "dev_weighted_f1": dev_score(stage.record),
            }
            for system, stage in run.stages.items()
        ],
        "pictures": pictures,
        "dialogues": [
            {"id": name, "utterances": [_describe(each, run.labels) for each in held]}
            for name, held in by_dialogue(answers)
        ],
    }
    return json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _describe(answer: Answer, labels: Sequence[str]) -> dict[str, Any]:
    return {
        "id": answer.line.utterance,
        "speaker": answer.line.speaker,
        "text": answer.line.text,
        "present": list(answer.present),
        "system": answer.system.key if answer.system else None,
        "emotion": emotion_of(answer, labels),
        "probabilities": {
            system.key: dict(zip(labels, values, strict=True))
            for system, values in answer.probabilities.items()
        },
        "faults": dict(answer.faults),
    }


def _stem(number: int, dialogue: str) -> str:
    """A file name for a dialogue, whatever it is called; the number tells two apart."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", dialogue)[:40].strip("-")
    return f"dialogue-{number + 1}" + (f"-{name}" if name and name != str(number + 1) else "")
