from __future__ import annotations

import json
import math
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from asserts import assert_close
from folders import save_tiny_model, save_tiny_profile
from terminal import plain, run

import deqkern
from deqkern import models, plots, runs
from deqkern.chain.timesteps import TIMESTEP_SPACINGS
from deqkern.cli.results import median, spread
from deqkern.cli.sampling import Chains, Preset, Spacing
from deqkern.engine.solution import relative_error


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny_model(folder)
    return folder


@pytest.fixture(scope="session")
def model_with_profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "measured"
    save_tiny_model(folder, channels=3)
    save_tiny_profile(folder, channels=3)
    return folder


def sample_json(model: Path, out: Path, *arguments: object) -> dict[str, Any]:
    options = ("--model", model, "--steps", 10, "--batch", 3, "--out", out / "grid.png", "--json")
    report: dict[str, Any] = json.loads(run("sample", *options, *arguments).stdout)
    assert (out / "grid.png").read_bytes().startswith(b"\x89PNG")
    return report


def test_sample_prints_a_table_and_writes_a_picture(model: Path, tmp_path: Path) -> None:
    result = run("sample", "--model", model, "--steps", 10, "--batch", 3, "--out", tmp_path / "grid.png")
    assert "tiny: 3 samples, 10 steps, eta 0, rtol 0.01" in plain(result.stdout)
    assert "error estimate" in result.stdout
    assert "3/3" in result.stdout
    assert f"written: {tmp_path / 'grid.png'}" in result.stdout.replace("\n", "")
    assert (tmp_path / "grid.png").is_file()


@pytest.mark.parametrize("eta", [0, 1])
@pytest.mark.parametrize("solver", Preset)
def test_every_solver_reaches_the_sequential_chain(
    solver: Preset, eta: int, model_with_profile: Path, tmp_path: Path
) -> None:
    options = ("--solver", solver, "--eta", eta, "--rtol", 1e-4, "--compare")
    report = sample_json(model_with_profile, tmp_path, *options)
    solved, sequential = report["runs"]
    assert (solved["solver"], sequential["solver"]) == (solver, "sequential")
    assert solved["converged"] == [True] * 3
    assert solved["true_error"]["max"] <= 1e-3
    assert len(solved["true_error"]["per_sample"]) == 3
    assert sequential["true_error"]["max"] == 0
    assert (sequential["iterations"], sequential["nfe"]) == (10, [10] * 3)


@pytest.mark.parametrize("eta", [0, 1])
def test_chains_of_second_order(eta: int, model: Path, tmp_path: Path) -> None:
    options = ("--order", 2, "--eta", eta, "--rtol", 1e-4, "--compare")
    report = sample_json(model, tmp_path, *options)
    assert report["order"] == 2
    solved, sequential = report["runs"]
    assert solved["converged"] == [True] * 3 and solved["true_error"]["max"] <= 1e-3
    assert sequential["nfe"] == [10] * 3
    picture = (tmp_path / "grid.png").read_bytes()
    sample_json(model, tmp_path, "--eta", eta, "--rtol", 1e-4, "--compare")
    assert (tmp_path / "grid.png").read_bytes() != picture


def test_the_spacing_is_the_one_asked_for(model: Path, tmp_path: Path) -> None:
    assert tuple(Spacing) == TIMESTEP_SPACINGS
    loaded, found = models.load(model), []
    noise = torch.randn(3, *loaded.shape, generator=torch.Generator().manual_seed(0))
    for spacing in Spacing:
        file = tmp_path / f"{spacing}.safetensors"
        report = sample_json(model, tmp_path, "--order", 2, "--spacing", spacing, "--save-run", file)
        assert report["spacing"] == runs.load(file).metadata["spacing"] == spacing
        schedule = replace(loaded.schedule, timestep_spacing=spacing)
        expected = deqkern.sample(loaded.model, noise, schedule, 10, order=2)
        assert report["runs"][0]["residual"]["per_sample"] == expected.residual.tolist()
        found.append(expected.value)
    assert all(not torch.equal(found[i], found[k]) for i in range(4) for k in range(i))
    assert ", log_snr, rtol" in plain(
        run("sample", "--model", model, "--steps", 4, "--spacing", "log_snr", "--out", tmp_path / "grid.png").stdout
    )


@pytest.mark.parametrize(
    ("name", "options"),
    [("FlowMatchEulerDiscreteScheduler", {}), ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True})],
)
def test_noise_levels_of_a_schedulers_own_have_no_spacing(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    getattr(pytest.importorskip("diffusers"), name)(**options).save_pretrained(tmp_path)
    refused = run("sample", "--model", tmp_path, "--spacing", "log_snr", "--out", tmp_path / "grid.png", code=2)
    assert "--spacing" in plain(refused.stderr) and "levels of its own" in plain(refused.stderr)
    assert sample_json(tmp_path, tmp_path)["spacing"] is None


def test_json_is_strict_and_alone_on_stdout(model: Path, tmp_path: Path) -> None:
    report = sample_json(model, tmp_path, "--max-iterations", 1, "--max-batch", 7, "--seed", 5)
    (only,) = report.pop("runs")
    assert report == {
        "model": str(model),
        "steps": 10,
        "batch": 3,
        "eta": 0.0,
        "order": 1,
        "spacing": "leading",
        "seed": 5,
        "rtol": 0.01,
        "window": None,
        "out": str(tmp_path / "grid.png"),
    }
    assert (only["iterations"], only["nfe"], only["true_error"]) == (1, [8] * 3, None)
    assert 0 < only["residual"]["max"] == max(only["residual"]["per_sample"])


def test_a_window_bounds_the_steps_of_a_call(model: Path, tmp_path: Path) -> None:
    (only,) = (report := sample_json(model, tmp_path, "--window", 3, "--max-iterations", 2))["runs"]
    assert (report["window"], only["nfe"]) == (3, [6] * 3)


def test_the_summary_holds_the_residuals(model: Path) -> None:
    run = Chains(models.load(model), 10, 3, 0.0, 0).run(Preset.default, None, rtol=1e-4)
    assert run.summary()["residual"]["per_sample"] == run.solution.residual.tolist()


def test_the_seed_chooses_the_noise(model: Path, tmp_path: Path) -> None:
    pictures = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run("sample", "--model", model, "--steps", 4, "--batch", 2, "--seed", seed, "--out", tmp_path / f"{name}.png")
        pictures.append((tmp_path / f"{name}.png").read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]


@pytest.mark.parametrize(
    ("options", "option", "reason"),
    [
        (["--model", "digit"], "--model", "one of digits, photos or a folder, got 'digit'"),
        (["--solver", "newton"], "--solver", "parataa"),
        (["--solver", "profile"], "--solver", "comes without a profile.safetensors"),
        (["--steps", "0"], "--steps", "got 0"),
        (["--steps", "1001"], "--steps", "got 1001"),
        (["--batch", "0"], "--batch", "Invalid value"),
        (["--eta", "-1"], "--eta", "got -1"),
        (["--eta", "nan"], "--eta", "got nan"),
        (["--order", "3"], "--order", "Invalid value"),
        (["--order", "2", "--eta", "0.5"], "--eta", "0 or 1 with order=2"),
        (["--spacing", "karras"], "--spacing", "log_snr"),
        (["--seed", "99999999999999999999"], "--seed", "Invalid value"),
        (["--seed", "-1"], "--seed", "Invalid value"),
        (["--rtol", "-1"], "--rtol", "got -1"),
        (["--rtol", "nan"], "--rtol", "got nan"),
        (["--max-iterations", "0"], "--max-iterations", "got 0"),
        (["--window", "0"], "--window", "got 0"),
        (["--window", "5", "--solver", "parataa"], "--window", "history_size = 0"),
        (["--window", "5", "--solver", "auto"], "--window", "has its own"),
        (["--max-batch", "0"], "--max-batch", "got 0"),
        (["--max-batch", "many"], "--max-batch", "Invalid value"),
        (["--out", "grid.txt"], "--out", "must end in one of .png"),
        (["--out", "nowhere/grid.png"], "--out", "no folder nowhere"),
        (["--model", "long" * 80], "--model", "or a folder, got"),
        (["--noise", "nowhere.safetensors", "--steps", "4"], "--noise", "no file nowhere.safetensors"),
        (["--colour"], "--colour", "No such option"),
    ],
)
def test_a_bad_option_is_named(
    options: list[str], option: str, reason: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model_option = [] if "--model" in options else ["--model", str(model)]
    result = run("sample", *model_option, *options, code=2)
    assert option in plain(result.stderr)
    assert reason in plain(result.stderr)
    assert not result.stdout
    assert not list(tmp_path.iterdir())


def test_a_broken_model_is_an_error_of_its_option(model: Path, tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    (tmp_path / "scheduler_config.json").unlink()
    assert "--model" in run("sample", "--model", tmp_path, code=2).stderr


def test_without_the_extra_the_message_names_it(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert "pip install 'deqkern[demo]'" in run("sample", "--model", model, code=1).stderr


def test_demo_needs_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    error = plain(run("demo", "--out", tmp_path / "file", code=2).stderr)
    assert "--out" in error and "file" in error


def test_demo_overwrites_nothing_of_its_own_and_fails_before_the_work(model: Path, tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "tiny")
    options = ("--steps", 2, "--batch", 1, "--out", tmp_path / "out")
    shown = run("demo", "--model", model, "--model", tmp_path / "tiny", *options, code=2).stderr
    assert "--model" in plain(shown) and "tiny, tiny" in plain(shown)
    for name in ("tiny.png", "tiny_convergence.png", "demo.json"):
        (tmp_path / "out" / name).mkdir(parents=True)
        shown = run("demo", "--model", model, *options, code=2).stderr
        assert "--out" in plain(shown) and "is a folder" in plain(shown)
        (tmp_path / "out" / name).rmdir()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_refused_before_the_work(model: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    options = ("--model", model, "--steps", 2, "--batch", 1, "--out", tmp_path / "a.png")
    shown = run("sample", *options, "--save-run", tmp_path / "locked" / "run.safetensors", code=2).stderr
    assert "--save-run" in plain(shown) and "permission denied" in plain(shown)
    assert not (tmp_path / "a.png").exists()


def test_the_median_of_an_even_number_is_the_mean_of_the_two_in_the_middle() -> None:
    assert spread(torch.tensor([4.0, 1.0, 3.0, 8.0]))["median"] == 3.5
    assert median(torch.full((2,), torch.inf)) == math.inf
    assert math.isnan(median(torch.tensor([1.0, torch.nan, 2.0])))


@pytest.mark.parametrize("panels", [1, 3])
def test_no_title_is_cut_off(panels: int) -> None:
    pytest.importorskip("matplotlib")
    sheets = {str(i): torch.zeros(1, 1, 8, 8) for i in range(panels)}
    for title in ("digits, 50 steps, eta 0, DPM-Solver++ 2M, log_snr", "WIDE" * 40, "short"):
        figure = plots.panelled(sheets, title, smallest=112)
        figure.canvas.draw()
        box = figure.texts[-1].get_window_extent()
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
        assert not any(box.overlaps(name.get_window_extent()) for name in figure.texts[:-1])


def test_one_iteration_has_one_tick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure
    drawn: list[Any] = []
    monkeypatch.setattr(figure, "savefig", lambda self, path, dpi: drawn.append(self))
    plots.convergence("a.png", {"eta 0": [plots.Curve("default", [1e-3], [1e-2])]}, rtol=1e-2)
    plots.save_inversion("a.png", {"source": torch.zeros(1, 1, 8, 8)}, {"a": [1e-3]}, label="error")
    for picture in drawn:
        picture.canvas.draw()
        low, high = picture.axes[0].get_xlim()
        assert [tick for tick in picture.axes[0].get_xticks() if low <= tick <= high] == [1]


def test_demo_compares_the_solvers_and_draws_them(model: Path, model_with_profile: Path, tmp_path: Path) -> None:
    presets = set(Preset) - {Preset.auto}
    options = ("--model", model, "--model", model_with_profile, "--steps", 8, "--batch", 2)
    result = run("demo", *options, "--out", tmp_path / "new" / "out")
    names = [f"{name}{end}.png" for name in ("tiny", "measured") for end in ("", "_convergence")]
    assert sorted(path.name for path in (tmp_path / "new" / "out").iterdir()) == sorted([*names, "demo.json"])
    report = json.loads((tmp_path / "new" / "out" / "demo.json").read_text())
    found = {(entry["model"], entry["eta"], entry["solver"]) for entry in report["runs"]}
    expected = {(name, eta, solver) for name in ("tiny", "measured") for eta in (0.0, 1.0) for solver in presets}
    assert found == expected - {("tiny", eta, "profile") for eta in (0.0, 1.0)}
    assert all(all(entry["converged"]) for entry in report["runs"])
    assert all(entry["true_error"]["max"] < 0.05 for entry in report["runs"])
    for solver in presets:
        assert solver in result.stdout
    assert "seconds: of this CPU" in result.stdout


def test_doctor_says_what_runs_and_why_not() -> None:
    report = json.loads(run("doctor", "--json").stdout)
    assert report["torch"] == torch.__version__
    assert report["threads"] == torch.get_num_threads()
    assert set(report["backends"]) == {"reference", "cpu", "triton", "cuda"}
    assert report["backends"]["reference"]["loaded"]
    shown = plain(run("doctor").stdout)
    for name in ("deqkern._C", "triton", "diffusers", "gpu", "backend cuda"):
        assert name in shown


def test_doctor_survives_a_missing_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert json.loads(run("doctor", "--json").stdout)["diffusers"].startswith("no: ModuleNotFoundError")


def test_version() -> None:
    assert run("--version").stdout.strip()


def test_relative_error_is_per_sample() -> None:
    reference = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    value = torch.tensor([[3.0, 4.5], [1.0, 0.0]])
    assert_close(relative_error(value, reference), torch.tensor([0.1, 0.0]))


def test_grid_enlarges_every_pixel_to_a_square() -> None:
    images = torch.stack([torch.full((1, 2, 2), -1.0), torch.full((1, 2, 2), 1.0), torch.zeros(1, 2, 2)])
    images[0, 0, 0, 1] = 1.0
    sheet = plots.grid(images, scale=8)
    assert sheet.shape == (2 * 16 + 4, 2 * 16 + 4, 3)
    assert (sheet[:8, :8] == 0).all()
    assert (sheet[:8, 8:16] == 255).all()
    assert (sheet[8:16, :16] == 0).all()
    assert (sheet[:, 16:20] == 255).all()  # the gap
    assert (sheet[20:, :16] == 128).all()
    assert (sheet[20:, 20:] == 255).all()  # no fourth sample


def test_grid_shows_colours_and_clips() -> None:
    images = torch.tensor([3.0, -3.0, 0.0]).view(1, 3, 1, 1)
    assert plots.grid(images, scale=1).tolist() == [[[255, 0, 128]]]
    with pytest.raises(ValueError, match="images must have shape"):
        plots.grid(torch.zeros(0, 3, 4, 4))


@pytest.mark.parametrize("columns", [20, 56])
def test_tables_in_narrow_terminals_are_whole(
    model: Path, tmp_path: Path, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    options = ("--model", model, "--steps", 4, "--batch", 2)
    out = run("sample", *options, "--compare", "--out", tmp_path / "grid.png").stdout
    heads = "solver iterations nfe converged true error seconds"
    assert heads in plain(out) and "sequential 4 4 2/2 0e+00 .. 0e+00 0." in plain(out) and "…" not in out
    out = run("plan", *options).stdout
    assert "window max_batch iterations nfe seconds" in plain(out) and "sequential all 4 4 0.0" in plain(out)
    assert "…" not in run("doctor").stdout


def test_too_little_memory_is_no_traceback(model: Path, tmp_path: Path) -> None:
    result = run("sample", "--model", model, "--batch", 10**12, "--out", tmp_path / "grid.png", code=1)
    assert "not enough memory" in result.stderr and isinstance(result.exception, SystemExit)
