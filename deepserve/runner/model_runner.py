"""One step on one device: enter, prepare, forward, logits of the rows that want them, sample, write back."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from deepserve.errors import AskError
from deepserve.runner.batch import Batch
from deepserve.runner.prepare import Prepared, prepare
from deepserve.runner.slots import Slots
from deepserve.sampling.columns import LOGPROBS
from deepserve.sampling.logprobs import token_logprobs
from deepserve.sampling.sampler import Sampler, SamplingRows
from deepserve.scheduler.output import ScheduledStep, StepResult

LOGITS_BYTES = 64 << 20  # of prompt log-probabilities' logits at a time


class ModelRunner:
    """Runs steps in order. `forward(batch) -> hidden [T, H]`; `logits(hidden [S, H]) -> fp32 [S, V]`."""

    def __init__(
        self,
        forward: Callable[[Batch], torch.Tensor],
        logits: Callable[[torch.Tensor], torch.Tensor],
        sampler: Sampler,
        slots: Slots,
    ):
        self.forward = forward
        self.logits = logits
        self.sampler = sampler
        self.slots = slots

    @torch.inference_mode()
    def execute(self, step: ScheduledStep) -> StepResult:
        """Computes the step's tokens and samples where a row reaches its last one."""
        result = StepResult(step.step, {})
        self._enter(step, result)
        prepared = prepare(step, self.slots)
        hidden = self.forward(prepared.batch)
        self._tell_prompt_logprobs(prepared, hidden, result)
        if prepared.sampled:
            self._sample(prepared, hidden, result)
        return result

    def _enter(self, step: ScheduledStep, result: StepResult) -> None:
        for slot in step.released_slots:
            self.slots.release(slot)
        for row in step.rows:
            if row.new is not None:
                try:
                    self.slots.enter(row, row.new)
                except AskError as error:  # its tokens are computed for nothing; nobody else notices
                    result.errors[row.request_id] = str(error)
            if row.new_block_ids:
                self.slots.add_blocks(row.slot, row.new_block_ids)

    def _sample(self, prepared: Prepared, hidden: torch.Tensor, result: StepResult) -> None:
        slots, index, batch = self.slots, prepared.slots, prepared.batch
        whole = len(prepared.sampled) == len(hidden)
        logits = self.logits(hidden if whole else hidden.index_select(0, batch.sample_idx))
        needs = slots.columns.needs[index]
        if needs.any():
            tokens, evidence = self.sampler.sample(logits, self._sampling_rows(prepared))
        else:
            tokens, evidence = self.sampler.most_probable(logits)
        if (slots.generation[index] != prepared.generations).any():
            raise RuntimeError("a slot changed hands while its step ran")
        where = torch.from_numpy(index * slots.token_ids.shape[1] + prepared.positions)
        slots.token_ids.view(-1).index_copy_(0, where.to(tokens.device), tokens.int())
        for row, token, proof in zip(prepared.sampled, tokens.tolist(), evidence.tolist()):
            if math.isfinite(proof):
                result.sampled[row.request_id] = [token]
            else:
                result.errors.setdefault(row.request_id, "no token can be sampled: all are forbidden or not finite")
        asked = (needs & LOGPROBS).nonzero()[0].tolist()
        if asked:
            told = token_logprobs(logits[asked], tokens[asked], [slots.logprobs[index[i]] for i in asked])
            result.logprobs = {prepared.sampled[i].request_id: [entry] for i, entry in zip(asked, told)}

    def _sampling_rows(self, prepared: Prepared) -> SamplingRows:
        slots, index = self.slots, prepared.slots
        return SamplingRows(
            slots.columns.take(index),
            index,
            prepared.positions,
            slots.num_prompt_tokens[index],
            [slots.edits[slot] for slot in index],
            slots.token_ids,
        )

    def _tell_prompt_logprobs(self, prepared: Prepared, hidden: torch.Tensor, result: StepResult) -> None:
        """The entries of the prompt tokens that follow the computed ones, a slice of rows at a time."""
        for row, start in zip(prepared.rows, prepared.starts.tolist()):
            count = self.slots.prompt_logprobs[row.slot]
            if count is None:
                continue
            first = row.num_computed_tokens + 1
            last = min(first + row.num_scheduled_tokens, int(self.slots.num_prompt_tokens[row.slot]))
            entries = result.prompt_logprobs.setdefault(row.request_id, [])
            size = max(1, LOGITS_BYTES // (4 * self.slots.vocab_size))
            for begin in range(first, last, size):
                chosen = self.slots.token_ids[row.slot, begin : min(begin + size, last)].long()
                offset = start + begin - first
                logits = self.logits(hidden[offset : offset + len(chosen)])
                entries += token_logprobs(logits, chosen, [count] * len(chosen))
            if last == self.slots.num_prompt_tokens[row.slot]:
                self.slots.prompt_logprobs[row.slot] = None
