"""Classifier-free guidance (arXiv 2207.12598) as a model like any other."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..support.checks import check_number
from ..support.tensors import rebuilt


class Guided(torch.nn.Module):
    """What `guided` makes: `model(x, t)` is the guided output (N, *shape). A Module also around a plain function."""

    def __init__(
        self,
        model: Callable[..., Any],
        scale: float,
        cond: Mapping[str, Any],
        uncond: Mapping[str, Any],
        rescale: float,
    ) -> None:
        super().__init__()
        self.model, self.scale, self.rescale = model, scale, rescale
        self.model_kwargs: dict[str, Any] = {"cond": dict(cond), "uncond": dict(uncond)}

    def forward(
        self,
        x: Tensor,  # (N, *shape)
        t: Tensor,  # (N,)
        cond: Mapping[str, Any] | None = None,
        uncond: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """The guided output (N, *shape); `cond` and `uncond` have one row per row of x, by default those held."""
        cond = self.model_kwargs["cond"] if cond is None else cond
        uncond = self.model_kwargs["uncond"] if uncond is None else uncond
        if self.scale == 1:
            return self._called(x, t, _joined("cond", cond, cond, len(x), once=True))
        both = _joined("cond", cond, uncond, len(x))
        positive, negative = self._called(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        output = negative + self.scale * (positive - negative)
        if self.rescale:
            deviation = _deviation(output)
            ratio = _deviation(positive) / deviation.clamp_min(torch.finfo(deviation.dtype).tiny)
            output = output * (1 + self.rescale * (ratio - 1)).to(output.dtype)
        return output

    def check(self, model_kwargs: Mapping[str, Any], batch: int) -> None:
        """Refuse conditions that do not fit together, or not so many samples, as they were given."""
        once, cond = self.scale == 1, model_kwargs["cond"]
        _joined("cond", cond, cond if once else model_kwargs["uncond"], batch, once)

    def _called(self, x: Tensor, t: Tensor, arguments: dict[str, Any]) -> Tensor:
        output = self.model(x, t, **arguments)
        output = getattr(output, "sample", output)
        if not isinstance(output, Tensor):
            raise TypeError(f"model must return a tensor or an object with .sample, got {type(output).__name__}")
        if output.shape != x.shape:
            raise ValueError(f"model returned shape {tuple(output.shape)} for an input of shape {tuple(x.shape)}")
        return output

    def extra_repr(self) -> str:
        return f"scale={self.scale:g}, rescale={self.rescale:g}"


def guided(
    model: Callable[..., Any],
    scale: float,
    cond: Mapping[str, Any],
    uncond: Mapping[str, Any],
    *,
    rescale: float = 0.0,
) -> Guided:
    """`model` with classifier-free guidance: out = out_uncond + scale (out_cond - out_uncond), for `sample` and others.

    Both are evaluated in one batch of 2 N rows; with scale = 1 only the first, in one of N. `Solution.nfe` and
    `max_batch` count rows of the guided model, N.

    Args:
        model: As for `sample`.
        scale: The guidance scale.
        cond: The keyword arguments of the conditional output. A tensor in them, also inside dicts, lists and tuples,
            has one row per sample, or one for all. `sample` and `invert` repeat the rows for every step, and
            differentiate by them. `model_kwargs={"cond": ...}` replaces them.
        uncond: Those of the unconditional output, with the same names; what is no tensor must be equal in both.
        rescale: phi of arXiv 2305.08891, section 3.4: moves the standard deviation of each sample's output towards that
            of out_cond; 0 leaves it alone.

    Returns:
        A Module with the parameters of `model`, differentiable.

    Raises:
        TypeError: For an argument of another type.
        ValueError: For a bad argument, and for conditions that do not fit together, when it is called, before the
            model.

    Example:
        >>> import torch, deqkern
        >>> def model(x, t, label):
        ...     return 0.1 * label.view(-1, 1, 1, 1) * x
        >>> one, none = {"label": torch.ones(2)}, {"label": torch.zeros(2)}
        >>> schedule = deqkern.NoiseSchedule.linear()
        >>> deqkern.sample(deqkern.guided(model, 4.0, one, none), torch.randn(2, 3, 8, 8), schedule, 20).value.shape
        torch.Size([2, 3, 8, 8])

    Reference:
        arXiv 2207.12598.
    """
    if not callable(model):
        raise TypeError(f"model must be callable, got {type(model).__name__}")
    for name, value in (("scale", scale), ("rescale", rescale)):
        check_number(name, value)
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    if not 0 <= rescale <= 1:
        raise ValueError(f"rescale must lie in [0, 1], got {rescale}")
    for name, given in (("cond", cond), ("uncond", uncond)):
        if not isinstance(given, Mapping):
            raise TypeError(f"{name} must be a mapping, got {type(given).__name__}")
    return Guided(model, float(scale), cond, uncond, float(rescale))


def _joined(name: str, cond: Any, uncond: Any, rows: int, once: bool = False) -> Any:
    """Both conditions as those of one batch of 2 `rows`; `once`: the first alone, of `rows`."""
    if isinstance(cond, Mapping) and isinstance(uncond, Mapping):
        if cond.keys() != uncond.keys():
            raise ValueError(f"{name} has the names {sorted(cond)}, uncond {sorted(uncond)}; they must be the same")
        return {key: _joined(f"{name}[{key!r}]", cond[key], uncond[key], rows, once) for key in cond}
    if isinstance(cond, list | tuple) and type(cond) is type(uncond) and len(cond) == len(uncond):
        pairs = enumerate(zip(cond, uncond, strict=True))
        joined = iter([_joined(f"{name}[{i}]", *pair, rows, once) for i, pair in pairs])
        return rebuilt(cond, lambda _: next(joined))
    if isinstance(cond, Tensor) and isinstance(uncond, Tensor):
        if cond.ndim == uncond.ndim == 0:
            if once or bool(cond == uncond):
                return cond
            raise ValueError(f"{name} is one number for all rows, and another one in uncond: give one per sample")
        parts = [cond] if once else [cond, uncond]
        for part in parts:
            if part.ndim == 0 or len(part) not in (1, rows) or part.shape[1:] != cond.shape[1:]:
                raise ValueError(
                    f"{name} must have one row per sample or one for all, and the same shape in uncond; "
                    f"got {tuple(cond.shape)} and {tuple(uncond.shape)} for {rows} rows"
                )
        return torch.cat([part.expand(rows, *part.shape[1:]) for part in parts])
    if isinstance(cond, Tensor) or isinstance(uncond, Tensor) or (cond is not uncond and cond != uncond):
        raise ValueError(f"{name} is {_shown(cond)}, but {_shown(uncond)} in uncond; only tensors may differ")
    return cond


def _shown(value: Any) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else f"{value!r:.60}"


def _deviation(output: Tensor) -> Tensor:
    """The standard deviation of each sample (N, 1, ..), fp32 or wider."""
    wide = output.to(torch.promote_types(output.dtype, torch.float32))
    return wide.std(dim=tuple(range(1, output.ndim)), keepdim=True)
