"""Safetensors files that say what they hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def write(path: str | PathLike[str], tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors of any layout and device. Raises OSError if `path` cannot be written."""
    if Path(path).is_dir():
        raise IsADirectoryError(f"path {path} is a folder")
    if Path(path).exists() and not Path(path).is_file():  # the file takes the place of what is there
        raise OSError(f"path {path} is no regular file")
    if not Path(path).parent.is_dir():
        raise FileNotFoundError(f"path {path}: there is no folder {Path(path).parent}")
    clones = {name: tensor.cpu().clone().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(clones, path, metadata)
    except SafetensorError as error:
        raise OSError(f"path {path} cannot be written: {error}") from error


@contextmanager
def reading(path: str | PathLike[str], what: str) -> Iterator[Any]:
    """The open file `path`. FileNotFoundError if there is none, ValueError if it does not hold `what`."""
    try:
        if Path(path).is_dir():
            raise ValueError("it is a folder")
        with safe_open(path, "pt") as file:
            yield file
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no file {path}") from error
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"path {path} does not hold {what}: {error}") from error
