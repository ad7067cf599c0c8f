"""Write the pages' tables and pictures from the results that are committed under ``benchmarks/``.

No measured number is typed into a page: before Sphinx reads its sources, this extension writes
``_generated/``, which the pages include. A measurement that a page argues from must be there, and
a build without it fails. The pipelines' results are reported where they exist.
"""

import importlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from statistics import median
from textwrap import indent
from typing import Any

from generated import COLOURS, dress, picture, short, svg, table, write
from matplotlib.figure import Figure
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

Row = dict[str, Any]

CORPORA = ("meld", "iemocap")
SCORED = ("dev", "test")
FLOOR_PICTURE = "The accuracies of the table above, drawn with their standard deviations."


def generate(app: Sphinx) -> None:
    """Write every generated file; those that would not change are left alone."""
    results = (Path(app.confdir) / app.config.committed_results).resolve()
    folder = Path(app.srcdir) / "_generated"
    folder.mkdir(exist_ok=True)

    floor = _read(results / "relative_floor--cpu.json", "bench_relative_floor.py")
    write(folder / "relative-floor.rst", relative_floor(floor))
    for theme in COLOURS:
        write(folder / f"relative-floor-{theme}.svg", relative_floor_picture(floor, theme))

    faults = _read(results / "released_faults--cpu.json", "bench_released_faults.py")
    write(folder / "released-losses.rst", released_faults(faults, LOSS_FAULTS))
    write(folder / "released-fusion.rst", released_faults(faults, FUSION_FAULTS))
    write(folder / "released-annotations.rst", released_annotations(faults))

    memories = [
        _read(results / f"relation_memory--{corpus}.json", "bench_relation_memory.py")
        for corpus in CORPORA
    ]
    write(folder / "relation-memory.rst", relation_memory(memories))
    for theme in COLOURS:
        write(folder / f"relation-memory-{theme}.svg", relation_memory_picture(memories, theme))
    clips = _read(results / "clips--cpu.json", "bench_clips.py")
    write(folder / "pipeline-preparation.rst", preparation(clips))
    write(folder / "pipeline-stages.rst", stages(clips))

    write(folder / "recipes.rst", recipes())
    write(folder / "check-kinds.rst", check_kinds())
    for corpus in CORPORA:
        experiment = _read(
            results / f"recommended_recipe--{corpus}.json", "bench_recommended_recipe.py"
        )
        write(folder / f"recommended-{corpus}.rst", recommended_recipe(experiment))
        path = results / f"pipeline--{corpus}--features.json"
        write(folder / f"results-{corpus}.rst", pipeline_results(corpus, path))


# The relative floor ------------------------------------------------------------------------------


def relative_floor(document: Row) -> str:
    """Tables of accuracy and of gradient norms: a line per definition, a column per training."""
    rows, count = document["rows"], document["seeds"]
    pieces = []
    for task in dict.fromkeys(row["task"] for row in rows):
        pieces.append(
            _floor_table(
                f"{task.capitalize()}: test accuracy in percent, mean ± standard deviation over "
                f"{count} seeds",
                document,
                task,
                lambda row: _percent(row["accuracy"]),
            )
        )
    for task in dict.fromkeys(row["task"] for row in rows):
        pieces.append(
            _floor_table(
                f"{task.capitalize()}: largest gradient norm of a run, mean over {count} seeds",
                document,
                task,
                lambda row: short(row["largest_gradient_norm"]["mean"]),
            )
        )
    pieces += [picture(f"relative-floor-{theme}.svg", theme, FLOOR_PICTURE) for theme in COLOURS]
    return "\n".join([*pieces, _provenance(document)])


def _floor_table(title: str, document: Row, task: str, cell: Callable[[Row], str]) -> str:
    rows = document["rows"]
    trainings = [training for training in _trainings(rows) if training[0] == task]
    heads = ["Start", "Correlation", *(_regime(*training[1:]) for training in trainings)]
    lines = [
        [
            *_definition_name(definition, document["chosen"]),
            *(cell(_find(rows, definition, training)) for training in trainings),
        ]
        for definition in _definitions(rows)
    ]
    return table(title, heads, lines)


def relative_floor_picture(document: Row, theme: str) -> bytes:
    """Draw the accuracies: a panel per training, a line per definition, the chosen one filled."""
    colours = COLOURS[theme]
    rows, chosen = document["rows"], document["chosen"]
    definitions, trainings = _definitions(rows), _trainings(rows)
    tasks = list(dict.fromkeys(task for task, _, _ in trainings))
    columns = len(trainings) // len(tasks)
    figure = Figure(figsize=(8.6, 2.9 * len(tasks)), layout="constrained", facecolor="none")
    panels = figure.subplots(len(tasks), columns, sharey=True, sharex="row", squeeze=False)
    for axes, training in zip(panels.flat, trainings, strict=True):
        dress(axes, colours)
        title = f"{training[0]}, {_regime(*training[1:])}"
        axes.set_title(title, loc="left", size=9, color=colours["ink"])
        for line, definition in enumerate(definitions):
            accuracy = _find(rows, definition, training)["accuracy"]
            axes.errorbar(
                100 * accuracy["mean"],
                line,
                xerr=100 * accuracy["standard_deviation"],
                fmt="o",
                markersize=5,
                color=colours["mark"],
                markerfacecolor=colours["mark"] if _is_chosen(definition, chosen) else "none",
                elinewidth=1.2,
            )
        axes.set_yticks(
            range(len(definitions)),
            [", ".join(_definition_name(definition, None)) for definition in definitions],
        )
        axes.set_ylim(len(definitions) - 0.5, -0.5)
    for axes in panels[-1]:
        axes.set_xlabel("Test accuracy, %", size=8.5, color=colours["muted"])
    return svg(figure)


Definition = tuple[str, float | None, float, float]
Training = tuple[str, float, int]


def _definitions(rows: Iterable[Row]) -> list[Definition]:
    """Start, eps, floor and the variation that a constant is pulled like, in order."""
    return list(
        dict.fromkeys(
            (row["initialisation"], row["eps"], row["floor"], row["constant_like"]) for row in rows
        )
    )


def _trainings(rows: Sequence[Row]) -> list[Training]:
    """Task, temperature and batch size, task after task."""
    found = {(row["task"], row["temperature"], row["batch_size"]) for row in rows}
    tasks = dict.fromkeys(row["task"] for row in rows)
    regimes = dict.fromkeys((row["temperature"], row["batch_size"]) for row in rows)
    ordered = [(task, *regime) for task, regime in product(tasks, regimes)]
    return [training for training in ordered if training in found]


def _find(rows: Iterable[Row], definition: Definition, training: Training) -> Row:
    for row in rows:
        if (
            row["initialisation"],
            row["eps"],
            row["floor"],
            row["constant_like"],
        ) == definition and (row["task"], row["temperature"], row["batch_size"]) == training:
            return row
    raise ExtensionError(
        f"relative_floor--cpu.json: expected a row for {definition} in {training}, got none; "
        "run the experiment to its end"
    )


def _regime(temperature: float, batch_size: int) -> str:
    return f"τ = {temperature:g}, B = {batch_size}"


def _definition_name(definition: Definition, chosen: Row | None) -> tuple[str, str]:
    start, eps, floor, constant_like = definition
    if eps is not None:
        return start, f"ε = {_constant(eps)}"
    name = f"δ = {_constant(floor)}, κ = {_constant(constant_like)}"
    if chosen is not None and _is_chosen(definition, chosen):
        name = f"**{name}**"
    return start, name


def _is_chosen(definition: Definition, chosen: Row) -> bool:
    _, eps, floor, constant_like = definition
    return eps is None and (floor, constant_like) == (chosen["floor"], chosen["constant_like"])


def _percent(measured: Row) -> str:
    return f"{100 * measured['mean']:.1f} ± {100 * measured['standard_deviation']:.1f}"


def _constant(value: float) -> str:
    return f"{value:g}".replace("e-0", "e-")


# The memory of relations --------------------------------------------------------------------------

MEMORY_PICTURE = "The gains of the tables above, drawn with their confidence intervals."


def relation_memory(documents: Sequence[Row]) -> str:
    """A table for each corpus of what memories gain, what they come to, and how it was measured."""
    pieces = []
    measured = [document for document in documents if _measured(document)]
    for document in measured:
        lines = []
        for row in _measured(document):
            student = f"{row['modality']}, batches of {row['batch_size']}"
            memory = row["memory_size"] if row["distilled"] else "labels alone"
            cells = [f"{100 * row['dev']['mean']:.2f}", f"{100 * row['test']['mean']:.2f}"]
            cells += [_gain(row[split], _is_plain(row)) for split in SCORED]
            lines.append([student, str(memory or "none"), *cells])
        seeds = min(row["seeds"] for row in _measured(document))
        heads = ["Student", "Memory", "Dev", "Test", "Gain on dev", "Gain on test"]
        title = (
            f"{document['corpus'].upper()}: weighted F1 in percent, means over {seeds} of "
            f"{document['seeds']} seeds"
        )
        pieces.append(table(title, heads, lines))
    pieces += [picture(f"relation-memory-{theme}.svg", theme, MEMORY_PICTURE) for theme in COLOURS]
    pieces.append(_memory_verdict(measured))
    pieces += [_left_out(document) for document in documents]
    pieces += [_provenance(document) for document in measured]
    return "\n".join(pieces)


def relation_memory_picture(documents: Sequence[Row], theme: str) -> bytes:
    """Draw the gains: a panel per corpus and batch size, a mark per student, memory and split."""
    colours = COLOURS[theme]
    documents = [document for document in documents if _measured(document)]
    panels = [
        (document, size)
        for document in documents
        for size in dict.fromkeys(row["batch_size"] for row in document["rows"])
    ]
    columns = len(panels) // len(documents)
    size = (8.6, 0.6 + 2.5 * len(documents))
    figure = Figure(figsize=size, layout="constrained", facecolor="none")
    grid = figure.subplots(len(documents), columns, sharex=True, squeeze=False)
    for axes, (document, size) in zip(grid.flat, panels, strict=True):
        dress(axes, colours)
        title = f"{document['corpus'].upper()}, batches of {size}"
        axes.set_title(title, loc="left", size=9, color=colours["ink"])
        rows = [row for row in _with_memory(document) if row["batch_size"] == size]
        for line, row in enumerate(rows):
            for shift, split, colour in ((-0.15, "dev", "mark"), (0.15, "test", "other")):
                axes.errorbar(
                    100 * row[split]["gain"],
                    line + shift,
                    xerr=100 * row[split]["interval"],
                    fmt="o",
                    markersize=4,
                    color=colours[colour],
                    elinewidth=1.2,
                    label=split if line == 0 else None,
                )
        axes.axvline(0.0, color=colours["muted"], linewidth=0.8)
        axes.set_yticks(
            range(len(rows)), [f"{row['modality']}, memory {row['memory_size']}" for row in rows]
        )
        axes.set_ylim(len(rows) - 0.5, -0.5)
    for axes in grid[-1]:
        axes.set_xlabel("Gain in weighted F1, points", size=8.5, color=colours["muted"])
    legend = figure.legend(
        *grid[0, 0].get_legend_handles_labels(),
        loc="outside upper right",
        ncols=2,
        frameon=False,
        fontsize=8,
    )
    for text in legend.get_texts():
        text.set_color(colours["ink"])
    return svg(figure)


def _memory_verdict(documents: Sequence[Row]) -> str:
    """How many intervals leave out zero, beside how many would by chance, and what that means."""
    rows = [row for document in documents for row in _with_memory(document)]
    gains = [row[split] for row in rows for split in SCORED]
    better, worse = (sum(_is_sure(gain, sign) for gain in gains) for sign in (1, -1))
    chance = (1 - documents[0]["confidence"]) * len(gains)
    smallest, largest = (
        choose(gains, key=lambda gain: float(gain["gain"])) for choose in (min, max)
    )
    # Chance would put half of its share on either side; gains of one student hang together.
    width = 100 * median(gain["interval"] for gain in gains)
    helps, harms = better > 2 * chance, worse > 2 * chance
    verdict = {
        (True, True): "A memory helps here and harms there; see which.",
        (True, False): "A memory helps.",
        (False, True): "A memory harms.",
        (False, False): "A memory makes no difference that can be told from chance.",
    }[helps, harms]
    return (
        f"**{verdict}** Of {len(gains)} gains, the interval of {better} lies above 0 and that of "
        f"{worse} below; if no memory made a difference, some {chance:.1f} in all would leave out "
        f"0. They go from {_gain(smallest, False)} to {_gain(largest, False)} points. Half of the "
        f"intervals are wider than ±{width:.2f}: what is smaller cannot be seen here.\n"
    )


def _left_out(document: Row) -> str:
    """Who was not measured, and why."""
    if not _measured(document):
        return (
            f"{document['corpus'].upper()} is not measured in this version; "
            f"``{document['command']}`` does it.\n"
        )
    there = {row["modality"] for row in document["rows"]}
    absent = [row for row in document["rates"] if row["modality"] not in there]
    names = " and ".join(dict.fromkeys(row["modality"] for row in absent))
    if not names:
        return ""
    commonest = document["commonest"]
    size = next(row["batch_size"] for row in absent if max(row["dev"].values()) <= commonest)
    return (
        f"The {names} students of {document['corpus'].upper()} are left out: in batches of {size} "
        f"they scored {100 * commonest:.2f} on dev at each of {len(absent[0]['dev'])} learning "
        "rates, as does one that always says the commonest label, and without a memory. Nothing "
        "can be compared there.\n"
    )


def _measured(document: Row) -> list[Row]:
    """The rows that have an interval, which takes two seeds."""
    return [row for row in document["rows"] if row["seeds"] > 1]


def _with_memory(document: Row) -> list[Row]:
    return [row for row in _measured(document) if row["memory_size"]]


def _is_plain(row: Row) -> bool:
    return row["distilled"] and not row["memory_size"]


def _is_sure(measured: Row, sign: int) -> bool:
    return bool(sign * measured["gain"] > measured["interval"])


def _gain(measured: Row, is_plain: bool) -> str:
    """A gain and its interval in points; bold if zero is not in it."""
    if is_plain:
        return ""
    text = f"{100 * measured['gain']:+.2f} ± {100 * measured['interval']:.2f}"
    text = text.replace("-", "\N{MINUS SIGN}")
    return f"**{text}**" if _is_sure(measured, 1) or _is_sure(measured, -1) else text


# Faults of the released code ---------------------------------------------------------------------

LOSS_FAULTS = {
    "equal_logits_7": "DIST over τ² for equal logits, [64, 7], τ = 4 (0 is right)",
    "equal_logits_1000": "The same, [64, 1000]",
    "equal_logits_50000": "The same, [64, 50000]",
    "zero_head_gradient": "Largest gradient entry for zero logits, [4, 7], τ = 4",
    "half_precision_nan": "NaN in three degenerate float16 batches",
    "features_at_1e20": "Batch similarity of features of magnitude 1e20, [8, 768]",
}
FUSION_FAULTS = {
    "company": "Largest change of a logit if an utterance comes alone, not in a batch of 32",
    "shift_at_1e18": "Share of NaN in a shift at magnitude 1e18 to 1e20, float32",
}
ANNOTATION_FAULTS = {
    "meld_train_utterances_with_control_characters": (
        "MELD training utterances with control characters in place of punctuation"
    ),
    "meld_train_dialogues_whose_first_speaker_is_not_the_first": (
        "MELD training dialogues whose first speaker is not given the first speaker token"
    ),
    "iemocap_train_utterances_beyond_nine_speaker_tokens": (
        "IEMOCAP training utterances whose speaker token is beyond the nine that are registered"
    ),
}


def released_faults(document: Row, faults: dict[str, str]) -> str:
    """A table of what the released formulas give, beside this library."""
    rows = [
        [text, short(document["rows"][key]["released"]), short(document["rows"][key]["telme_kd"])]
        for key, text in faults.items()
    ]
    heads = ["Case", "Released", "telme-kd"]
    return "\n".join([table("", heads, rows, words=1), _provenance(document)])


def released_annotations(document: Row) -> str:
    """A table of faults in the released annotation files and their reading."""
    rows = [
        [text, str(document["rows"][key]["released"]), str(document["rows"][key]["of"])]
        for key, text in ANNOTATION_FAULTS.items()
        if key in document["rows"]
    ]
    heads = ["Fault", "Count", "Of"]
    return "\n".join([table("", heads, rows, words=1), _provenance(document)])


# The pipelines' pace -----------------------------------------------------------------------------

WAYS = {
    "pass": "one pass for each film",
    "look": "each turn from its last key frame",
    "scan": "each turn from the film's beginning",
}


def preparation(document: Row) -> str:
    """A table of what the pictures of a turn take, a line for each way to them."""
    row = document["rows"]["preparation"]
    rows = []
    for way, name in WAYS.items():
        ratio = row.get(f"{way}_over_pass")
        asked = row["required"] if way == "scan" else None
        rows.append(
            [
                name,
                short(row[f"{way}_milliseconds_per_turn"]),
                "" if ratio is None else _times(ratio),
                *_verdict(ratio, asked),
            ]
        )
    width, height = row["film"]
    title = (
        f"Pictures of {row['turns']} turns in {row['films']} films of "
        f"{row['seconds_of_film']:.0f} s, {width} × {height}"
    )
    heads = ["Way", "ms a turn", "Over one pass", "Asked", "Verdict"]
    return "\n".join([table(title, heads, rows, words=1), _side_by_side(document)])


def stages(document: Row) -> str:
    """Tables of epochs that decode and compute everything anew, beside those that read it."""
    pieces = []
    for pictures, measured in document["rows"]["stages"].items():
        rows = [
            [
                f"{row['stage']}, {row['epochs']} epochs",
                short(1000 * row["anew_seconds"] / row["steps"]),
                short(1000 * row["kept_seconds"] / row["steps"]),
                _times(row["anew_over_kept"]),
                *_verdict(row["anew_over_kept"], row["required"]),
                short(row["fill_seconds"]),
                _times(row["with_filling"]),
            ]
            for row in measured
        ]
        heads = [
            *("Stage", "Anew, ms a step", "Kept, ms a step", "Ratio", "Asked", "Verdict"),
            *("Filling, s", "Ratio, filling included"),
        ]
        title = (
            f"{document['utterances']['train']} utterances of the synthetic MELD, pictures of "
            f"{pictures.replace(' x ', ' × ')}"
        )
        pieces.append(table(title, heads, rows, words=1))
    return "\n".join([*pieces, _side_by_side(document)])


def _verdict(ratio: float | None, required: float | None) -> tuple[str, str]:
    if ratio is None or required is None:
        return "", ""
    return f"≥ {_times(required)}", "met" if ratio >= required else "**missed**"


def _times(ratio: float) -> str:
    return f"{short(ratio)}×"


def _side_by_side(document: Row) -> str:
    """The provenance, with the machine: these figures are of its decoder and disk as well."""
    machine = document["machine"]
    versions = ", ".join(f"{name} {value}" for name, value in document["versions"].items())
    return (
        f"Measured with ``{document['command']}`` on an {machine['name']}; {machine['processes']} "
        f"processes decode ({versions}).\n"
    )


# The pipelines' recipes --------------------------------------------------------------------------


def recipes() -> str:
    """Two tables of every number of every recipe: those that differ, and those that do not."""
    columns: dict[str, dict[str, str]] = {}
    for corpus in CORPORA:
        module = importlib.import_module(f"examples.{corpus}.recipes")
        for recipe in module.RECIPES.values():
            columns[f"{corpus.upper()}, {recipe.name}"] = dict(_numbers(asdict(recipe)))
    names = dict.fromkeys(name for column in columns.values() for name in column)
    rows = [[name, *(column[name] for column in columns.values())] for name in names]
    alike = [[name, value] for name, value, *others in rows if {*others} <= {value}]
    differing = [row for row in rows if [*row[:2]] not in alike]
    return "\n".join(
        [
            table("Where the recipes differ", ["", *columns], differing, words=1),
            table("What they have in common", ["", "All"], alike, words=1),
        ]
    )


def _numbers(recipe: Row, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The leaves of a recipe, named by where they stand."""
    for name, value in recipe.items():
        label = prefix + name.replace("num_", "number of ").replace("_", " ")
        if isinstance(value, dict):
            inner = prefix if name == "optimisation" else f"{label.capitalize()}: "
            yield from _numbers(value, inner)
        elif prefix:
            yield label, "none" if value is None else _leaf(value)


def _leaf(value: object) -> str:
    return _constant(value) if isinstance(value, float) else str(value)


def recommended_recipe(document: Row) -> str:
    """What each change of one number gains on dev, and what all that are taken gain together."""
    rows = []
    for row in document["rows"]:
        gain, error = 100 * row["gain"], 100 * row["standard_error"]
        rows.append(
            [
                f"**{row['change']}**" if row["taken"] else row["change"],
                f"{100 * row['mean']:.2f}",
                f"{gain:+.2f} ± {error:.2f}".replace("-", "\N{MINUS SIGN}") if error else "",
            ]
        )
    heads = ["Change", "Weighted F1 on dev", "Gain ± its standard error"]
    title = f"{document['corpus'].upper()}: means over {document['seeds']} seeds, in percent"
    return "\n".join([table(title, heads, rows, words=1), _provenance(document)])


# The check of a corpus ---------------------------------------------------------------------------


def check_kinds() -> str:
    """A table of every kind of finding."""
    try:
        kinds = importlib.import_module("examples.erc.corpus_check").KINDS
    except ModuleNotFoundError as error:
        return (
            f".. note::\n\n   The kinds of findings are left out: this build has no package "
            f"{error.name}, which the pipelines need.\n"
        )
    rows = [[name, kind.severity, kind.meaning] for name, kind in kinds.items()]
    return table("", ["Finding", "Severity", "Meaning"], rows, words=3)


# The pipelines' results --------------------------------------------------------------------------


def pipeline_results(corpus: str, path: Path) -> str:
    """The tables of a committed pipeline run, or a note that says why there are none."""
    if not path.is_file():
        return f".. note::\n\n   No results for {corpus.upper()} are committed in this version.\n"
    try:
        report = importlib.import_module("examples.erc.report")
    except ModuleNotFoundError as error:
        return (
            f".. note::\n\n   The results are left out: this build has no package {error.name}, "
            "which the pipelines need.\n"
        )
    document = json.loads(path.read_text(encoding="utf-8"))
    versions = ", ".join(f"{name} {value}" for name, value in document["versions"].items())
    made = f"From ``{document['command']}``, recipe *{document['recipe']}* ({versions})."
    tables: str = report.rst_tables(document)
    unbroken = tables.replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")
    return ".. container:: results\n\n" + indent(f"{unbroken}\n{made}\n", "   ")


# reStructuredText --------------------------------------------------------------------------------


def _provenance(document: Row) -> str:
    versions = ", ".join(f"{name} {value}" for name, value in document["versions"].items())
    device, command = document["device"].upper(), document["command"]
    return f"Measured on the {device} with ``{command}`` ({versions}).\n"


# Files -------------------------------------------------------------------------------------------


def _read(path: Path, script: str) -> Row:
    """Read a result file that a page cannot do without."""
    if not path.is_file():
        raise ExtensionError(
            f"{path}: expected the committed result that a page shows, found no such file; "
            f"run `python benchmarks/{script}` and commit what it writes"
        )
    try:
        document: Row = json.loads(path.read_text(encoding="utf-8"))
        missing = {"rows", "versions", "command", "device"} - document.keys()
    except (ValueError, AttributeError) as error:
        raise ExtensionError(f"{path}: expected a JSON object ({error}); restore it") from error
    if missing:
        raise ExtensionError(f"{path}: expected {sorted(missing)} too; run {script} again")
    return document


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the extension."""
    version = importlib.import_module("telme_kd").__version__
    app.add_config_value("committed_results", f"../benchmarks/results/{version}", "env", (str,))
    app.connect("builder-inited", generate)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
