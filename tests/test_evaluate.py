"""From scores to label maps, the metric, and the program with good and bad input."""

import argparse
import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import evaluate
from clip_loader import InputError, Tokenizer, load_model, load_segclip, load_tokenizer, save_checkpoint
from conftest import GOLDEN, TINY, recorder
from data import BENCHMARKS, VOC, Sample, SyntheticScenes, normalise, resize_bilinear, voc_palette
from evaluate import (
    Analysis,
    Result,
    Score,
    Segmenter,
    Settings,
    add_background,
    best_word,
    centre,
    dense_labels,
    heat,
    overlay,
    pairs_of_patches,
    pamr,
    patch_classes,
    picture_scores,
    pixel_regions,
    pixel_scores,
    region_scores,
    resized,
    roc,
    upsample,
    window_starts,
    with_legend,
    word_colours,
)
from model import CLIP, DINO, PACL, DenseCLIP, ImageEncoding, OnCLIP, SegCLIP

# ---------------------------------------------------------------------------------------------------------------------
# Windows


@pytest.mark.parametrize(
    "size, seen",  # (height, width), as mmsegmentation resizes to (2048, 224)
    [
        ((375, 500), (224, 299)),
        ((480, 640), (224, 299)),
        ((427, 640), (224, 336)),
        ((1024, 2048), (224, 448)),
        ((224, 224), (224, 224)),
        ((1, 1), (224, 224)),
        ((50, 500), (224, 2048)),  # mmsegmentation: 205, less than a window, on which the authors' program stops
        ((1000, 50), (2048, 224)),
    ],
)
def test_size_at_which_a_picture_is_seen(size, seen):
    assert resized(*size, 224, 224) == seen


def test_windows_cover_everything_and_stay_inside():
    assert window_starts(224, 224, 224) == [0]
    assert window_starts(299, 224, 224) == [0, 75]
    assert window_starts(336, 224, 224) == [0, 112]
    assert window_starts(448, 224, 224) == [0, 224]
    assert window_starts(449, 224, 224) == [0, 224, 225]
    assert window_starts(336, 224, 112) == [0, 112]
    assert window_starts(448, 224, 112) == [0, 112, 224]
    assert window_starts(450, 224, 112) == [0, 112, 224, 226]


# ---------------------------------------------------------------------------------------------------------------------
# Scores, by hand: two words at right angles, one region that is the first word, one half way between them

WORDS = torch.eye(2)
SCALE = math.log(3)  # the softmax of (1, 0) times this is (3/4, 1/4)


def encoding_by_hand():
    regions = torch.tensor([[[2.0, 0.0], [5.0, 5.0]]])  # [B=1, L=2, E=2]; lengths do not count
    soft = torch.tensor([[[0.9, 0.1], [0.2, 0.8], [0.8, 0.2], [0.1, 0.9]]])  # [1, N=2x2, 2]: left and right
    return ImageEncoding(torch.tensor([[3.0, 0.0]]), regions, None, soft)


def test_region_scores_by_hand():
    scores = region_scores(encoding_by_hand(), WORDS, SCALE)
    assert torch.allclose(scores, torch.tensor([[[9 / 16, 1 / 16], [1 / 4, 1 / 4]]]))
    # The one best word of the image is the first: the second softmax is over it alone.
    scores = region_scores(encoding_by_hand(), WORDS, SCALE, top_k=1)
    assert torch.allclose(scores, torch.tensor([[[3 / 4, 0], [1 / 2, 0]]]))


def test_pixel_regions_by_hand():
    assert pixel_regions(encoding_by_hand(), (4, 4), (2, 2), 2, 2).tolist() == [[[0, 0, 1, 1]] * 4]


def test_pixels_of_patches_by_hand():
    """Where each patch is a region of its own, scores are interpolated between them."""
    encoding = encoding_by_hand()._replace(regions=torch.zeros(1, 4, 2), hard=None, soft=None)
    regions = pixel_regions(encoding, (4, 4), (2, 2), 2, 2)
    assert regions.tolist() == [[[0, 0, 1, 1]] * 2 + [[2, 2, 3, 3]] * 2]
    scores = torch.tensor([[0.0, 4.0], [1.0, 4.0], [0.0, 4.0], [1.0, 4.0]])  # [L, channels]
    assert pixel_scores(scores, regions[0]).tolist() == [[[0.0, 0.0, 1.0, 1.0]] * 4, [[4.0] * 4] * 4]
    between = upsample(scores.T.view(1, 2, 2, 2), (4, 4), 2, 2)[0]
    assert between.tolist() == [[[0.0, 0.25, 0.75, 1.0]] * 4, [[4.0] * 4] * 4]


def test_the_map_of_the_stride_trick_lies_where_its_patches_lie():
    """Patches of 16 at a stride of 4, in an image of 224: the center of the k-th is at 7.5 + 4 k."""
    position = torch.arange(224.0)
    for k in range(53):
        column = upsample(F.one_hot(torch.tensor(k), 53).float().view(1, 1, 1, 53).expand(-1, -1, 53, -1), (224, 224), 16, 4)
        row = column[0, 0, 100]
        assert torch.equal(column[0, 0], row.expand(224, 224))
        assert (row[:6] == row[5]).all() and (row[-6:] == row[-6]).all()  # the margin repeats the outermost patch,
        row = torch.cat([torch.zeros(6), row[6:-6], torch.zeros(6)])  # which has no center there
        assert abs((row * position).sum() / row.sum() - (7.5 + 4 * k)) < 0.5, k
        encoding = encoding_by_hand()._replace(regions=torch.zeros(1, 53 * 53, 2), hard=None, soft=None)
    regions = pixel_regions(encoding, (224, 224), (53, 53), 16, 4)[0]
    nearest = ((position - 7.5) / 4).round().clamp(0, 52).long()
    assert torch.equal(regions, nearest[:, None] * 53 + nearest)


@pytest.mark.parametrize(
    "threshold, background",
    [(0.2, (0, 0)), (0.4, (0, 1)), (0.9, (0, 1))],  # of the two regions; the best score, 9/16, is never background
)
def test_background_by_hand(threshold, background):
    scores = region_scores(encoding_by_hand(), WORDS, SCALE)
    result = add_background(scores, threshold)
    assert result[0, :, 0].tolist() == list(background)
    assert torch.equal(result[..., 1:], scores)


def test_a_class_is_where_its_best_word_is():
    scores = torch.tensor([[0.1, 0.5, 0.2], [0.3, 0.0, 0.6]])  # two places, three words
    owner = torch.tensor([0, 1, 0])
    assert best_word(scores, owner, 2).tolist() == torch.tensor([[0.2, 0.5], [0.6, 0.0]]).tolist()


def settings_for(size=16, **changes):
    defaults = dict(classes=[["a"], ["b"]], templates=1, short_side=size, window=size, stride=size, top_k=5)
    others = dict(protocol="", scoring="regions", logit_scale=None, background_threshold=None, area_threshold=None)
    return Settings(**(defaults | others | changes))


def test_dense_labels_by_hand():
    """Three classes, the first two words of which are the background's; four pixels in a row."""
    cosines = torch.log(torch.tensor([[1, 2, 2, 1], [1, 3, 1, 1], [1, 1, 6, 7], [1, 4, 1, 1]]) / 10)[:, None]
    owner = torch.tensor([0, 0, 1, 2])
    s = settings_for(scoring="cosines", classes=[["x", "y"], ["a"], ["b"]], logit_scale=1.0)
    scores, label = dense_labels(cosines, owner, s)
    expected = torch.tensor([[0.25, 0.3, 0.2, 0.1], [0.25, 0.1, 0.6, 0.7], [0.25, 0.4, 0.1, 0.1]])
    assert torch.allclose(scores[:, 0], expected)
    assert label.tolist() == [[0, 2, 1, 1]]
    _, label = dense_labels(
        cosines, owner, settings_for(scoring="cosines", classes=s.classes, logit_scale=1.0, background_threshold=0.5)
    )
    assert label.tolist() == [[0, 0, 1, 1]]
    # Of three foreground pixels, one is the last class: less than 0.4 of them.
    s = settings_for(scoring="cosines", classes=s.classes, logit_scale=1.0, area_threshold=0.4)
    assert dense_labels(cosines, owner, s)[1].tolist() == [[0, 0, 1, 1]]


def test_background_by_entropy_by_hand():
    """Two classes, the first of two words; four pixels: sure of the first, by either word or both; half of each."""
    p = torch.tensor([[0.8, 0.8, 0.1, 0.5], [0.1, 0.8, 0.8, 0.1], [0.2, 0.2, 0.2, 0.5]])  # of a class by its best word
    cosines, owner = (p.log() / 10)[:, None], torch.tensor([0, 0, 1])
    nats = -(0.8 * math.log(0.8) + 0.2 * math.log(0.2))  # 0.5004, and ln 2 = 0.6931
    dense = dict(scoring="cosines", classes=[["x", "y"], ["a"]], logit_scale=10.0)
    for threshold, expected in ((nats + 1e-4, [1, 1, 1, 0]), (nats - 1e-4, [0] * 4), (math.log(2) + 1e-4, [1, 1, 1, 1])):
        scores, label = dense_labels(cosines, owner, settings_for(**dense, background_entropy=threshold))
        assert label.tolist() == [expected] and scores.shape == (3, 1, 4)
        assert (scores[0, 0] == (torch.tensor(expected) == 0)).all()
    # Background is no part of the foreground, of which the second class has less than 0.4.
    p = torch.tensor([[0.8, 0.5, 0.8, 0.2, 0.5, 0.5], [0.2, 0.5, 0.2, 0.8, 0.5, 0.5]])
    s = settings_for(scoring="cosines", logit_scale=1.0, background_entropy=0.6, area_threshold=0.4)
    assert dense_labels(p.log()[:, None], torch.arange(2), s)[1].tolist() == [[1, 0, 1, 1, 0, 0]]


@pytest.mark.parametrize("scoring", ["regions", "cosines"])
def test_background_by_entropy_for_both_scores(scoring):
    """Regions along the words, one of which is further away: entropies of softmax((s, 0)) and softmax((s / 2, 0))."""

    class Shades(Stripes):
        def encode_image(self, image):
            encoding = super().encode_image(image)
            regions = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.5, 0.75**0.5]])
            return encoding._replace(regions=regions.expand(len(image), 2, 3), features=torch.ones(len(image), 3))

    s = math.exp(3)  # the learned scale of Stripes

    def nats(x):
        p = 1 / (1 + math.exp(-x))
        return -p * math.log(p) - (1 - p) * math.log(1 - p)

    found = {}
    for threshold in (nats(s) / 2, (nats(s) + nats(s / 2)) / 2, nats(s / 2) * 2):
        settings = settings_for(scoring=scoring, logit_scale=s, background_entropy=threshold)
        segmenter = Segmenter(Shades(), torch.eye(3)[:2], torch.arange(2), settings)
        [(_, result)] = segmenter([seen(halves((16, 16)), settings)])
        assert result.scores.shape == (3, 16, 16)
        found[threshold] = [np.unique(half).tolist() for half in (result.label[:, :8], result.label[:, 8:])]
    assert list(found.values()) == [[[0], [0]], [[1], [0]], [[1], [2]]]


class Stripes(OnCLIP):
    """Stands in for a SegCLIP: bright patches go to the first center and are the first word, dark ones to the second."""

    config = dataclasses.replace(TINY, image_size=16, patch_size=4, num_centers=2)

    def __init__(self):
        super().__init__(CLIP(self.config))
        torch.nn.init.constant_(self.clip.logit_scale, 3.0)

    def encode_image(self, image):
        bright = torch.nn.functional.avg_pool2d(image.mean(dim=1), 4).flatten(1)[..., None].sigmoid()
        regions = torch.eye(2).expand(len(image), 2, 2)
        soft = torch.cat([bright, 1 - bright], dim=-1)
        return ImageEncoding(torch.ones(len(image), 2), regions, soft.round(), soft)

    def patch_tokens(self, image):
        """Of all the bright patches the same, and of all the dark ones, at an angle whose cosine is 0.6."""
        bright = torch.nn.functional.avg_pool2d(image.mean(dim=1), 4).flatten(1) > 0
        return torch.where(bright[..., None], torch.tensor([2.0, 0.0]), torch.tensor([0.6, 0.8]))


def halves(shape):
    picture = np.zeros((*shape, 3), np.uint8)
    tall = shape[0] > shape[1]
    (picture[: shape[0] // 2] if tall else picture[:, : shape[1] // 2])[...] = 255
    return Sample(picture, None, "halves")


def seen(sample, settings):
    height, width = resized(*sample.picture.shape[:2], settings.short_side, settings.window or 4)
    return sample, resize_bilinear(sample.picture, height, width)


@pytest.mark.parametrize("shape", [(16, 16), (32, 90), (100, 40), (16, 320), (320, 16)])
@pytest.mark.parametrize("scoring", ["regions", "cosines", "whole regions", "whole cosines"])
def test_windows_are_put_back_where_they_came_from(shape, scoring):
    """A bright half and a dark half, whatever the size: each is labelled to within a patch of the border."""
    whole, scoring = scoring.startswith("whole"), scoring.split()[-1]
    settings = settings_for(scoring=scoring, logit_scale=40, stride=8 if scoring == "cosines" else 16)
    settings.window *= not whole
    segmenter = Segmenter(Stripes(), WORDS, torch.arange(2), settings)
    [(_, (label, regions, size, scores, _))] = segmenter([seen(halves(shape), settings)])
    assert label.shape == shape and min(size) == 16 and scores.shape == (2, *shape)
    assert regions.shape == (shape if whole else size)
    label = label if shape[0] > shape[1] else label.T
    half, border = len(label) // 2, -(-4 * min(shape) // 16)
    assert (label[: half - border] == 0).all() and (label[half + border :] == 1).all()


def test_batches_of_windows_change_nothing():
    settings = settings_for()
    pictures = [seen(halves(shape), settings) for shape in [(16, 16), (32, 90), (100, 40), (16, 99)]]
    results = []
    for batch_size in (1, 3, 100):
        segmenter = Segmenter(Stripes(), WORDS, torch.arange(2), settings, batch_size)
        results.append([(result.label.tolist(), result.regions.tolist()) for _, result in segmenter(pictures)])
    assert results[0] == results[1] == results[2]


def test_refinement_by_hand():
    torch.manual_seed(0)
    picture, scores = 255 * torch.rand(3, 5, 6), torch.rand(2, 5, 6)
    refined = pamr(scores, picture, iterations=2, dilations=(1, 2))

    def at(x, row, column):  # beyond the border, the pixel at the border
        return x[:, min(max(row, 0), 4), min(max(column, 0), 5)]

    expected = scores
    for _ in range(2):
        before, expected = expected, torch.empty_like(scores)
        for row in range(5):
            for column in range(6):
                places = [(row + d * y, column + d * x) for d in (1, 2) for y in (-1, 0, 1) for x in (-1, 0, 1)]
                deviation = torch.stack([at(picture, *place) for place in places]).std(dim=0)
                here, total, weights = at(picture, row, column), torch.zeros(2), 0
                for place in places:
                    if place != (row, column):
                        weight = (-((at(picture, *place) - here).abs() / (0.1 * deviation)).mean()).exp()
                        total, weights = total + weight * at(before, *place), weights + weight
                expected[:, row, column] = total / weights
    torch.testing.assert_close(refined, expected)
    flat = pamr(scores, torch.zeros(3, 5, 6), iterations=1, dilations=(1,))  # all colours alike: the mean of the eight
    torch.testing.assert_close(flat[:, 2, 2], (scores[:, 1:4, 1:4].sum(dim=(1, 2)) - scores[:, 2, 2]) / 8)


# ---------------------------------------------------------------------------------------------------------------------
# The metric


def test_metric_by_hand():
    score = Score(4)
    label = np.array([0, 0, 0, 1, 1, 255, 9], np.uint8)  # 255 is not scored; 9 is no class
    score.add(np.array([0, 0, 1, 1, 2, 0, 2], np.uint8), label)
    score.add(np.array([0], np.uint8), np.array([1], np.uint8))
    # class 0: right 2, predicted 3, labelled 3; class 1: right 1, predicted 2, labelled 3; class 2: predicted twice, where
    # there is a 1 and where there is no class; class 3: neither predicted nor labelled.
    np.testing.assert_allclose(score.iou(), [2 / 4, 1 / 4, 0, np.nan])
    np.testing.assert_allclose(score.accuracy(), [2 / 3, 1 / 3, np.nan, np.nan])
    assert score.summary() == pytest.approx({"mIoU": 0.25, "mAcc": 0.5, "aAcc": 3 / 6})


def test_metric_of_nothing():
    score = Score(2)
    score.add(np.zeros(3, np.uint8), np.full(3, 255, np.uint8))
    assert score.summary() == {"mIoU": 0, "mAcc": 0, "aAcc": 0}


# ---------------------------------------------------------------------------------------------------------------------
# Semantic coherence


@pytest.mark.parametrize("levels", [2, 5, 10**6])  # few make many ties
def test_the_area_under_the_curve_is_a_count_of_pairs(levels):
    random = np.random.RandomState(levels)
    scores, same = (random.randint(levels, size=60) / levels).astype(np.float32), random.rand(60) < 0.3
    ones, zeros = scores[same][:, None], scores[~same]
    count = (ones > zeros).sum() + 0.5 * (ones == zeros).sum()
    false, true, area = roc(scores, same)
    assert area == pytest.approx(count / ones.size / zeros.size, abs=1e-12)
    assert area == pytest.approx(np.trapezoid(true, false) if hasattr(np, "trapezoid") else np.trapz(true, false))
    for threshold in np.unique(scores):
        place = np.unique(-scores).tolist().index(-threshold) + 1
        assert (false[place], true[place]) == ((zeros >= threshold).mean(), (ones >= threshold).mean())
    assert roc(scores, same | True) is None and roc(scores, same & False) is None
    assert roc(np.array([3.0, 2, 1]), np.array([1, 0, 0]))[2] == 1 and roc(np.ones(4), np.array([1, 0, 1, 0]))[2] == 0.5


def test_classes_of_patches_by_hand():
    label = np.array([[1, 1, 2, 255, 7], [1, 2, 255, 255, 7], [3, 4, 5, 5, 7], [3, 3, 255, 255, 7]], np.uint8)
    assert patch_classes(label[:, :4], 2, 2).tolist() == [1, 255, 3, 5]
    assert patch_classes(label[:3, :4], 2, 1).tolist() == [1, 2, 255, 1, 2, 5]  # patches overlap: the stride trick


def test_pairs_of_patches():
    """Tokens that are those of the classes tell everything, and no batch size changes what is drawn."""
    settings, pairs = settings_for(stride=8), []
    pictures = []
    for shape in [(16, 16), (16, 40), (33, 16), (64, 64)]:
        sample = halves(shape)
        label = np.where(sample.picture[..., 0] > 0, 4, 2).astype(np.uint8)
        label[:, : shape[1] // 2][label[:, : shape[1] // 2] == 2] = 255
        pictures.append(seen(sample._replace(label=label), settings))
    pictures.insert(1, seen(halves((16, 16)), settings))  # without a label map: not there
    nowhere = np.full((16, 16), 255, np.uint8)
    pictures.insert(2, seen(halves((16, 16))._replace(label=nowhere), settings))
    for batch_size in (1, 3, 100):
        pairs.append(pairs_of_patches(Segmenter(Stripes(), WORDS, torch.arange(2), settings, batch_size), pictures))
    for kind, number in (("within a picture", 4000), ("across pictures", 3000)):
        cosines, same = pairs[0][kind]
        assert same.shape == (number,) and 0.2 < same.mean() < 0.9
        np.testing.assert_allclose(cosines, np.where(same, 1, 0.6), atol=1e-6)
        assert all((other[kind] == pairs[0][kind]).all() for other in pairs[1:])


def test_tokens_before_the_texts(tiny, tiny_clip, batch):
    image, tokens = batch[0], []
    tiny.eval().group.register_forward_pre_hook(lambda module, inputs: tokens.append(inputs[0]))
    tiny.encode_image(image)
    assert torch.equal(tiny.patch_tokens(image), tokens[0])
    pacl = PACL(tiny_clip)
    pacl.embedder.register_forward_pre_hook(lambda module, inputs: tokens.append(inputs[0]))
    pacl.encode_image(image)
    assert torch.equal(pacl.patch_tokens(image), tokens[1])
    assert torch.equal(DenseCLIP(tiny_clip).patch_tokens(image), tokens[1])
    dino = DINO(TINY).eval()
    assert torch.equal(PACL(tiny_clip, dino).patch_tokens(image), dino(image)[:, 1:])
    maskclip = DenseCLIP(tiny_clip, "maskclip")
    assert torch.equal(tiny_clip.visual.project(maskclip.patch_tokens(image)), maskclip.encode_image(image).regions)


# ---------------------------------------------------------------------------------------------------------------------
# The program

ODD_PICTURES = {
    "grey": Image.new("L", (40, 30), 99),
    "cmyk": Image.new("CMYK", (40, 30), (0, 99, 0, 0)),
    "one_pixel": Image.new("RGB", (1, 1)),
    "wide": Image.new("RGB", (400, 20), "red"),
    "tall": Image.new("RGB", (3, 60), "red"),
    "palette": Image.new("RGB", (40, 30), "green").quantize(2),
    "sixteen_bit": Image.fromarray(np.full((30, 40), 30000, np.uint16)),
    "transparent": Image.new("RGBA", (40, 30), (9, 9, 9, 0)),
    "rotated": Image.new("RGB", (40, 30), "blue"),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "checkpoint.pt"
    texts = [f"a photo of a {word}." for word in VOC] + [SyntheticScenes(32)[i].caption for i in range(50)]
    tokenizer = Tokenizer.learn(texts, TINY.vocab_size - Tokenizer().vocab_size)
    torch.manual_seed(0)
    save_checkpoint(path, SegCLIP(TINY), merges=tokenizer.merges)
    return path


@pytest.fixture
def of_kind(tmp_path, checkpoint):
    """Small checkpoints with the same vocabulary, by name."""

    def save(kind):
        torch.manual_seed(0)
        model = {"segclip": SegCLIP, "clip": lambda config: DenseCLIP(CLIP(config)), "pacl": lambda c: PACL(CLIP(c))}[kind](
            TINY
        )
        save_checkpoint(tmp_path / f"{kind}.pt", model, merges=load_tokenizer(checkpoint).merges)
        return tmp_path / f"{kind}.pt"

    return save


@pytest.fixture
def voc(tmp_path):
    """A folder in VOC layout, with pictures as people have them."""
    root = tmp_path / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    (root / "ImageSets/Segmentation/val.txt").write_text("\n".join(ODD_PICTURES) + "\n")
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter
    for name, image in ODD_PICTURES.items():
        kind = "JPEG" if image.mode in ("L", "CMYK", "RGB") else "PNG"  # named .jpg all the same
        image.save(root / f"JPEGImages/{name}.jpg", kind, **({"exif": exif} if name == "rotated" else {}))
        size = image.size[::-1] if name == "rotated" else image.size
        Image.new("L", size, 3).save(root / f"SegmentationClass/{name}.png")
    return root


def run(*arguments):
    evaluate.main([str(x) for x in arguments])


def run_as_one_and_as_two(arguments, folder):
    """With one process and with two, which must find the same -> what the two printed."""
    run(*arguments, "--output", folder / "one")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", evaluate.__file__]
    done = subprocess.run(
        [*command, *arguments, "--output", str(folder / "two")], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert (folder / "one/metrics.json").read_text() == (folder / "two/metrics.json").read_text()
    return done


def test_a_folder_in_voc_layout(voc, checkpoint, tmp_path, capsys):
    run("--dataset", "pascal_voc", "--data-root", voc, "--checkpoint", checkpoint, "--output", tmp_path / "out")
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics["pictures"] == len(ODD_PICTURES)
    assert list(metrics["IoU"]) == ["background", *VOC]
    values = [value for value in metrics["IoU"].values() if value is not None]
    assert metrics["mIoU"] == pytest.approx(sum(values) / len(values))
    assert f"mIoU {100 * metrics['mIoU']:.2f} %" in capsys.readouterr().out
    for name, image in ODD_PICTURES.items():
        prediction = Image.open(tmp_path / f"out/predictions/{name}.png")
        assert prediction.size == (image.size[::-1] if name == "rotated" else image.size)
        assert prediction.mode == "P" and prediction.getpalette()[:63] == voc_palette().ravel().tolist()[:63]
    assert Image.open(tmp_path / "out/examples.png").width > 400


def test_what_an_analysis_finds_in_a_picture():
    """Worked out by hand: 4 x 4 pixels, patches of 2, the left half is class 0 and the right half class 1."""
    label = np.array([[0, 0, 1, 1]] * 4, np.uint8)
    regions = np.array([[0, 0, 0, 1]] * 4)  # the first region takes a quarter of the right half
    scores = torch.zeros(3, 4, 4)
    scores[0, :, :2], scores[2, :, 2:], scores[1, 0, 2] = 1, 1, 2  # the right half is 2, but for one pixel
    settings = Settings("segclip", "regions", [["a"], ["b"], ["c"]], 1, 4, 4, 4, top_k=1)
    model = argparse.Namespace(config=dataclasses.replace(TINY, patch_size=2))
    segmenter = argparse.Namespace(model=model, text=torch.eye(3), owner=torch.arange(3), settings=settings)
    analysis = Analysis(3, segmenter, None)
    result = np.array([[0, 0, 0, 1], [0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1]], np.uint8)  # right in three patches of four
    analysis.add(Sample(None, label, "", ""), Result(result, regions, (4, 4), scores, torch.tensor([[0.0, 5, 1]])))
    ceiling, grouped, named, purity, patches, right, found, captions, number = analysis.summary().values()
    assert ceiling == 1
    assert grouped == pytest.approx((8 / 12 + 4 / 8) / 2) and purity == 12 / 16 and patches == 3 / 4
    assert named == pytest.approx((1 + 0 + 0) / 3) and right == 0.5
    assert found == 0.5 and captions is None and number == 2


def test_analysis_of_a_checkpoint(checkpoint, tmp_path, capsys):
    flags = ("--checkpoint", checkpoint, "--limit", 100, "--output", tmp_path, "--batch-size", 50)
    run(*flags)
    plain = json.loads((tmp_path / "metrics.json").read_text())
    run(*flags, "--analyse")  # everything is labelled again: the maps alone do not tell why
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    analysis = list(metrics.pop("analysis").values())
    assert metrics == plain
    assert 0.5 < analysis[0] <= 1 and metrics["mIoU"] < analysis[1] and analysis[7] < 0.2
    assert "what patches allow" in capsys.readouterr().out
    run("--checkpoint", checkpoint, "--limit", 5, "--output", tmp_path / "unseen", "--dataset", "synthetic-unseen")
    assert json.loads((tmp_path / "unseen/metrics.json").read_text())["pictures"] == 5


@pytest.mark.parametrize("kind", ["segclip", "clip", "pacl"])
def test_coherence_of_a_checkpoint(kind, of_kind, tmp_path, capsys):
    flags = ("--checkpoint", of_kind(kind), "--limit", 20, "--output", tmp_path, "--workers", 0)
    run(*flags)
    plain = json.loads((tmp_path / "metrics.json").read_text())
    run(*flags, "--coherence")  # what is labelled already is not labelled again
    assert "14 pictures of an earlier run" in capsys.readouterr().err and Image.open(tmp_path / "roc.png").width > 400
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    found = metrics.pop("coherence")
    assert metrics == plain
    area, curve = found["area"], found["true positives at 0, 5, ..., 100 % false ones"]
    # Colours alone tell much of a scene; the first picture has none before it.
    assert all(0.55 < value < 1 for value in area.values()) and found["pairs"] == 39 * 1000 and 0 < found["of one class"] < 1
    assert len(curve) == 21 and curve == sorted(curve) and curve[-1] == 1
    assert np.mean(curve) == pytest.approx(area["all pairs"], abs=0.03)
    run(*flags, "--coherence", "--stride-trick", 2, "--batch-size", 3)
    assert json.loads((tmp_path / "metrics.json").read_text())["coherence"]["area"] != area


def test_coherence_needs_two_classes(checkpoint, tmp_path, capsys):
    for folder in ("pictures", "labels"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (40, 30), "red").save(tmp_path / "pictures/a.png")
    Image.new("L", (40, 30), 1).save(tmp_path / "labels/a.png")
    flags = ("--images", tmp_path / "pictures", "--words", "cat, dog", "--checkpoint", checkpoint, "--output", tmp_path / "o")
    assert "label maps" in fails(*flags, "--coherence")
    run(*flags, "--coherence", "--labels-dir", tmp_path / "labels", "--workers", 0)
    found = json.loads((tmp_path / "o/metrics.json").read_text())["coherence"]
    assert (
        set(found["area"].values()) == {None}
        and found["of one class"] == 1
        and "curve, all pairs: -" in capsys.readouterr().out
    )
    Image.new("L", (40, 30), 255).save(tmp_path / "labels/a.png")
    run(*flags, "--coherence", "--labels-dir", tmp_path / "labels", "--workers", 0)
    assert json.loads((tmp_path / "o/metrics.json").read_text())["coherence"]["pairs"] == 0


def test_background_by_entropy(voc, checkpoint, tmp_path):
    flags = ("--dataset", "pascal_voc", "--data-root", voc, "--checkpoint", checkpoint, "--output", tmp_path, "--workers", 0)
    found = {}
    for protocol in ("segclip", "sclip"):
        for threshold in (0, 9):  # always more than the one, never more than the other: ln 20 = 3.0
            run(*flags, "--background-entropy", threshold, "--protocol", protocol, "--templates", 1)
            metrics = json.loads((tmp_path / "metrics.json").read_text())
            assert metrics["background_entropy"] == threshold and metrics["background_threshold"] is None
            assert len(metrics["classes"]) == 20 and "person" in metrics["classes"][14]  # no background among the words
            assert list(metrics["IoU"]) == ["background", *VOC]
            found[protocol, threshold] = [np.asarray(Image.open(p)) for p in sorted((tmp_path / "predictions").iterdir())]
        assert all((label == 0).all() for label in found[protocol, 0])
        assert all((label > 0).all() for label in found[protocol, 9])
    assert "it is this or" in fails(*flags, "--background-entropy", 1.5, "--background-threshold", 0.5)
    assert "from 0 on" in fails(*flags, "--background-entropy", "nan")
    assert "no background" in fails("--checkpoint", checkpoint, "--background-entropy", 1.5)
    one = ("--image", voc / "JPEGImages/tall.jpg", "--words", "cat, dog", "--checkpoint", checkpoint, "--heat")
    run(*one, "--output", tmp_path / "one", "--background-entropy", 0)
    assert not np.asarray(Image.open(tmp_path / "one/tall_labels.png")).any()
    assert "it is this or" in fails(*one, "--output", tmp_path / "one", "--background-entropy", 1.5, "--background")


def test_the_centre_of_a_picture():
    random = np.random.RandomState(0)
    picture = random.randint(0, 256, (32, 35, 3), np.uint8)
    assert (centre(picture, 32) == picture[:, 2:34]).all()  # 1.5, rounded as Python does, and so torchvision
    assert (centre(picture.transpose(1, 0, 2), 32) == picture[:, 2:34].transpose(1, 0, 2)).all()
    picture = random.randint(0, 256, (60, 101, 3), np.uint8)  # the short side becomes 32, the long one 53 (53.9 cut off)
    expected = np.asarray(Image.fromarray(picture).resize((53, 32), Image.BICUBIC))[:, 10:42]
    assert (centre(picture, 32) == expected).all()
    assert all(centre(np.zeros((*size, 3), np.uint8), 32).shape == (32, 32, 3) for size in ((1, 1), (2, 90), (90, 1)))


@pytest.fixture
def animals(tmp_path):
    """A folder of pictures in folders: {class: number of pictures}."""
    random, root = np.random.RandomState(0), tmp_path / "animals"
    for name, number in {"red_dog": 3, "cat": 2, "Boat": 4, "bird": 1, "sheep": 2, "cow": 1, "bus": 2}.items():
        (root / name / "deep").mkdir(parents=True)
        for i in range(number):
            picture = Image.fromarray(random.randint(0, 256, (4, 6, 3), np.uint8)).resize((48, 40), Image.NEAREST)
            picture.save(root / name / ("deep" if i == 1 else "") / f"{i}.{'JPEG' if i else 'png'}")
    (root / "bus/notes.txt").touch()
    (root / ".hidden").mkdir()
    return root


def phi_by_hand(patches, text, scale):
    """patches [N, E], one text [E]"""
    s = torch.nn.functional.cosine_similarity(patches, text[None], dim=1)
    pooled = ((scale * s).softmax(dim=0)[:, None] * patches).sum(dim=0)
    return torch.nn.functional.cosine_similarity(pooled, text, dim=0).item()


@pytest.mark.parametrize("kind", ["segclip", "clip", "pacl"])
@torch.no_grad()
def test_classification_by_hand(kind, of_kind, animals, tmp_path, capsys):
    path = of_kind(kind)
    (tmp_path / "words.txt").write_text("boat, ship\nbird\nbus\ncat\ncow\nred dog, dog\nsheep\n")
    run("--classify", animals, "--checkpoint", path, "--output", tmp_path / "o", "--batch-size", 4, "--workers", 1)
    run("--classify", animals, "--checkpoint", path, "--output", tmp_path / "o2", "--classes", tmp_path / "words.txt")
    model, tokenizer, printed = load_model(path).eval(), load_tokenizer(path), capsys.readouterr().out
    folders = ["Boat", "bird", "bus", "cat", "cow", "red_dog", "sheep"]
    plain = [[name.replace("_", " ")] for name in folders]
    synonyms = [["boat", "ship"], *plain[1:5], ["red dog", "dog"], plain[6]]
    for output, classes in (("o", plain), ("o2", synonyms)):
        metrics, features = json.loads((tmp_path / output / "metrics.json").read_text()), {}
        for word in sum(classes, []):
            texts = tokenizer([template.format(word) for template in evaluate.TEMPLATES[7]], 12)
            feature = torch.nn.functional.normalize(model.encode_text(texts), dim=-1).mean(dim=0)
            features[word] = feature / feature.norm()
        first, five, pictures = ({name: 0 for name in folders} for _ in range(3))
        for c, name in enumerate(folders):
            for file in sorted((animals / name).rglob("?.*")):
                with Image.open(file) as image:
                    crop = np.asarray(image.convert("RGB").resize((38, 32), Image.BICUBIC).crop((3, 0, 35, 32)))
                encoding = model.encode_image(evaluate.normalise(torch.tensor(crop).permute(2, 0, 1)[None]))
                if kind == "pacl":
                    scores = {word: phi_by_hand(encoding.regions[0], text, 10.0) for word, text in features.items()}
                else:
                    feature = encoding.features[0] / encoding.features[0].norm()
                    scores = {word: (feature @ text).item() for word, text in features.items()}
                one_by_one = picture_scores(model, encoding, torch.stack(list(features.values())))[0]
                torch.testing.assert_close(one_by_one, torch.tensor(list(scores.values())))
                best = [max(scores[word] for word in words) for words in classes]
                rank = sorted(best, reverse=True).index(best[c])
                for count, limit in ((pictures, 99), (first, 1), (five, 5)):
                    count[name] += rank < limit
        assert metrics["pictures"] == sum(pictures.values()) == 15 and metrics["classes"] == classes
        assert metrics["accuracy"] == {name: first[name] / pictures[name] for name in folders}
        assert metrics["top-1"] == sum(first.values()) / 15 and metrics["top-5"] == sum(five.values()) / 15
        assert 0 < metrics["top-5"] < 1 and (metrics["dataset"], metrics["templates"]) == ("classify", 7)
        assert metrics["checkpoint"] == str(path) and metrics["data"] == str(animals)
        assert f"top-1 {100 * metrics['top-1']:.2f} %  top-5 {100 * metrics['top-5']:.2f} %  over 15 pictures" in printed


def test_two_processes_classify_as_one(of_kind, animals, tmp_path):
    arguments = ["--classify", str(animals), "--checkpoint", str(of_kind("pacl")), "--device", "cpu", "--workers", "0"]
    assert run_as_one_and_as_two(arguments, tmp_path).stdout.count("top-1") == 1


def test_classification_of_what_cannot_be(checkpoint, animals, tmp_path, capsys):
    good = ("--classify", animals, "--checkpoint", checkpoint, "--output", tmp_path / "o", "--workers", 0)
    run(*good, "--limit", 5, "--templates", 1, "--stride-trick", 4)
    metrics = json.loads((tmp_path / "o/metrics.json").read_text())
    assert metrics["pictures"] == 5 and metrics["accuracy"]["sheep"] is None
    assert (metrics["templates"], metrics["stride_trick"]) == (1, 4)
    with pytest.raises(SystemExit):
        run(*good, "--images", tmp_path)
    assert "--images: not allowed with argument --classify" in capsys.readouterr().err
    for flags in (("--window", 32), ("--analyse",), ("--coherence",), ("--protocol", "dense")):
        assert f"{flags[0]}" in fails(*good, *flags) and "--classify" in fails(*good, *flags)
    assert "no such folder" in fails(*good, "--classify", tmp_path / "none")
    assert "no folder in it" in fails(*good, "--classify", animals / "cat/deep")
    assert "no background" in fails(*good, "--background-entropy", 1.5)
    (tmp_path / "words.txt").write_text("cat\ndog\n")
    message = fails(*good, "--classes", tmp_path / "words.txt")
    assert "2 classes" in message and f"{animals} has 7" in message
    (animals / "cow/0.png").write_text("no picture")
    assert str(animals / "cow/0.png") in fails(*good) and str(animals / "cow/0.png") in fails(*good, "--workers", 1)
    (animals / "cow/0.png").unlink()
    assert f"{animals / 'cow'}: no picture" in fails(*good)


def test_the_stride_trick(checkpoint, tmp_path, capsys):
    """At a patch's size it is none; below, the patches overlap, and their number is that of the places they can have."""
    labels = {}
    for name, flags in {"none": (), "8": ("--stride-trick", 8), "2": ("--stride-trick", 2)}.items():
        run("--checkpoint", checkpoint, "--limit", 8, "--output", tmp_path / name, "--workers", 0, *flags)
        labels[name] = [np.asarray(Image.open(path)) for path in sorted((tmp_path / f"{name}/predictions").glob("*.png"))]
    assert all((a == b).all() for a, b in zip(labels["none"], labels["8"]))
    assert any((a != b).any() for a, b in zip(labels["none"], labels["2"]))
    for stride in (3, 16, 0):
        with pytest.raises(InputError, match=f"--stride-trick {stride}: must divide 8"):
            run("--checkpoint", checkpoint, "--output", tmp_path, "--stride-trick", stride)
    visual = CLIP(TINY).visual
    assert visual.grid(32, 48) == (4, 6) and visual(torch.zeros(1, 3, 32, 48)).shape[1] == 1 + 4 * 6
    visual.conv1.stride = (2, 2)
    assert visual.grid(32, 48) == (13, 21) and visual(torch.zeros(1, 3, 32, 48)).shape[1] == 1 + 13 * 21


def test_comparison(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model, merges = load_segclip(checkpoint), load_tokenizer(checkpoint).merges
    save_checkpoint(tmp_path / "runs/clip/checkpoint.pt", DenseCLIP(model.clip), merges=merges)
    save_checkpoint(tmp_path / "runs/synthetic/checkpoint.pt", model, merges=merges)
    assert "python train.py --method pacl" in fails("--compare", "--limit", 5, "--workers", 0)
    assert not capsys.readouterr().out  # said before anything is scored
    assert "--compare is for --dataset" in fails("--compare", "--images", tmp_path, "--words", "cat")
    save_checkpoint(tmp_path / "runs/pacl/checkpoint.pt", PACL(model.clip), merges=merges)
    capsys.readouterr()
    run("--compare", "--limit", 5, "--workers", 0)
    head, rule, *rows = capsys.readouterr().out.splitlines()
    assert [row.split("|")[1].strip() for row in rows] == [
        "CLIP",
        "MaskCLIP",
        "SCLIP",
        "ClearCLIP",
        "NACLIP",
        "PACL",
        "SegCLIP",
    ]
    assert {row.count("|") for row in (head, rule, *rows)} == {12}
    for row in rows:  # each of these is its own run, with its own settings
        metrics = json.loads((tmp_path / "runs/compare" / row.split("|")[1].strip() / "metrics.json").read_text())
        assert f"| {100 * metrics['mIoU']:.1f} % |" in row and metrics["readout"] in row.lower() + " clip"


@pytest.mark.parametrize("flags", [("--analyse",), ("--coherence",), ("--image", "photo.jpg", "--words", "cat, dog")])
def test_what_only_one_process_can_do(checkpoint, tmp_path, monkeypatch, flags):
    monkeypatch.setattr(evaluate.dist, "is_initialized", lambda: True)
    with pytest.raises(InputError, match="one process"):
        run("--checkpoint", checkpoint, "--output", tmp_path, *flags)


def test_limit_and_synthetic_scenes(checkpoint, tmp_path):
    run("--checkpoint", checkpoint, "--limit", 3, "--output", tmp_path)
    assert sorted(path.name for path in (tmp_path / "predictions").iterdir()) == [f"scene{i:05}.png" for i in range(3)]
    first = json.loads((tmp_path / "metrics.json").read_text())
    assert first["pictures"] == 3
    assert not list(checkpoint.parent.glob("*.json"))
    run("--checkpoint", checkpoint, "--limit", 3, "--output", tmp_path, "--seed", 1)
    assert json.loads((tmp_path / "metrics.json").read_text())["IoU"] != first["IoU"]


def test_every_flag_is_read(voc, checkpoint, tmp_path, monkeypatch):
    parse_args = evaluate.parse_args
    arguments = ["--dataset", "pascal_voc", "--data-root", str(voc), "--checkpoint", str(checkpoint), "--limit", "1"]
    args, read = recorder(evaluate.parse_args([*arguments, "--output", str(tmp_path)]))
    monkeypatch.setattr(evaluate, "parse_args", lambda argv: args)
    evaluate.main()
    one_picture = ["--image", str(voc / "JPEGImages/grey.jpg"), "--words", "cat", "--checkpoint", str(checkpoint)]
    args_for_one, read_for_one = recorder(parse_args([*one_picture, "--output", str(tmp_path)]))
    monkeypatch.setattr(evaluate, "parse_args", lambda argv: args_for_one)
    evaluate.main()
    assert set(vars(args)) <= read | read_for_one


# What each benchmark's files hold, and the class that each value means, worked out from the data sets' own descriptions.
RAW_THINGS = [v for v in range(90) if v + 1 not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]  # COCO's unused categories
STUFF_IDS = list(range(91, 182))
CITY = {
    7: 0,
    8: 1,
    11: 2,
    12: 3,
    13: 4,
    17: 5,
    19: 6,
    20: 7,
    21: 8,
    22: 9,
    23: 10,
    24: 11,
    25: 12,
    26: 13,
    27: 14,
    28: 15,
}
CITY |= {31: 16, 32: 17, 33: 18}
TREES = {  # case: (data set, pictures, labels, list of names, {value: class}); NAME stands for the picture's name
    "voc": (
        "pascal_voc",
        "JPEGImages/NAME.jpg",
        "SegmentationClass/NAME.png",
        "ImageSets/Segmentation/val.txt",
        {i: i for i in range(21)},
    ),
    "voc20": (
        "pascal_voc20",
        "JPEGImages/NAME.jpg",
        "SegmentationClass/NAME.png",
        "ImageSets/Segmentation/val.txt",
        {i: i - 1 for i in range(1, 21)} | {0: 255},
    ),
    "context": (
        "pascal_context",
        "JPEGImages/NAME.jpg",
        "SegmentationClassContext/NAME.png",
        "ImageSets/SegmentationContext/val.txt",
        {i: i for i in range(60)},
    ),
    "context59": (
        "pascal_context59",
        "JPEGImages/NAME.jpg",
        "SegmentationClassContext/NAME.png",
        "ImageSets/SegmentationContext/val.txt",
        {i: i - 1 for i in range(1, 60)} | {0: 255},
    ),
    "object, raw": (
        "coco_object",
        "images/val2017/NAME.jpg",
        "annotations/val2017/NAME.png",
        None,
        {v: 1 + i for i, v in enumerate(RAW_THINGS)} | {v: 0 for v in STUFF_IDS} | {255: 0},
    ),
    "object, converted": (
        "coco_object",
        "images/val2017/NAME.jpg",
        "annotations/val2017/NAME_instanceTrainIds.png",
        None,
        {i: i for i in range(81)},
    ),
    "stuff, raw": (
        "coco_stuff",
        "images/val2017/NAME.jpg",
        "stuffthingmaps/val2017/NAME.png",
        None,
        {v: i for i, v in enumerate(RAW_THINGS + STUFF_IDS)},
    ),
    "stuff, converted": (
        "coco_stuff",
        "images/val2017/NAME.jpg",
        "annotations/val2017/NAME_labelTrainIds.png",
        None,
        {i: i for i in range(171)},
    ),
    "ade20k": (
        "ade20k",
        "images/validation/NAME.jpg",
        "annotations/validation/NAME.png",
        None,
        {i: i - 1 for i in range(1, 151)} | {0: 255},
    ),
    "cityscapes, ids": (
        "cityscapes",
        "leftImg8bit/val/ulm/NAME_leftImg8bit.png",
        "gtFine/val/ulm/NAME_gtFine_labelIds.png",
        None,
        {i: CITY.get(i, 255) for i in range(34)},
    ),
    "cityscapes, train ids": (
        "cityscapes",
        "leftImg8bit/val/ulm/NAME_leftImg8bit.png",
        "gtFine/val/ulm/NAME_gtFine_labelTrainIds.png",
        None,
        {i: i for i in range(19)},
    ),
}


def make_tree(root, case, names=("b", "a")):
    """Pictures of noise, and label maps in which each value of the data set stands somewhere. -> {name: classes}"""
    _, picture, label, split, meaning = TREES[case]
    meaning = {255: 255} | meaning
    table, truth, random = np.zeros(256, np.uint8), {}, np.random.RandomState(0)
    table[list(meaning)] = list(meaning.values())
    for name in names:
        for path in (picture, label):
            (root / path).parent.mkdir(parents=True, exist_ok=True)
        values = random.choice(np.array(list(meaning), np.uint8), (40, 56))
        values.flat[: len(meaning)] = list(meaning)
        Image.fromarray(random.randint(0, 256, (40, 56, 3), np.uint8)).save(root / picture.replace("NAME", name), quality=95)
        image = Image.fromarray(values)
        image.putpalette(list(random.randint(0, 256, 768)))  # as VOC and ADE20K have; the colours must not matter
        image.save(root / label.replace("NAME", name))
        truth[name] = table[values]
    if split:
        (root / split).parent.mkdir(parents=True)
        (root / split).write_text("\n".join(names) + "\n")
    return truth


def independent_miou(predictions, truth, num_classes):
    confusion = np.zeros((num_classes, num_classes))
    for name, label in truth.items():
        np.add.at(confusion, (label[label != 255], predictions[name][label != 255]), 1)
    union = confusion.sum(axis=0) + confusion.sum(axis=1) - np.diag(confusion)
    return (np.diag(confusion)[union > 0] / union[union > 0]).mean()


@pytest.mark.parametrize("case", TREES)
def test_every_benchmark_in_its_folders(case, checkpoint, tmp_path):
    truth = make_tree(tmp_path / "data", case)
    name = TREES[case][0]
    run(
        "--dataset",
        name,
        "--data-root",
        tmp_path / "data",
        "--checkpoint",
        checkpoint,
        "--output",
        tmp_path / "out",
        "--workers",
        0,
    )
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    found = {path.stem: np.asarray(Image.open(path)) for path in (tmp_path / "out/predictions").rglob("*.png")}
    found = {key.removesuffix("_leftImg8bit"): value for key, value in found.items()}
    assert found.keys() == truth.keys()
    assert metrics["mIoU"] == pytest.approx(independent_miou(found, truth, len(metrics["IoU"])))
    assert metrics["pictures"] == 2 and metrics["background_threshold"] == THRESHOLDS.get(name)
    assert len(set(metrics["IoU"].values())) > 1


THRESHOLDS = {"pascal_voc": 0.75, "pascal_context": 0.25, "coco_object": 0.65}  # Section 3.1


class HalfRight:
    """Stands in for a Segmenter: labels the upper half of a picture as it should be, and all the rest sky."""

    def __init__(self, model, text, owner, settings, *_):
        self.model, self.text, self.settings = model, text, settings

    def __call__(self, pictures):
        for sample, seen in pictures:
            prediction = np.where(sample.label == 255, 2, sample.label).astype(np.uint8)
            prediction[len(prediction) // 2 :] = 2
            yield sample, Result(prediction, np.zeros(seen.shape[:2], int), seen.shape[:2], None, None)


def test_three_photographs_of_ade20k(checkpoint, tmp_path, monkeypatch):
    """As distributed: 0 is what has no class, 1 the first class."""
    monkeypatch.setattr(evaluate, "Segmenter", HalfRight)
    root = GOLDEN / "ade_sample"
    run("--dataset", "ade20k", "--data-root", root, "--checkpoint", checkpoint, "--output", tmp_path)
    predictions, truth = {}, {}
    for path in (root / "annotations/validation").iterdir():
        label = np.asarray(Image.open(path)).astype(int)
        truth[path.stem] = np.where(label == 0, 255, label - 1)
        predictions[path.stem] = np.asarray(Image.open(tmp_path / f"predictions/{path.name}"))
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["mIoU"] == pytest.approx(independent_miou(predictions, truth, 150))
    assert 0.1 < metrics["mIoU"] < 0.7


def test_a_value_that_is_no_class(checkpoint, tmp_path):
    make_tree(tmp_path, "ade20k")
    path = tmp_path / "annotations/validation/b.png"
    Image.fromarray(np.full((40, 56), 151, np.uint8)).save(path)
    for workers in (0, 1):
        message = fails(
            "--dataset",
            "ade20k",
            "--data-root",
            tmp_path,
            "--checkpoint",
            checkpoint,
            "--output",
            tmp_path / "o",
            "--workers",
            workers,
        )
        assert str(path) in message and "151" in message


# Of each protocol on each data set, from its authors' configuration files: short side, window, stride (at 224 pixels),
# templates, logit scale, background threshold, area threshold, number of words.
PUBLISHED_SETTINGS = {
    ("segclip", "pascal_voc"): (224, 224, 224, 1, None, 0.75, None, 20),
    ("segclip", "pascal_context"): (224, 224, 224, 1, None, 0.25, None, 59),
    ("segclip", "coco_object"): (224, 224, 224, 1, None, 0.65, None, 80),
    ("segclip", "ade20k"): (224, 224, 224, 1, None, None, None, 150),
    ("sclip", "pascal_voc"): (336, 224, 112, 80, 65, 0.1, 0.1, 56),
    ("sclip", "pascal_voc20"): (336, 224, 112, 80, 40, None, None, 30),
    ("sclip", "pascal_context"): (336, 224, 112, 80, 50, 0.1, None, 60),
    ("sclip", "pascal_context59"): (336, 224, 112, 80, 40, None, None, 59),
    ("sclip", "coco_object"): (336, 224, 112, 80, 50, 0.1, None, 113),
    ("sclip", "coco_stuff"): (448, 224, 112, 80, 40, None, None, 171),
    ("sclip", "ade20k"): (336, 224, 112, 80, 40, None, None, 150),
    ("sclip", "cityscapes"): (560, 224, 112, 80, 40, None, None, 19),
    ("dense", "pascal_voc"): (336, 224, 112, 80, 65, 0.1, 0.1, 56),
    ("naclip", "pascal_voc"): (336, 0, 112, 80, 40, 0.1, None, 56),
    ("naclip", "pascal_voc20"): (336, 0, 112, 80, 40, None, None, 30),
    ("naclip", "pascal_context"): (336, 224, 112, 80, 40, 0.1, None, 60),
    ("naclip", "coco_object"): (336, 224, 112, 80, 40, 0.1, None, 113),
    ("naclip", "coco_stuff"): (336, 224, 112, 80, 40, None, None, 171),
    ("naclip", "cityscapes"): (560, 224, 112, 80, 40, None, None, 19),
    ("clearclip", "pascal_voc"): (448, 448, 224, 80, 50, 0.5, None, 21),
    ("clearclip", "pascal_context"): (448, 448, 224, 80, 50, 0.15, None, 60),
    ("clearclip", "coco_object"): (448, 448, 224, 80, 50, 0.4, None, 81),
    ("clearclip", "coco_stuff"): (448, 448, 224, 80, 50, None, None, 171),
    ("clearclip", "cityscapes"): (448, 224, 224, 80, 50, None, None, 19),
}


@pytest.mark.parametrize("protocol, name", PUBLISHED_SETTINGS)
def test_each_protocol_is_its_authors(protocol, name):
    dataset = argparse.Namespace(words=BENCHMARKS[name].words, has_background=BENCHMARKS[name].has_background)
    args = evaluate.parse_args(["--dataset", name, "--protocol", protocol])
    s = evaluate.choose_settings(args, dataset, 224)
    numbers = (s.short_side, s.window, s.stride, s.templates, s.logit_scale, s.background_threshold, s.area_threshold)
    assert (*numbers, sum(map(len, s.classes))) == PUBLISHED_SETTINGS[protocol, name]
    assert s.scoring == ("regions" if protocol == "segclip" else "cosines")
    if protocol == "clearclip" and name == "pascal_voc":
        words = [word for [word] in s.classes]
        assert words[0] == "background" and {"ship", "pottedplant", "tvmonitor", "person", "table"} < set(words)
    flags = "--short-side 300 --window 64 --stride 32 --templates 7 --background 0.3 --stride-trick 4".split()
    flags += [] if protocol == "segclip" else ["--logit-scale", "10", "--area-threshold", "0.2"]
    args = evaluate.parse_args(["--dataset", name, "--protocol", protocol, *flags])
    dataset.has_background = True
    s = evaluate.choose_settings(args, dataset, 224)
    assert (s.short_side, s.window, s.stride, s.templates, s.stride_trick) == (300, 64, 32, 7, 4)
    assert s.background_threshold == 0.3 and s.logit_scale in (None, 10)


def test_sclips_protocol_from_files(checkpoint, tmp_path):
    make_tree(tmp_path, "voc")
    flags = ["--dataset", "pascal_voc", "--data-root", tmp_path, "--checkpoint", checkpoint, "--output", tmp_path / "o"]
    run(*flags, "--protocol", "sclip")
    metrics = json.loads((tmp_path / "o/metrics.json").read_text())
    assert (metrics["short_side"], metrics["window"], metrics["stride"]) == (48, 32, 16)  # for a model of 32 pixels
    assert len(metrics["classes"]) == 21 and len(metrics["classes"][0]) == 26 and "person in jeans" in metrics["classes"][15]
    assert list(metrics["IoU"]) == ["background", *VOC]
    run(*flags, "--protocol", "naclip", "--refine", "pamr")  # whole images, 48 and 67 pixels wide: no multiple of 8
    metrics = json.loads((tmp_path / "o/metrics.json").read_text())
    assert metrics["window"] == 0 and metrics["protocol"] == "naclip"
    assert "--protocol segclip has none" in fails(*flags, "--logit-scale", 3)
    assert "out of range" in fails(*flags, "--protocol", "sclip", "--area-threshold", 3)
    assert "--coherence needs windows" in fails(*flags, "--protocol", "naclip", "--coherence")


def test_refinement_sees_the_picture_as_the_protocol_gives_it(monkeypatch):
    """SCLIP's and NACLIP's programs enlarge the reduced and normalised image again; otherwise the picture itself serves."""
    guides = []
    monkeypatch.setattr(evaluate, "pamr", lambda scores, guide: guides.append(guide) or scores)
    sample = halves((40, 60))
    for scoring in ("cosines", "regions"):
        settings = settings_for(scoring=scoring, logit_scale=40, refine="pamr")
        pictures = [seen(sample, settings)]
        list(Segmenter(Stripes(), WORDS, torch.arange(2), settings)(pictures))
    reduced = normalise(torch.as_tensor(pictures[0][1]).permute(2, 0, 1))
    torch.testing.assert_close(guides[0], F.interpolate(reduced[None], (40, 60), mode="bilinear")[0])
    assert torch.equal(guides[1], torch.as_tensor(sample.picture).permute(2, 0, 1).float())


def test_every_word_list_and_template():
    assert {name: len(benchmark.words) for name, benchmark in BENCHMARKS.items()} == {
        "pascal_voc": 20,
        "pascal_voc20": 20,
        "pascal_context": 59,
        "pascal_context59": 59,
        "coco_object": 80,
        "coco_stuff": 171,
        "ade20k": 150,
        "cityscapes": 19,
    }
    for n, templates in evaluate.TEMPLATES.items():
        assert len(set(templates)) == n and all(template.count("{}") == 1 for template in templates)


def test_own_pictures_with_and_without_labels(checkpoint, tmp_path):
    (tmp_path / "pictures/deep").mkdir(parents=True)
    (tmp_path / "labels/deep").mkdir(parents=True)
    Image.new("RGB", (40, 30), "red").save(tmp_path / "pictures/deep/one.JPG")
    Image.new("L", (50, 20)).save(tmp_path / "pictures/two.png")
    (tmp_path / "words.txt").write_text("red wall, wall\n\n cat\n")
    arguments = ("--images", tmp_path / "pictures", "--classes", tmp_path / "words.txt", "--checkpoint", checkpoint)
    run(*arguments, "--output", tmp_path / "out")
    assert {p.name for p in (tmp_path / "out/predictions").rglob("*.png")} == {"one.png", "two.png"}
    assert (tmp_path / "out/predictions/deep/one.png").exists() and not (tmp_path / "out/metrics.json").exists()
    Image.new("L", (40, 30), 1).save(tmp_path / "labels/deep/one.png")
    run(*arguments, "--labels-dir", tmp_path / "labels", "--output", tmp_path / "out2")
    metrics = json.loads((tmp_path / "out2/metrics.json").read_text())
    assert metrics["pictures"] == 1 and list(metrics["IoU"]) == ["red wall", "cat"]
    assert metrics["classes"] == [["red wall", "wall"], ["cat"]]
    run(*arguments, "--background", "1", "--output", tmp_path / "out3")
    assert not (tmp_path / "out3/metrics.json").exists()
    run(*arguments, "--labels-dir", tmp_path / "labels", "--background", "--output", tmp_path / "out4")
    assert json.loads((tmp_path / "out4/metrics.json").read_text())["background_threshold"] == 0.75
    # Another picture of the same name is not the one that was labelled.
    for i in range(7):
        Image.new("RGB", (30 + i, 30)).save(tmp_path / f"pictures/more{i}.png")
    run(*arguments, "--output", tmp_path / "out")
    Image.new("RGB", (55, 44)).save(tmp_path / "pictures/two.png")
    run(*arguments, "--output", tmp_path / "out")
    assert Image.open(tmp_path / "out/predictions/two.png").size == (55, 44)
    for _ in range(2):  # the result is not labelled in its turn
        run(*arguments, "--output", tmp_path / "pictures/out")
    assert len(list((tmp_path / "pictures/out/predictions").rglob("*.png"))) == 9


def test_words_that_the_model_was_never_shown(tmp_path, capsys):
    tokenizer = Tokenizer.learn(["grass and snow"] * 9, 50)
    model = DenseCLIP(CLIP(dataclasses.replace(TINY, vocab_size=tokenizer.vocab_size)))
    save_checkpoint(tmp_path / "checkpoint.pt", model, merges=tokenizer.merges)
    Image.new("RGB", (40, 30), "green").save(tmp_path / "photo.png")
    flags = ("--image", tmp_path / "photo.png", "--checkpoint", tmp_path / "checkpoint.pt", "--output", tmp_path / "out")
    run(*flags, "--words", "grass, snow, polar bear")
    assert "polar bear: rare or unknown" in capsys.readouterr().err
    run(*flags, "--words", "grass, snow")
    assert "unknown" not in capsys.readouterr().err
    assert "--classes" in fails(*flags, "--words", "words.txt")


def test_names_of_classes_that_cannot_be(checkpoint, tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    common = ("--images", tmp_path, "--checkpoint", checkpoint, "--output", tmp_path / "o")
    assert "twice" in fails(*common, "--words", "cat, Cat")
    assert "twice" in fails(*common, "--words", "cat, background", "--background")
    assert "0 words" in fails(*common, "--words", " , ")
    assert "256 words" in fails(*common, "--words", ",".join(map(str, range(256))))
    (tmp_path / "words.txt").write_text("cat\n,\n")
    assert "without a word" in fails(*common, "--classes", tmp_path / "words.txt")
    (tmp_path / "a.bmp").write_bytes((tmp_path / "a.png").read_bytes())
    assert "two pictures" in fails(*common, "--words", "cat")


def test_one_picture(checkpoint, tmp_path, capsys):
    Image.new("RGB", (90, 60), "red").save(tmp_path / "my photo.jpg")
    arguments = (
        "--image",
        tmp_path / "my photo.jpg",
        "--words",
        "cat, grass, sky",
        "--checkpoint",
        checkpoint,
        "--output",
        tmp_path / "o",
    )
    run(*arguments, "--heat")
    names = {p.name for p in (tmp_path / "o").iterdir()}
    expected = {f"my photo_{x}.png" for x in ("overlay", "labels", "regions", "heat_0_cat", "heat_1_grass", "heat_2_sky")}
    assert names == expected
    assert (
        Image.open(tmp_path / "o/my photo_labels.png").size
        == Image.open(tmp_path / "o/my photo_regions.png").size
        == (90, 60)
    )
    shares = [float(line.split()[-2]) for line in capsys.readouterr().out.splitlines() if line.endswith("%")]
    assert sum(shares) == pytest.approx(100, abs=0.2)


def test_words_keep_their_colours():
    words = ["background", "cat", "grass", "sky"]
    together = dict(zip(words, word_colours(words).tolist()))
    assert len({tuple(colour) for colour in together.values()}) == 4
    assert word_colours(["sky"]).tolist() == [together["sky"]]
    assert word_colours(["grass", "cat"]).tolist() == [together["grass"], together["cat"]]
    many = word_colours([f"word {i}" for i in range(171)])
    assert len(np.unique(many, axis=0)) > 160


@pytest.mark.parametrize("width", [40, 300, 4000])
def test_the_legend_covers_nothing(width):
    picture = Image.new("RGB", (width, 100), "blue")
    entries = [((255, 0, 0), "a long name of a class"), ((0, 255, 0), "cat"), ((0, 0, 255), "grass 12 %")]
    sheet = with_legend(picture, entries)
    assert sheet.width >= width and (np.asarray(sheet)[:100, :width] == (0, 0, 255)).all()
    below = np.asarray(sheet)[100:]
    for colour, _ in entries:
        assert (below == colour).all(axis=-1).sum() > 50
    assert (below[:, -2:] == 255).all() and (below[-1] == 255).all()  # no word is cut off


def test_overlay_and_heat():
    picture = np.full((4, 6, 3), 100, np.uint8)
    label = np.array([[0, 0, 0, 1, 1, 1]] * 4, np.uint8)
    colours = np.asarray(overlay(picture, label, np.array([[200, 0, 0], [0, 0, 200]], np.uint8)))
    assert colours[0, 0].tolist() == [150, 50, 50] and colours[0, 5].tolist() == [50, 50, 150]
    assert colours[0, 3].tolist() == [255, 255, 255]
    warm = np.asarray(heat(picture, np.array([[0, 0, 0, 0, 0, 1.0]] * 4)))
    assert warm[0, 0].tolist() == [40, 40, 40] and warm[0, 5].tolist() == [255, 230, 0]


def test_an_interrupted_run_is_taken_up(voc, checkpoint, tmp_path, capsys):
    arguments = (
        "--dataset",
        "pascal_voc",
        "--data-root",
        voc,
        "--checkpoint",
        checkpoint,
        "--output",
        tmp_path / "out",
    )
    run(*arguments)
    first = (tmp_path / "out/metrics.json").read_text()
    (tmp_path / "out/predictions/rotated.png").unlink()
    (tmp_path / "out/metrics.json").unlink()
    capsys.readouterr()
    run(*arguments)
    assert f"{len(ODD_PICTURES) - 7} pictures of an earlier run" in capsys.readouterr().err
    assert (tmp_path / "out/metrics.json").read_text() == first
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "code_hash", lambda: "a student's")  # other code: all is done anew
        run(*arguments, "--limit", 8)
    run(*arguments, "--background-threshold", "0.1", "--limit", "1")
    run(*arguments, "--background-threshold", "0.1")  # other settings: all is done anew
    assert "earlier run" not in capsys.readouterr().err
    path = tmp_path / "out/predictions/rotated.png"
    path.write_bytes(path.read_bytes()[:60])  # a damaged one, too
    run(*arguments, "--background-threshold", "0.1")
    assert np.asarray(Image.open(path)).shape == (40, 30)


def test_two_processes_give_the_metrics_of_one(voc, checkpoint, tmp_path):
    arguments = [
        "--dataset",
        "pascal_voc",
        "--data-root",
        str(voc),
        "--checkpoint",
        str(checkpoint),
        "--device",
        "cpu",
        "--workers",
        "0",
    ]
    run_as_one_and_as_two(arguments, tmp_path)


def fails(*arguments):
    """The message of a run that must end with one line."""
    with pytest.raises(InputError) as error:
        run(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_bad_input(voc, checkpoint, tmp_path, monkeypatch, capsys):
    good = ("--dataset", "pascal_voc", "--data-root", voc, "--checkpoint", checkpoint, "--output", tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    assert "python train.py" in fails()
    assert "nothing.pt" in fails(*good, "--checkpoint", "nothing.pt")
    with pytest.raises(SystemExit):
        run(*good, "--dataset", "imagenet")
    message = capsys.readouterr().err.splitlines()[-1]
    assert "imagenet" in message and "pascal_voc" in message and "synthetic" in message
    assert "--data-root" in fails("--dataset", "pascal_voc", "--checkpoint", checkpoint)
    assert str(tmp_path / "elsewhere/JPEGImages") in fails(*good, "--data-root", tmp_path / "elsewhere")
    assert "--device" in fails(*good, "--device", "toaster")
    assert "--limit" in fails(*good, "--limit", 0)
    assert "--window 33" in fails(*good, "--window", 33)
    assert "--stride 64" in fails(*good, "--stride", 64)
    (tmp_path / "words.txt").write_text("cat\ndog\n")
    message = fails(*good, "--classes", tmp_path / "words.txt")
    assert "words.txt" in message and "2 classes" in message and "20" in message
    assert "--words" in fails("--checkpoint", checkpoint, "--images", tmp_path)
    assert "no such folder" in fails("--checkpoint", checkpoint, "--images", tmp_path / "none", "--words", "cat")
    (tmp_path / "empty").mkdir()
    assert "no picture" in fails("--checkpoint", checkpoint, "--images", tmp_path / "empty", "--words", "cat")
    assert "none.jpg" in fails("--checkpoint", checkpoint, "--image", tmp_path / "none.jpg", "--words", "cat", "--workers", 0)
    assert "between 0 and 1" in fails(*good, "--background-threshold", "nan")
    assert "no background" in fails("--checkpoint", checkpoint, "--background-threshold", "0.5")
    assert "--seed" in fails("--checkpoint", checkpoint, "--seed", "-1")
    (tmp_path / "file").touch()
    assert str(tmp_path / "file") in fails(*good, "--output", tmp_path / "file")

    Image.new("L", (5, 5)).save(voc / "SegmentationClass/grey.png")
    message = fails(*good)
    assert "grey.png" in message and "5x5" in message and "40x30" in message
    Image.new("L", (40, 30), 21).save(voc / "SegmentationClass/grey.png")
    message = fails(*good)
    assert "grey.png" in message and "21" in message
    (voc / "JPEGImages/grey.jpg").write_text("no picture")
    assert "grey.jpg" in fails(*good)
    (voc / "ImageSets/Segmentation/val.txt").write_text("")
    assert "no picture" in fails(*good)


def test_a_checkpoint_without_its_vocabulary(tmp_path, monkeypatch, voc, checkpoint):
    monkeypatch.setenv("CLIP_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    save_checkpoint(tmp_path / "a.pt", SegCLIP(TINY))
    arguments = ("--dataset", "pascal_voc", "--data-root", voc, "--checkpoint", tmp_path / "a.pt", "--vocabulary")
    assert str(tmp_path / "none.gz") in fails(*arguments, tmp_path / "none.gz")
    save_checkpoint(tmp_path / "a.pt", SegCLIP(TINY), merges=["a b"])  # 515 tokens and not 600
    assert "600" in fails(*arguments, tmp_path / "none.gz")


def test_a_mistake_in_the_code_ends_the_program(checkpoint, tmp_path):
    """In a worker, whose message must come through, and which must not be waited for."""
    mistake = "import sys, evaluate; evaluate.SyntheticScenes.__getitem__ = lambda *_: 1 / 0; sys.argv = sys.argv[1:]"
    program = f"{mistake}; evaluate.run_program(evaluate.main, '')"
    flags = ["--checkpoint", str(checkpoint), "--output", str(tmp_path), "--workers", "2"]
    command = [sys.executable, "-c", program, "evaluate.py", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=Path(evaluate.__file__).parent)
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr


@pytest.mark.parametrize("program", ["train.py", "evaluate.py"])
def test_a_failure_ends_with_one_line_and_help_touches_nothing(program, tmp_path):
    command = [sys.executable, str(Path(__file__).parents[1] / program)]
    failed = subprocess.run([*command, "--device", "toaster"], capture_output=True, text=True, cwd=tmp_path)
    assert failed.returncode == 1 and failed.stdout == ""
    assert failed.stderr.startswith(f"{program}: --device toaster") and failed.stderr.count("\n") == 1
    helped = subprocess.run([*command, "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert helped.returncode == 0 and "--seed" in helped.stdout and helped.stderr == ""
    assert list(tmp_path.iterdir()) == []
