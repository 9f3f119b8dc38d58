"""From scores to label maps, the metric, and the program with good and bad input."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from clip_loader import InputError, Tokenizer, save_checkpoint
from conftest import TINY, recorder
from data import PascalVOC, SyntheticScenes, voc_palette
from evaluate import Score, pixel_scores, region_scores, resized, segment, window_starts
from model import ImageEncoding, SegCLIP

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
    assert resized(*size, 224) == seen


def test_windows_cover_everything_and_stay_inside():
    assert window_starts(224, 224) == [0]
    assert window_starts(299, 224) == [0, 75]
    assert window_starts(336, 224) == [0, 112]
    assert window_starts(448, 224) == [0, 224]
    assert window_starts(449, 224) == [0, 224, 225]


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


def test_pixel_scores_by_hand():
    scores, region = pixel_scores(encoding_by_hand(), WORDS, SCALE, (4, 4), (2, 2))
    assert region.tolist() == [[[0, 0, 1, 1]] * 4]
    expected = torch.tensor([[9 / 16, 1 / 16], [1 / 4, 1 / 4]])[region[0]].permute(2, 0, 1)
    assert torch.allclose(scores[0], expected)


@pytest.mark.parametrize(
    "threshold, background",
    [(0.2, (0, 0)), (0.4, (0, 1)), (0.9, (0, 1))],  # of the two regions; the best score, 9/16, is never background
)
def test_background_by_hand(threshold, background):
    scores, region = pixel_scores(encoding_by_hand(), WORDS, SCALE, (4, 4), (2, 2), threshold)
    assert scores.shape == (1, 3, 4, 4)
    assert scores[0, 0].tolist() == torch.tensor(background)[region[0]].float().tolist()
    assert torch.allclose(scores[0, 1:], pixel_scores(encoding_by_hand(), WORDS, SCALE, (4, 4), (2, 2))[0][0])


class Stripes(torch.nn.Module):
    """Stands in for a SegCLIP: bright patches go to the first center and are the first word, dark ones to the second."""

    config = dataclasses.replace(TINY, image_size=16, patch_size=4, num_centers=2)

    def __init__(self):
        super().__init__()
        self.clip = torch.nn.Module()
        self.clip.logit_scale = torch.nn.Parameter(torch.tensor(3.0))

    def encode_image(self, image):
        bright = torch.nn.functional.avg_pool2d(image.mean(dim=1), 4).flatten(1)[..., None].sigmoid()
        regions = torch.eye(2).expand(len(image), 2, 2)
        return ImageEncoding(torch.ones(len(image), 2), regions, None, torch.cat([bright, 1 - bright], dim=-1))


@pytest.mark.parametrize("shape", [(16, 16), (32, 90), (100, 40), (16, 320), (320, 16)])
def test_windows_are_put_back_where_they_came_from(shape):
    """A bright half and a dark half, whatever the size: each is labelled to within a patch of the border."""
    picture = np.zeros((*shape, 3), np.uint8)
    tall = shape[0] > shape[1]
    (picture[: shape[0] // 2] if tall else picture[:, : shape[1] // 2])[...] = 255
    label, regions = segment(Stripes(), picture, WORDS)
    assert label.shape == shape and min(regions.shape) == 16
    label = label if tall else label.T
    half, border = len(label) // 2, -(-4 * min(shape) // 16)
    assert (label[: half - border] == 0).all() and (label[half + border :] == 1).all()


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
    texts = [evaluate.TEMPLATE.format(word) for word in PascalVOC.words] + [SyntheticScenes(32)[i].caption for i in range(50)]
    tokenizer = Tokenizer.learn(texts, TINY.vocab_size - Tokenizer().vocab_size)
    torch.manual_seed(0)
    save_checkpoint(path, SegCLIP(TINY), merges=tokenizer.merges)
    return path


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


def test_a_folder_in_voc_layout(voc, checkpoint, tmp_path, capsys):
    run("--dataset", "pascal_voc", "--data-root", voc, "--checkpoint", checkpoint, "--output", tmp_path / "out")
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics["pictures"] == len(ODD_PICTURES)
    assert list(metrics["IoU"]) == ["background", *PascalVOC.words]
    values = [value for value in metrics["IoU"].values() if value is not None]
    assert metrics["mIoU"] == pytest.approx(sum(values) / len(values))
    assert f"mIoU {100 * metrics['mIoU']:.2f} %" in capsys.readouterr().out
    for name, image in ODD_PICTURES.items():
        prediction = Image.open(tmp_path / f"out/predictions/{name}.png")
        assert prediction.size == (image.size[::-1] if name == "rotated" else image.size)
        assert prediction.mode == "P" and prediction.getpalette()[:63] == voc_palette().ravel().tolist()[:63]
    assert Image.open(tmp_path / "out/examples.png").width > 400


def test_limit_and_synthetic_scenes(checkpoint, tmp_path):
    run("--checkpoint", checkpoint, "--limit", 3, "--output", tmp_path)
    assert sorted(path.name for path in (tmp_path / "predictions").iterdir()) == [f"scene{i:05}.png" for i in range(3)]
    first = json.loads((tmp_path / "metrics.json").read_text())
    assert first["pictures"] == 3
    assert not list(checkpoint.parent.glob("*.json"))
    run("--checkpoint", checkpoint, "--limit", 3, "--output", tmp_path, "--seed", 1)
    assert json.loads((tmp_path / "metrics.json").read_text())["IoU"] != first["IoU"]


def test_every_flag_is_read(voc, checkpoint, tmp_path, monkeypatch):
    arguments = ["--dataset", "pascal_voc", "--data-root", str(voc), "--checkpoint", str(checkpoint), "--limit", "1"]
    args, read = recorder(evaluate.parse_args([*arguments, "--output", str(tmp_path)]))
    monkeypatch.setattr(evaluate, "parse_args", lambda argv: args)
    evaluate.main()
    assert set(vars(args)) <= read


def fails(*arguments):
    """The message of a run that must end with one line."""
    with pytest.raises(InputError) as error:
        run(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_bad_input(voc, checkpoint, tmp_path, monkeypatch):
    good = ("--dataset", "pascal_voc", "--data-root", voc, "--checkpoint", checkpoint, "--output", tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    assert "python train.py" in fails()
    assert "nothing.pt" in fails(*good, "--checkpoint", "nothing.pt")
    message = fails(*good, "--dataset", "imagenet")
    assert "imagenet" in message and "pascal_voc" in message and "synthetic" in message
    assert "--data-root" in fails("--dataset", "pascal_voc", "--checkpoint", checkpoint)
    assert str(tmp_path / "elsewhere/JPEGImages") in fails(*good, "--data-root", tmp_path / "elsewhere")
    assert "--device" in fails(*good, "--device", "toaster")
    assert "no picture" in fails(*good, "--limit", 0)
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


@pytest.mark.parametrize("program", ["train.py", "evaluate.py"])
def test_a_failure_ends_with_one_line_and_help_touches_nothing(program, tmp_path):
    command = [sys.executable, str(Path(__file__).parents[1] / program)]
    failed = subprocess.run([*command, "--device", "toaster"], capture_output=True, text=True, cwd=tmp_path)
    assert failed.returncode == 1 and failed.stdout == ""
    assert failed.stderr.startswith(f"{program}: --device toaster") and failed.stderr.count("\n") == 1
    helped = subprocess.run([*command, "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert helped.returncode == 0 and "--seed" in helped.stdout and helped.stderr == ""
    assert list(tmp_path.iterdir()) == []
