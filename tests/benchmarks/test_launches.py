from types import SimpleNamespace

import torch

from benchmarks import launches
from benchmarks.workload import Work


def event(name: str, parent: SimpleNamespace | None = None) -> SimpleNamespace:
    return SimpleNamespace(name=name, cpu_parent=parent)


def test_launches_are_calls_that_start_work() -> None:
    names = [
        "cudaLaunchKernel",
        "cudaLaunchKernelExC",
        "cuLaunchKernelEx",
        "cudaGraphLaunch",
        "cudaMemsetAsync",
        "cudaMemcpyAsync",
        "cudaDeviceSynchronize",
        "cudaEventRecord",
        "void vectorized_elementwise_kernel",
        "aten::mul",
    ]
    assert launches.launches(map(event, names)) == 6


def test_operators_within_operators_do_not_count() -> None:
    mean = event("aten::mean")
    backward = event("autograd::engine::evaluate_function: MeanBackward0")
    inner = event("aten::sum", mean)
    events = [mean, inner, event("aten::fill_", inner), backward, event("aten::div", backward)]
    assert launches.operators(events) == 2


def test_count_on_the_cpu_is_of_one_forward_and_backward_pass() -> None:
    values = torch.ones(3).requires_grad_()
    product = Work(lambda x: x.mul(2.0), (values,), (values,), torch.ones(3))
    assert launches.count(product, "cpu") == 2  # one multiplication each way
