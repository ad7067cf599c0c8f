import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from examples.erc.checkpoint import Checkpoints
from examples.erc.errors import InputError, TrainingError
from examples.erc.objectives import Classification, Distillation, Share
from examples.erc.recipe import ClassificationRecipe, Optimisation, StudentRecipe
from examples.erc.source import EncoderOutput
from examples.erc.training import (
    SMALLEST_BATCH,
    Hardware,
    Trained,
    check_parts,
    compute,
    cut,
    draw_batches,
    leaves_layers_out,
    rate_share,
    train,
    uninterrupted,
)
from tests.helpers import small_stage

PLAIN = Optimisation(
    learning_rate=0.05,
    epochs=4,
    batch_size=8,
    warmup=0.25,
    weight_decay=0.0,
    max_gradient_norm=1.0,
    patience=None,
)


class Logits(NamedTuple):
    logits: Tensor


class Points:
    def __init__(self, points: Tensor) -> None:
        self.points = points

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, rows: list[int]) -> dict[str, Tensor]:
        return {"points": self.points[rows]}


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.dropout = nn.Dropout(0.3)

    def forward(self, points: Tensor) -> Logits:
        return Logits(self.layer(self.dropout(points)))


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """Accelerate remembers the precision of the process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def points() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        split: torch.randn(count, 2, generator=generator)
        for split, count in (("train", 50), ("dev", 30), ("test", 20))
    }


def labels(points: Tensor) -> Tensor:
    return (points[:, 0] + 0.3 * points[:, 1] > 0).long()


def fit(
    points: dict[str, Tensor],
    optimisation: Optimisation = PLAIN,
    seed: int = 0,
    hardware: Hardware | None = None,
) -> Trained:
    truth = labels(points["train"])
    return train(
        Line,
        Classification(truth, 2, ClassificationRecipe()),
        {split: Points(values) for split, values in points.items()},
        labels(points["dev"]),
        optimisation,
        seed=seed,
        hardware=hardware or Hardware("cpu"),
        title="line",
    )


@given(count=st.integers(1, 60), size=st.integers(1, 20), seed=st.integers(0, 3))
def test_draw_batches_takes_every_row_once(count: int, size: int, seed: int) -> None:
    batches = draw_batches(count, size, torch.Generator().manual_seed(seed))
    assert sorted(row for batch in batches for row in batch) == list(range(count))
    assert all(len(batch) == size for batch in batches[:-1])
    assert len(batches) == 1 or min(SMALLEST_BATCH, size) <= len(batches[-1]) < size + 3


@pytest.mark.parametrize(("count", "last"), [(41, 6), (42, 7), (43, 3), (45, 5)])
def test_draw_batches_never_leaves_one_or_two_rows(count: int, last: int) -> None:
    batches = draw_batches(count, 5, torch.Generator().manual_seed(0))
    assert len(batches[-1]) == last


@given(steps=st.integers(2, 200), warmup=st.floats(0, 1))
def test_rate_share_rises_to_one_and_falls(steps: int, warmup: float) -> None:
    shares = [rate_share(step, steps, warmup) for step in range(steps)]
    assert max(shares) == 1.0
    assert min(shares) > 0
    peak = shares.index(1.0)
    assert all(a < b for a, b in pairwise(shares[: peak + 1]))
    assert all(a >= b for a, b in pairwise(shares[peak:]))
    assert abs(peak + 1 - max(1, round(warmup * steps))) <= 1


def test_rate_share_counts_optimiser_steps(points: dict[str, Tensor]) -> None:
    assert [rate_share(step, 10, 0.2) for step in (0, 1, 2, 6, 9)] == [0.5, 1.0, 1.0, 0.5, 0.125]


def test_train_learns(points: dict[str, Tensor]) -> None:
    trained = fit(points)
    assert trained.history[-1].loss < trained.history[0].loss
    right = (trained.outputs["test"]["logits"].argmax(1) == labels(points["test"])).float().mean()
    assert right > 0.8


def test_train_gives_the_same_again_for_the_same_seed(points: dict[str, Tensor]) -> None:
    first = fit(points)
    torch.rand(7)  # what came before a stage must not matter
    again, other = fit(points), fit(points, seed=1)
    assert first.history == again.history
    assert all(torch.equal(first.weights[name], again.weights[name]) for name in first.weights)
    assert not torch.equal(first.weights["layer.weight"], other.weights["layer.weight"])


def test_train_keeps_the_best_epoch_and_its_outputs(points: dict[str, Tensor]) -> None:
    trained = fit(points, replace(PLAIN, learning_rate=2.0, epochs=8))
    scores = [epoch.dev_weighted_f1 for epoch in trained.history]
    assert len(set(scores)) > 1
    assert trained.selected_epoch == 1 + scores.index(max(scores))
    model = Line()
    model.load_state_dict(trained.weights)
    for split, values in points.items():
        expected = compute(model, Points(values), 8)["logits"]
        assert torch.equal(trained.outputs[split]["logits"], expected)
        assert len(expected) == len(values)


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6), batch_size=st.integers(1, 5))
def test_no_batch_holds_rows_of_two_dialogues(lengths: list[int], batch_size: int) -> None:
    """Of each dialogue all batches but the last are full, whatever stands around it."""
    asked: list[list[int]] = []

    class Noted(Points):
        def __getitem__(self, rows: list[int]) -> dict[str, Tensor]:
            asked.append(rows)
            return super().__getitem__(rows)

    values = torch.arange(2.0 * sum(lengths)).reshape(-1, 2)
    model = Line()
    found = compute(model, Noted(values), batch_size, lengths)["logits"]
    assert torch.allclose(found, model.layer(values).detach())
    expected = []
    for length, end in zip(lengths, torch.tensor(lengths).cumsum(0).tolist(), strict=True):
        rows = list(range(end - length, end))
        expected += [rows[first : first + batch_size] for first in range(0, length, batch_size)]
    assert asked == expected


def test_train_stops_when_patience_is_over(points: dict[str, Tensor]) -> None:
    still = replace(PLAIN, learning_rate=1e-9, epochs=9, patience=3)
    trained = fit(points, still)
    assert trained.selected_epoch == 1
    assert len(trained.history) == 4


def test_train_clips_gradients(points: dict[str, Tensor]) -> None:
    clipped = fit(points, replace(PLAIN, max_gradient_norm=1e-12, epochs=1))
    torch.manual_seed(0)
    # AdamW divides by the gradient's size plus 1e-8, so gradients of 1e-12 move nothing.
    assert torch.allclose(clipped.weights["layer.weight"], Line().layer.weight, atol=1e-3)
    moved = fit(points, replace(PLAIN, epochs=1)).weights["layer.weight"]
    assert (moved - clipped.weights["layer.weight"]).abs().max() > 1e-2


def test_train_refuses_a_loss_that_is_not_finite(points: dict[str, Tensor]) -> None:
    points["train"][3] = float("nan")
    with pytest.raises(TrainingError, match="the loss of epoch 1 is nan; lower the learning rate"):
        fit(points)


def test_mixed_precision_leaves_float32_outputs(points: dict[str, Tensor]) -> None:
    full = fit(points)
    AcceleratorState._reset_state(reset_partial_state=True)
    mixed = fit(points, hardware=Hardware("cpu", "bf16"))
    logits = mixed.outputs["test"]["logits"]
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, full.outputs["test"]["logits"])
    assert torch.equal(logits, logits.bfloat16().float())


def test_hardware_refuses_what_is_not_there() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(InputError, match=r"--device: .* got cuda, .* choose cpu"):
        Hardware("cuda")
    with pytest.raises(InputError, match=r"--mixed-precision: .* got fp16; choose bf16"):
        Hardware("cpu", "fp16")


def same(one: Trained, other: Trained) -> None:
    assert one.history == other.history
    assert one.selected_epoch == other.selected_epoch
    assert one.weights.keys() == other.weights.keys()
    assert all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights)
    for split, fields in one.outputs.items():
        assert all(torch.equal(fields[name], other.outputs[split][name]) for name in fields)


def checkpoints(folder: Path, every: int | None = None) -> Checkpoints:
    return Checkpoints(folder, "settings", every, "small")


class Interrupting:
    """The objective of the small stage, and Ctrl-C in the middle of one of its steps."""

    def __init__(self, at: int) -> None:
        truth = small_stage.labels(small_stage.points()["train"])
        self.objective = Classification(truth, 2, ClassificationRecipe())
        self.calls, self.at = 0, at

    def __call__(self, output: Any, share: Share) -> Tensor:
        self.calls += 1
        if self.calls == self.at:
            os.kill(os.getpid(), signal.SIGINT)
        return self.objective(output, share)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("at", range(1, small_stage.STEPS + 1, 2))
def test_ctrl_c_keeps_the_step_at_hand_and_the_rest_is_as_if_it_never_came(
    tmp_path: Path, at: int, accumulation: int
) -> None:
    hardware = Hardware("cpu", accumulation=accumulation)
    whole = small_stage.fit(hardware=hardware)
    with pytest.raises(KeyboardInterrupt):
        small_stage.fit(checkpoints(tmp_path), hardware=hardware, objective=Interrupting(at))
    newest = checkpoints(tmp_path).newest()
    assert newest is not None
    assert newest.stem.startswith(f"step-{at:09d}-")
    rest = Interrupting(-1)
    same(whole, small_stage.fit(checkpoints(tmp_path), hardware=hardware, objective=rest))
    assert rest.calls == small_stage.STEPS - at


def test_ctrl_c_while_dev_is_computed_keeps_the_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = small_stage.fit()

    def press(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("examples.erc.training.compute", press)
    with pytest.raises(KeyboardInterrupt):
        small_stage.fit(checkpoints(tmp_path, every=100))
    monkeypatch.undo()
    rest = Interrupting(-1)
    same(whole, small_stage.fit(checkpoints(tmp_path, every=100), objective=rest))
    assert rest.calls == small_stage.STEPS - 3


def test_checkpoints_change_nothing_and_a_finished_training_does_not_train(tmp_path: Path) -> None:
    whole = small_stage.fit()
    same(whole, small_stage.fit(checkpoints(tmp_path, every=2)))
    rest = Interrupting(-1)
    again = small_stage.fit(checkpoints(tmp_path, every=2), objective=rest)
    same(whole, again)
    assert rest.calls == 0


def test_patience_is_over_after_resuming_too(tmp_path: Path) -> None:
    still = replace(small_stage.OPTIMISATION, learning_rate=1e-9, epochs=9, patience=2)
    whole = small_stage.fit(optimisation=still)
    assert len(whole.history) == 3
    with pytest.raises(KeyboardInterrupt):
        small_stage.fit(checkpoints(tmp_path), optimisation=still, objective=Interrupting(7))
    same(whole, small_stage.fit(checkpoints(tmp_path), optimisation=still))


def test_a_checkpoint_of_another_device_is_refused(tmp_path: Path) -> None:
    small_stage.fit(checkpoints(tmp_path))
    newest = checkpoints(tmp_path).newest()
    assert newest is not None
    state = checkpoints(tmp_path).load(newest)
    checkpoints(tmp_path).save(100, 3, {**state, "device": "cuda"})
    with pytest.raises(InputError, match=r"of the device cpu, got one of cuda; go on with --devi"):
        small_stage.fit(checkpoints(tmp_path))


@pytest.mark.parametrize("name", ["order", "schedule", "optimiser", "streams", "total", "weights"])
def test_a_missing_state_is_an_error(tmp_path: Path, name: str) -> None:
    small_stage.fit(checkpoints(tmp_path))
    newest = checkpoints(tmp_path).newest()
    assert newest is not None
    state = checkpoints(tmp_path).load(newest)
    del state[name]
    checkpoints(tmp_path).save(100, 3, state)
    with pytest.raises(KeyError, match=name):
        small_stage.fit(checkpoints(tmp_path))


@dataclass(frozen=True)
class Scaled(Hardware):
    """A processor with a gradient scaler, as a GPU has with fp16."""

    scale: float = 1.0

    def __post_init__(self) -> None: ...

    def accelerator(self) -> Accelerator:
        accelerator = Accelerator(cpu=True, mixed_precision="fp16")
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=self.scale, growth_interval=4)
        accelerator.native_amp = True
        return accelerator


def test_gradients_are_unscaled_before_they_are_clipped() -> None:
    clipped = replace(small_stage.OPTIMISATION, max_gradient_norm=1e-9)
    one = small_stage.fit(optimisation=clipped, hardware=Scaled(scale=1.0))
    other = small_stage.fit(optimisation=clipped, hardware=Scaled(scale=1024.0))
    for name, weights in one.weights.items():
        assert torch.allclose(weights, other.weights[name], rtol=1e-3, atol=1e-5)


def test_the_gradient_scaler_is_restored(tmp_path: Path) -> None:
    hardware = Scaled(scale=2.0**15)  # which is doubled, and overflows, on the way
    whole = small_stage.fit(checkpoints(tmp_path / "whole"), hardware=hardware)
    with pytest.raises(KeyboardInterrupt):
        small_stage.fit(
            checkpoints(tmp_path / "broken"), hardware=hardware, objective=Interrupting(5)
        )
    same(whole, small_stage.fit(checkpoints(tmp_path / "broken"), hardware=hardware))
    scalers = []
    for folder in ("whole", "broken"):
        newest = checkpoints(tmp_path / folder).newest()
        assert newest is not None
        scalers.append(json.loads(newest.read_text())["state"]["scaler"])
    assert scalers[0] == scalers[1]
    assert scalers[0]["scale"] != 2.0**15


class Relating(nn.Module):
    """A student without anything random."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 6)
        self.classifier = nn.Linear(6, 3)

    def forward(self, points: Tensor) -> EncoderOutput:
        features = self.layer(points).tanh()
        return EncoderOutput(features, self.classifier(features))


@pytest.mark.parametrize("accumulation", [2, 3])
def test_a_batch_in_parts_has_the_losses_of_the_whole_batch(accumulation: int) -> None:
    truth = small_stage.labels(small_stage.points()["train"])
    generator = torch.Generator().manual_seed(0)
    recipe = StudentRecipe(small_stage.OPTIMISATION, 2.0, 1.0, 1.0, 1.0, 1.0, 0.5)
    objective = Distillation(
        Classification(truth, 3, ClassificationRecipe(1.0, 1.0)),
        recipe,
        torch.randn(len(truth), 3, generator=generator),
        torch.randn(len(truth), 6, generator=generator),
    )
    whole, parts = (
        small_stage.fit(
            hardware=Hardware("cpu", accumulation=count), objective=objective, build=Relating
        )
        for count in (1, accumulation)
    )

    def mean_of_halves(output: EncoderOutput, share: Share) -> Tensor:
        pieces = zip(*(field.chunk(2) for field in (*output, share.rows)), strict=True)
        losses = [objective(EncoderOutput(*fields), Share(rows, rows)) for *fields, rows in pieces]
        return torch.stack(losses).mean()

    naive = small_stage.fit(objective=mean_of_halves, build=Relating)
    for name, weights in whole.weights.items():
        assert torch.allclose(weights, parts.weights[name], rtol=1e-4, atol=1e-6), name
        assert not torch.allclose(weights, naive.weights[name], rtol=1e-2, atol=1e-2), name
    for one, other in zip(whole.history, parts.history, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-5)


class Remembering(Distillation):
    """A distillation with a memory, and Ctrl-C in the middle of one of its steps, if any."""

    def __init__(self, at: int = 0) -> None:
        truth = small_stage.labels(small_stage.points()["train"])
        generator = torch.Generator().manual_seed(0)
        super().__init__(
            Classification(truth, 3, ClassificationRecipe()),
            StudentRecipe(small_stage.OPTIMISATION, 2.0, 1.0, 1.0, 1.0, 1.0, 0.5, memory_size=11),
            torch.randn(len(truth), 3, generator=generator),
            torch.randn(len(truth), 6, generator=generator),
        )
        self.calls, self.at = 0, at

    def __call__(self, output: EncoderOutput, share: Share) -> Tensor:
        self.calls += 1
        if self.calls == self.at:
            os.kill(os.getpid(), signal.SIGINT)
        return super().__call__(output, share)


@pytest.mark.parametrize("at", [1, 2, 5, 9])
def test_a_memory_is_part_of_the_checkpoint(tmp_path: Path, at: int) -> None:
    whole = small_stage.fit(objective=Remembering(), build=Relating)
    with pytest.raises(KeyboardInterrupt):
        small_stage.fit(checkpoints(tmp_path), objective=Remembering(at), build=Relating)
    found = checkpoints(tmp_path).newest()
    assert found is not None
    state = checkpoints(tmp_path).load(found)["objective"]
    assert state["feature.memory.present"].sum() == min(11, 8 * at)
    same(whole, small_stage.fit(checkpoints(tmp_path), objective=Remembering(), build=Relating))


@given(count=st.integers(1, 50), parts=st.integers(1, 8))
def test_cut_keeps_order_and_balance(count: int, parts: int) -> None:
    pieces = cut(range(count), parts)
    assert [row for piece in pieces for row in piece] == list(range(count))
    sizes = [len(piece) for piece in pieces]
    assert len(sizes) == parts
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1


def test_batches_with_fewer_rows_than_parts_are_refused() -> None:
    check_parts([[1, 2, 3], [4, 5, 6, 7]], 3, "MELD")
    with pytest.raises(InputError, match=r"MELD: expected at least 4 rows .*, got 3; take fewer"):
        check_parts([[1, 2, 3], [4, 5, 6, 7]], 4, "MELD")
    with pytest.raises(InputError, match="at least 9 rows"):
        small_stage.fit(hardware=Hardware("cpu", accumulation=9))


def test_models_that_leave_layers_out_are_known_by_their_configuration() -> None:
    class Configuration(NamedTuple):
        layerdrop: float

    model = nn.Sequential(nn.Linear(1, 1))
    assert not leaves_layers_out(model)
    model[0].config = Configuration(0.0)
    assert not leaves_layers_out(model)
    model[0].config = Configuration(0.1)
    assert leaves_layers_out(model)


def test_uninterrupted_waits_and_leaves_the_handler_as_it_was() -> None:
    before = signal.getsignal(signal.SIGINT)
    reached = []

    def press_and_go_on() -> None:
        with uninterrupted():
            os.kill(os.getpid(), signal.SIGINT)
            reached.append("the end")

    with pytest.raises(KeyboardInterrupt):
        press_and_go_on()
    assert reached == ["the end"]
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(ValueError, match="an error"), uninterrupted():
        raise ValueError("an error")
    assert signal.getsignal(signal.SIGINT) is before
