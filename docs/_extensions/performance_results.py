"""Write the performance page's tables from the committed benchmarks; its pictures are drawn beside.

Nothing has to be there: what was not measured is said to be so, with the command that measures it.
"""

import importlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from textwrap import indent
from typing import Any

import performance_pictures as pictures
from generated import COLOURS, picture, short, table, write
from sphinx.application import Sphinx

Row = dict[str, Any]

KINDS = {"cpu": "CPU", "cuda": "GPU"}
CLOCKS = {"wall": "wall clock", "cold": "cold cache", "graph": "graph replay"}
MODES = {
    "forward": "Forward, no graph",
    "forward_with_graph": "Forward",
    "backward": "Backward",
    "full": "Both",
}
NOTHING = "\N{EN DASH}"


def generate(app: Sphinx) -> None:
    """Write every generated file; those that would not change are left alone."""
    results = importlib.import_module("benchmarks.results")
    targets = importlib.import_module("benchmarks.targets")
    committed = (Path(app.confdir) / app.config.committed_results).resolve()
    folder = Path(app.srcdir) / "_generated"
    folder.mkdir(exist_ok=True)

    documents = results.documents(committed)
    write(folder / "performance-targets.rst", target_tables(targets.evaluate(documents), targets))
    for operator in results.OPERATORS:
        measured = [document for document in documents if document["operator"] == operator]
        pieces = []
        for document in measured:
            names = _draw(folder, document)
            pieces.append(device_results(document, names))
        for kind in KINDS:
            if not any(document["machine"]["kind"] == kind for document in measured):
                pieces.append(not_measured(kind, results.command(operator)))
        write(folder / f"performance-{operator}.rst", "\n".join(pieces))


def _draw(folder: Path, document: Row) -> dict[str, str]:
    """Draw a device's pictures in both themes; their stems and what they show."""
    stem = f"performance-{document['operator']}-{document['device']}"
    drawers: dict[str, tuple[str, Callable[[Row, str], bytes | None]]] = {
        f"{stem}-ratios": (
            "Speed-up over the eager reference, and peak memory relative to it, by size.",
            pictures.ratios,
        ),
        f"{stem}-memory": ("Peak memory by batch size.", pictures.memory),
    }
    names = {}
    for name, (alternative, drawer) in drawers.items():
        for theme in COLOURS:
            drawn = drawer(document, theme)
            if drawn is not None:
                write(folder / f"{name}-{theme}.svg", drawn)
                names[name] = alternative
    return names


# Targets -----------------------------------------------------------------------------------------


def target_tables(outcomes: Sequence[Any], targets: Any) -> str:  # noqa: ANN401 - a module
    """A table for each kind of device: what was asked, what was measured, and the verdict."""
    devices: dict[str, str] = {}  # what was not measured stands with the first device of its kind
    for outcome in outcomes:
        devices[outcome.target.kind] = devices.get(outcome.target.kind) or outcome.device
    groups: dict[tuple[str, ...], list[Any]] = {}
    for outcome in outcomes:
        target = outcome.target
        device = outcome.device or devices[target.kind]
        key = (target.kind, device, target.what, target.measure, target.against)
        groups.setdefault(key, []).append(outcome)
    verdicts = {key: _verdict(group) for key, group in groups.items()}
    counts = Counter(verdicts.values())
    pieces = [
        f"Of {len(groups)} targets {counts['met']} are met, {counts['missed']} are missed, and "
        f"{counts['not measured']} were not measured.\n"
    ]
    for kind, device in dict.fromkeys(key[:2] for key in groups):
        rows = [
            _target_row(group, verdicts[key], targets)
            for key, group in groups.items()
            if key[:2] == (kind, device)
        ]
        title = f"{KINDS[kind]}: {device or 'not measured'}"
        heads = ["Forward and backward", "Compared", "Asked", "Measured", "Verdict"]
        pieces.append(table(title, heads, rows))
    return _small("\n".join(pieces))


def _verdict(group: Iterable[Any]) -> str:
    statuses = {outcome.status for outcome in group}
    return next(word for word in ("missed", "not measured", "met") if word in statuses)


def _target_row(group: Sequence[Any], verdict: str, targets: Any) -> list[str]:  # noqa: ANN401
    target = group[0].target
    asked: str = targets.required(target)
    if target.aim is not None:
        asked += f", aim {targets.shown(target, target.aim)}"
    measured = []
    for outcome in group:
        if outcome.figure is None:
            continue
        figure = targets.shown(target, outcome.figure)
        if len(group) > 1:
            figure += f" {outcome.target.clock}"
        if outcome.one_thread is not None:
            figure += f" ({targets.shown(target, outcome.one_thread)} on one thread)"
        measured.append(figure)
    shown = f"**{verdict}**" if verdict == "missed" else verdict
    return [unbroken(target.what), _compared(target), asked, ", ".join(measured) or NOTHING, shown]


def _compared(target: Any) -> str:  # noqa: ANN401 - a target of a module that is loaded late
    by = "eager" if target.against == "reference" else target.against
    by = "``torch.compile``" if by == "reference compiled" else by
    words = {
        "speed-up": f"speed-up over {by}",
        "time": f"time over {by}",
        "memory": f"peak memory over {by}",
        "extra memory": "extra memory per item",
    }
    return words.get(target.measure, f"{target.measure}, {by}")


# An operator on a device -------------------------------------------------------------------------


def device_results(document: Row, names: dict[str, str]) -> str:
    """Pictures and tables of an operator on a device."""
    title = f"{KINDS[document['machine']['kind']]}: {document['machine']['name']}"
    pieces = [title, "^" * len(title), ""]
    for name, alternative in names.items():
        pieces += [picture(f"{name}-{theme}.svg", theme, alternative) for theme in COLOURS]
    for clock in _clocks(document):
        pieces.append(_small(times(document, clock)))
    pieces.append(_folded("Each pass by itself", modes(document)))
    pieces.append(
        _folded("Memory, launches, and shares of what the device can do", costs(document))
    )
    pieces.append(_folded("Error against float64", errors(document)))
    reasons = list(missing(document))
    if reasons:
        pieces.append(_folded("What has no figure, and why", "\n".join(reasons) + "\n"))
    return "\n".join([*pieces, _provenance(document)])


def not_measured(kind: str, command: str) -> str:
    """What stands where a device's results would."""
    where = "" if kind == "cpu" else " on a machine with a CUDA device"
    return (
        f"{KINDS[kind]}\n{'^' * len(KINDS[kind])}\n\n"
        f"Not measured in this version. ``{command} --device {kind}`` measures it{where}.\n"
    )


def times(document: Row, clock: str) -> str:
    """Milliseconds of forward and backward, and the speed-ups, for every case."""
    names = [name for name in _providers(document) if _has_clock(document, name, clock)]
    others = [name for name in names if name != "reference"]
    cpu = document["machine"]["kind"] == "cpu"
    heads = ["Case"]
    if cpu:
        heads.append("Threads")
    heads += [f"{_title(name)}, ms" for name in names]
    heads += [f"{_title(name)} over eager" for name in others]
    rows = []
    for row in document["rows"]:
        seconds = {name: _full(row, name, clock) for name in names}
        if not any(seconds.values()):
            continue
        line = [case_label(row)] + ([str(row["threads"])] if cpu else [])
        line += [short(1e3 * value) if value else NOTHING for value in seconds.values()]
        eager = seconds.get("reference")
        for name in others:
            value = seconds[name]
            line.append(f"{eager / value:.3g}×" if eager and value else NOTHING)
        rows.append(line)
    title = f"Forward and backward, {CLOCKS[clock]}, median"
    return table(title, heads, rows, words=1)


def modes(document: Row) -> str:
    """Milliseconds of every pass, with the usual number of threads."""
    heads = ["Case", "By", *MODES.values(), "Both, 20 % to 80 %"]
    pieces = []
    for clock in _clocks(document):
        rows = []
        for row, name, found in _found(document):
            by_mode = found.get("seconds", {}).get(clock)
            if by_mode is None:
                continue
            middle = [by_mode[mode]["p50"] if mode in by_mode else None for mode in MODES]
            line = [case_label(row), _title(name)]
            line += [NOTHING if value is None else short(1e3 * value) for value in middle]
            low, high = (short(1e3 * by_mode["full"][cut]) for cut in ("p20", "p80"))
            rows.append([*line, f"{low} to {high}"])
        pieces.append(table(f"Milliseconds, {CLOCKS[clock]}, median", heads, rows))
    return "\n".join(pieces)


def costs(document: Row) -> str:
    """Memory, launches and shares of the measured ceilings."""
    cpu = document["machine"]["kind"] == "cpu"
    heads = ["Case", "By", "Peak", "Saved for backward", "Operators" if cpu else "Launches"]
    found_rates = {key for _, _, found in _found(document) for key in found}
    rates = [rate for rate in ("copy", "matmul") if f"share_of_{rate}_rate" in found_rates]
    heads += [f"Of the {rate} rate" for rate in rates]
    rows = []
    for row, name, found in _found(document):
        line = [case_label(row), _title(name)]
        line += [_bytes(found.get(key)) for key in ("peak_bytes", "saved_bytes")]
        line.append(str(found.get("launches", NOTHING)))
        line += [_share(found.get(f"share_of_{rate}_rate")) for rate in rates]
        rows.append(line)
    title = "Peak beyond what was there before; shares of the least traffic and arithmetic possible"
    return table(title, heads, rows)


def errors(document: Row) -> str:
    """Relative errors of output and gradient."""
    heads = ["Case", "By", "Output, largest", "root mean square"]
    heads += ["Gradient, largest", "root mean square", "Draws"]
    rows = []
    for row, name, found in _found(document):
        error = found.get("error", {})
        if "draws" not in error:
            continue
        line = [case_label(row), _title(name)]
        line += [
            short(error[part][kind]) for part in ("output", "gradient") for kind in error[part]
        ]
        rows.append([*line, str(error["draws"])])
    return table("Norm of the deviation over the norm of the truth", heads, rows)


def missing(document: Row) -> Iterator[str]:
    """A line for every provider and reason, with the cases it holds for."""
    cases: dict[tuple[str, str], list[str]] = {}
    rows = _usual(document)
    for row in rows:
        if "reason" in row:
            cases.setdefault(("all", row["reason"]), []).append(case_label(row))
        for name, found in row["providers"].items():
            reasons = {"": found.get("reason"), "errors": found.get("error", {}).get("reason")}
            reasons["memory"] = found.get("memory_reason")
            for clock, reason in found.get("clock_reasons", {}).items():
                reasons[CLOCKS[clock]] = reason
            for what, reason in reasons.items():
                if reason:
                    who = f"{_title(name)}, {what}" if what else _title(name)
                    cases.setdefault((who, reason), []).append(case_label(row))
    for (who, reason), labels in cases.items():
        where = "every case" if len(labels) == len(rows) else "; ".join(labels)
        yield f"- {who} ({where}): ``{reason.replace('`', '')}``"


# Words and numbers -------------------------------------------------------------------------------


def case_label(row: Row) -> str:
    """A case in words: ``released formula, 64 × 7``."""
    dtype = {"float32": "", "bfloat16": "bf16", "float16": "fp16"}[row["dtype"]]
    words = [row["variant"], f"{' × '.join(map(str, row['shape']))} {dtype}".rstrip()]
    return unbroken(", ".join(word for word in words if word))


def unbroken(text: str) -> str:
    """A size that stays on one line."""
    return text.replace(" × ", "\N{NO-BREAK SPACE}×\N{NO-BREAK SPACE}")


def _title(provider: str) -> str:
    if provider == "reference":
        return "Eager"
    return (
        provider.replace("reference compiled", "Compiled") if " " in provider else f"``{provider}``"
    )


def _usual(document: Row) -> list[Row]:
    usual = document["machine"]["threads"][0]
    return [row for row in document["rows"] if row["threads"] == usual]


def _found(document: Row) -> Iterator[tuple[Row, str, Row]]:
    """What was found of every provider that could serve a case, with the usual threads."""
    for row in _usual(document):
        for name, found in row["providers"].items():
            if "seconds" in found:
                yield row, name, found


def _providers(document: Row) -> list[str]:
    return list(dict.fromkeys(name for row in document["rows"] for name in row["providers"]))


def _clocks(document: Row) -> list[str]:
    used = {clock for _, _, found in _found(document) for clock in found["seconds"]}
    return [clock for clock in CLOCKS if clock in used]


def _has_clock(document: Row, provider: str, clock: str) -> bool:
    return any(_full(row, provider, clock) for row in document["rows"])


def _full(row: Row, provider: str, clock: str) -> float | None:
    measured: float | None = (
        row["providers"]
        .get(provider, {})
        .get("seconds", {})
        .get(clock, {})
        .get("full", {})
        .get("p50")
    )
    return measured


def _bytes(count: int | None) -> str:
    if count is None:
        return NOTHING
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"


def _share(share: float | None) -> str:
    return NOTHING if share is None else f"{100 * share:.2g} %"


def _provenance(document: Row) -> str:
    versions = ", ".join(f"{name} {value}" for name, value in document["versions"].items())
    usual = str(document["machine"]["threads"][0])
    ceilings = document["ceilings"][usual]
    rates = [f"copies {ceilings['copy_bytes_per_second'] / 1e9:.3g} GB/s"]
    rates += [
        f"multiplies {name} matrices at {short(rate / 1e9)} GFLOP/s"
        for name, rate in ceilings["matmul_flop_per_second"].items()
    ]
    threads = f" with {usual} threads" if document["machine"]["kind"] == "cpu" else ""
    return (
        f"Measured with ``{document['command']}`` ({versions}). The device{threads} "
        f"{' and '.join(rates)}.\n"
    )


# reStructuredText --------------------------------------------------------------------------------


def _small(content: str) -> str:
    return ".. container:: results\n\n" + indent(content, "   ")


def _folded(title: str, content: str) -> str:
    """Content that shows when its title is clicked."""
    return (
        f".. raw:: html\n\n   <details><summary>{title}</summary>\n\n"
        f"{_small(content)}\n.. raw:: html\n\n   </details>\n"
    )


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the extension; :mod:`committed_results` adds its option."""
    app.setup_extension("committed_results")
    app.connect("builder-inited", generate)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
