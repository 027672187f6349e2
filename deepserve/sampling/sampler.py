"""One token for each row of logits. A row's arithmetic never depends on the rows beside it.

The order is vLLM's: the grammar of a structured output, edits (allowed ids, bad words, min_tokens, logit_bias),
penalties, temperature, min-p, top-k, top-p, then one uniform number through the inverse of the cumulative distribution,
in the order of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from deepserve.sampling.columns import EDITED, FILTERED, PENALISED, SAMPLED, STRUCTURED, SamplingColumns, uniforms
from deepserve.sampling.edits import Edits
from deepserve.sampling.filters import drop_below_min_p, keep_legal, keep_top_k, keep_top_p
from deepserve.sampling.penalties import penalise
from deepserve.transfer import send


@dataclass(slots=True)
class SamplingRows:
    """What the sampler knows of its S rows. `history[slots[i], :positions[i]]` are row i's tokens, prompt first."""

    columns: SamplingColumns
    slots: np.ndarray  # int64 [S]
    positions: np.ndarray  # int64 [S]: where the new token will stand
    num_prompt_tokens: np.ndarray  # int64 [S]
    edits: Sequence[Edits | None]
    history: torch.Tensor  # [max_num_seqs, max_model_len + 1] int32, on the device
    masks: np.ndarray | None = None  # int32 [S, ceil(V / 32)]: the legal tokens of rows with a grammar, a bit each


class Sampler:
    """Calls the plan's argmax and softmax kernels (ops/argmax, ops/softmax)."""

    def __init__(self, argmax: Callable[..., tuple[torch.Tensor, torch.Tensor]], softmax: Callable[..., torch.Tensor]):
        self.argmax = argmax
        self.softmax = softmax

    def sample(self, logits: torch.Tensor, rows: SamplingRows) -> tuple[torch.Tensor, torch.Tensor]:
        """logits [S, V] fp32 -> (token ids [S] int64, evidence [S]: finite where the row had a token to give)."""
        needs = int(np.bitwise_or.reduce(rows.columns.needs))
        if needs & (EDITED | PENALISED | STRUCTURED):
            logits = self._modify(logits, rows)
        if not needs & SAMPLED:
            return self.most_probable(logits)
        drawn = np.flatnonzero(rows.columns.needs & SAMPLED)
        if len(drawn) == len(logits):
            return self._draw(logits, rows.columns, rows.positions)
        greedy = _index(np.flatnonzero(~rows.columns.needs & SAMPLED), logits)
        index = _index(drawn, logits)
        tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
        evidence = torch.empty(len(logits), dtype=torch.float64, device=logits.device)
        token, proof = self.most_probable(logits[greedy])
        tokens[greedy], evidence[greedy] = token, proof.double()
        tokens[index], evidence[index] = self._draw(logits[index], rows.columns.take(drawn), rows.positions[drawn])
        return tokens, evidence

    def most_probable(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`sample` for rows that need nothing else: argmax, and the logit that it found as evidence."""
        return self.argmax(logits)

    def _modify(self, logits: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
        """A copy of the logits with each row's own grammar, edits and penalties."""
        logits, columns = logits.clone(), rows.columns
        structured = np.flatnonzero(columns.needs & STRUCTURED)
        if len(structured) and rows.masks is not None:
            index = _index(structured, logits)
            logits[index] = keep_legal(logits[index], _index(rows.masks[structured], logits))
        for i in np.flatnonzero(columns.needs & EDITED):
            edits, prompt, end = rows.edits[i], int(rows.num_prompt_tokens[i]), int(rows.positions[i])
            if edits is not None:
                tail = rows.history[int(rows.slots[i]), max(prompt, end - edits.tail_length) : end]
                edits.apply(logits[i], end - prompt, tail.tolist())
        chosen = np.flatnonzero(columns.needs & PENALISED)
        if len(chosen):
            index, ends = _index(chosen, logits), rows.positions[chosen]
            tokens = rows.history[_index(rows.slots[chosen], logits), : int(ends.max())].long()
            logits[index] = penalise(
                logits[index],
                tokens,
                _index(rows.num_prompt_tokens[chosen], logits),
                _index(ends, logits),
                *(
                    _index(column[chosen], logits)
                    for column in (columns.presence, columns.frequency, columns.repetition)
                ),
            )
        return logits

    def _draw(
        self, logits: torch.Tensor, columns: SamplingColumns, positions: np.ndarray
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One draw a row at its temperature. The sums are fp64: fp32 would lose the tail of 129,280 tokens."""
        filtered = bool(np.bitwise_or.reduce(columns.needs) & FILTERED)
        if filtered:
            logits = _filter_logits(logits, columns)
        probabilities = self.softmax(logits, _index(columns.temperature, logits))
        if filtered:
            rows = np.flatnonzero(columns.top_p < 1)
            if len(rows):
                index = _index(rows, logits)
                nucleus = keep_top_p(probabilities[index], _index(columns.top_p[rows], logits))
                probabilities = probabilities.index_copy(0, index, nucleus)
        sums = probabilities.cumsum(-1, dtype=torch.float64)
        total = sums[:, -1:]
        target = total * _index(uniforms(columns.seed, positions), logits).unsqueeze(1)
        tokens = torch.searchsorted(sums, target, right=True).squeeze(1)
        return tokens.clamp_(max=logits.shape[1] - 1), total.squeeze(1)


def _filter_logits(logits: torch.Tensor, columns: SamplingColumns) -> torch.Tensor:
    rows = np.flatnonzero(columns.min_p > 0)
    if len(rows):
        index = _index(rows, logits)
        log_min_p = (columns.temperature[rows] * np.log(columns.min_p[rows])).astype(np.float32)
        logits = logits.index_copy(0, index, drop_below_min_p(logits[index], _index(log_min_p, logits)))
    rows = np.flatnonzero((columns.top_k > 0) & (columns.top_k < logits.shape[1]))
    if len(rows):
        index = _index(rows, logits)
        logits = logits.index_copy(0, index, keep_top_k(logits[index], _index(columns.top_k[rows], logits)))
    return logits


def _index(values: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    return send(values, like.device)
