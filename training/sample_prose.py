"""Sample simple English prose from SmolLM2-135M-Instruct, fast: one CUDA graph per step, thousands of rows.

Every row of the batch holds one document. A step feeds each row its next token (a prompt token while the prompt lasts,
then what was sampled) and a row whose document ends starts its next prompt in the same step, so the batch is always
full and there is no separate prefill. All bookkeeping lives on the device; the host only replays the graph.

    python training/sample_prose.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf --prompts prompts.npz --out prose.npz \
        --seconds 360 --batch 4096
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import triton
import triton.language as tl

EOS = 2  # <|im_end|>
MAX_LENGTH = 416  # prompt and answer, tokens
MIN_P = 0.12  # a token needs this share of the best token's probability


@triton.jit
def _decode_attention_kernel(
    qkv,
    cache_k,
    cache_v,
    cos_sin,
    positions,
    out,
    scale,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """RoPE, cache write and attention of one new token: one program per (row, kv head); head dim 64, M padded to 16."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    width: tl.constexpr = (GROUP + 2) * KV_HEADS * 64
    half, wide, member = tl.arange(0, 32), tl.arange(0, 64), tl.arange(0, 16)
    position = tl.load(positions + row)
    cos = tl.load(cos_sin + position * 64 + half)
    sin = tl.load(cos_sin + position * 64 + 32 + half)
    q_at = qkv + row * width + (head * GROUP + member[:, None]) * 64 + half[None, :] * 2
    real = member[:, None] < GROUP
    q_even = tl.load(q_at, mask=real, other=0.0).to(tl.float32)
    q_odd = tl.load(q_at + 1, mask=real, other=0.0).to(tl.float32)
    a = ((q_even * cos - q_odd * sin) * scale).to(tl.bfloat16)
    b = ((q_even * sin + q_odd * cos) * scale).to(tl.bfloat16)
    k_at = qkv + row * width + (GROUP * KV_HEADS + head) * 64 + half * 2
    k_even, k_odd = tl.load(k_at).to(tl.float32), tl.load(k_at + 1).to(tl.float32)
    k_a, k_b = (k_even * cos - k_odd * sin).to(tl.bfloat16), (k_even * sin + k_odd * cos).to(tl.bfloat16)
    v_new = tl.load(qkv + row * width + ((GROUP + 1) * KV_HEADS + head) * 64 + wide)
    base = (row * KV_HEADS + head) * SLOTS * 64
    tl.store(cache_k + base + position * 64 + half, k_a)
    tl.store(cache_k + base + position * 64 + 32 + half, k_b)
    tl.store(cache_v + base + position * 64 + wide, v_new)
    # The new token starts the running softmax, so that nothing just stored is read back.
    own = tl.sum(a.to(tl.float32) * k_a[None, :].to(tl.float32) + b.to(tl.float32) * k_b[None, :].to(tl.float32), 1)
    top, total = own, tl.full([16], 1.0, tl.float32)
    acc = tl.zeros([16, 64], tl.float32) + v_new[None, :].to(tl.float32)
    for start in range(0, position, BLOCK):
        at = start + tl.arange(0, BLOCK)
        seen = at < position
        key_a = tl.load(cache_k + base + at[None, :] * 64 + half[:, None], mask=seen[None, :], other=0.0)
        key_b = tl.load(cache_k + base + at[None, :] * 64 + 32 + half[:, None], mask=seen[None, :], other=0.0)
        scores = tl.dot(a, key_a) + tl.dot(b, key_b)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        best = tl.maximum(top, tl.max(scores, 1))
        decay = tl.exp(top - best)
        weights = tl.exp(scores - best[:, None])
        total = total * decay + tl.sum(weights, 1)
        value = tl.load(cache_v + base + at[:, None] * 64 + wide[None, :], mask=seen[:, None], other=0.0)
        acc = acc * decay[:, None] + tl.dot(weights.to(tl.bfloat16), value)
        top = best
    o_at = out + row * (GROUP * KV_HEADS * 64) + (head * GROUP + member[:, None]) * 64 + wide[None, :]
    tl.store(o_at, (acc / total[:, None]).to(tl.bfloat16), mask=real)


@triton.jit
def _sample_kernel(
    logits, allowed, penalties, seen, serial, temperatures, step, out, V, log_min_p, BLOCK: tl.constexpr
):
    """Gumbel-max over the tokens within min-p of the best one, repeats penalised; one program per row.

    A token repeats when its stamp in seen [B, V] is the serial number of the row's document."""
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperatures + row)
    seed = tl.load(step)
    document = tl.load(serial + row)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(logits + row * V + at, mask=at < V, other=float("-inf")).to(tl.float32)
        penalty = tl.load(penalties + at, mask=at < V, other=1.0)
        repeated = tl.load(seen + row * V + at, mask=at < V, other=-1) == document
        x = tl.where(repeated, tl.where(x > 0, x / penalty, x * penalty), x)
        best = tl.maximum(best, x + tl.load(allowed + at, mask=at < V, other=float("-inf")))
    floor = tl.max(best, 0) + log_min_p * temperature
    top, chosen = tl.full([BLOCK], float("-inf"), tl.float32), tl.zeros([BLOCK], tl.int32)
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(logits + row * V + at, mask=at < V, other=float("-inf")).to(tl.float32)
        penalty = tl.load(penalties + at, mask=at < V, other=1.0)
        repeated = tl.load(seen + row * V + at, mask=at < V, other=-1) == document
        x = tl.where(repeated, tl.where(x > 0, x / penalty, x * penalty), x)
        x += tl.load(allowed + at, mask=at < V, other=float("-inf"))
        uniform = tl.rand(seed, (row * V + at).to(tl.int32))
        noisy = x / temperature - tl.log(-tl.log(tl.maximum(uniform, 1e-12)))
        noisy = tl.where(x >= floor, noisy, float("-inf"))
        chosen = tl.where(noisy > top, at, chosen)
        top = tl.maximum(top, noisy)
    winner = tl.max(top, 0)
    tl.store(out + row, tl.min(tl.where(top == winner, chosen, V), 0))


class Model:
    """SmolLM2 (Llama) decoding one token a row; weights dequantised from GGUF to bf16."""

    def __init__(self, gguf_path: str, batch: int, device: str):
        from gguf import GGUFReader, dequantize

        raw = {t.name: torch.from_numpy(dequantize(t.data, t.tensor_type)) for t in GGUFReader(gguf_path).tensors}
        raw = {name: value.to(device, torch.bfloat16) for name, value in raw.items()}
        self.num_layers = 1 + max(int(name.split(".")[1]) for name in raw if name.startswith("blk."))
        self.hidden, self.heads, self.kv_heads = raw["token_embd.weight"].shape[1], 9, 3
        self.embedding, self.final_norm = raw["token_embd.weight"], raw["output_norm.weight"]
        self.layers = []
        for i in range(self.num_layers):
            part = {k.split(".")[2]: v for k, v in raw.items() if k.startswith(f"blk.{i}.")}
            self.layers.append(
                (
                    part["attn_norm"],
                    torch.cat([part["attn_q"], part["attn_k"], part["attn_v"]]),
                    part["attn_output"],
                    part["ffn_norm"],
                    torch.cat([part["ffn_gate"], part["ffn_up"]]),
                    part["ffn_down"],
                )
            )
        shape = (self.num_layers, batch, self.kv_heads, MAX_LENGTH, 64)
        self.cache_k = torch.zeros(shape, dtype=torch.bfloat16, device=device)
        self.cache_v = torch.zeros_like(self.cache_k)
        frequency = 100000.0 ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)
        angle = torch.arange(MAX_LENGTH, dtype=torch.float64)[:, None] * frequency
        self.cos_sin = torch.cat([angle.cos(), angle.sin()], 1).float().to(device)
        self.attended = torch.empty(batch, self.hidden, dtype=torch.bfloat16, device=device)

    def logits(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Logits [B, V] bf16 of tokens [B] at positions [B]; appends to the cache."""
        x = self.embedding[tokens]
        for i, (norm, qkv, output, ffn_norm, gate_up, down) in enumerate(self.layers):
            mixed = torch.nn.functional.rms_norm(x, (self.hidden,), norm, 1e-5) @ qkv.T
            _decode_attention_kernel[(len(tokens), self.kv_heads)](
                mixed,
                self.cache_k[i],
                self.cache_v[i],
                self.cos_sin,
                positions,
                self.attended,
                64**-0.5,
                GROUP=self.heads // self.kv_heads,
                KV_HEADS=self.kv_heads,
                SLOTS=MAX_LENGTH,
                BLOCK=64,
                num_warps=2,
            )
            x = x + self.attended @ output.T
            gate, up = (torch.nn.functional.rms_norm(x, (self.hidden,), ffn_norm, 1e-5) @ gate_up.T).chunk(2, -1)
            x = x + (torch.nn.functional.silu(gate) * up) @ down.T
        return torch.nn.functional.rms_norm(x, (self.hidden,), self.final_norm, 1e-5) @ self.embedding.T


class Sampler:
    """The batch: which prompt and position each row is at, and the record of what was sampled."""

    def __init__(self, model: Model, prompts: dict[str, np.ndarray], batch: int, steps: int, device: str):
        self.model, self.batch = model, batch
        put = lambda name, dtype: torch.from_numpy(prompts[name]).to(device, dtype)  # noqa: E731
        self.prompts, self.lengths = put("tokens", torch.long), put("lengths", torch.long)
        self.prompt_temperatures, self.allowed = put("temperatures", torch.float32), put("allowed", torch.float32)
        self.penalties = put("penalties", torch.float32)
        # The cache keeps the tokens that all prompts begin with, so a row's later documents start after them.
        same = (self.prompts == self.prompts[0]).all(0)
        self.shared = int(same.int().cumprod(0).sum())
        self.row_prompt = torch.arange(batch, device=device) % len(self.lengths)
        self.positions = torch.zeros(batch, dtype=torch.long, device=device)
        self.tokens = self.prompts[self.row_prompt, 0].clone()
        self.seen = torch.zeros(batch, len(self.allowed), dtype=torch.int16, device=device)
        self.serial = torch.ones(batch, dtype=torch.int16, device=device)
        self.step = torch.zeros(1, dtype=torch.long, device=device)
        self.record = torch.full((steps, batch), -1, dtype=torch.int32, device=device)
        self.sampled = torch.zeros(batch, dtype=torch.int32, device=device)

    def advance(self) -> None:
        """One step of every row, all on the device. Record: -1 inside a prompt, -2 a document cut at the limit."""
        logits = self.model.logits(self.tokens, self.positions)
        temperatures = self.prompt_temperatures[self.row_prompt]
        _sample_kernel[(self.batch,)](
            logits,
            self.allowed,
            self.penalties,
            self.seen,
            self.serial,
            temperatures,
            self.step,
            self.sampled,
            logits.shape[1],
            float(np.log(MIN_P)),
            BLOCK=2048,
            num_warps=8,
        )
        following = self.positions + 1
        forced = following < self.lengths[self.row_prompt]
        prompted = self.prompts[self.row_prompt, following.clamp(max=self.prompts.shape[1] - 1)]
        token = torch.where(forced, prompted, self.sampled.long())
        cut = following >= MAX_LENGTH - 1
        done = cut | (~forced & (token == EOS))
        kept = torch.where(forced, -1, torch.where(cut, -2, token)).int()
        self.record.index_copy_(0, self.step, kept[None])
        self.row_prompt.copy_(torch.where(done, (self.row_prompt + self.batch) % len(self.lengths), self.row_prompt))
        self.positions.copy_(torch.where(done, self.shared, following))
        self.tokens.copy_(torch.where(done, self.prompts[self.row_prompt, self.shared], token))
        self.seen.scatter_(1, token[:, None], torch.where(forced, -1, self.serial.int()).short()[:, None])
        self.serial.add_(done)
        self.step.add_(1)

    def reset(self) -> None:
        """Back to the first prompts with an empty record (after warm-up)."""
        self.record.fill_(-1)
        self.row_prompt.copy_(torch.arange(self.batch, device=self.step.device) % len(self.lengths))
        self.positions.zero_()
        self.tokens.copy_(self.prompts[self.row_prompt, 0])
        self.step.zero_()
        self.seen.zero_()
        self.serial.fill_(1)

    def run(self, seconds: float) -> tuple[int, float]:
        """Warm up, capture, and replay until the time or the record is full; returns (steps, seconds)."""
        if self.step.device.type == "cpu":
            for _ in range(len(self.record)):
                self.advance()
            return len(self.record), seconds
        for _ in range(3):
            self.advance()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.advance()
        self.reset()
        torch.cuda.synchronize()
        began, steps = time.time(), 0
        while steps < len(self.record) and time.time() - began < seconds:
            graph.replay()
            steps += 1
            if steps % 50 == 0:
                torch.cuda.synchronize()
            if steps % 1000 == 0:
                took = time.time() - began
                print(f"step {steps} {took:.0f} s {steps * self.batch / took / 1e3:.0f}k rows/s", flush=True)
        torch.cuda.synchronize()
        return steps, time.time() - began


def documents(record: np.ndarray, num_prompts: int) -> list[tuple[int, bool, np.ndarray]]:
    """(prompt, complete, token ids) of every finished document, rebuilt from the record [steps, B]."""
    found = []
    batch = record.shape[1]
    for row in range(batch):
        column = record[:, row]
        ends = np.flatnonzero((column == EOS) | (column == -2))
        start = 0
        for order, end in enumerate(ends):
            piece = column[start:end]
            found.append(((row + order * batch) % num_prompts, column[end] == EOS, piece[piece >= 0]))
            start = end + 1
    return found


def main() -> None:
    """Sample for a while and write prompt ids, completeness and token ids as one .npz."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", required=True)
    parser.add_argument("--prompts", required=True, help=".npz of prompts.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=360)
    parser.add_argument("--steps", type=int, default=60000, help="record length, an upper limit")
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    prompts = dict(np.load(args.prompts))
    model = Model(args.gguf, args.batch, args.device)
    sampler = Sampler(model, prompts, args.batch, args.steps, args.device)
    steps, seconds = sampler.run(args.seconds)
    found = documents(sampler.record[:steps].cpu().numpy(), len(prompts["lengths"]))
    tokens = np.concatenate([ids for _, _, ids in found]).astype(np.uint16)
    np.savez(
        args.out,
        tokens=tokens,
        sizes=np.array([len(ids) for _, _, ids in found], np.uint16),
        prompt=np.array([p for p, _, _ in found], np.int32),
        complete=np.array([c for _, c, _ in found]),
    )
    print(
        json.dumps(
            {
                "steps": steps,
                "seconds": round(seconds, 1),
                "documents": len(found),
                "tokens": len(tokens),
                "complete": float(np.mean([c for _, c, _ in found])),
            }
        )
    )


if __name__ == "__main__":
    main()
