"""Which kernel serves each op: the last of its table that the machine can run and no switch forbids."""

from __future__ import annotations

from deepserve.config import Config
from deepserve.errors import AskError, did_you_mean
from deepserve.facts import Facts
from deepserve.ops.inventory import KernelInfo
from deepserve.optimizations import Decision, row_of_kernel
from deepserve.plan.plan import Choice


def choose_kernels(
    config: Config, facts: Facts, dtype: str, rows: dict[str, Decision]
) -> tuple[dict[str, str], list[Choice]]:
    """A kernel for every op, and a Choice for each op that has more than its reference (the best is last)."""
    for op in config.kernels:
        if op not in facts.inventory:
            raise AskError(f"there is no op {op!r}", field="kernels", hint=did_you_mean(op, facts.inventory))
    chosen, choices = {}, []
    for op, infos in facts.inventory.items():
        reasons = {info.name: _why_not(info, facts, dtype, rows) for info in infos}
        asked = config.kernels.get(op)
        if asked is not None:
            _check_asked(op, asked, reasons)
        name = asked or next(info.name for info in reversed(infos) if reasons[info.name] is None)
        chosen[op] = name
        if len(infos) > 1:
            refused = {other: reason or f"{name} is preferred" for other, reason in reasons.items() if other != name}
            choices.append(Choice(f"kernel {op}", name, "asked for" if asked else "the best that can run", refused))
    return chosen, choices


def _check_asked(op: str, asked: str, reasons: dict[str, str | None]) -> None:
    if asked not in reasons:
        raise AskError(f"{op} has no kernel {asked!r}", field="kernels", hint=f"it has {', '.join(reasons)}")
    if reasons[asked]:
        raise AskError(f"{op} cannot use {asked}: {reasons[asked]}", field="kernels")


def _why_not(info: KernelInfo, facts: Facts, dtype: str, rows: dict[str, Decision]) -> str | None:
    if sentence := info.needs(facts.hardware, dtype):
        return sentence
    row = row_of_kernel(info.name)
    return f"{row.name} is off" if row and not rows[row.name].on else None
