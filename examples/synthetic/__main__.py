"""Write a synthetic corpus: ``python -m examples.synthetic meld FOLDER``."""

from importlib import import_module
from pathlib import Path

import click

from examples.erc.errors import InputError
from examples.synthetic.script import Size

DEFAULT = Size()


@click.command(help="Write the synthetic corpus in the layout of CORPUS into FOLDER.")
@click.argument("corpus", type=click.Choice(["meld", "iemocap"]))
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--train", type=click.IntRange(min=1), default=DEFAULT.train, show_default=True)
@click.option("--dev", type=click.IntRange(min=1), default=DEFAULT.dev, show_default=True)
@click.option("--test", type=click.IntRange(min=1), default=DEFAULT.test, show_default=True)
@click.pass_context
def command(
    context: click.Context, corpus: str, folder: Path, seed: int, train: int, dev: int, test: int
) -> None:
    """Write a corpus and print where it is."""
    try:
        root = import_module(f"examples.synthetic.{corpus}").write(
            folder, seed=seed, size=Size(train, dev, test)
        )
    except InputError as error:
        click.echo(f"error: {error}", err=True)
        context.exit(2)
    click.echo(root)


if __name__ == "__main__":
    command(prog_name="python -m examples.synthetic")
