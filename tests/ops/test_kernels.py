"""Generated: every op × kernel × case × dtype against the reference, and what a contract must say."""

import inspect

import pytest
import torch
import triton

from deepserve.graph.rewrite import fused_ops, pattern
from deepserve.hardware import this_machine
from deepserve.ops.check import Comparison, Poisoned, check, difference, poison
from deepserve.ops.inventory import IN_TRITON, inventory, refusals
from deepserve.ops.load import load_kernel, load_op
from deepserve.ops.op import Cost, Kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
MACHINE = this_machine()
FP8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)
FOREIGN_FP8 = FP8[:1] if MACHINE.arch == "gfx942" else FP8[1:]
if DEVICE == "cpu" and tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9):
    FOREIGN_FP8 = ()  # this interpreter knows both


def runs_here(op, kernel, dtype):
    """Triton's kernels run anywhere: where there is no GPU, in the interpreter."""
    return (kernel in IN_TRITON and DEVICE == "cpu") or refusals(op, MACHINE, DTYPES[dtype])[kernel] is None


def foreign(case, dtype):
    """Whether a case is in an FP8 format that nothing here can run."""
    if not FOREIGN_FP8:
        return False
    arguments = case.make(torch.Generator().manual_seed(0), dtype, "cpu")
    return any(isinstance(value, torch.dtype) and value in FOREIGN_FP8 for value in arguments)


def small(case):
    return not case.bench or DEVICE == "cuda"


def quick(kernel, case, dtype):
    """The interpreter takes minutes for prompts of which each token is a row, and it sums alike in any dtype."""
    return kernel != "invariant" or DEVICE == "cuda" or (case.name != "chunks" and dtype == torch.float32)


CASES = [
    pytest.param(name, info.name, case, dtype, id=f"{name}-{info.name}-{case.name}-{DTYPES[dtype]}")
    for name, kernels in inventory().items()
    for info in kernels
    if info.module is not None
    for case in filter(small, load_op(name).cases)
    for dtype in load_op(name).dtypes
    if runs_here(name, info.name, dtype) and quick(info.name, case, dtype)
]
OUT = [
    (name, info.name)
    for name, kernels in inventory().items()
    for info in kernels
    if info.module is not None and info.name in IN_TRITON
    if "out" in inspect.signature(load_kernel(name, info.name).function).parameters
]


@pytest.mark.parametrize("op, kernel, case, dtype", CASES)
def test_kernel_equals_reference(op, kernel, case, dtype, seed):
    if foreign(case, dtype):
        pytest.skip(f"{FOREIGN_FP8[0]} is not a format of {MACHINE.name}, or of this Triton's interpreter")
    assert check(op, kernel, case, dtype, DEVICE, seed) is None


@pytest.mark.gpu
@pytest.mark.parametrize(
    "op, kernel, case, dtype",
    [one for one in CASES if one.values[1] in IN_TRITON and one.values[3] != torch.float32 and not one.values[2].bench],
)
def test_kernel_equals_reference_under_graphs(op, kernel, case, dtype, seed):
    if foreign(case, dtype):
        pytest.skip(f"{FOREIGN_FP8[0]} is not a format of {MACHINE.name}")
    comparison = Comparison(op, kernel, case, dtype, DEVICE, seed)
    assert comparison.difference() is None
    assert comparison.difference_of_replay() is None


@pytest.mark.parametrize("op, kernel", OUT)
def test_results_can_be_passed_in(op, kernel, seed):
    loaded, contract = load_kernel(op, kernel), load_op(op)
    function = loaded.function
    case = contract.cases[0]
    arguments = case.make(torch.Generator().manual_seed(seed), contract.dtypes[0], DEVICE)
    arguments = loaded.packed(contract.parameters, arguments)
    expected = function(*arguments)
    several = isinstance(expected, tuple)
    out = tuple(poison(torch.empty_like(value)) for value in (expected if several else (expected,)))
    returned = function(*arguments, out=out if several else out[0])
    for value, want, given in zip(out, expected if several else (expected,), returned if several else (returned,)):
        assert given.data_ptr() == value.data_ptr()
        assert difference(value, want, 0.0, 0.0) is None


@pytest.mark.parametrize("op", inventory())
def test_contract_is_complete(op):
    contract = load_op(op)
    assert contract.name == op
    assert contract.__doc__ and "->" in contract.__doc__, "shapes and dtypes belong into the docstring"
    assert contract.cases
    assert len({case.name for case in contract.cases}) == len(contract.cases)
    assert inventory()[op][0].name == "reference"
    assert set(contract.writes) <= set(contract.parameters)
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in inspect.signature(contract.reference).parameters.values())


@pytest.mark.parametrize("op", inventory())
def test_cost_is_of_work_that_must_be_done(op, seed):
    contract = load_op(op)
    if contract.cost is None:
        pytest.fail("has no cost")
    for case in contract.cases:
        if not case.bench:
            arguments = case.make(torch.Generator().manual_seed(seed), contract.dtypes[0], "cpu")
            cost = contract.cost(*arguments)
            assert isinstance(cost, Cost)
            result = contract.reference(*arguments)
            written = () if contract.writes else result if isinstance(result, tuple) else (result,)
            assert cost.num_bytes >= sum(value.numel() * value.element_size() for value in written)
            assert cost.flops >= 0


@pytest.mark.parametrize("op, kernel", [(op, info.name) for op, infos in inventory().items() for info in infos])
def test_kernels_share_the_contracts_signature(op, kernel):
    names = list(inspect.signature(load_kernel(op, kernel).function).parameters)
    expected = list(load_op(op).parameters)
    assert names[: len(expected)] == expected
    assert set(names[len(expected) :]) <= {"out"}
    assert load_kernel(op, kernel).op == op
    assert load_kernel(op, kernel).name == kernel


@pytest.mark.parametrize("op", fused_ops())
def test_a_fused_op_is_the_composition_it_replaces(op, seed):
    contract = load_op(op)
    graph = pattern(contract)
    assert op not in {getattr(node.target, "name", None) for node in graph.graph.nodes}
    for case in contract.cases:
        if not case.bench:
            arguments = case.make(torch.Generator().manual_seed(seed), torch.bfloat16, "cpu")
            for want, got in zip(contract(*arguments), graph(*arguments)):
                assert difference(got, want, 0.0, 0.0) is None


def test_the_check_sees_a_wrong_kernel(monkeypatch):
    """Whatever a kernel gets wrong, the check must say it."""
    contract = load_op("rms_norm")
    kernel = load_kernel("rms_norm", "triton").function
    case = contract.cases[1]

    def half_written(x, weight, eps):
        out = torch.empty_like(x)
        out[:-1] = contract.reference(x, weight, eps)[:-1]
        return out

    def writes_its_input(x, weight, eps):
        result = contract.reference(x, weight, eps)
        x.zero_()
        return result

    wrong = {
        "differ": lambda x, weight, eps: kernel(x, weight, 0.5),
        "nan": half_written,
        "argument x": writes_its_input,
        "float64": lambda x, weight, eps: contract.reference(x, weight, eps).double(),
    }
    for sentence, function in wrong.items():
        monkeypatch.setattr(
            "deepserve.ops.check.load_kernel", lambda op, name, function=function: Kernel(op, name, function)
        )
        assert sentence in (check("rms_norm", "triton", case, torch.float32, DEVICE, 1) or "")


def test_poison_fills_what_is_not_initialised():
    with Poisoned():
        assert torch.empty(3).isnan().all()
        assert torch.empty(3, dtype=torch.float8_e4m3fnuz).float().isnan().all()
        assert torch.empty(2, dtype=torch.float8_e4m3fn).float().isnan().all()
        assert (torch.ones(2, dtype=torch.int32).new_empty(2) == -(2**31)).all()
        assert not torch.zeros(3).isnan().any()
