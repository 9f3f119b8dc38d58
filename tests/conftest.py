"""What several test files need: recorded outputs of other programs, small models."""

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
    """The weights of a recorded program, from the seed and the parameters in its JSON file."""
    recipe = json.loads((GOLDEN / recipe).read_text())
    random = np.random.RandomState(recipe["seed"])
    weights = {}
    for name, shape, mean, std in recipe["params"]:
        weights[name] = np.float32(mean + std * np.float32(random.standard_normal(shape)))
    weights |= {name: np.float32(values) for name, values in recipe.get("overrides", {}).items()}
    return {name: torch.from_numpy(np.asarray(values)) for name, values in weights.items()}, recipe


def recorded(file):
    arrays = np.load(GOLDEN / file).items()
    return {name: torch.from_numpy(a) for name, a in arrays if a.dtype.kind != "U"}


def assert_close(ours, theirs, name, tolerance=1e-4):
    """Largest difference relative to the largest value; `pytest -s` prints it."""
    assert ours.shape == theirs.shape
    difference = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    print(f"{name:>50}: off by {difference:.1e}")
    assert difference <= tolerance, name


def assert_one_line(error, *parts):
    """The message of a caught InputError is one line, and contains these parts."""
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message


@pytest.fixture(scope="session")
def vocabulary():
    """The path of OpenAI's vocabulary (not in the repository): in the cache, or in shared/."""
    sha256, file, urls = clip_loader.DOWNLOADS[clip_loader.VOCABULARY]
    beside = Path(__file__).resolve().parents[2] / "shared" / "clip"
    for path in (clip_loader.cache_dir() / file, beside / file):
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
            return path
    pytest.skip(
        f"needs OpenAI's vocabulary: get {urls[0]} and put it into {clip_loader.cache_dir()}"
    )


@pytest.fixture(scope="session")
def authors_checkpoint(tmp_path_factory):
    """A file in the format of the authors' segclip.bin, with the recorded pipeline's weights."""
    path = tmp_path_factory.mktemp("authors") / "segclip.bin"
    torch.save(rebuild_weights("pipeline/recipe.json")[0], path)
    return path


def recorder(args):
    """A copy of parsed flags, and the set of the flags that were read from it so far."""
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
    """Weights of a DINO with TINY's patch size and another width, named as the published ones."""
    D = 128
    block = {
        "norm1": (D,),
        "attn.qkv": (3 * D, D),
        "attn.proj": (D, D),
        "norm2": (D,),
        "mlp.fc1": (4 * D, D),
        "mlp.fc2": (D, 4 * D),
    }
    layers = {"patch_embed.proj": (D, 3, 8, 8), "norm": (D,)}
    for i in range(2):
        layers |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    shapes = {"cls_token": (1, 1, D), "pos_embed": (1, 1 + 6 * 6, D)}
    for name, shape in layers.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    generator = torch.Generator().manual_seed(1)
    state = {name: 0.1 * torch.randn(x, generator=generator) for name, x in shapes.items()}
    for name in shapes:
        if "embed" in name:
            state[name] /= 50  # patches and positions so small that LayerNorm's epsilon matters
    return state


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return SegCLIP(TINY)


@pytest.fixture
def batch():
    """Eight images and texts for the tiny model, and the noise of a training step."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(8, 3, 32, 32, generator=generator)
    text = torch.randint(1, 599, (8, 12), generator=generator)
    return image, text, SegCLIP(TINY).draw_noise(8, 16, generator)
