import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from examples.erc import artifacts
from examples.erc.checkpoint import Checkpoints

STATE: dict[str, Any] = {
    "step": 3,
    "none": None,
    "rates": (0.1, 1e-300),
    "history": [{"epoch": 1, "loss": 0.25}],
    "streams": [
        {"torch": torch.arange(6, dtype=torch.uint8)},
        {"torch": torch.tensor([], dtype=torch.float64)},
    ],
    "weights": {"layer.weight": torch.tensor([[1.0, float("nan")]]), "tensor": torch.tensor(2.5)},
}


def checkpoints(folder: Path, fingerprint: str = "settings", every: int | None = 1) -> Checkpoints:
    return Checkpoints(folder / "checkpoints", fingerprint, every, "a stage")


@pytest.fixture
def saved(tmp_path: Path) -> Checkpoints:
    """Two checkpoints, of steps 3 and 6."""
    both = checkpoints(tmp_path)
    both.save(3, 1, STATE)
    both.save(6, 2, {**STATE, "step": 6})
    return both


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_what_was_saved_is_loaded(saved: Checkpoints) -> None:
    path = saved.newest()
    assert path is not None
    loaded = saved.load(path)
    assert loaded.keys() == STATE.keys()
    assert loaded["step"] == 6
    assert loaded["none"] is None
    assert loaded["rates"] == [0.1, 1e-300]
    assert loaded["history"] == STATE["history"]
    for stream, expected in zip(loaded["streams"], STATE["streams"], strict=True):
        assert stream["torch"].dtype == expected["torch"].dtype
        assert torch.equal(stream["torch"], expected["torch"])
    for name, expected in STATE["weights"].items():
        assert torch.equal(loaded["weights"][name].nan_to_num(-1), expected.nan_to_num(-1))


def test_tied_weights_are_saved_twice(tmp_path: Path) -> None:
    tied = torch.arange(4.0)
    one = checkpoints(tmp_path)
    one.save(1, 1, {"a": tied, "b": tied, "c": tied[1:], "d": tied.view(2, 2).T})
    path = one.newest()
    assert path is not None
    loaded = one.load(path)
    assert torch.equal(loaded["b"], tied)
    assert torch.equal(loaded["d"], tied.view(2, 2).T)


def test_the_last_two_are_kept(saved: Checkpoints, tmp_path: Path) -> None:
    for leftover in (".step-000000009-00003.json.partial", "step-000000001-00000.safetensors"):
        (tmp_path / "checkpoints" / leftover).write_text("half")
    saved.save(9, 3, STATE)
    assert names(tmp_path) == [
        f"step-{step:09d}-{step // 3:05d}.{kind}"
        for step in (6, 9)
        for kind in ("json", "safetensors")
    ]


def test_a_later_one_that_was_passed_over_goes(saved: Checkpoints, tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-000000006-00002.json").write_text("{}")
    saved.save(5, 1, STATE)
    assert {name.split(".")[0] for name in names(tmp_path)} == {
        "step-000000003-00001",
        "step-000000005-00001",
    }


def test_checkpoints_of_other_settings_are_not_taken(saved: Checkpoints, tmp_path: Path) -> None:
    assert checkpoints(tmp_path, "others").newest() is None
    assert checkpoints(tmp_path).newest() is not None


def test_there_is_none_at_first(tmp_path: Path) -> None:
    assert checkpoints(tmp_path).newest() is None


@pytest.mark.parametrize(
    ("every", "due"), [(None, []), (1, [1, 2, 3, 4, 5, 6]), (2, [2, 4, 6]), (4, [4])]
)
def test_due_counts_steps_or_epochs(tmp_path: Path, every: int | None, due: list[int]) -> None:
    counted = checkpoints(tmp_path, every=every)
    assert [step for step in range(1, 7) if counted.due(step, epoch_ends=False)] == due
    assert counted.due(6, epoch_ends=True) == (every is None)


@pytest.mark.parametrize("kind", ["json", "safetensors"])
def test_every_flipped_bit_is_found(
    saved: Checkpoints, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "checkpoints" / f"step-000000006-00002.{kind}"
    whole = path.read_bytes()
    for place in random.Random(0).sample(range(8 * len(whole)), 1000):
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        newest = saved.newest()
        assert newest is not None
        assert newest.stem == "step-000000003-00001", place
        assert f"checkpoint {path.name} is damaged" in capsys.readouterr().err
    path.write_bytes(whole)
    newest = saved.newest()
    assert newest is not None
    assert newest.stem == "step-000000006-00002"


@pytest.mark.parametrize("kind", ["json", "safetensors"])
def test_every_truncation_is_found(saved: Checkpoints, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "checkpoints" / f"step-000000006-00002.{kind}"
    whole = path.read_bytes()
    # All of the bytes but the last, which in JSON is a line break.
    for length in random.Random(1).choices(range(len(whole) - 1), k=1000):
        path.write_bytes(whole[:length])
        newest = saved.newest()
        assert newest is not None
        assert newest.stem == "step-000000003-00001", length
    path.write_bytes(whole + b"\0")
    assert saved.newest() != path.with_suffix(".json")


def test_missing_tensors_are_found(
    saved: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (3, 6):
        (tmp_path / "checkpoints" / f"step-{step:09d}-{step // 3:05d}.safetensors").unlink()
    assert saved.newest() is None
    assert capsys.readouterr().err.splitlines() == [
        f"warning: a stage: checkpoint step-{step:09d}-{step // 3:05d}.safetensors is missing; "
        "going back to the one before, or else to the start"
        for step in (6, 3)
    ]


def test_a_full_disk_is_an_oserror_and_leaves_what_was_there(
    saved: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: (tmp_path / "checkpoints" / name).read_bytes() for name in names(tmp_path)}

    def fill(tensors: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(artifacts, "save_file", fill)
    with pytest.raises(
        OSError, match=r"step-000000009-00003.safetensors: .* No space left on device"
    ):
        saved.save(9, 3, STATE)
    assert before == {
        name: (tmp_path / "checkpoints" / name).read_bytes() for name in names(tmp_path)
    }
