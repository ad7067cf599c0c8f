"""The command line of the experiments, with the options of the pipeline."""

import shlex
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from examples.erc import command as pipeline
from examples.erc.recipe import Recipe

# As in the pipeline's command: whatever needs PyTorch is imported where it is used.
if TYPE_CHECKING:
    from examples.erc.source import Source

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
    pipeline._guard(context, lambda: _work(context, options))


def _work(context: click.Context, options: dict[str, Any]) -> None:
    corpus: str = options["corpus"]
    kind = pipeline._kind(options)
    modalities = pipeline._modalities(options["modalities"])
    encoders = pipeline._encoders(options, kind)
    pipeline._check_raw(options, kind)
    folder: Path = options["output"] or Path("runs") / f"{corpus}-{kind}"
    recipe: Recipe = import_module(f"examples.{corpus}.recipes").RECIPES[options["recipe"]]

    from examples.erc import processes
    from examples.erc.training import Hardware
    from examples.experiments import report, running

    hardware = Hardware(options["device"], options["mixed_precision"], options["accumulate"])
    if kind != "raw":
        import torch

        torch.set_num_threads(1)  # as in the pipeline
    source = processes.in_turn(lambda: _open(options, kind, folder, modalities, encoders))
    experiments, left_out = running.choose(options["name"], source)
    if processes.first():
        for name, reason in left_out.items():
            click.echo(f"{name} is left out: {reason}", err=True)
    results = running.run(
        source,
        pipeline._settle(recipe, source, options),
        experiments,
        range(options["seeds"]),
        folder,
        hardware,
        _typed(context),
        name=options["name"],
        left_out=left_out,
        checkpoint_every=options["checkpoint_every"],
    )
    if processes.first():
        page = report.write(results, folder / running.FOLDER / options["name"])
        click.echo(f"\n{report.summary(results)}\n\n{page}")
    processes.leave()


def _open(
    options: dict[str, Any],
    kind: str,
    folder: Path,
    modalities: tuple[str, ...] | None,
    encoders: dict[str, str],
) -> "Source":
    corpus: str = options["corpus"]
    if kind == "features":
        from examples.erc.features import FeatureSource

        return FeatureSource(options["features"], corpus, modalities)
    chosen = modalities or pipeline.MODALITIES
    if kind == "raw":
        from examples.erc.raw import DEFAULT_ENCODERS, RawSource

        return RawSource(
            import_module(f"examples.{corpus}.corpus").read(options["raw"]),
            CORPORA[corpus],
            encoders={name: encoders.get(name) or DEFAULT_ENCODERS[name] for name in chosen},
            crop=options["crop"],
            bad_clips=options["bad_clips"],
            cache=options["cache"],
        )
    from examples.synthetic.source import SyntheticSource

    return SyntheticSource(corpus, CORPORA[corpus], folder, chosen, pipeline.SYNTHETIC_SEED)


def _typed(context: click.Context) -> str:
    """The command that the user gave, in a form that a shell takes."""
    _, *words = pipeline._typed_options(context)  # an argument has a name that nobody types
    return shlex.join(["python", "-m", "examples.experiments", *words])


def _parameters() -> list[click.Parameter]:
    """The name, the corpus, and every option of the pipeline."""
    shared = pipeline.make_command("corpus", "a corpus").params
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
