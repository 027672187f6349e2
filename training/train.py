"""Train the demo model for a fixed time on one GPU.

    python training/train.py --data train.npz --out OUT --seconds 375

The learning rate follows the clock, so that it has decayed to zero when the time is up whatever the speed of the GPU.
Hidden matrices are updated by Muon (momentum orthogonalised by Newton-Schulz), the rest by AdamW; weights are float32,
products bfloat16. Router biases move by the sign of their expert's load error after every step (auxiliary-loss-free).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from model import DemoModel, ModelConfig, Moe, load_checkpoint, save_checkpoint
from torch import Tensor
from torch.nn import functional as F

REAL_SHARE = 0.18  # of the rows; the sampled prose has the rest
MUON_RATE, ADAM_RATE, WEIGHT_DECAY, MOMENTUM = 0.02, 3e-3, 0.05, 0.95


class Rows:
    """Training rows: each begins at a random document and runs on through its neighbours."""

    def __init__(self, path: Path, length: int, device: str, seed: int):
        data = np.load(path)
        tokens, sizes, real = data["tokens"], data["sizes"].astype(np.int64), data["real"]
        self.length, self.device = length, device
        self.generator = torch.Generator(device).manual_seed(seed)
        of_real = np.repeat(real, sizes)
        self.streams: list[tuple[Tensor, Tensor]] = []
        for chosen in (False, True):
            picked = sizes[real == chosen]
            begin = np.cumsum(picked) - picked
            stream = tokens[of_real == chosen]
            begin = begin[begin < len(stream) - length]
            self.streams.append(
                (torch.from_numpy(stream.astype(np.int16)).to(device), torch.from_numpy(begin).to(device))
            )

    def batch(self, rows: int) -> Tensor:
        """Token ids [rows, length] int64."""
        real = round(rows * REAL_SHARE)
        parts = []
        for (stream, begin), count in zip(self.streams, (rows - real, real), strict=True):
            at = begin[torch.randint(len(begin), (count,), generator=self.generator, device=self.device)]
            parts.append(stream[at[:, None] + torch.arange(self.length, device=self.device)].long())
        return torch.cat(parts)


def orthogonalised(x: Tensor) -> Tensor:
    """Nearest semi-orthogonal matrices to x [n, r, c] by five quintic Newton-Schulz steps, bf16."""
    x = x.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


class Muon:
    """Momentum, orthogonalised; weights of one shape are updated together as a stack."""

    def __init__(self, weights: list[Tensor]):
        self.groups: dict[tuple[int, int], list[Tensor]] = {}
        for weight in weights:
            self.groups.setdefault((weight.shape[-2], weight.shape[-1]), []).append(weight)
        self.momenta = {
            shape: torch.zeros(sum(w.numel() for w in group) // math.prod(shape), *shape, device=group[0].device)
            for shape, group in self.groups.items()
        }

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One update at this learning rate; gradients are consumed."""
        for (rows, columns), group in self.groups.items():
            gradient = torch.cat([w.grad.reshape(-1, rows, columns) for w in group])
            momentum = self.momenta[rows, columns]
            momentum.lerp_(gradient, 1 - MOMENTUM)
            update = orthogonalised(gradient.lerp(momentum, MOMENTUM)).float()
            update *= max(1, rows / columns) ** 0.5
            at = 0
            for weight in group:
                count = weight.numel() // (rows * columns)
                weight.mul_(1 - rate * WEIGHT_DECAY).add_(update[at : at + count].reshape(weight.shape), alpha=-rate)
                weight.grad = None
                at += count


def head_loss(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of hidden [B, S, H] through head [V, H] against targets [B, S]."""
    logits = F.linear(hidden, head).flatten(0, 1)
    return F.cross_entropy(logits.float(), targets.flatten())


def schedule(progress: float) -> float:
    """Learning-rate factor at this share of the time: short warm-up, flat, then linear to zero from 40 %."""
    return min(1.0, progress / 0.01 + 0.02, max(0.0, (1 - progress) / 0.6))


def balance(layers: list[Moe], speed: float) -> Tensor:
    """Move the router biases by the sign of the load error; returns the largest load of a layer over its mean."""
    worst = torch.zeros((), device=layers[0].bias.device)
    for moe in layers:
        mean = moe.load.mean()
        worst = torch.maximum(worst, moe.load.max() / mean)
        moe.bias += speed * torch.sign(mean - moe.load)
        moe.load.zero_()
    return worst


class Trainer:
    """The model, its two optimisers, and one step."""

    def __init__(self, model: DemoModel, length: int, compiled: bool, rate: float):
        self.rate = rate
        self.model, self.device = model, next(model.parameters()).device
        self.cos, self.sin = model.angles(length, self.device)
        self.moes = [m for m in model.modules() if isinstance(m, Moe)]
        named = dict(model.named_parameters())
        plain = {n for n, w in named.items() if w.dim() < 2 or n.startswith(("embed", "lm_head")) or n.endswith("gate")}
        self.muon = Muon([w for n, w in named.items() if n not in plain])
        self.adam = torch.optim.AdamW(
            [w for n, w in named.items() if n in plain],
            lr=ADAM_RATE,
            betas=(0.9, 0.95),
            weight_decay=0.0,
            fused=self.device.type == "cuda",
        )
        self.head_loss = head_loss
        if compiled:
            for layer in [*model.layers, model.mtp_layer]:
                layer.compile()
            self.head_loss = torch.compile(head_loss)

    def step(self, ids: Tensor, factor: float, mtp_weight: float) -> tuple[Tensor, Tensor]:
        """One update from ids [B, S + 2]; returns the main and the MTP loss."""
        model = self.model
        with torch.autocast(self.device.type, torch.bfloat16):
            hidden = model(ids[:, :-2], self.cos, self.sin)
            loss = self.head_loss(hidden, model.lm_head.weight, ids[:, 1:-1])
            ahead = model.mtp(hidden, ids[:, 1:-1], self.cos, self.sin)
            mtp_loss = self.head_loss(ahead, model.lm_head.weight, ids[:, 2:])
        (loss + mtp_weight * mtp_loss).backward()
        torch.nn.utils.clip_grad_norm_([w for g in self.adam.param_groups for w in g["params"]], 1.0)
        for group in self.adam.param_groups:
            group["lr"] = ADAM_RATE * self.rate * factor
        self.adam.step()
        self.adam.zero_grad()
        self.muon.step(MUON_RATE * self.rate * factor)
        return loss.detach(), mtp_loss.detach()


def progress_of_time(seconds: float, device: str) -> Iterator[float]:
    """The share of the time used, until it is up; the clock starts after three steps, when compilation is over."""
    for _ in range(3):
        yield 0.0
    began = time.time()
    while (used := (time.time() - began) / seconds) < 1:
        yield used
        if device == "cuda":
            torch.cuda.synchronize()


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=420)
    parser.add_argument("--rows", type=int, default=128, help="rows of a step")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--resume", type=Path, help="checkpoint folder to start from, e.g. for a longer --length")
    parser.add_argument("--rate", type=float, default=1.0, help="factor on both learning rates")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    model = load_checkpoint(args.resume) if args.resume else DemoModel(ModelConfig(max_position_embeddings=args.length))
    model.config = replace(model.config, max_position_embeddings=max(args.length, model.config.max_position_embeddings))
    trainer = Trainer(model.to(args.device), args.length, args.device == "cuda", args.rate)
    rows = Rows(args.data, args.length + 2, args.device, args.seed)
    print(f"{sum(w.numel() for w in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    began, step = time.time(), 0
    for progress in progress_of_time(args.seconds, args.device):
        loss, mtp_loss = trainer.step(rows.batch(args.rows), schedule(progress), 0.3 if progress < 2 / 3 else 0.1)
        worst = balance(trainer.moes, 0.001 if progress < 0.8 else 0.0002)
        step += 1
        if step % 100 == 0 or step <= 5:
            print(
                f"step {step} {progress:.3f} {time.time() - began:.0f} s loss {loss.item():.4f} mtp "
                f"{mtp_loss.item():.4f} load {worst.item():.2f}",
                flush=True,
            )
    save_checkpoint(model, args.out)
    print(
        json.dumps(
            {
                "steps": step,
                "tokens": step * args.rows * args.length,
                "loss": round(loss.item(), 4),
                "mtp_loss": round(mtp_loss.item(), 4),
                "seconds": round(time.time() - began, 1),
                "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
            }
        )
    )


if __name__ == "__main__":
    main()
