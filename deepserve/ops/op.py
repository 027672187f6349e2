"""What an op is: a contract with a plain PyTorch reference that defines it, and a leaf of the traced graph."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
Told = Sequence[tuple[torch.Tensor, torch.dtype]]  # numbers, each with the dtype whose tolerance holds for it


@dataclass(frozen=True, slots=True)
class Cost:
    """The least work one call must do: bytes moved (each input read once, each output written once) and FLOPs."""

    num_bytes: int
    flops: int


@dataclass(frozen=True, slots=True)
class Case:
    """One generated test and bench input: `make(generator, dtype, device)` returns fresh random arguments.

    `fp8` is the FP8 format that an argument names, if one does.
    """

    name: str
    make: Callable[[torch.Generator, torch.dtype, str], tuple[Any, ...]]
    bench: bool = False  # large enough to time
    fp8: torch.dtype | None = None


def normal(generator: torch.Generator, shape: Sequence[int], dtype: torch.dtype, device: str) -> torch.Tensor:
    """Fresh standard normal numbers, the same on every device (on meta: their shape alone)."""
    if device == "meta":
        return torch.empty(*shape, dtype=dtype, device=device)
    return torch.randn(*shape, generator=generator).to(dtype).to(device)


def integers(generator: torch.Generator, high: int, shape: Sequence[int], device: str) -> torch.Tensor:
    """Fresh int64 in [0, high), the same on every device."""
    return torch.randint(high, tuple(shape), generator=generator).to(device)


@dataclass(frozen=True, slots=True)
class Ids:
    """An argument of a case: int64 of this shape in [0, high)."""

    high: int
    shape: tuple[int, ...]


def case(*arguments: Any, bench: bool = False) -> Case:
    """The case of these arguments: a tuple is the shape of a standard normal tensor, Ids are drawn, the rest stays."""

    def make(generator: torch.Generator, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
        def one(argument: Any) -> Any:
            if isinstance(argument, Ids):
                return integers(generator, argument.high, argument.shape, device)
            return normal(generator, argument, dtype, device) if isinstance(argument, tuple) else argument

        return tuple(map(one, arguments))

    shapes = (getattr(argument, "shape", argument) for argument in arguments)
    names = ("x".join(map(str, shape)) if isinstance(shape, tuple) else str(shape) for shape in shapes)
    fp8 = next((one for one in arguments if isinstance(one, torch.dtype) and one.itemsize == 1), None)
    return Case("-".join(names).replace("torch.", ""), make, bench, fp8)


def nbytes(*tensors: torch.Tensor) -> int:
    """Bytes of all elements of the tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class Op:
    """A named operation. Called on tensors it runs its reference; called on FX proxies it records itself as one node.

    `fused` ops are written with other ops: their traced reference is the pattern that graph/rewrite.py replaces.
    `tolerance` maps the dtype that a case is made in (an FP8 output: that dtype) to (rtol, atol) against the reference,
    absent: bitwise; `writes` names arguments written in place; `dtypes` are those that the cases make sense in.
    Where what is written are bytes, `numbers(*args)` returns what they stand for, which is compared in their place.
    Ops are called with positional arguments only, so that a pattern matches whatever the spelling.
    """

    _inlining = False  # while a pattern is traced, fused ops dissolve into the ops they are written with

    def __init__(self, reference: Callable[..., Any], **contract: Any):
        self.reference = reference
        self.name = self.__name__ = self.__qualname__ = reference.__name__
        self.__doc__ = reference.__doc__
        self.__module__ = reference.__module__
        self.fused: bool = contract.pop("fused", False)
        self.cases: Sequence[Case] = contract.pop("cases", ())
        self.tolerance: dict[torch.dtype, tuple[float, float]] = contract.pop("tolerance", {})
        self.cost: Callable[..., Cost] | None = contract.pop("cost", None)
        self.writes: tuple[str, ...] = contract.pop("writes", ())
        self.numbers: Callable[..., Told] | None = contract.pop("numbers", None)
        self.dtypes: tuple[torch.dtype, ...] = contract.pop("dtypes", FLOATS)
        if contract:
            raise TypeError(f"op {self.name}: unknown {sorted(contract)}")
        self.parameters = tuple(inspect.signature(reference).parameters)

    def __call__(self, *args: Any) -> Any:
        for value in args:
            if isinstance(value, fx.Proxy):
                if self.fused and Op._inlining:
                    return self.reference(*args)
                return value.tracer.create_proxy("call_function", self, args, {})
        return self.reference(*args)

    def __repr__(self) -> str:
        return f"<op {self.name}>"


def op(**contract: Any) -> Callable[[Callable[..., Any]], Op]:
    """Makes the decorated function the reference of an op (see Op for the contract)."""
    return lambda reference: Op(reference, **contract)


@contextmanager
def inlining() -> Iterator[None]:
    """While open, fused ops called on proxies dissolve into the ops they are written with."""
    Op._inlining = True
    try:
        yield
    finally:
        Op._inlining = False


@dataclass(frozen=True, slots=True)
class Kernel:
    """One implementation of an op, bound once by the plan.

    `packs` maps the name of a weight argument to what lays it out for this kernel, once, after loading.
    """

    op: str
    name: str
    function: Callable[..., Any]
    packs: Mapping[str, Callable[[torch.Tensor], Any]] = field(default_factory=dict)

    def packed(self, parameters: Sequence[str], args: Sequence[Any]) -> list[Any]:
        """The arguments of a call as `function` takes them."""
        return [self.packs[name](value) if name in self.packs else value for name, value in zip(parameters, args)]
