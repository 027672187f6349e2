"""Compares a kernel with its op's reference on fresh random inputs, with memory that nobody wrote filled with NaN."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from deepserve.ops.inventory import KernelInfo, inventory
from deepserve.ops.load import load_kernel, load_op
from deepserve.ops.op import Case, Op, Told

FP8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)
ALLOCATORS = (torch.empty, torch.empty_like, torch.Tensor.new_empty)


class Poisoned(TorchFunctionMode):
    """While open, uninitialised tensors hold NaN (integers: their least value): what a kernel leaves out shows."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in ALLOCATORS:
            poison(result)
        return result


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fills a tensor with what no kernel may return."""
    if tensor.dtype.is_floating_point and tensor.element_size() == 1:
        tensor.view(torch.uint8).fill_(0x7F if tensor.dtype == torch.float8_e4m3fn else 0x80)  # their NaN
    elif tensor.dtype.is_floating_point:
        tensor.fill_(torch.nan)
    elif tensor.dtype != torch.bool:
        tensor.fill_(torch.iinfo(tensor.dtype).min)
    return tensor


class Comparison:
    """A kernel and the reference on the same fresh random inputs; `difference` may be asked again and again."""

    def __init__(self, op_name: str, kernel_name: str, case: Case, dtype: torch.dtype, device: str, seed: int):
        self._op, self._kernel = load_op(op_name), load_kernel(op_name, kernel_name)
        exact = _info(op_name, kernel_name).exactness == "bitwise"
        self._dtype, self._tolerance = dtype, {} if exact else self._op.tolerance
        self._make = lambda: case.make(torch.Generator().manual_seed(seed), dtype, device)
        self._expected_arguments = self._make()
        self._prepare()
        self._expected = self._op.reference(*self._expected_arguments)

    def _prepare(self) -> None:
        self._arguments = self._make()
        self._given = self._kernel.packed(self._op.parameters, self._arguments)
        self._is_spoiled = False  # whether an earlier call left something that would be taken for the next one's work

    def call(self) -> Any:
        """Runs the kernel."""
        self._is_spoiled = self._is_spoiled or bool(self._op.writes)
        return self._kernel.function(*self._given)

    def difference(self) -> str | None:
        """None where the kernel agrees with the reference (results, and arguments afterwards), else what differs."""
        if self._is_spoiled:
            self._prepare()
        with Poisoned():
            actual = self.call()
        return self._judged(actual)

    def difference_of_replay(self) -> str | None:
        """The same of a call that a CUDA graph recorded, after `difference` has compiled what it launches."""
        self._prepare()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            actual = self.call()
        written = {id(argument) for argument in self._arguments}
        for result in actual if isinstance(actual, tuple) else (actual,):
            if id(result) not in written:
                poison(result)
        graph.replay()
        return self._judged(actual)

    def _judged(self, actual: Any) -> str | None:
        tolerance = self._tolerance.get(self._dtype, (0.0, 0.0))
        changes = _changes(self._op, tolerance, self._expected_arguments, self._arguments)
        self._is_spoiled = self._is_spoiled or changes is not None
        return self._wrong_result(actual) or changes

    def _wrong_result(self, actual: Any) -> str | None:
        op, numbers = self._op, self._op.numbers
        if numbers is None:
            return _differences(self._tolerance, self._dtype, self._expected, actual)
        if actual is not self._arguments[op.parameters.index(op.writes[0])]:
            return "returns something else than what it wrote to"
        return _other_numbers(self._tolerance, numbers(*self._expected_arguments), numbers(*self._arguments))


def check(op_name: str, kernel_name: str, case: Case, dtype: torch.dtype, device: str, seed: int) -> str | None:
    """What Comparison.difference says, on inputs of their own."""
    return Comparison(op_name, kernel_name, case, dtype, device, seed).difference()


def _info(op_name: str, kernel_name: str) -> KernelInfo:
    return next(info for info in inventory()[op_name] if info.name == kernel_name)


def _differences(
    tolerance: dict[torch.dtype, tuple[float, float]], dtype: torch.dtype, expected: Any, actual: Any
) -> str | None:
    expected, actual = (value if isinstance(value, tuple) else (value,) for value in (expected, actual))
    if len(expected) != len(actual):
        return f"returns {len(actual)} values instead of {len(expected)}"
    for idx, (want, got) in enumerate(zip(expected, actual)):
        key = want.dtype if want.dtype in FP8 else dtype
        if sentence := difference(got, want, *tolerance.get(key, (0.0, 0.0))):
            return f"output {idx}: {sentence}"
    return None


def _other_numbers(tolerance: dict[torch.dtype, tuple[float, float]], expected: Told, actual: Told) -> str | None:
    for idx, ((want, dtype), (got, _)) in enumerate(zip(expected, actual)):
        if sentence := difference(got, want, *tolerance.get(dtype, (0.0, 0.0))):
            return f"part {idx} of what was written: {sentence}"
    return None


def _changes(op: Op, tolerance: tuple[float, float], expected: tuple[Any, ...], actual: tuple[Any, ...]) -> str | None:
    """Arguments that are written must hold what the reference wrote; the others, what they held."""
    for name, want, got in zip(op.parameters, expected, actual):
        if isinstance(want, torch.Tensor) and not (op.numbers and name in op.writes):
            sentence = difference(got, want, *(tolerance if name in op.writes else (0.0, 0.0)))
            if sentence:
                return f"argument {name} afterwards: {sentence}"
    return None


def difference(actual: torch.Tensor, expected: torch.Tensor, rtol: float, atol: float) -> str | None:
    """None where all elements are within atol + rtol * |expected|, NaN equal to NaN only; else one sentence."""
    if actual.dtype != expected.dtype or actual.shape != expected.shape or actual.device != expected.device:
        of = "{0.dtype} {1} on {0.device}"
        return f"{of.format(actual, list(actual.shape))} instead of {of.format(expected, list(expected.shape))}"
    if not expected.dtype.is_floating_point:
        wrong = actual != expected
        return f"{int(wrong.sum())} of {wrong.numel()} elements differ" if wrong.any() else None
    actual, expected = actual.double(), expected.double()
    wrong = ~torch.isclose(actual, expected, rtol=rtol, atol=atol, equal_nan=True)
    if not wrong.any():
        return None
    first = tuple(wrong.nonzero()[0].tolist())
    return (
        f"{int(wrong.sum())} of {wrong.numel()} elements differ by more than rtol {rtol:g} and atol {atol:g}, "
        f"the first at {list(first)}: {actual[first]:g} instead of {expected[first]:g}"
    )
