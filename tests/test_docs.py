"""What the README shows works: every `sdcore` command and every line of Python in it is run, on the bundled model."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sdcore.weights.adapters import write_adapter

import sdcore
from sdcore import lora
from sdcore.changes import LowRank

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.split(" #")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", README, re.S)
    for line in block.splitlines()
    if line.startswith("sdcore ")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder as the README's reader has it: a picture made with sdcore, a model in one file, a LoRA."""
    folder = tmp_path_factory.mktemp("reader")
    pipe = sdcore.load("tiny")  # fails here, not in every command, where the bundled model is not there
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    width = pipe.unet.get_submodule(layer).weight.shape[0]
    change = LowRank(torch.randn(4, width), torch.randn(width, 4) / 10)
    write_adapter(folder / "style.safetensors", lora.Adapter("style", {"unet": {layer: change}}), "peft", pipe)
    run(folder, "sdcore generate 'a red circle' --steps 2 --out out.png")
    run(folder, f"sdcore convert {ROOT / 'weights/tiny'} model.safetensors --layout ldm")
    return folder


def run(folder: Path, command: str) -> str:
    words = shlex.split(command)
    done = subprocess.run([sys.executable, "-m", *words], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def test_readme_has_commands():
    assert len(COMMANDS) >= 4


@pytest.mark.parametrize("command", COMMANDS)
def test_command_of_the_readme(folder, command):
    run(folder, command)


def test_python_of_the_readme(folder, monkeypatch):
    monkeypatch.chdir(folder)
    for block in re.findall(r"```python\n(.*?)```", README, re.S):
        exec(compile(block, "README.md", "exec"), {})


def test_files_of_the_map_exist():
    """The map names files that are there, and no file of the core is missing from it."""
    named = set(re.findall(r"`((?:sdcore|weights|train|kernels|tests)/[\w/]*(?:\.py)?)`", README))
    assert all((ROOT / name).exists() for name in named), sorted(n for n in named if not (ROOT / n).exists())
    core = {f"sdcore/{p.name}" for p in (ROOT / "sdcore").glob("*.py")} - {"sdcore/__init__.py", "sdcore/__main__.py"}
    text = README
    assert all(name in text or f"`{name.split('/')[1]}`" in text for name in core), core - named
