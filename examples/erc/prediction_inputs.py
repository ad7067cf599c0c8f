"""Dialogues that a run has not seen, as its encoders take them."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from examples.erc import encoding, feature_folder, ledger
from examples.erc.cache import Cache
from examples.erc.clips import ClipStore, Row, decode_clips
from examples.erc.crew import Crew, Limits
from examples.erc.dialogue import Clip, Dialogue, Utterance, number_speakers
from examples.erc.dialogue_file import DialogueFile, Said
from examples.erc.errors import InputError
from examples.erc.feature_encoding import FeatureEncoding
from examples.erc.feature_folder import FeatureFolder
from examples.erc.finished import FinishedRun
from examples.erc.ledger import Place, Policy
from examples.erc.raw_encoding import RawEncoding
from examples.erc.source import Dataset, Line

SPLIT = "dialogue"
"""What the ledger of clips has in the place of a split."""

NOBODY_KNOWS = -1
"""The label of an utterance without one."""


@dataclass(frozen=True)
class Inputs:
    """Dialogues as the encoders of a run take them.

    Attributes:
        lines: For each of N rows who says what, dialogue after dialogue.
        datasets: For each modality that is used its encoder inputs.
        present: For each of those modalities whether a row has it.
        faults: For each row what is wrong with its clips, by modality.
        left_out: The rows that are not to be answered.
    """

    lines: Sequence[Line]
    datasets: Mapping[str, Dataset]
    present: Mapping[str, Sequence[bool]]
    faults: Sequence[Mapping[str, str]]
    left_out: frozenset[int] = frozenset()

    @property
    def lengths(self) -> list[int]:
        """The number of rows of each dialogue."""
        return list(Counter(line.dialogue for line in self.lines).values())


def choose_modalities(run: FinishedRun, wanted: Sequence[str] | None) -> tuple[str, ...]:
    """Those of the run that are wanted.

    Raises:
        InputError: The run lacks one.
    """
    if lacking := sorted({*(wanted or ())} - {*run.modalities}):
        raise InputError(
            f"--modalities: expected some of {', '.join(run.modalities)}, which {run.folder} was "
            f"trained with, got {', '.join(lacking)}; leave it out"
        )
    return tuple(each for each in run.modalities if wanted is None or each in wanted)


def read_features(run: FinishedRun, folder: Path, modalities: Sequence[str]) -> Inputs:
    """Read the features of dialogues, for a run that was trained on features.

    Args:
        run: The run.
        folder: See :mod:`examples.erc.feature_folder`; labels and splits are not needed.
        modalities: Those of the run that are wanted.

    Returns:
        The dialogues, without the modalities that the folder has no array of.

    Raises:
        InputError: The folder has a fault, or other features than those of the run.
    """
    kept = encoding.load(run.folder, run.record)
    assert isinstance(kept, FeatureEncoding)
    arrays = "; ".join(
        f"{modality}: " + ", ".join(f"{name} [{scale.shape[1]}]" for name, scale in held.items())
        for modality, held in kept.scales.items()
    )
    if not folder.is_dir():
        raise InputError(
            f"{folder}: expected a folder with {feature_folder.ARRAYS} and {feature_folder.META}, "
            f"as {run.folder} was trained on extracted features ({arrays}), got "
            f"{'a file' if folder.exists() else 'nothing'}; extract the same for the dialogue, or "
            "train with --raw to predict from texts and clips"
        )
    found = feature_folder.read(folder, run.record["corpus"], labelled=False)
    used = [modality for modality in modalities if modality in found.modalities]
    if not used:
        raise InputError(
            f"{folder}: expected arrays of {', '.join(modalities)} ({arrays}), got none; extract "
            "them as for the run"
        )
    for modality in used:
        kept.check(found, modality)
    rows = torch.arange(len(found.lines)).numpy()
    return Inputs(
        found.lines,
        {modality: kept.dataset(found, modality, rows) for modality in used},
        {modality: _there(kept, found, modality) for modality in used},
        [{} for _ in found.lines],
    )


def _there(kept: FeatureEncoding, found: FeatureFolder, modality: str) -> list[bool]:
    arrays = [
        measured.there
        for measured in found.modalities[modality]
        if measured.name in kept.scales[modality]
    ]
    there: list[bool] = torch.stack([torch.from_numpy(each) for each in arrays]).any(dim=0).tolist()
    return there


def read_clips(
    run: FinishedRun,
    file: DialogueFile,
    modalities: Sequence[str],
    *,
    bad_clips: Policy = "mask",
    cache: Path,
    ledger_path: Path | None = None,
    workers: int | None = None,
    limits: Limits | None = None,
) -> Inputs:
    """Read texts and decode clips, for a run that was trained on raw clips.

    Args:
        run: The run.
        file: The dialogues.
        modalities: Those of the run that are wanted.
        bad_clips: What to do with an utterance that names a clip which cannot be had: answer by the
            rest, leave it out, or refuse the whole.
        cache: A folder for decoded clips, which has to stay until the answers are there.
        ledger_path: Where to account for the clips; ``None``: nowhere.
        workers: Processes that decode; ``None``: one for each processor, at most 8.
        limits: What decoding a clip may cost.

    Returns:
        The dialogues, without the modalities that no utterance has.

    Raises:
        InputError: The dialogues do not fit the run, no clip can be had, or there is a bad one and
            there may be none.
    """
    kept = encoding.load(run.folder, run.record)
    assert isinstance(kept, RawEncoding)
    said = [each for dialogue in file.dialogues for each in dialogue]
    named = {
        modality: [_clip(each, modality) for each in said]
        for modality in modalities
        if modality != "text"
    }
    datasets: dict[str, Dataset] = {}
    present: dict[str, list[bool]] = {}
    if "text" in modalities:
        datasets["text"] = kept.texts(_dialogues(file, kept.speakers))
        present["text"] = [True] * len(said)
    used = {modality: clips for modality, clips in named.items() if any(clips)}
    if not datasets and not used:
        raise InputError(
            f"--modalities: expected something to go by, got {', '.join(modalities)} and a file "
            "that names no such clip; name them in Clip, Audio or Video, or add text"
        )
    for modality, clips in used.items():
        _check_clips(said, clips, modality, bad_clips=bad_clips, crop=kept.crop)
    rows: dict[Place, list[Row]] = {
        (modality, SPLIT): [
            (name_of(each.line), clip) for each, clip in zip(said, held, strict=True)
        ]
        for modality, held in used.items()
    }
    stores = _decode(kept, rows, cache, workers, limits)
    if stores and ledger_path is not None:
        ledger_path.parent.mkdir(parents=True, exist_ok=True)
        ledger.write(ledger_path, bad_clips, stores, rows)
    faults: list[dict[str, str]] = [{} for _ in said]
    left_out = set()
    for (modality, _), store in stores.items():
        datasets[modality] = kept.clips(modality, store)
        present[modality] = [clip is not None for clip in used[modality]]
        for fault in store.faults:
            if used[modality][fault.row] is not None:
                faults[fault.row][modality] = f"{fault.kind}: {fault.reason}"
        for fault in store.lost:
            if present[modality][fault.row]:
                present[modality][fault.row] = False
                left_out.add(fault.row)
    if left_out and bad_clips == "fail":
        first = min(left_out)
        raise InputError(
            f"{name_of(said[first].line)}: expected clips that can all be decoded, got "
            f"{'; '.join(f'{modality} {why}' for modality, why in faults[first].items())}; mend "
            "it, or mask or skip bad clips"
        )
    return Inputs(
        [each.line for each in said],
        datasets,
        present,
        faults,
        frozenset(left_out) if bad_clips == "skip" else frozenset(),
    )


def _clip(said: Said, modality: str) -> Clip | None:
    return said.audio if modality == "audio" else said.visual


def name_of(line: Line) -> str:
    """An utterance in an error."""
    return f"dialogue {line.dialogue}, utterance {line.utterance}"


def _dialogues(file: DialogueFile, most: int) -> list[Dialogue]:
    """The dialogues as a corpus has them.

    Raises:
        InputError: A text is empty, or more people speak than the run has tokens for.
    """
    dialogues = []
    row = 0
    for said in file.dialogues:
        numbers = number_speakers(each.line.speaker for each in said)
        name = said[0].line.dialogue
        if max(numbers) >= most:
            raise InputError(
                f"dialogue {name}: expected at most {most} speakers, the most in a dialogue that "
                f"the run was trained on, got {max(numbers) + 1}; give the same name to those who "
                "say little, or leave text out with --modalities"
            )
        utterances = []
        for each, number in zip(said, numbers, strict=True):
            text = each.line.text
            if not text:
                raise InputError(
                    f"{name_of(each.line)}: expected words, got none; write them down, or leave "
                    "text out with --modalities"
                )
            utterances.append(
                Utterance(str(row), text, number, NOBODY_KNOWS, each.audio, each.visual)
            )
            row += 1
        dialogues.append(Dialogue(name, tuple(utterances)))
    return dialogues


def _check_clips(
    said: Sequence[Said],
    clips: Sequence[Clip | None],
    modality: str,
    *,
    bad_clips: Policy,
    crop: bool,
) -> None:
    """Find before any work what can be found then."""
    there = [(each.line, clip) for each, clip in zip(said, clips, strict=True) if clip is not None]
    missing = [(line, clip) for line, clip in there if not clip.path.is_file()]
    if missing and (len(missing) == len(there) or bad_clips == "fail"):
        line, clip = missing[0]
        raise InputError(
            f"{name_of(line)}: expected the {modality} file {clip.path}, got none, and so for "
            f"{len(missing)} of {len(there)} utterances; check the paths, give the folder that "
            f"they are relative to with --clips, or leave {modality} out with --modalities"
        )
    if crop and modality == "visual":
        for line, clip in there:
            if clip.side is None:
                raise InputError(
                    f"{name_of(line)}: expected the side of the film that the speaker is seen on, "
                    "as the run was trained with --crop, got none; add a column Side with left or "
                    "right, or leave visual out with --modalities"
                )


def _decode(
    kept: RawEncoding,
    rows: Mapping[Place, Sequence[Row]],
    folder: Path,
    workers: int | None,
    limits: Limits | None,
) -> dict[Place, ClipStore]:
    if not rows:
        return {}
    cache = Cache(folder)
    with Crew(workers or min(os.cpu_count() or 1, 8), limits) as crew:
        return {
            place: decode_clips(
                held,
                kept.decoding(place[0]),
                cache,
                crew,
                title=f"{place[0]} clips",
                label=place[0],
                settings=kept.preprocessing(place[0]),
            )
            for place, held in rows.items()
        }
