import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from examples.erc import crew as module
from examples.erc.crew import Crew, Decoding, Limits, Result
from examples.erc.dialogue import Clip

LIMITS = Limits(seconds=1, silence=120, memory=1 << 28)
IMPATIENT = Limits(seconds=60, silence=4, memory=1 << 28)

Run = Callable[..., list[dict[int, Result]]]


@pytest.fixture
def limits() -> Limits:
    return LIMITS


@pytest.fixture
def crew(limits: Limits) -> Iterator[Crew]:
    with Crew(2, limits) as crew:
        yield crew


@pytest.fixture
def decode(crew: Crew, tmp_path: Path) -> Run:
    def run(
        *files: str, starts: tuple[float, ...] = (0.0,), at: float | None = None
    ) -> list[dict[int, Result]]:
        decoding = Decoding(
            "tests.helpers.hostile:decode",
            {"log": str(tmp_path / "log"), "at": at},
            lambda values: values + 1,
        )
        futures = []
        for number, text in enumerate(files):
            path = tmp_path / f"clip{number}"
            path.write_bytes(text.encode())
            clips = [Clip(path, start, start + 1) for start in starts]
            futures.append(crew.decode(clips, decoding))
        return [future.result(timeout=60) for future in futures]

    return run


def processes() -> set[int]:
    """The processes that this one started and that are still there."""
    states = {int(path.name): _read_state(int(path.name)) for path in Path("/proc").glob("[0-9]*")}
    return {pid for pid, (_, parent) in states.items() if parent == os.getpid()}


def _read_state(pid: int) -> tuple[str, int]:
    """The letter of a process' state, "Z" once it has ended, and its parent."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "Z", 0
    return fields[0], int(fields[1])


def test_values_come_back_finished_and_in_order(decode: Run) -> None:
    results = decode(*[chr(ord("a") + number) * (number + 1) for number in range(20)])

    for number, result in enumerate(results):
        assert result.keys() == {0}
        values = result[0].values
        assert values is not None
        assert values.dtype == np.int16
        assert values.tolist() == [ord("a") + number + 1] * (number + 1)
        assert (result[0].kind, result[0].reason) == ("whole", "")


def test_processes_are_few_and_used_again(decode: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    original = module._Process.__init__

    def count(self: module._Process, limits: Limits) -> None:
        started.append(self)
        original(self, limits)

    monkeypatch.setattr(module._Process, "__init__", count)

    decode(*["a"] * 30)

    assert 1 <= len(started) <= 2


@pytest.mark.parametrize(
    ("harm", "kind", "reason"),
    [
        ("loop", "broken", "it needs more time than a clip may"),
        ("crash", "broken", "the decoder crashed (SIGSEGV)"),
        ("bomb", "broken", "it needs more memory than a clip may"),
        ("error", "broken", "ZeroDivisionError: by zero"),
        ("refuse", "broken", "not a film"),
        ("no clip", "broken", "Invalid data found when processing input"),
    ],
)
def test_a_bad_file_costs_itself_alone(decode: Run, harm: str, kind: str, reason: str) -> None:
    before, bad, *after = decode("a", harm, "b", "c")

    assert bad == {0: Result(None, kind, reason)}  # type: ignore[arg-type]
    for result in (before, *after):
        assert result[0].kind == "whole"


@pytest.mark.parametrize("limits", [IMPATIENT])
def test_a_process_that_does_not_answer_is_replaced(decode: Run) -> None:
    bad, after = decode("sleep", "a")

    assert bad == {0: Result(None, "late", "no answer for 4 s")}
    assert after[0].kind == "whole"


def test_what_a_decoder_prints_does_no_harm(decode: Run) -> None:
    (result,) = decode("print")

    assert result[0].kind == "whole"


def test_nonsense_from_a_process_is_not_believed(decode: Run) -> None:
    first, second = decode("lie", "a")

    assert first[0] == Result(None, "broken", "its process talks nonsense")
    assert second[0].kind == "whole"


def test_a_process_that_was_killed_by_chance_costs_nothing(decode: Run, tmp_path: Path) -> None:
    (result,) = decode(f"once killed {tmp_path / 'flag'}")

    assert result[0].kind == "whole"


@pytest.mark.parametrize("harm", ["crash", "loop", "error"])
def test_a_bad_part_of_a_film_costs_its_own_clip(decode: Run, harm: str) -> None:
    (results,) = decode(harm, starts=(3.0, 0.0, 1.0, 2.0), at=1.0)

    assert {position: result.kind for position, result in results.items()} == {
        0: "whole", 1: "whole", 2: "broken", 3: "whole",
    }  # fmt: skip


def test_a_film_that_stops_every_process_is_given_up(decode: Run, tmp_path: Path) -> None:
    (results,) = decode("error", starts=tuple(map(float, range(50))))

    assert [results[position].kind for position in range(50)] == ["broken"] * 50
    assert len((tmp_path / "log").read_text().splitlines()) == module._PATIENCE


def test_a_file_that_is_no_film_is_looked_at_once(decode: Run, tmp_path: Path) -> None:
    (results,) = decode("refuse", starts=tuple(map(float, range(50))))

    assert {result.reason for result in results.values()} == {"not a film"}
    assert len(results) == 50
    assert len((tmp_path / "log").read_text().splitlines()) == 1


@pytest.mark.parametrize("harm", ["a", "sleep", "loop"])
def test_no_process_is_left(harm: str, tmp_path: Path) -> None:
    before = processes()
    path = tmp_path / "clip"
    path.write_text(harm)
    decoding = Decoding("tests.helpers.hostile:decode", {"log": str(tmp_path / "log")}, np.copy)

    def interrupt() -> None:
        with Crew(2) as crew:
            crew.decode([Clip(path)], decoding)
            while not (tmp_path / "log").exists():
                time.sleep(0.01)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()

    assert processes() <= before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("crew")]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_processes_end_with_their_parent(how: signal.Signals, tmp_path: Path) -> None:
    path = tmp_path / "clip"
    path.write_text("sleep")
    code = f"""
from pathlib import Path
from examples.erc.crew import Crew, Decoding
from examples.erc.dialogue import Clip
log = {str(tmp_path / "log")!r}
decoding = Decoding("tests.helpers.hostile:decode", {{"log": log}}, abs)
with Crew(1) as crew:
    future = crew.decode([Clip(Path({str(path)!r}))], decoding)
    while not Path(log).exists():
        pass
    print(next(iter(crew._all))._popen.pid, flush=True)
    future.result()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Tests that run in the background ignore Ctrl-C, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert _read_state(pid)[0] != "Z"
        parent.send_signal(how)
        _, said = parent.communicate(timeout=60)

    assert ("KeyboardInterrupt" in said) == (how == signal.SIGINT)
    assert parent.returncode == -how
    deadline = time.monotonic() + 30
    while _read_state(pid)[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_process_that_cannot_start_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "")

    with Crew(1) as crew:
        future = crew.decode([Clip(tmp_path)], Decoding("a:b", {}, abs))
        with pytest.raises(RuntimeError, match=r"did not start: .*No module named"):
            future.result(timeout=60)


def test_a_system_without_a_limit_on_memory_is_mentioned(
    decode: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        module._Process, "wait_until_ready", lambda self: self._receive(60, 0) and False
    )

    decode("a", "b", "c")

    assert capsys.readouterr().err == f"{module.NOT_LIMITED}\n"
