"""Denoisers of the size of robot policies: chunks of 16 actions of 14 numbers, trained for seconds on made-up motions.

Trained, since a network with random weights converges at once and its iterations say nothing. `PolicyMLP` is a residual
MLP, `PolicyUNet` the 1-D network of Diffusion Policy (arXiv 2303.04137; 65M parameters at its published widths) without
its observations, which are encoded once for a whole chain.
"""

from __future__ import annotations

import math
import time

import torch
from networks import timestep_embedding
from torch import Tensor, nn
from torch.nn import functional

from deqkern import NoiseSchedule

HORIZON, ACTIONS = 16, 14
# The variances of DDPM's 1000 steps in 100. Of v, since seconds of training leave errors that epsilon would blow up.
SCHEDULE = NoiseSchedule.linear(1e-3, 0.2, 100, prediction_type="v_prediction")


class PolicyMLP(nn.Module):
    """A v-predictor of (N, 16, 14)."""

    shape = (HORIZON, ACTIONS)

    def __init__(self, width: int = 512, depth: int = 3) -> None:
        super().__init__()
        size = HORIZON * ACTIONS
        self.first, self.last = nn.Linear(size, width), nn.Linear(width, size)
        self.embed = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
            for _ in range(depth)
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:  # (N, 16, 14), (N,)
        y = self.first(x.flatten(1)) + self.embed(timestep_embedding(t, 64).to(x.dtype))
        for block in self.blocks:
            y = y + block(y)
        return self.last(y).view_as(x)


class PolicyBlock(nn.Module):
    """Two convolutions along time, scaled and shifted by the timestep between them."""

    def __init__(self, before: int, after: int, embedding: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv1d(before, after, 5, padding=2), nn.GroupNorm(8, after), nn.Mish())
        self.second = nn.Sequential(nn.Conv1d(after, after, 5, padding=2), nn.GroupNorm(8, after), nn.Mish())
        self.embedding = nn.Sequential(nn.Mish(), nn.Linear(embedding, 2 * after))
        self.skip = nn.Conv1d(before, after, 1) if before != after else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.embedding(embedding)[..., None].chunk(2, 1)
        return self.second(self.first(x) * (1 + scale) + shift) + self.skip(x)


class PolicyUNet(nn.Module):
    """A v-predictor of (N, 16, 14): two blocks per level, halved in time between levels."""

    shape = (HORIZON, ACTIONS)

    def __init__(self, widths: tuple[int, ...] = (256, 512, 1024)) -> None:
        super().__init__()
        embedding = 256
        self.embed = nn.Sequential(nn.Linear(embedding, 4 * embedding), nn.Mish(), nn.Linear(4 * embedding, embedding))
        before = (ACTIONS, *widths[:-1])
        self.down = nn.ModuleList(
            nn.ModuleList([PolicyBlock(a, b, embedding), PolicyBlock(b, b, embedding)])
            for a, b in zip(before, widths, strict=True)
        )
        self.shorter = nn.ModuleList(nn.Conv1d(width, width, 3, stride=2, padding=1) for width in widths[:-1])
        self.middle = nn.ModuleList(PolicyBlock(widths[-1], widths[-1], embedding) for _ in range(2))
        pairs = list(zip(widths[1:], widths[:-1], strict=True))[::-1]
        self.up = nn.ModuleList(
            nn.ModuleList([PolicyBlock(2 * a, b, embedding), PolicyBlock(b, b, embedding)]) for a, b in pairs
        )
        self.longer = nn.ModuleList(nn.ConvTranspose1d(b, b, 4, stride=2, padding=1) for _, b in pairs)
        self.last = nn.Sequential(
            nn.Conv1d(widths[0], widths[0], 5, padding=2),
            nn.GroupNorm(8, widths[0]),
            nn.Mish(),
            nn.Conv1d(widths[0], ACTIONS, 1),
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:  # (N, 16, 14), (N,)
        embedding = self.embed(timestep_embedding(t, 256).to(x.dtype))
        y, kept = x.mT, []
        for level, blocks in enumerate(self.down):
            for block in blocks:
                y = block(y, embedding)
            kept.append(y)
            if level < len(self.shorter):
                y = self.shorter[level](y)
        for block in self.middle:
            y = block(y, embedding)
        for blocks, longer in zip(self.up, self.longer, strict=True):
            y = torch.cat([y, kept.pop()], 1)
            for block in blocks:
                y = block(y, embedding)
            y = longer(y)
        return self.last(y).mT


def motions(count: int, device: torch.device) -> Tensor:
    """Smooth chunks (count, 16, 14) within -1 .. 1, which go one of two ways."""
    time_of = torch.linspace(0, 1, HORIZON, device=device)[:, None]
    phase, speed = torch.rand(2, count, 1, ACTIONS, device=device)
    side = torch.randint(0, 2, (count, 1, 1), device=device) * 2.0 - 1.0
    turn = torch.sin(2 * math.pi * (phase + (0.5 + speed) * time_of))
    return 0.5 * side * time_of * torch.linspace(0.5, 1, ACTIONS, device=device) + 0.4 * turn


def trained(network: nn.Module, device: torch.device, seconds: float, batch: int = 256) -> nn.Module:
    """The network after so many seconds of Adam on `motions`; in evaluation mode, in fp32."""
    network = network.to(device).train()
    assert SCHEDULE.alphas_cumprod is not None
    abar = SCHEDULE.alphas_cumprod.float().to(device)
    optimizer = torch.optim.Adam(network.parameters(), 3e-4)
    end = time.perf_counter() + seconds
    with torch.enable_grad():
        while time.perf_counter() < end:
            clean, t = motions(batch, device), torch.randint(0, len(abar), (batch,), device=device)
            noise, level = torch.randn_like(clean), abar[t].view(-1, 1, 1)
            predicted = network(level.sqrt() * clean + (1 - level).sqrt() * noise, t)
            optimizer.zero_grad()
            functional.mse_loss(predicted, level.sqrt() * noise - (1 - level).sqrt() * clean).backward()
            optimizer.step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    return network.eval().requires_grad_(False)
