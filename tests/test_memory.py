"""Losses with a memory: what they are the losses of, and what is remembered, and how long."""

import copy
import math
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from telme_kd import BatchSimilarityLoss, DISTLoss, RelationMemory, StudentLoss
from telme_kd.errors import DistributedError, RangeError, ShapeError
from telme_kd.reference import memory as definition
from tests.helpers import processes, strategies
from tests.helpers.synchronisation import NoValueIsRead

pytestmark = pytest.mark.filterwarnings("ignore::telme_kd.errors.DegenerateBatchWarning")

WIDTH = 5
UPSTREAM = 3.0
HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)

Loss = DISTLoss | BatchSimilarityLoss
Make = Callable[..., Loss]


def dist(**options: Any) -> DISTLoss:
    return DISTLoss(2.0, 0.5, 3.0, **options)


def similarity(**options: Any) -> BatchSimilarityLoss:
    return BatchSimilarityLoss(0.3, **options)


BOTH = pytest.mark.parametrize("make", [dist, similarity])


def expected_loss(loss: Loss, now: tuple[Tensor, Tensor], before: tuple[Tensor, Tensor]) -> Tensor:
    """By definition."""
    if isinstance(loss, BatchSimilarityLoss):
        return definition.batch_similarity_loss_with_memory(
            *now, *before, temperature=loss.temperature
        )
    return definition.dist_loss_with_memory(
        *now,
        *before,
        temperature=loss.temperature,
        inter_weight=loss.inter_weight,
        intra_weight=loss.intra_weight,
        eps=loss.eps,
    )


def draw(count: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Rows of a student, which wants a gradient, and of a teacher."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, count, WIDTH, dtype=dtype, generator=generator)
    return student.requires_grad_(), teacher


def filled(make: Make, size: int = 6, dtype: torch.dtype = torch.float64, **options: Any) -> Loss:
    """A loss that has seen a batch of ten."""
    loss = make(memory_size=size, **options)
    loss(*draw(10, 99, dtype))
    return loss


def memory_of(loss: Loss) -> RelationMemory:
    assert loss.memory is not None
    return loss.memory


def held(loss: Loss) -> tuple[Tensor, Tensor]:
    memory = memory_of(loss)
    return memory.student[memory.present], memory.teacher[memory.present]


def state(loss: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in loss.state_dict().items()}


def same_state(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(
        torch.equal(value, theirs[name]) and value.dtype is theirs[name].dtype
        for name, value in ours.items()
    )


def value_and_gradient(loss: Loss, *arguments: Any) -> tuple[Tensor, Tensor]:
    value = loss(*arguments)
    (gradient,) = torch.autograd.grad(UPSTREAM * value, arguments[0])
    return value.detach(), gradient


# --- off, unused, evaluating: the loss of the batch -----------------------------------------------


@BOTH
def test_without_a_memory_nothing_is_there(make: Make) -> None:
    loss = make()
    assert loss.memory is None
    assert loss.state_dict() == {}
    assert [*loss.children()] == []
    assert repr(loss) == repr(make(memory_size=0))
    assert StudentLoss().state_dict() == {}


@BOTH
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_an_empty_memory_changes_no_bit(make: Make, masked: bool, dtype: torch.dtype) -> None:
    student, teacher = draw(8, 0, dtype)
    mask = torch.arange(8) != 3 if masked else None
    loss = make(memory_size=4)
    first = value_and_gradient(loss, student, teacher, mask)
    plain = value_and_gradient(make(), student, teacher, mask)
    assert all(map(torch.equal, first, plain))
    memory_of(loss).reset()
    assert memory_of(loss).is_unused
    assert not memory_of(loss).present.any()
    again = value_and_gradient(loss, student, teacher, mask)
    assert all(map(torch.equal, again, plain))


@BOTH
def test_a_memory_without_an_item_changes_rounding_alone(make: Make) -> None:
    loss = make(memory_size=4)
    loss(*draw(3, 1), torch.zeros(3, dtype=torch.bool))  # used, and still empty
    found, plain = (value_and_gradient(each, *draw(8, 0)) for each in (loss, make()))
    torch.testing.assert_close(found, plain, rtol=1e-13, atol=1e-15)


@BOTH
def test_evaluation_is_of_the_batch_alone_and_leaves_the_memory(make: Make) -> None:
    loss = filled(make).eval()
    before = state(loss)
    found, plain = (value_and_gradient(each, *draw(8, 0)) for each in (loss, make()))
    assert all(map(torch.equal, found, plain))
    assert all(torch.equal(before[name], value) for name, value in loss.state_dict().items())


def test_the_inter_class_term_alone_needs_no_memory() -> None:
    loss, plain = DISTLoss(intra_weight=0.0, memory_size=4), DISTLoss(intra_weight=0.0)
    for seed in range(3):
        assert torch.equal(loss(*draw(4, seed)), plain(*draw(4, seed)))
    assert memory_of(loss).is_unused


def test_the_intra_class_term_alone() -> None:
    loss = DISTLoss(2.0, inter_weight=0.0, memory_size=6)
    loss(*draw(10, 99))
    before = held(loss)
    now = draw(4, 0)
    torch.testing.assert_close(loss(*now), expected_loss(loss, now, before))


# --- on: the loss of the batch and the memory -----------------------------------------------------


@dataclass(frozen=True)
class Step:
    """A batch of a training, with the places of what is masked and what is spoilt."""

    items: int
    seed: int
    masked: tuple[int, ...]
    spoilt: tuple[int, ...]


steps = st.lists(
    st.builds(
        Step,
        items=st.integers(1, 9),
        seed=strategies.seeds,
        masked=st.just(()) | st.lists(st.integers(0, 8), max_size=4).map(tuple),
        spoilt=st.just(()) | st.lists(st.integers(0, 8), max_size=1).map(tuple),
    ),
    min_size=1,
    max_size=5,
)


@BOTH
@given(
    steps=steps,
    size=st.integers(1, 12),
    backend=st.sampled_from(["auto", "reference"]),
    junk=st.sampled_from([math.nan, math.inf]),
)
def test_every_step_is_by_definition(
    make: Make, steps: list[Step], size: int, backend: Any, junk: float
) -> None:
    loss = make(memory_size=size, backend=backend)
    empty = torch.zeros(0, WIDTH, dtype=torch.float64)
    before = empty, empty
    for step in steps:
        student, teacher = draw(step.items, step.seed)
        places = torch.arange(step.items)
        mask = ~torch.isin(places, torch.tensor(step.masked, dtype=torch.int64))
        spoilt = torch.isin(places, torch.tensor(step.spoilt, dtype=torch.int64))
        with torch.no_grad():
            student[~mask] = junk
            teacher[spoilt, 0] = junk
        value, gradient = value_and_gradient(loss, student, teacher, mask)
        if (mask & spoilt).any():
            assert value.isnan()
        elif not mask.any():
            assert value == 0
            assert (gradient == 0).all()
        else:
            now = student[mask].detach().requires_grad_(), teacher[mask]
            expected = expected_loss(loss, now, before)
            torch.testing.assert_close(value, expected.detach(), rtol=1e-11, atol=1e-13)
            (wanted,) = torch.autograd.grad(UPSTREAM * expected, now[0])
            torch.testing.assert_close(gradient[mask], wanted, rtol=1e-8, atol=1e-11)
            assert (gradient[~mask] == 0).all()
        usable = mask & ~spoilt
        before = (
            definition.remembered(before[0], student[usable], size),
            definition.remembered(before[1], teacher[usable], size),
        )
        assert all(map(torch.equal, held(loss), before))
        for name, left in state(loss).items():
            assert left.isfinite().all(), name


@BOTH
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_named_backends(make: Make, backend: Any) -> None:
    loss = make(memory_size=6, backend=backend)
    for seed in range(3):
        before = held(loss) if seed else None
        now = draw(4, seed, torch.float32)
        value, gradient = value_and_gradient(loss, *now)
        if before is not None:
            exact = [side.detach().double() for side in now]
            exact[0].requires_grad_()
            expected = expected_loss(loss, (exact[0], exact[1]), tuple(s.double() for s in before))
            torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
            (wanted,) = torch.autograd.grad(UPSTREAM * expected, exact[0])
            torch.testing.assert_close(gradient.double(), wanted, rtol=1e-3, atol=1e-5)


@BOTH
@given(seed=strategies.seeds)
def test_the_order_of_what_is_remembered_does_not_matter(make: Make, seed: int) -> None:
    one, other = filled(make, 8), filled(make, 8)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
    memory = memory_of(other)
    memory.student.copy_(memory.student[order])
    memory.teacher.copy_(memory.teacher[order])
    now = draw(4, seed)
    found, expected = (value_and_gradient(each, *now) for each in (one, other))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@BOTH
@pytest.mark.parametrize("items", [1, 2])
def test_the_smallest_batches_have_relations(make: Make, items: int) -> None:
    options = {"memory_size": 32}
    loss: Loss = DISTLoss(inter_weight=0.0, **options) if make is dist else similarity(**options)
    plain: Loss = DISTLoss(inter_weight=0.0) if make is dist else similarity()
    loss(*draw(32, 1))
    _, gradient = value_and_gradient(loss, *draw(items, 0))
    assert gradient.norm() > 1e-2
    if make is dist or items == 1:
        _, without = value_and_gradient(plain, *draw(items, 0))
        assert without.norm() < 1e-9


@BOTH
def test_a_remembered_batch_is_pulled_as_strongly_as_a_large_one(make: Make) -> None:
    """However much is remembered, an item's gradient is that of its own batch in size."""
    sizes = []
    for size in (60, 600, 6000):
        loss = filled(make, size)
        loss(*draw(size, 1))
        _, gradient = value_and_gradient(loss, *draw(4, 0))
        sizes.append(gradient.norm().item())
    assert max(sizes) < 1.5 * min(sizes)


@BOTH
def test_losses_of_several_steps_can_wait_for_their_backward_pass(make: Make) -> None:
    at_once, later = filled(make), filled(make)
    batches = [draw(4, seed) for seed in range(3)]
    expected = [torch.autograd.grad(at_once(*batch), batch[0])[0] for batch in batches]
    losses = [later(*batch) for batch in batches]
    found = [torch.autograd.grad(losses[i], batches[i][0])[0] for i in (2, 0, 1)]
    assert all(map(torch.equal, found, [expected[i] for i in (2, 0, 1)]))


@BOTH
def test_a_teacher_that_wants_a_gradient_gets_it(make: Make) -> None:
    loss = filled(make)
    before = held(loss)
    student, teacher = draw(4, 0)
    teacher.requires_grad_()
    found = torch.autograd.grad(loss(student, teacher), (student, teacher))
    expected = torch.autograd.grad(
        expected_loss(loss, (student, teacher), before), (student, teacher)
    )
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)
    assert not any(value.requires_grad for value in loss.state_dict(keep_vars=True).values())


@BOTH
def test_the_second_derivative_is_that_of_the_definition(make: Make) -> None:
    loss = filled(make, backend="reference")
    before = held(loss)
    student, teacher = draw(4, 0)
    direction = torch.randn(4, WIDTH, dtype=torch.float64, generator=torch.manual_seed(8))

    def second(value: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(value, student, create_graph=True)
        return torch.autograd.grad((gradient * direction).sum(), student)[0]

    expected = second(expected_loss(loss, (student, teacher), before))
    torch.testing.assert_close(second(loss(student, teacher)), expected, rtol=1e-9, atol=1e-12)


@HALVES
@BOTH
def test_half_precision_is_remembered_without_loss(make: Make, dtype: torch.dtype) -> None:
    half, wide = make(memory_size=6), make(memory_size=6)
    for seed in range(3):
        student, teacher = draw(4, seed, dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = half(student, teacher)
        assert found.dtype is torch.float32
        torch.testing.assert_close(found, wide(student.float(), teacher.float()))
    assert same_state(half, wide)
    assert memory_of(half).student.dtype is torch.float32


def test_batch_axes_and_class_dim_are_those_of_the_flattened_batch() -> None:
    flat, shaped = DISTLoss(memory_size=6), DISTLoss(class_dim=1, memory_size=6)
    features, images = similarity(memory_size=6), similarity(memory_size=6)
    for seed in range(3):
        student, teacher = draw(8, seed)
        mask = torch.arange(8) % 3 > 0
        pair = [side.unflatten(0, (2, 4)) for side in (student, teacher)]
        found = shaped(*(side.movedim(-1, 1) for side in pair), mask.unflatten(0, (2, 4)))
        torch.testing.assert_close(found, flat(student, teacher, mask))
        found = images(*pair, mask.unflatten(0, (2, 4)))
        torch.testing.assert_close(found, features(student, teacher, mask))
    assert same_state(flat, shaped)
    assert same_state(features, images)


# --- what is remembered ---------------------------------------------------------------------------


def test_a_class_that_is_left_out_is_remembered_and_an_infinite_feature_is_not() -> None:
    student, teacher = (side.detach() for side in draw(8, 0))
    student[:, 2] = teacher[:, 2] = -math.inf
    response, feature = dist(memory_size=8), similarity(memory_size=8)
    for _ in range(2):
        assert response(student, teacher).isfinite()
        assert feature(student, teacher).isnan()
    assert memory_of(response).present.all()
    assert not memory_of(feature).present.any()
    student[3] = -math.inf  # no class is left
    response(student, teacher)
    assert (held(response)[0] > -math.inf).any(dim=1).all()


@BOTH
def test_finite_rows_of_any_size_are_remembered(make: Make) -> None:
    loss = make(memory_size=8)
    student, teacher = draw(8, 0, torch.float32)
    for _ in range(2):
        loss(3e38 * student.clamp(-1, 1), 3e38 * teacher.clamp(-1, 1))
    assert memory_of(loss).present.all()


@BOTH
def test_a_memory_in_evaluation_is_read_and_not_written(make: Make) -> None:
    loss = filled(make)
    memory_of(loss).eval()
    before = held(loss)
    now = draw(4, 0)
    for _ in range(2):
        torch.testing.assert_close(loss(*now), expected_loss(loss, now, before))
    assert all(map(torch.equal, held(loss), before))
    memory_of(loss).train()
    loss(*now)
    assert torch.equal(held(loss)[1][-4:], now[1])


@BOTH
def test_whether_gradients_are_wanted_makes_no_difference(make: Make) -> None:
    losses = [make(memory_size=6) for _ in range(3)]
    for seed in range(3):
        now = draw(4, seed)
        losses[0](*now).backward()
        with torch.no_grad():
            losses[1](*now)
        with torch.inference_mode():
            losses[2](*(side.detach() for side in now))
    assert same_state(losses[0], losses[1])
    assert same_state(losses[0], losses[2])
    losses[2](*draw(4, 9)).backward()  # what inference left is not in the way


@BOTH
def test_transforms_take_a_memory_that_does_not_learn(make: Make) -> None:
    loss = filled(make)
    memory_of(loss).eval()
    student, teacher = draw(4, 0)
    expected = torch.autograd.grad(loss(student, teacher), student)[0]
    found = torch.func.grad(lambda rows: loss(rows, teacher))(student.detach())
    torch.testing.assert_close(found, expected)


@BOTH
def test_a_mistake_leaves_the_memory(make: Make) -> None:
    loss = filled(make)
    before = state(loss)
    with pytest.raises(ShapeError, match=r"^memory: expected rows of width 5, .* got 7; call res"):
        loss(torch.randn(4, 7), torch.randn(4, 7))
    loss.backend = "nonsense"  # type: ignore[assignment]
    with pytest.raises(RangeError, match="backend"):
        loss(*draw(4, 0))
    assert all(torch.equal(before[name], value) for name, value in loss.state_dict().items())


@BOTH
def test_inputs_are_never_modified_nor_shared(make: Make) -> None:
    loss = filled(make, 4)
    student, teacher = draw(4, 0)
    mask = torch.tensor([True, False, True, True])
    originals = [value.detach().clone() for value in (student, teacher, mask)]
    loss(student, teacher, mask).backward()
    assert all(map(torch.equal, (student, teacher, mask), originals))
    loss(*draw(4, 1))
    before = state(loss)
    with torch.no_grad():
        student.zero_()
    assert all(torch.equal(before[name], value) for name, value in loss.state_dict().items())


# --- state ----------------------------------------------------------------------------------------


def continued(loss: Loss) -> list[Tensor]:
    """Losses and gradients of the next steps."""
    return [
        tensor
        for seed in range(20, 24)
        for tensor in value_and_gradient(loss, *draw(4, seed))
    ]  # fmt: skip


def by_state_dict(make: Make, loss: Loss) -> Loss:
    fresh = make(memory_size=6)
    fresh.load_state_dict(loss.state_dict())
    return fresh


def by_assignment(make: Make, loss: Loss) -> Loss:
    fresh = make(memory_size=6)
    fresh.load_state_dict(state(loss), assign=True)
    return fresh


def into_a_used_one(make: Make, loss: Loss) -> Loss:
    used = filled(make, dtype=torch.float32)
    used(*draw(4, 50, torch.float32))
    used.load_state_dict(loss.state_dict())
    return used


WAYS: list[Callable[[Make, Loss], Loss]] = [
    by_state_dict,
    by_assignment,
    into_a_used_one,
    lambda make, loss: copy.deepcopy(loss),
    lambda make, loss: pickle.loads(pickle.dumps(loss)),
]


@BOTH
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("batches", [0, 1, 3])
def test_a_training_goes_on_to_the_bit(
    make: Make, way: Callable[[Make, Loss], Loss], batches: int
) -> None:
    loss = make(memory_size=6)
    for seed in range(batches):
        loss(*draw(4, seed))
    other = way(make, loss)
    assert same_state(loss, other)
    assert all(map(torch.equal, continued(loss), continued(other)))
    assert same_state(loss, other)


@BOTH
def test_a_state_of_another_size_or_width_is_refused(make: Make) -> None:
    loss = filled(make)
    with pytest.raises(RuntimeError, match=r"size mismatch for memory\.student"):
        make(memory_size=7).load_state_dict(loss.state_dict())
    other = make(memory_size=6)
    other(torch.randn(4, 3), torch.randn(4, 3))
    with pytest.raises(RuntimeError, match=r"size mismatch for memory\.teacher"):
        other.load_state_dict(loss.state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) .*memory\.student"):
        make().load_state_dict(loss.state_dict())


@BOTH
def test_a_module_that_is_moved_moves_its_memory(make: Make) -> None:
    loss = filled(make)
    loss.half()  # rounds what is remembered; what follows is not
    assert memory_of(loss).student.dtype is torch.float16
    assert loss(*draw(4, 0)).isfinite()
    assert memory_of(loss).student.dtype is torch.float64
    assert all(value.is_meta for value in loss.to("meta").state_dict().values())
    unused = make(memory_size=6)
    unused(*(side.to("meta") for side in draw(4, 0)))
    assert all(value.is_meta for value in unused.state_dict().values())


def test_parts_of_a_model_carry_it_in_their_state() -> None:
    model = nn.ModuleDict({"criterion": StudentLoss(memory_size=3)})
    names = {f"{term}.memory.{name}" for term in ("response", "feature") for name in (
        "student", "teacher", "present",
    )}  # fmt: skip
    assert model.state_dict().keys() == {f"criterion.{name}" for name in names}
    assert "(memory): RelationMemory(size=3)" in repr(model)


# --- the host never waits -------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("masked", [False, True])
def test_no_value_is_read(make: Make, masked: bool) -> None:
    loss = filled(make, backend="reference")
    student, teacher = draw(4, 0)
    mask = torch.tensor([True, False, True, True]) if masked else None
    with NoValueIsRead():
        loss(student, teacher, mask).backward()
    assert student.grad is not None


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@BOTH
@pytest.mark.usefixtures("deterministic")
def test_deterministic_algorithms_are_used(make: Make) -> None:
    one, other = filled(make), filled(make)
    assert all(map(torch.equal, continued(one), continued(other)))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_it_compiles_without_a_graph_break(backend: Any) -> None:
    torch._dynamo.reset()

    def objective() -> StudentLoss:
        return StudentLoss(
            response=dist(memory_size=6, backend=backend),
            feature=similarity(memory_size=6, backend=backend),
        )

    eager, other = objective(), objective()
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    labels = torch.arange(4)
    for seed in range(4):
        logits, features = draw(4, seed), draw(4, seed + 10)
        losses = [
            loss(*logits, labels, student_features=features[0], teacher_features=features[1]).total
            for loss in (eager, compiled)
        ]
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-12, atol=0.0)
        gradients = [torch.autograd.grad(loss, (logits[0], features[0])) for loss in losses]
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-10, atol=1e-13)
    assert same_state(eager, other)


# --- over processes -------------------------------------------------------------------------------

SHARDS = [(4, 4, 4, 4), (1, 5, 0, 2), (0, 0, 3, 0), (2, 2, 2, 3)]
"""The items that four processes have of the batch, step after step."""


def shared_steps(rank: int, name: str, masked: bool) -> list[Any]:
    """Values, own gradients as DDP averages them, and the memory after each step."""
    loss = {"dist": dist, "similarity": similarity}[name](memory_size=6, group="world")
    found: list[Any] = []
    for seed, sizes in enumerate(SHARDS):
        student, teacher = draw(sum(sizes), seed)
        own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        mask = None
        if masked and rank != 1:  # whose items all count
            mask = (torch.arange(sum(sizes)) % 3 > 0)[own]
        own_student = student[own].detach().requires_grad_()
        value, gradient = value_and_gradient(loss, own_student, teacher[own], mask)
        rows = [side.tolist() for side in held(loss)]
        found.append((value.item(), (gradient / len(sizes)).tolist(), rows))
    return found


@BOTH
@pytest.mark.parametrize("masked", [False, True])
def test_a_group_has_the_loss_and_the_memory_of_one_process(
    crew: processes.Crew, make: Make, masked: bool
) -> None:
    shares = crew(shared_steps, make.__name__, masked)
    loss = make(memory_size=6)
    for seed, sizes in enumerate(SHARDS):
        mask = None
        if masked:
            mask = torch.arange(sum(sizes)) % 3 > 0
            mask[sizes[0] : sum(sizes[:2])] = True
        value, gradient = value_and_gradient(loss, *draw(sum(sizes), seed), mask)
        for share in shares:
            assert share[seed][0] == pytest.approx(value.item(), rel=1e-12)
            assert share[seed][2] == [side.tolist() for side in held(loss)]
        found = torch.tensor([row for share in shares for row in share[seed][1]]).double()
        torch.testing.assert_close(found, gradient, rtol=1e-6, atol=1e-9)


def at_odds(rank: int) -> str:
    loss = dist(memory_size=6, group="world")
    if rank == 2:
        state = filled(dist).state_dict()
        loss.load_state_dict(state)
    with pytest.raises(DistributedError, match=r"got others in 2 than in 0") as caught:
        loss(*draw(4, 0))
    return str(caught.value)


def test_processes_with_different_memories_are_told(crew: processes.Crew) -> None:
    assert len({*crew(at_odds)}) == 1
