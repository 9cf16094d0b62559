from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from asserts import assert_close
from folders import save_tiny_model
from safetensors import safe_open
from safetensors.torch import save_file
from terminal import plain, run
from torch import Tensor

import deqkern
from deqkern import models, plots, solvers
from deqkern.cli.files import read_pictures
from deqkern.engine.solution import relative_error

Image = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny_model(folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A three and an eight as 16x16 grey pictures."""
    from sklearn.datasets import load_digits

    folder = tmp_path_factory.mktemp("pictures")
    paths = [folder / "three.png", folder / "eight.png"]
    for path, index in zip(paths, (3, 8), strict=True):
        pixels = (load_digits().images[index] * 255 / 16).astype(np.uint8)
        Image.fromarray(pixels).resize((16, 16), Image.Resampling.BILINEAR).save(path)
    return paths


def strict(text: str) -> Any:
    """JSON without NaN."""

    def refuse(name: str) -> None:
        raise AssertionError(name)

    return json.loads(text, parse_constant=refuse)


def samples(paths: list[Path]) -> Tensor:
    pixels = np.stack([np.asarray(Image.open(path)) for path in paths])
    return torch.from_numpy(pixels.astype(np.float32))[:, None] / 127.5 - 1


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


@pytest.fixture(scope="module")
def inverted(pictures: list[Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("inverted")
    options = ("--steps", 20, "--out", folder / "noise.safetensors", "--report", folder / "report.png")
    return run("invert", *pictures, *options), folder


def test_the_noise_that_invert_writes_makes_the_pictures_again(
    inverted: tuple[Any, Path], pictures: list[Path]
) -> None:
    result, folder = inverted
    tensors, metadata = load(folder / "noise.safetensors")
    assert set(tensors) == {"noise", "converged", "error_estimate", "residual", "round_trip"}
    assert (metadata["model"], metadata["steps"], metadata["sigma_min"]) == ("digits", "20", "0.08")
    assert json.loads(metadata["images"]) == [str(path) for path in pictures]
    loaded = models.load(metadata["model"])
    again = deqkern.sample(
        loaded.model,
        tensors["noise"],
        loaded.schedule,
        int(metadata["steps"]),
        sigma_min=float(metadata["sigma_min"]),
        solver=solvers.sequential(),
        rtol=0.0,
    ).value
    error = relative_error(again, samples(pictures))
    assert float(error.max()) <= 1e-3
    assert_close(tensors["round_trip"], error, 1e-2)
    assert tensors["converged"].tolist() == [True, True]
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")
    shown = plain(result.stdout)
    assert "digits: 2 images, 20 steps, joint, rtol 0.0001, sigma_min 0.08" in shown
    assert "three.png yes" in shown and "eight.png yes" in shown
    assert "2 of 2 samples converged" in shown and "round trip" in shown
    assert "resized" not in result.stderr


def test_sample_takes_the_noise_back(
    inverted: tuple[Any, Path], pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, Tensor] = {}
    monkeypatch.setattr(plots, "save_comparison", lambda path, panels, title: drawn.update(panels))
    noise = inverted[1] / "noise.safetensors"
    options = ("--noise", noise, "--rtol", 1e-3, "--compare", "--out", tmp_path / "a.png", "--json")
    report = strict(run("sample", *options).stdout)
    assert (report["model"], report["steps"], report["batch"]) == ("digits", 20, 2)
    assert (report["noise"], report["sigma_min"]) == (str(noise), 0.08)
    assert "seed" not in report
    assert report["runs"][0]["true_error"]["max"] < 1e-2
    assert all(float(relative_error(made, samples(pictures)).max()) < 1e-2 for made in drawn.values())


@pytest.mark.parametrize(
    ("options", "option", "reason"),
    [
        (["--steps", "20"], "--steps", "says it already"),
        (["--batch", "2"], "--batch", "says it already"),
        (["--eta", "0"], "--eta", "says it already"),
        (["--order", "1"], "--order", "says it already"),
        (["--spacing", "log_snr"], "--spacing", "says it already"),
        (["--seed", "1"], "--seed", "says it already"),
        (["--model", "photos"], "--model", "'photos' takes (3, 32, 32)"),
        (["--noise", "nowhere.safetensors"], "--noise", "no file nowhere.safetensors"),
        (["--noise", "three.png"], "--noise", "does not hold noise"),
        (["--noise", "profile.safetensors"], "--noise", "not written by deqkern invert"),
    ],
)
def test_what_does_not_go_with_the_noise_is_named(
    options: list[str],
    option: str,
    reason: str,
    inverted: tuple[Any, Path],
    pictures: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("three.png").write_bytes(pictures[0].read_bytes())
    profile = models.load("digits").profile
    assert profile is not None
    profile.save("profile.safetensors")
    noise = [] if "--noise" in options else ["--noise", str(inverted[1] / "noise.safetensors")]
    result = run("sample", *noise, *options, code=2)
    assert option in plain(result.stderr)
    assert reason in plain(result.stderr)
    assert not Path("grid.png").exists()


def test_a_moved_model_is_named_by_its_new_folder(pictures: list[Path], tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "old", size=16)
    noise = tmp_path / "noise.safetensors"
    run("invert", *pictures, "--model", tmp_path / "old", "--steps", 3, "--out", noise)
    assert load(noise)[1]["model"] == str(tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "new")
    out = ("--out", tmp_path / "grid.png")
    assert "--model" in run("sample", "--noise", noise, *out, code=2).stderr
    run("sample", "--noise", noise, "--model", tmp_path / "new", *out)


@pytest.mark.parametrize(
    ("method", "options", "error"),
    [("stepwise", [], 1e-3), ("naive", [], 0.5), ("optimize", ["--max-iterations", 8], 0.8)],
)
def test_the_other_methods(
    method: str, options: list[object], error: float, pictures: list[Path], tmp_path: Path
) -> None:
    options = [*options, "--steps", 8, "--method", method]
    files = ("--out", tmp_path / "noise.safetensors", "--report", tmp_path / "report.png")
    report = strict(run("invert", *pictures, *options, *files, "--json").stdout)
    assert report["method"] == method
    assert report["rtol"] == {"stepwise": 1e-4, "naive": None, "optimize": 1e-2}[method]
    assert [entry["image"] for entry in report["images"]] == [str(path) for path in pictures]
    for entry in report["images"]:
        assert entry["round_trip"] < error
        assert (entry["error_estimate"] is None) == (method == "naive")
        assert 0 < entry["iterations"] <= report["iterations"]
    assert (tmp_path / "report.png").is_file()
    run("sample", "--noise", tmp_path / "noise.safetensors", "--out", tmp_path / "grid.png")


@pytest.mark.parametrize("method", ["joint", "stepwise"])
def test_what_never_converges_is_counted_to_the_end(
    method: str, model: Path, pictures: list[Path], tmp_path: Path
) -> None:
    """Its estimate may be infinite all along, and so the same."""
    options = ("--model", model, "--method", method, "--steps", 3, "--rtol", 0, "--out", tmp_path / "n.safetensors")
    report = strict(run("invert", *pictures, *options, "--json").stdout)
    assert max(entry["iterations"] for entry in report["images"]) == report["iterations"]


def test_a_long_name_leaves_room_for_the_figures(pictures: list[Path], tmp_path: Path) -> None:
    name = "a long name of a picture, " * 4 + "three.png"
    (tmp_path / name).write_bytes(pictures[0].read_bytes())
    found = run("invert", tmp_path / name, "--steps", 4, "--out", tmp_path / "noise.safetensors").stdout
    for head in ("converged", "iterations", "nfe", "error estimate", "round trip"):
        assert head in found


def test_the_report_of_a_search_is_over_evaluations(
    pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(plots, "save_inversion", lambda *_, **options: drawn.update(options))
    files = ("--out", tmp_path / "noise.safetensors", "--report", tmp_path / "report.png")
    run("invert", pictures[0], "--steps", 3, "--method", "optimize", "--max-iterations", 2, *files)
    assert (drawn["label"], drawn["along"]) == ("squared distance", "evaluations of the loss")


def test_noise_that_is_read_is_not_overwritten(inverted: tuple[Any, Path], tmp_path: Path) -> None:
    noise = tmp_path / "noise.safetensors"
    noise.write_bytes((inverted[1] / "noise.safetensors").read_bytes())
    error = run("sample", "--noise", noise, "--save-run", noise, "--out", tmp_path / "a.png", code=2).stderr
    assert "--save-run" in plain(error)
    assert noise.read_bytes() == (inverted[1] / "noise.safetensors").read_bytes()


def test_a_file_without_noise_is_refused(inverted: tuple[Any, Path], tmp_path: Path) -> None:
    tensors, metadata = load(inverted[1] / "noise.safetensors")
    save_file({"noise": tensors["noise"][:0]}, tmp_path / "empty.safetensors", metadata)
    error = run("sample", "--noise", tmp_path / "empty.safetensors", "--out", tmp_path / "a.png", code=2).stderr
    assert "--noise" in plain(error) and "it is empty" in plain(error)


def test_what_did_not_converge_is_flagged_and_no_error(pictures: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "noise.safetensors"
    result = run("invert", *pictures, "--steps", 10, "--max-iterations", 2, "--out", out)
    assert plain(result.stdout).count("NO 2 20") == 2
    assert "0 of 2 samples converged" in result.stdout
    assert load(out)[0]["converged"].tolist() == [False, False]


def test_a_chain_to_the_schedules_own_end(model: Path, pictures: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "noise.safetensors"
    options = ("--model", model, "--steps", 5, "--sigma-min", 0, "--out", out)
    assert strict(run("invert", *pictures, *options, "--json").stdout)["sigma_min"] is None
    assert load(out)[1]["sigma_min"] == "0"
    report = strict(run("sample", "--noise", out, "--out", tmp_path / "grid.png", "--json").stdout)
    assert report["sigma_min"] is None


def test_pictures_become_samples_of_the_model(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ramp = np.linspace(0, 255, 64).astype(np.uint8).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "grey.png")
    Image.fromarray(ramp.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.fromarray(np.stack([ramp] * 3, -1)).save(tmp_path / "colours.png")
    Image.fromarray(np.stack([ramp, np.zeros_like(ramp)], -1), "LA").save(tmp_path / "glass.png")
    paths = [tmp_path / f"{name}.png" for name in ("grey", "deep", "colours", "glass")]
    found = read_pictures(paths, models.load(model), "IMAGES")
    expected = torch.from_numpy(ramp.astype(np.float32))[None] / 127.5 - 1
    assert torch.equal(found[:3], expected.expand(3, 1, 8, 8))
    assert (found[3] == 1).all()
    assert not capsys.readouterr().err
    save_tiny_model(tmp_path / "rgb", channels=3)
    red = np.zeros((20, 12, 3), dtype=np.uint8) + np.array([255, 0, 128], dtype=np.uint8)
    Image.fromarray(red).save(tmp_path / "red.jpg", quality=100)
    found = read_pictures([tmp_path / "red.jpg", paths[0]], models.load(tmp_path / "rgb"), "IMAGES")
    assert found.shape == (2, 3, 8, 8)
    assert_close(found[0], torch.tensor([1.0, -1.0, 0.0]).view(3, 1, 1).expand(3, 8, 8), 0.03)
    assert torch.equal(found[1], expected.expand(3, 8, 8))
    assert "red.jpg: resized from 12x20 to 8x8 pixels" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "option", "reason"),
    [
        (["nowhere.png"], "IMAGES", "there is no such file"),
        (["."], "IMAGES", "cannot be read"),
        (["text.png"], "IMAGES", "cannot identify image file"),
        (["torn.png"], "IMAGES", "cannot be read"),
        (["three.png", "--model", "digit"], "--model", "got 'digit'"),
        (["three.png", "--model", "four"], "--model", "have 4"),
        (["three.png", "--model", "clips"], "--model", "clips or thresholds"),
        (["three.png", "--method", "newton"], "--method", "stepwise"),
        (["three.png", "--steps", "0"], "--steps", "got 0"),
        (["three.png", "--rtol", "nan"], "--rtol", "got nan"),
        (["three.png", "--max-iterations", "0"], "--max-iterations", "got 0"),
        (["three.png", "--max-batch", "0"], "--max-batch", "got 0"),
        (["three.png", "--sigma-min", "-1"], "--sigma-min", "got -1"),
        (["three.png", "--sigma-min", "1e9"], "--sigma-min", "not below the noise"),
        (["three.png", "--out", "noise.pt"], "--out", "must end in .safetensors"),
        (["three.png", "--out", "nowhere/noise.safetensors"], "--out", "no folder nowhere"),
        (["three.png", "--out", "folder.safetensors"], "--out", "is a folder"),
        (["three.png", "--out", f"{'long' * 80}.safetensors"], "--out", "cannot be written"),
        (["lab.tif"], "IMAGES", "LAB"),
        (["float.tif"], "IMAGES", "pixels of mode F"),
        (["three.png", "--method", "naive", "--max-iterations", "3"], "--max-iterations", "does not iterate"),
        (["three.png", "--method", "naive", "--rtol", "1e-3"], "--rtol", "does not iterate"),
        (["three.png", "--report", "./three.png"], "--report", "read or written"),
        (["three.png", "--save-run", "../{here}/noise.safetensors"], "--save-run", "read or written"),
        (["three.png", "--report", "report.txt"], "--report", "must end in one of .png"),
        (["three.png", "--report", "dangling.png"], "--report", "cannot be written"),
        ([], "IMAGES", "Missing argument"),
    ],
)
def test_a_bad_option_of_invert_is_named(
    arguments: list[str],
    option: str,
    reason: str,
    model: Path,
    pictures: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("three.png").write_bytes(pictures[0].read_bytes())
    Path("torn.png").write_bytes(pictures[0].read_bytes()[:60])
    Path("text.png").write_text("no picture")
    Image.new("LAB", (4, 4)).save("lab.tif")
    Image.new("F", (4, 4)).save("float.tif")
    arguments = [argument.format(here=tmp_path.name) for argument in arguments]
    Path("folder.safetensors").mkdir()
    Path("dangling.png").symlink_to("nowhere/report.png")
    if "four" in arguments:
        save_tiny_model(Path("four"), channels=4)
    if "clips" in arguments:
        save_tiny_model(Path("clips"))
        config = json.loads(Path("clips/scheduler_config.json").read_text())
        Path("clips/scheduler_config.json").write_text(json.dumps(config | {"clip_sample": True}))
    chosen = [] if "--model" in arguments else ["--model", str(model)]
    result = run("invert", *arguments, *chosen, *([] if "--steps" in arguments else ["--steps", "3"]), code=2)
    assert option in plain(result.stderr)
    assert reason in plain(result.stderr)
    assert not result.stdout
    assert Path("three.png").read_bytes() == pictures[0].read_bytes()
    assert Path("noise.safetensors").exists() == ("dangling.png" in arguments)  # noise that was found is kept


def test_without_pillow_the_message_names_the_extra(
    model: Path, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert "pip install 'deqkern[demo]'" in run("invert", pictures[0], "--model", model, code=1).stderr


def test_interpolate_goes_from_one_picture_to_the_other(
    pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, Tensor] = {}
    save = plots.save_comparison

    def keep(path: Path, panels: dict[str, Tensor], *rest: Any, **options: Any) -> None:
        drawn.update(panels)
        save(path, panels, *rest, **options)

    monkeypatch.setattr(plots, "save_comparison", keep)
    options = ("--frames", 5, "--steps", 12, "--out", tmp_path / "strip.png")
    report = strict(run("interpolate", *pictures, *options, "--json").stdout)
    assert (tmp_path / "strip.png").read_bytes().startswith(b"\x89PNG")
    assert list(drawn) == ["A", "t = 0.00", "t = 0.25", "t = 0.50", "t = 0.75", "t = 1.00", "B"]
    ends = samples(pictures)
    assert torch.equal(torch.cat([drawn["A"], drawn["B"]]), ends)
    error = relative_error(torch.cat([drawn["t = 0.00"], drawn["t = 1.00"]]), ends)
    assert_close(torch.tensor(report["round_trip"], dtype=torch.float64), error, 1e-6)
    assert float(error.max()) < 1e-2
    assert report["inversion"]["converged"] == [True] * 2
    assert report["sampling"]["converged"] == [True] * 5
    away = [float(relative_error(frame, ends[:1])) for frame in list(drawn.values())[1:-1]]
    assert away[0] < 0.01 < away[2] and away[-1] > 0.3


def test_interpolate_prints_a_table(model: Path, pictures: list[Path], tmp_path: Path) -> None:
    options = ("--model", model, "--steps", 4, "--frames", 3, "--out", tmp_path / "strip.png")
    result = run("interpolate", pictures[0], pictures[0], *options)
    shown = plain(result.stdout)
    assert "tiny: 3 frames, 4 steps, rtol 0.001, sigma_min 0.08" in shown
    assert "invert 2" in shown and "sample 3" in shown
    assert "round trip: " in shown and "(three.png)" in shown
    assert plain(result.stderr).count("resized from 16x16 to 8x8") == 2


@pytest.mark.parametrize(
    ("arguments", "option", "reason"),
    [
        (["three.png", "nowhere.png"], "B", "there is no such file"),
        (["three.png"], "B", "Missing argument"),
        (["three.png", "three.png", "--out", "three.png"], "--out", "read or written"),
        (["three.png", "three.png", "--frames", "1"], "--frames", "Invalid value"),
        (["three.png", "three.png", "--out", "strip.gif"], "--out", "must end in one of"),
        (["three.png", "three.png", "--out", "dangling.png"], "--out", "cannot be written"),
    ],
)
def test_a_bad_option_of_interpolate_is_named(
    arguments: list[str],
    option: str,
    reason: str,
    model: Path,
    pictures: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("three.png").write_bytes(pictures[0].read_bytes())
    Path("dangling.png").symlink_to("nowhere/strip.png")
    result = run("interpolate", *arguments, "--model", model, "--steps", 3, code=2)
    assert option in plain(result.stderr)
    assert reason in plain(result.stderr)
    assert not result.stdout


@pytest.mark.parametrize(
    ("largest", "factor"), [(0.9, 1), (0.5, 2), (0.3, 2), (0.11, 5), (0.1, 10), (3e-4, 2000), (0, 1), (1.5, 1)]
)
def test_differences_are_amplified_by_a_round_factor(largest: float, factor: float) -> None:
    difference = torch.tensor([0.0, -largest], dtype=torch.float64).view(2, 1, 1, 1)
    shown, by = plots.amplified(difference)
    assert by == pytest.approx(factor)
    assert_close(shown, factor * difference, 1e-12)


def test_a_report_of_many_images_names_none(tmp_path: Path) -> None:
    curves = {f"{i}: {'long' * 20}.png": [1.0, 0.1, float("inf")] for i in range(12)}
    images = torch.zeros(12, 1, 8, 8)
    plots.save_inversion(tmp_path / "a.png", {"source": images}, curves, label="error", rtol=1e-2)
    plots.save_inversion(tmp_path / "b.png", {"source": images}, {"x": [float("nan")] * 3}, label="error")
    assert (tmp_path / "a.png").stat().st_size and (tmp_path / "b.png").stat().st_size
