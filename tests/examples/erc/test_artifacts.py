import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from examples.erc import artifacts
from examples.erc.artifacts import Artifact, Outputs, canonical, exclusive, obtain, replace
from examples.erc.errors import InputError
from examples.erc.training import Epoch, Trained

SETTINGS = {"rate": 0.1, "words": ["naïve"]}
FILES = ("model.safetensors", "outputs.safetensors", "stage.json")


def trained(fingerprint: str = "", value: float = 1.0) -> Trained:
    return Trained(
        weights={"layer.weight": torch.full((2, 3), value)},
        outputs={
            split: {"features": torch.full((4, 2), value), "logits": torch.arange(12.0).view(4, 3)}
            for split in ("train", "dev", "test")
        },
        history=(Epoch(1, 2.0, 0.25), Epoch(2, 1.0, 0.5)),
        selected_epoch=2,
        seconds=1.5,
    )


def said(weights: Mapping[str, torch.Tensor]) -> Outputs:
    return trained(value=weights["layer.weight"][0, 0].item()).outputs


def never(given: object) -> Any:
    raise AssertionError("computed again")


@pytest.fixture
def stage(tmp_path: Path) -> Artifact:
    return obtain(tmp_path / "stage", "a stage", SETTINGS, trained, never)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_obtain_writes_everything_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = obtain(tmp_path / "stage", "a stage", SETTINGS, trained, never)
    assert sorted(snapshot(stage.folder)) == sorted(FILES)
    assert torch.equal(
        load_file(stage.folder / "model.safetensors")["layer.weight"], torch.ones(2, 3)
    )
    outputs = stage.outputs("dev")
    assert set(outputs) == {"features", "logits"}
    assert torch.equal(outputs["logits"], torch.arange(12.0).view(4, 3))
    assert stage.record["selected_epoch"] == 2
    assert json.loads((stage.folder / "stage.json").read_text())["settings"] == SETTINGS
    assert capsys.readouterr().out == "a stage: dev 50.00 (epoch 2 of 2), 1.5 s\n"


def test_obtain_keeps_what_has_the_same_settings(
    stage: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(stage.folder)
    capsys.readouterr()
    assert obtain(stage.folder, "a stage", {**SETTINGS}, never, never) == stage
    assert snapshot(stage.folder) == before
    assert capsys.readouterr().out == "a stage: kept, dev 50.00 (epoch 2 of 2), 1.5 s\n"


@pytest.mark.parametrize("settings", [{**SETTINGS, "rate": 0.2}, {**SETTINGS, "more": None}, {}])
def test_obtain_computes_again_for_other_settings(
    stage: Artifact, settings: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    again = obtain(
        stage.folder,
        "a stage",
        settings,  # type: ignore[arg-type]
        lambda fingerprint: trained(fingerprint, 2.0),
        never,
    )
    assert again.identity != stage.identity
    assert torch.equal(again.outputs("test")["features"], torch.full((4, 2), 2.0))
    assert capsys.readouterr().err == ""


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("name", ["model.safetensors", "stage.json"])
@pytest.mark.parametrize("spoil", [flip, truncate, empty])
def test_obtain_repairs_damage_with_a_warning(
    stage: Artifact,
    name: str,
    spoil: Callable[[Path], object],
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = snapshot(stage.folder)
    spoil(stage.folder / name)
    assert obtain(stage.folder, "a stage", SETTINGS, trained, never) == stage
    assert capsys.readouterr().err == f"warning: a stage: {name} is damaged; computing it again\n"
    assert snapshot(stage.folder) == before


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_and_cut_is_found(
    stage: Artifact, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    class Again(Exception):
        pass

    def again(given: object) -> Any:
        raise Again

    path = stage.folder / name
    data = path.read_bytes()
    draw = random.Random(0)
    # All of the bytes but the last, which in JSON is a line break.
    spoiled = [data[:kept] for kept in draw.choices(range(len(data) - 1), k=1000)]
    for place in draw.choices(range(8 * len(data)), k=1000):
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        spoiled.append(bytes(flipped))
    capsys.readouterr()
    for damaged in spoiled:
        path.write_bytes(damaged)
        with pytest.raises(Again):
            obtain(stage.folder, "a stage", SETTINGS, again, again)
        assert capsys.readouterr().err.startswith(f"warning: a stage: {name} is damaged; comput")
    path.write_bytes(data)
    assert obtain(stage.folder, "a stage", SETTINGS, never, never) == stage


@pytest.mark.parametrize("spoil", [flip, truncate, empty, Path.unlink])
def test_damaged_outputs_are_computed_from_the_weights(
    stage: Artifact, spoil: Callable[[Path], object], capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(stage.folder)
    spoil(stage.folder / "outputs.safetensors")
    assert obtain(stage.folder, "a stage", SETTINGS, never, said) == stage
    printed = capsys.readouterr()
    how = "missing" if spoil is Path.unlink else "damaged"
    assert printed.err == (
        f"warning: a stage: outputs.safetensors is {how}; computing them again from its weights\n"
    )
    assert printed.out.endswith("a stage: kept, dev 50.00 (epoch 2 of 2), 1.5 s\n")
    assert snapshot(stage.folder) == before


def test_outputs_that_come_out_otherwise_make_another_stage(stage: Artifact) -> None:
    flip(stage.folder / "outputs.safetensors")
    other = trained(value=1.5).outputs

    mended = obtain(stage.folder, "a stage", SETTINGS, never, lambda weights: other)

    assert mended.identity != stage.identity
    assert mended.record == stage.record
    assert obtain(stage.folder, "a stage", SETTINGS, never, never) == mended
    assert torch.equal(mended.outputs("dev")["features"], torch.full((4, 2), 1.5))


def test_weights_are_verified_before_they_are_used(
    stage: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in FILES[:2]:
        flip(stage.folder / name)
    assert obtain(stage.folder, "a stage", SETTINGS, trained, never) == stage
    assert "model.safetensors is damaged; computing it again" in capsys.readouterr().err


def test_obtain_repairs_missing_weights(
    stage: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    (stage.folder / "model.safetensors").unlink()
    assert obtain(stage.folder, "a stage", SETTINGS, trained, never) == stage
    assert "model.safetensors is missing" in capsys.readouterr().err


@pytest.mark.parametrize("score", ["0.9", "NaN", '"high"'])
def test_obtain_does_not_believe_an_edited_score(stage: Artifact, score: str) -> None:
    path = stage.folder / "stage.json"
    path.write_text(path.read_text().replace("0.5", score))
    again = obtain(stage.folder, "a stage", SETTINGS, trained, never)
    assert again.record["history"][1]["dev_weighted_f1"] == 0.5


@pytest.mark.parametrize("dying", [1, 2])
@pytest.mark.parametrize("death", [KeyboardInterrupt, OSError])
def test_an_interrupted_write_is_never_valid(
    stage: Artifact,
    dying: int,
    death: type[BaseException],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []

    def save_and_die(tensors: dict[str, torch.Tensor], path: Path) -> None:
        calls.append(path)
        save_file(tensors, path)
        if len(calls) == dying:
            raise death

    monkeypatch.setattr(artifacts, "save_file", save_and_die)
    other = {**SETTINGS, "rate": 0.3}
    with pytest.raises(death):
        obtain(stage.folder, "a stage", other, lambda fingerprint: trained(fingerprint, 3.0), never)
    monkeypatch.undo()
    assert not (stage.folder / "stage.json").exists()
    assert not list(stage.folder.glob(".*"))
    again = obtain(
        stage.folder, "a stage", other, lambda fingerprint: trained(fingerprint, 4.0), never
    )
    assert torch.equal(again.outputs("train")["features"], torch.full((4, 2), 4.0))


def test_identity_tells_content_apart_under_the_same_settings(tmp_path: Path) -> None:
    one = obtain(
        tmp_path / "one", "one", SETTINGS, lambda fingerprint: trained(fingerprint, 1.0), never
    )
    same = obtain(
        tmp_path / "same", "same", SETTINGS, lambda fingerprint: trained(fingerprint, 1.0), never
    )
    other = obtain(
        tmp_path / "other", "other", SETTINGS, lambda fingerprint: trained(fingerprint, 2.0), never
    )
    assert one.identity == same.identity != other.identity


def test_replace_leaves_the_old_file_when_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(partial: Path) -> None:
        partial.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        replace(path, fail)
    assert snapshot(tmp_path) == {"file": b"old"}


def test_canonical_is_one_spelling_for_equal_values() -> None:
    assert canonical({"b": 1, "a": [0.1, "ü"]}) == canonical({"a": [0.1, "ü"], "b": 1})
    assert canonical({"a": 1}) != canonical({"a": "1"})


def test_exclusive_refuses_a_second_run(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    with (
        exclusive(folder),
        pytest.raises(InputError, match="no other run in this folder"),
        exclusive(folder),
    ):
        pass
    with exclusive(folder):
        assert folder.is_dir()


def test_exclusive_refuses_a_place_it_cannot_write_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="choose another --output"), exclusive(tmp_path / "file"):
        pass
