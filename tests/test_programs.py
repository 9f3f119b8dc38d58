"""The programs of tests/: by hand, and from start to end on tiny sizes."""

import dataclasses
import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY

import ablate
import analyse
import photographs
import train
from clip_loader import Tokenizer, save_checkpoint
from data import Sample, SyntheticScenes, open_folder, open_pairs
from evaluate import Segmentation
from model import CLIP, PACL, DenseCLIP, GroupViT, SegCLIP


def test_oracles_by_hand():
    """4 x 4 pixels, patches of 2; the left half is class 0 and the right half class 1."""
    label = np.array([[0, 0, 1, 1]] * 4, np.uint8)
    regions = np.array([[0, 0, 0, 1]] * 4)
    result = np.array([[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1]], np.uint8)
    results = [(label, Segmentation(result, regions, torch.zeros(2, 4, 4), None))]
    expected = {
        "mIoU": (8 / 11 + 5 / 8) / 2,
        "patches named": 1,
        "regions named": (8 / 12 + 4 / 8) / 2,
        "purity": 12 / 16,
        "patches": 3 / 4,
        "regions": 2,
    }
    assert analyse.oracles(results, 2, 2) == pytest.approx(expected)


@pytest.mark.parametrize("b, area", [([0.0, 1], 1), ([1.0, 0], 0.5)])
def test_coherence_by_hand(b, area):
    """Tokens that tell the classes, or are all the same. Patches of 255 are left out."""
    a = [1.0, 0]
    tokens = torch.tensor([[a, b, a], [a, b, b]]).view(1, 6, 2)
    label = np.full((8, 12), 255, np.uint8)
    label[4:, :4] = 3
    label[4:, 4:] = 7
    clip = SimpleNamespace(logit_scale=torch.zeros(()))
    model = SimpleNamespace(visual=SimpleNamespace(patch_size=4), clip=clip)
    model.patch_tokens = lambda image: tokens
    sample = Sample(np.zeros((8, 12, 3), np.uint8), label, "")
    assert analyse.coherence(model, [sample], 8) == area


def test_ablations(tmp_path, monkeypatch, capsys):
    """Commands have known flags and find their models, and the table has means and deviations."""
    ran = []

    def start(command, **_):
        _, program, *flags = map(str, command)
        if program.endswith("train.py"):
            args, _ = train.parse_args(flags)
            assert args.init == "none" or Path(args.init).exists()
            Path(args.output, "checkpoint.pt").touch()
        else:
            args = analyse.parse_args(flags)
            assert Path(args.checkpoint).exists()
            output = Path(args.output)
            metrics = dict.fromkeys(ablate.COLUMNS, 0.5 + int(output.name) / 10)
            (output / "analysis.json").write_text(json.dumps(metrics))
        ran.append(program)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(ablate.subprocess, "run", start)
    for _ in range(2):  # the second time all is done
        ablate.main(["--seeds", "2", "--output", str(tmp_path)])
    trained = sum(row[1] is not None for row in ablate.ROWS.values())
    assert len(ran) == 2 * (trained + len(ablate.ROWS))
    row = "| `maskclip` | 55.0 ± 7.1 | 55.0 | 55.0 | 55.0 | 43.4 |"
    assert row in capsys.readouterr().out


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a small model of each kind in runs/."""
    folder = tmp_path_factory.mktemp("programs")
    captions = [SyntheticScenes(32)[i].caption for i in range(50)]
    merges = Tokenizer.learn(captions, TINY.vocab_size - Tokenizer().vocab_size).merges
    config = dataclasses.replace(TINY, stages=1, group_tokens=5, projector_width=16)
    models = {"clip": DenseCLIP(CLIP(TINY)), "groupvit": GroupViT(config)}
    models |= {"pacl": PACL(CLIP(TINY)), "segclip": SegCLIP(TINY)}
    for name, model in models.items():
        save_checkpoint(folder / f"runs/small-{name}/checkpoint.pt", model, merges=merges)
    return folder


COMMANDS = {  # what of their output says that they came to the end
    "analyse --limit 5": "regions per image",
    "analyse --limit 5 --coherence": "area under the ROC curve",
    "benchmark train --smoke": "train.py, bf16",
    "benchmark evaluate --smoke": "equal pixels: 100.0000 %",
    "benchmark loader --smoke": "pairs with superpixels",
    "benchmark pacl --smoke": "pacl_loss",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_program(command, runs, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    program, *flags = command.split()
    threads = torch.get_num_threads()
    importlib.import_module(program).main(flags)  # a process would import torch first
    torch.set_num_threads(threads)
    assert COMMANDS[command] in capsys.readouterr().out


def test_photographs_are_read(tmp_path):
    photographs.main(["--images", "10", "--output", str(tmp_path)])
    (pairs,) = open_pairs([str(tmp_path / "train.tsv")], 64, seed=0)
    assert len(pairs) == 10 and pairs[9].caption == SyntheticScenes(120)[9].caption
    (sample,) = open_folder(tmp_path / "val", tmp_path / "labels", SyntheticScenes.words)
    assert sample.label.shape == sample.image.shape[:2]
