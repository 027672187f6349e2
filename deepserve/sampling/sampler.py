"""One token for each row of logits. A row's arithmetic never depends on the rows beside it.

The order is vLLM's: the grammar of a structured output, edits (allowed ids, bad words, min_tokens, logit_bias),
penalties, temperature, min-p, top-k, top-p, then one uniform number through the inverse of the cumulative distribution,
in the order of the vocabulary. From temperature on it is one op (ops/sample). The host waits for nothing but the last
tokens of rows with bad words of several tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from deepserve.sampling.columns import EDITED, FILTERED, PENALISED, SAMPLED, STRUCTURED, SamplingColumns, uniforms
from deepserve.sampling.edits import Edits, keep_legal
from deepserve.sampling.penalties import penalise
from deepserve.transfer import send_all


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
    """Calls the plan's argmax and sample kernels (ops/argmax, ops/sample)."""

    def __init__(
        self,
        argmax: Callable[..., tuple[torch.Tensor, torch.Tensor]],
        sample: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    ):
        self.most_probable = argmax  # `sample` for rows that need nothing else
        self.draw = sample

    def sample(self, logits: torch.Tensor, rows: SamplingRows) -> tuple[torch.Tensor, torch.Tensor]:
        """logits [S, V] fp32 -> (token ids [S] int64, evidence [S] fp32: finite where the row had a token to give)."""
        columns = rows.columns
        needs = int(np.bitwise_or.reduce(columns.needs))
        if needs & (EDITED | PENALISED | STRUCTURED):
            logits = self._modify(logits, rows)
        if not needs & SAMPLED:
            return self.most_probable(logits)
        # A greedy row among sampled ones is one of which top-k keeps a single token.
        filtered = bool(needs & FILTERED) or not (columns.needs & SAMPLED).all()
        drawn = uniforms(columns.seed, rows.positions)
        numbers = (columns.temperature, columns.top_k, columns.top_p, columns.log_min_p, drawn)
        return self.draw(logits, *send_all(logits.device, *numbers), filtered)

    def _modify(self, logits: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
        """A copy of the logits with each row's own grammar, edits and penalties."""
        logits, columns = logits.clone(), rows.columns
        structured = np.flatnonzero(columns.needs & STRUCTURED)
        if len(structured) and rows.masks is not None:
            index, masks = send_all(logits.device, structured, rows.masks[structured])
            logits[index] = keep_legal(logits[index], masks)
        for i in np.flatnonzero(columns.needs & EDITED):
            edits, prompt, end = rows.edits[i], int(rows.num_prompt_tokens[i]), int(rows.positions[i])
            if edits is not None:
                edits.apply(logits[i], rows.history[int(rows.slots[i]), prompt:end])
        chosen = np.flatnonzero(columns.needs & PENALISED)
        if len(chosen):
            ends = rows.positions[chosen]
            told = (
                rows.slots, rows.num_prompt_tokens, rows.positions, columns.presence, columns.frequency,
                columns.repetition,
            )  # fmt: skip
            index, slots, *numbers = send_all(logits.device, chosen, *(column[chosen] for column in told))
            tokens = rows.history[slots, : int(ends.max())].long()
            logits[index] = penalise(logits[index], tokens, *numbers)
        return logits
