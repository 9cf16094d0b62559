"""Networks of the sizes that people run, with random weights: for the time of a call, never for convergence.

`UNet` is the CIFAR-10 network of DDPM (arXiv 2006.11239, about 36M parameters), `DiT` is DiT-XL/2 for latents
4x32x32 (arXiv 2212.09748, about 675M parameters). Small versions of both run on a CPU.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


def timestep_embedding(t: Tensor, size: int) -> Tensor:  # (N,) -> (N, size)
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(size // 2, device=t.device) / (size // 2))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], 1)


class Block(nn.Module):
    """Two convolutions with the timestep added between them."""

    def __init__(self, before: int, after: int, embedding: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.GroupNorm(32, before), nn.GroupNorm(32, after)])
        self.first = nn.Conv2d(before, after, 3, padding=1)
        self.second = nn.Conv2d(after, after, 3, padding=1)
        self.embedding = nn.Linear(embedding, after)
        self.skip = nn.Conv2d(before, after, 1) if before != after else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        y = self.first(functional.silu(self.norms[0](x))) + self.embedding(embedding)[:, :, None, None]
        return self.skip(x) + self.second(functional.silu(self.norms[1](y)))


class Attention(nn.Module):
    """Self-attention over the pixels, one head."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, channels)
        self.qkv, self.out = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W)
        q, k, v = self.qkv(self.norm(x)).flatten(2).mT.unsqueeze(1).chunk(3, -1)  # (N, 1, H * W, C)
        mixed = functional.scaled_dot_product_attention(q, k, v)
        return x + self.out(mixed.squeeze(1).mT.reshape_as(x))


class UNet(nn.Module):
    """An epsilon-predictor of images (3, 32, 32); attention where they are 16 wide."""

    shape = (3, 32, 32)

    def __init__(self, channels: int = 128, multipliers: tuple[int, ...] = (1, 2, 2, 2), depth: int = 2) -> None:
        super().__init__()
        embedding, width, widths = 4 * channels, self.shape[-1], [channels]
        self.channels = channels
        self.embed = nn.Sequential(nn.Linear(channels, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        now = channels
        for level, multiplier in enumerate(multipliers):
            for _ in range(depth):
                attention = Attention(multiplier * channels) if width == 16 else nn.Identity()
                self.down.append(nn.ModuleList([Block(now, multiplier * channels, embedding), attention]))
                now = multiplier * channels
                widths.append(now)
            if level < len(multipliers) - 1:
                self.down.append(nn.ModuleList([nn.Conv2d(now, now, 3, stride=2, padding=1)]))
                widths.append(now)
                width //= 2
        self.middle = nn.ModuleList([Block(now, now, embedding), Attention(now), Block(now, now, embedding)])
        for level, multiplier in reversed(list(enumerate(multipliers))):
            for _ in range(depth + 1):
                attention = Attention(multiplier * channels) if width == 16 else nn.Identity()
                block = Block(now + widths.pop(), multiplier * channels, embedding)
                self.up.append(nn.ModuleList([block, attention]))
                now = multiplier * channels
            if level:
                self.up.append(nn.ModuleList([nn.Conv2d(now, now, 3, padding=1)]))
                width *= 2
        self.last = nn.Sequential(nn.GroupNorm(32, now), nn.SiLU(), nn.Conv2d(now, 3, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:  # (N, 3, 32, 32), (N,)
        embedding = functional.silu(self.embed(timestep_embedding(t, self.channels).to(x.dtype)))
        x = self.first(x)
        kept = [x]
        for stage in self.down:
            x = stage[1](stage[0](x, embedding)) if len(stage) == 2 else stage[0](x)
            kept.append(x)
        x = self.middle[2](self.middle[1](self.middle[0](x, embedding)), embedding)
        for stage in self.up:
            if len(stage) == 2:
                x = stage[1](stage[0](torch.cat([x, kept.pop()], 1), embedding))
            else:
                x = stage[0](functional.interpolate(x, scale_factor=2.0))
        return self.last(x)


class TransformerBlock(nn.Module):
    """Attention and an MLP, each shifted, scaled and gated by the timestep (adaLN-Zero)."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(hidden, 6 * hidden)
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.mlp = nn.Sequential(nn.Linear(hidden, 4 * hidden), nn.GELU("tanh"), nn.Linear(4 * hidden, hidden))
        self.norm = nn.LayerNorm(hidden, elementwise_affine=False)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:  # (N, tokens, hidden), (N, hidden)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.modulation(embedding)[:, None].chunk(6, -1)
        q, k, v = self.qkv(self.norm(x) * (1 + scale) + shift).unflatten(-1, (3, self.heads, -1)).unbind(2)
        mixed = functional.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        x = x + gate * self.out(mixed.transpose(1, 2).flatten(2))
        return x + gate_mlp * self.mlp(self.norm(x) * (1 + scale_mlp) + shift_mlp)


class DiT(nn.Module):
    """A transformer over patches of 2x2 of latents (4, 32, 32)."""

    shape = (4, 32, 32)

    def __init__(self, hidden: int = 1152, depth: int = 28, heads: int = 16) -> None:
        super().__init__()
        channels, tokens = self.shape[0], (self.shape[1] // 2) * (self.shape[2] // 2)
        self.patch = nn.Conv2d(channels, hidden, 2, stride=2)
        self.position = nn.Parameter(torch.randn(tokens, hidden) * 0.02)
        self.embed = nn.Sequential(nn.Linear(256, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.blocks = nn.ModuleList([TransformerBlock(hidden, heads) for _ in range(depth)])
        self.norm, self.last = nn.LayerNorm(hidden), nn.Linear(hidden, 4 * channels)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:  # (N, 4, 32, 32), (N,)
        tokens = self.patch(x).flatten(2).mT + self.position
        embedding = functional.silu(self.embed(timestep_embedding(t, 256).to(x.dtype)))
        for block in self.blocks:
            tokens = block(tokens, embedding)
        return functional.pixel_shuffle(self.last(self.norm(tokens)).mT.unflatten(2, (16, 16)), 2)
