"""What became of every clip, for programs: used, or put aside and why."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

from examples.erc import artifacts
from examples.erc.clips import ClipStore, Fault, Row

LEDGER = "ledger.json"

Policy: TypeAlias = Literal["mask", "skip", "fail"]
"""What to do with an utterance whose clip cannot be had.

"mask": it stays, and its feature is zero; "skip": it is left out of its split, in all modalities,
and remains in the context of others; "fail": nothing is trained.
"""

Place: TypeAlias = tuple[str, str]
"""A modality and a split."""


def write(
    path: Path,
    policy: Policy,
    stores: Mapping[Place, ClipStore],
    clips: Mapping[Place, Sequence[Row]],
) -> None:
    """Write the ledger of a run.

    For every modality and split: ``rows``, which are ``used`` and ``quarantined`` together, and
    the ``faults``, one for each row that is quarantined or ``damaged`` (used as far as it goes).

    Args:
        path: The file; its folder exists.
        policy: What is done with those that are quarantined.
        stores: What was decoded so far.
        clips: The rows of each.

    Raises:
        RuntimeError: The figures do not add up.
    """
    places = [_account(place, stores[place], clips[place]) for place in stores]
    text = json.dumps({"policy": policy, "clips": places}, indent=1, ensure_ascii=False) + "\n"
    # Of several processes that share a run, all but the first find it as it is to be.
    data = text.encode()
    if not path.exists() or path.read_bytes() != data:
        artifacts.replace(path, lambda partial: partial.write_bytes(data))


def _account(place: Place, store: ClipStore, rows: Sequence[Row]) -> dict[str, Any]:
    modality, split = place
    used, quarantined = store.count(), len(store.lost)
    if used + quarantined != len(rows):
        raise RuntimeError(
            f"{modality}, {split}: {used} clips used and {quarantined} quarantined of {len(rows)}"
        )
    return {
        "modality": modality,
        "split": split,
        "rows": len(rows),
        "used": used,
        "quarantined": quarantined,
        "damaged": len(store.faults) - quarantined,
        "faults": [_describe(fault, rows) for fault in store.faults],
    }


def _describe(fault: Fault, rows: Sequence[Row]) -> dict[str, Any]:
    clip = rows[fault.row][1]
    return {
        "utterance": fault.utterance,
        "kind": fault.kind,
        "reason": fault.reason,
        "file": None if clip is None else str(clip.path),
        "start": clip and clip.start,
        "end": clip and clip.end,
    }
