"""What sampling needs to know of each slot, one column a parameter, so that a step takes its rows with one index."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, fields

import numpy as np

from deepserve.sampling_params import SamplingParams

# What a row needs beyond the most probable token. A step in which no row needs anything is argmax alone.
SAMPLED, FILTERED, PENALISED, EDITED, LOGPROBS, STRUCTURED = 1, 2, 4, 8, 16, 32
MIN_TEMPERATURE = 1e-5  # below it (vLLM's limit) a row is greedy: logits / temperature would leave fp32

_MASK = 2**64 - 1


@dataclass(slots=True)
class SamplingColumns:
    """One entry a row. `needs` is a sum of the constants above; temperature and filters are what ops/sample takes."""

    needs: np.ndarray  # int32
    temperature: np.ndarray  # float32; 1 for greedy rows
    top_k: np.ndarray  # int64; 0: all; 1 for greedy rows
    top_p: np.ndarray  # float64; 1: all
    log_min_p: np.ndarray  # float32: temperature * ln(min_p); -inf: all
    presence: np.ndarray  # float32
    frequency: np.ndarray  # float32
    repetition: np.ndarray  # float32
    seed: np.ndarray  # uint64

    @classmethod
    def empty(cls, num_rows: int) -> SamplingColumns:
        """Columns of greedy rows."""
        f32, f64 = np.float32, np.float64
        dtypes = (np.int32, f32, np.int64, f64, f32, f32, f32, f32, np.uint64)
        columns = cls(*(np.zeros(num_rows, dtype) for dtype in dtypes))
        columns.clear(slice(None))
        return columns

    def clear(self, row: int | slice) -> None:
        """Makes the row a greedy one that remembers nothing."""
        for column in fields(self):
            getattr(self, column.name)[row] = 1 if column.name in ("temperature", "top_k", "top_p", "repetition") else 0
        self.log_min_p[row] = -math.inf

    def write(self, row: int, sampling: SamplingParams, seed: int, edited: bool) -> None:
        """Fills the row; `edited`: it has edits (sampling/edits.py)."""
        greedy = sampling.temperature < MIN_TEMPERATURE
        filtered = not greedy and bool(sampling.top_k or sampling.top_p < 1 or sampling.min_p)
        penalised = bool(sampling.presence_penalty or sampling.frequency_penalty or sampling.repetition_penalty != 1)
        self.needs[row] = (
            SAMPLED * (not greedy)
            + FILTERED * filtered
            + PENALISED * penalised
            + EDITED * edited
            + LOGPROBS * (sampling.logprobs is not None)
            + STRUCTURED * (sampling.structured_outputs is not None)
        )
        self.temperature[row] = 1 if greedy else sampling.temperature
        self.top_k[row] = 1 if greedy else sampling.top_k
        self.top_p[row] = 1 if greedy else sampling.top_p
        drops = bool(sampling.min_p) and not greedy
        self.log_min_p[row] = np.float32(sampling.temperature) * math.log(sampling.min_p) if drops else -math.inf
        self.presence[row] = sampling.presence_penalty
        self.frequency[row] = sampling.frequency_penalty
        self.repetition[row] = sampling.repetition_penalty
        self.seed[row] = seed & _MASK

    def take(self, rows: np.ndarray) -> SamplingColumns:
        """The columns of these rows, in this order."""
        return SamplingColumns(*(getattr(self, column.name)[rows] for column in fields(self)))


def seed_of(sampling: SamplingParams, request_id: str, engine_seed: int) -> int:
    """The request's seed, or else a hash of the engine's seed and the request's id: a preemption changes nothing."""
    if sampling.seed is not None:
        return sampling.seed & _MASK
    digest = hashlib.blake2b(f"{engine_seed}/{request_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def uniforms(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """One number in [0, 1 - 2^-52] for each (seed, position): uint64 and int64 [S] -> float64 [S].

    Counter-based: SplitMix64's finaliser (Steele, Lea, Flood 2014) over the hashed seed plus position times the golden
    ratio. Nothing is carried from token to token, so a row's draw is the same in any batch and after a preemption.
    """
    golden = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        state = _mix(seeds ^ np.uint64(0xD1B54A32D192ED03)) + (positions.astype(np.uint64) + np.uint64(1)) * golden
        return (_mix(state) >> np.uint64(12)).astype(np.float64) * 2.0**-52


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
