"""What the operators are to reach, and whether the results show it.

``python -m benchmarks.targets [FOLDER]`` prints the table for a folder of result files.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks import results
from benchmarks.failures import OUT_OF_MEMORY
from benchmarks.providers import COMPILED, FUSED, is_compiled
from benchmarks.results import Document
from benchmarks.workload import REFERENCE, bytes_per_element

Measure = Literal[
    "speed-up", "time", "memory", "share of copy rate", "share of matmul rate", "extra memory"
]
Clock = Literal["wall", "cold", "graph"]
Status = Literal["met", "missed", "not measured"]

_SMALL_REGIME: tuple[Clock, ...] = ("graph", "wall")  # the launches cost more than the work
# Extra memory is O(B) if it is at most so much for each item, whatever the batch and the width.
_BYTES_PER_ITEM = 256


@dataclass(frozen=True)
class Target:
    """A figure to reach.

    Attributes:
        what: the operator and the size, for the reader.
        operator: whose result file has it.
        kind: ``"cpu"`` or ``"cuda"``.
        case: the row of the result file.
        measure: what is compared. ``"speed-up"`` is the baseline's time over the operator's,
            ``"time"`` and ``"memory"`` the operator's over the baseline's.
        against: the baseline's provider, or in words what the figure is a share of.
        required: the figure to reach or, of times and memory, not to exceed.
        clock: whose time it is.
        aim: what would be better still.
    """

    what: str
    operator: str
    kind: Literal["cpu", "cuda"]
    case: str
    measure: Measure
    against: str
    required: float
    clock: Clock = "wall"
    aim: float | None = None

    @property
    def at_most(self) -> bool:
        """Whether less is better."""
        return self.measure in ("time", "memory", "extra memory")


@dataclass(frozen=True)
class Outcome:
    """A target, what was measured, and where.

    Attributes:
        target: the target.
        status: whether it was met.
        figure: what was measured, if it was.
        note: why it was not, or what else to know.
        device: the device's name; empty if there were no results.
        one_thread: the same figure with one thread, where the CPU usually has more.
    """

    target: Target
    status: Status
    figure: float | None = None
    note: str = ""
    device: str = ""
    one_thread: float | None = None


def targets() -> Iterator[Target]:
    """Every target, the CPU's first."""
    for batch in (4, 64, 256):
        name, case = f"DIST, {batch} × 7", f"{batch}x7 float32"
        yield Target(name, "dist", "cpu", case, "speed-up", REFERENCE, 2.5)
        yield Target(name, "dist", "cpu", case, "speed-up", COMPILED, 1.0)
    for batch, ratio in ((256, 2.5), (2048, 3.0)):
        name, case = f"DIST, {batch} × 1000", f"{batch}x1000 float32"
        yield Target(name, "dist", "cpu", case, "speed-up", REFERENCE, ratio, aim=4.0)
        yield Target(name, "dist", "cpu", case, "speed-up", COMPILED, 1.0, aim=1.5)
    name, operator, case = "Batch similarity, 4096 × 768", "batch_similarity", "4096x768 float32"
    yield Target(name, operator, "cpu", case, "speed-up", REFERENCE, 1.0)
    yield Target(name, operator, "cpu", case, "memory", REFERENCE, 0.25)
    yield Target(
        "Gate-and-shift tail, 64 × 768",
        "fusion",
        "cpu",
        "tail 64x768 float32",
        "speed-up",
        REFERENCE,
        1.5,
    )

    for batch, classes in ((4, 6), (4, 7), (64, 7), (256, 7)):
        name, case = f"DIST, {batch} × {classes}", f"{batch}x{classes} float32"
        for against, ratio in ((REFERENCE, 10.0), (COMPILED, 3.0)):
            for clock in _SMALL_REGIME:
                yield Target(name, "dist", "cuda", case, "speed-up", against, ratio, clock)
    name, case = "DIST, 4096 × 128256 bf16", "4096x128256 bfloat16"
    yield Target(
        name, "dist", "cuda", case, "share of copy rate", "7 N elements moved", 0.7, clock="cold"
    )
    yield Target(name, "dist", "cuda", case, "speed-up", REFERENCE, 10.0, clock="cold")
    yield Target(name, "dist", "cuda", case, "memory", REFERENCE, 0.2)
    name, case = "Batch similarity, 65536 × 768 bf16", "65536x768 bfloat16"
    yield Target(
        name,
        "batch_similarity",
        "cuda",
        case,
        "share of matmul rate",
        "10 B² d FLOP",
        0.5,
        clock="cold",
    )
    yield Target(
        name,
        "batch_similarity",
        "cuda",
        case,
        "extra memory",
        "bytes per item, beyond the gradient",
        _BYTES_PER_ITEM,
    )
    for batch in (4, 16, 64, 256):
        for clock in _SMALL_REGIME:
            yield Target(
                f"Fusion head, {batch} × 768",
                "fusion",
                "cuda",
                f"attention head {batch}x768 float32",
                "speed-up",
                REFERENCE,
                2.0,
                clock=clock,
            )
    name, case = "Linear DIST, 8192 × 4096 × 128256 bf16", "8192x4096x128256 bfloat16"
    yield Target(name, "linear_dist", "cuda", case, "time", REFERENCE, 1.5, clock="cold")
    yield Target(name, "linear_dist", "cuda", case, "memory", REFERENCE, 0.1)


def evaluate(documents: Sequence[Document]) -> list[Outcome]:
    """The outcome of every target on every device of its kind that there are results of."""
    outcomes = []
    for target in targets():
        fitting = [
            document
            for document in documents
            if document["operator"] == target.operator
            and document["machine"]["kind"] == target.kind
        ]
        outcomes += [_outcome(target, document) for document in fitting]
        if not fitting:
            outcomes.append(Outcome(target, "not measured", note="no results"))
    return outcomes


def _outcome(target: Target, document: Document) -> Outcome:
    device = document["machine"]["name"]
    threads = document["machine"]["threads"][0]
    row = results.find(document["rows"], target.case, threads)
    if row is None or "reason" in row:
        reason = "no such case in the results" if row is None else row["reason"]
        return Outcome(target, "not measured", note=reason, device=device)
    try:
        figure, note = _figure(target, row)
    except _NotMeasured as missing:
        return Outcome(target, "not measured", note=str(missing), device=device)
    met = figure <= target.required if target.at_most else figure >= target.required
    return Outcome(
        target, "met" if met else "missed", figure, note, device, _one_thread(target, document)
    )


def _one_thread(target: Target, document: Document) -> float | None:
    row = results.find(document["rows"], target.case, 1)
    if target.kind != "cpu" or document["machine"]["threads"][0] == 1 or row is None:
        return None
    try:
        return _figure(target, row)[0]
    except _NotMeasured:
        return None


class _NotMeasured(Exception):
    """Why a target has no figure."""


def _figure(target: Target, row: Document) -> tuple[float, str]:
    fused = FUSED[target.kind]
    if target.measure in ("speed-up", "time"):
        baseline = _baseline(target, row)
        ours = _seconds(row, fused, target.clock)
        theirs = _seconds(row, baseline, target.clock)
        note = "" if baseline == target.against else f"against {baseline}"
        return (theirs / ours if target.measure == "speed-up" else ours / theirs), note
    if target.measure == "memory":
        return _peak(row, fused) / _peak(row, target.against), ""
    if target.measure == "extra memory":
        elements = row["shape"][0] * row["shape"][1]
        gradient = elements * bytes_per_element(row["dtype"])
        failed = row["providers"].get(REFERENCE, {}).get("reason") == OUT_OF_MEMORY
        note = "where the reference runs out of memory" if failed else ""
        return (_peak(row, fused) - gradient) / row["shape"][0], note
    _seconds(row, fused, target.clock)
    share = "plan_" + target.measure.replace(" ", "_")
    found = row["providers"][fused].get(share)
    if found is None:
        raise _NotMeasured(f"no {target.measure}")
    return float(found), ""


def _baseline(target: Target, row: Document) -> str:
    """The provider to compare with; of the compiler's modes the fastest on this clock."""
    if target.against != COMPILED:
        return target.against
    times = {
        name: found["seconds"][target.clock]["full"]["p50"]
        for name, found in row["providers"].items()
        if is_compiled(name) and target.clock in found.get("seconds", {})
    }
    return min(times, key=lambda name: times[name], default=COMPILED)


def _seconds(row: Document, provider: str, clock: str) -> float:
    found = row["providers"].get(provider, {"reason": "not tried"})
    if clock in found.get("seconds", {}):
        return float(found["seconds"][clock]["full"]["p50"])
    reason = found.get("reason") or found.get("clock_reasons", {}).get(clock, f"no {clock} clock")
    raise _NotMeasured(f"{provider}: {reason}")


def _peak(row: Document, provider: str) -> float:
    found = row["providers"].get(provider, {"reason": "not tried"})
    if "peak_bytes" in found:
        return float(found["peak_bytes"])
    reason = found.get("reason") or found.get("memory_reason", "no memory figure")
    raise _NotMeasured(f"{provider}: {reason}")


# In words ----------------------------------------------------------------------------------------


def required(target: Target) -> str:
    """What a target asks for: ``≥ 2.5×``."""
    return f"{'≤' if target.at_most else '≥'} {shown(target, target.required)}"


def shown(target: Target, figure: float) -> str:
    """A figure in its target's unit."""
    if target.measure in ("speed-up", "time"):
        return f"{figure:.3g}×"
    if target.measure == "extra memory":
        return f"{figure:,.0f} B"
    return f"{100 * figure:.3g} %"


def report(outcomes: Iterable[Outcome]) -> str:
    """The outcomes, one a line, with the count of each status."""
    lines, counts = [], dict.fromkeys(("met", "missed", "not measured"), 0)
    for outcome in outcomes:
        target = outcome.target
        counts[outcome.status] += 1
        figure = "" if outcome.figure is None else f" {shown(target, outcome.figure)}"
        clock = f", {target.clock} clock" if target.measure in ("speed-up", "time") else ""
        note = f" ({outcome.note})" if outcome.note else ""
        lines.append(
            f"{outcome.status:>12}{figure:>8}  {required(target):<8} {target.kind}: {target.what}: "
            f"{target.measure} against {target.against}{clock}{note}"
        )
    lines.append(", ".join(f"{count} {status}" for status, count in counts.items()))
    return "\n".join(lines)


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else results.RESULTS
    print(report(evaluate(results.documents(folder))))
