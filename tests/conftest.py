"""What several test files need: the recorded outputs of other programs, small models, OpenAI's vocabulary."""

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import clip_loader
from model import CLIP, Config, SegCLIP

GOLDEN = Path(__file__).parent / "golden"


def rebuild_weights(recipe):
    """The weights that a recorded program ran on, from the seed and the list of parameters in its JSON file."""
    recipe, weights = json.loads((GOLDEN / recipe).read_text()), {}
    random = np.random.RandomState(recipe["seed"])
    for name, shape, mean, std in recipe["params"]:
        weights[name] = np.float32(mean + std * np.float32(random.standard_normal(shape)))
    weights |= {name: np.float32(values) for name, values in recipe.get("overrides", {}).items()}
    return {name: torch.from_numpy(np.asarray(values)) for name, values in weights.items()}, recipe


def recorded(file):
    return {name: torch.from_numpy(a) for name, a in np.load(GOLDEN / file).items() if a.dtype.kind != "U"}


def assert_close(ours, theirs, name, tolerance=1e-4):
    """Largest difference relative to the largest value; `pytest -s` shows it."""
    assert ours.shape == theirs.shape
    difference = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    print(f"{name:>50}: off by {difference:.1e}")
    assert difference <= tolerance, name


def assert_one_line(error, *parts):
    """The message of a caught InputError: one line, which names these."""
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message


@pytest.fixture(scope="session")
def vocabulary():
    """The path of OpenAI's vocabulary, which the project does not contain: from the cache, or beside the checkout."""
    sha256, file, url = clip_loader.DOWNLOADS[clip_loader.VOCABULARY]
    beside = Path(__file__).resolve().parents[2] / "shared" / "clip"
    for path in (clip_loader.cache_dir() / file, beside / file):
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
            return path
    pytest.skip(f"needs OpenAI's vocabulary: get {url} and put it into {clip_loader.cache_dir()}")


@pytest.fixture(scope="session")
def authors_checkpoint(tmp_path_factory):
    """A file in the format of the authors' segclip.bin, with the weights of the recorded pipeline."""
    path = tmp_path_factory.mktemp("authors") / "segclip.bin"
    torch.save(rebuild_weights("pipeline/recipe.json")[0], path)
    return path


def recorder(args):
    """A copy of parsed flags, and the set of those that have been read from it so far."""
    read = set()

    class Recorder(argparse.Namespace):
        def __getattribute__(self, name):
            read.add(name)
            return super().__getattribute__(name)

    return Recorder(**vars(args)), read


TINY = Config(
    image_size=32,
    patch_size=8,
    vision_width=64,
    vision_layers=3,
    embed_dim=16,
    context_length=12,
    vocab_size=600,
    text_width=64,
    text_layers=1,
    first_stage_layers=2,
    num_centers=4,
    cross_layers=1,
    decoder_layers=1,
)


@pytest.fixture
def tiny_clip():
    torch.manual_seed(0)
    return CLIP(TINY)


@pytest.fixture
def dino_state():
    """A DINO of the tiny CLIP's patches and another size, under the names of the published file; weights that all matter."""
    generator, width, shapes = torch.Generator().manual_seed(1), 128, {}
    shapes |= {"cls_token": (1, 1, width), "pos_embed": (1, 1 + 6 * 6, width), "patch_embed.proj.weight": (width, 3, 8, 8)}
    shapes |= {"patch_embed.proj.bias": (width,)}
    sizes = {"attn.qkv": (3 * width, width), "attn.proj": (width, width), "mlp.fc1": (4 * width, width)}
    for i in range(2):
        shapes |= {f"blocks.{i}.norm{n}.{x}": (width,) for n in (1, 2) for x in ("weight", "bias")}
        for name, (rows, columns) in (sizes | {"mlp.fc2": (width, 4 * width)}).items():
            shapes |= {f"blocks.{i}.{name}.weight": (rows, columns), f"blocks.{i}.{name}.bias": (rows,)}
    shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    # Small patches beside small positions, so that LayerNorm's epsilon matters.
    return {name: (0.002 if "embed" in name else 0.1) * torch.randn(x, generator=generator) for name, x in shapes.items()}


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return SegCLIP(TINY)


@pytest.fixture
def batch():
    """Eight pictures and texts for the tiny model, and the noise of a training step."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(8, 3, 32, 32, generator=generator)
    text = torch.randint(1, 599, (8, 12), generator=generator)
    return image, text, SegCLIP(TINY).draw_noise(8, 16, generator)
