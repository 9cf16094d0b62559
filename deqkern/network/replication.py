"""A model on several devices: the rows of a call are shared out, and evaluated at the same time."""

from __future__ import annotations

import contextvars
import copy
import functools
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from ..support.checks import is_int
from ..support.tensors import rebuilt
from .guidance import Guided

_OF_MODULES = frozenset(vars(torch.nn.Module())) - {"training", "_modules"}  # what is no state of a module
Call = tuple[tuple[Any, ...], dict[str, Any]]  # its arguments


class Replicated(torch.nn.Module):
    """What `replicated` makes: `model(x, t, ..)` is the model's output as one tensor, where x is.

    Called as a module it shares out the tensors that have as many rows as the first; `sample` and others know better.
    """

    def __init__(self, model: torch.nn.Module, devices: Sequence[torch.device]) -> None:
        super().__init__()
        self.model = model  # it serves the first device itself
        self.devices = tuple(devices)
        self._threads: tuple[int, list[ThreadPoolExecutor]] = (0, [])  # of which process; one for each copy
        self.refresh()

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_threads": (0, [])}

    def refresh(self) -> None:
        """Copy the model as it is now. Needed only after a change that leaves no trace, through `.data`."""
        self._copies = [_copied(self.model, device) for device in self.devices[1:]]
        self._state = _state_of(self.model)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The output for all rows."""
        count = len(next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)))
        return self.evaluate([_share((args, kwargs), count, share) for share in self.shares(count)])

    def shares(self, count: int) -> list[slice]:
        """Which of `count` rows each device takes; as many devices as there are rows for, but one at least."""
        number = min(len(self.devices), count) or 1
        ends = [count * j // number for j in range(number + 1)]
        return [slice(*pair) for pair in itertools.pairwise(ends)]

    def evaluate(self, calls: Sequence[Call]) -> Tensor:
        """The output of all `calls`, the arguments of one share each."""
        (args, kwargs), join = self.begin(calls)
        return join(self.model(*args, **kwargs))

    def begin(self, calls: Sequence[Call]) -> tuple[Call, Callable[[Any], Tensor]]:
        """Start the copies on their `calls`: the one that is left to the model, and what joins its output to theirs."""
        own, *others = [_moved(call, device) for call, device in zip(calls, self.devices, strict=False)]
        outputs = self._start(others)

        def join(first: Any) -> Tensor:
            found = _tensor_of(first)
            return torch.cat([found, *(output().to(found.device) for output in outputs)]) if outputs else found

        return own, join

    def _start(self, calls: list[Call]) -> list[Callable[[], Tensor]]:
        """Call the copies, each in a thread of its own, in the setting of this one; what waits for each output."""
        if not calls:
            return []
        if _state_of(self.model) != self._state:
            self.refresh()
        named: dict[str, Tensor] = {}
        if torch.is_grad_enabled() and any(value.requires_grad for value in self.model.parameters()):
            named = dict(self.model.named_parameters())  # those of the copies get no gradient
        if self._threads[0] != os.getpid():  # kept, because libraries keep plans per thread; a fork has none of them
            self._threads = os.getpid(), [ThreadPoolExecutor(1) for _ in self._copies]
        outputs = []
        for module, thread, call, device in zip(self._copies, self._threads[1], calls, self.devices[1:], strict=False):
            parameters = {name: value.to(device) for name, value in named.items()}
            evaluate = functools.partial(_evaluate, module, parameters, call)
            outputs.append(thread.submit(contextvars.copy_context().run, _as_here(evaluate, device)))
        return [output.result for output in outputs]

    def extra_repr(self) -> str:
        return f"devices={', '.join(map(str, self.devices))}"


def replicated(model: torch.nn.Module, devices: Sequence[torch.device | str | int] | None = None) -> Replicated:
    """`model` on several devices, each of which evaluates its share of the rows of a call, for `sample` and others.

    A joint solve evaluates S * B rows in one call: of n devices each takes an n-th of them. The states stay on the
    model's own device; the samples are the same as without. `max_batch` counts the rows of all devices together, and
    `deqkern.plan` measures all of them.

    Args:
        model: A module, all on one device. It stays what it is, and serves its device; the others hold copies, which
            are made again when its parameters, its buffers or plain attributes of its modules, such as the mode, have
            changed; after a change through `.data` call `refresh()`. Inside `guided`, not around it. Gradients reach
            its parameters, at the price of copying them in each call. Of a model that was compiled in place
            (`model.compile()`) the copies are not: give `torch.compile(model)`.
        devices: The model's own among them; all GPUs if None. CUDA graphs cannot span them: `cuda_graph` is refused.

    Returns:
        A Module: `model(x, t, ..)` is the output as one tensor, where x is.

    Raises:
        TypeError: For an argument of another type.
        ValueError: For one that does not fit.

    Example:
        >>> import torch, deqkern
        >>> model = deqkern.replicated(torch.nn.Conv2d(3, 3, 1), ["cpu", "cpu"])  # or None: all GPUs
        >>> model(torch.randn(4, 3, 8, 8)).shape
        torch.Size([4, 3, 8, 8])
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, which can be copied, got {type(model).__name__}")
    if isinstance(model, Guided | Replicated):
        raise ValueError(f"model must be the network itself, got {type(model).__name__}: guided(replicated(model), ..)")
    for module in model.modules():
        forward = vars(module).get("forward") if not hasattr(module, "_orig_mod") else None  # torch.compile may
        if hasattr(module, "_hf_hook") or (forward is not None and getattr(forward, "__self__", None) is not module):
            raise ValueError(
                f"model has a {type(module).__name__} whose forward was replaced (a hook of accelerate or diffusers, "
                "which moves or casts it): a copy would call the original"
            )
    held = {value.device for value in _tensors(model)}
    if len(held) != 1:
        raise ValueError(f"model must have its parameters on one device, got {len(held)}")
    (own,) = held
    if devices is None:
        found = [torch.device("cuda", index) for index in range(torch.cuda.device_count())] or [own]
    elif isinstance(devices, str) or not isinstance(devices, Sequence):
        raise TypeError(f"devices must be a sequence of devices, got {devices!r}")
    else:
        found = [_device(value) for value in devices]
    if own not in found:
        raise ValueError(f"devices must hold the model's own, {own}, got {', '.join(map(str, found)) or 'none'}")
    found.remove(own)
    return Replicated(model, [own, *found])


def is_replicated(model: Any) -> bool:
    """Whether a call of `model` uses several devices."""
    modules = model.modules() if isinstance(model, torch.nn.Module) else ()
    return any(isinstance(module, Replicated) and len(module.devices) > 1 for module in modules)


def autocast_of(device: torch.device) -> dict[str, Any]:
    """The arguments of `torch.autocast` with which it is now as it is in this thread."""
    kind = device.type
    return {
        "device_type": kind,
        "dtype": torch.get_autocast_dtype(kind),
        "enabled": torch.is_autocast_enabled(kind),
        "cache_enabled": torch.is_autocast_cache_enabled(),
    }


def _as_here(function: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """`function` for another thread, with what torch keeps per thread as it is in this one."""
    grad, inference, cast = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast_of(device)
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def there() -> Tensor:
        with (
            torch.inference_mode(inference),
            torch.set_grad_enabled(grad),
            torch.autocast(**cast),
            torch.cuda.stream(stream),  # and its device; nothing if None
        ):
            return function()

    return there


def _evaluate(module: torch.nn.Module, parameters: dict[str, Tensor], call: Call) -> Tensor:
    return _tensor_of(functional_call(module, parameters, *call))


def _tensor_of(output: Any) -> Tensor:
    output = getattr(output, "sample", output)
    return output[0] if isinstance(output, tuple) else output


def _share(value: Any, count: int, rows: slice) -> Any:
    """The `rows` of all tensors in `value` that have `count` of them."""
    if isinstance(value, Tensor):
        return value[rows] if value.ndim and len(value) == count else value
    return rebuilt(value, lambda entry: _share(entry, count, rows))


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else rebuilt(value, lambda entry: _moved(entry, device))


def _tensors(model: torch.nn.Module) -> Iterator[Tensor]:
    return itertools.chain(model.parameters(), model.buffers())


def _state_of(model: torch.nn.Module) -> list[Any]:
    """What changes when a parameter or buffer is replaced, or written in place, and what modules hold as plain values.

    Such as the mode, or the scale of an adapter.
    """
    plain = [_plain({k: v for k, v in vars(module).items() if k not in _OF_MODULES}) for module in model.modules()]
    return [*plain, *((v.data_ptr(), 0 if v.is_inference() else v._version) for v in _tensors(model))]


def _plain(value: Any) -> Any:
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    return tuple((key, _plain(entry)) for key, entry in value.items()) if isinstance(value, dict) else type(value)


def _copied(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """A copy whose parameters and buffers are on the device, and are made there at once."""
    made: dict[int, Any] = {id(value): value.detach().to(device, copy=True) for value in model.buffers()}
    for value in model.parameters():
        made[id(value)] = torch.nn.Parameter(value.detach().to(device, copy=True), requires_grad=False)
    return copy.deepcopy(model, made)


def _device(value: Any) -> torch.device:
    device = torch.device("cuda", int(value)) if is_int(value) else torch.device(value)
    if str(device) == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return device
