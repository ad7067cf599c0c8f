"""The command line of TelME on IEMOCAP: ``python -m examples.iemocap --help``."""

from examples.erc.command import make_command

command = make_command("iemocap", "IEMOCAP")

if __name__ == "__main__":
    command()
