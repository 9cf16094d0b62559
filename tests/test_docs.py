"""What the documentation shows: its Python runs, its commands exist, its links lead somewhere."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

import deqkern
from deqkern.cli import app

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
DIGITS = Path(deqkern.__file__).parent / "models" / "digits"
BLOCK = re.compile(r"^(?:<!-- not run: (?P<reason>.+) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
# Blocks that are marked as not run; each one is a promise that nobody keeps.
NOT_RUN: dict[str, int] = {}


def page_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(path: Path, *languages: str) -> list[tuple[int, str, str | None]]:
    """(line of the first line, text, why it is not run) of all blocks in one of the languages."""
    content = path.read_text()
    return [
        (content.count("\n", 0, found.start("text")), found["text"], found["reason"])
        for found in BLOCK.finditer(content)
        if found["language"] in languages
    ]


def stable_diffusion(folder: Path) -> None:
    """Saves a Stable Diffusion of a few random weights, with letters for words and the scheduler it usually has."""
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    vocabulary.write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    merges.write_text("#version: 0.2\n")
    width = 16
    text = transformers.CLIPTextConfig(
        vocab_size=len(tokens), hidden_size=width, intermediate_size=width, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, bos_token_id=len(tokens) - 2, eos_token_id=len(tokens) - 1,
    )  # fmt: skip
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        cross_attention_dim=width, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    torch.nn.init.normal_(unet.conv_out.weight, std=0.01)  # with larger ones some images have no noise to be found
    diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8),
        text_encoder=transformers.CLIPTextModel(text),
        tokenizer=transformers.CLIPTokenizer(str(vocabulary), str(merges), model_max_length=8),
        unet=unet,
        scheduler=diffusers.PNDMScheduler.from_config(
            {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "skip_prk_steps": True,
             "set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False}
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip


@pytest.fixture
def folder(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the blocks of a page run, with the files that stand for the reader's own."""
    monkeypatch.chdir(tmp_path)
    unet, scheduler = tmp_path / "path/to/unet", tmp_path / "path/to/scheduler"
    for place, names in ((unet, ("config.json", "diffusion_pytorch_model.safetensors")), (scheduler, ())):
        place.mkdir(parents=True)
        for name in names or ("scheduler_config.json",):
            shutil.copy(DIGITS / name, place)
    if "path/to/pipeline" in path.read_text():
        stable_diffusion(tmp_path / "path/to/pipeline")
    return tmp_path


@pytest.mark.parametrize("path", [path for path in PAGES if blocks(path, "python")], ids=page_id)
def test_the_python_of_a_page_runs(path: Path, folder: Path) -> None:
    pytest.importorskip("diffusers")
    namespace: dict[str, Any] = {"__name__": "page"}
    for line, text, reason in blocks(path, "python"):
        if reason is None:
            code = compile("\n" * line + text, str(path), "exec")
            with warnings.catch_warnings():
                if path.name != "inversion.md":  # its search shows ten steps of many
                    warnings.simplefilter("error", deqkern.ConvergenceWarning)
                exec(code, namespace)
    solutions = [value for value in namespace.values() if isinstance(value, deqkern.Solution)]
    for solution in solutions:
        values = solution.value if isinstance(solution.value, tuple | list) else [solution.value]
        assert all(torch.isfinite(value).all() for value in values)


def test_what_is_not_run_is_known() -> None:
    found = {path.name: sum(reason is not None for *_, reason in blocks(path, "python")) for path in PAGES}
    assert {name: count for name, count in found.items() if count} == NOT_RUN


@pytest.mark.parametrize("path", [path for path in PAGES if blocks(path, "", "bash", "sh")], ids=page_id)
def test_the_commands_of_a_page_exist(path: Path) -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    lines = [line for _, text, _ in blocks(path, "", "bash", "sh") for line in text.splitlines()]
    for line in lines:
        program, *words = line.split()
        if program != "deqkern" or words[0] == "--help":
            continue
        options = {name for parameter in commands[words[0]].params for name in parameter.opts} | {"--help"}
        assert {word for word in words if word.startswith("-")} <= options, line


def test_the_options_in_the_tables_exist() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    sections = re.split(r"^## deqkern (\w+)$", (ROOT / "docs" / "cli.md").read_text(), flags=re.M)[1:]
    assert set(sections[::2]) == set(commands)
    for name, section in zip(sections[::2], sections[1::2], strict=True):
        options = {option for parameter in commands[name].params for option in parameter.opts}
        assert set(re.findall(r"`(--[a-z-]+)", section)) <= options, name


def slug(heading: str) -> str:
    """The anchor that both GitHub and the site give a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize("path", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=page_id)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(), flags=re.S)):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        place = path.parent / file if file else path
        assert place.exists(), target
        if anchor:
            assert anchor in map(slug, re.findall(r"^#+ (.+)$", place.read_text(), re.M)), target


def test_the_files_that_contributing_names_exist() -> None:
    named = re.findall(r"`([\w/]+/[\w.]+\.\w+|[\w/]+/)`", (ROOT / "CONTRIBUTING.md").read_text())
    assert len(named) > 50
    assert [name for name in named if not ((ROOT / name).exists() or (ROOT / "deqkern" / name).exists())] == []
