"""Try a parser for as long as it may, following the branches of the code where that can be.

``python -m tests.fuzz`` lists the parsers, ``python -m tests.fuzz meld --seconds 600`` tries one,
``all`` one after another. With ``pip install atheris`` what is tried next is guided by the branches
that were reached; without it, files are damaged at random. Whatever breaks a promise is kept in
``runs/fuzz``, and the status is 1.
"""

import argparse
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

FOLDER = Path("runs") / "fuzz"


def main(arguments: Sequence[str] | None = None) -> int:
    """Try what is asked for; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("target", nargs="?", help="a parser, or all; leave it out for a list")
    parser.add_argument("--seconds", type=int, default=60, help="for each parser (60)")
    parser.add_argument("--seed", type=int, default=1, help="of what is drawn (1)")
    options = parser.parse_args(arguments)
    guide: Any = import_module("atheris") if find_spec("atheris") else None
    targets = load(guide)
    names = {None: [], "all": list(targets.TARGETS)}.get(options.target, [options.target])
    if not {*names} <= targets.TARGETS.keys() or not names:
        print("\n".join(targets.TARGETS))
        return 0 if options.target is None else 2
    if len(names) > 1:  # libFuzzer ends its process, and a bad film might
        rest = ["--seconds", str(options.seconds), "--seed", str(options.seed)]
        command = [sys.executable, "-m", "tests.fuzz"]
        return max(subprocess.call([*command, name, *rest]) != 0 for name in names)
    (name,) = names
    room = targets.Room(targets.TARGETS[name])
    folder = FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(room.seeds):
        (folder / f"seed-{number}").write_bytes(seed)
    print(f"{name}: {options.seconds} s, {'guided by branches' if guide else 'at random'}")
    if guide is None:
        return at_random(room, name, options.seconds, options.seed)
    limits = ["-timeout=20", "-rss_limit_mb=4096", f"-max_total_time={options.seconds}"]
    output = ["-print_final_stats=1", f"-artifact_prefix={FOLDER}/{name}-"]
    guide.Setup([sys.argv[0], *limits, *output, f"-seed={options.seed}", str(folder)], room.attempt)
    guide.Fuzz()
    return 0


def load(guide: Any) -> ModuleType:
    """The targets, with the parsers and what they parse with watched by the guide."""
    if guide is None:
        return import_module("tests.fuzz.targets")
    with guide.instrument_imports(include=["examples", "telme_kd", "json", "csv", "zipfile"]):
        return import_module("tests.fuzz.targets")


def at_random(room: Any, name: str, seconds: int, seed: int) -> int:
    """Damage the seeds, and what came of them, at random."""
    from tests.helpers.damage import PAYLOADS, Mutation, mutate

    random = Random(seed)
    actions = ["insert", "overwrite", "delete", "repeat", "cut", "flip", "swap lines"]
    end = time.monotonic() + seconds
    tried = refused = 0
    while time.monotonic() < end:
        data = random.choice(room.seeds)
        for _ in range(random.randint(1, 4)):
            payload = random.choice([*PAYLOADS, random.randbytes(random.randint(1, 6))])
            change = Mutation(
                0, random.choice(actions), random.random(), random.randint(1, 80), payload
            )
            data = mutate(data, change)
        try:
            refused += room.attempt(data) is not None
        except Exception:
            traceback.print_exc()
            path = FOLDER / f"{name}-crash-{tried}"
            path.write_bytes(data)
            print(f"kept: {path}")
            return 1
        tried += 1
    print(f"{tried} files, of which {refused} were refused")
    return 0


if __name__ == "__main__":
    sys.exit(main())
