"""What the security page says of the code, read off the code."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [
    path
    for folder in ("telme_kd", "examples", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
]
PAGES = [ROOT / "README.rst", *(ROOT / "docs").rglob("*.rst")]

UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
"""Modules that run what they read."""

NETWORK = {"socket", "ssl", "http", "urllib", "ftplib", "requests", "httpx", "aiohttp"}


def name(node: ast.AST) -> str:
    """A dotted name; empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    return f"{name(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else ""


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield name(node.func), node


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    return found


def option(call: ast.Call, keyword: str) -> object:
    """The constant that a call gives for a keyword; ``None`` if it gives none."""
    for given in call.keywords:
        if given.arg == keyword:
            return ast.literal_eval(given.value)
    return None


def where(paths: list[Path], wanted: str) -> dict[str, list[ast.Call]]:
    """The calls whose name ends so, by file."""
    found: dict[str, list[ast.Call]] = {}
    for path in paths:
        for called, node in calls(path):
            if called == wanted or called.endswith(f".{wanted}"):
                found.setdefault(str(path.relative_to(ROOT)), []).append(node)
    return found


def test_the_search_finds_what_it_looks_for(tmp_path: Path) -> None:
    path = tmp_path / "code.py"
    path.write_text(
        "import pickle\nfrom urllib.request import urlopen\ntorch.load(x, weights_only=False)"
    )
    assert imports(path) == {"pickle", "urllib"}
    ((called, node),) = calls(path)
    assert (called, option(node, "weights_only")) == ("torch.load", False)


def test_every_torch_load_is_restricted() -> None:
    loads = where(SOURCES, "torch.load")
    assert set(loads) == {"examples/erc/released.py"}
    for found in loads.values():
        assert [option(call, "weights_only") for call in found] == [True] * len(found)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_no_page_recommends_an_unrestricted_load(path: Path) -> None:
    for load in re.findall(r"torch\.load\([^)]*\)", path.read_text(encoding="utf-8")):
        assert "weights_only=True" in load


def test_arrays_are_loaded_without_pickles() -> None:
    loads = {**where(SOURCES, "np.load"), **where(SOURCES, "numpy.load")}
    assert set(loads) == {"examples/erc/feature_folder.py"}
    for found in loads.values():
        assert [option(call, "allow_pickle") for call in found] == [False] * len(found)


def test_code_of_others_is_never_trusted() -> None:
    loads = where(SOURCES, "from_pretrained")
    assert set(loads) == {"examples/erc/pretrained.py"}
    ((load,),) = loads.values()
    assert option(load, "trust_remote_code") is False
    told = [path for path in SOURCES if "trust_remote_code" in path.read_text(encoding="utf-8")]
    assert [path.name for path in told] == ["pretrained.py"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_runs_what_it_reads_or_speaks_to_the_network(path: Path) -> None:
    assert not imports(path) & (UNPICKLERS | NETWORK)
    for called, node in calls(path):
        assert called not in {"eval", "exec", "compile", "os.system", "os.popen"}, node.lineno
        assert option(node, "shell") is None if called.startswith("subprocess.") else True


def test_processes_are_started_where_it_is_said() -> None:
    started = {path.relative_to(ROOT) for path in SOURCES if "subprocess" in imports(path)}
    kept = {path for path in started if path.parts[0] != "benchmarks"}
    assert kept == {Path("examples/erc/crew.py")}


PROGRAM = """
import sys
import torch
import telme_kd
log = []
watched = ("socket.", "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn")
def note(event, arguments):
    written = event == "open" and isinstance(arguments[2], int) and arguments[2] & 3
    if event.startswith(watched) or written:
        log.append((event, str(arguments[0])))
sys.addaudithook(note)
student = torch.randn(8, 5, requires_grad=True)
teacher = torch.randn(8, 5)
loss = telme_kd.DISTLoss()(student, teacher)
(loss + telme_kd.BatchSimilarityLoss()(student, teacher)).backward()
telme_kd.ShiftingFusion(5, 4)(torch.randn(8, 5), torch.randn(8, 4))
print(log)
"""


def test_the_library_writes_no_file_and_opens_no_connection() -> None:
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_every_version_is_pinned() -> None:
    lines = (ROOT / ".ci" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert len(pins) > 100
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    for line in (ROOT / "Makefile").read_text(encoding="utf-8").splitlines():
        if "install " in line and not line.startswith("#"):
            assert "--constraint .ci/constraints.txt" in line or line.endswith("\\"), line
