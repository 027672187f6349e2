"""Of the sample kernels, what the cases cannot say: guesses are good, and a wrong one changes no token."""

import torch

from deepserve.ops.load import load_kernel
from deepserve.ops.sample.spec import LOGITS, sample

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = [("peaked", 0, 0.9), ("flat", 0, 0.9), ("flat", 3000, 1.0), ("peaked", 200, 0.95)]  # logits, top_k, top_p


class Watched:
    """A kernel that is launched as ever, between two calls that are told its arguments by name."""

    def __init__(self, kernel, before=dict, after=dict):
        self.kernel, self.before, self.after = kernel, before, after

    def __getitem__(self, grid):
        def launch(*args, **options):
            named = dict(zip(self.kernel.arg_names, args))
            self.before(named)
            self.kernel[grid](*args, **options)
            self.after(named)

        return launch


def make(rows, vocab_size, seed):
    generator = torch.Generator().manual_seed(seed)
    kinds, top_k, top_p = zip(*rows)
    ones = torch.ones(len(rows))
    uniform = torch.rand(len(rows), generator=generator, dtype=torch.float64)
    logits = torch.cat([LOGITS[kind](generator, (1, vocab_size), DEVICE) for kind in kinds])
    columns = (ones, torch.tensor(top_k), torch.tensor(top_p, dtype=torch.float64), ones * -torch.inf, uniform)
    return logits, *(column.to(DEVICE) for column in columns), True


def test_guesses_are_good(seed, monkeypatch):
    """What filters keep ends in the band, of which there is not much."""
    from deepserve.ops.sample import triton

    seen = {}
    monkeypatch.setattr(triton, "_sample_draw_kernel", Watched(triton._sample_draw_kernel, before=seen.update))
    arguments = make(ROWS, 40_000, seed)
    load_kernel("sample", "triton").function(*arguments)
    logits, top_k = arguments[0].double(), arguments[2]
    shares = (logits - logits.amax(-1, keepdim=True)).exp().sum(-1) * arguments[3]
    wanted = torch.where(top_k > 0, top_k, shares)
    above, within = (
        torch.where(top_k > 0, seen["numbers"][:, kind].sum(-1), seen["masses"][:, kind].sum(-1)) for kind in (1, 2)
    )
    assert (above < wanted).all()
    assert (above + within >= wanted).all()
    assert seen["numbers"][:, 2].max() <= seen["inside"].shape[-1]


def test_a_wrong_guess_changes_no_token(seed, monkeypatch):
    """Bands too low, too high, and of everything."""
    from deepserve.ops.sample import triton

    low, high, least = -(2**30), 2**30 + 2**29, -2139095040
    bands = torch.tensor([[low, low], [high, high], [least, high], [high, high]], dtype=torch.int32)
    kernel = Watched(triton._sample_guess_kernel, after=lambda named: named["bands"].copy_(bands))
    monkeypatch.setattr(triton, "_sample_guess_kernel", kernel)
    arguments = make(ROWS, 2000, seed)
    assert torch.equal(load_kernel("sample", "triton").function(*arguments)[0], sample(*arguments)[0])
