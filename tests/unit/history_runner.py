"""A runner whose next token is a function of the whole visible history, read through block tables like a real one's.

The entry that it writes for a position holds the token and a digest of everything before it. A row reads all of its
history back and compares it with the digests of its own tokens: one entry of another request, of another position or
of an older life, and it raises. So chunks, shared prefixes, reused slots and blocks, and preemption are proven exact.
"""

from dataclasses import dataclass

from deepserve.messages import NewRequest, TokenLogprobs
from deepserve.scheduler.output import ScheduledRow, ScheduledStep, StepResult

VOCAB_SIZE = 50
START = 1


def digest(parent: int, token_id: int) -> int:
    """The chained digest of a position."""
    return (parent * 6364136223846793005 + token_id * 1442695040888963407 + 1) & 0xFFFFFFFFFFFFFFFF


def choose(state: int, seed: int) -> int:
    """The token that follows a history with this digest."""
    return (digest(state, seed) >> 33) % VOCAB_SIZE


def undisturbed(new: NewRequest, max_tokens: int, eos_token_ids: tuple[int, ...]) -> tuple[list[int], str]:
    """The tokens and the finish reason of a request that is alone, written down without any engine."""
    state, tokens, sampling = START, [], new.sampling
    for token_id in new.prompt_token_ids:
        state = digest(state, token_id)
    while True:
        token_id = choose(state, sampling.seed or 0)
        tokens.append(token_id)
        state = digest(state, token_id)
        if len(tokens) >= sampling.min_tokens:
            if token_id in eos_token_ids and not sampling.ignore_eos:
                return tokens, "stop"
            if token_id in sampling.stop_token_ids:
                return tokens, "stop"
        if len(tokens) >= max_tokens:
            return tokens, "length"


def prompt_entry(token_id: int) -> TokenLogprobs:
    """What stands for the log-probabilities of a prompt token."""
    return TokenLogprobs([token_id], [-0.5], [1])


@dataclass(slots=True)
class _Slot:
    request_id: str
    token_ids: list[int]
    num_prompt_tokens: int
    seed: int
    states: list[int]  # digests of the tokens, as far as known
    block_ids: list[int]
    wants_prompt: bool
    wants_logprobs: bool
    lost: bool = False  # a step of it failed: what it computes from now on is garbage that nobody may use


class HistoryRunner:
    """Executes steps on lists of cache entries. `poison`: request ids whose rows fail; `broken`: steps that fail."""

    def __init__(self, num_blocks: int, block_size: int, max_num_seqs: int) -> None:
        self.block_size = block_size
        self.entries: list[list[int]] = [[0] * block_size for _ in range(num_blocks)]
        self.slots: list[_Slot | None] = [None] * max_num_seqs
        self.poison: set[str] = set()
        self.broken: set[int] = set()
        self.num_steps = 0

    def execute(self, step: ScheduledStep) -> StepResult:
        """One step; AssertionError if a row does not find the history that its tokens demand."""
        assert step.step >= self.num_steps, "steps come in order, each once"
        self.num_steps = step.step + 1
        result = StepResult(step.step, {})
        for slot in step.released_slots:
            assert self.slots[slot] is not None, "released, but never taken"
            self.slots[slot] = None
        for row in step.rows:
            self._enter(row)
        if step.step in self.broken:
            for row in step.rows:
                self.slots[row.slot].lost = True
            raise RuntimeError("the device fell over")
        for row in step.rows:
            if row.request_id in self.poison:
                result.errors[row.request_id] = "poisoned"
                self.slots[row.slot].lost = True
            elif self.slots[row.slot].lost:  # a step ahead of the bad news: its result must be dropped
                result.sampled[row.request_id] = [VOCAB_SIZE + 1]
            else:
                self._compute(row, self.slots[row.slot], result)
        return result

    def _enter(self, row: ScheduledRow) -> None:
        if row.new is not None:
            assert self.slots[row.slot] is None, "a slot is taken while another request has it"
            new = row.new
            sampling = new.sampling
            slot = _Slot(
                row.request_id, list(new.token_ids), new.num_prompt_tokens, sampling.seed or 0, [], [], False, False
            )
            slot.wants_prompt = sampling.prompt_logprobs is not None
            slot.wants_logprobs = sampling.logprobs is not None
            state = START
            for token_id in slot.token_ids:
                state = digest(state, token_id)
                slot.states.append(state)
            self.slots[row.slot] = slot
        slot = self.slots[row.slot]
        assert slot is not None
        assert slot.request_id == row.request_id, "a row in a slot of another request"
        slot.block_ids += row.new_block_ids

    def _compute(self, row: ScheduledRow, slot: _Slot, result: StepResult) -> None:
        size, entries = self.block_size, self.entries
        begin, end = row.num_computed_tokens, row.num_computed_tokens + row.num_scheduled_tokens
        assert end <= len(slot.token_ids), "computes a token that nobody knows"
        for idx in range(begin, end):
            entries[slot.block_ids[idx // size]][idx % size] = slot.states[idx]
        seen: list[int] = []
        for block_id in slot.block_ids[: -(-end // size)]:
            seen += entries[block_id]
        assert seen[:end] == slot.states[:end], f"{row.request_id} reads a history that is not its own"
        if slot.wants_prompt:
            targets = slot.token_ids[begin + 1 : min(end + 1, slot.num_prompt_tokens)]
            result.prompt_logprobs[row.request_id] = [prompt_entry(token_id) for token_id in targets]
        assert row.samples == (end == len(slot.token_ids))
        if row.samples:
            token_id = choose(seen[end - 1], slot.seed)
            slot.token_ids.append(token_id)
            slot.states.append(digest(slot.states[-1], token_id))
            result.sampled[row.request_id] = [token_id]
            if slot.wants_logprobs:
                result.logprobs[row.request_id] = [TokenLogprobs([token_id], [-1.0], [1])]
