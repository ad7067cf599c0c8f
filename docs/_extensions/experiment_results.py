"""Write the tables and plots of the experiments from the results that are committed.

Nothing on the page is typed: each corpus has one file, and a build without it says so.
"""

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from generated import picture, write
from sphinx.application import Sphinx

if TYPE_CHECKING:  # what the pipelines need is not needed to build the documentation
    from examples.experiments.outcome import Outcome
    from examples.experiments.report import Exhibit

CORPORA = ("meld", "iemocap")
UNBROKEN = "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}"


def generate(app: Sphinx) -> None:
    """Write every generated file; those that would not change are left alone."""
    results = (Path(app.confdir) / app.config.committed_results).resolve()
    folder = Path(app.srcdir) / "_generated"
    folder.mkdir(exist_ok=True)
    for corpus in CORPORA:
        path = results / f"experiments--{corpus}--features.json"
        write(folder / f"experiments-{corpus}.rst", page(corpus, path, folder))


def page(corpus: str, path: Path, folder: Path) -> str:
    """The tables of a corpus with what they show, or a note that says why there are none.

    Args:
        corpus: In lower case.
        path: The committed results.
        folder: Where plots are written.

    Returns:
        reStructuredText.
    """
    if not path.is_file():
        return note(f"No experiments on {corpus.upper()} are committed in this version.")
    try:
        report = importlib.import_module("examples.experiments.report")
    except ModuleNotFoundError as error:
        return note(
            f"The experiments are left out: this build has no package {error.name}, which they "
            "need."
        )
    outcome = importlib.import_module("examples.experiments.outcome").read(
        json.loads(path.read_text(encoding="utf-8"))
    )
    pieces = [
        piece for shown in report.exhibits(outcome) for piece in exhibit(shown, corpus, folder)
    ]
    return "\n".join([*pieces, *provenance(outcome)])


def exhibit(shown: "Exhibit", corpus: str, folder: Path) -> Iterator[str]:
    """A heading, and for each table what it shows, itself and its plot."""
    exports = importlib.import_module("examples.experiments.exports")
    tables = importlib.import_module("examples.experiments.tables")
    title = f"{shown.experiment.paper}: {shown.experiment.title}"
    yield from (title, '"' * len(title), "")
    for table, finding in shown.tables:
        for text in filter(None, (finding, table.note)):
            yield from (exports.escape_rst(text), "")
        text = exports.rst(tables.narrow(table), corpus.upper())
        yield text.replace(" ± ", UNBROKEN)
    for drawn in shown.pictures:
        for theme in ("light", "dark"):
            name = f"experiments-{corpus}-{drawn.name}-{theme}.png"
            write(folder / name, getattr(drawn, theme))
            yield picture(name, theme, drawn.alt)


def provenance(outcome: "Outcome") -> Iterator[str]:
    """What was left out, and where all of it comes from."""
    exports = importlib.import_module("examples.experiments.exports")
    for name, reason in outcome.left_out.items():
        yield from (exports.escape_rst(f"Left out: {name}; {reason}."), "")
    results = outcome.results
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    yield f"From ``{results.command}``, recipe *{results.recipe}* ({versions})."
    yield ""


def note(text: str) -> str:
    """A note of one sentence."""
    return f".. note::\n\n   {text}\n"


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the extension; where the results are is another's setting."""
    app.setup_extension("committed_results")
    app.connect("builder-inited", generate)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
