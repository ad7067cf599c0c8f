"""The command line of TelME on MELD: ``python -m examples.meld --help``."""

from examples.erc.command import make_command

command = make_command("meld", "MELD")

if __name__ == "__main__":
    command()
