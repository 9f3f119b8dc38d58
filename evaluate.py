"""Zero-shot segmentation with words: score a checkpoint on a labelled data set, and show what it sees.

    python evaluate.py                  the model that `python train.py` made, on scenes it has never seen
    python evaluate.py --dataset pascal_voc --data-root VOCdevkit/VOC2012 --checkpoint segclip.bin
"""

import argparse
import colorsys
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from clip_loader import InputError, load_segclip, load_tokenizer, make_folder, pick_device
from data import PascalVOC, SyntheticScenes, normalise, resize_bilinear

DATASETS = ("synthetic", "pascal_voc")
DEFAULT_CHECKPOINT = "runs/synthetic/checkpoint.pt"
TEMPLATE = "a photo of a {}."  # Section 2.5


# ---------------------------------------------------------------------------------------------------------------------
# From a picture to a label map. The steps are those of the authors' program (GroupViT's, on mmsegmentation 0.18).


@torch.no_grad()
def class_features(model, tokenizer, words):
    """The unit vector of each word in the paper's prompt: list of C strings -> [C, E]."""
    device = model.clip.logit_scale.device
    text = tokenizer([TEMPLATE.format(word) for word in words], model.config.context_length)
    return F.normalize(model.encode_text(text.to(device)), dim=-1)


def resized(height, width, window):
    """The size at which a picture is seen: short side `window`, long side at most 2048; never less than a window."""
    factor = min(2048 / max(height, width), window / min(height, width))
    return max(int(height * factor + 0.5), window), max(int(width * factor + 0.5), window)


def window_starts(length, window):
    """Windows side by side; the last one is moved back inside, over its neighbour."""
    return [min(start, length - window) for start in range(0, length, window)]


def region_scores(encoding, text, scale, top_k=5):
    """How much each region is each word: regions [B, L, E], words [C, E] -> [B, L, C], between 0 and 1.

    A softmax over all words times a softmax over the top_k words of the image feature: GroupViT's rule, which the authors
    inherited. The paper has the cosines alone.
    """
    logits = scale * F.normalize(encoding.regions, dim=-1) @ text.T  # [B, L, C]
    image_logits = F.normalize(encoding.features, dim=-1) @ text.T  # [B, C]
    top = image_logits.topk(min(top_k, len(text)), dim=-1).indices
    others = torch.ones_like(image_logits, dtype=torch.bool).scatter(1, top, False)
    return logits.softmax(dim=-1) * logits.masked_fill(others[:, None], -torch.inf).softmax(dim=-1)


def pixel_scores(encoding, text, scale, window, grid, background_threshold=None):
    """-> scores [B, C, H, W] of the words for each pixel, and the region of each pixel [B, H, W].

    With a threshold there is one more class, background, before the words: it scores 1 where no word of the pixel's
    region reaches the threshold, or the best score in the window if that is less.
    """
    soft = encoding.soft.transpose(1, 2).unflatten(2, grid)  # [B, N, L] -> [B, L, H/P, W/P]
    region = F.interpolate(soft, window, mode="bilinear", align_corners=False).argmax(dim=1)  # [B, H, W]
    scores = region_scores(encoding, text, scale)  # [B, L, C]
    if background_threshold is not None:
        bar = scores.amax(dim=(1, 2)).clamp(max=background_threshold)  # [B]
        background = (scores.amax(dim=2) < bar[:, None]).float()  # [B, L]
        scores = torch.cat([background[..., None], scores], dim=2)  # [B, L, 1 + C]
    index = region.flatten(1)[:, None].expand(-1, scores.shape[2], -1)  # [B, C, H*W]
    return scores.transpose(1, 2).gather(2, index).unflatten(2, window), region


@torch.no_grad()
def segment(model, picture, text, background_threshold=None):
    """Label every pixel: picture uint8 [H, W, 3], word features [C, E] -> (label map [H, W], region map [h, w]).

    The region map has the size at which the model saw the picture; its numbers are center + L * window.
    """
    size, patch, device = model.config.image_size, model.config.patch_size, text.device
    height, width = resized(*picture.shape[:2], size)
    image = torch.tensor(resize_bilinear(picture, height, width), device=device).permute(2, 0, 1)
    image = normalise(image)
    starts = [(top, left) for top in window_starts(height, size) for left in window_starts(width, size)]
    crops = torch.stack([image[:, top : top + size, left : left + size] for top, left in starts])

    encoding = model.encode_image(crops)
    scale = model.clip.logit_scale.exp().clamp(max=100)
    scores, regions = pixel_scores(encoding, text, scale, (size, size), (size // patch, size // patch), background_threshold)

    canvas, count = scores.new_zeros(scores.shape[1], height, width), scores.new_zeros(height, width)
    region_map = regions.new_zeros(height, width)
    for i, (top, left) in enumerate(starts):
        here = (..., slice(top, top + size), slice(left, left + size))
        canvas[here] += scores[i]
        count[here] += 1
        region_map[here] = regions[i] + i * model.config.num_centers
    scores = F.interpolate((canvas / count)[None], picture.shape[:2], mode="bilinear", align_corners=False)
    # The softmax changes no argmax but that of values that it rounds to the same: the authors' way with near ties.
    return scores.softmax(dim=1)[0].argmax(dim=0).byte().cpu().numpy(), region_map.cpu().numpy()


# ---------------------------------------------------------------------------------------------------------------------
# The metric


class Score:
    """Pixel counts over a whole data set: per class, predicted right, predicted, and labelled (mmsegmentation's rule)."""

    def __init__(self, num_classes):
        self.intersection, self.predicted, self.labelled = np.zeros((3, num_classes), np.int64)

    def add(self, prediction, label):
        """One picture: uint8 arrays of the same shape. Where the label is 255, nothing counts."""
        scored = label != 255
        prediction, label = prediction[scored], label[scored]
        for counts, values in (
            (self.intersection, prediction[prediction == label]),
            (self.predicted, prediction),
            (self.labelled, label[label < len(self.labelled)]),
        ):
            counts += np.bincount(values, minlength=len(counts))

    def iou(self):
        """[C] of fractions; NaN for a class that is neither predicted nor labelled."""
        union = self.predicted + self.labelled - self.intersection
        return np.divide(self.intersection, union, out=np.full(len(union), np.nan), where=union > 0)

    def accuracy(self):
        """[C] of fractions; NaN for a class that is not labelled."""
        out = np.full(len(self.labelled), np.nan)
        return np.divide(self.intersection, self.labelled, out=out, where=self.labelled > 0)

    def summary(self):
        return {
            "mIoU": mean(self.iou()),
            "mAcc": mean(self.accuracy()),
            "aAcc": float(self.intersection.sum() / max(self.labelled.sum(), 1)),
        }


def mean(values):
    """The mean of the values that are not NaN; 0 if there is none."""
    return float(np.nanmean(values)) if not np.isnan(values).all() else 0.0


# ---------------------------------------------------------------------------------------------------------------------
# Pictures of the result


def word_palette(n):
    """n colours that are easy to tell apart: hues a golden ratio of the circle from each other. -> uint8 [n, 3]"""
    colours = [colorsys.hsv_to_rgb(i * 0.618 % 1, (0.85, 0.55)[i % 2], (0.95, 0.75, 0.55)[i % 3]) for i in range(n)]
    return (np.array(colours) * 255).astype(np.uint8)


def draw_examples(examples, words, palette, path, side=160):
    """One row per example, (picture, truth, regions, prediction): picture | truth | regions | result, and a legend."""
    font, margin, head = ImageFont.load_default(13), 8, 24
    titles = ("picture", "truth", "regions", "result")
    used = sorted({c for _, truth, _, prediction in examples for c in np.union1d(truth, prediction) if c < len(words)})
    columns = 4
    legend = 20 * -(-len(used) // columns) + margin
    width, top = margin + len(titles) * (side + margin), head + len(examples) * (side + margin)
    sheet = Image.new("RGB", (width, top + legend), "white")
    draw = ImageDraw.Draw(sheet)
    region_colours = word_palette(64)
    for column, title in enumerate(titles):
        draw.text((margin + column * (side + margin), 5), title, "black", font)
    for row, (picture, truth, regions, prediction) in enumerate(examples):
        overlays = (palette[truth], region_colours[regions % 64], palette[prediction])
        for column, image in enumerate((picture, *overlays)):
            image = Image.fromarray(image)
            scale = side / max(image.size)
            image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.NEAREST)
            sheet.paste(image, (margin + column * (side + margin), head + row * (side + margin)))
    for i, c in enumerate(used):
        x, y = margin + i % columns * ((width - margin) // columns), top + i // columns * 20
        draw.rectangle((x, y + 2, x + 13, y + 15), tuple(int(v) for v in palette[c]), "black")
        draw.text((x + 20, y + 1), words[c], "black", font)
    sheet.save(path)


# ---------------------------------------------------------------------------------------------------------------------
# The program


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] + " [x] is the default.")
    parser.add_argument("--dataset", default="synthetic", help=f"what to score on: {' or '.join(DATASETS)} [%(default)s]")
    parser.add_argument("--data-root", help="folder of the data set (for pascal_voc: VOCdevkit/VOC2012)")
    parser.add_argument(
        "--checkpoint", default=DEFAULT_CHECKPOINT, help="one of train.py's, or the authors' segclip.bin [%(default)s]"
    )
    parser.add_argument(
        "--background-threshold",
        type=float,
        help="where no word's score reaches it, there is background; between 0 and 1 [the paper's for this data set]",
    )
    parser.add_argument("--limit", type=int, help="score the first LIMIT pictures [all]")
    parser.add_argument("--output", help="folder for metrics.json, predictions, examples.png [scenes: the checkpoint's; else: runs/DATASET]")
    parser.add_argument("--vocabulary", help="OpenAI's BPE vocabulary, if it is not in the cache and cannot be fetched")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... [a GPU if there is one]")
    parser.add_argument("--seed", type=int, default=0, help="of the synthetic scenes [%(default)s]")
    return parser.parse_args(argv)


def open_dataset(name, root, seed, size):
    """The data set of that name: words, palette, background_threshold, len, and Samples by number. Raises InputError."""
    if name == "synthetic":
        return SyntheticScenes(size, seed, "val")
    if name not in DATASETS:
        raise InputError(f"--dataset {name}: unknown; there are {', '.join(DATASETS)}")
    if root is None:
        raise InputError(f"--dataset {name} needs --data-root, the folder that holds it")
    return PascalVOC(root)


def evaluate(model, tokenizer, dataset, count, background_threshold=None, on_result=None):
    """Segment the first `count` samples -> Score. on_result(i, sample, prediction, regions) sees each one."""
    text = class_features(model, tokenizer, dataset.words)
    score = Score(len(dataset.words) + (background_threshold is not None))
    for i in range(count):
        sample = dataset[i]
        prediction, regions = segment(model, sample.picture, text, background_threshold)
        score.add(prediction, sample.label)
        if on_result:
            on_result(i, sample, prediction, regions)
    return score


def save_prediction(path, prediction, palette):
    image = Image.fromarray(prediction)
    image.putpalette(palette.ravel().tolist())
    image.save(path)


def main(argv=None):
    args = parse_args(argv)
    device = pick_device(args.device)
    if args.seed < 0:
        raise InputError(f"--seed {args.seed}: must not be negative")
    if args.checkpoint == DEFAULT_CHECKPOINT and not Path(DEFAULT_CHECKPOINT).exists():
        raise InputError(f"{DEFAULT_CHECKPOINT}: not there yet; make it with `python train.py`, or give --checkpoint FILE")
    model = load_segclip(args.checkpoint, from_clip=False).to(device).eval()
    tokenizer = load_tokenizer(args.checkpoint, args.vocabulary)
    if tokenizer.vocab_size != model.config.vocab_size:
        raise InputError(
            f"{args.checkpoint}: made for {model.config.vocab_size} tokens, but the vocabulary has {tokenizer.vocab_size}"
        )
    dataset = open_dataset(args.dataset, args.data_root, args.seed, model.config.image_size)
    threshold = dataset.background_threshold
    if args.background_threshold is not None:
        if threshold is None:
            raise InputError(f"--background-threshold: {args.dataset} has no background")
        if not 0 <= args.background_threshold <= 1:
            raise InputError(f"--background-threshold {args.background_threshold}: must be between 0 and 1")
        threshold = args.background_threshold
    words = dataset.words if threshold is None else ["background", *dataset.words]
    count = len(dataset) if args.limit is None else min(len(dataset), args.limit)
    if count < 1:
        raise InputError(f"--dataset {args.dataset}: no picture to score")
    # Scores on scenes belong to one run of training; each has a folder already.
    output = Path(args.output or (Path(args.checkpoint).parent if args.dataset == "synthetic" else f"runs/{args.dataset}"))
    make_folder(output / "predictions")
    examples, start, last_line = [], time.time(), 0.0

    def on_result(i, sample, prediction, regions):
        nonlocal last_line
        save_prediction(output / "predictions" / f"{sample.name}.png", prediction, dataset.palette)
        if len(examples) < 6:
            examples.append((sample.picture, sample.label, regions, prediction))
        if time.time() - last_line > 5:
            last_line, seconds = time.time(), time.time() - start
            rate = (i + 1) / seconds
            print(f"picture {i + 1}/{count}  {rate:.1f} pictures/s  ETA {(count - i - 1) / rate:.0f} s", file=sys.stderr)

    score = evaluate(model, tokenizer, dataset, count, threshold, on_result)
    iou = score.iou()
    metrics = score.summary() | {
        "IoU": {word: None if np.isnan(value) else float(value) for word, value in zip(words, iou)},
        "pictures": count,
        "background_threshold": threshold,
        "checkpoint": str(args.checkpoint),
        "dataset": args.dataset,
        "seed": args.seed,
    }
    (output / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    draw_examples(examples, words, dataset.palette, output / "examples.png")
    for word, value in zip(words, iou):
        print(f"{word:>16}  IoU {100 * value:5.1f} %")
    print(f"mIoU {100 * metrics['mIoU']:.2f} %  mAcc {100 * metrics['mAcc']:.2f} %  aAcc {100 * metrics['aAcc']:.2f} %", end="")
    print(f"  over {count} pictures")
    print(f"wrote {output}/metrics.json, {output}/examples.png and {output}/predictions/")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"evaluate.py: {error}")
