"""The examples run: with next to no training, so what is asserted is what holds for any network."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path

import pytest
from asserts import relative_error
from conftest import ROOT
from torch import Tensor

from deqkern import plots

pytest.importorskip("diffusers")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


def test_flow_matching_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(Path(ROOT) / "examples"))
    example = importlib.import_module("flow_digits")
    drawn: dict[str, Tensor] = {}
    draw = plots.save_comparison

    def save(path: Path, panels: Mapping[str, Tensor], title: str) -> None:
        drawn.update(panels)
        draw(path, panels, title)

    monkeypatch.setattr(plots, "save_comparison", save)
    example.main(out=tmp_path / "flow.png", minutes=0.02, steps=10, batch=2)
    parallel, sequential, digits, again = drawn.values()
    assert list(drawn)[1:] == ["sequential: 10", "real digits", "made from their noise"]
    assert relative_error(parallel, sequential).max() <= 3e-2  # rtol 1e-2
    assert relative_error(again, digits).max() <= 3e-2
    assert relative_error(parallel, digits).min() > 0.1  # the two pairs are not one
    assert (tmp_path / "flow.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    printed = capsys.readouterr().out
    assert "2 of 2 samples converged" in printed and printed.count("converged") == 2


def test_previews_end_at_the_sequential_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(ROOT) / "examples"))
    example = importlib.import_module("previews")
    drawn: dict[str, Tensor] = {}
    monkeypatch.setattr(plots, "save_comparison", lambda path, panels, *_, **__: drawn.update(panels))
    example.main(model="digits", steps=10, batch=2, seed=0, out=tmp_path / "previews.png")
    *previews, sequential = drawn.values()
    assert list(drawn) == [*(str(k + 1) for k in range(len(previews))), "10 calls"]
    assert relative_error(previews[-1], sequential).max() <= 3e-2 < relative_error(previews[0], sequential).max()
