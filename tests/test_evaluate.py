"""evaluate.py: protocols, label maps by hand, the metric, the program with good and bad input."""

import hashlib
import json
import math
import os
from pathlib import Path
from signal import SIGKILL
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed.run as torchrun
import torch.nn.functional as F
from conftest import TINY, assert_one_line, recorder
from PIL import Image

import data
import evaluate
from clip_loader import Tokenizer, open_model, save_checkpoint
from data import BENCHMARKS, LabeledImages, SyntheticScenes, normalize, resize_bilinear
from evaluate import TEMPLATES, choose_protocol, class_features, segment
from model import Config, ImageEncoding, InputError, PatchEncoder, SegCLIP

NUMBERS = "short_side window stride templates logit_scale background_threshold area_threshold"
# From the authors' configuration files; at last how many words there are.
PUBLISHED = """
segclip   pascal_voc     224 224 224  1  - 0.75   -  20
groupvit  pascal_voc     448 448 224  1  - 0.95   -  20
sclip     pascal_voc     336 224 112 80 65  0.1 0.1  56
sclip     pascal_voc20   336 224 112 80 40    -   -  30
naclip    pascal_voc     336   0 112 80 40  0.1   -  56
clearclip pascal_voc     448 448 224 80 50  0.5   -  21
proxyclip pascal_context 336 336 112 80 40 0.15   -  60
proxyclip pascal_voc     336 336 112 80 40  0.2   -  46
proxyclip coco_object    336 336 112 80 40 0.25   -  97
"""


@pytest.mark.parametrize("row", PUBLISHED.strip().splitlines())
def test_protocols_are_their_authors(row):
    name, dataset, *published = row.split()
    dataset = LabeledImages(dataset, *BENCHMARKS[dataset][:2], [])
    protocol = choose_protocol(name, dataset, Config(image_size=448))
    found = [getattr(protocol, number) for number in NUMBERS.split()]
    found[:3] = [size / 2 for size in found[:3]]  # published for models of 224 pixels
    found.append(sum(map(len, protocol.classes)))
    assert found == [None if number == "-" else float(number) for number in published]


def test_templates():
    text = "\n".join(sorted(TEMPLATES[80]) + sorted(TEMPLATES[7]))
    assert hashlib.sha256(text.encode()).hexdigest().startswith("e1854357499d")
    assert {number: len(set(x)) for number, x in TEMPLATES.items()} == {1: 1, 7: 7, 80: 80}


@torch.no_grad()
def test_features_of_a_word(checkpoint):
    """Mean over the templates; in dense protocols, of unit vectors."""
    model, tokenizer = open_model(checkpoint)
    found = class_features(model, tokenizer, protocol_for("sclip", [["sea", "bear"]], templates=7))
    each = model.encode_text(tokenizer([text.format("bear") for text in TEMPLATES[7]], 12))
    expected = F.normalize(F.normalize(each, dim=1).mean(dim=0), dim=0)
    torch.testing.assert_close(found[1], expected, rtol=0, atol=1e-6)


# One image, by hand: a stand-in says what the model sees


def protocol_for(name, classes=(["a"], ["b"]), patch=1, **changes):
    """For an image of one's own; by default in one piece, not resized."""
    has_background = any(changes.get(name) is not None for name in evaluate.BACKGROUNDS)
    words = [synonyms[0] for synonyms in classes]
    dataset = LabeledImages("images", words, has_background, [])
    changes = {"short_side": 1, "window": 0} | changes
    config = Config(image_size=32, patch_size=patch)
    return choose_protocol(name, dataset, config, list(classes), **changes)


SCALE = 40  # of logits; SCLIP's, and here the model's


def stand_in(encode, patch=1):
    visual = PatchEncoder(Config(image_size=32, patch_size=patch, vision_width=64))
    clip = SimpleNamespace(logit_scale=torch.tensor(SCALE).log())
    return SimpleNamespace(visual=visual, clip=clip, encode_image=encode)


def see(weights, soft=None, **protocol):
    """A row of pixels -> Segmentation.

    weights [windows, regions, words]: what the softmax over the words is proportional to.
    """
    cosines = torch.tensor(weights).log() / SCALE
    rest = (1 - cosines.square().sum(dim=-1, keepdim=True)).sqrt()
    regions = torch.cat([cosines, rest], dim=-1)
    model = stand_in(lambda *_: ImageEncoding(regions[:, -1], regions, None, soft))
    image = np.zeros((1, cosines.shape[soft is None], 3), np.uint8)
    text = torch.eye(regions.shape[2])[:-1]
    return segment(model, text, image, protocol_for(**protocol))


# Weights of background, of two words of class 1, of class 2.
DENSE = [(4.0, 3, 2, 1), (1, 3, 2.5, 3.5), (1, 1, 6, 2), (2.7, 3.3, 2, 2), (2, 2, 3.3, 2.7)]
UNSURE = [(8.0, 1, 2), (1, 8, 2), (5, 1, 5)]  # without background: 0.5004, 0.5004, 0.6931 nats


@pytest.mark.parametrize(
    "weights, threshold, entropy, area, expected",
    [
        (DENSE, 0.34, None, None, [0, 2, 1, 0, 0]),
        (DENSE, 0, None, 0.24, [0, 2, 1, 1, 1]),  # class 2: a quarter of the foreground
        (DENSE, 0, None, 0.25, [0, 1, 1, 1, 1]),
        (DENSE, 0.34, None, 0.30, [0, 0, 1, 0, 0]),
        (UNSURE, None, 0.5003, None, [0, 0, 0]),
        (UNSURE, None, 0.5005, None, [1, 1, 0]),
    ],
)
def test_dense_labels_by_hand(weights, threshold, entropy, area, expected):
    changes = {"background_threshold": threshold, "background_entropy": entropy}
    changes |= {"classes": [["a", "b"], ["c"]], "area_threshold": area}
    assert see([weights], name="sclip", **changes).label.tolist() == [expected]


@pytest.mark.parametrize(
    "threshold, expected", [(None, [0, 1, 1, 0]), (0.08, [1, 2, 2, 1]), (0.17, [1, 0, 2, 0])]
)
def test_regions_by_hand(threshold, expected):
    """Four windows of a pixel. The best scores are 6/20 * 6/10, 3/8 * 3/7 twice, 3/11 * 3/10.

    The last word is not among the five best. A window's best region is never background.
    """
    image = (9.0, 8, 7, 6, 5, 4)
    first = [(6, 1, 1, 1, 1, 10), (1, 3, 1, 1, 1, 1), image]
    last = [(1, 3, 1, 1, 1, 1), (3, 2.5, 2.5, 1, 1, 1), image]
    soft = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.7, 0.2]] * 2)[:, None]
    protocol = {"name": "segclip", "window": 1, "background_threshold": threshold}
    protocol["classes"] = [["a"], ["b", "c"], ["d"], ["e"], ["f"]]
    found = see([first, first, last, last], soft, **protocol)
    assert found.label.tolist() == [expected]
    assert found.regions.tolist() == [[0, 4, 6, 10]]


@pytest.mark.parametrize("protocol", ["sclip", "segclip"])
@pytest.mark.parametrize("others", [0, 1])
def test_a_word_does_not_depend_on_being_alone(protocol, others):
    """Cosines of 0.5 and 0.1 with it, and 0 with the other."""
    weights = [[math.exp(SCALE * x), 1.0][: 1 + others] for x in (0.5, 0.1)]
    seen = [weights], None
    if protocol == "segclip":  # two windows of a region
        seen = [[x] for x in weights], torch.ones(2, 1, 1)
    changes = {"name": protocol, "classes": [["a"], ["b"]][: 1 + others]}
    changes["window"] = int(protocol == "segclip")
    for threshold, label in {0.0: [1, 1], 0.2: [1, 0], 0.6: [0, 0]}.items():
        assert see(*seen, **changes, background_cosine=threshold).label.tolist() == [label]


@pytest.mark.parametrize(
    "width, stride, lefts", [(52, 8, [0, 8, 16, 19]), (60, 99, [0, 16, 24]), (60, 1, range(25))]
)
def test_windows_are_put_back(width, stride, lefts):
    image = np.random.RandomState(0).randint(0, 256, (24, width, 3), np.uint8)
    windows = []

    def encode(some, _):
        windows.append(some)
        tokens = torch.stack([some[:, 0] > 0, some[:, 0] <= 0], dim=-1)  # of bright, of dark pixels
        return ImageEncoding(torch.ones(len(some), 2), tokens.flatten(1, 2).float())

    protocol = protocol_for("sclip", short_side=16, window=16, stride=stride)
    found = segment(stand_in(encode), torch.eye(2), image, protocol)
    resized = resize_bilinear(image, 16, lefts[-1] + 16)
    seen = normalize(torch.tensor(resized).permute(2, 0, 1))
    expected = torch.stack([seen[..., left : left + 16] for left in lefts])
    assert torch.equal(torch.cat(windows), expected)
    assert torch.equal(found.maps[0], (seen[0] > 0).float())


@pytest.mark.parametrize("step", [4, 2, 1])
def test_the_stride_trick_moves_no_patch(step):
    """Patches of 4 pixels in an image of 16: the center of column k is step * k + 1.5."""
    columns = (16 - 4) // step + 1
    tokens = torch.eye(columns).repeat(1, columns, 1)  # each column is another word
    model = stand_in(lambda *_: ImageEncoding(tokens[:, 0], tokens), 4)
    sizes = {"patch": 4, "short_side": 16, "window": 16, "stride_trick": step}
    protocol = protocol_for("sclip", [["a"]] * columns, **sizes)
    image = np.zeros((16, 16, 3), np.uint8)
    maps = segment(model, torch.eye(columns), image, protocol).maps.mean(dim=1)  # [columns, 16]
    centers = maps @ torch.arange(16.0) / maps.sum(dim=1)
    expected = step * torch.arange(columns) + 1.5
    assert ((centers - expected).abs() <= 0.5)[1:-1].all()


def test_pamr_by_hand():
    torch.manual_seed(0)
    image = torch.rand(3, 4, 5)
    scores = torch.rand(2, 4, 5)
    padded = F.pad(torch.cat([image, scores])[None], [2, 2, 2, 2], mode="replicate")[0]
    refined = evaluate.pamr(scores, image, 1, (1, 2))
    for y, x in np.ndindex(4, 5):
        around = padded[:, y : y + 5, x : x + 5]  # [channels, 5, 5]
        around = torch.cat([around[:, 1:4, 1:4], around[:, ::2, ::2]], dim=1).flatten(1)
        colors, values = around.split([3, 2])
        difference = (colors - image[:, y, x, None]).abs()
        weights = (-difference / (0.1 * colors.std(dim=1, keepdim=True))).mean(dim=0).exp()
        weights[[4, 13]] = 0  # the pixel itself
        torch.testing.assert_close(refined[:, y, x], values @ weights / weights.sum())


def test_confusion():
    """Class 2 is never predicted, 3 never labeled, 5 neither; 255 does not count."""
    random = np.random.RandomState(0)
    labels = np.uint8(random.choice([0, 1, 2, 4, 255], (2, 30, 40)))
    predictions = np.uint8(random.choice([0, 1, 3, 4], (2, 30, 40)))
    confusion = evaluate.Confusion(6)
    for prediction, label in zip(predictions, labels):
        confusion.add(prediction, label)
    p = predictions[labels != 255]
    t = labels[labels != 255]
    iou = [((p == c) & (t == c)).sum() / ((p == c) | (t == c)).sum() for c in range(5)]
    accuracy = [(p[t == c] == c).mean() for c in (0, 1, 2, 4)]
    expected = {"mIoU": np.mean(iou), "mAcc": np.mean(accuracy), "aAcc": (p == t).mean()}
    assert confusion.summary() == pytest.approx(expected)


# The program


def save_tiny(path):
    """Saves a small random model -> its path."""
    torch.manual_seed(0)
    captions = [SyntheticScenes(32)[i].caption for i in range(50)]
    merges = Tokenizer.learn(captions, TINY.vocab_size - Tokenizer().vocab_size).merges
    save_checkpoint(path, SegCLIP(TINY), merges=merges)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny") / "checkpoint.pt")


@pytest.fixture
def run(checkpoint, tmp_path, monkeypatch):
    """Runs evaluate.py -> its metrics."""
    monkeypatch.chdir(tmp_path)

    def run(flags):
        evaluate.main(f"--checkpoint {checkpoint} --output o --workers 0 {flags}".split())
        return read_metrics("o")

    return run


def read_metrics(folder):
    return json.loads(Path(folder, "metrics.json").read_text())


@pytest.fixture
def photos(run):
    """Images, labels of one, and a file of words."""
    os.makedirs("photos/deep")
    os.makedirs("labels/deep")
    Image.fromarray(SyntheticScenes(64)[1].image).save("photos/deep/scene.JPG")
    Image.new("L", (1, 1)).save("photos/dot.png")
    Image.new("RGB", (4000, 40), "red").save("photos/long.png")
    Image.fromarray(np.tile(np.uint8([0, 1, 255, 0]), (64, 16))).save("labels/deep/scene.png")
    Path("words.txt").write_text("grass, lawn\n\nzebra\n")
    Path("photos/words").write_text("cat\n,\n")


def test_one_process_and_two(run, checkpoint, capfd):
    metrics = run("--limit 7")
    assert list(metrics["IoU"]) == SyntheticScenes.words and metrics["images"] == 7
    assert f"mIoU {100 * metrics['mIoU']:.2f} %" in capfd.readouterr().out
    flags = f"--checkpoint {checkpoint} --limit 7 --output two".split()
    torchrun.main(["--standalone", "--nproc_per_node=2", evaluate.__file__, *flags])
    assert read_metrics("two") | {"flags": None} == metrics | {"flags": None}
    assert capfd.readouterr().out.count("mIoU") == 1


@pytest.mark.parametrize(
    "flags, background",
    [
        ("", (None, None)),
        ("--background", (0.75, None)),
        ("--background-threshold 0.5", (0.5, None)),
        ("--protocol sclip --background-entropy 0.5", (None, 0.5)),
        ("--background-cosine 0.1", (None, None)),
    ],
)
def test_own_images(flags, background, run, photos, capsys):
    metrics = run(f"--images photos --labels-dir labels --words words.txt --heat {flags}")
    protocol = metrics["protocol"]
    assert (protocol["background_threshold"], protocol["background_entropy"]) == background
    assert ["grass", "lawn"] in protocol["classes"] and metrics["images"] == 1
    assert "lawn, zebra\n" in capsys.readouterr().err.replace("background, ", "")
    words = ["background"] * bool(flags) + ["grass", "zebra"]
    assert list(metrics["IoU"]) == words
    for name, size in {"dot": (1, 1), "long": (20, 2048), "deep/scene": (64, 64)}.items():
        prediction = Image.open(f"o/predictions/{name}.png")
        assert np.shape(prediction) == size
        palette = np.reshape(prediction.getpalette(), (-1, 3))
        legend = np.asarray(Image.open(f"o/pictures/{name}.png"))[-20:]
        for c in np.unique(prediction):
            assert (legend == palette[c]).all(axis=-1).sum() > 100
        assert Image.open(f"o/heat/{name}.png").width > 500  # a tile per class
    confusion = evaluate.Confusion(len(words))
    confusion.add(np.asarray(prediction), np.asarray(Image.open("labels/deep/scene.png")))
    assert confusion.summary().items() <= metrics.items()


@pytest.mark.parametrize(
    "values, flags",
    [
        ([0, 1, 2, 255], ""),
        ([1, 2, 3, 0], "1-3"),
        ([0, 1, 2, 9], "0-2"),
        ([255, 0, 7, 1], "255,0,7"),
    ],
)
def test_scores_of_own_label_maps(run, values, flags):
    """As a few lines of numpy have them. The last value is not scored."""
    truth = np.random.RandomState(0).choice(4, (3, 40, 40), p=[0.6, 0.2, 0.1, 0.1])
    os.makedirs("images")
    os.makedirs("labels")
    for i in range(3):
        Image.fromarray(SyntheticScenes(40)[i].image).save(f"images/{i}.png")
        Image.fromarray(np.uint8(values)[truth[i]]).save(f"labels/{i}.png")
    flags = flags and f"--label-values {flags}"
    metrics = run(f"--images images --words grass,sand,ball --labels-dir labels {flags}")
    p = np.stack([Image.open(f"o/predictions/{i}.png") for i in range(3)])[truth < 3]
    t = truth[truth < 3]
    iou = [((p == c) & (t == c)).sum() / ((p == c) | (t == c)).sum() for c in range(3)]
    expected = {"mIoU": np.mean(iou), "mAcc": np.mean([(p[t == c] == c).mean() for c in range(3)])}
    expected["aAcc"] = (p == t).mean()
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)


def test_nothing_scored_and_unreadable(run, photos, capsys):
    run("--images photos --words a,b --labels-dir labels")
    Image.new("L", (64, 64), 255).save("labels/deep/scene.png")
    flags = "--images photos --words a,b --labels-dir labels"
    with pytest.raises(InputError, match="nothing was scored"):
        run(flags)
    printed = capsys.readouterr()
    assert "mIoU -" in printed.out and "not scored: 100%" in printed.err
    assert json.loads(Path("o/metrics.before.json").read_text())["aAcc"] is not None

    Path("photos/dot.png").write_text("not an image")
    with pytest.raises(InputError, match="unreadable.* 1"):
        run(f"{flags} --output p")
    assert "photos/dot.png" in capsys.readouterr().err
    assert len(list(Path("p/predictions").rglob("*.png"))) == 2


def test_every_flag_is_read(run, photos, monkeypatch):
    parse_args = evaluate.parse_args
    reads = []

    def record(argv):
        args, read = recorder(parse_args(argv))
        reads.append(read)
        return args

    monkeypatch.setattr(evaluate, "parse_args", record)
    run("--limit 1")
    run("--images photos/dot.png --words cat --output one")
    assert sorted(os.listdir("one")) == ["examples.png", "pictures", "predictions"]
    assert set(vars(parse_args([]))) <= set.union(*reads)


BAD_FLAGS = {  # a word of the message
    "--dataset imagenet": "imagenet",
    "--dataset pascal_voc": "--data-root",
    "--checkpoint=": "train.py",
    "--limit -1": "--limit",
    "--words a,b": "2 classes",
    "--stride-trick 3": "--stride-trick",
    "--device toaster": "toaster",
    "--stride 0": "--stride",
    "--window 5": "--window",
    "--images photos --words photos/words": "without a word",
    "--background-threshold 0.5": "synthetic",
    "--images photos": "--words",
    "--images photos --words ,": "0 classes",
    "--images photos --words none.lst": "none.lst",
    "--images photos --words a --background": "--background-cosine",
    "--images photos --words a --labels-dir labels": "one class",
    "--images photos --words cat,Cat": "twice: cat",
    "--images photos --words cat,background --background": "background",
    "--images photos --words a,b --labels-dir labels --label-values 1-": "--label-values",
    "--images photos --words a,b --labels-dir labels --label-values 1": "not 2",
    "--images photos --words a,b --labels-dir labels --label-values 0,1,300": "not 2",
    "--heat": "--images",
    "--data-root x": "--data-root",
    "--images photos --words a,b --dataset ade20k": "one of them",
    "--images photos --words a,b --background-entropy 1": "--protocol",
    "--images photos --words a,b --background-cosine 1 --background-threshold 1": "one of",
    "--logit-scale nan": "--logit-scale",
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flags(flags, run, photos):
    with pytest.raises((InputError, OSError)) as error:
        run(flags)
    assert_one_line(error, BAD_FLAGS[flags])


def fail(error):
    if error == SIGKILL:
        os.kill(os.getpid(), error)
    raise error


@pytest.mark.parametrize(
    "error, message", [(InputError("a.png"), ": a.png"), (OSError("b"), "b"), (SIGKILL, "killed")]
)
def test_user_errors_are_one_line(error, message):
    with pytest.raises(SystemExit) as ended:
        evaluate.run_program(lambda: list(data.parallel_map(fail, [error], 1)))
    assert_one_line(ended, message)
    assert "InputError" not in str(ended.value)


def test_a_bug_is_a_traceback():
    with pytest.raises(ValueError):
        evaluate.run_program(lambda: list(data.parallel_map(fail, [ValueError()], 1)))
