"""Which padded sizes of steps are recorded, and by which of vLLM's CUDA graph modes that goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deepserve.compilation import GRAPH_ROWS, MODES
from deepserve.config import Config
from deepserve.errors import AskError
from deepserve.optimizations import Decision

RECORDED_STEPS = 16  # requests of a step on a CPU: of larger ones Python's share is small, and each keeps its buffers
MIXED_TOKENS = 512  # of a mixed step that is taken apart; in a longer one attention would take more than it saves
PIECE_TOKENS = 2048  # of a step in pieces; a longer one keeps a GPU busy while the host launches it


@dataclass(frozen=True, slots=True)
class GraphSizes:
    """Sizes in rows of one token for whole steps, in tokens for steps in pieces; each in rising order."""

    whole: tuple[int, ...] = ()
    pieces: tuple[int, ...] = ()

    def __str__(self) -> str:
        told = [f"{len(self.whole)} sizes up to {self.whole[-1]}"] if self.whole else []
        told += [f"{len(self.pieces)} sizes of pieces up to {self.pieces[-1]}"] if self.pieces else []
        return ", ".join(told) or "no size"


def choose_graphs(config: Config, rows: dict[str, Decision], max_num_seqs: int, max_tokens: int) -> GraphSizes:
    """The sizes for steps of so many requests and tokens. AskError where what was asked contradicts itself."""
    if rows["recorded_steps"].on:
        return GraphSizes(whole=tuple(range(1, min(max_num_seqs, RECORDED_STEPS) + 1)))
    given, most = config.cudagraph_capture_sizes, config.max_cudagraph_capture_size
    if given and most and max(given) != most:
        why = f"is {most}, and the largest of cudagraph_capture_sizes is {max(given)}"
        raise AskError(why, field="max_cudagraph_capture_size", hint="leave it out")
    whole = max(max_num_seqs, min(MIXED_TOKENS, max_tokens)) if rows["mixed_graphs"].on else max_num_seqs
    pieces = min(max_tokens, most or PIECE_TOKENS)
    if given:
        return GraphSizes(
            _needed(given, whole) if rows["cuda_graphs"].on else (),
            _needed(given, max_tokens) if rows["piecewise_graphs"].on else (),
        )
    return GraphSizes(
        _whole_sizes(min(whole, most or whole)) if rows["cuda_graphs"].on else (),
        _piece_sizes(pieces) if rows["piecewise_graphs"].on else (),
    )


def graph_mode(rows: dict[str, Decision]) -> str:
    """vLLM's name for the rows that are on; FULL where pieces serve what is too long to be taken apart, too."""
    on = {name for name in GRAPH_ROWS if rows[name].on}
    on -= {"piecewise_graphs"} if "mixed_graphs" in on else set()
    return next(mode for mode, names in MODES.items() if set(names) == on)


def _needed(given: Sequence[int], limit: int) -> tuple[int, ...]:
    """Those up to the first that holds a step of `limit`."""
    sizes = sorted(set(given))
    return tuple(size for size, before in zip(sizes, [0, *sizes]) if before < limit)


def _whole_sizes(limit: int) -> tuple[int, ...]:
    """1, 2, 4, then steps that grow with the size; the last is `limit`."""
    return _up_to((1, 2, 4, *range(8, 128, 8), *range(128, 256, 32), *range(256, limit, 64)), limit)


def _piece_sizes(limit: int) -> tuple[int, ...]:
    """Powers of two, then steps of 256; the last is `limit`."""
    return _up_to((1, 2, 4, 8, 16, 32, 64, 128, *range(256, limit, 256)), limit)


def _up_to(sizes: Sequence[int], limit: int) -> tuple[int, ...]:
    return (*(size for size in sizes if size < limit), limit)
