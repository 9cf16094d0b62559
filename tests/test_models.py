from __future__ import annotations

import json
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from asserts import assert_close
from folders import save_tiny_model, save_tiny_profile

from deqkern import NoiseSchedule, models


def test_a_folder_is_loaded_as_it_was_saved(tmp_path: Path) -> None:
    saved = save_tiny_model(tmp_path / "mine", channels=3)
    loaded = models.load(tmp_path / "mine")
    assert (loaded.name, loaded.shape, loaded.profile) == ("mine", (3, 8, 8), None)
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    weights = loaded.model.state_dict()
    assert weights.keys() == saved.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in saved.state_dict().items())
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 500])
    with torch.no_grad():  # where the weights lie in memory may decide about a last bit
        assert_close(loaded.model(x, t).sample, saved(x, t).sample, 1e-6)
    assert_close(loaded.schedule.alphas_cumprod, NoiseSchedule.linear().alphas_cumprod, 1e-6)
    assert not loaded.schedule.clip_sample


def test_a_pipeline_folder_is_loaded(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    model = save_tiny_model(tmp_path / "model")
    scheduler = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    diffusers.DDPMPipeline(model, scheduler).save_pretrained(tmp_path / "pipeline")
    loaded = models.load(str(tmp_path / "pipeline"))
    assert (loaded.name, loaded.shape) == ("pipeline", (1, 8, 8))
    assert (loaded.schedule.prediction_type, loaded.schedule.clip_sample) == ("v_prediction", True)


def test_a_profile_beside_the_model_is_loaded(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    save_tiny_profile(tmp_path)
    profile = models.load(tmp_path).profile
    assert profile is not None
    assert profile.shape == (1, 8, 8)


def test_loading_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_model(tmp_path)

    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    models.load(tmp_path)
    for name in ("google/ddpm", "long" * 80, "zero\0"):
        with pytest.raises(ValueError, match=r"name_or_path must be one of digits, photos or a folder, got '"):
            models.load(name)


def _change_config(name: str, **changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(config | changes))

    return change


def _remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _spoil_weights(folder: Path) -> None:
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(b"spoilt")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_remove("config.json"), r"has no .*config\.json"),
        (_remove("scheduler_config.json"), r"has no .*scheduler_config\.json"),
        (_remove("diffusion_pytorch_model.safetensors"), r"the weights in .* cannot be read"),
        (_spoil_weights, r"the weights in .* cannot be read"),
        (_change_config("config.json", block_out_channels=[16]), r"the weights in .* cannot be read"),
        (lambda folder: (folder / "config.json").write_text("{"), r"config\.json is not JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), r"does not hold a JSON object"),
        (_change_config("config.json", _class_name="UNet2DConditionModel"), r"must hold a UNet2DModel.*Condition"),
        (_change_config("config.json", sample_size=None), r"has no sample_size"),
        (_change_config("config.json", sample_size="16"), r"has no sample_size .*'16'"),
        (_change_config("config.json", sample_size=[8, 8, 8]), r"has no sample_size .*\[8, 8, 8\]"),
        (_change_config("config.json", sample_size=-8), r"has no sample_size .*-8"),
        (_change_config("config.json", in_channels=None), r"has in_channels None"),
        (_change_config("config.json", down_block_types=["UnknownBlock"]), r"UnknownBlock does not exist"),
        (_change_config("scheduler_config.json", _class_name="__version__"), r"scheduler_config\.json cannot be used"),
        (
            _change_config("scheduler_config.json", _class_name="VQDiffusionScheduler"),
            r"json cannot be used: .*num_vec",
        ),
        (_change_config("scheduler_config.json", beta_schedule="new"), r"json cannot be used: new is not implemented"),
        (_change_config("scheduler_config.json", timestep_spacing="new"), r"json cannot be used: timestep_spacing"),
        (_change_config("scheduler_config.json", beta_end=5.0), r"json cannot be used: alphas_cumprod"),
        (
            lambda folder: ((folder / "config.json").unlink(), (folder / "config.json").mkdir()),
            r"cannot be read.*direct",
        ),
        (_change_config("scheduler_config.json", _class_name="Nothing"), r"no scheduler 'Nothing'"),
        (_change_config("scheduler_config.json", _class_name=None), r"no scheduler None"),
        (lambda folder: shutil.copy(folder / "config.json", folder / "profile.safetensors"), r"profile\.safetensors"),
    ],
)
def test_a_spoilt_folder_is_an_error_that_says_what_is_wrong(
    tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    save_tiny_model(tmp_path)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        models.load(tmp_path)
    assert str(caught.value).startswith("name_or_path")


def test_without_diffusers_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_model(tmp_path)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"pip install 'deqkern\[demo\]'"):
        models.load(tmp_path)


def test_a_model_that_was_not_installed_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(models, "_FOLDER", tmp_path)
    with pytest.raises(ValueError, match="name_or_path: this installation lacks the model 'digits'"):
        models.load("digits")


@pytest.mark.parametrize("name", models.SHIPPED)
def test_the_shipped_models_load_and_run(name: str) -> None:
    pytest.importorskip("diffusers")
    loaded = models.load(name)
    assert loaded.name == name
    with torch.no_grad():
        out = loaded.model(torch.randn(2, *loaded.shape), torch.tensor([10, 900])).sample
    assert out.shape == (2, *loaded.shape)
    assert out.isfinite().all()
