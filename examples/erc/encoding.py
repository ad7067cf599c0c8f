"""What a run keeps so that it can encode other dialogues as it encoded its corpus.

The weights are with the stages. Everything else goes into a folder of the run: the settings, and
with raw clips the configurations, the tokenizer and the processors of the encoders. A run folder
can therefore be taken to another machine, without the corpus and without a network.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch

from examples.erc import artifacts
from examples.erc.artifacts import DamageError
from examples.erc.errors import InputError
from examples.erc.feature_encoding import FeatureEncoding
from examples.erc.raw_encoding import RawEncoding
from examples.erc.source import JSON, Source

FOLDER = "encoding"
RECORD = "encoding.json"

FORMAT = 1
"""Raised whenever what is kept changes its form."""

Encoding: TypeAlias = RawEncoding | FeatureEncoding


def keep(source: Source, folder: Path, command: str) -> None:
    """Keep a source's encoding in the folder of its run, whole or not at all.

    Args:
        source: The corpus, prepared.
        folder: Of the run.
        command: What the user typed, to be named where the run turns out not to be finished.
    """
    partial = folder / f".{FOLDER}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    kept = source.keep_encoding(partial)
    files = {
        path.relative_to(partial).as_posix(): artifacts.file_sha256(path)
        for path in sorted(partial.rglob("*"))
        if path.is_file()
    }
    record: dict[str, JSON] = {
        "format": FORMAT,
        "corpus": source.name,
        "title": source.title,
        "labels": list(source.labels),
        "command": command,
        "threads": torch.get_num_threads(),
        "files": files,
        **kept,
    }
    artifacts.write_record(partial / RECORD, record)
    home = folder / FOLDER
    shutil.rmtree(home, ignore_errors=True)
    partial.rename(home)


def read(folder: Path, corpus: str) -> dict[str, Any]:
    """Read and verify what a run kept.

    Args:
        folder: Of the run.
        corpus: The corpus that it has to be of, in lower case.

    Returns:
        The record: ``kind``, ``title``, ``labels``, ``modalities``, ``command``, ``threads``,
        and what the kind of encoding needs.

    Raises:
        InputError: There is no such run, or its files are damaged or of another corpus.
    """
    home = folder / FOLDER
    if not (home / RECORD).is_file():
        raise InputError(
            f"{folder}: expected the folder of a run, with {FOLDER}/{RECORD} in it, got none; "
            "give the --output of a training run"
        )
    try:
        record = artifacts.read_record(home / RECORD)
        if record["format"] != FORMAT:
            raise InputError(
                f"{home / RECORD}: expected the format {FORMAT}, got {record['format']}; run "
                f"'{record['command']}' again with this version"
            )
        artifacts.verify(home, record["files"])
    except DamageError as damage:
        raise InputError(
            f"{home}: expected files as the run wrote them, but {damage}; run the command of the "
            "run again: it keeps what is whole"
        ) from damage
    if record["corpus"] != corpus:
        raise InputError(
            f"{folder}: expected a run on {corpus}, got one on {record['corpus']}; use python -m "
            f"examples.{record['corpus']}"
        )
    return record


def load(folder: Path, record: Mapping[str, Any]) -> Encoding:
    """Make the encoding that a run kept.

    Args:
        folder: Of the run.
        record: As :func:`read` returned it.
    """
    kinds: dict[str, type[RawEncoding] | type[FeatureEncoding]] = {
        "raw": RawEncoding,
        "features": FeatureEncoding,
    }
    return kinds[record["kind"]].restore(folder / FOLDER, record)
