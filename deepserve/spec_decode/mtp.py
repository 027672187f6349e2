"""The checkpoint's multi-token prediction layer as proposer (DeepSeek-V3, section 2.2), used again for each guess."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from deepserve.runner.batch import Batch
from deepserve.runner.prepare import Prepared, make_batch
from deepserve.runner.slots import Slots


class MtpProposer:
    """`forward(hidden [T, ...], batch) -> hidden of the layer`, `logits(hidden [R, ...]) -> [R, V]`: the MTP module.

    Row i of the layer reads the main model's hidden state i and token i + 1, guesses token i + 2, and caches at
    position i. After a step all of its rows are run, which fills that cache as far as the main one (rows of rejected
    drafts are overwritten later, as there). A further guess reads the layer's own hidden state in a row of its own,
    whose cached entry the next step overwrites; where blocks or context end, a row has fewer guesses.
    """

    def __init__(
        self,
        forward: Callable[[torch.Tensor, Batch], torch.Tensor],
        logits: Callable[[torch.Tensor], torch.Tensor],
        argmax: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
        slots: Slots,
        num_tokens: int,
    ):
        self.forward = forward
        self.logits = logits
        self.argmax = argmax
        self.slots = slots
        self.num_tokens = num_tokens

    def propose(self, prepared: Prepared, hidden: torch.Tensor, newest: np.ndarray) -> list[list[int]]:
        """See Proposer."""
        hidden = self.forward(hidden, self._shifted(prepared.batch, prepared.next_idx))
        guesses: list[tuple[np.ndarray, torch.Tensor]] = []
        alive = np.arange(len(newest))
        slot, position = prepared.slots[newest], prepared.positions[newest]
        if len(newest):
            hidden = hidden.index_select(0, prepared.batch.sample_idx[torch.from_numpy(newest).to(hidden.device)])
        for count in range(self.num_tokens):
            # The row of guess `count` stands one before the token that it reads, which is at position + count.
            room = np.minimum(self.slots.num_blocks[slot] * self.slots.block_size, self.slots.token_ids.shape[1] - 2)
            kept = np.flatnonzero(position + count - 1 < room)
            if not len(kept):
                break
            if len(kept) < len(alive):
                alive, slot, position = alive[kept], slot[kept], position[kept]
                hidden = hidden.index_select(0, torch.from_numpy(kept).to(hidden.device))
            if count:
                ones = np.arange(len(alive) + 1)
                batch, next_idx = make_batch(self.slots, slot, position + count - 1, ones, ones[:-1])
                hidden = self.forward(hidden, self._shifted(batch, next_idx))
            tokens, _ = self.argmax(self.logits(hidden))
            self.slots.write(slot, position + count + 1, tokens)
            guesses.append((alive, tokens))
        drafts: list[list[int]] = [[] for _ in newest]
        for rows, tokens in guesses:
            for row, token in zip(rows.tolist(), tokens.tolist()):
                drafts[row].append(token)
        return drafts

    def _shifted(self, batch: Batch, next_idx: torch.Tensor) -> Batch:
        token_ids = self.slots.token_ids.view(-1).index_select(0, next_idx).long()
        return replace(batch, token_ids=token_ids)
