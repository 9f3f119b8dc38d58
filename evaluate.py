"""Zero-shot segmentation: score a checkpoint, label your own pictures, look at one of them.

python evaluate.py                   the model of `python train.py`, on scenes it has never seen
python evaluate.py --dataset pascal_voc --data-root VOCdevkit/VOC2012 --checkpoint segclip.bin
python evaluate.py --images photos --classes words.txt --checkpoint segclip.bin
python evaluate.py --image photo.jpg --words "cat, grass, sky" --model ViT-B/16 --readout naclip
python evaluate.py --classify photos --checkpoint pacl.pt        one folder a class, whole pictures
python evaluate.py --compare         CLIP, its read-outs, PACL and SegCLIP, on the scenes
"""

import argparse
import colorsys
import hashlib
import itertools
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from clip_loader import (
    MODELS,
    InputError,
    ManualPage,
    fetch,
    git_revision,
    load_model,
    load_tokenizer,
    make_folder,
    run_program,
    sha256_of,
    start_processes,
)
from data import (
    BENCHMARKS,
    UNREADABLE,
    ClassFolder,
    PictureFolder,
    SegmentationFolder,
    SyntheticScenes,
    in_parallel,
    listed,
    normalise,
    progress,
    raised,
    read_lines,
    resize_bilinear,
)
from losses import compatibility
from model import ACTIVATIONS, PACL, READOUTS, Config

OWN = "the protocol's own"  # --background without a threshold
SCENES = {"synthetic": "val", "synthetic-unseen": "unseen"}  # data sets that are drawn, and their split
RUNS = {"segclip": "runs/synthetic", "clip": "runs/clip", "pacl": "runs/pacl"}  # where train.py leaves those of the scenes
DEFAULT_CHECKPOINT = f"{RUNS['segclip']}/checkpoint.pt"

# ---------------------------------------------------------------------------------------------------------------------
# Words

TEMPLATES = {
    1: ["a photo of a {}"],  # Section 2.5
    7: listed(  # these and the 80 are OpenAI's, for ImageNet
        "itap of a {}, a bad photo of the {}, a origami {}, a photo of the large {}, a {} in a video game, art of the {}, "
        "a photo of the small {}"
    ),
    80: listed(
        "a bad photo of a {}, a photo of many {}, a sculpture of a {}, a photo of the hard to see {}, a low "
        "resolution photo of the {}, a rendering of a {}, graffiti of a {}, a bad photo of the {}, a cropped "
        "photo of the {}, a tattoo of a {}, the embroidered {}, a photo of a hard to see {}, a bright photo of a "
        "{}, a photo of a clean {}, a photo of a dirty {}, a dark photo of the {}, a drawing of a {}, a photo of "
        "my {}, the plastic {}, a photo of the cool {}, a close-up photo of a {}, a black and white photo of the "
        "{}, a painting of the {}, a painting of a {}, a pixelated photo of the {}, a sculpture of the {}, a "
        "bright photo of the {}, a cropped photo of a {}, a plastic {}, a photo of the dirty {}, a jpeg corrupted"
        " photo of a {}, a blurry photo of the {}, a photo of the {}, a good photo of the {}, a rendering of the "
        "{}, a {} in a video game, a photo of one {}, a doodle of a {}, a close-up photo of the {}, a photo of a "
        "{}, the origami {}, the {} in a video game, a sketch of a {}, a doodle of the {}, a origami {}, a low "
        "resolution photo of a {}, the toy {}, a rendition of the {}, a photo of the clean {}, a photo of a large"
        " {}, a rendition of a {}, a photo of a nice {}, a photo of a weird {}, a blurry photo of a {}, a cartoon"
        " {}, art of a {}, a sketch of the {}, a embroidered {}, a pixelated photo of a {}, itap of the {}, a "
        "jpeg corrupted photo of the {}, a good photo of a {}, a plushie {}, a photo of the nice {}, a photo of "
        "the small {}, a photo of the weird {}, the cartoon {}, art of the {}, a drawing of the {}, a photo of "
        "the large {}, a black and white photo of a {}, the plushie {}, a dark photo of a {}, itap of a {}, "
        "graffiti of the {}, a toy {}, itap of my {}, a photo of a cool {}, a photo of a small {}, a tattoo of "
        "the {}"
    ),
}
TEMPLATES = {count: [f"{template}." for template in templates] for count, templates in TEMPLATES.items()}


# What SCLIP's tables ask for in place of a class's name, and what it counts as background.
PERSON = listed(
    "person, person in shirt, person in jeans, person in dress, person in sweater, person in skirt, person in jacket"
)
SCREEN = listed("television monitor, tv monitor, monitor, television, screen")
STUFF = listed(
    "sky, wall, tree, wood, grass, road, sea, river, mountain, sands, desk, bed, building, cloud, lamp, door, "
    "window, wardrobe, ceiling, shelf, curtain, stair, floor, hill, rail, fence"
)
VOC_SYNONYMS = {"boat": ["ship"], "person": PERSON, "plant": ["pottedplant"], "monitor": SCREEN}
CONTEXT_SYNONYMS = {"airplane": ["aeroplane"], "plant": ["pottedplant"], "monitor": ["tvmonitor"]}
SYNONYMS = {
    "pascal_voc": VOC_SYNONYMS | {"background": STUFF},
    "pascal_voc20": VOC_SYNONYMS,
    "pascal_context": CONTEXT_SYNONYMS,
    "pascal_context59": CONTEXT_SYNONYMS,
    "coco_object": {"background": STUFF, "person": [*PERSON, "body"]},
}


# ClearCLIP takes one word a class, mostly the first of these, and the word "background".
PLAIN_WORDS = {"boat": "ship", "plant": "pottedplant", "monitor": "tvmonitor", "airplane": "aeroplane"}

# How published numbers were made, for a model of 224 pixels: the settings of a protocol, and what differs on a data set.
# Each was checked against its authors' configuration files. window 0: the whole image at once, without windows.
_SCLIP = {
    "scoring": "cosines",
    "words": "synonyms",
    "templates": 80,
    "short_side": 336,
    "window": 224,
    "stride": 112,
    "logit_scale": 40.0,
    "background_threshold": 0.1,
}
PROTOCOLS = {
    "segclip": {  # also GroupViT's but for its sizes and thresholds
        "": {
            "scoring": "regions",
            "words": "names",
            "templates": 1,
            "short_side": 224,
            "window": 224,
            "stride": 224,
            "top_k": 5,
            "background_threshold": 0.75,  # on VOC; the authors' code has 0.80
        },
        "pascal_context": {"background_threshold": 0.25},
        "coco_object": {"background_threshold": 0.65},
    },
    "sclip": {
        "": _SCLIP,
        "pascal_voc": {"logit_scale": 65.0, "area_threshold": 0.1},
        "pascal_context": {"logit_scale": 50.0},
        "coco_object": {"logit_scale": 50.0},
        "coco_stuff": {"short_side": 448},
        "cityscapes": {"short_side": 560},
    },
    "naclip": {
        "": _SCLIP,
        "pascal_voc": {"window": 0},
        "pascal_voc20": {"window": 0},
        "cityscapes": {"short_side": 560},
    },
    "clearclip": {
        "": _SCLIP
        | {
            "words": "plain",
            "short_side": 448,
            "window": 448,
            "stride": 224,
            "logit_scale": 50.0,
            "background_threshold": 0.5,
        },
        "pascal_context": {"background_threshold": 0.15},
        "coco_object": {"background_threshold": 0.4},
        "cityscapes": {"window": 224},
    },
}
PROTOCOLS["dense"] = PROTOCOLS["sclip"]


@dataclass
class Settings:
    """How images become label maps. All of it stands in metrics.json, so that two results can be compared."""

    protocol: str  # the name in PROTOCOLS; "classify" for whole images
    scoring: str  # "regions": SegCLIP's; "cosines": each patch with each word, as SCLIP and its followers
    classes: list  # of C lists of words; the score of a class is that of its best word
    templates: int  # how many of TEMPLATES
    short_side: int  # inference resolution: pixels on the short side of the image
    window: int  # side of a window in pixels; 0: the whole image at once
    stride: int  # pixels from one window to the next
    top_k: int | None = None  # scoring by regions: only so many classes can be found in a window
    logit_scale: float | None = None  # scoring by cosines: inverse temperature of the softmax over the words
    background_threshold: float | None = None
    area_threshold: float | None = None  # scoring by cosines: classes with a smaller share of the foreground are left out
    stride_trick: int | None = None  # pixels from one patch to the next; None: the patch size
    refine: str | None = None
    background_entropy: float | None = None  # in place of background_threshold

    def has_background(self):
        return self.background_threshold is not None or self.background_entropy is not None


def read_classes(path):
    """A class in each line, its words separated by commas -> list of lists. Raises InputError."""
    classes = [listed(line) for line in read_lines(path)]
    if not all(classes):
        raise InputError(f"{path}: a line without a word")
    return classes


def check_words(words, has_background, source):
    """Raises InputError for names of classes that cannot be told apart, or do not fit into a byte."""
    lower = [word.lower() for word in words] + ["background"] * has_background
    if not words or len(lower) > 255:
        raise InputError(f"{source}: {len(words)} words; there must be between 1 and {255 - has_background}")
    for word in lower:
        if lower.count(word) > 1:
            raise InputError(f"{source}: the class {word} is there twice")


def background_threshold(args, dataset, name, default):
    """Below it, nothing is seen; None where there is no background, or its entropy decides. Raises InputError."""
    threshold, entropy = args.background_threshold, args.background_entropy
    if not dataset.has_background:
        if threshold is not None or entropy is not None:
            raise InputError(f"--background: {name} has no background")
        return None
    if entropy is not None:
        if threshold is not None:
            raise InputError("--background-entropy: it is this or --background")
        if not 0 <= entropy < float("inf"):
            raise InputError(f"--background-entropy {entropy}: must be a number from 0 on")
        return None
    if threshold in (None, OWN):
        return default
    try:
        if 0 <= float(threshold) <= 1:
            return float(threshold)
    except ValueError:
        pass
    raise InputError(f"--background {threshold}: must be between 0 and 1")


def choose_settings(args, dataset, size):
    """The named protocol for this data set and this model's input size, and the flags that change it. Raises InputError."""
    name, words = kind_of(args), [[word] for word in dataset.words]
    if args.classes:
        words = read_classes(args.classes)
        if len(words) != len(dataset.words):
            expected = f"{args.classify or name} has {len(dataset.words)} (background is not counted)"
            raise InputError(f"{args.classes}: has {len(words)} classes, {expected}")
    protocol = PROTOCOLS[args.protocol][""] | PROTOCOLS[args.protocol].get(name, {})
    threshold = background_threshold(args, dataset, name, protocol["background_threshold"])
    if args.classify:
        templates = args.templates or 7
        return Settings("classify", "", words, templates, size, size, size, stride_trick=args.stride_trick)
    protocol["background_threshold"] = threshold
    for pixels in ("short_side", "window", "stride"):
        protocol[pixels] = protocol[pixels] * size // 224
    words = protocol_words(protocol.pop("words"), name, words, threshold is not None, bool(args.classes))
    settings = Settings(args.protocol, classes=words, **protocol)
    for field in CHANGEABLE:
        if getattr(args, field) is not None:
            setattr(settings, field, getattr(args, field))
    return settings


# Fields of Settings that are flags, too.
CHANGEABLE = (
    *("templates", "short_side", "window", "stride", "top_k", "logit_scale", "area_threshold"),
    *("stride_trick", "refine", "background_entropy"),
)


def protocol_words(kind, dataset, words, has_background, given):
    """The words of each class: the names themselves, or as the protocol has them in place of these. -> list of lists"""
    if kind == "names":
        return words
    background = [["background"]] if has_background else []
    if given:  # by --classes
        return background + words
    words = background + words
    if dataset in ("coco_stuff", "ade20k", "cityscapes"):
        words = [[word.replace(" ", "")] for [word] in words]
    synonyms = SYNONYMS.get(dataset, {})
    if kind == "synonyms":
        return [synonyms.get(word, [word]) for [word] in words]
    return [[PLAIN_WORDS.get(word, word) if word in synonyms else word] for [word] in words]


@torch.no_grad()
def class_features(model, tokenizer, settings):
    """The unit vector of each of the Q words, a mean over the templates: -> [Q, E], and the class of each word [Q]."""
    device, templates = model.clip.logit_scale.device, TEMPLATES[settings.templates]
    features = []
    for word in (word for words in settings.classes for word in words):
        text = tokenizer([template.format(word) for template in templates], model.config.context_length)
        feature = model.encode_text(text.to(device))  # [templates, E]
        if settings.scoring != "regions":  # OpenAI and SCLIP give each template the same weight, GroupViT as it is long
            feature = F.normalize(feature, dim=-1)
        features.append(F.normalize(feature.mean(dim=0), dim=-1))
    owner = [c for c, words in enumerate(settings.classes) for _ in words]
    return torch.stack(features), torch.tensor(owner, device=device)


# ---------------------------------------------------------------------------------------------------------------------
# From a picture to a label map. The steps are those of the authors' program (GroupViT's, on mmsegmentation 0.18).


def resized(height, width, short_side, window):
    """The size at which a picture is seen: long side at most 2048, and never less than a window."""
    factor = min(2048 / max(height, width), short_side / min(height, width))
    return max(int(height * factor + 0.5), window), max(int(width * factor + 0.5), window)


def window_starts(length, window, stride):
    """One window every stride; the last one is moved back inside, over its neighbour."""
    count = max(length - window + stride - 1, 0) // stride + 1
    return [min(i * stride, length - window) for i in range(count)]


def best_word(scores, owner, num_classes):
    """Scores of words [..., Q] -> of classes [..., C]: the best of a class's words."""
    if len(owner) == num_classes:
        return scores
    out = scores.new_full((*scores.shape[:-1], num_classes), -torch.inf)
    return out.scatter_reduce(-1, owner.expand(scores.shape), scores, "amax")


def region_cosines(encoding, text):
    """Regions [B, L, E], words [Q, E] -> [B, L, Q]."""
    return F.normalize(encoding.regions.float(), dim=-1) @ text.T


def region_scores(encoding, text, scale, top_k=5):
    """How much each region is each word: regions [B, L, E], words [Q, E] -> [B, L, Q], between 0 and 1.

    A softmax over all words times a softmax over the top_k words of the image feature: GroupViT's rule, which the authors
    inherited. The paper has the cosines alone.
    """
    logits = scale * region_cosines(encoding, text)  # [B, L, Q]
    image_logits = F.normalize(encoding.features.float(), dim=-1) @ text.T  # [B, Q]
    top = image_logits.topk(min(top_k, len(text)), dim=-1).indices
    others = torch.ones_like(image_logits, dtype=torch.bool).scatter(1, top, False)
    return logits.softmax(dim=-1) * logits.masked_fill(others[:, None], -torch.inf).softmax(dim=-1)


def add_background(scores, threshold):
    """[B, L, C] -> [B, L, 1 + C]: background scores 1 in regions where no class reaches the threshold, or the best score
    of the window if that is less; else 0."""
    bar = scores.amax(dim=(1, 2)).clamp(max=threshold)  # [B]
    background = (scores.amax(dim=2) < bar[:, None]).float()  # [B, L]
    return torch.cat([background[..., None], scores], dim=2)


def entropy_background(cosines, owner, scale, settings):
    """PACL's rule: cosines [Q, ...] of the words -> [1, ...], 1, which no class reaches there, where none stands out; else 0.
    A class is as near as its best word is: many synonyms would make the surest class look unsure."""
    cosines = best_word(cosines.movedim(0, -1), owner, len(settings.classes))  # [..., C]
    log_p = (scale * cosines).log_softmax(dim=-1)
    entropy = -(log_p.exp() * log_p).sum(dim=-1)  # natural logarithm: ln C where all are equally near
    return (entropy > settings.background_entropy)[None].to(cosines.dtype)


def upsample(maps, size, patch, stride):
    """Values of patches [B, C, rows, columns] -> of pixels [B, C, *size], each patch where it lies, bilinear between them.

    Patches that touch fill the image, and so does their interpolation. With the stride trick they overlap: the centers of
    the outermost are half a patch from the border, and the margin between repeats the nearest value.
    """
    if stride < patch:
        rows, columns = maps.shape[-2:]
        maps = F.interpolate(maps, (stride * rows, stride * columns), mode="bilinear", align_corners=False)
        margin = (patch - stride) // 2
        maps = F.pad(maps, 2 * (margin, patch - stride - margin), mode="replicate")
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)


def pixel_regions(encoding, size, grid, patch, stride):
    """The region of each pixel: -> [B, *size]. Where each patch is a region, the patch whose center is nearest."""
    if encoding.soft is not None:
        soft = encoding.soft.float().transpose(1, 2).unflatten(2, grid)  # [B, N, L] -> [B, L, H/P, W/P]
        return upsample(soft, size, patch, stride).argmax(dim=1)
    device = encoding.regions.device
    rows = torch.arange(grid[0], device=device).view(1, 1, -1, 1).expand(-1, -1, -1, grid[1]).float()
    columns = torch.arange(grid[1], device=device).expand(1, 1, *grid).float()
    row, column = upsample(torch.cat([rows, columns], dim=1), size, patch, stride)[0].round().long()
    return (row * grid[1] + column).expand(len(encoding.regions), -1, -1)


def pixel_scores(scores, regions):
    """Scores of the regions of one window [L, channels], and the region of each pixel [h, w] -> [channels, h, w]."""
    return scores[regions].permute(2, 0, 1)


def window_scores(encoding, text, owner, scale, settings):
    """[B, L, channels]: class scores with background (scoring by regions), or the cosine of each word. For background by
    entropy, which is found later, both of them."""
    if settings.scoring == "cosines":
        return region_cosines(encoding, text)
    scores = best_word(region_scores(encoding, text, scale, settings.top_k), owner, len(settings.classes))
    if settings.background_entropy is not None:
        return torch.cat([scores, region_cosines(encoding, text)], dim=2)
    return scores if settings.background_threshold is None else add_background(scores, settings.background_threshold)


def segclip_labels(scores, owner, scale, settings):
    """What window_scores gave, averaged, [channels, H, W] -> scores [C, H, W] and labels [H, W]."""
    if settings.background_entropy is not None:
        scores, cosines = scores.split((len(scores) - len(owner), len(owner)))
        scores = torch.cat([entropy_background(cosines, owner, scale, settings), scores])
    # The softmax changes no argmax but that of values that it rounds to the same: the authors' way with near ties.
    return scores, scores.softmax(dim=0).argmax(dim=0)


def dense_labels(cosines, owner, settings):
    """Cosines [Q, H, W] of the words -> probabilities [C, H, W] and labels [H, W], as SCLIP does, with its own scale."""
    scores = (settings.logit_scale * cosines).softmax(dim=0)
    scores = best_word(scores.permute(1, 2, 0), owner, len(settings.classes)).permute(2, 0, 1)  # [C, H, W]
    if settings.background_entropy is not None:
        scores = torch.cat([entropy_background(cosines, owner, settings.logit_scale, settings), scores])
    if settings.area_threshold is not None:
        area = torch.bincount(scores.argmax(dim=0).flatten(), minlength=len(scores))[1:]
        scores[1:] *= (area > settings.area_threshold * area.sum())[:, None, None]
    best, label = scores.max(dim=0)
    if settings.background_threshold is not None:
        label[best < settings.background_threshold] = 0
    return scores, label


def pamr(scores, picture, iterations=10, dilations=(8, 16)):
    """Pixel-adaptive refinement (Araslanov and Roth, CVPR 2020): scores [C, H, W] move along what looks alike in the image
    [3, H, W]. Each pixel takes the mean of its neighbours' scores, in eight directions at each of these distances, weighted by
    a softmax over how near their colours are, in tenths of the standard deviation around. As often as `iterations` says."""
    steps = [(d * y, d * x) for d in dilations for y in (-1, 0, 1) for x in (-1, 0, 1)]
    most, (height, width) = max(dilations), picture.shape[-2:]

    def moved(x):  # -> the neighbours' values, one step after the other, each [channels, H, W]
        x = F.pad(x[None], [most] * 4, mode="replicate")[0]
        for dy, dx in steps:
            yield x[:, most + dy : most + dy + height, most + dx : most + dx + width]

    around = torch.stack(list(moved(picture)))  # [steps, 3, H, W], the pixel itself among them, once for each distance
    deviation = around.std(dim=0)
    affinity = -((around - picture).abs() / (0.1 * deviation + 1e-8)).mean(dim=1)  # [steps, H, W]
    itself = torch.tensor([step == (0, 0) for step in steps], device=picture.device)
    affinity = affinity.masked_fill(itself[:, None, None], -torch.inf).softmax(dim=0)
    for _ in range(iterations):
        scores = sum(weight * there for weight, there in zip(affinity, moved(scores)))
    return scores


class Result(NamedTuple):
    """What a model sees in one picture."""

    label: np.ndarray  # uint8 [H, W], at the picture's own size
    regions: np.ndarray  # at the inference resolution [h, w], of a whole image at its own; center + L * window
    seen: tuple  # h, w: the inference resolution
    scores: torch.Tensor  # [C, H, W]
    features: torch.Tensor  # [windows, E], image features


class Segmenter:
    """A model, words (features [Q, E] and classes [Q]) and settings, ready to label pictures."""

    def __init__(self, model, text, owner, settings, batch_size=16, bf16=False):
        self.model, self.text, self.owner, self.settings = model, text, owner, settings
        self.batch_size, self.bf16 = batch_size, bf16
        self.scale = model.clip.logit_scale.exp().clamp(max=100)

    def stride(self):
        """Pixels from one patch to the next."""
        return self.settings.stride_trick or self.model.visual.patch_size

    def run(self, encoder, crops):
        """What the encoder makes of [n, 3, window, window], a list with each batch's, and the rows and columns of patches."""
        visual = self.model.visual
        conv1, own = visual.conv1, visual.conv1.stride
        conv1.stride = (self.stride(),) * 2
        with torch.autocast(crops.device.type, torch.bfloat16, enabled=self.bf16):
            parts = [encoder(batch) for batch in crops.split(self.batch_size)]
        grid, conv1.stride = visual.grid(*crops.shape[-2:]), own
        return parts, grid

    def encode(self, crops):
        """[n, 3, window, window] -> ImageEncoding of all, and the rows and columns of patches."""
        parts, grid = self.run(self.model.encode_image, crops)
        encoding = type(parts[0])(*(None if fields[0] is None else torch.cat(fields) for fields in zip(*parts)))
        return encoding, grid

    @torch.inference_mode()
    def __call__(self, pictures):
        """(sample, picture as seen uint8 [h, w, 3]) ... -> (sample, Result) ...; windows of several pictures share a batch."""
        waiting, crops, s = [], [], self.settings
        for sample, seen in pictures:
            image = normalise(torch.as_tensor(seen, device=self.text.device).permute(2, 0, 1))  # [3, h, w]
            height, width = image.shape[1:]
            if s.window == 0:  # the whole image, without what is left of it beside the last whole patch
                patch = self.model.visual.patch_size
                yield from self.finish([(sample, image, [(0, 0)])], [image[:, : height // patch * patch, : width // patch * patch]])
                continue
            starts = [
                (y, x) for y in window_starts(height, s.window, s.stride) for x in window_starts(width, s.window, s.stride)
            ]
            crops += [image[:, y : y + s.window, x : x + s.window] for y, x in starts]
            waiting.append((sample, image, starts))
            if len(crops) >= self.batch_size:
                yield from self.finish(waiting, crops)
                waiting, crops = [], []
        if waiting:
            yield from self.finish(waiting, crops)

    def finish(self, waiting, crops):
        """(sample, image [3, h, w], its windows' places), and the windows of all -> (sample, Result) ..."""
        patch, window = self.model.visual.patch_size, self.settings.window
        encoding, grid = self.encode(torch.stack(crops))
        scores = window_scores(encoding, self.text, self.owner, self.scale, self.settings)  # [n, L, channels]
        # NACLIP brings the map of a whole image to the image's own size in one step, and that of windows in two.
        size = (window, window) if window else waiting[0][0].picture.shape[:2]
        regions = pixel_regions(encoding, size, grid, patch, self.stride())  # [n, window, window]
        first = 0
        for sample, image, starts in waiting:
            size = tuple(image.shape[1:]) if window else size
            canvas, count = scores.new_zeros(scores.shape[2], *size), scores.new_zeros(size)
            region_map = regions.new_zeros(size)
            for i, (y, x) in enumerate(starts, first):
                height, width = regions.shape[1:]
                here = (..., slice(y, y + height), slice(x, x + width))
                if encoding.soft is None:  # the regions are the patches, between which is interpolated
                    maps = scores[i].T.unflatten(1, grid)[None]  # [L, channels] -> [1, channels, rows, columns]
                    canvas[here] += upsample(maps, (height, width), patch, self.stride())[0]
                else:
                    canvas[here] += pixel_scores(scores[i], regions[i])
                count[here] += 1
                region_map[here] = regions[i] + (i - first) * scores.shape[1]
            features = encoding.features[first : first + len(starts)]
            first += len(starts)
            full = F.interpolate((canvas / count)[None], sample.picture.shape[:2], mode="bilinear", align_corners=False)[0]
            if self.settings.refine:
                full = pamr(full, self.guide(sample.picture, image))
            if self.settings.scoring == "cosines":
                full, label = dense_labels(full, self.owner, self.settings)
            else:
                full, label = segclip_labels(full, self.owner, self.scale, self.settings)
            result = Result(label.byte().cpu().numpy(), region_map.cpu().numpy(), tuple(image.shape[1:]), full, features)
            yield sample, result

    def guide(self, picture, image):
        """What PAMR compares the colours of, [3, H, W]: the picture uint8 [H, W, 3] itself; for scoring by cosines, as in
        SCLIP's and NACLIP's programs, the image [3, h, w] as the model saw it, enlarged again."""
        if self.settings.scoring == "cosines":
            return F.interpolate(image[None], picture.shape[:2], mode="bilinear", align_corners=False)[0]
        return torch.as_tensor(picture, device=image.device).permute(2, 0, 1).float()


class ResizedPictures(torch.utils.data.Dataset):
    """What the worker processes do: (sample, the picture at the size at which the model sees it), or an InputError."""

    def __init__(self, dataset, settings, patch_size):
        self.dataset, self.settings, self.patch_size = dataset, settings, patch_size

    def __getitem__(self, index):
        try:
            sample = self.dataset[index]
        except InputError as error:  # raised here, it would reach the user with a trace of the worker around it
            return error
        if self.settings.protocol == "classify":
            return sample, centre(sample.picture, self.settings.window)
        least = self.settings.window or self.patch_size
        height, width = resized(*sample.picture.shape[:2], self.settings.short_side, least)
        return sample, resize_bilinear(sample.picture, height, width)


def batches(items, size):
    """Lists of so many items; the last may be shorter."""
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch


# ---------------------------------------------------------------------------------------------------------------------
# Whole pictures


def centre(picture, size):
    """The square in the middle, as wide as the short side: uint8 [H, W, 3] -> [size, size, 3], to the pixel as CLIP's
    preprocessing, torchvision's on Pillow, has it."""
    image = Image.fromarray(picture)
    image = image.resize([size * side // min(image.size) for side in image.size], Image.BICUBIC)
    left, top = (round((side - size) / 2) for side in image.size)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def picture_scores(model, encoding, text):
    """How much each picture is each word: text [Q, E] -> [B, Q], PACL's compatibility or the cosine of the image feature."""
    if isinstance(model, PACL):
        return compatibility(encoding.regions.float(), text, model.config.patch_scale)
    return F.normalize(encoding.features.float(), dim=-1) @ text.T


@torch.inference_mode()
def classify(segmenter, pictures):
    """(sample, its centre) ... -> [3, C]: the pictures of each class; those for which it is best; is among the best five."""
    num_classes = len(segmenter.settings.classes)
    counts = torch.zeros(3, num_classes, dtype=torch.long)
    for batch in batches(pictures, segmenter.batch_size):
        samples, crops = zip(*batch)
        image = normalise(torch.as_tensor(np.stack(crops), device=segmenter.text.device).permute(0, 3, 1, 2))
        scores = picture_scores(segmenter.model, segmenter.encode(image)[0], segmenter.text)
        scores = best_word(scores, segmenter.owner, num_classes)  # [B, C]
        label = torch.tensor([sample.label for sample in samples])
        hits = scores.topk(min(5, num_classes)).indices.cpu() == label[:, None]  # [B, 5]
        found = (torch.ones_like(label, dtype=torch.bool), hits[:, 0], hits.any(dim=1))
        counts += torch.stack([torch.bincount(label[mask], minlength=num_classes) for mask in found])
    return counts


# ---------------------------------------------------------------------------------------------------------------------
# The metric


class Score:
    """Pixel counts over a whole data set: per class, predicted right, predicted, and labelled (mmsegmentation's rule)."""

    def __init__(self, num_classes):
        self.counts = np.zeros((3, num_classes), np.int64)

    def add(self, prediction, label):
        """One picture: uint8 arrays of the same shape. Where the label is 255, nothing counts."""
        scored = label != 255
        prediction, label = prediction[scored], label[scored]
        n = self.counts.shape[1]
        for counts, values in zip(self.counts, (prediction[prediction == label], prediction, label[label < n])):
            counts += np.bincount(values, minlength=n)

    def iou(self):
        """[C] of fractions; NaN for a class that is neither predicted nor labelled."""
        intersection, predicted, labelled = self.counts
        union = predicted + labelled - intersection
        return np.divide(intersection, union, out=np.full(len(union), np.nan), where=union > 0)

    def accuracy(self):
        """[C] of fractions; NaN for a class that is not labelled."""
        intersection, _, labelled = self.counts
        return np.divide(intersection, labelled, out=np.full(len(labelled), np.nan), where=labelled > 0)

    def summary(self):
        intersection, _, labelled = self.counts.sum(axis=1)
        return {"mIoU": mean(self.iou()), "mAcc": mean(self.accuracy()), "aAcc": float(intersection / max(labelled, 1))}


def mean(values):
    """The mean of the values that are not NaN; 0 if there is none."""
    return float(np.nanmean(values)) if not np.isnan(values).all() else 0.0


# ---------------------------------------------------------------------------------------------------------------------
# Why a score is what it is


def majority(parts, label):
    """Each part of a picture has the label that most of its pixels have: parts int [H, W], label uint8 [H, W] -> [H, W]."""
    parts = np.unique(parts, return_inverse=True)[1].reshape(label.shape)  # numbered without gaps
    counts = np.bincount((256 * parts + label).ravel(), minlength=256 * (parts.max() + 1)).reshape(-1, 256)
    counts[:, 255] = 0  # not scored
    return counts.argmax(axis=1)[parts].astype(np.uint8)


ANALYSIS = {  # what --analyse says, in the order in which it is best read
    "ceiling": "mIoU if each patch had its majority class: about what patches allow",
    "names perfect": "mIoU if each region had its majority class: names perfect",
    "grouping perfect": "mIoU if each true region were named as a whole: grouping perfect",
    "purity": "purity: pixels that have the majority class of their region",
    "patches": "patches that get the class of most of their pixels",
    "named right": "true regions that are named right",
    "words found": "words of a picture among the image feature's best (--top-k, or 5)",
    "captions": "captions nearest to their own of 100 pictures",
    "regions": "number of regions in a picture",
}


class Analysis:
    """What the score would be if one part of the model were perfect, and how good that part is by itself."""

    def __init__(self, num_classes, segmenter, tokenizer):
        self.model, self.text, self.owner, self.settings = (
            segmenter.model,
            segmenter.text,
            segmenter.owner,
            segmenter.settings,
        )
        self.tokenizer, self.top_k = tokenizer, segmenter.settings.top_k or 5
        self.ceiling, self.grouped, self.named, self.patches = (Score(num_classes) for _ in range(4))
        self.regions, self.right_names, self.words_found, self.captions, self.features = [], [], [], [], []

    def add(self, sample, result):
        (height, width), (h, w), P = sample.label.shape, result.seen, self.model.config.patch_size
        y, x = np.arange(height)[:, None] * h // height, np.arange(width) * w // width  # of each pixel, as it was seen
        patches = y // P * w + x // P
        best = majority(patches, sample.label)
        self.ceiling.add(best, sample.label)
        self.patches.add(majority(patches, result.label), np.where(sample.label == 255, 255, best))
        regions = result.regions if self.settings.window == 0 else result.regions[y, x]
        self.grouped.add(majority(regions, sample.label), sample.label)
        self.regions.append(len(np.unique(result.regions)))

        there, named = [c for c in np.unique(sample.label) if c < len(result.scores)], sample.label.copy()
        for c in there:
            where = torch.as_tensor(sample.label == c, device=result.scores.device)
            name = result.scores[:, where].mean(dim=1).argmax().item()
            named[sample.label == c] = name
            self.right_names.append(name == c)
        self.named.add(named, sample.label)

        first = len(result.scores) - len(self.settings.classes)  # 1 where background is not among the words
        feature = F.normalize(result.features.float(), dim=-1)  # [windows, E]
        ranking = (
            best_word(feature @ self.text.T, self.owner, len(self.settings.classes)).amax(dim=0).argsort(descending=True)
        )
        top = ranking[: self.top_k].tolist()
        self.words_found += [c - first in top for c in there if c >= first]
        if sample.caption:
            self.captions.append(sample.caption)
            self.features.append(F.normalize(feature.mean(dim=0), dim=0))

    def summary(self):
        """-> {key of ANALYSIS: fraction or number}."""
        grouped = self.grouped.summary()
        return {
            "ceiling": self.ceiling.summary()["mIoU"],
            "names perfect": grouped["mIoU"],
            "grouping perfect": self.named.summary()["mIoU"],
            "purity": grouped["aAcc"],
            "patches": self.patches.summary()["aAcc"],
            "named right": mean(self.right_names),
            "words found": mean(self.words_found),
            "captions": self.retrieval(),
            "regions": mean(self.regions),
        }

    @torch.inference_mode()
    def retrieval(self):
        """How often, of 100 pictures, a caption is nearest to its own; None without a hundred captions."""
        found = []
        for i in range(0, len(self.captions) - 99, 100):
            text = self.tokenizer(self.captions[i : i + 100], self.model.config.context_length).to(self.text.device)
            similarity = F.normalize(self.model.encode_text(text), dim=-1) @ torch.stack(self.features[i : i + 100]).T
            found += (similarity.argmax(dim=1).cpu() == torch.arange(100)).tolist()
        return mean(found) if found else None


# ---------------------------------------------------------------------------------------------------------------------
# Semantic coherence: does the cosine of two patch tokens tell whether they show the same class? (PACL, Figure 3)

PAIRS = 1000  # of patches of each picture, and as many with those of another one


def patch_classes(label, patch, stride):
    """The value that most pixels of a patch have, 255 among them: uint8 [H, W] -> [N]."""
    pixels = torch.as_tensor(label).unfold(0, patch, stride).unfold(1, patch, stride)  # [rows, columns, P, P]
    return pixels.flatten(2).flatten(0, 1).mode(dim=1).values  # [N, P*P] -> [N]


@torch.inference_mode()
def pairs_of_patches(segmenter, pictures):
    """(sample, picture as seen) ... -> {"within a picture": (cosines [n], whether of one class [n]), "across pictures": ...}.

    From each picture one of its windows is drawn, and from that PAIRS of patches, and as many with the picture before it.
    """
    s, visual = segmenter.settings, segmenter.model.visual
    windows, draw = np.random.RandomState(0), np.random.RandomState(1)  # two, so that the size of a batch changes nothing
    found, before = {"within a picture": [], "across pictures": []}, None
    if not s.window:
        raise InputError("--coherence needs windows; give --window")
    for batch in batches((item for item in pictures if item[0].label is not None), segmenter.batch_size):
        crops, labels = [], []
        for sample, seen in batch:
            (height, width), (h, w) = sample.label.shape, seen.shape[:2]
            y, x = (windows.choice(window_starts(side, s.window, s.stride)) + np.arange(s.window) for side in (h, w))
            crops.append(seen[y[:, None], x])
            label = sample.label[((2 * y + 1) * height // (2 * h))[:, None], (2 * x + 1) * width // (2 * w)]
            labels.append(patch_classes(label, visual.patch_size, s.stride_trick or visual.patch_size))
        image = normalise(torch.as_tensor(np.stack(crops), device=segmenter.text.device).permute(0, 3, 1, 2))
        tokens = torch.cat(segmenter.run(segmenter.model.patch_tokens, image)[0])  # [B, N, D]
        for token, label in zip(F.normalize(tokens.float(), dim=-1).cpu(), labels):
            token, label = token[label != 255], label[label != 255]
            if len(label) < 2:
                continue
            i = draw.randint(len(label), size=PAIRS)
            another = (i + draw.randint(1, len(label), size=PAIRS)) % len(label)  # any patch but i
            others = [(token, label, another)] + [(*b, draw.randint(len(b[1]), size=PAIRS)) for b in [before] if b]
            for pairs, (other, its, j) in zip(found.values(), others):
                pairs.append(torch.stack([(token[i] * other[j]).sum(dim=-1), (label[i] == its[j]).float()]))
            before = token, label
    return {kind: torch.cat([torch.empty(2, 0), *pairs], dim=1).numpy() for kind, pairs in found.items()}


def roc(scores, same):
    """Scores [n], and 1 or 0, whether they should be high [n] -> the shares of the zeros [k] and of the ones [k] that reach
    each threshold, from the highest down, and the area under this curve. None without both.

    The area is how often a one scores higher than a zero, where a tie counts half; exact, by counting ranks.
    """
    values, which = np.unique(-scores, return_inverse=True)
    positive, negative = (np.bincount(which[same == kind], minlength=len(values)) for kind in (1, 0))
    if not positive.any() or not negative.any():
        return None
    true, false = positive.cumsum(), negative.cumsum()
    area = (negative * (2 * true - positive)).sum() / (2 * true[-1] * false[-1])
    return np.append(0, false / false[-1]), np.append(0, true / true[-1]), float(area)


def coherence(segmenter, pictures, path):
    """Draws the curves -> what metrics.json says of them."""
    found = pairs_of_patches(segmenter, pictures)
    found = {"all pairs": np.concatenate(list(found.values()), axis=1)} | found
    curves = {kind: curve for kind, (scores, same) in found.items() if (curve := roc(scores, same))}
    draw_roc(curves, path)
    return {
        "area": {kind: curves[kind][2] if kind in curves else None for kind in found},
        "true positives at 0, 5, ..., 100 % false ones": [
            float(np.interp(x / 20, *curves["all pairs"][:2])) for x in range(21) if "all pairs" in curves
        ],
        "pairs": found["all pairs"].shape[1],
        "of one class": mean(found["all pairs"][1]),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Pictures of the result


def wheel(n):
    """n colours that are easy to tell apart: hues a golden ratio of the circle from each other. -> uint8 [n, 3]"""
    colours = [colorsys.hsv_to_rgb(i * 0.618 % 1, (0.85, 0.55)[i % 2], (0.95, 0.75, 0.55)[i % 3]) for i in range(n)]
    return (np.array(colours) * 255).astype(np.uint8)


# Easy to tell apart, on light and on dark; grey is kept for the background.
DISTINCT = (
    "e6194b 3cb44b ffe119 4363d8 f58231 911eb4 42d4f4 f032e6 bfef45 fabed4 469990 dcbeff 9a6324 800000 aaffc3 808000 ffd8b1 000075"
).split()


def word_colours(words):
    """A colour for each word, the same in every picture: its hash picks one, or the next that is free. -> uint8 [n, 3]"""
    colours = [tuple(bytes.fromhex(c)) for c in DISTINCT] + wheel(len(words)).tolist()
    free, chosen = list(range(len(colours))), []
    for word in words:
        if word == "background":
            chosen.append((110, 110, 110))
            continue
        start = int(hashlib.md5(word.lower().encode()).hexdigest(), 16) % len(DISTINCT)
        place = next((i for i in free if i >= start), free[0])
        free.remove(place)
        chosen.append(colours[place])
    return np.array(chosen, np.uint8)


def legend(draw, box, entries, font):
    """Swatches with their words, left to right and row by row, below (left, top) of `box` = (left, top, right) -> bottom."""
    left, top, right = box
    side = font.size
    x, y = left, top
    for colour, word in entries:
        width = 1.4 * side + draw.textlength(word, font) + side
        if x > left and x + width > right:
            x, y = left, y + 1.5 * side
        draw.rectangle((x, y, x + side, y + side), tuple(int(v) for v in colour), "black")
        draw.text((x + 1.4 * side, y + side / 2), word, "black", font, anchor="lm")
        x += width
    return int(y + 2 * side)


def with_legend(image, entries):
    """The picture, and under it on white, so that nothing of it is covered, what its colours mean."""
    font = ImageFont.load_default(max(12, image.width // 50))
    blank = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    widest = max(2.4 * font.size + blank.textlength(word, font) for _, word in entries)
    width = max(image.width, int(widest) + font.size)
    box = (font.size // 2, image.height + font.size // 2, width)
    sheet = Image.new("RGB", (width, legend(blank, box, entries, font)), "white")
    sheet.paste(image)
    legend(ImageDraw.Draw(sheet), box, entries, font)
    return sheet


def overlay(picture, label, palette):
    """The colours of the labels over the greys of the picture, with a light line between two labels."""
    grey = np.asarray(Image.fromarray(picture).convert("L"))[..., None]
    mixed = 0.5 * grey + 0.5 * palette[label]
    edge = np.zeros(label.shape, bool)
    edge[:, 1:] |= label[:, 1:] != label[:, :-1]
    edge[1:] |= label[1:] != label[:-1]
    mixed[edge] = 255
    return Image.fromarray(mixed.astype(np.uint8))


def heat(picture, scores):
    """Scores [H, W] of one word over the picture: from the lowest, its dark grey, through red to the highest, yellow."""
    scores = (scores - scores.min()) / max(np.ptp(scores), 1e-9)
    grey = 0.4 * np.asarray(Image.fromarray(picture).convert("L"))
    red, green = (2 * scores).clip(max=1), (2 * scores - 1).clip(min=0)
    return Image.fromarray(
        np.stack([grey + (255 - grey) * red, grey + (230 - grey) * green, grey * (1 - scores)], -1).astype(np.uint8)
    )


def draw_examples(examples, words, palette, path, side=160):
    """One row per example, (picture, truth or None, regions, prediction): picture | truth | regions | result."""
    margin, head = 8, 24
    titles = ("picture", "truth", "regions", "result")
    sheet = Image.new("RGB", (margin + 4 * (side + margin), head + len(examples) * (side + margin)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    used, region_colours = set(), wheel(64)
    for column, title in enumerate(titles):
        draw.text((margin + column * (side + margin), 5), title, "black", font)
    for row, (picture, truth, regions, prediction) in enumerate(examples):
        used |= set(prediction.flat) | (set() if truth is None else set(truth.flat))
        for column, image in enumerate((picture, truth, region_colours[regions % 64], prediction)):
            if image is not None:
                image = Image.fromarray(palette[image] if column % 2 else image)
                scale = side / max(image.size)
                image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.NEAREST)
                sheet.paste(image, (margin + column * (side + margin), head + row * (side + margin)))
    with_legend(sheet, [(palette[c], words[c]) for c in sorted(used - {255})]).save(path)


def draw_roc(curves, path, side=400):
    """{name: (false positives [k], true positives [k], area)}, and the diagonal, which is chance."""
    sheet = Image.new("RGB", (side + 80, side + 90), "white")
    draw, font, colours = ImageDraw.Draw(sheet), ImageFont.load_default(13), wheel(len(curves))

    def place(x, y):
        return 50 + side * x, 35 + side * (1 - y)

    draw.rectangle((place(0, 1), place(1, 0)), outline="black")
    draw.line((place(0, 0), place(1, 1)), "grey")
    for tick in (0, 0.25, 0.5, 0.75, 1):
        (x, bottom), (left, y) = place(tick, 0), place(0, tick)
        draw.text((x, bottom + 5), f"{tick:g}", "black", font, anchor="ma")
        draw.text((left - 5, y), f"{tick:g}", "black", font, anchor="rm")
    draw.text((5, 8), "pairs of one class whose cosine reaches a threshold", "black", font)
    draw.text((50 + side, side + 60), "pairs of two classes whose cosine does", "black", font, anchor="ra")
    at = np.linspace(0, 1, side + 1)
    for colour, (false, true, _) in zip(colours.tolist(), curves.values()):
        draw.line([place(0, 0), *map(place, at, np.interp(at, false, true))], tuple(colour), 2)
    areas = {"chance": 0.5} | {name: area for name, (_, _, area) in curves.items()}
    entries = [(colour, f"{name}: area {area:.3f}") for colour, (name, area) in zip([(128,) * 3, *colours], areas.items())]
    with_legend(sheet, entries).save(path)


def save_labels(path, label, palette, key=""):
    """A palette PNG, with what it depends on in a note; never half of one."""
    make_folder(path.parent)
    image, note = Image.fromarray(label), PngInfo()
    image.putpalette(palette.ravel().tolist())
    note.add_text("key", key)
    image.save(path.with_suffix(".part"), "PNG", pnginfo=note)
    os.replace(path.with_suffix(".part"), path)


def prediction_key(record, path):
    """What a prediction depends on: the settings, and the picture as it lies on disk."""
    stat = path.stat() if path and path.exists() else None
    return hashlib.sha256(json.dumps([record, str(path), stat and [stat.st_size, stat.st_mtime_ns]]).encode()).hexdigest()


def read_prediction(path, key):
    """The labels that an earlier run saved; None if there are none, or others, or damaged ones."""
    try:
        with Image.open(path) as image:
            return np.asarray(image) if image.info.get("key") == key else None
    except UNREADABLE:
        return None


# ---------------------------------------------------------------------------------------------------------------------
# The program


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        usage="python evaluate.py [what to label] [--checkpoint FILE] [how] [where to]",
        description=__doc__,
        epilog="[x] is the default.",
        formatter_class=ManualPage,
    )
    # fmt: off
    what = parser.add_argument_group("what to label: --dataset, --images, --image or --classify")
    add = what.add_mutually_exclusive_group().add_argument
    add("--dataset", default="synthetic", metavar="NAME", choices=[*SCENES, *sorted(BENCHMARKS)],
        help="a benchmark: %(choices)s [%(default)s]")
    add("--images", metavar="DIR", help="a folder of your own pictures")
    add("--image", metavar="FILE", help="one picture; writes an overlay, the labels and the regions")
    add("--classify", metavar="DIR", help="whole pictures, to be told apart: one folder a class, named by it")
    add = what.add_argument
    add("--data-root", metavar="DIR", help="the benchmark's folder, for example VOCdevkit/VOC2012")
    add("--labels-dir", metavar="DIR",
        help="label maps of --images, NAME.png: class numbers from 0 in one byte a pixel, 255: not scored")
    add("--words", metavar="W", help='the classes, for --image and --images: "cat, grass, sky"')
    add("--classes", metavar="FILE",
        help="the classes, for all of these: one in each line, synonyms separated by commas")
    add("--compare", action="store_true",
        help="a table of CLIP, its read-outs, PACL and SegCLIP, as train.py left them in runs")
    add("--limit", type=int, metavar="N", help="only the first N pictures, for a quick look [all]")
    add("--seed", type=int, default=0, metavar="N", help="of the synthetic scenes [%(default)s]")
    model = parser.add_argument_group("the model")
    add = model.add_argument
    add("--checkpoint", "--model", default=DEFAULT_CHECKPOINT, metavar="FILE",
        help="one of train.py's, the authors' segclip.bin, or a CLIP (a file, or by name: ViT-B/16), whose patch tokens are "
        "then read [%(default)s]")
    add("--readout", choices=READOUTS, default="clip",
        help="how the last block of a CLIP makes patch tokens; all but clip see more than CLIP was trained to show, and are "
        "explained at read_out in model.py [%(default)s]")
    add("--activation", choices=ACTIVATIONS,
        help="of a CLIP from another source than OpenAI: gelu for LAION's and DataComp's weights; no file tells [quick_gelu]")
    add("--vocabulary", metavar="FILE", help="OpenAI's BPE vocabulary, if it is not in the cache and cannot be fetched")
    add("--device", help="cpu, cuda, cuda:1, ... [a GPU if there is one]")
    add("--precision", choices=("bf16", "fp32"), default="fp32", help="bf16 is faster where supported [%(default)s]")
    add("--batch-size", type=int, default=16, metavar="B",
        help="windows that are encoded together; fewer if memory is short [%(default)s]")
    add("--workers", type=int, default=2, metavar="N", help="processes that read pictures; 0: none but this [%(default)s]")
    how = parser.add_argument_group("how")
    add = how.add_argument
    add("--protocol", choices=PROTOCOLS, default="segclip",
        help="the settings of a paper's tables, by data set; each can be changed by a flag below. dense: another name of "
        "sclip [%(default)s]")
    add("--templates", type=int, choices=TEMPLATES, help="sentences around a word: one, or OpenAI's 7 or 80 [the protocol's]")
    add("--short-side", type=int, metavar="PIXELS", help="of a picture, as the model sees it [the protocol's]")
    add("--window", type=int, metavar="PIXELS", help="side of a window; 0: the whole image at once [the protocol's]")
    add("--stride", type=int, metavar="PIXELS", help="from one window to the next [the protocol's]")
    add("--stride-trick", type=int, metavar="PIXELS",
        help="from one patch to the next: less than a patch gives finer maps, for more time [patch size]")
    add("--refine", choices=("pamr",),
        help="move the borders to those of the colours, by pixel-adaptive refinement [no]")
    add("--top-k", type=int, metavar="K",
        help="how many different words the regions of a window may get; more for crowded pictures [segclip: 5]")
    add("--logit-scale", type=float, metavar="S",
        help="inverse temperature of the softmax over the words; not of segclip, which has the model's [the protocol's]")
    add("--area-threshold", type=float, metavar="SHARE",
        help="leave out classes with a smaller share of the foreground; not of segclip [sclip on VOC: 0.1]")
    add("--background", "--background-threshold", dest="background_threshold", nargs="?", const=OWN, metavar="T",
        help="pixels can be none of the words: where none reaches T, between 0 and 1 [the protocol's]")
    add("--background-entropy", type=float, metavar="T",
        help="instead: where the entropy of the softmax over the words is more than T; PACL has 1.5 on VOC [no]")
    result = parser.add_argument_group("the result")
    add = result.add_argument
    add("--output", metavar="DIR", help="[of scenes: the checkpoint's; else runs/NAME, or runs/images, runs/image, runs/classify]")
    add("--analyse", action="store_true", help="say why the score is what it is, part by part of the model")
    add("--coherence", action="store_true",
        help="does the cosine of two patch tokens tell whether they are of one class? draws roc.png")
    add("--heat", action="store_true",
        help="with --image: a heat map for each word, too, from its own lowest score to its own highest")
    # fmt: on
    return parser.parse_args(argv)


def kind_of(args):
    return next((kind for kind in ("classify", "image", "images") if getattr(args, kind)), args.dataset)


def open_dataset(args, size):
    """What the flags name: its words, whether it has_background, len, and Samples by number; of all but a ClassFolder also
    names, palette, and picture_path(number). Raises InputError."""
    if args.heat and not args.image or args.labels_dir and not args.images:
        raise InputError("--heat is for --image, --labels-dir for --images")
    if args.words and (args.classes or not (args.image or args.images)):
        raise InputError("--words is for --image and --images; it is this or --classes")
    if (args.coherence or args.analyse) and (args.image or args.images and not args.labels_dir):
        raise InputError("--analyse and --coherence are for pictures with label maps")
    if args.classify:
        no = ("image", "images", "window", "short_side", "stride", "top_k", "logit_scale", "area_threshold", "refine")
        for name in (*no, "analyse", "coherence"):
            if getattr(args, name) is not None and getattr(args, name) is not False:
                raise InputError(f"--{name.replace('_', '-')} cannot be had with --classify")
        if args.protocol != "segclip":
            raise InputError("--protocol cannot be had with --classify; --templates can")
        return ClassFolder(args.classify)
    if args.image or args.images:
        if not args.words and not args.classes:
            raise InputError('--image and --images need words: --words "cat, grass, sky" or --classes FILE')
        if args.words and (args.words.endswith(".txt") or os.path.isfile(args.words)):
            raise InputError(f"--words {args.words}: takes the words themselves; for a file of them, --classes")
        words = listed(args.words) if args.words else [names[0] for names in read_classes(args.classes)]
        has_background = args.background_threshold is not None or args.background_entropy is not None
        check_words(words, has_background, args.classes or "--words")
        if args.image:
            return PictureFolder(Path(args.image).parent, None, words, has_background, [Path(args.image)])
        return PictureFolder(args.images, args.labels_dir, words, has_background, output=output_folder(args))
    if args.data_root and args.dataset in SCENES:
        raise InputError("--data-root needs --dataset; to label pictures of your own, --images")
    if args.dataset in SCENES:
        return SyntheticScenes(size, args.seed, SCENES[args.dataset])
    if args.data_root is None:
        raise InputError(f"--dataset {args.dataset} needs --data-root, the folder that holds it")
    return SegmentationFolder(args.dataset, args.data_root)


def check(args, settings, patch):
    """Raises InputError for flags that make no sense."""
    if (args.image or args.analyse or args.coherence) and dist.is_initialized():  # one cannot be shared, these need them all
        raise InputError("--image, --analyse and --coherence are for one process; start it with python, not torchrun")
    for name in ("short_side", "stride", "batch_size", "limit", "top_k"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    for name in ("logit_scale", "area_threshold"):
        value = getattr(args, name)
        if value is not None and settings.scoring == "regions":
            raise InputError(f"--{name.replace('_', '-')}: --protocol {settings.protocol} has none")
        if value is not None and not 0 <= value <= (1 if name == "area_threshold" else 1e4):
            raise InputError(f"--{name.replace('_', '-')} {value}: out of range")
    if not 0 <= args.seed < 2**32 or args.workers < 0:
        raise InputError(f"--seed {args.seed} or --workers {args.workers}: out of range")
    if settings.stride_trick is not None and (settings.stride_trick < 1 or patch % settings.stride_trick):
        raise InputError(f"--stride-trick {settings.stride_trick}: must divide {patch}, the model's patch size")
    if settings.window < 0 or settings.window % patch or settings.window and settings.stride > settings.window:
        raise InputError(
            f"--window {settings.window} must be 0 or a multiple of {patch}, the model's patch size, and --stride {settings.stride} "
            "not more than it"
        )


def main(argv=None):
    args = parse_args(argv)
    rank, world, device = start_processes(args.device)
    if args.compare:
        return compare(args, device)
    metrics = label_and_score(args, rank, world, device)
    if rank == 0 and metrics:
        report(metrics)


PUBLISHED_ON = ("VOC-21", "Context-60", "COCO-Object", "VOC-20", "Context-59", "COCO-Stuff", "ADE", "Cityscapes")
# What --compare compares: name: (--method of train.py, read-out, mIoU in the papers with ViT-B/16).
COMPARED = {
    "CLIP": ("clip", "clip", "- - - 8.4 2.3 2.6 1.3 -"),
    "MaskCLIP": ("clip", "maskclip", "43.4 23.2 20.6 74.9 26.4 16.7 11.9 24.9"),
    "SCLIP": ("clip", "sclip", "59.1 30.4 30.5 80.4 34.2 22.4 16.1 32.2"),
    "ClearCLIP": ("clip", "clearclip", "51.8 32.6 33.0 80.9 35.9 23.9 16.7 30.0"),
    "NACLIP": ("clip", "naclip", "58.9 32.2 33.2 79.7 35.2 23.3 17.4 35.5"),
    "PACL": ("pacl", "clip", "- - - 72.3 50.1 38.8 31.4 -"),
    "SegCLIP": ("segclip", "clip", "52.6 24.7 26.5 - - - - -"),
}


def compare(args, device):
    """Score the models of the scenes one after the other, and print a table in Markdown. Raises InputError."""
    if dist.is_initialized():
        raise InputError("--compare is for one process; start it with python, not torchrun")
    if kind_of(args) in ("image", "images", "classify"):
        raise InputError("--compare is for --dataset")
    for method in RUNS:
        trained(method)
    print(
        f"| | mIoU on {args.dataset} | patches right | {' | '.join(PUBLISHED_ON)} |\n|---|---|---|{'---|' * len(PUBLISHED_ON)}"
    )
    for name, (method, readout, published) in COMPARED.items():
        changes = {"checkpoint": trained(method), "readout": readout, "analyse": True}
        changes["output"] = str(Path(args.output or "runs/compare", name))
        metrics = label_and_score(argparse.Namespace(**vars(args) | changes), 0, 1, device)
        measured = [f"{100 * value:.1f} %" for value in (metrics["mIoU"], metrics["analysis"]["patches"])]
        print(f"| {' | '.join([name, *measured, *published.split()])} |", flush=True)


def trained(method):
    """The checkpoint that train.py leaves of the scenes. Raises InputError."""
    path = Path(RUNS[method], "checkpoint.pt")
    if not path.exists():
        raise InputError(
            f"{path}: not there yet; make it with `python train.py --method {method}`, or give --checkpoint FILE"
        )
    return str(path)


def label_and_score(args, rank, world, device):
    """What the flags name, with the checkpoint that they name -> metrics, as evaluate. Raises InputError."""
    if args.checkpoint == DEFAULT_CHECKPOINT:
        trained("segclip")
    path = fetch(args.checkpoint) if args.checkpoint in MODELS else args.checkpoint
    model = load_model(path, args.readout, args.activation).to(device).eval()
    tokenizer = load_tokenizer(path, args.vocabulary)
    if tokenizer.vocab_size != model.config.vocab_size:
        raise InputError(
            f"{args.checkpoint}: made for {model.config.vocab_size} tokens, but the vocabulary has {tokenizer.vocab_size}"
        )
    origin = {"checkpoint": str(args.checkpoint), "checkpoint_sha256": sha256_of(path), "readout": args.readout}
    return evaluate(args, model, tokenizer, rank, world, origin)


def plan(args, config):
    """What the flags ask of a model of these sizes: data set, settings, number of pictures. Raises InputError."""
    dataset = open_dataset(args, config.image_size)
    settings = choose_settings(args, dataset, config.image_size)
    check(args, settings, config.patch_size)
    count = len(dataset) if args.limit is None else min(len(dataset), args.limit)
    if count < 1:
        raise InputError(f"{args.images or args.dataset}: no picture to label")
    return dataset, settings, count


def evaluate(args, model, tokenizer, rank, world, origin):
    """Label what the flags name, each process its share, and write it -> metrics of all of it on process 0, where labelled.

    origin: what tells this model from others, for metrics.json and for knowing earlier predictions. Raises InputError.
    """
    dataset, settings, count = plan(args, model.config)
    kind, output = kind_of(args), output_folder(args)
    make_folder(output)
    source = args.classify or args.image or args.images or args.data_root
    record = {
        "dataset": kind,
        "data": source and str(Path(source).resolve()),
        "seed": args.seed if kind in SCENES else None,
        **origin,
        "vocabulary": args.vocabulary,
        "git": git_revision(),
        "code": code_hash(),
        "precision": args.precision,
        **vars(settings),
    }
    if rank == 0 and kind in ("image", "images", "classify"):
        tell_unknown_words(tokenizer, settings)
    text, owner = class_features(model, tokenizer, settings)
    segmenter = Segmenter(model, text, owner, settings, args.batch_size, args.precision == "bf16")
    words = ["background", *dataset.words] if settings.has_background() else dataset.words
    task = Task(args, dataset, words, count, segmenter, tokenizer, output, record, rank, world)
    if args.image:
        return show_picture(task)
    metrics, written = score_classification(task) if args.classify else score_segmentation(task)
    if rank:
        return None
    if metrics:
        metrics |= {"limit": args.limit, **record}
        (output / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
        written.append(f"{output}/metrics.json")
    elif args.labels_dir:
        print(f"{args.labels_dir}: no label map has the name of a picture", file=sys.stderr)
    print(f"wrote {', '.join(written)}", file=sys.stderr)
    return metrics


def tell_unknown_words(tokenizer, settings):
    """A vocabulary that was learned of some captions has a token for each word that was frequent in them."""
    words = [word for words in settings.classes for word in words]
    rare = [word for word in words if any(len(tokenizer.pieces(part)) > 1 for part in tokenizer.words(word))]
    if rare and tokenizer.vocab_size < Config.vocab_size:
        print(
            f"{', '.join(rare)}: rare or unknown in the captions that this model was trained on; what it says of that is "
            "worth little",
            file=sys.stderr,
        )


class Task(NamedTuple):
    """What is to be labelled, with what, and where the result goes."""

    args: argparse.Namespace
    dataset: object
    words: list  # of the classes, background among them
    count: int  # of pictures
    segmenter: Segmenter
    tokenizer: object
    output: Path
    record: dict  # all that a prediction depends on, beside its picture
    rank: int
    world: int

    def load(self, indices):
        """These pictures, as Segmenter takes them; process 0 tells how far it is."""
        pictures = raised(in_parallel(ResizedPictures(self.dataset, self.segmenter.settings, self.segmenter.model.visual.patch_size), self.args.workers, indices))
        return progress(pictures, len(indices), "pictures") if self.rank == 0 else pictures

    def sum(self, counts):
        """Integers, summed over the processes."""
        totals = torch.as_tensor(counts, device=self.segmenter.text.device)
        if self.world > 1:
            dist.all_reduce(totals)
        return totals.cpu()


def code_hash():
    """Of this project's files: labels that another version of them made are not reused."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))).hexdigest()


def output_folder(args):
    """--output, or: scores on scenes belong to one run of training, which has a folder already; others have their own."""
    home = Path("runs", args.checkpoint.replace("/", "-")) if args.checkpoint in MODELS else Path(args.checkpoint).parent
    beside = {"synthetic": home, "synthetic-unseen": home / "unseen"}
    return Path(args.output or beside.get(kind_of(args), f"runs/{kind_of(args)}"))


def score_classification(task):
    """-> metrics of whole pictures, and no files."""
    mine = range(task.rank, task.count, task.world)
    counts = task.sum(classify(task.segmenter, task.load(mine)))
    total, top_1, top_5 = counts.sum(dim=1).tolist()
    per_class = {name: right / n if n else None for name, (n, right, _) in zip(task.dataset.folders, counts.T.tolist())}
    return {"top-1": top_1 / total, "top-5": top_5 / total, "accuracy": per_class, "pictures": total}, []


def score_segmentation(task):
    """Label all pictures -> metrics, None where no picture has a label map, and the files that were written."""
    args, output = task.args, task.output
    analysis = Analysis(len(task.words), task.segmenter, task.tokenizer) if args.analyse else None
    score, labelled, examples = label_pictures(task, analysis)
    labelled, score.counts = task.sum([labelled]).item(), task.sum(score.counts).numpy()
    if task.rank:
        return None, []
    draw_examples(examples, task.words, task.dataset.palette, output / "examples.png")
    metrics, written = None, [f"{output}/predictions/", f"{output}/examples.png"]
    if labelled:
        per_class = {word: None if np.isnan(iou) else float(iou) for word, iou in zip(task.words, score.iou())}
        metrics = score.summary() | {"IoU": per_class, "pictures": labelled}
        if analysis:
            metrics["analysis"] = analysis.summary()
        if args.coherence:
            shuffled = np.random.RandomState(0).permutation(task.count).tolist()  # so the picture before is any other
            metrics["coherence"] = coherence(task.segmenter, task.load(shuffled), output / "roc.png")
            written.append(f"{output}/roc.png")
    return metrics, written


def label_pictures(task, analysis):
    """Label this process's pictures and save their labels, but for those that an earlier run labelled with the very same settings
    -> Score, how many have label maps, and the first six as draw_examples has them."""
    dataset, mine = task.dataset, range(task.rank, task.count, task.world)
    shown, todo, score, labelled, examples = set(mine[:6]), [], Score(len(task.words)), 0, []
    paths = {i: task.output / "predictions" / f"{dataset.names[i]}.png" for i in mine}
    keys = {i: prediction_key(task.record, dataset.picture_path(i)) for i in mine}
    for i in mine:
        earlier = None if i in shown or analysis else read_prediction(paths[i], keys[i])
        if earlier is None:
            todo.append(i)
        elif (label := dataset[i].label) is not None:
            labelled += 1
            score.add(earlier, label)
    if len(todo) < len(mine):
        print(f"{len(mine) - len(todo)} pictures of an earlier run with the same settings are reused", file=sys.stderr)

    for i, (sample, result) in zip(todo, task.segmenter(task.load(todo))):
        save_labels(paths[i], result.label, dataset.palette, keys[i])
        if sample.label is not None:
            labelled += 1
            score.add(result.label, sample.label)
            if analysis:
                analysis.add(sample, result)
        if i in shown:
            examples.append((sample.picture, sample.label, result.regions, result.label))
    return score, labelled, examples


def report(metrics):
    """Print what metrics.json says."""
    each, names = ("accuracy", ("top-1", "top-5")) if "top-1" in metrics else ("IoU", ("mIoU", "mAcc", "aAcc"))
    for word, value in metrics[each].items():
        print(f"{word:>20}  {each} " + ("     -" if value is None else f"{100 * value:5.1f} %"))
    summary = "  ".join(f"{name} {100 * metrics[name]:.2f} %" for name in names)
    rules = ((rule, metrics[f"background_{rule}"]) for rule in ("threshold", "entropy"))
    rules = "".join(f"  background {rule} {value}" for rule, value in rules if value is not None)
    print(f"{summary}  over {metrics['pictures']} pictures  protocol {metrics['protocol']}{rules}")
    for kind, area in metrics.get("coherence", {"area": {}})["area"].items():
        print(f"semantic coherence, area under the ROC curve, {kind}: " + ("-" if area is None else f"{area:.4f}"))
    for key, value in metrics.get("analysis", {}).items():
        value = f"{value:6.1f}  " if key == "regions" else "     -  " if value is None else f"{100 * value:6.1f} %"
        print(f"{value}  {ANALYSIS[key]}")


def show_picture(task):
    """Write what the model sees in one picture, and print how much of it each word is."""
    ((sample, (label, regions, _, scores, _)),) = task.segmenter(task.load([0]))
    words, output, palette = task.words, task.output, word_colours(task.words)
    share = np.bincount(label.ravel(), minlength=len(words)) / label.size
    order = [c for c in np.argsort(-share) if share[c] > 0]
    for c in order:
        print(f"{words[c]:>20}  {100 * share[c]:5.1f} %")
    entries = [(palette[c], f"{words[c]} {100 * share[c]:.0f} %") for c in order]
    files = {
        "overlay": with_legend(overlay(sample.picture, label, palette), entries),
        "regions": Image.fromarray(wheel(64)[regions % 64]).resize(label.shape[::-1], Image.NEAREST),
    }
    if task.args.heat:
        for c, word in enumerate(words):
            safe = "".join(x if x.isalnum() else "_" for x in word)[:60]
            files[f"heat_{c}_{safe}"] = heat(sample.picture, scores[c].cpu().numpy())
    save_labels(output / f"{sample.name}_labels.png", label, palette)
    for name, image in files.items():
        image.save(output / f"{sample.name}_{name}.png")
    print(f"wrote {', '.join(f'{output}/{sample.name}_{name}.png' for name in ('labels', *files))}")


if __name__ == "__main__":
    run_program(main, if_interrupted="stopped; the same command goes on from here")
