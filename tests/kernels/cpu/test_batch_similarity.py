"""Batch similarity on the CPU: against the definition and 60 digits, whole and in blocks."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from telme_kd.kernels.cpu import batch_similarity as passes
from telme_kd.reference import batch_similarity as reference
from tests.helpers import strategies, tolerances, truth
from tests.helpers.strategies import Features

PRECISIONS = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
NEEDS = [(True, False), (False, True), (True, True)]

Outcome = tuple[Tensor, Tensor | None, Tensor | None]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Make blocks of so many rows."""

    def height(rows: int) -> None:
        monkeypatch.setattr(passes, "_BLOCK_BYTES", 1)
        monkeypatch.setattr(passes, "_FEWEST_ROWS", rows)

    return height


def outcome(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float = 0.5,
    needs: tuple[bool, bool] = (True, True),
    grad_output: float = 1.0,
) -> Outcome:
    """Loss and gradients by the two passes."""
    options = {"student_needs_grad": needs[0], "teacher_needs_grad": needs[1]}
    loss, rows, gradients = passes.forward(
        student, teacher, mask, temperature=temperature, **options
    )
    assert (rows.shape, gradients.shape) == passes.saved_shapes(
        *student.shape, dtype=student.dtype, **options
    )
    assert rows.dtype == gradients.dtype == loss.dtype
    student_gradient, teacher_gradient = passes.backward(
        torch.tensor(grad_output, dtype=loss.dtype),
        student,
        teacher,
        mask,
        rows,
        gradients,
        temperature=temperature,
        **options,
    )
    return loss, student_gradient, teacher_gradient


def expected_outcome(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, *, temperature: float = 0.5
) -> tuple[Tensor, Tensor, Tensor]:
    """The same by autograd of the definition, in float64."""
    student, teacher = (x.detach().double().requires_grad_() for x in (student, teacher))
    loss = reference.batch_similarity_loss(student, teacher, temperature=temperature, mask=mask)
    return loss.detach(), *torch.autograd.grad(loss, (student, teacher))


def random_pair(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    student, teacher = torch.randn(2, *shape, generator=torch.manual_seed(0), dtype=torch.float64)
    return student.to(dtype), teacher.to(dtype)


def assert_equal_outcomes(ours: Outcome, expected: Outcome) -> None:
    for one, other in zip(ours, expected, strict=True):
        assert one is not None
        assert other is not None
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-14, equal_nan=True)


@given(case=strategies.features())
def test_float64_equals_autograd_of_the_definition(case: Features) -> None:
    pair = case.tensors()
    loss, *gradients = outcome(*pair, temperature=case.temperature)
    expected, *expected_gradients = expected_outcome(*pair, temperature=case.temperature)
    unit = 2.0**-53
    assert abs(loss - expected) <= 2 * tolerances.similarity_bound(case, torch.float64)
    for gradient, exact, features in zip(gradients, expected_gradients, pair, strict=True):
        assert gradient is not None
        norms = torch.linalg.vector_norm(features, dim=1, keepdim=True)
        # A row's gradient is at most 4 / (t |row|): a sum over the batch of probabilities' shares.
        largest = torch.where(norms == 0, 0.0, 4.0 / (case.temperature * norms))
        bound = 16 * unit * (1 + 1 / case.temperature) * len(features) * largest
        assert ((gradient - exact).abs() <= bound).all()


@PRECISIONS
@given(case=strategies.features(items=(1, 5), widths=(1, 6), scale=(1e-3, 100)))
def test_loss_equals_sixty_digits(case: Features, dtype: torch.dtype) -> None:
    student, teacher = case.tensors(dtype)
    case = Features(student.double().numpy(), teacher.double().numpy(), case.temperature)
    expected = truth.mp_batch_similarity(
        truth.matrix(case.student), truth.matrix(case.teacher), temperature=case.temperature
    )
    loss, _, _ = outcome(student, teacher, temperature=case.temperature)
    assert abs(loss.item() - float(expected)) <= tolerances.similarity_bound(case, dtype)


@PRECISIONS
def test_gradients_equal_sixty_digits(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(13_15)
    for temperature in (0.02, 0.1, 0.5, 4.0):
        student, teacher = (torch.tensor(rng.normal(size=(4, 5))).to(dtype) for _ in range(2))
        case = Features(student.double().numpy(), teacher.double().numpy(), temperature)
        matrices = [truth.matrix(side) for side in (case.student, case.teacher)]
        loss = partial(truth.mp_batch_similarity, temperature=temperature)
        exact = (
            truth.mp_gradient(lambda at: loss(at, matrices[1]), matrices[0]),  # noqa: B023
            truth.mp_gradient(lambda at: loss(matrices[0], at), matrices[1]),  # noqa: B023
        )
        _, *gradients = outcome(student, teacher, temperature=temperature)
        for gradient, expected, side in zip(
            gradients, exact, (case.student, case.teacher), strict=True
        ):
            assert gradient is not None
            # A bound for a student's rows; a teacher's row is an anchor and a column at once.
            bound = 4 * tolerances.similarity_gradient_bound(
                Features(side, side, temperature), dtype
            )
            error = np.linalg.norm(gradient.double().numpy() - expected, axis=1)
            assert (error <= bound).all()


@pytest.mark.parametrize("temperature", [0.005, 0.1, 1.0, 64.0])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("rows", [1, 4, 7, 10])
def test_blocks_equal_the_whole(
    small_blocks: Callable[[int], None], rows: int, masked: bool, temperature: float
) -> None:
    pair = random_pair(10, 6)
    mask = torch.arange(10) % 3 != 1 if masked else None
    expected = expected_outcome(*pair, mask, temperature=temperature)
    small_blocks(rows)
    assert_equal_outcomes(outcome(*pair, mask, temperature=temperature), expected)


@pytest.mark.parametrize("needs", [*NEEDS, (False, False)])
@pytest.mark.parametrize("rows", [3, 8])
def test_only_needed_gradients_are_computed_and_they_are_those_of_both(
    small_blocks: Callable[[int], None], rows: int, needs: tuple[bool, bool]
) -> None:
    small_blocks(rows)
    pair = random_pair(8, 5)
    whole_loss, *whole = outcome(*pair)
    loss, *gradients = outcome(*pair, needs=needs)
    assert torch.equal(loss, whole_loss)
    for needed, gradient, expected in zip(needs, gradients, whole, strict=True):
        assert (gradient is not None) is needed
        if gradient is not None:
            assert expected is not None
            assert torch.equal(gradient, expected)


@pytest.mark.parametrize("junk", [torch.nan, torch.inf, 1e300])
@pytest.mark.parametrize("needs", NEEDS)
def test_masked_items_leave_no_trace(needs: tuple[bool, bool], junk: float) -> None:
    student, teacher = random_pair(9, 4)
    mask = torch.tensor([True, False, True, True, False, False, True, True, True])
    expected = outcome(student[mask], teacher[mask], needs=needs)
    student[~mask], teacher[~mask] = junk, -junk
    loss, *gradients = outcome(student, teacher, mask, needs=needs)
    torch.testing.assert_close(loss, expected[0], rtol=1e-13, atol=0.0)
    for gradient, kept in zip(gradients, expected[1:], strict=True):
        if gradient is not None:
            assert (gradient[~mask] == 0).all()
            torch.testing.assert_close(gradient[mask], kept, rtol=1e-12, atol=1e-15)


@PRECISIONS
@pytest.mark.parametrize("temperature", [1e-3, 0.5])
def test_all_masked_gives_exactly_nothing(dtype: torch.dtype, temperature: float) -> None:
    student, teacher = random_pair(5, 3, dtype=dtype)
    student[2] = torch.nan
    mask = torch.zeros(5, dtype=torch.bool)
    for number in outcome(student, teacher, mask, temperature=temperature):
        assert number is not None
        assert (number == 0).all()


@PRECISIONS
def test_zero_rows_have_no_similarity_and_no_gradient(dtype: torch.dtype) -> None:
    student, teacher = random_pair(6, 4, dtype=dtype)
    student[[0, 2]], teacher[[2, 3]] = 0.0, 0.0
    loss, student_gradient, teacher_gradient = outcome(student, teacher)
    expected = truth.batch_similarity(
        student.double().numpy(), teacher.double().numpy(), temperature=0.5
    )
    assert abs(loss.item() - expected) <= 16 * tolerances.UNIT[dtype] * 4
    assert student_gradient is not None
    assert teacher_gradient is not None
    assert (student_gradient[[0, 2]] == 0).all()
    assert (teacher_gradient[[2, 3]] == 0).all()
    for number in outcome(torch.zeros_like(student), torch.zeros_like(teacher)):
        assert number is not None
        assert (number == 0).all()


@pytest.mark.parametrize("size", [1e-42, 1e-25, 1e20, 1e37])
def test_rows_of_any_magnitude_side_by_side(size: float) -> None:
    student, teacher = random_pair(6, 4, dtype=torch.float32)
    loss, gradient, _ = outcome(student, teacher)
    scaled = student.clone()
    scaled[::2] *= size
    scaled_loss, scaled_gradient, _ = outcome(scaled, teacher)
    # Entries of 1e-42 keep about ten of their 24 bits.
    close = 1e-3 if size < 1e-38 else 1e-5
    torch.testing.assert_close(scaled_loss, loss, rtol=close, atol=0.0)
    assert gradient is not None
    assert scaled_gradient is not None
    torch.testing.assert_close(scaled_gradient[1::2], gradient[1::2], rtol=close, atol=close)
    if size > 1e-38:  # else the gradient is beyond float32
        expected = (gradient[::2].double() / size).float()
        torch.testing.assert_close(scaled_gradient[::2], expected, rtol=1e-4, atol=1e-5 / size)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_nan_and_infinity_are_never_laundered(side: int, value: float) -> None:
    pair = random_pair(4, 3, dtype=torch.float32)
    pair[side][1, 2] = value
    loss, student_gradient, _ = outcome(*pair)
    assert loss.isnan()
    assert student_gradient is not None
    assert student_gradient.isnan().any()


def test_equal_sides_give_exactly_zero_value_and_gradient() -> None:
    """No probability is subtracted from another, so nothing is left of equal ones."""
    _, features = random_pair(20, 7, dtype=torch.float32)
    for temperature in (1e-3, 0.1, 10.0):
        loss, gradient, _ = outcome(features, features.clone(), temperature=temperature)
        assert loss == 0
        assert gradient is not None
        assert (gradient == 0).all()


def test_loss_of_a_student_next_to_its_teacher_keeps_its_digits() -> None:
    """Of second order in the difference: its terms of first order, which cancel, never appear."""
    _, teacher = random_pair(30, 8)
    student = teacher + 1e-3 * torch.randn(
        30, 8, generator=torch.manual_seed(1), dtype=torch.float64
    )
    student, teacher = student.float(), teacher.float()
    expected, _, _ = expected_outcome(student, teacher, temperature=1.0)
    loss, _, _ = outcome(student, teacher, temperature=1.0)
    # The difference itself is known to 2^-24 / 1e-3 or 6e-5.
    torch.testing.assert_close(loss.double(), expected, rtol=2e-3, atol=0.0)
    assert expected < 1e-6


def _transposed(x: Tensor) -> Tensor:
    return x.T.contiguous().T


def _sliced(x: Tensor) -> Tensor:
    return torch.stack((x, x), dim=-1).flatten(1)[:, ::2]


@pytest.mark.parametrize("layout", [_transposed, _sliced])
def test_layout_in_memory_changes_no_bit(layout: Callable[[Tensor], Tensor]) -> None:
    pair = random_pair(12, 5, dtype=torch.float32)
    ours = outcome(*(layout(x) for x in pair))
    for one, other in zip(ours, outcome(*pair), strict=True):
        assert one is not None
        assert other is not None
        assert one.is_contiguous()
        assert torch.equal(one, other)


def test_expanded_rows() -> None:
    student, teacher = random_pair(6, 4)
    student = student[:1].expand(6, 4)
    expected = outcome(student.contiguous(), teacher)
    for one, other in zip(outcome(student, teacher), expected, strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


@HALVES
def test_half_precision_computes_in_float32_and_scales_before_rounding(dtype: torch.dtype) -> None:
    pair = random_pair(7, 5, dtype=dtype)
    exact_loss, *exact = outcome(*(x.float() for x in pair), grad_output=4096.0)
    loss, *gradients = outcome(*pair, grad_output=4096.0)
    assert torch.equal(loss, exact_loss)
    for gradient, expected in zip(gradients, exact, strict=True):
        assert gradient is not None
        assert expected is not None
        assert gradient.dtype is dtype
        assert torch.equal(gradient, expected.to(dtype))


def test_each_gradient_has_the_dtype_of_its_input() -> None:
    student, teacher = random_pair(4, 3)
    _, student_gradient, teacher_gradient = outcome(student.half(), teacher.float())
    assert student_gradient is not None
    assert teacher_gradient is not None
    assert (student_gradient.dtype, teacher_gradient.dtype) == (torch.float16, torch.float32)


def test_inputs_and_saved_tensors_are_never_modified() -> None:
    student, teacher = random_pair(5, 3)
    copies = student.clone(), teacher.clone()
    options = {"temperature": 0.5, "student_needs_grad": True, "teacher_needs_grad": True}
    _, rows, gradients = passes.forward(student, teacher, None, **options)
    saved = gradients.clone()
    grad_output = torch.tensor(3.0, dtype=torch.float64)
    passes.backward(grad_output, student, teacher, None, rows, gradients, **options)
    assert torch.equal(student, copies[0])
    assert torch.equal(teacher, copies[1])
    assert torch.equal(gradients, saved)


@pytest.mark.parametrize(
    ("temperature", "noise"), [(0.05, 1.0), (0.5, 1.0), (4.0, 1.0), (0.5, 0.01)]
)
def test_errors_of_float32_are_not_much_above_those_of_the_definition(
    temperature: float, noise: float
) -> None:
    """At most 1.5 times them, root mean square and largest of 200 draws, in loss and gradients."""
    errors: dict[str, list[list[Tensor]]] = {"ours": [], "definition": []}
    for seed in range(200):
        generator = torch.manual_seed(seed)
        teacher, student = torch.randn(2, 32, 24, generator=generator)
        student = noise * student + (0.0 if noise == 1.0 else teacher)
        exact = expected_outcome(student, teacher, temperature=temperature)
        leaves = student.clone().requires_grad_(), teacher.clone().requires_grad_()
        loss = reference.batch_similarity_loss(*leaves, temperature=temperature, mask=None)
        definition = loss.detach(), *torch.autograd.grad(loss, leaves)
        ours = outcome(student, teacher, temperature=temperature)
        for name, numbers in (("ours", ours), ("definition", definition)):
            errors[name].append(
                [
                    (x - y).abs().flatten()
                    for x, y in zip(numbers, exact, strict=True)
                    if x is not None
                ]
            )
    for ours_of, theirs_of in zip(
        zip(*errors["ours"], strict=True), zip(*errors["definition"], strict=True), strict=True
    ):
        one, other = torch.cat(ours_of), torch.cat(theirs_of)
        assert one.max() <= 1.5 * other.max()
        assert one.square().mean().sqrt() <= 1.5 * other.square().mean().sqrt()


class _LargestResult(TorchDispatchMode):
    """Entries of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN204
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.entries = max(self.entries, result.untyped_storage().nbytes() // 4)
        return result


@pytest.mark.parametrize("needs", NEEDS)
def test_no_matrix_of_all_pairs_exists(
    small_blocks: Callable[[int], None], needs: tuple[bool, bool]
) -> None:
    batch, width = 600, 4
    small_blocks(16)
    with _LargestResult() as largest:
        outcome(*random_pair(batch, width, dtype=torch.float32), needs=needs)
    assert largest.entries <= 4 * 16 * batch
    assert largest.entries < batch * batch // 8


@pytest.mark.parametrize("rows", [7, 64])
def test_repeats_agree_to_the_bit(small_blocks: Callable[[int], None], rows: int) -> None:
    small_blocks(rows)
    pair = random_pair(30, 16, dtype=torch.float32)
    first = outcome(*pair)
    for _ in range(249):
        for one, other in zip(outcome(*pair), first, strict=True):
            assert one is not None
            assert other is not None
            assert torch.equal(one, other)


@given(batch=st.integers(1, 40), width=st.integers(1, 12), seed=strategies.seeds)
def test_ragged_sizes(batch: int, width: int, seed: int) -> None:
    student, teacher = torch.randn(
        2, batch, width, generator=torch.manual_seed(seed), dtype=torch.float64
    )
    assert_equal_outcomes(outcome(student, teacher), expected_outcome(student, teacher))
