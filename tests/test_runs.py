"""Stored runs: what is written is read again, other files are refused, and the pictures of them."""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from folders import save_tiny_model
from problems import gaussian, mixture
from safetensors import safe_open
from safetensors.torch import save_file
from terminal import plain, run
from torch import Tensor

import deqkern
from deqkern import NoiseSchedule, plots, runs, solvers
from deqkern.cli.files import Noise
from deqkern.engine.solution import relative_error
from deqkern.runs import StoredRun
from deqkern.support.version import version

SCHEDULE = NoiseSchedule.linear()
SHAPE = (3, 8, 8)
STEPS = 20


def solved(solver: solvers.Solver | None = None, **options: Any) -> deqkern.Solution:
    model = gaussian(SCHEDULE, SHAPE, torch.Generator().manual_seed(1))
    return deqkern.sample(model, torch.randn(2, *SHAPE), SCHEDULE, STEPS, solver=solver, **options)


@pytest.mark.parametrize("measured", [True, False])
def test_a_run_is_read_as_it_was_written(measured: bool, tmp_path: Path) -> None:
    solution = solved()
    error = torch.rand(solution.iterations, 2, dtype=torch.float64) if measured else None
    metadata = {"model": "gaussian", "rtol": 1e-2, "list": [1, None]}
    runs.save(tmp_path / "run.safetensors", solution, metadata, true_error=error)
    found = runs.load(tmp_path / "run.safetensors")
    for name in ("history", "nfe_history", "residual_history"):
        torch.testing.assert_close(
            getattr(found, name), getattr(solution, name), rtol=0, atol=0, equal_nan=True, msg=name
        )
    assert found.nfe_history.dtype is torch.int64
    assert found.true_error is None if error is None else torch.equal(found.true_error, error)
    written = found.metadata.pop("deqkern")
    assert written == version() and found.metadata == metadata
    runs.save(tmp_path / "again.safetensors", solution, metadata | {"deqkern": "0.0"})
    assert runs.load(tmp_path / "again.safetensors").metadata["deqkern"] == written


def test_a_true_error_may_lie_anywhere_in_memory(tmp_path: Path) -> None:
    solution = solved()
    turned = torch.rand(2, solution.iterations, dtype=torch.float64, requires_grad=True).T
    for error in (solution.history, turned, turned[:1].expand_as(turned), turned.float()):
        runs.save(tmp_path / "run.safetensors", solution, true_error=error)
        found = runs.load(tmp_path / "run.safetensors").true_error
        assert found is not None and torch.equal(found, error.double())


def test_what_cannot_be_stored_is_refused(tmp_path: Path) -> None:
    path, solution = tmp_path / "run.safetensors", solved()
    for metadata in ({"rtol": float("nan")}, {"model": object()}):
        with pytest.raises((TypeError, ValueError), match="metadata"):
            runs.save(path, solution, metadata)
    with pytest.raises(ValueError, match=r"true_error must have shape \(\d+, 2\), got \(1, 3\)"):
        runs.save(path, solution, true_error=torch.zeros(1, 3))
    with pytest.raises(TypeError, match="true_error must be a tensor, got list"):
        runs.save(path, solution, true_error=[1])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"true_error must have dtype torch\.float64, got torch\.complex64"):
        runs.save(path, solution, true_error=torch.zeros(solution.history.shape, dtype=torch.complex64))
    with pytest.raises(TypeError, match="metadata must be a mapping, got list"):
        runs.save(path, solution, [1])  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere"):
        runs.save(tmp_path / "nowhere" / "run.safetensors", solution)
    with pytest.raises(IsADirectoryError, match="is a folder"):
        runs.save(tmp_path, solution)
    with pytest.raises(TypeError, match="solution must be a Solution, got Tensor"):
        runs.save(path, solution.value)  # type: ignore[arg-type]
    model = mixture(SCHEDULE, SHAPE, torch.Generator().manual_seed(1))
    naive = deqkern.invert(model, model.means[:2].view(2, *SHAPE), SCHEDULE, STEPS, method="naive")
    with pytest.raises(ValueError, match="solution has no residuals"):
        runs.save(path, naive)
    assert not path.exists()


def spoil(path: Path, change: str) -> None:
    """Make `path`, which holds a run, another kind of file."""
    with safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    if change == "text":
        path.write_text("nothing")
    elif change == "folder":
        path.unlink()
        path.mkdir()
    elif change == "format":
        save_file(tensors, path, metadata | {"format": "deqkern.Noise.1"})
    elif change == "plain":
        save_file(tensors, path)
    elif change == "unsaid":
        save_file(tensors, path, {"format": metadata["format"]})
    elif change == "tensor":
        save_file({name: tensor for name, tensor in tensors.items() if name != "nfe_history"}, path, metadata)
    elif change == "shape":
        save_file(tensors | {"history": tensors["history"][:1].clone()}, path, metadata)
    elif change == "empty":
        save_file({name: tensor[:0].clone() for name, tensor in tensors.items()}, path, metadata)
    elif change == "rank":
        save_file(tensors | {"residual_history": tensors["history"].clone()}, path, metadata)
    elif change == "ranks":
        save_file(tensors | {"residual_history": tensors["residual_history"][..., None].clone()}, path, metadata)
    elif change in ("bfloat16", "complex64", "int64"):
        save_file(tensors | {"history": tensors["history"].to(getattr(torch, change))}, path, metadata)
    elif change == "json":
        save_file(tensors, path, metadata | {"metadata": "{"})
    else:
        save_file(tensors, path, metadata | {"metadata": "[]"})


@pytest.mark.parametrize(
    "change",
    [
        *("text", "folder", "format", "plain", "unsaid", "tensor", "shape", "empty", "rank", "ranks"),
        *("bfloat16", "complex64", "int64", "json", "list"),
    ],
)
def test_another_kind_of_file_is_an_error_that_names_it(change: str, tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    runs.save(path, solved())
    spoil(path, change)
    with pytest.raises(ValueError, match="does not hold a run") as raised:
        runs.load(path)
    assert str(path) in str(raised.value)
    assert change != "folder" or "it is a folder" in str(raised.value)
    shown = plain(run("plot", path, "--out", tmp_path / "a.png", code=2).stderr).replace(" ", "")
    assert "RUNS" in shown and "doesnotholdarun" in shown and not (tmp_path / "a.png").exists()


def test_a_missing_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        runs.load(tmp_path / "nowhere.safetensors")
    with pytest.raises(ValueError, match="does not hold a run"):
        runs.load(os.devnull)
    monkeypatch.chdir(tmp_path)  # a long path is broken over lines
    assert "nowhere" in plain(run("plot", "nowhere.safetensors", code=2).stderr)
    assert "--out" in plain(run("plot", "nowhere.safetensors", "--out", "a.txt", code=2).stderr)


def test_noise_is_not_read_from_a_folder(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match="it is a folder"):
        Noise.load(tmp_path, "--noise")


def test_a_run_is_drawn_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs.save(tmp_path / "run.safetensors", solved())
    monkeypatch.chdir(tmp_path)
    for again in ("run.safetensors", tmp_path / "run.safetensors"):
        shown = plain(run("plot", "run.safetensors", again, "--out", "a.png", code=2).stderr)
        assert "given more than once" in " ".join(shown.replace("│", " ").split())
    assert not Path("a.png").exists()


def made(name: str, count: int, steps: int, **metadata: Any) -> tuple[str, StoredRun]:
    """A run of two samples that was never solved."""
    error = torch.logspace(1, -3, count, dtype=torch.float64)[:, None].expand(count, 2)
    nfe = steps * torch.arange(1, count + 1)[:, None].expand(count, 2)
    return name, StoredRun(error, nfe, error[:, None].expand(count, steps, 2), error / 2, metadata)


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_names_ticks_and_legend_stay_off_the_data(count: int) -> None:
    pytest.importorskip("matplotlib")
    names = ["run of " + f"many options, eta 0, rtol {i}, " * 9 for i in range(count)]
    many = dict(made(name, 12 + i, 12 + i, rtol=10.0 ** -(i % 3)) for i, name in enumerate(names))
    figure = plots.runs_figure(many, "what they share, " * 20)
    figure.canvas.draw()
    lines, heat = figure.axes[:2], [axis for axis in figure.axes if axis.get_title()]
    assert len(heat) == count
    titles = [axis.title.get_window_extent() for axis in heat]
    for i, box in enumerate(titles):
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
        assert not any(box.overlaps(other) for other in titles[:i])
        assert not any(box.overlaps(axis.bbox) for axis in figure.axes)
    (legend,) = figure.subfigs[0].legends
    assert len(legend.get_texts()) == count + 1
    box = legend.get_window_extent()
    assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
    assert not any(box.overlaps(axis.get_window_extent()) for axis in figure.axes)
    assert not any(box.overlaps(other) for other in titles)
    assert all(axis.bbox.width > figure.bbox.width / 3 and axis.bbox.height > 250 for axis in lines)
    ticks = [tick for axis in heat for tick in (*axis.get_xticks(), *axis.get_yticks())]
    assert ticks and all(float(tick).is_integer() for tick in ticks)
    looks = {(line.get_color(), line.get_marker()) for line in lines[0].lines if len(line.get_xdata()) > 2}
    assert len({look for look in looks if look[1] != "None"}) == count
    assert {text.get_text() for text in lines[1].texts} == {f"rtol {10.0**-i:g}" for i in range(min(count, 3))}


def test_a_slow_run_does_not_squeeze_the_others() -> None:
    pytest.importorskip("matplotlib")
    for longest, last in ((40, [40.5, 40.5]), (100, [10.5, 100.5])):
        figure = plots.runs_figure(dict([made("fast", 10, 10), made("slow", longest, 10)]))
        assert [axis.get_xlim()[1] for axis in figure.axes if axis.get_title()] == last


def test_names_are_not_read_as_formulas(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    odd = {"my $sol_ver^ $ {x": made("", 4, 4)[1], "_hidden": made("", 5, 4)[1]}
    figure = plots.runs_figure(odd, "$ of ^$")
    figure.canvas.draw()
    assert [text.get_text().replace("\\$", "$") for text in figure.subfigs[0].legends[0].get_texts()][:2] == list(odd)
    plots.save_comparison(tmp_path / "a.png", {"a$_^$": torch.zeros(1, 1, 8, 8)}, "$_^$")


@pytest.mark.parametrize("rtol", [[1], "abc", True, -1, 0, float("inf"), float("nan"), None])
def test_a_tolerance_that_is_none_is_not_drawn(rtol: Any) -> None:
    pytest.importorskip("matplotlib")
    figure = plots.runs_figure(dict([made("run", 4, 4, rtol=rtol)]))
    assert not figure.axes[1].texts


def test_what_is_no_run_is_not_drawn() -> None:
    with pytest.raises(ValueError, match="runs must not be empty"):
        plots.runs_figure({})
    for wrong in ({"a": solved()}, [made("a", 2, 2)[1]]):
        with pytest.raises(TypeError, match="runs must map names to StoredRun, got"):
            plots.runs_figure(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_the_figure_has_two_axes_of_lines_and_one_per_run(count: int, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    stored = {}
    for i, solver in enumerate((solvers.default(), solvers.picard(), solvers.picard(window=5), solvers.deq_ddim())):
        seen: list[Tensor] = []
        solution = solved(solver, callback=lambda k, value, estimate, seen=seen: seen.append(value))
        true_error = torch.stack([relative_error(value, solution.value) for value in seen]) if i % 2 else None
        runs.save(tmp_path / "run.safetensors", solution, {"rtol": 1e-2}, true_error=true_error)
        stored[f"run {i}"] = runs.load(tmp_path / "run.safetensors")
    chosen = dict(list(stored.items())[:count])
    figure = plots.runs_figure(chosen, "title")
    lines, heat = figure.axes[:2], [axis for axis in figure.axes if axis.get_title()]
    assert len(figure.axes) == 2 + count + 1  # and the colour scale
    assert [axis.get_title().partition(":")[0] for axis in heat] == list(chosen)
    for axis in lines:
        assert axis.get_yscale() == "log"
        assert len({line.get_color() for line in axis.lines if len(line.get_xdata()) > 2}) == count
    for (_, stored_run), axis in zip(chosen.items(), heat, strict=True):
        converged, residual = (image.get_array() for image in axis.images)
        evaluated = ~stored_run.residual_history.isnan().all(2).T  # (S, iterations)
        assert torch.equal(torch.tensor(~residual.mask).expand_as(evaluated), evaluated)
        assert torch.equal(torch.tensor(~converged.mask).expand_as(evaluated), evaluated.cumsum(0) == 0)
    plots.save_runs(tmp_path / "picture.png", chosen)
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_has_nothing_to_show_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    solution = solved()
    nothing = replace(
        solution,
        history=torch.full_like(solution.history, torch.inf),
        residual_history=torch.zeros_like(solution.residual_history),
    )
    runs.save(tmp_path / "run.safetensors", nothing, {"rtol": 1e-2})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.save_runs(tmp_path / "picture.png", {"run": runs.load(tmp_path / "run.safetensors")})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny_model(folder)
    return folder


def test_sample_stores_its_run_and_plot_draws_it(model: Path, tmp_path: Path) -> None:
    files = []
    for solver in ("default", "picard"):
        files.append(tmp_path / f"{solver}.safetensors")
        options = ("--steps", 10, "--batch", 3, "--solver", solver, "--out", tmp_path / "grid.png", "--json")
        report = json.loads(run("sample", "--model", model, *options, "--compare", "--save-run", files[-1]).stdout)
        found = runs.load(files[-1])
        assert found.metadata["solver"] == solver and found.metadata["steps"] == 10 and found.metadata["rtol"] == 0.01
        assert found.nfe_history[-1].tolist() == report["runs"][0]["nfe"]
        assert found.history[-1].tolist() == report["runs"][0]["error_estimate"]["per_sample"]
        assert found.true_error is not None and len(found.true_error) == len(found.history)
        assert found.true_error[-1].tolist() == report["runs"][0]["true_error"]["per_sample"]
    out = tmp_path / "picture.png"
    assert str(out) in run("plot", *files, "--out", out).stdout.replace("\n", "")
    assert out.read_bytes().startswith(b"\x89PNG")


def test_a_model_in_the_folder_of_the_command_has_a_name(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model)
    file = tmp_path / "run.safetensors"
    run("sample", "--model", ".", "--steps", 3, "--batch", 1, "--out", tmp_path / "grid.png", "--save-run", file)
    assert runs.load(file).metadata["model"] == str(model)


def test_invert_stores_its_run(model: Path, tmp_path: Path) -> None:
    Image = pytest.importorskip("PIL.Image")
    Image.new("L", (8, 8), 200).save(tmp_path / "a.png")
    file, out = tmp_path / "run.safetensors", tmp_path / "noise.safetensors"
    options = ("invert", tmp_path / "a.png", "--model", model, "--steps", 10, "--out", out)
    for method in ("naive", "optimize"):
        assert "--save-run" in plain(run(*options, "--method", method, "--save-run", file, code=2).stderr)
    assert "--save-run" in plain(run(*options, "--save-run", out, code=2).stderr)
    for method in ("joint", "stepwise"):
        run(*options, "--method", method, "--save-run", file)
        found = runs.load(file)
        assert found.metadata["solver"] == f"{method} inversion" and found.metadata["eta"] == 0
        assert found.true_error is None
        assert torch.equal((~found.residual_history.isnan()).sum(1).cumsum(0), found.nfe_history)
        run("plot", file, "--out", tmp_path / "picture.png")
