"""tests/analyse.py: oracles, the coherence of patch tokens, the comparison."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import analyse
import evaluate
from analyse import Oracles, pairs_of_patches, patch_classes, roc
from conftest import TINY
from data import Sample, SyntheticScenes
from evaluate import Segmentation, Segmenter, load_image
from model import DINO, PACL, DenseCLIP, InputError
from test_evaluate import KINDS, WORDS, Stripes, halves, protocol_for, save_tiny


def run(*arguments):
    return analyse.main([str(x) for x in arguments])


def test_oracles_by_hand():
    """4 x 4 pixels, patches of 2; the left half is class 0 and the right half class 1."""
    label = np.array([[0, 0, 1, 1]] * 4, np.uint8)
    regions = np.array([[0, 0, 0, 1]] * 4)  # the first one has a quarter of the right half
    scores = torch.zeros(3, 4, 4)
    scores[0, :, :2] = 1
    scores[2, :, 2:] = 1  # the right half is class 2, but for one pixel
    scores[1, 0, 2] = 2
    protocol = protocol_for(classes=[["a"], ["b"], ["c"]], top_k=1)
    segmenter = SimpleNamespace(protocol=protocol, patch=2, model=None, text=torch.eye(3))
    segmenter.scale = 1.0
    oracles = Oracles(3, segmenter, None)
    # Correct in three patches of four:
    result = np.array([[0, 0, 0, 1], [0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1]], np.uint8)
    segmentation = Segmentation(result, regions, (4, 4), scores, torch.tensor([[0.0, 5, 1]]))
    oracles.add(Sample(None, label, "", ""), segmentation)
    names_perfect = (8 / 12 + 4 / 8) / 2
    grouping_perfect = (1 + 0 + 0) / 3
    # Then purity, patches, named right, words found, captions, regions.
    expected = [1, names_perfect, grouping_perfect, 12 / 16, 3 / 4, 0.5, 0.5, None, 2]
    assert list(oracles.summary().values()) == pytest.approx(expected)


def test_oracles_of_a_checkpoint(tmp_path):
    metrics = run("--checkpoint", save_tiny(tmp_path / "a.pt"), "--limit", 100)
    assert metrics == json.loads((tmp_path / "analysis.json").read_text())
    found = metrics["analysis"]
    assert 0.5 < found["ceiling"] <= 1 and metrics["mIoU"] < found["names perfect"]
    assert found["captions"] < 0.2


@pytest.mark.parametrize("levels", [2, 5, 10**6])  # few make many ties
def test_the_area_under_the_curve_is_a_count_of_pairs(levels):
    random = np.random.RandomState(levels)
    scores = (random.randint(levels, size=60) / levels).astype(np.float32)
    same = random.rand(60) < 0.3
    ones = scores[same][:, None]
    zeros = scores[~same]
    count = (ones > zeros).sum() + 0.5 * (ones == zeros).sum()
    false, true, area = roc(scores, same)
    assert area == pytest.approx(count / ones.size / zeros.size, abs=1e-12)
    for i, threshold in enumerate(sorted(set(scores), reverse=True), 1):
        assert (false[i], true[i]) == ((zeros >= threshold).mean(), (ones >= threshold).mean())
    assert roc(scores, same | True) is None and roc(scores, same & False) is None


def test_classes_of_patches_by_hand():
    label = np.array([[1, 1, 2, 255], [1, 2, 255, 255], [3, 4, 5, 5], [3, 3, 255, 255]], np.uint8)
    assert patch_classes(label, 2, 2).tolist() == [1, 255, 3, 5]
    # With the stride trick, patches overlap.
    assert patch_classes(label[:3], 2, 1).tolist() == [1, 2, 255, 1, 2, 5]


def test_pairs_of_patches():
    """Tokens that are those of the classes tell everything."""
    image = halves((16, 16))
    # Without a label map, and without a label, they are left out.
    samples = [image, image._replace(label=np.full((16, 16), 255, np.uint8))]
    for shape in [(16, 16), (16, 40), (33, 16), (64, 64)]:
        sample = halves(shape)
        label = np.where(sample.image[..., 0] > 0, 4, 2).astype(np.uint8)
        left = label[:, : shape[1] // 2]
        left[left == 2] = 255
        samples.append(sample._replace(label=label))
    protocol = protocol_for(stride=8)
    images = [load_image(samples, protocol, 4, i) for i in range(len(samples))]
    pairs = pairs_of_patches(Segmenter(Stripes(), WORDS, protocol), images)
    for kind, number in (("within an image", 4000), ("across images", 3000)):
        cosines, same = pairs[kind]
        assert same.shape == (number,) and 0.2 < same.mean() < 0.9
        np.testing.assert_allclose(cosines, np.where(same, 1, 0.6), atol=1e-6)


def test_patch_tokens(tiny, tiny_clip, batch):
    """They are what is grouped, embedded or projected."""
    image = batch[0]
    pacl = PACL(tiny_clip)
    tokens = []
    for model, module in ((tiny.eval(), tiny.group), (pacl, pacl.embedder)):
        module.register_forward_pre_hook(lambda module, inputs: tokens.append(inputs[0]))
        model.encode_image(image)
        assert torch.equal(model.patch_tokens(image), tokens[-1])
    assert torch.equal(DenseCLIP(tiny_clip).patch_tokens(image), tokens[-1])
    dino = DINO(TINY).eval()
    assert torch.equal(PACL(tiny_clip, dino).patch_tokens(image), dino(image)[:, 1:])
    maskclip = DenseCLIP(tiny_clip, "maskclip")
    projected = tiny_clip.visual.project(maskclip.patch_tokens(image))
    assert torch.equal(projected, maskclip.encode_image(image).regions)


@pytest.mark.parametrize("kind", KINDS)
def test_coherence_of_a_checkpoint(kind, tmp_path, capsys):
    path = save_tiny(tmp_path / "a.pt", kind)
    flags = ("--coherence", "--checkpoint", path, "--limit", 20, "--workers", 0)
    areas = []
    for changes in ((), ("--stride-trick", 2)):
        run(*flags, *changes)
        _, *lines = capsys.readouterr().out.splitlines()
        areas.append([float(line.split()[-1]) for line in lines])
    assert len(areas[0]) == 3 and all(0.55 < area < 1 for area in areas[0])
    assert areas[0] != areas[1]
    assert Image.open(tmp_path / "roc.png").width > 400


def test_coherence_needs_label_maps_with_two_classes(tmp_path, capsys):
    flags = ["--coherence", "--images", tmp_path / "images", "--words", "cat, dog"]
    flags += ["--checkpoint", save_tiny(tmp_path / "a.pt"), "--output", tmp_path / "o"]
    with pytest.raises(InputError, match="label maps"):
        run(*flags)
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (40, 30), "red").save(tmp_path / "images/a.png")
    flags += ["--labels-dir", tmp_path / "labels", "--workers", 0]
    for value in (1, 255):  # 255 is not scored
        Image.new("L", (40, 30), value).save(tmp_path / "labels/a.png")
        run(*flags)
        assert "curve, all pairs: -" in capsys.readouterr().out
    with pytest.raises(InputError, match="needs windows"):
        run(*flags, "--window", 0)


def test_comparison(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ("--compare", "--limit", 5, "--workers", 0)
    with pytest.raises(InputError, match="no model"):
        run(*flags)
    save_tiny(tmp_path / "runs/clip/checkpoint.pt", "clip")
    save_tiny(tmp_path / "runs/synthetic/checkpoint.pt")
    save_tiny(tmp_path / "runs/pacl/checkpoint.pt", "pacl")
    run(*flags)
    printed = capsys.readouterr()
    assert "python train.py --method groupvit" in printed.err
    head, rule, *rows = printed.out.splitlines()
    present = [name for name in analyse.COMPARED if name != "GroupViT"]
    assert [row.split("|")[1].strip() for row in rows] == present
    assert Image.open(tmp_path / "runs/compare/examples.png").width >= (2 + len(present)) * 120
    assert {row.count("|") for row in (head, rule, *rows)} == {13}
    assert len({row.split("|")[2] for row in rows}) > 3  # each read-out has its own score


def test_figure_of_a_comparison(tmp_path, monkeypatch):
    """In each column of a method is what evaluate.py labels with its checkpoint and read-out."""
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "runs/clip/checkpoint.pt", "clip")
    drawn = []
    monkeypatch.setattr(evaluate, "draw_examples", lambda *args, **_: drawn.extend(args[:2]))
    run("--compare", "--limit", 5, "--workers", 0)
    examples, columns = drawn
    assert list(columns)[:4] == ["image", "ground truth", "CLIP", "MaskCLIP"]
    assert len(examples) == 4 and {len(example) for example in examples} == {len(columns)}
    scenes = SyntheticScenes(TINY.image_size, split="val")
    for i, example in enumerate(examples):
        assert (example[0] == scenes[i].image).all() and (example[1] == scenes[i].label).all()
    flags = "--checkpoint runs/clip/checkpoint.pt --limit 4 --workers 0 --device cpu".split()
    for column, readout in ((2, "clip"), (3, "maskclip")):
        evaluate.main([*flags, "--readout", readout, "--output", readout])
        for i, example in enumerate(examples):
            label = np.asarray(Image.open(f"{readout}/predictions/scene{i:05}.png"))
            assert (example[column] == label).all()
