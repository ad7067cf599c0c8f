"""What the options of a training say: where from, with which encoders, by which numbers."""

import os
import shlex
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from examples.erc.errors import InputError
from examples.erc.recipe import Optimisation, Recipe

# As in the command: whatever needs PyTorch is imported where it is used.
if TYPE_CHECKING:
    from examples.erc.source import Source

MODALITIES = ("text", "audio", "visual")
"""As in :mod:`examples.erc.source`, which needs PyTorch."""

SYNTHETIC_SEED = 0
"""The synthetic corpus is the same in every run."""


def source_opener(
    corpus: str, title: str, options: dict[str, Any]
) -> tuple[str, Callable[[Path], "Source"]]:
    """Check the options that say what to train on.

    Args:
        corpus: The package of the corpus in ``examples``.
        title: The corpus as people write it.
        options: Of the command line, by name.

    Returns:
        ``features``, ``raw`` or ``synthetic``; and what opens the source, given the run folder.

    Raises:
        InputError: They contradict each other.
    """
    kind = _kind(options)
    modalities = _modalities(options["modalities"])
    encoders = _encoders(options, kind)
    _check_raw(options, kind)

    def open_source(folder: Path) -> "Source":
        if kind == "features":
            from examples.erc.features import FeatureSource

            return FeatureSource(options["features"], corpus, modalities)
        if kind == "raw":
            from examples.erc.raw import DEFAULT_ENCODERS, RawSource

            chosen = {
                modality: encoders.get(modality) or DEFAULT_ENCODERS[modality]
                for modality in modalities or MODALITIES
            }
            return RawSource(
                import_module(f"examples.{corpus}.corpus").read(options["raw"]),
                title,
                encoders=chosen,
                crop=options["crop"],
                bad_clips=options["bad_clips"],
                cache=options["cache"],
            )
        from examples.synthetic.source import SyntheticSource

        return SyntheticSource(corpus, title, folder, modalities or MODALITIES, SYNTHETIC_SEED)

    return kind, open_source


def _kind(options: dict[str, Any]) -> str:
    kinds = ("features", "raw", "synthetic")
    given = [kind for kind in kinds if options[kind]]
    if len(given) != 1:
        got = " and ".join(f"--{kind}" for kind in given) or "none of them"
        raise InputError(
            f"expected exactly one of --features, --raw and --synthetic, got {got}; "
            "--synthetic needs nothing but this repository"
        )
    return given[0]


def _modalities(typed: str | None) -> tuple[str, ...] | None:
    """The modalities that were named, and text."""
    named = named_modalities(typed)
    if named is None:
        return None
    return tuple(modality for modality in MODALITIES if modality in {*named, "text"})


def named_modalities(typed: str | None) -> tuple[str, ...] | None:
    """The modalities that were named, in their usual order.

    Raises:
        InputError: One is none.
    """
    if typed is None:
        return None
    names = {name.strip() for name in typed.split(",")}
    if unknown := sorted(names - {*MODALITIES}):
        raise InputError(
            f"--modalities: expected some of {', '.join(MODALITIES)}, separated by commas, got "
            f"{', '.join(map(repr, unknown))}; text,audio is an example"
        )
    return tuple(modality for modality in MODALITIES if modality in names)


def _encoders(options: dict[str, Any], kind: str) -> dict[str, str]:
    """The encoders that were named."""
    chosen = {modality: options[f"{modality}_encoder"] for modality in MODALITIES}
    named = {modality: encoder for modality, encoder in chosen.items() if encoder is not None}
    if named and kind != "raw":
        raise InputError(
            f"--{next(iter(named))}-encoder: expected only with --raw, got it with --{kind}, "
            "which has encoders of its own; leave it out"
        )
    return named


def _check_raw(options: dict[str, Any], kind: str) -> None:
    """Refuse options about clips where there are none, or where they are made up."""
    given = {"bad-clips": options["bad_clips"] != "mask", "cache": options["cache"]}
    for name, value in {**given, "crop": options["crop"]}.items():
        if value and kind != "raw":
            raise InputError(
                f"--{name}: expected only with --raw, got it with --{kind}, which has no "
                "published clips; leave it out"
            )


def settle_recipe(recipe: Recipe, source: "Source", options: dict[str, Any]) -> Recipe:
    """Say how each phase is really optimised: by the source, by the recipe, and as typed."""
    patience: int | None = options["patience"]
    typed = {
        "class_balance": options["class_balance"],
        "focal_gamma": options["focal"],
    }
    # A range lets what is no number through.
    if unfit := [value for value in typed.values() if value is not None and not isfinite(value)]:
        raise InputError(
            f"--class-balance and --focal: expected finite numbers, got {unfit[0]}; 0.5 and 2 are "
            "usual ones"
        )

    def settle(own: Optimisation | None, published: Optimisation) -> Optimisation:
        chosen = own or published
        return replace(
            chosen,
            epochs=options["epochs"] or chosen.epochs,
            batch_size=options["batch_size"] or chosen.batch_size,
            patience=chosen.patience if patience is None else patience or None,
        )

    teacher, student, fusion = recipe.teacher, recipe.student, recipe.fusion
    return replace(
        recipe,
        teacher=replace(
            teacher, optimisation=settle(source.optimisation("teacher"), teacher.optimisation)
        ),
        student=replace(
            student,
            optimisation=settle(source.optimisation("student"), student.optimisation),
            memory_size=student.memory_size if options["memory"] is None else options["memory"],
        ),
        fusion=replace(
            fusion, optimisation=settle(source.optimisation("fusion"), fusion.optimisation)
        ),
        classification=replace(
            recipe.classification,
            **{name: value for name, value in typed.items() if value is not None},
        ),
    )


def typed_command(module: str, context: click.Context) -> str:
    """The command that the user gave, in a form that a shell takes."""
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")  # torchrun's
    launcher = ["python"] if processes == "1" else ["torchrun", "--nproc_per_node", processes]
    return shlex.join([*launcher, "-m", module, *typed_options(context)])


def typed_options(context: click.Context) -> list[str]:
    """The arguments and options that the user gave, with their values."""
    words = []
    for parameter in context.command.params:
        key = str(parameter.name)
        if context.get_parameter_source(key) is ParameterSource.COMMANDLINE:
            if isinstance(parameter, click.Option):  # an argument has a name that nobody types
                words.append(parameter.opts[0])
            if context.params[key] is not True:
                words.append(str(context.params[key]))
    return words
