"""Small folders of extracted features that a classifier can learn something from."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

LENGTHS = {"train": [7, 1, 12, 9, 11], "dev": [6, 13], "test": [8, 3, 10]}
WIDTHS = {"text_sentence": 6, "audio_voice": 4, "audio_pitch": 2, "visual_face": 5}

Files = tuple[dict[str, Any], dict[str, Any]]


def make_features(dataset: str = "MELD", seed: int = 0) -> Files:
    """Return the arrays and the meta.json of a corpus with three labels."""
    generator = np.random.default_rng(seed)
    lengths = [length for split in LENGTHS.values() for length in split]
    splits = [index for index, split in enumerate(LENGTHS.values()) for _ in split]
    count = sum(lengths)
    label = generator.integers(0, 3, count)
    arrays: dict[str, Any] = {
        "label": label.astype(np.int8),
        "split": np.repeat(splits, lengths).astype(np.int8),
        "dialogue": np.repeat(np.arange(len(lengths)), lengths).astype(np.int16),
        "speaker": (generator.integers(0, 2, count)).astype(np.int8),
    }
    for strength, (name, width) in zip((2.0, 1.0, 1.0, 0.5), WIDTHS.items(), strict=True):
        centres = generator.normal(0, strength, (3, width))
        arrays[name] = (centres[label] + generator.normal(5, 1, (count, width))).astype(np.float32)
    starts = np.cumsum([0, *lengths[:-1]])
    meta = {
        "dataset": dataset,
        "labels": ["glad", "sad", "calm"],
        "dialogues": [
            {"id": f"d{i}", "start": int(start), "length": length, "speakers": ["Ada", "Bo"]}
            for i, (start, length) in enumerate(zip(starts, lengths, strict=True))
        ],
    }
    return arrays, meta


def write_files(folder: Path, files: Files) -> Path:
    arrays, meta = files
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "features.npz", **arrays)
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    return folder


@pytest.fixture
def write_features(tmp_path: Path) -> Callable[..., Path]:
    """Write a folder of features; ``change(arrays, meta)`` may spoil it first."""

    def write(
        change: Callable[[dict[str, Any], dict[str, Any]], object] | None = None,
        dataset: str = "MELD",
    ) -> Path:
        files = make_features(dataset)
        if change is not None:
            change(*files)
        return write_files(tmp_path / "features", files)

    return write
