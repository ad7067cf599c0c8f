"""The command line that both corpora share."""

import os
import shutil
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from examples.erc.ending import INTERRUPTED, end, guard
from examples.erc.errors import InputError
from examples.erc.recipe import Recipe
from examples.erc.training_options import (
    named_modalities,
    settle_recipe,
    source_opener,
    typed_command,
    typed_options,
)

# PyTorch and transformers take seconds to import. Whatever needs them is imported where it is used,
# so that --help and a mistyped option are answered at once.


def make_command(name: str, title: str) -> click.Group:
    """Make the command of a corpus, ``python -m examples.<name>``.

    Args:
        name: The package of the corpus in ``examples``.
        title: The corpus as people write it.

    Returns:
        A group that runs the pipeline when no other command is named.
    """

    @click.group(
        invoke_without_command=True,
        subcommand_metavar="",
        context_settings={"max_content_width": 100},
        help=f"""Train and evaluate TelME on {title}: a text teacher, the students that it teaches,
        and the fusion of them all.

        Say what to train on with exactly one of --features, --raw and --synthetic. Finished stages
        and checkpoints are kept in the output folder, and the same command goes on where it was
        stopped. Several processes share the work if torchrun starts them.""",
    )
    @click.option(
        "--features", type=_FOLDER, help="Train light encoders on features extracted before."
    )
    @click.option("--raw", type=_FOLDER, help="Train pretrained encoders on the published corpus.")
    @click.option(
        "--synthetic", is_flag=True, help="Train tiny encoders on clips made up on the spot."
    )
    @click.option(
        "--modalities",
        metavar="NAMES",
        help="Some of text,audio,visual; text is always used.  [default: all that are present]",
    )
    @click.option(
        "--seeds", type=_ONE_OR_MORE, default=1, show_default=True, help="How many seeds to train."
    )
    @click.option(
        "--recipe",
        type=click.Choice(["paper", "released", "recommended"]),
        default="released",
        show_default=True,
        help="Whose numbers: the paper's, those of the code released with it, or ours.",
    )
    @click.option("--epochs", type=_ONE_OR_MORE, help="Epochs of every stage, at most.")
    @click.option(
        "--batch-size",
        type=click.IntRange(min=3),
        help="Rows in a batch of every stage; a relation needs at least three.",
    )
    @click.option(
        "--patience",
        type=click.IntRange(min=0),
        metavar="EPOCHS",
        help="Stop a stage after so many epochs without a better dev score; 0: never.",
    )
    @click.option(
        "--class-balance",
        type=click.FloatRange(0, 1),
        metavar="POWER",
        help="Weigh classes by their inverse frequency to this power, in [0, 1]; 1 balances them.",
    )
    @click.option(
        "--focal",
        type=click.FloatRange(0),
        metavar="GAMMA",
        help="Count what is predicted well less: the gamma of the focal loss.",
    )
    @click.option(
        "--memory",
        type=click.IntRange(min=0),
        metavar="ROWS",
        help="Let the distillations relate a batch to so many rows of earlier steps.",
    )
    @click.option(
        "--accumulate",
        type=_ONE_OR_MORE,
        default=1,
        show_default=True,
        help="Compute a batch in so many parts, to save memory; losses are of the whole batch.",
    )
    @click.option(
        "--checkpoint-every",
        type=_ONE_OR_MORE,
        metavar="STEPS",
        help="Optimiser steps between checkpoints within a stage.  [default: an epoch]",
    )
    @click.option(
        "--output",
        type=_FOLDER,
        help=f"Where everything goes.  [default: runs/{name}-features, -raw or -synthetic]",
    )
    @click.option(
        "--device",
        type=click.Choice(["auto", "cpu", "cuda", "mps"]),
        default="auto",
        show_default=True,
        help="What to train on.",
    )
    @click.option(
        "--mixed-precision",
        type=click.Choice(["no", "fp16", "bf16"]),
        default="no",
        show_default=True,
        help="The precision of the encoders; losses are computed in float32.",
    )
    @click.option(
        "--bad-clips",
        type=click.Choice(["mask", "skip", "fail"]),
        default="mask",
        show_default=True,
        help="With --raw, an utterance whose clip is missing or broken: give it a zero feature, "
        "leave it out, or train nothing.",
    )
    @click.option(
        "--cache",
        type=_FOLDER,
        help="With --raw: a folder for decoded clips that runs share.  [default: in the output]",
    )
    @click.option(
        "--crop",
        is_flag=True,
        help="With --raw: see only the speaker's half of a film that two people share (IEMOCAP).",
    )
    @click.option("--text-encoder", metavar="NAME_OR_FOLDER", help="With --raw: the teacher.")
    @click.option("--audio-encoder", metavar="NAME_OR_FOLDER", help="With --raw: a student.")
    @click.option("--visual-encoder", metavar="NAME_OR_FOLDER", help="With --raw: a student.")
    @click.pass_context
    def command(context: click.Context, /, **options: Any) -> None:  # noqa: ANN401
        if context.invoked_subcommand is None:
            guard(
                context,
                lambda: _run(name, title, options, typed_command(f"examples.{name}", context)),
            )
        elif words := typed_options(context):
            raise click.UsageError(
                f"{words[0]}: expected nothing before {context.invoked_subcommand}; leave it out"
            )

    @command.command("check", short_help="Look at a corpus before anything is trained.")
    @click.argument("root", metavar="FOLDER", type=_FOLDER)
    @click.option(
        "--output",
        type=_FOLDER,
        help=f"Where the manifest, the page and the plot go.  [default: runs/{name}-check]",
    )
    @click.pass_context
    def check(context: click.Context, root: Path, output: Path | None) -> None:
        _check(context, name, root, output or Path("runs") / f"{name}-check")

    check.help = f"""Look at {title} in FOLDER before anything is trained: counts, clips, texts,
    times and classes, against what is known of the published corpus. Clips are optional.

    Ends with status 0 if all that was found is known or makes no difference, with 1 if there is
    something to look at, and with 2 if the corpus cannot be read."""

    @command.command("predict", short_help="Predict the emotions of a dialogue.")
    @click.argument("run", metavar="RUN", type=_FOLDER)
    @click.argument("dialogue", metavar="DIALOGUE", type=_FOLDER)
    @click.option(
        "--modalities",
        metavar="NAMES",
        help="Go by some of text,audio,visual alone.  [default: all that are at hand]",
    )
    @click.option(
        "--clips",
        type=_FOLDER,
        help="What the paths of clips are relative to, and the only folder that they are read "
        "from.  [default: that of DIALOGUE]",
    )
    @click.option(
        "--bad-clips",
        type=click.Choice(["mask", "skip", "fail"]),
        default="mask",
        show_default=True,
        help="An utterance whose clip is missing or broken: go by what else there is, leave it "
        "out, or predict nothing.",
    )
    @click.option(
        "--cache", type=_FOLDER, help="A folder that keeps decoded clips, as in training."
    )
    @click.option(
        "--seed",
        type=click.IntRange(min=0),
        help="Whose systems, of a run with several seeds.  [default: the best on dev]",
    )
    @click.option(
        "--output", type=_FOLDER, help="Where everything goes.  [default: RUN/predictions/DIALOGUE]"
    )
    @click.option(
        "--device",
        type=click.Choice(["auto", "cpu", "cuda", "mps"]),
        default="auto",
        show_default=True,
        help="What to compute on.",
    )
    @click.pass_context
    def predict(context: click.Context, /, **options: Any) -> None:  # noqa: ANN401
        guard(context, lambda: _predict(name, options), again="starts afresh")

    predict.help = f"""Predict the emotions in DIALOGUE by a finished RUN on {title}: a probability
    for each emotion and utterance, as a table, as CSV and JSON, and as a picture.

    RUN is the --output of a training. DIALOGUE is a CSV table with the columns Speaker and
    Utterance, or JSON, a list of objects with speaker and text. Dialogue_ID tells several dialogues
    apart; Clip, Audio and Video name files. If RUN was trained on features, DIALOGUE is a folder of
    the same features.

    An utterance is answered by the system that sees the most of what it has: the fusion where all
    modalities are there, the text teacher where only the words are."""

    @command.command("mistakes", short_help="Show the most confident mistakes of a run.")
    @click.argument("run", metavar="RUN", type=_FOLDER)
    @click.option(
        "--split",
        type=click.Choice(["dev", "test"]),
        default="test",
        show_default=True,
        help="Whose utterances; to improve a recipe, look at dev alone.",
    )
    @click.option(
        "--top",
        type=_ONE_OR_MORE,
        default=10,
        show_default=True,
        help="How many of each system to print; the files have all.",
    )
    @click.option(
        "--annotations",
        type=_FOLDER,
        help=f"The folder of {title} with the words, for a run on features.",
    )
    @click.option(
        "--seed",
        type=click.IntRange(min=0),
        help="Whose systems, of a run with several seeds.  [default: the best on dev]",
    )
    @click.option("--output", type=_FOLDER, help="Where the files go.  [default: RUN]")
    @click.pass_context
    def mistakes(context: click.Context, /, **options: Any) -> None:  # noqa: ANN401
        guard(context, lambda: _mistakes(name, options), again="starts afresh")

    mistakes.help = f"""Show what the systems of a finished RUN on {title} get wrong and are most
    sure of, modality by modality, with what the others say of it.

    Leaves mistakes.csv and mistakes.json, with all mistakes and with the emotions that are most
    often taken for each other."""
    return command


_FOLDER = click.Path(path_type=Path)
_ONE_OR_MORE = click.IntRange(min=1)


def _check(context: click.Context, name: str, root: Path, folder: Path) -> None:
    """Check a corpus, print what was found, and end with the status that sums it up."""
    try:
        from examples.erc import check_report

        try:
            examination = import_module(f"examples.{name}.check").check(root)
        except (InputError, OSError) as error:
            check_report.write_failure(name, root, str(error), folder)
            end(context, f"error: {error}", 2)
        click.echo(check_report.summary(examination))
        click.echo(f"\n{check_report.write(examination, root, folder)}")
    except (InputError, OSError) as error:
        end(context, f"error: {error}", 2)
    except KeyboardInterrupt:
        end(context, "\ninterrupted: the same command starts afresh", INTERRUPTED)
    context.exit(examination.status)


def _predict(name: str, options: dict[str, Any]) -> None:
    """Predict, print a table, and say where the files are."""
    wanted = named_modalities(options["modalities"])
    run_folder: Path = options["run"]
    dialogue: Path = options["dialogue"]

    import torch

    from examples.erc import dialogue_file, prediction, prediction_inputs, prediction_report
    from examples.erc.finished import FinishedRun

    run = FinishedRun(run_folder, name, options["seed"])
    modalities = prediction_inputs.choose_modalities(run, wanted)
    folder: Path = options["output"] or run_folder / "predictions" / dialogue.resolve().stem
    _check_output(folder)
    # As in the run: another number of threads may add up in another order.
    torch.set_num_threads(min(run.record["threads"], os.cpu_count() or 1))
    with tempfile.TemporaryDirectory() as scratch:
        if run.record["kind"] == "features":
            _check_clip_options(options, run_folder)
            inputs = prediction_inputs.read_features(run, dialogue, modalities)
        else:
            corpus = import_module(f"examples.{name}.corpus")
            file = dialogue_file.read(dialogue, options["clips"], getattr(corpus, "repair", str))
            if file.ignored:
                names = ", ".join(map(repr, file.ignored[:12]))
                more = ", ..." if len(file.ignored) > 12 else ""
                click.echo(f"{dialogue}: not looked at: {names}{more}", err=True)
            inputs = prediction_inputs.read_clips(
                run,
                file,
                modalities,
                bad_clips=options["bad_clips"],
                cache=options["cache"] or Path(scratch),
                ledger_path=folder / "ledger.json",
            )
        for modality in modalities:
            if modality not in inputs.datasets:
                click.echo(f"{dialogue}: no {modality}; predicted without it", err=True)
        answers = prediction.answer(run, inputs, options["device"])
    files = prediction_report.write(run, answers, folder)
    click.echo(prediction_report.text(run, answers, _columns()))
    click.echo()
    for path in files[:3]:
        click.echo(path)
    if len(files) > 3:
        rest = len(files) - 3
        click.echo(f"and {rest} more picture{'s' if rest > 1 else ''} in {folder}")


def _mistakes(name: str, options: dict[str, Any]) -> None:
    """Find the mistakes, print the most confident, and say where the files are."""
    from examples.erc import mistakes
    from examples.erc.finished import FinishedRun

    folder: Path = options["output"] or options["run"]
    _check_output(folder)
    run = FinishedRun(options["run"], name, options["seed"])
    root: Path | None = options["annotations"]
    corpus = None if root is None else import_module(f"examples.{name}.corpus").read(root)
    analysis = mistakes.analyse(run, options["split"], corpus)
    files = mistakes.write(analysis, folder)
    click.echo(mistakes.text(analysis, options["top"], _columns()))
    click.echo()
    for path in files:
        click.echo(path)


def _check_output(folder: Path) -> None:
    """Find before any work that there is a file in the way."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise InputError(f"--output: expected a folder, got the file {there}; name another place")


def _columns() -> int:
    """Those of the terminal; 120 where there is none."""
    return shutil.get_terminal_size((120, 0)).columns


def _check_clip_options(options: dict[str, Any], run: Path) -> None:
    """Refuse options about clips where there are none."""
    given = {"clips": options["clips"], "cache": options["cache"]}
    given["bad-clips"] = options["bad_clips"] != "mask"
    for option, value in given.items():
        if value:
            raise InputError(
                f"--{option}: expected only with a run on clips, got it with {run}, which was "
                "trained on extracted features; leave it out"
            )


def _run(name: str, title: str, options: dict[str, Any], typed: str) -> None:
    kind, open_source = source_opener(name, title, options)
    folder: Path = options["output"] or Path("runs") / f"{name}-{kind}"
    recipe: Recipe = import_module(f"examples.{name}.recipes").RECIPES[options["recipe"]]

    from examples.erc import mistakes, processes, report
    from examples.erc.finished import FinishedRun
    from examples.erc.pipeline import run
    from examples.erc.training import Hardware

    hardware = Hardware(options["device"], options["mixed_precision"], options["accumulate"])
    if kind != "raw":
        import torch

        # The matrices are small: threads would wait for each other, and with other work on the
        # machine a step takes several times as long. One thread also sums in one order.
        torch.set_num_threads(1)

    source = processes.in_turn(lambda: open_source(folder))
    settled = settle_recipe(recipe, source, options)
    results = run(
        source,
        settled,
        range(options["seeds"]),
        folder,
        hardware,
        typed,
        options["checkpoint_every"],
    )
    if processes.first():
        analysis = mistakes.analyse(FinishedRun(folder, name))
        mistakes.write(analysis, folder)
        page = report.write(results, folder, analysis)
        click.echo(f"\n{report.table(results)}\n\n{page}")
    processes.leave()
