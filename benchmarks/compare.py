"""Compare two result files: which cells became slower?

Run ``python -m benchmarks.compare BEFORE.json AFTER.json [--threshold 1.1]``. What is compared is
each provider's time over the reference's of the same file, so that a slower or busier machine
cancels out. The exit status is 1 if a cell is slower by more than the threshold.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks import results
from benchmarks.results import Document
from benchmarks.workload import REFERENCE


class Change(NamedTuple):
    """A provider's time in a cell, relative to the reference: after over before."""

    case: str
    threads: int
    provider: str
    clock: str
    mode: str
    ratio: float


def changes(before: Document, after: Document) -> Iterator[Change]:
    """Every time that both documents have, in the order of the second."""
    for row in after["rows"]:
        earlier = results.find(before["rows"], row["case"], row["threads"])
        if earlier is None:
            continue
        old, new = dict(_relative_times(earlier)), dict(_relative_times(row))
        for provider, clock, mode in new:
            if (provider, clock, mode) in old:
                ratio = new[provider, clock, mode] / old[provider, clock, mode]
                yield Change(row["case"], row["threads"], provider, clock, mode, ratio)


def _relative_times(row: Document) -> Iterator[tuple[tuple[str, str, str], float]]:
    found = row.get("providers", {})
    reference = found.get(REFERENCE, {}).get("seconds", {})
    for provider, measured in found.items():
        if provider == REFERENCE:
            continue
        for clock, modes in measured.get("seconds", {}).items():
            for mode, seconds in modes.items():
                if mode in reference.get(clock, {}):
                    ratio = seconds["p50"] / reference[clock][mode]["p50"]
                    yield (provider, clock, mode), ratio


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the cells that became slower; return the exit status."""
    parser = argparse.ArgumentParser(description="Which cells became slower?")
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument(
        "--threshold", type=float, default=1.1, help="ratio above which a cell is slower (1.1)"
    )
    options = parser.parse_args(arguments)
    before, after = results.read(options.before), results.read(options.after)
    if (before["operator"], before["device"]) != (after["operator"], after["device"]):
        parser.error(
            f"expected two results of one operator and device, got {before['operator']} on "
            f"{before['device']} and {after['operator']} on {after['device']}"
        )
    compared = list(changes(before, after))
    slower = [change for change in compared if change.ratio > options.threshold]
    for change in sorted(slower, key=lambda change: -change.ratio):
        print(
            f"{change.ratio:.2f}x  {change.case}, {change.threads} threads, {change.provider}, "
            f"{change.clock} clock, {change.mode}"
        )
    print(f"{len(slower)} of {len(compared)} slower by more than {options.threshold:g}x")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
