"""A folder of features that were extracted before, read and checked from end to end.

It holds ``features.npz`` and ``meta.json``. The arrays ``label``, ``split`` (0 train, 1 dev,
2 test), ``dialogue`` and ``speaker`` are integers, ``[N]``; every array ``text_*``, ``audio_*`` or
``visual_*`` is ``[N, width]``. A mask, ``[N]``, is called ``<modality>_mask`` or ``<array>_mask``;
it is 0 where there was nothing to extract from. ``meta.json`` names the ``dataset`` and its
``labels``, and gives the ``start``, the ``length`` and the ``speakers`` of each of its
``dialogues``, in row order. For people only, a dialogue may have an ``id`` and, with an entry for
each of its rows, the ``utterances``' names and their ``texts``.
"""

import hashlib
import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from examples.erc.errors import InputError
from examples.erc.source import MODALITIES, SPLITS, Line

Array: TypeAlias = npt.NDArray[Any]

ARRAYS = "features.npz"
META = "meta.json"

_MOST_BYTES = 1 << 32
"""The largest size of all arrays that are read: 4 GiB; those of a corpus have some 10 MB."""

_LONGEST_REASON = 200


class Measured(NamedTuple):
    """One array of features.

    Attributes:
        name: As in the file.
        values: float32, ``[N, width]``; finite where there is something.
        there: bool, ``[N]``: false where there was nothing to extract from.
    """

    name: str
    values: Array
    there: Array


@dataclass(frozen=True)
class FeatureFolder:
    """What the folder holds.

    Attributes:
        dataset: The corpus as people write it.
        labels: The C class names, in index order; none where labels were not asked for.
        label: int64, ``[N]``; ``[0]`` where labels were not asked for.
        speaker: int64, ``[N]``, an index within the dialogue.
        start: int64, ``[N]``: the first row of the row's dialogue.
        rows: For each split its rows, in order; none is empty. No splits without labels.
        modalities: The arrays of each modality that is there, by name; modalities in order.
        lines: For each row who says what, as far as the folder tells.
        sha256: The digest of each file.
    """

    dataset: str
    labels: tuple[str, ...]
    label: Array
    speaker: Array
    start: Array
    rows: Mapping[str, Array]
    modalities: Mapping[str, tuple[Measured, ...]]
    lines: tuple[Line, ...]
    sha256: Mapping[str, str]


def read(folder: Path, corpus: str, *, labelled: bool = True) -> FeatureFolder:
    """Read a folder of features.

    Args:
        folder: With ``features.npz`` and ``meta.json``.
        corpus: The name that ``meta.json`` has to give as its dataset, in any case.
        labelled: Whether there have to be labels and splits. Otherwise neither is looked at.

    Returns:
        What it holds.

    Raises:
        InputError: A file or an array is missing, does not fit the others or is out of range; the
            message says which, where, and how to mend it.
    """
    meta = _read_meta(folder / META, corpus, labelled=labelled)
    arrays = _read_arrays(folder / ARRAYS, labelled=labelled)
    count = _check_labels(arrays, meta) if labelled else arrays["dialogue"].size
    _check_rows(arrays, meta, count)
    if labelled:
        _check_splits(arrays["split"], meta["dialogues"])
    measured = {modality: tuple(_read_modality(modality, arrays, count)) for modality in MODALITIES}
    return FeatureFolder(
        dataset=meta["dataset"],
        labels=tuple(meta["labels"]) if labelled else (),
        label=arrays["label"].astype(np.int64) if labelled else np.zeros(0, np.int64),
        speaker=arrays["speaker"].astype(np.int64),
        start=np.repeat(
            np.array([dialogue["start"] for dialogue in meta["dialogues"]], dtype=np.int64),
            [dialogue["length"] for dialogue in meta["dialogues"]],
        ),
        rows={
            split: np.flatnonzero(arrays["split"] == index)
            for index, split in enumerate(SPLITS if labelled else ())
        },
        modalities={modality: found for modality, found in measured.items() if found},
        lines=tuple(_read_lines(arrays["speaker"], meta["dialogues"])),
        sha256={
            name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
            for name in (ARRAYS, META)
        },
    )


def _read_lines(speaker: Array, dialogues: Sequence[Mapping[str, Any]]) -> Iterator[Line]:
    """Name dialogues and utterances: by number, where the folder has no names that tell apart."""
    names = [dialogue.get("id") for dialogue in dialogues]
    named = all(isinstance(name, str) for name in names) and len({*names}) == len(names)
    for index, dialogue in enumerate(dialogues):
        count = dialogue["length"]
        utterances = _texts(dialogue.get("utterances"), count)
        if not utterances or len({*utterances}) < count:
            utterances = [str(number) for number in range(count)]
        texts = _texts(dialogue.get("texts"), count)
        for number in range(count):
            person = dialogue["speakers"][speaker[dialogue["start"] + number]]
            yield Line(
                str(names[index]) if named else str(index),
                utterances[number],
                str(person),
                texts[number] if texts else None,
            )


def _texts(value: object, count: int) -> list[str]:
    """A list with a text for each of so many rows, if it is one."""
    if isinstance(value, list) and len(value) == count and all(isinstance(x, str) for x in value):
        return value
    return []


def _read_modality(modality: str, arrays: Mapping[str, Array], count: int) -> Iterator[Measured]:
    for name in sorted(arrays):
        if not name.startswith(f"{modality}_") or name.endswith("_mask"):
            continue
        with np.errstate(over="ignore"):  # too large for float32 is infinite, and refused below
            values = _require(arrays, name, count, axes=2).astype(np.float32)
        there = np.ones(count, dtype=bool)
        for mask in (f"{modality}_mask", f"{name}_mask"):
            if mask in arrays:
                there &= _require(arrays, mask, count).astype(bool)
        if (wrong := np.flatnonzero(there & ~np.isfinite(values).all(axis=1))).size:
            raise InputError(
                f"{ARRAYS}, {name}: expected finite numbers, got NaN or infinity in row "
                f"{wrong[0]}; mend it, or mark the row with 0 in {modality}_mask"
            )
        yield Measured(name, values, there)


def _read_meta(path: Path, corpus: str, *, labelled: bool) -> dict[str, Any]:
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{path}: expected a file that can be read ({error.strerror}); "
            f"hand over a folder with {ARRAYS} and {META}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected JSON, got something else ({error})") from error
    if not isinstance(meta, dict):
        raise InputError(f"{path}: expected an object, got a {type(meta).__name__}")
    dataset, labels, dialogues = (meta.get(key) for key in ("dataset", "labels", "dialogues"))
    if not isinstance(dataset, str) or dataset.lower() != corpus.lower():
        raise InputError(
            f"{path}: expected the dataset {corpus}, got {json.dumps(dataset)[:80]}; "
            "hand over the features of this corpus, or run the other one's example"
        )
    if labelled and (
        not isinstance(labels, list)
        or len(labels) < 2
        or not all(isinstance(name, str) and name and name.isprintable() for name in labels)
        or len(set(labels)) < len(labels)
    ):
        raise InputError(
            f"{path}: expected two or more different names as labels, got "
            f"{json.dumps(labels)[:80]}; name the classes in index order"
        )
    if not isinstance(dialogues, list) or not dialogues:
        raise InputError(f"{path}: expected a list of dialogues, got {json.dumps(dialogues)[:80]}")
    for index, dialogue in enumerate(dialogues):
        if not (
            isinstance(dialogue, dict)
            and all(_whole(dialogue.get(key)) for key in ("start", "length"))
            and isinstance(dialogue.get("speakers"), list)
        ):
            raise InputError(
                f"{path}: expected each dialogue to have start and length, whole numbers, and "
                f"speakers, a list; got {json.dumps(dialogue)[:80]} as number {index}"
            )
    return meta


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _read_arrays(path: Path, *, labelled: bool) -> dict[str, Array]:
    """Read the arrays that matter; pickled objects are refused."""
    needed = ("label", "split", "dialogue", "speaker")[0 if labelled else 2 :]
    try:
        with zipfile.ZipFile(path) as archive:  # numpy would load a lone array too
            if sum(part.file_size for part in archive.infolist()) > _MOST_BYTES:
                raise ValueError(f"it holds more than {_MOST_BYTES} bytes")
        with np.load(path, allow_pickle=False) as file:
            arrays = {
                name: file[name]
                for name in file.files
                if name in needed or name.startswith(tuple(f"{m}_" for m in MODALITIES))
            }
    except FileNotFoundError as error:
        raise InputError(
            f"{path}: expected a file that can be read ({error.strerror}); "
            f"hand over a folder with {ARRAYS} and {META}"
        ) from error
    # What reads hostile bytes may fail in any way.
    except Exception as error:
        reason = " ".join(str(error).split())[:_LONGEST_REASON] or type(error).__name__
        raise InputError(
            f"{path}: expected an npz file of plain arrays, got one that cannot be read "
            f"({reason}); write it again with numpy.savez"
        ) from error
    missing = [name for name in needed if name not in arrays]
    if missing:
        raise InputError(
            f"{path}: expected the arrays {', '.join(needed)}, got none called "
            f"{', '.join(missing)}; add it"
        )
    return arrays


def _require(arrays: Mapping[str, Array], name: str, count: int, axes: int = 1) -> Array:
    """An array of numbers with a row for each utterance."""
    array = arrays[name]
    wanted = f"({count},)" if axes == 1 else f"({count}, width)"
    if array.ndim != axes or len(array) != count or not array.size:
        raise InputError(
            f"{ARRAYS}, {name}: expected the shape {wanted}, as there are {count} utterances, "
            f"got {array.shape}; give every array a row for each utterance"
        )
    if array.dtype.kind not in ("biu" if axes == 1 else "biuf"):
        raise InputError(
            f"{ARRAYS}, {name}: expected {'whole ' if axes == 1 else ''}numbers, got the dtype "
            f"{array.dtype}; convert it"
        )
    return array


def _check_labels(arrays: Mapping[str, Array], meta: Mapping[str, Any]) -> int:
    """Check labels and splits; return N."""
    count = arrays["label"].size
    if not count:
        raise InputError(f"{ARRAYS}, label: expected a label for each utterance, got none")
    label, split = (_require(arrays, name, count).astype(np.int64) for name in ("label", "split"))
    _require_range("label", label, len(meta["labels"]), "the labels of meta.json")
    _require_range("split", split, len(SPLITS), "0 train, 1 dev, 2 test")
    return count


def _check_rows(arrays: Mapping[str, Array], meta: Mapping[str, Any], count: int) -> None:
    """Check that the integer arrays about dialogues fit each other and ``meta.json``."""
    dialogue, speaker = (
        _require(arrays, name, count).astype(np.int64) for name in ("dialogue", "speaker")
    )
    lengths = [entry["length"] for entry in meta["dialogues"]]
    starts = [entry["start"] for entry in meta["dialogues"]]
    if min(lengths) < 1 or sum(lengths) != count or starts != [0, *np.cumsum(lengths[:-1])]:
        raise InputError(
            f"{META}: expected dialogues that follow each other and cover the {count} rows of "
            f"{ARRAYS}, got starts and lengths that do not; write both files from the same rows"
        )
    expected = np.repeat(np.arange(len(lengths)), lengths)
    if (wrong := np.flatnonzero(dialogue != expected)).size:
        row = wrong[0]
        raise InputError(
            f"{ARRAYS}, dialogue: expected the rows of each dialogue together, as {META} has them "
            f"({expected[row]} in row {row}), got {dialogue[row]}; sort the rows by dialogue"
        )
    speakers = np.repeat([len(entry["speakers"]) for entry in meta["dialogues"]], lengths)
    if (wrong := np.flatnonzero((speaker < 0) | (speaker >= speakers))).size:
        row = wrong[0]
        raise InputError(
            f"{ARRAYS}, speaker: expected an index into the {speakers[row]} speakers of the "
            f"dialogue in {META}, got {speaker[row]} in row {row}"
        )


def _check_splits(split: Array, dialogues: Sequence[Mapping[str, Any]]) -> None:
    """Check that no dialogue is cut in two, and that no split is empty."""
    first = np.repeat(
        [entry["start"] for entry in dialogues], [entry["length"] for entry in dialogues]
    )
    if (wrong := np.flatnonzero(split != split[first])).size:
        raise InputError(
            f"{ARRAYS}, split: expected one split for all rows of a dialogue, got another in row "
            f"{wrong[0]}; a dialogue cut in two lets its context leak"
        )
    for index, name in enumerate(SPLITS):
        if not (split == index).any():
            raise InputError(
                f"{ARRAYS}, split: expected rows of train, dev and test, got none of {name} "
                f"({index}); models are selected on dev, so set some dialogues of train apart"
            )


def _require_range(name: str, values: Array, size: int, meaning: str) -> None:
    if (wrong := np.flatnonzero((values < 0) | (values >= size))).size:
        row = wrong[0]
        raise InputError(
            f"{ARRAYS}, {name}: expected 0 to {size - 1} ({meaning}), got {values[row]} in "
            f"row {row}; correct it there"
        )
