"""Result files: one operator on one device, written after every cell, whole or not at all."""

import hashlib
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import telme_kd
from benchmarks import machine as machines
from benchmarks.machine import Machine

Document = dict[str, Any]

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / telme_kd.__version__
OPERATORS = ("dist", "batch_similarity", "fusion", "linear_dist")


def command(operator: str) -> str:
    """What measures an operator on everything that a machine has."""
    return f"python -m benchmarks.bench_{operator}"


def path_of(folder: Path, operator: str, device: str) -> Path:
    """Where the results of an operator on a device are kept."""
    return folder / f"{operator}--{device}.json"


def partial_path(path: Path) -> Path:
    """Where they are collected until all are there."""
    return path.with_suffix(".partial.json")


def new_document(operator: str, machine: Machine, *, quick: bool) -> Document:
    """A result file's head; its rows are still to come."""
    return {
        "operator": operator,
        "command": command(operator) + (" --quick" if quick else ""),
        "device": machine.slug,
        "machine": {"kind": machine.kind, "name": machine.name, "threads": list(machine.threads)},
        "versions": machines.versions(machine.kind),
        "sources": source_digest(),
        "ceilings": {},
        "rows": [],
    }


def continued(path: Path, fresh: Document) -> Document:
    """What an earlier run left for this one to go on with, measured with the same everything.

    Raises:
        SystemExit: an interrupted run's document differs; the message says in what.
    """
    partial = partial_path(path)
    if partial.is_file():
        document = read(partial)
        different = _differences(document, fresh)
        if different:
            raise SystemExit(
                f"--resume: {partial} was measured with other {', '.join(different)}; "
                "leave --resume out to measure anew"
            )
        return document
    if path.is_file():
        document = read(path)
        if not _differences(document, fresh):
            return document
    return fresh


def _differences(document: Document, fresh: Document) -> list[str]:
    head = fresh.keys() - {"ceilings", "rows"}
    return sorted(key for key in head if document.get(key) != fresh[key])


def source_digest() -> str:
    """A digest of the code that is measured and of the code that measures."""
    digest = hashlib.sha256()
    for folder in ("telme_kd", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def find(rows: Iterable[Document], case: str, threads: int) -> Document | None:
    """The row of a case with so many threads."""
    for row in rows:
        if row["case"] == case and row["threads"] == threads:
            return row
    return None


def read(path: Path) -> Document:
    """Read a result file."""
    document: Document = json.loads(path.read_text(encoding="utf-8"))
    return document


def write(path: Path, document: Document) -> None:
    """Write a result file whole or not at all."""
    text = json.dumps(document, indent=1) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8"
    ) as file:
        file.write(text)
    Path(file.name).chmod(0o644)
    Path(file.name).replace(path)


def documents(folder: Path) -> list[Document]:
    """The complete result files of a folder, operator after operator, the CPU's first."""
    found = []
    for operator in OPERATORS:
        paths = [
            path
            for path in folder.glob(f"{operator}--*.json")
            if not path.name.endswith(".partial.json")
        ]
        found += [read(path) for path in sorted(paths, key=lambda path: (not _is_cpu(path), path))]
    return found


def _is_cpu(path: Path) -> bool:
    return path.stem.endswith("--cpu")
