"""The command line of the experiments, with the options of the pipeline."""

from importlib import import_module
from pathlib import Path
from typing import Any

import click

from examples.erc.command import make_command
from examples.erc.ending import guard
from examples.erc.recipe import Recipe
from examples.erc.training_options import settle_recipe, source_opener, typed_command

# As in the pipeline's command: whatever needs PyTorch is imported where it is used.

CORPORA = {"meld": "MELD", "iemocap": "IEMOCAP"}

NAMES = (
    "comparison",
    "ablation",
    "modalities",
    "teacher",
    "prompt",
    "students",
    "classes",
    "confusions",
)
"""As in :mod:`examples.experiments.catalogue`, which needs PyTorch."""

ALL = "all"

_OUTPUT = click.Option(
    ["--output"],
    type=click.Path(path_type=Path),
    help="The run folder, shared with the pipeline, whose stages are taken from there; reports go "
    "to experiments/NAME in it.  [default: runs/CORPUS-features, -raw or -synthetic]",
)


def _run(context: click.Context, /, **options: Any) -> None:  # noqa: ANN401
    guard(context, lambda: _work(options, typed_command("examples.experiments", context)))


def _work(options: dict[str, Any], typed: str) -> None:
    corpus: str = options["corpus"]
    kind, open_source = source_opener(corpus, CORPORA[corpus], options)
    folder: Path = options["output"] or Path("runs") / f"{corpus}-{kind}"
    recipe: Recipe = import_module(f"examples.{corpus}.recipes").RECIPES[options["recipe"]]

    from examples.erc import processes
    from examples.erc.training import Hardware
    from examples.experiments import report, running

    hardware = Hardware(options["device"], options["mixed_precision"], options["accumulate"])
    if kind != "raw":
        import torch

        torch.set_num_threads(1)  # as in the pipeline
    source = processes.in_turn(lambda: open_source(folder))
    experiments, left_out = running.choose(options["name"], source)
    if processes.first():
        for name, reason in left_out.items():
            click.echo(f"{name} is left out: {reason}", err=True)
    results = running.run(
        source,
        settle_recipe(recipe, source, options),
        experiments,
        range(options["seeds"]),
        folder,
        hardware,
        typed,
        name=options["name"],
        left_out=left_out,
        checkpoint_every=options["checkpoint_every"],
    )
    if processes.first():
        page = report.write(results, folder / running.FOLDER / options["name"])
        click.echo(f"\n{report.summary(results)}\n\n{page}")
    processes.leave()


def _parameters() -> list[click.Parameter]:
    """The name, the corpus, and every option of the pipeline."""
    shared = make_command("corpus", "a corpus").params
    return [
        click.Argument(["name"], metavar="NAME", type=click.Choice([*NAMES, ALL])),
        click.Option(
            ["--corpus"], type=click.Choice([*CORPORA]), required=True, help="Whose dialogues."
        ),
        *(_OUTPUT if option.name == "output" else option for option in shared),
    ]


command = click.Command(
    "experiments",
    params=_parameters(),
    callback=click.pass_context(_run),
    context_settings={"max_content_width": 100},
    help=f"""Train what a table or a figure of the TelME paper compares, and report it.

    NAME is one of {", ".join(NAMES)}, or {ALL} for all that the source is good for.

    Say what to train on with exactly one of --features, --raw and --synthetic. Every system is
    trained once for a seed, whichever experiments need it; what is finished is kept, and the same
    command goes on where it was stopped. Differences are tested against a baseline.""",
)
