"""The paper's tables and figures: ``python -m examples.experiments --help``."""

from examples.experiments.command import command

if __name__ == "__main__":
    command(prog_name="python -m examples.experiments")
