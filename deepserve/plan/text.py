"""The plan for people: the model, a bar of the memory, what fits, and every choice with its reason."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Iterable

from deepserve.architecture import Mla
from deepserve.plan.limits import decode_bound
from deepserve.plan.memory import gib
from deepserve.plan.plan import Choice, Plan
from deepserve.sparse_attention import CompressedMqa

WIDTH = 118
BAR = 60
PARTS = (("weights", "█"), ("workspace", "▓"), ("graphs", "░"), ("KV cache", "▒"), ("free", "·"))


def render(plan: Plan, verbose: bool = False) -> str:
    """The whole plan, a screen of it; verbose adds every op's kernel and every row."""
    parts = [_header(plan), _memory(plan), _capacity(plan), _choices(plan, verbose), _blockers(plan)]
    return "\n\n".join(part for part in parts if part)


def _header(plan: Plan) -> str:
    architecture, counted = plan.architecture, plan.parameters
    active = f" ({billions(counted.active)} active a token)" if architecture.moe else ""
    mtp = f", and {billions(counted.mtp)} of MTP, {'' if plan.with_mtp else 'not '}loaded" if counted.mtp else ""
    name = plan.served_model_name[0]
    return (
        f"{name} on {plan.hardware.label}  [plan {plan.hash}]\n"
        f"{architecture.family}, {architecture.num_layers} layers, {billions(counted.total)} parameters{active}{mtp}"
    )


def _memory(plan: Plan) -> str:
    memory = plan.memory
    sizes = (memory.weight_bytes, memory.workspace_bytes, memory.graph_bytes, memory.kv_bytes, memory.free_bytes)
    bar = "".join(sign * _cells(size, memory.budget_bytes) for size, (_, sign) in zip(sizes, PARTS))
    legend = "   ".join(f"{sign} {name} {gib(size)}" for size, (name, sign) in zip(sizes, PARTS) if size > 0)
    what = "the free memory here" if plan.device == "cpu" else f"{plan.hardware.name}"
    where = f"{gib(memory.budget_bytes)} to use of {gib(memory.total_bytes)}"
    each = f", each of {plan.tensor_parallel_size} ranks" if plan.tensor_parallel_size > 1 else ""
    return f"memory ({what}: {where}{each})\n  [{bar:{BAR}.{BAR}}]\n  {legend}"


def _cells(size: int, total: int) -> int:
    return max(1, round(BAR * size / total)) if size > 0 else 0


def _capacity(plan: Plan) -> str:
    memory = plan.memory
    lines = [
        f"{memory.kv_bytes_per_token:,} bytes of KV cache a token ({_cached(plan)})",
        *_rings(plan),
        *plan.log_lines,
        f"a step: at most {plan.max_num_seqs} requests and {plan.max_num_batched_tokens} tokens; "
        f"{plan.num_blocks:,} blocks of {plan.block_size} tokens",
    ]
    context = min(1024, plan.max_model_len)
    many = min(plan.max_num_seqs, memory.num_tokens // context)
    one, all_of_them = decode_bound(plan, 1, context), decode_bound(plan, many, context)
    if one:
        lines.append(
            f"memory bandwidth bounds decoding, at {context} tokens of context, to {one:,.0f} tokens/s for 1 request "
            f"and {all_of_them:,.0f} for {many}"
        )
    return "\n".join("  " + line for line in lines)


def _cached(plan: Plan) -> str:
    attention, layers = plan.architecture.attention, plan.architecture.num_layers + plan.with_mtp
    if isinstance(attention, Mla):
        row = f"a latent of {attention.kv_rank} + {attention.rope_dim} values"
        if attention.fp8_latents:
            row = f"a latent of {attention.kv_rank} values in {plan.kv_dtype} and {attention.rope_dim}"
        if indexer := attention.indexer:
            row += f" and an index key of {indexer.head_dim}{' (it in FP8)' if indexer.fp8_keys else ''}"
        return f"{row} in {plan.dtype} x {layers} layers" + (", on every rank" if plan.tensor_parallel_size > 1 else "")
    if isinstance(attention, CompressedMqa):
        counts = Counter(layer for layer in attention.layers if layer is not None)
        keys = attention.indexer.head_dim if attention.indexer else 0
        rows = (
            f"{attention.head_dim}{f' + {keys}' if layer.sparse else ''} values every {layer.ratio} tokens x {count}"
            for layer, count in counts.items()
        )
        return f"{', '.join(rows)} layers in {plan.kv_dtype}"
    heads = math.ceil(attention.num_kv_heads / plan.tensor_parallel_size)
    return f"K and V of {heads} heads x {attention.head_dim} in {plan.kv_dtype} x {layers} layers"


def _rings(plan: Plan) -> list[str]:
    """What a request caches whatever its length."""
    memory, attention = plan.memory, plan.architecture.attention
    if not memory.ring_bytes or not isinstance(attention, CompressedMqa):
        return []
    states = "and the state of compressors in fp32" if any(attention.layers) else ""
    drafts = f" and {plan.speculation.num_tokens} drafts" if plan.speculation else ""
    num_snapshots = memory.num_rings - plan.max_num_seqs
    return [
        f"{memory.ring_bytes:,} bytes a request whatever its length (a window of {attention.window} tokens{drafts} "
        f"{states}): a ring",
        f"{memory.num_rings} rings: {plan.max_num_seqs} for requests, {num_snapshots} for snapshots that cached "
        f"prefixes continue from, {gib(memory.num_rings * memory.ring_bytes)} in all",
    ]


def _choices(plan: Plan, verbose: bool) -> str:
    general = [choice for choice in plan.choices if not choice.name.startswith(("kernel ", "optimization "))]
    kernels = [choice for choice in plan.choices if choice.name.startswith("kernel ")]
    rows = [choice for choice in plan.choices if choice.name.startswith("optimization ")]
    lines = ["choices", *_table(general), "kernels", *(_table(kernels) if verbose else _kernel_lines(plan, kernels))]
    return "\n".join([*lines, "optimizations", *_table(rows)])


def _kernel_lines(plan: Plan, choices: list[Choice]) -> Iterable[str]:
    """Ops by the kernel that serves them, then each reason for a refusal once."""
    by_kernel: dict[str, list[str]] = {}
    for op, kernel in plan.kernels.items():
        by_kernel.setdefault(kernel, []).append(op)
    for kernel, ops in sorted(by_kernel.items(), key=lambda item: item[0] == "reference"):
        yield from _wrapped(f"  {kernel:12}", ", ".join(ops))
    reasons: dict[str, list[str]] = {}
    for choice in choices:
        for kernel, reason in choice.refused.items():
            if reason != f"{choice.value} is preferred":
                reasons.setdefault(f"{kernel}: {reason}", []).append(choice.name.removeprefix("kernel "))
    for reason, ops in reasons.items():
        yield from _wrapped("  refused     ", f"{reason} ({', '.join(ops)})")


def _table(choices: list[Choice]) -> Iterable[str]:
    names = [choice.name.split(" ", 1)[-1] for choice in choices]
    left = max(map(len, names), default=0)
    middle = min(max((len(choice.value) for choice in choices), default=0), 24)
    for name, choice in zip(names, choices):
        refused = "".join(f"; not {value}: {reason}" for value, reason in choice.refused.items())
        yield from _wrapped(f"  {name:{left}}  {choice.value:{middle}}  ", choice.reason + refused)


def _wrapped(lead: str, text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=lead, subsequent_indent=" " * len(lead)) or [lead.rstrip()]


def _blockers(plan: Plan) -> str:
    if not plan.blockers:
        return ""
    lines = [f"  {blocker.field}: {blocker.message}" for blocker in plan.blockers]
    return "\n".join(["serve would refuse this", *lines])


def billions(count: int) -> str:
    """671.0 B, 15.7 B, 7.1 M."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return str(count)
