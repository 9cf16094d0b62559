"""The model along a chain, and its vector-Jacobian products: the only caller of the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..chain.schedule import StepTable
from ..support.tensors import rebuilt, tensors_in
from .guidance import Guided
from .replication import Replicated, autocast_of
from .vjp import leaves, scaled_vjp

Model = Callable[..., Any]


def model_dtype(model: Model, default: torch.dtype) -> torch.dtype:
    """What a module says its `dtype` is, or that of its first parameter of 16 bits or more; `default` of a function.

    Weights may be stored in 8 bits by a module that computes in more.
    """
    if not isinstance(model, torch.nn.Module):
        return default
    says = getattr(model, "dtype", None)
    found = [says] if isinstance(says, torch.dtype) else []
    found += [parameter.dtype for parameter in model.parameters()]
    return next((dtype for dtype in found if dtype.is_floating_point and dtype.itemsize > 1), default)


def arguments_of(model: Model, model_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """`model_kwargs`, added to those that a `Guided` model holds."""
    held = model.model_kwargs if isinstance(model, Guided) else {}
    return held | dict(model_kwargs or {})


def kwargs_of(model_kwargs: Mapping[str, Any], samples: Tensor, batch: int) -> dict[str, Any]:
    """The model's arguments for `samples` (N,) of the batch: of tensors whose first dimension is B, those rows.

    Tensors inside dicts, lists and tuples count as well.
    """

    def rows(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[samples] if value.ndim and len(value) == batch else value
        return rebuilt(value, rows)

    return {name: rows(value) for name, value in model_kwargs.items()}


class Network:
    """`model` at states of the chain `table`: (states (N, *shape), steps (N,), samples (N,)) -> (N, *shape).

    The model sees the states in its own dtype, timesteps `(N,)`, and those tensors of `model_kwargs` whose first
    dimension is B, one row per state.

    Attributes:
        dtype: That of the states that the model is called at.
        precision: The eps of its arithmetic, as far as the calls until now have shown.

    """

    def __init__(
        self,
        model: Model,
        table: StepTable,
        model_kwargs: Mapping[str, Any],
        example: Tensor,  # (B, *shape)
    ) -> None:
        self.model, self.table, self.model_kwargs = model, table, model_kwargs
        self.batch, self.dtype = len(example), model_dtype(model, example.dtype)
        self.timesteps = table.timesteps.to(example.device)
        self._autocast = autocast_of(example.device)
        arithmetic = [self.dtype, *([self._autocast["dtype"]] if self._autocast["enabled"] else [])]
        self.precision = max(torch.finfo(dtype).eps for dtype in arithmetic)
        if isinstance(model, Guided):
            with torch.no_grad():
                model.check(model_kwargs, self.batch)
        # what the caller differentiates by, cut off from the graph that made it
        self._leaves = {id(v): v.detach().requires_grad_() for v in tensors_in(model_kwargs) if v.requires_grad}

    def __call__(self, states: Tensor, steps: Tensor, samples: Tensor) -> Tensor:
        """The model's own output. It may write into the states, unless they are of another dtype than its own."""
        return self._call(states.to(self.dtype), self.timesteps[steps], samples, self.model_kwargs)

    def _converted(self, states: Tensor, steps: Tensor, samples: Tensor) -> Tensor:
        """What enters the chain, under autograd: the output, or the table's `effective_output` where it converts."""
        given = states.to(self.dtype, copy=True)  # the model may write into it, which a leaf does not allow
        output = self._call(given, self.timesteps[steps], samples, rebuilt(self.model_kwargs, self._leaf))
        return self.table.effective_output(states, output, steps) if self.table.converts else output

    def vjp(
        self,
        states: Tensor,  # (N, *shape)
        cotangents: Tensor,  # (N, *shape)
        steps: Tensor,  # (N,)
        samples: Tensor,  # (N,)
        inputs: Sequence[Tensor] = (),
    ) -> tuple[Tensor, list[Tensor | None]]:
        """J^T cotangents (N, *shape) by the states, and the same by `inputs`, summed over the rows; see `scaled_vjp`.

        As in the call, autocast is what it was when this was made.
        """
        with torch.enable_grad(), torch.autocast(**self._autocast):
            states = states.detach().requires_grad_()
            output = self._converted(states, steps, samples)
        inputs = [self._leaves.get(id(value), value) for value in inputs]
        if inputs or self.dtype is not torch.float16:
            # what a function holds may have a graph of its own, which every other call needs as well
            again = bool(inputs) and self._holds
            return scaled_vjp(output, states, cotangents, inputs, retain_graph=again)
        # where rows are not summed, each has a scale of its own: of one for all the small rows would be lost
        scale = cotangents.abs().flatten(1).amax(1).clamp_min(torch.finfo(cotangents.dtype).tiny)
        scale = scale.view(-1, *[1] * (cotangents.ndim - 1))
        return scaled_vjp(output, states, cotangents / scale)[0] * scale, []

    def _leaf(self, value: Any) -> Any:
        return self._leaves.get(id(value), value) if isinstance(value, Tensor) else rebuilt(value, self._leaf)

    def inputs(self, example: Tensor) -> list[Tensor]:
        """The tensors besides the states that the output depends on and that require grad.

        Those of `model_kwargs`, and the model's parameters. If the model is a plain function, or a module that holds a
        tensor which is no parameter, they are found by calling it once, for one row of `example` (B, *shape).
        """
        given = [value for value in tensors_in(self.model_kwargs) if value.requires_grad]
        held: list[Tensor]
        if isinstance(self.model, torch.nn.Module) and not self._holds:
            held = [value for value in self.model.parameters() if value.requires_grad]
        else:
            held = self._closure(example)
        return list({id(value): value for value in given + held}.values())

    @cached_property
    def _holds(self) -> bool:
        """Whether the model may depend on more than parameters and what it is given."""
        inner = self.model.model if isinstance(self.model, Guided) else self.model
        if not isinstance(inner, torch.nn.Module):
            return True
        plain = ({k: v for k, v in vars(module).items() if k != "_parameters"} for module in inner.modules())
        return any(value.requires_grad for values in plain for value in tensors_in(values))

    def _closure(self, example: Tensor) -> list[Tensor]:
        cut = {name: _detached(value) for name, value in self.model_kwargs.items()}
        one = torch.zeros(1, dtype=torch.int64, device=example.device)
        with torch.enable_grad():
            one_row = example[:1].detach().to(self.dtype, copy=True)
            return leaves(self._call(one_row, self.timesteps[one], one, cut))

    def _call(self, states: Tensor, timesteps: Tensor, samples: Tensor, model_kwargs: Mapping[str, Any]) -> Tensor:
        if isinstance(self.model, Replicated):
            shares = self.model.shares(len(states))
            arguments = [kwargs_of(model_kwargs, samples[share], self.batch) for share in shares]
            calls = [((states[share], timesteps[share]), own) for share, own in zip(shares, arguments, strict=True)]
            output = self.model.evaluate(calls)
        else:
            output = self.model(states, timesteps, **kwargs_of(model_kwargs, samples, self.batch))
        output = getattr(output, "sample", output)
        if not isinstance(output, Tensor):
            raise TypeError(f"model must return a tensor or an object with .sample, got {type(output).__name__}")
        if output.shape != states.shape:
            raise ValueError(f"model returned shape {tuple(output.shape)} for an input of shape {tuple(states.shape)}")
        if output.device != states.device or not output.is_floating_point():
            raise ValueError(f"model returned {output.dtype} on {output.device} for an input on {states.device}")
        self.precision = max(self.precision, torch.finfo(output.dtype).eps)
        return output


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else rebuilt(value, _detached)
