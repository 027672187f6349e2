"""What a speed-up needs of the model and the hardware: each condition is None, or why it does not hold."""

from __future__ import annotations

from deepserve.architecture import Architecture, Gqa, Mla
from deepserve.facts import Facts
from deepserve.kv_cache.spec import LARGEST_RANK, no_fp8


def an_fp8_checkpoint(facts: Facts, dtype: str) -> str | None:
    """The checkpoint's weights are FP8."""
    return None if facts.architecture.quantization else "the checkpoint's weights are not FP8"


def latent_attention(facts: Facts, dtype: str) -> str | None:
    """The model attends to latents (MLA)."""
    return None if isinstance(facts.architecture.attention, Mla) else "the model has no latent attention"


def fp8_entries(facts: Facts, dtype: str) -> str | None:
    """The entries of its KV cache have an FP8 form."""
    return no_fp8(facts.architecture.attention)


def an_indexer(facts: Facts, dtype: str) -> str | None:
    """An indexer chooses which tokens attention sees."""
    attention = facts.architecture.attention
    if isinstance(attention, Gqa) or attention.indexer is None:
        return "no indexer chooses what its attention sees"
    return None


def an_indexer_to_transform(facts: Facts, dtype: str) -> str | None:
    """An indexer chooses among tokens, and its keys have a Hadamard transform."""
    attention = facts.architecture.attention
    if not isinstance(attention, Mla) or attention.indexer is None:
        return "no indexer chooses among its tokens"
    if (dim := attention.indexer.head_dim) & (dim - 1):
        return f"a Hadamard transform needs a power of two, and index heads have {dim} channels"
    return None


def experts(facts: Facts, dtype: str) -> str | None:
    """The model has experts."""
    return None if facts.architecture.moe else "the model has no experts"


def experts_and_residual(facts: Facts, dtype: str) -> str | None:
    """A layer adds routed and shared experts to one residual stream."""
    moe, attention = facts.architecture.moe, facts.architecture.attention
    if moe is None or not moe.num_shared_experts or not isinstance(attention, Gqa | Mla):
        return "no layer adds routed and shared experts to one residual stream"
    return None


def recordable(facts: Facts, dtype: str) -> str | None:
    """Kernels that look at lengths on the host, or wait for the device, cannot be recorded."""
    if facts.hardware.device == "cpu":
        return f"{facts.hardware.name} has no graphs"
    return no_lengths_on_the_host(facts.architecture)


def launches_that_overlap(facts: Facts, dtype: str) -> str | None:
    """The GPU knows programmatic dependent launches."""
    hardware = facts.hardware
    overlaps = hardware.kind == "cuda" and int(hardware.arch.removeprefix("sm_")) >= 90
    return None if overlaps else f"needs an NVIDIA GPU from Hopper on, and {hardware.name} is none"


def replayable(facts: Facts, dtype: str) -> str | None:
    """On a CPU: a step is a list of calls of C functions."""
    if facts.hardware.device != "cpu":
        return "steps of a GPU are recorded by its own graphs"
    return no_lengths_on_the_host(facts.architecture)


def no_lengths_on_the_host(architecture: Architecture) -> str | None:
    """The attention reads lengths on the device alone."""
    attention = architecture.attention
    if isinstance(attention, Gqa) or (isinstance(attention, Mla) and attention.indexer is None):
        return None
    return "the attention's kernels look at lengths on the host"


def attention_row_by_row(facts: Facts, dtype: str) -> str | None:
    """The attention has a kernel that takes each token as a row of its own, in parts that its context alone decides."""
    attention = facts.architecture.attention
    if isinstance(attention, Mla) and attention.kv_rank > LARGEST_RANK:
        return f"latents of {attention.kv_rank} channels are multiplied in as many pieces as suit the batch"
    if no_lengths_on_the_host(facts.architecture):
        return "its attention has no kernel that is the same for every batch"
    return None
