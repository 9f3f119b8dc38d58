"""From scores to label maps, the metric, and evaluate.py with good and bad input."""

import dataclasses
import functools
import json
import math
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, TINY, recorder
from PIL import Image

import evaluate
from clip_loader import Tokenizer, load_model, load_tokenizer, save_checkpoint
from data import BENCHMARKS, VOC, Sample, SegmentationFolder, SyntheticScenes, normalise
from evaluate import (
    Confusion,
    Protocol,
    Segmenter,
    add_background,
    center_crop,
    choose_classes,
    choose_protocol,
    class_scores,
    drop_small_classes,
    inference_size,
    load_image,
    pamr,
    pixel_regions,
    region_scores,
    upsample,
    upsample_rows,
    window_starts,
    with_legend,
)
from losses import compatibility
from model import (
    CLIP,
    PACL,
    Config,
    DenseCLIP,
    GroupViT,
    ImageEncoding,
    InputError,
    OnCLIP,
    SegCLIP,
)


def test_inference_size():
    sizes = {  # (height, width), as mmsegmentation resizes to (2048, 224)
        (375, 500): (224, 299),
        (1024, 2048): (224, 448),
        (224, 224): (224, 224),
        (1, 1): (224, 224),
        (50, 500): (224, 2048),  # mmsegmentation: 205, on which the authors' program stops
        (1000, 50): (2048, 224),
    }
    assert {size: inference_size(*size, 224, 224) for size in sizes} == sizes


def test_windows_cover_everything_and_stay_inside():
    assert window_starts(224, 224, 224) == [0]
    assert window_starts(299, 224, 224) == [0, 75]
    assert window_starts(448, 224, 224) == [0, 224]
    assert window_starts(449, 224, 224) == [0, 224, 225]
    assert window_starts(450, 224, 112) == [0, 112, 224, 226]


# --------------------------------------------------------------------------------------------------
# Scores by hand: two words at right angles; one region is the first word, one is between them

WORDS = torch.eye(2)
SCALE = math.log(3)  # the softmax of (1, 0) times this is (3/4, 1/4)


def encoding_by_hand():
    regions = torch.tensor([[[2.0, 0.0], [5.0, 5.0]]])  # [B=1, L=2, E=2]; lengths do not count
    soft = torch.tensor([[[0.9, 0.1], [0.2, 0.8], [0.8, 0.2], [0.1, 0.9]]])  # [1, N=2x2, L]
    return ImageEncoding(torch.tensor([[3.0, 0.0]]), regions, None, soft)


def test_region_scores_by_hand():
    scores = region_scores(encoding_by_hand(), WORDS, SCALE)
    assert torch.allclose(scores, torch.tensor([[[9 / 16, 1 / 16], [1 / 4, 1 / 4]]]))
    # The one best word of the image is the first: the second softmax is over it alone.
    scores = region_scores(encoding_by_hand(), WORDS, SCALE, top_k=1)
    assert torch.allclose(scores, torch.tensor([[[3 / 4, 0], [1 / 2, 0]]]))


def test_pixels_of_regions_and_patches_by_hand():
    """Where each patch is a region of its own, scores are interpolated between them."""
    soft = encoding_by_hand().soft
    assert pixel_regions(soft, (4, 4), (2, 2), 2, 2).tolist() == [[[0, 0, 1, 1]] * 4]
    scores = torch.tensor([[0.0, 4.0], [1.0, 4.0], [0.0, 4.0], [1.0, 4.0]])  # [L, channels]
    between = upsample(scores.T.view(1, 2, 2, 2), (4, 4), 2, 2)[0]
    assert between.tolist() == [[[0, 0.25, 0.75, 1]] * 4, [[4] * 4] * 4]


def test_the_map_of_the_stride_trick_lies_where_its_patches_lie():
    """Patches of 16 at a stride of 4, in an image of 224: the center of the k-th is 7.5 + 4 k."""
    position = torch.arange(224.0)
    for k in range(53):
        column = torch.zeros(1, 1, 53, 53)
        column[..., k] = 1
        pixels = upsample(column, (224, 224), 16, 4)[0, 0]
        assert torch.equal(pixels, pixels[:1].expand(224, 224))
        left, row, right = pixels[0].split([6, 212, 6])
        # The margin repeats the outermost patch, and has no center.
        assert (left == row[0]).all() and (right == row[-1]).all()
        assert abs((row * position[6:-6]).sum() / row.sum() - (7.5 + 4 * k)) < 0.5, k


def test_background_by_hand():
    scores = region_scores(encoding_by_hand(), WORDS, SCALE)
    # The best score, 9/16, is never background.
    for threshold, background in ((0.2, [0, 0]), (0.4, [0, 1]), (0.9, [0, 1])):
        result = add_background(scores, threshold)
        assert result[0, :, 0].tolist() == background
        assert torch.equal(result[..., 1:], scores)


def protocol_for(scoring="regions", **changes):
    fields = {"classes": [["a"], ["b"]], "templates": 1, "top_k": 5}
    fields |= {"short_side": 16, "window": 16, "stride": 16}
    return Protocol("", scoring, **(fields | changes))


def test_labels_by_cosines_by_hand():
    """Three classes, the first two words of which are the background's; four pixels in a row."""
    p = torch.tensor([[1, 2, 2, 1], [1, 3, 1, 1], [1, 1, 6, 7], [1, 4, 1, 1]])
    classes = [["x", "y"], ["a"], ["b"]]

    def label(**changes):
        protocol = protocol_for("cosines", classes=classes, logit_scale=1.0, **changes)
        cosines = torch.log(p / 10)[:, None]
        scores = class_scores(cosines, 1.0, protocol)
        parts = [scores[..., :3], scores[..., 3:]]  # the area is that of all parts together
        if protocol.area_threshold is not None:
            parts = drop_small_classes(parts, protocol.area_threshold)
        labels = [choose_classes(part, protocol) for part in parts]
        return scores, torch.cat(labels, dim=1)

    scores, labels = label()
    expected = [[0.25, 0.3, 0.2, 0.1], [0.25, 0.1, 0.6, 0.7], [0.25, 0.4, 0.1, 0.1]]
    assert torch.allclose(scores[:, 0], torch.tensor(expected))
    assert labels.tolist() == [[0, 2, 1, 1]]
    assert label(background_threshold=0.5)[1].tolist() == [[0, 0, 1, 1]]
    # Of three foreground pixels, one is the last class: less than 0.4 of them.
    assert label(area_threshold=0.4)[1].tolist() == [[0, 0, 1, 1]]
    # Background by entropy comes first, and is no foreground, of which the last class is 1 of 3.
    changes = {"background_entropy": 0.98, "area_threshold": 0.3}
    assert label(**changes)[1].tolist() == [[0, 3, 2, 2]]


@pytest.mark.parametrize("scoring", ["regions", "cosines"])
def test_background_by_entropy_by_hand(scoring):
    """Two classes, the first of two words. Four pixels: three sure of a class, one of neither."""
    nats = -(0.8 * math.log(0.8) + 0.2 * math.log(0.2))  # 0.5004, and ln 2 = 0.6931
    # The probability of a class is that of its best word.
    p = torch.tensor([[0.8, 0.8, 0.1, 0.5], [0.1, 0.8, 0.8, 0.1], [0.2, 0.2, 0.2, 0.5]])
    cosines = (p.log() / 10)[:, None]
    for threshold, expected in (
        (nats + 1e-4, [1, 1, 1, 0]),
        (nats - 1e-4, [0, 0, 0, 0]),
        (math.log(2) + 1e-4, [1, 1, 1, 1]),
    ):
        fields = {"classes": [["x", "y"], ["a"]], "logit_scale": 10.0}
        protocol = protocol_for(scoring, **fields, background_entropy=threshold)
        maps = cosines
        if scoring == "regions":
            maps = torch.cat([torch.stack([p[:2].amax(dim=0), p[2]])[:, None], cosines])
        scores = class_scores(maps, 10.0, protocol)
        label = choose_classes(scores, protocol)
        assert label.tolist() == [expected] and scores.shape == (3, 1, 4)
        assert (scores[0, 0] == (torch.tensor(expected) == 0)).all()


class Stripes(OnCLIP):
    """Stands in for a SegCLIP: bright patches are one region and word, dark ones the other."""

    config = dataclasses.replace(TINY, image_size=16, patch_size=4, num_centers=2)

    def __init__(self):
        super().__init__(CLIP(self.config))

    def encode_image(self, image):
        bright = F.avg_pool2d(image.mean(dim=1), 4).flatten(1)[..., None].sigmoid()
        soft = torch.cat([bright, 1 - bright], dim=-1)
        regions = torch.eye(2).expand(len(image), 2, 2)
        return ImageEncoding(torch.ones(len(image), 2), regions, soft.round(), soft)

    def patch_tokens(self, image):
        """One token for all bright patches, one for all dark ones; their cosine is 0.6."""
        bright = F.avg_pool2d(image.mean(dim=1), 4).flatten(1) > 0
        return torch.where(bright[..., None], torch.tensor([2.0, 0.0]), torch.tensor([0.6, 0.8]))


def halves(shape):
    """A Sample with a bright half and a dark one."""
    image = np.zeros((*shape, 3), np.uint8)
    if shape[0] > shape[1]:
        image[: shape[0] // 2] = 255
    else:
        image[:, : shape[1] // 2] = 255
    return Sample(image, None, "halves")


def segment_stripes(samples, protocol, batch_size=16):
    """-> Segmentations by Stripes."""
    segmenter = Segmenter(Stripes(), WORDS, protocol, batch_size)
    images = [load_image(samples, protocol, 4, i) for i in range(len(samples))]
    return [result for _, result in segmenter(images)]


@pytest.mark.parametrize("shape", [(16, 16), (32, 90), (100, 40), (16, 320), (320, 16)])
@pytest.mark.parametrize("window", [16, 0])
@pytest.mark.parametrize("scoring, stride", [("regions", 16), ("cosines", 8)])
def test_windows_are_put_back_where_they_came_from(shape, window, scoring, stride):
    """Whatever the size, each half is labelled to within a patch of the border."""
    protocol = protocol_for(scoring, logit_scale=40, window=window, stride=stride)
    [(label, regions, size, maps, _)] = segment_stripes([halves(shape)], protocol)
    assert label.shape == shape and min(size) == 16
    assert regions.shape == size and maps.shape == (2, *size)
    label = label if shape[0] > shape[1] else label.T
    half = len(label) // 2
    border = -(-4 * min(shape) // 16)
    assert (label[: half - border] == 0).all() and (label[half + border :] == 1).all()


def test_batches_of_windows_change_nothing():
    samples = [halves(shape) for shape in [(16, 16), (32, 90), (100, 40), (16, 99)]]
    results = []
    for batch_size in (1, 3, 100):
        found = segment_stripes(samples, protocol_for(), batch_size)
        results.append([(result.label.tolist(), result.regions.tolist()) for result in found])
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("channels, size", [(1, (37, 50)), (5, (333, 90)), (21, (20, 300))])
def test_rows_are_those_of_the_whole_map(channels, size):
    maps = torch.randn(1, channels, 28, 40, generator=torch.Generator().manual_seed(0))
    rows = [upsample_rows(maps, size, y, min(y + 7, size[0])) for y in range(0, size[0], 7)]
    whole = F.interpolate(maps, size, mode="bilinear")
    torch.testing.assert_close(torch.cat(rows, dim=2), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "scoring, changes",
    [
        ("regions", {}),
        ("regions", {"refine": "pamr"}),
        ("cosines", {}),
        ("cosines", {"refine": "pamr"}),
        ("cosines", {"area_threshold": 0.4}),
    ],
)
def test_an_image_in_strips_has_the_labels_of_the_whole(scoring, changes, monkeypatch):
    rng = np.random.RandomState(0)
    blocks = rng.randint(0, 256, (20, 12, 3)).repeat(40, axis=0).repeat(11, axis=1)
    sample = Sample(blocks.astype(np.uint8), None, "blocks")
    protocol = protocol_for(scoring, logit_scale=40, short_side=48, **changes)
    [whole] = segment_stripes([sample], protocol)
    monkeypatch.setattr(evaluate, "STRIP_NUMBERS", 2 * 132 * 100)
    [strips] = segment_stripes([sample], protocol)
    assert np.array_equal(strips.label, whole.label) and len(np.unique(whole.label)) == 2


def test_pamr_by_hand():
    torch.manual_seed(0)
    image = 255 * torch.rand(3, 5, 6)
    scores = torch.rand(2, 5, 6)
    refined = pamr(scores, image, iterations=2, dilations=(1, 2))
    steps = torch.tensor([[-1, 0, 1], [-2, 0, 2]])

    def around(x, row, column):  # [channels, 2, 3, 3]; beyond the border, the pixel at the border
        y = (row + steps).clamp(0, 4)[:, :, None]
        return x[:, y, (column + steps).clamp(0, 5)[:, None]]

    expected = scores
    for _ in range(2):
        before = expected
        expected = torch.empty_like(scores)
        for row, column in np.ndindex(5, 6):
            colours = around(image, row, column)
            deviation = colours.std(dim=(1, 2, 3), keepdim=True)
            difference = (colours - colours[:, :1, 1:2, 1:2]).abs()
            weight = (-(difference / (0.1 * deviation)).mean(dim=0)).exp()
            weight[:, 1, 1] = 0  # the pixel itself
            total = (weight * around(before, row, column)).sum(dim=(1, 2, 3))
            expected[:, row, column] = total / weight.sum()
    torch.testing.assert_close(refined, expected)
    assert pamr(scores, torch.zeros(3, 5, 6)).isfinite().all()


def test_the_image_that_guides_pamr(monkeypatch):
    """SCLIP and NACLIP enlarge the reduced image again; otherwise it is the image itself."""
    guides = []
    monkeypatch.setattr(evaluate, "pamr", lambda scores, guide: guides.append(guide) or scores)
    sample = halves((40, 60))
    for scoring in ("cosines", "regions"):
        segment_stripes([sample], protocol_for(scoring, logit_scale=40, refine="pamr"))
    reduced = load_image([sample], protocol_for(), 4, 0)[1]
    reduced = normalise(torch.as_tensor(reduced).permute(2, 0, 1))
    enlarged = F.interpolate(reduced[None], (40, 60), mode="bilinear")[0]
    torch.testing.assert_close(guides[0], enlarged)
    assert torch.equal(guides[1], torch.as_tensor(sample.image).permute(2, 0, 1).float())


def test_metric_by_hand():
    confusion = Confusion(4)
    # 255 is not scored; 9 is no class.
    label = np.array([0, 0, 0, 1, 1, 255, 9, 1], np.uint8)
    confusion.add(np.array([0, 0, 1, 1, 2, 0, 2, 0], np.uint8), label)
    # Class 0: correct 2, predicted 3, labelled 3. Class 1: 1, 2, 3. Class 2 is predicted twice, for
    # a 1 and for no class. Class 3 never occurs.
    np.testing.assert_allclose(confusion.iou(), [2 / 4, 1 / 4, 0, np.nan])
    np.testing.assert_allclose(confusion.accuracy(), [2 / 3, 1 / 3, np.nan, np.nan])
    assert confusion.summary() == pytest.approx({"mIoU": 0.25, "mAcc": 0.5, "aAcc": 3 / 6})
    assert Confusion(2).summary() == {"mIoU": 0, "mAcc": 0, "aAcc": 0}


def independent_miou(predictions, truth, num_classes):
    confusion = np.zeros((num_classes, num_classes))
    for name, label in truth.items():
        np.add.at(confusion, (label[label != 255], predictions[name][label != 255]), 1)
    union = confusion.sum(axis=0) + confusion.sum(axis=1) - np.diag(confusion)
    return (np.diag(confusion)[union > 0] / union[union > 0]).mean()


NUMBERS = "short_side window stride templates logit_scale background_threshold area_threshold"
# Of each protocol on each data set, from its authors' configuration files: NUMBERS, with sizes at
# 224 pixels, and how many words there are.
PUBLISHED_SETTINGS = """
segclip   pascal_voc       224 224 224 1  -  0.75 -   20
segclip   pascal_context   224 224 224 1  -  0.25 -   59
segclip   coco_object      224 224 224 1  -  0.65 -   80
segclip   ade20k           224 224 224 1  -  -    -   150
groupvit  pascal_voc       448 448 224 1  -  0.95 -   20
groupvit  pascal_context   448 448 224 1  -  0.35 -   59
groupvit  coco_object      448 448 224 1  -  0.95 -   80
sclip     pascal_voc       336 224 112 80 65 0.1  0.1 56
sclip     pascal_voc20     336 224 112 80 40 -    -   30
sclip     pascal_context   336 224 112 80 50 0.1  -   60
sclip     pascal_context59 336 224 112 80 40 -    -   59
sclip     coco_object      336 224 112 80 50 0.1  -   113
sclip     coco_stuff       448 224 112 80 40 -    -   171
sclip     ade20k           336 224 112 80 40 -    -   150
sclip     cityscapes       560 224 112 80 40 -    -   19
dense     pascal_voc       336 224 112 80 65 0.1  0.1 56
naclip    pascal_voc       336 0   112 80 40 0.1  -   56
naclip    pascal_voc20     336 0   112 80 40 -    -   30
naclip    pascal_context   336 224 112 80 40 0.1  -   60
naclip    coco_object      336 224 112 80 40 0.1  -   113
naclip    coco_stuff       336 224 112 80 40 -    -   171
naclip    cityscapes       560 224 112 80 40 -    -   19
clearclip pascal_voc       448 448 224 80 50 0.5  -   21
clearclip pascal_context   448 448 224 80 50 0.15 -   60
clearclip coco_object      448 448 224 80 50 0.4  -   81
clearclip coco_stuff       448 448 224 80 50 -    -   171
clearclip cityscapes       448 224 224 80 50 -    -   19
""".strip()


@pytest.mark.parametrize("row", PUBLISHED_SETTINGS.splitlines())
def test_each_protocol_is_its_authors(row):
    name, dataset, *published = row.split()
    benchmark = BENCHMARKS[dataset]
    folder = SimpleNamespace(name=dataset, **benchmark._asdict())
    protocol = choose_protocol(name, folder, Config())
    numbers = [getattr(protocol, number) for number in NUMBERS.split()]
    numbers.append(sum(map(len, protocol.classes)))
    assert numbers == [None if number == "-" else float(number) for number in published]
    assert protocol.scoring == ("regions" if name in ("segclip", "groupvit") else "cosines")
    if (name, dataset) == ("clearclip", "pascal_voc"):
        words = [word for [word] in protocol.classes]
        assert words[0] == "background"
        assert {"ship", "pottedplant", "tvmonitor", "person", "table"} < set(words)


def test_templates():
    numbers = {number: len(set(templates)) for number, templates in evaluate.TEMPLATES.items()}
    assert numbers == {1: 1, 7: 7, 80: 80}


@pytest.mark.parametrize("width", [40, 4000])
def test_the_legend_covers_nothing(width):
    image = Image.new("RGB", (width, 100), "blue")
    names = ["a long name of a class", "cat", "grass 12 %"]
    entries = list(zip([(255, 0, 0), (0, 255, 0), (0, 0, 255)], names))
    sheet = np.asarray(with_legend(image, entries))
    assert sheet.shape[1] >= width and (sheet[:100, :width] == (0, 0, 255)).all()
    below = sheet[100:]
    for colour, _ in entries:
        assert (below == colour).all(axis=-1).sum() > 50
    assert (below[:, -2:] == 255).all() and (below[-1] == 255).all()  # no word is cut off
    assert len(np.unique(evaluate.palette(171), axis=0)) > 160


# --------------------------------------------------------------------------------------------------
# The program

KINDS = {
    "segclip": SegCLIP,
    "clip": lambda config: DenseCLIP(CLIP(config)),
    "pacl": lambda config: PACL(CLIP(config)),
    "groupvit": lambda config: GroupViT(
        dataclasses.replace(config, stages=1, group_tokens=5, projector_width=16)
    ),
}


@functools.cache
def tiny_merges():
    texts = [f"a photo of a {word}." for word in VOC]
    texts += [SyntheticScenes(32)[i].caption for i in range(50)]
    return Tokenizer.learn(texts, TINY.vocab_size - Tokenizer().vocab_size).merges


def save_tiny(path, kind="segclip"):
    """Saves a small model with random weights -> its path."""
    torch.manual_seed(0)
    save_checkpoint(path, KINDS[kind](TINY), merges=tiny_merges())
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny") / "checkpoint.pt")


@pytest.fixture
def score(checkpoint, tmp_path):
    """A function that runs evaluate.py on the checkpoint, with more flags -> metrics.json."""

    def run(*flags):
        output = tmp_path / "o"
        common = ("--checkpoint", checkpoint, "--output", output, "--workers", 0, "--device", "cpu")
        evaluate.main([str(flag) for flag in (*common, *flags)])
        return json.loads((output / "metrics.json").read_text())

    return run


def fails(function, *flags):
    """The message of a run that must end with one line."""
    with pytest.raises((InputError, OSError)) as error:
        function(*flags)
    assert "\n" not in str(error.value)
    return str(error.value)


def run_python(*arguments, **options):
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def same_with_two_processes(metrics, output):
    """Two processes must find the metrics of one -> what they print."""
    flags = metrics["flags"].items()
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in flags if value]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = run_python(*torchrun, evaluate.__file__, *flags, "--output", output)
    assert done.returncode == 0, done.stderr
    found = json.loads((output / "metrics.json").read_text())
    assert found | {"flags": None} == metrics | {"flags": None}
    return done.stdout


def without_metrics(score, *flags):
    with pytest.raises(FileNotFoundError, match="metrics.json"):
        score(*flags)


def read_labels(folder):
    """{name: label map} of all predictions."""
    files = sorted((folder / "predictions").rglob("*.png"))
    return {path.stem: np.asarray(Image.open(path)) for path in files}


def test_center_crop():
    random = np.random.RandomState(0)
    image = random.randint(0, 256, (32, 35, 3), np.uint8)
    # 1.5 is rounded as Python does, and so torchvision.
    assert (center_crop(image, 32) == image[:, 2:34]).all()
    assert (center_crop(image.swapaxes(0, 1), 32) == image.swapaxes(0, 1)[2:34]).all()
    # The short side becomes 32, the long one 53 (53.9 cut off).
    image = random.randint(0, 256, (60, 101, 3), np.uint8)
    resized = np.asarray(Image.fromarray(image).resize((53, 32), Image.BICUBIC))
    assert (center_crop(image, 32) == resized[:, 10:42]).all()
    for size in ((1, 1), (2, 90), (90, 1)):
        assert center_crop(np.zeros((*size, 3), np.uint8), 32).shape == (32, 32, 3)


@pytest.fixture
def animals(tmp_path):
    """A folder of images in folders: {class: number of images}."""
    random = np.random.RandomState(0)
    root = tmp_path / "animals"
    numbers = {"red_dog": 3, "cat": 2, "Boat": 4, "bird": 1, "sheep": 2, "cow": 1, "bus": 2}
    for name, number in numbers.items():
        (root / name / "deep").mkdir(parents=True)
        for i, file in enumerate(["0.png", "deep/1.JPEG", "2.JPEG", "3.JPEG"][:number]):
            image = Image.fromarray(random.randint(0, 256, (4, 6, 3), np.uint8))
            image.resize((48, 40), Image.NEAREST).save(root / name / file)
    (root / ".hidden").mkdir()
    return root


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_classification_by_hand(kind, score, animals, tmp_path):
    path = save_tiny(tmp_path / "a.pt", kind)
    folders = ["Boat", "bird", "bus", "cat", "cow", "red_dog", "sheep"]
    classes = [["boat", "ship"], ["bird"], ["bus"], ["cat"], ["cow"], ["dog", "red dog"], ["sheep"]]
    words = tmp_path / "words.txt"
    words.write_text("\n".join(map(", ".join, classes)))
    flags = ("--checkpoint", path, "--batch-size", 4, "--workers", 1)
    metrics = score("--classify", animals, "--words", words, *flags)

    model = load_model(path).eval()
    tokenizer = load_tokenizer(path)
    texts = []
    class_of_text = []
    for c, words in enumerate(classes):
        for word in words:
            tokens = tokenizer([template.format(word) for template in evaluate.TEMPLATES[7]], 12)
            texts.append(F.normalize(model.encode_text(tokens), dim=-1).mean(dim=0))
            class_of_text.append(c)
    texts = F.normalize(torch.stack(texts), dim=-1)
    ranks = {name: [] for name in folders}  # of the true class of each image
    for c, name in enumerate(folders):
        for file in sorted((animals / name).rglob("?.*")):
            image = Image.open(file).convert("RGB").resize((38, 32), Image.BICUBIC)
            crop = torch.tensor(np.asarray(image.crop((3, 0, 35, 32))))
            encoding = model.encode_image(normalise(crop.permute(2, 0, 1)[None]))
            scores = F.cosine_similarity(encoding.features, texts)
            if kind == "pacl":
                scores = compatibility(encoding.regions, texts, 10)[0]
            order = scores.argsort(descending=True).tolist()
            best = dict.fromkeys(class_of_text[i] for i in order)  # each class once
            ranks[name].append(list(best).index(c))
    every = np.array(sum(ranks.values(), []))
    assert metrics["images"] == len(every) == 15
    assert metrics["accuracy"] == {name: np.mean(np.equal(ranks[name], 0)) for name in folders}
    assert metrics["top-1"] == (every == 0).mean() and metrics["top-5"] == (every < 5).mean() < 1
    assert metrics["protocol"]["classes"] == classes and metrics["protocol"]["templates"] == 7
    if kind == "pacl":
        assert same_with_two_processes(metrics, tmp_path / "two").count("top-1") == 1


def test_classification_of_some_images(score, animals, tmp_path, capsys):
    flags = ("--classify", animals, "--limit", 5, "--templates", 1, "--stride-trick", 4)
    metrics = score(*flags)
    assert metrics["images"] == 5 and metrics["accuracy"]["sheep"] is None
    changes = {"templates": 1, "stride_trick": 4}
    assert changes.items() < metrics["protocol"].items()
    assert metrics["protocol"]["classes"][5] == ["red dog"]
    image = animals / "Boat/0.png"
    image.write_text("not an image")
    assert "unreadable images were left out: 1" in fails(score, *flags)
    assert str(image) in capsys.readouterr().err
    metrics = json.loads((tmp_path / "o/metrics.json").read_text())
    assert (metrics["images"], metrics["unreadable"]) == (4, 1)
    (animals / "cow/0.png").unlink()
    assert f"{animals / 'cow'}: no image" in fails(score, *flags)


def test_scenes_and_the_stride_trick(score, checkpoint, tmp_path):
    """At a patch's size it changes nothing; below, there are more patches, which overlap."""
    labels = []
    for stride in ((), ("--stride-trick", 8), ("--stride-trick", 2)):
        assert score("--limit", 8, *stride)["images"] == 8
        labels.append(read_labels(tmp_path / "o"))
    assert list(labels[0]) == [f"scene{i:05}" for i in range(8)]
    plain, trick_8, trick_2 = (np.stack(list(maps.values())) for maps in labels)
    assert (plain == trick_8).all() and (plain != trick_2).any()
    assert score("--dataset", "synthetic-unseen", "--limit", 5)["images"] == 5
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


# What each benchmark's files hold, and the class that each value means, worked out from the data
# sets' own descriptions.
UNUSED_IN_COCO = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
THINGS = [value for value in range(90) if value + 1 not in UNUSED_IN_COCO]
STUFF = list(range(91, 182))
CITY = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
# fmt: off
VOC_FILES = ("JPEGImages/*.jpg", "SegmentationClass/*.png", "ImageSets/Segmentation/val.txt")
CONTEXT_FILES = ("JPEGImages/*.jpg", "SegmentationClassContext/*.png",
    "ImageSets/SegmentationContext/val.txt")
COCO_IMAGES = "images/val2017/*.jpg"
CITY_IMAGES = "leftImg8bit/val/ulm/*_leftImg8bit.png"
CITY_LABELS = "gtFine/val/ulm/*_gtFine"
TREES = {  # case: (data set, images, labels, list of names, {value: class}); * is the image's name
    "voc": ("pascal_voc", *VOC_FILES, {i: i for i in range(21)}),
    "voc20": ("pascal_voc20", *VOC_FILES, {0: 255} | {i + 1: i for i in range(20)}),
    "context": ("pascal_context", *CONTEXT_FILES, {i: i for i in range(60)}),
    "context59": ("pascal_context59", *CONTEXT_FILES, {0: 255} | {i + 1: i for i in range(59)}),
    "object, raw": ("coco_object", COCO_IMAGES, "annotations/val2017/*.png", None,
        {v: 1 + i for i, v in enumerate(THINGS)} | {v: 0 for v in STUFF} | {255: 0}),
    "object, converted": ("coco_object", COCO_IMAGES,
        "annotations/val2017/*_instanceTrainIds.png", None, {i: i for i in range(81)}),
    "stuff, raw": ("coco_stuff", COCO_IMAGES, "stuffthingmaps/val2017/*.png", None,
        {v: i for i, v in enumerate(THINGS + STUFF)}),
    "stuff, converted": ("coco_stuff", COCO_IMAGES, "annotations/val2017/*_labelTrainIds.png",
        None, {i: i for i in range(171)}),
    "ade20k": ("ade20k", "images/validation/*.jpg", "annotations/validation/*.png", None,
        {0: 255} | {i + 1: i for i in range(150)}),
    "cityscapes, ids": ("cityscapes", CITY_IMAGES, f"{CITY_LABELS}_labelIds.png", None,
        {i: 255 for i in range(34)} | {v: i for i, v in enumerate(CITY)}),
    "cityscapes, train ids": ("cityscapes", CITY_IMAGES, f"{CITY_LABELS}_labelTrainIds.png", None,
        {i: i for i in range(19)}),
}
# fmt: on


def make_tree(root, case):
    """Writes noise as images, and label maps in which each value occurs -> {name: classes}."""
    _, image, label, split, meaning = TREES[case]
    meaning = {255: 255} | meaning
    table = np.zeros(256, np.uint8)
    table[list(meaning)] = list(meaning.values())
    random = np.random.RandomState(0)
    for path in filter(None, (image, label, split)):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
    if split:
        (root / split).write_text("b\na\n")
    truth = {}
    for name in ("b", "a"):
        noise = Image.fromarray(random.randint(0, 256, (40, 56, 3), np.uint8))
        noise.save(root / image.replace("*", name))
        values = random.choice(np.array(list(meaning), np.uint8), (40, 56))
        values.flat[: len(meaning)] = list(meaning)
        label_map = Image.fromarray(values)
        # VOC and ADE20K have one; the colours must not matter.
        label_map.putpalette(list(random.randint(0, 256, 768)))
        label_map.save(root / label.replace("*", name))
        truth[name] = table[values]
    return truth


@pytest.mark.parametrize("case", TREES)
def test_every_benchmark_in_its_folders(case, score, tmp_path):
    truth = make_tree(tmp_path, case)
    name = TREES[case][0]
    metrics = score("--dataset", name, "--data-root", tmp_path)
    found = read_labels(tmp_path / "o")
    found = {key.removesuffix("_leftImg8bit"): label for key, label in found.items()}
    assert found.keys() == truth.keys()
    assert metrics["mIoU"] == pytest.approx(independent_miou(found, truth, len(metrics["IoU"])))
    thresholds = {"pascal_voc": 0.75, "pascal_context": 0.25, "coco_object": 0.65}  # Section 3.1
    assert metrics["protocol"]["background_threshold"] == thresholds.get(name)
    assert metrics["images"] == 2 and len(set(metrics["IoU"].values())) > 1


ODD_IMAGES = {
    "grey": Image.new("L", (40, 30), 99),
    "one_pixel": Image.new("RGB", (1, 1)),
    "tall": Image.new("RGB", (3, 60), "red"),
    "rotated": Image.new("RGB", (30, 40), "blue"),  # as a viewer shows it
}


def test_one_process_and_two_on_images_as_people_have_them(score, tmp_path, capsys):
    make_tree(tmp_path, "voc")
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text("\n".join(ODD_IMAGES))
    exif = Image.Exif()
    for name, image in ODD_IMAGES.items():
        Image.new("L", image.size, 3).save(tmp_path / f"SegmentationClass/{name}.png")
        if name == "rotated":
            exif[0x0112] = 6  # by a quarter
            image = image.transpose(Image.ROTATE_90)
        image.save(tmp_path / f"JPEGImages/{name}.jpg", exif=exif)
    metrics = score("--dataset", "pascal_voc", "--data-root", tmp_path)
    assert metrics["images"] == 4 and list(metrics["IoU"]) == ["background", *VOC]
    assert f"mIoU {100 * metrics['mIoU']:.2f} %" in capsys.readouterr().out
    for name, image in ODD_IMAGES.items():
        prediction = Image.open(tmp_path / f"o/predictions/{name}.png")
        assert prediction.size == image.size
        assert prediction.getpalette()[:63] == evaluate.palette(21).ravel().tolist()
    assert Image.open(tmp_path / "o/examples.png").width > 400
    same_with_two_processes(metrics, tmp_path / "two")


def test_every_flag_is_read(checkpoint, tmp_path, monkeypatch):
    make_tree(tmp_path, "voc")
    parse_args = evaluate.parse_args
    unread = set(vars(parse_args([])))
    for flags in (
        f"--dataset pascal_voc --data-root {tmp_path}",
        f"--image {tmp_path}/JPEGImages/a.jpg --words cat",
    ):
        flags += f" --checkpoint {checkpoint} --output {tmp_path}"
        args, read = recorder(parse_args(flags.split()))
        monkeypatch.setattr(evaluate, "parse_args", lambda argv: args)
        evaluate.main()
        unread -= read
    assert not unread


def test_three_photographs_of_ade20k():
    """As distributed: 0 is what has no class, 1 the first class."""
    root = GOLDEN / "ade_sample"
    confusion = Confusion(150)
    predictions = {}
    truth = {}
    for sample in SegmentationFolder("ade20k", root):
        raw = np.asarray(Image.open(root / f"annotations/validation/{sample.name}.png"))
        truth[sample.name] = np.where(raw == 0, 255, raw.astype(int) - 1)
        prediction = np.where(sample.label == 255, 2, sample.label)
        prediction[len(raw) // 2 :] = 2  # sky
        predictions[sample.name] = prediction
        confusion.add(prediction, sample.label)
    expected = independent_miou(predictions, truth, 150)
    assert confusion.summary()["mIoU"] == pytest.approx(expected) and 0.1 < expected < 0.7


def test_protocols_from_flags(score, tmp_path):
    make_tree(tmp_path, "voc")
    flags = ["--dataset", "pascal_voc", "--data-root", tmp_path]
    for protocol in ("segclip", "sclip"):
        # The entropy is always above the one, never above the other: ln 20 = 3.0.
        for threshold in (0, 9):
            changes = ("--background-entropy", threshold, "--templates", 1)
            metrics = score(*flags, "--protocol", protocol, *changes)
            assert metrics["protocol"]["background_threshold"] is None
            assert len(metrics["protocol"]["classes"]) == 20  # background is none of them
            assert list(metrics["IoU"]) == ["background", *VOC]
            for label in read_labels(tmp_path / "o").values():
                assert ((label > 0) == (threshold > 0)).all()
    metrics = score(*flags, "--protocol", "sclip")
    used = metrics["protocol"]
    # For a model of 32 pixels:
    assert (used["short_side"], used["window"], used["stride"]) == (48, 32, 16)
    assert len(used["classes"]) == 21 and len(used["classes"][0]) == 26
    assert list(metrics["IoU"]) == ["background", *VOC]
    changes = {"logit_scale": 10.0, "area_threshold": 0.2, "templates": 7, "stride": 24}
    changes |= {"refine": "pamr", "stride_trick": 4}
    for name, value in changes.items():
        flags += [f"--{name.replace('_', '-')}", value]
    # Whole images, 48 and 67 pixels wide, which is no multiple of 8.
    used = score(*flags, "--protocol", "naclip", "--background", 0.3)["protocol"]
    changes |= {"name": "naclip", "window": 0, "short_side": 48, "background_threshold": 0.3}
    assert changes.items() < used.items()


def test_own_images_with_and_without_labels(score, tmp_path):
    for folder in ("images", "labels"):
        (tmp_path / folder / "deep").mkdir(parents=True)
    Image.new("RGB", (40, 30), "red").save(tmp_path / "images/deep/one.JPG")
    Image.new("L", (50, 20)).save(tmp_path / "images/two.png")
    Image.new("L", (40, 30), 1).save(tmp_path / "labels/deep/one.png")
    (tmp_path / "words.txt").write_text("red wall, wall\n\n cat\n")
    flags = ["--images", tmp_path / "images", "--words", tmp_path / "words.txt"]
    out = tmp_path / "images/out"
    for _ in range(2):  # the result is not labelled in its turn
        without_metrics(score, *flags, "--output", out)
    files = {str(path.relative_to(out)) for path in out.rglob("*.*")}
    assert files == {"predictions/deep/one.png", "predictions/two.png", "examples.png"}
    flags += ["--labels-dir", tmp_path / "labels"]
    for background, threshold in ([], None), (["--background"], 0.75), (["--background", 1], 1):
        metrics = score(*flags, *background)
        assert metrics["images"] == 1
        assert metrics["protocol"]["classes"] == [["red wall", "wall"], ["cat"]]
        assert metrics["protocol"]["background_threshold"] == threshold
        assert list(metrics["IoU"]) == ["background"] * bool(background) + ["red wall", "cat"]


def test_one_image(score, tmp_path, capsys):
    photo = tmp_path / "my photo.jpg"
    Image.new("RGB", (90, 60), "red").save(photo)
    without_metrics(score, "--image", photo, "--words", "grass, polar bear", "--heat")
    files = {path.name: Image.open(path) for path in (tmp_path / "o").iterdir()}
    names = ("overlay", "labels", "regions", "heat_0_grass", "heat_1_polar_bear")
    assert files.keys() == {f"my photo_{name}.png" for name in names}
    labels = files["my photo_labels.png"]
    assert labels.size == files["my photo_regions.png"].size == (90, 60)
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    shares = [float(line.split()[-2]) for line in lines if line.endswith("%")]
    assert sum(shares) == pytest.approx(100, abs=0.2)
    resolution, unknown = printed.err.splitlines()
    assert (
        resolution == "inference resolution: short side 32, crops of 32 in training; windows of 32"
    )
    assert unknown == "rare or unknown in the captions of training: polar bear"


# --------------------------------------------------------------------------------------------------
# Bad input ends with one line

BAD_FLAGS = {  # voc: a benchmark that is there; {root}: a folder with images and words
    "--checkpoint nothing.pt": "nothing.pt: ",
    "--dataset imagenet": "invalid choice: 'imagenet'",
    "--dataset pascal_voc": "needs --data-root",
    "--data-root {root}": "--data-root needs --dataset",
    "voc --output {root}/words.txt": "words.txt",
    "voc --words 'cat, dog'": "2 classes",
    "--images {root} --words 'cat\ndog'": "not one line",
    "--images {root} --words 'cat \udcff'": "not one line",
    "--images {root} --words cat --ignore 3": "--ignore is for --labels-dir",
    "voc --logit-scale 3": "--protocol segclip has none",
    "voc --heat": "--heat is for --image",
    "voc --background nan": "nan is not between 0 and 1",
    "voc --background-entropy 1.5 --background 0.5": "it is this or",
    "--background-entropy 1.5": "has no background",
    "--limit 0": "--limit: 0 is not between",
    "--window 33": "--window 33",
    "--stride 64": "--stride 64",
    "--stride-trick 3": "--stride-trick 3: must divide the patch size 8",
    "--images {root}": "need --words",
    "--images {root}/none --classify {root}": "not both",
    "--images {root}/empty --words cat": "{root}/empty: no image",
    "--images {root}/twice --words cat": "two images",
    "--images {root} --words 'cat, Cat'": "twice",
    "--images {root} --words 'cat, background' --background": "background",
    "--images {root} --words ' , '": "0 classes",
    "--images {root} --words " + ",".join(map(str, range(256))): "256 classes",
    "--images {root} --words {root}/words.txt": "without a word",
    "--images {root} --words none.txt": "none.txt: ",
    "--image {root}/none.jpg --words cat": "none.jpg: does not exist",
    "--classify {root}/none": "no such folder",
    "--classify {root}/empty": "no folder in it",
    "--classify {root}/classes --words 'cat, dog'": "2 classes",
    "--classify {root} --window 32": "--classify has no --window",
    "--classify {root} --protocol dense": "--classify has no --protocol",
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flags(flags, score, tmp_path):
    root = tmp_path / "root"
    for folder in ("empty", "twice", "classes/cat"):
        (root / folder).mkdir(parents=True)
    for name in ("a.png", "twice/a.png", "twice/a.bmp", "classes/cat/a.png"):
        Image.new("RGB", (40, 30)).save(root / name)
    (root / "words.txt").write_text("cat\n,\n")
    make_tree(tmp_path, "voc")
    words = flags.replace("voc ", f"--dataset pascal_voc --data-root {tmp_path} ")
    message = fails(score, *shlex.split(words.format(root=root)))
    assert BAD_FLAGS[flags].format(root=root) in message


def test_the_folder_of_a_benchmark_may_be_relative(tmp_path, monkeypatch):
    make_tree(tmp_path / "voc", "voc")
    monkeypatch.chdir(tmp_path)
    assert len(SegmentationFolder("pascal_voc", "voc")) == len(list(tmp_path.rglob("*.jpg")))


def test_unreadable_images_are_named_and_left_out(checkpoint, tmp_path):
    make_tree(tmp_path, "voc")
    image = tmp_path / "JPEGImages/a.jpg"
    image.write_text("not an image")
    flags = ("--dataset", "pascal_voc", "--data-root", tmp_path, "--checkpoint", checkpoint)
    done = run_python(evaluate.__file__, *flags, cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.count("\n") == 4, done.stderr
    assert f"\n{image}: not a readable image" in done.stderr and "mIoU" in done.stdout
    assert done.stderr.endswith("evaluate.py: unreadable images were left out: 1\n")


def test_a_mistake_in_the_code_ends_with_a_traceback(checkpoint, tmp_path):
    """In a worker process, which must not be waited for."""
    code = "import evaluate; evaluate.SyntheticScenes.__getitem__ = lambda *_: 1 / 0; "
    code += "evaluate.run_program(evaluate.main, '')"
    flags = ("--checkpoint", checkpoint, "--output", tmp_path)
    done = run_python("-c", code, *flags, cwd=Path(evaluate.__file__).parent)
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "ZeroDivisionError" in done.stderr


def test_no_checkpoint_and_one_without_its_vocabulary(score, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "python train.py" in fails(evaluate.main, [])
    save_checkpoint("a.pt", SegCLIP(TINY))
    assert "none.gz" in fails(score, "--checkpoint", "a.pt", "--vocabulary", "none.gz")
    save_checkpoint("a.pt", SegCLIP(TINY), merges=["a b"])
    assert "600 tokens, but the vocabulary has 515" in fails(score, "--checkpoint", "a.pt")


def test_the_words_choose_the_model_where_no_checkpoint_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "find", lambda name: None)
    flags = ["--image", str(next((GOLDEN / "pipeline/voc_like/JPEGImages").iterdir()))]
    message = fails(evaluate.main, [*flags, "--words", "cat"])
    assert "runs/synthetic/checkpoint.pt does not exist" in message
    assert "--checkpoint ViT-B/16 --readout naclip" in message
    tokenizer = Tokenizer.learn(["a ball on grass"] * 9, 20)
    config = dataclasses.replace(TINY, vocab_size=tokenizer.vocab_size)
    save_checkpoint("runs/synthetic/checkpoint.pt", SegCLIP(config), merges=tokenizer.merges)
    evaluate.main([*flags, "--words", "ball, grass", "--workers", "0", "--device", "cpu"])
    assert "does not know zebra" in fails(evaluate.main, [*flags, "--words", "ball, zebra"])
    monkeypatch.setattr(evaluate, "find", lambda name: Path("cached"))
    assert evaluate.choose_model(None, None, [["zebra"]]) == ("ViT-B/16", "naclip")


@pytest.mark.parametrize("program", ["train.py", "evaluate.py"])
def test_help_touches_nothing_and_a_failure_is_one_line(program, tmp_path):
    path = Path(evaluate.__file__).with_name(program)
    failed = run_python(path, "--device", "toaster", cwd=tmp_path)
    assert failed.returncode == 1 and failed.stdout == "" and failed.stderr.count("\n") == 1
    assert failed.stderr.startswith(f"{program}: --device toaster")
    helped = run_python(path, "--help", cwd=tmp_path)
    assert helped.returncode == 0 and "--output" in helped.stdout and helped.stderr == ""
    assert list(tmp_path.iterdir()) == []
