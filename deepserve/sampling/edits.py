"""Changes of single logits that a request asks for: a grammar, allowed ids, bad words, min_tokens, logit_bias."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from deepserve.errors import AskError
from deepserve.sampling_params import SamplingParams
from deepserve.transfer import send


class Edits:
    """One request's edits, checked against the vocabulary and put on the device once, when it enters a slot.

    To apply them the host looks at no value of the device, and waits for nothing: numbers go along as arguments.
    """

    def __init__(
        self, sampling: SamplingParams, eos_token_ids: Sequence[int], vocab_size: int, device: torch.device | str
    ):
        check_ids(sampling, vocab_size)

        def there(values: Sequence[float], dtype: type) -> torch.Tensor:
            return send(np.array(values, dtype), torch.device(device))

        def ids(values: Iterable[int]) -> torch.Tensor | None:
            return there(found, np.int64) if (found := sorted(set(values))) else None

        ends = [*sampling.stop_token_ids, *(() if sampling.ignore_eos else eos_token_ids)]
        self.min_tokens = sampling.min_tokens
        structured = sampling.structured_outputs is not None  # then the grammar says where an end may wait
        self.end_ids = ids(ends) if self.min_tokens and not structured else None
        self.allowed_ids = ids(sampling.allowed_token_ids or ())
        bias = sampling.logit_bias
        self.bias_ids = ids(bias)
        self.bias = there([bias[token] for token in sorted(bias)], np.float32) if bias else None
        self.bad_ids = ids(word[0] for word in sampling.bad_words_ids if len(word) == 1)
        longer = [word for word in sampling.bad_words_ids if len(word) > 1]
        self.bad_ends = [(there(word[:-1], np.int64), word[-1]) for word in longer]

    def __bool__(self) -> bool:
        kinds = (self.end_ids, self.allowed_ids, self.bias_ids, self.bad_ids)
        return any(kind is not None for kind in kinds) or bool(self.bad_ends)

    def apply(self, logits: torch.Tensor, output: torch.Tensor) -> None:
        """Edits one row [V] in place, after the tokens `output`, on the same device."""
        if self.allowed_ids is not None:
            kept = logits[self.allowed_ids]
            logits.fill_(-torch.inf).index_copy_(0, self.allowed_ids, kept)
        if self.bad_ids is not None:
            logits.index_fill_(0, self.bad_ids, -torch.inf)
        for before, last in self.bad_ends:
            if len(before) <= len(output):
                logits[last].masked_fill_((output[-len(before) :] == before).all(), -torch.inf)
        if self.end_ids is not None and len(output) < self.min_tokens:
            logits.index_fill_(0, self.end_ids, -torch.inf)
        if self.bias_ids is not None and self.bias is not None:
            logits[self.bias_ids] += self.bias


def keep_legal(logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """logits [S, V], masks [S, ceil(V / 32)] int32 of a grammar: -inf where a token's bit (lowest first) is 0."""
    bits = masks.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32, device=masks.device) & 1
    return logits.masked_fill(bits.flatten(1)[:, : logits.shape[1]] == 0, -torch.inf)


def check_ids(sampling: SamplingParams, vocab_size: int) -> None:
    """AskError where a parameter names a token that the model does not have: it must never touch another row."""
    named = {
        "logit_bias": sampling.logit_bias,
        "allowed_token_ids": sampling.allowed_token_ids or (),
        "stop_token_ids": sampling.stop_token_ids,
        "bad_words": [token for word in sampling.bad_words_ids for token in word],
    }
    for field, tokens in named.items():
        for token in tokens:
            if not 0 <= token < vocab_size:
                raise AskError(f"token {token!r} is not in the vocabulary of {vocab_size}", field=field)
