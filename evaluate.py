"""Zero-shot segmentation: score a checkpoint on a data set, or label your own images.

python evaluate.py                   the model of `python train.py`, on scenes it has never seen
python evaluate.py --dataset pascal_voc --data-root VOCdevkit/VOC2012 --checkpoint segclip.bin
python evaluate.py --images photos --words words.txt --checkpoint segclip.bin
python evaluate.py --image photo.jpg --words "cat, grass" --checkpoint ViT-B/16 --readout naclip
python evaluate.py --classify photos --checkpoint pacl.pt        whole images, one folder per class
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports ends the program without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import multiprocessing
import os
import sys
import traceback
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageDraw, ImageFilter, ImageFont, ImageOps

from clip_loader import MODELS, fetch, find, load_model, load_tokenizer, sha256_of
from data import (
    BENCHMARKS,
    ClassFolder,
    ImageFolder,
    SegmentationFolder,
    SyntheticScenes,
    first_line,
    normalise,
    parallel_map,
    progress,
    rank_and_world,
    read_lines,
    resize_bilinear,
    split_commas,
)
from losses import compatibility
from model import ACTIVATIONS, PACL, READOUTS, Config, InputError

# --------------------------------------------------------------------------------------------------
# Words

# fmt: off
TEMPLATES = {  # by their number; the 7 and the 80 are OpenAI's, for ImageNet
    1: ["a photo of a {}"],  # Section 2.5
    7: split_commas("""
itap of a {}, a bad photo of the {}, a origami {}, a photo of the large {}, a {} in a video game,
art of the {}, a photo of the small {}"""),
    80: split_commas("""
a bad photo of a {}, a photo of many {}, a sculpture of a {}, a photo of the hard to see {}, a low
resolution photo of the {}, a rendering of a {}, graffiti of a {}, a bad photo of the {}, a cropped
photo of the {}, a tattoo of a {}, the embroidered {}, a photo of a hard to see {}, a bright photo
of a {}, a photo of a clean {}, a photo of a dirty {}, a dark photo of the {}, a drawing of a {}, a
photo of my {}, the plastic {}, a photo of the cool {}, a close-up photo of a {}, a black and white
photo of the {}, a painting of the {}, a painting of a {}, a pixelated photo of the {}, a sculpture
of the {}, a bright photo of the {}, a cropped photo of a {}, a plastic {}, a photo of the dirty
{}, a jpeg corrupted photo of a {}, a blurry photo of the {}, a photo of the {}, a good photo of
the {}, a rendering of the {}, a {} in a video game, a photo of one {}, a doodle of a {}, a
close-up photo of the {}, a photo of a {}, the origami {}, the {} in a video game, a sketch of a
{}, a doodle of the {}, a origami {}, a low resolution photo of a {}, the toy {}, a rendition of
the {}, a photo of the clean {}, a photo of a large {}, a rendition of a {}, a photo of a nice {},
a photo of a weird {}, a blurry photo of a {}, a cartoon {}, art of a {}, a sketch of the {}, a
embroidered {}, a pixelated photo of a {}, itap of the {}, a jpeg corrupted photo of the {}, a good
photo of a {}, a plushie {}, a photo of the nice {}, a photo of the small {}, a photo of the weird
{}, the cartoon {}, art of the {}, a drawing of the {}, a photo of the large {}, a black and white
photo of a {}, the plushie {}, a dark photo of a {}, itap of a {}, graffiti of the {}, a toy {},
itap of my {}, a photo of a cool {}, a photo of a small {}, a tattoo of the {}"""),
}
TEMPLATES = {n: [f"{template}." for template in templates] for n, templates in TEMPLATES.items()}
# fmt: on

# What stands in place of a class's name, by data set: one word in ClearCLIP's tables, and synonyms
# and what counts as background in SCLIP's.
PERSON = split_commas("""
person, person in shirt, person in jeans, person in dress, person in sweater, person in skirt,
person in jacket""")
SCREEN = split_commas("television monitor, tv monitor, monitor, television, screen")
BACKGROUND = split_commas("""
sky, wall, tree, wood, grass, road, sea, river, mountain, sands, desk, bed, building, cloud, lamp,
door, window, wardrobe, ceiling, shelf, curtain, stair, floor, hill, rail, fence""")
OF_VOC = {"boat": ["ship"], "plant": ["pottedplant"], "monitor": ["tvmonitor"]}
OF_CONTEXT = {"airplane": ["aeroplane"], "plant": ["pottedplant"], "monitor": ["tvmonitor"]}
PLAIN = {
    "pascal_voc": OF_VOC,
    "pascal_voc20": OF_VOC,
    "pascal_context": OF_CONTEXT,
    "pascal_context59": OF_CONTEXT,
}
SYNONYMS = PLAIN | {
    "pascal_voc": OF_VOC | {"person": PERSON, "monitor": SCREEN, "background": BACKGROUND},
    "pascal_voc20": OF_VOC | {"person": PERSON, "monitor": SCREEN},
    "coco_object": {"background": BACKGROUND, "person": [*PERSON, "body"]},
}


def class_words(table, dataset, classes, has_background):
    """The words of each class, background among them where it has words -> list of lists.

    table: PLAIN, SYNONYMS, or None for the names alone. classes: the user's own list, or None.
    """
    words = classes or [[word] for word in dataset.words]
    if table is None:
        return words
    if has_background:
        words = [["background"], *words]
    if classes:
        return words
    if dataset.name in ("coco_stuff", "ade20k", "cityscapes"):
        return [[word.replace(" ", "")] for [word] in words]
    return [table.get(dataset.name, {}).get(word, [word]) for [word] in words]


def read_classes(words):
    """ "cat, grass", or a file of one class per line, synonyms between commas -> list of lists.

    Raises InputError.
    """
    classes = [[word] for word in split_commas(words)]
    if not words.isprintable():
        raise InputError(f"--words {words!r}: not one line of text; give the file itself")
    if words.endswith(".txt") or os.path.isfile(words):
        classes = [split_commas(line) for line in read_lines(words)]
    names = [synonyms[0].lower() for synonyms in classes if synonyms]
    if len(names) < len(classes):
        raise InputError(f"--words {words}: a line without a word")
    if not 1 <= len(names) <= 254:
        raise InputError(f"--words {words}: {len(names)} classes; there must be between 1 and 254")
    for name in names:
        if names.count(name) > 1 or name == "background":
            raise InputError(f"--words {words}: the class {name} is there twice, or is background")
    return classes


@torch.no_grad()
def class_features(model, tokenizer, protocol):
    """-> unit vectors [Q, E] of the words of all classes, each the mean over the templates."""
    device = model.clip.logit_scale.device
    features = []
    for word in itertools.chain(*protocol.classes):
        prompts = [template.format(word) for template in TEMPLATES[protocol.templates]]
        text = tokenizer(prompts, model.config.context_length).to(device)
        feature = model.encode_text(text)  # [templates, E]
        if protocol.scoring == "cosines":  # as OpenAI and SCLIP; not so GroupViT
            feature = F.normalize(feature, dim=-1)
        features.append(F.normalize(feature.mean(dim=0), dim=-1))
    return torch.stack(features)


# --------------------------------------------------------------------------------------------------
# Protocols: the settings with which published numbers were made

SCLIP = {
    "scoring": "cosines",
    "words": SYNONYMS,
    "templates": 80,
    "short_side": 336,
    "window": 224,
    "stride": 112,
    "logit_scale": 40.0,
    "background_threshold": 0.1,
}
CLEARCLIP = {
    "words": PLAIN,
    "short_side": 448,
    "window": 448,
    "stride": 224,
    "logit_scale": 50.0,
    "background_threshold": 0.5,
}
SEGCLIP = {
    "scoring": "regions",
    "words": None,
    "templates": 1,
    "short_side": 224,
    "window": 224,
    "stride": 224,
    "top_k": 5,
    "background_threshold": 0.75,  # on VOC; the authors' code has 0.80
}
# Sizes are for a 224-pixel model. "" has the settings of all data sets, the other keys what differs
# on one. Checked against the authors' configuration files. window=0: the whole image at once.
PROTOCOLS = {
    "segclip": {
        "": SEGCLIP,
        "pascal_context": {"background_threshold": 0.25},
        "coco_object": {"background_threshold": 0.65},
    },
    "sclip": {
        "": SCLIP,
        "pascal_voc": {"logit_scale": 65.0, "area_threshold": 0.1},
        "pascal_context": {"logit_scale": 50.0},
        "coco_object": {"logit_scale": 50.0},
        "coco_stuff": {"short_side": 448},
        "cityscapes": {"short_side": 560},
    },
    "naclip": {
        "": SCLIP,
        "pascal_voc": {"window": 0},
        "pascal_voc20": {"window": 0},
        "cityscapes": {"short_side": 560},
    },
    "clearclip": {
        "": SCLIP | CLEARCLIP,
        "pascal_context": {"background_threshold": 0.15},
        "coco_object": {"background_threshold": 0.4},
        "cityscapes": {"window": 224},
    },
    "proxyclip": {
        "": SCLIP | {"window": 336, "background_threshold": 0.2},
        "pascal_context": {"background_threshold": 0.15},
        "coco_object": {"background_threshold": 0.25},
        "ade20k": {"short_side": 448},
        "cityscapes": {"short_side": 448, "window": 224},
    },
    "groupvit": {
        "": SEGCLIP
        | {"short_side": 448, "window": 448, "stride": 224, "background_threshold": 0.95},
        "pascal_context": {"background_threshold": 0.35},
    },
    # Zero-shot classification of whole images, with OpenAI's seven templates.
    "classify": {"": SEGCLIP | {"scoring": "cosines", "templates": 7, "top_k": None}},
}
PROTOCOLS["dense"] = PROTOCOLS["sclip"]


@dataclasses.dataclass
class Protocol:
    """How images become label maps. metrics.json has all of it. Sizes are in pixels."""

    name: str
    scoring: str  # "regions": each region with each word (SegCLIP); "cosines": each patch (SCLIP)
    classes: list  # of C lists of words; the score of a class is that of its best word
    templates: int  # number of sentences around a word
    short_side: int  # inference resolution: the short side of the image
    window: int  # side of a window; 0: the whole image at once
    stride: int  # from one window to the next
    top_k: int | None = None  # by regions: at most this many classes in a window
    logit_scale: float | None = None  # by cosines: inverse temperature of the softmax over words
    background_threshold: float | None = None
    background_entropy: float | None = None  # in place of background_threshold (PACL)
    area_threshold: float | None = None  # by cosines: smallest share of the foreground of a class
    stride_trick: int | None = None  # from one patch to the next; None: the patch size (PACL)
    refine: str | None = None  # "pamr"


def choose_protocol(name, dataset, config, classes=None, **changes):
    """The protocol of this name for a data set and a model's Config. Raises InputError.

    classes: words in place of the data set's. changes: other values of Protocol's fields; None is
    no change.
    """
    fields = PROTOCOLS[name][""] | PROTOCOLS[name].get(dataset.name, {})
    for size in ("short_side", "window", "stride"):
        fields[size] = fields[size] * config.image_size // 224
    fields["short_side"] = round(fields["short_side"] * config.crop_zoom)
    # Background by entropy has no words and no threshold.
    has_background = dataset.has_background and changes.get("background_entropy") is None
    if not has_background:
        fields["background_threshold"] = None
    fields["classes"] = class_words(fields.pop("words"), dataset, classes, has_background)
    changes = {key: value for key, value in changes.items() if value is not None}
    protocol = Protocol(name=name, **(fields | changes))
    if classes and len(classes) != len(dataset.words):
        counts = f"{len(classes)} classes, but {dataset.name} has {len(dataset.words)}"
        raise InputError(f"--words: {counts}")
    patch = config.patch_size
    if protocol.stride_trick and patch % protocol.stride_trick:
        raise InputError(
            f"--stride-trick {protocol.stride_trick}: must divide the patch size {patch}"
        )
    if protocol.window % patch:
        raise InputError(f"--window {protocol.window}: not a multiple of the patch size {patch}")
    if 0 < protocol.window < protocol.stride:
        raise InputError(f"--stride {protocol.stride}: more than --window {protocol.window}")
    if protocol.scoring == "regions" and (protocol.logit_scale or protocol.area_threshold):
        raise InputError(f"--logit-scale, --area-threshold: --protocol {name} has none")
    if protocol.area_threshold and not dataset.has_background:
        raise InputError(f"--area-threshold: {dataset.name} has no background")
    return protocol


# --------------------------------------------------------------------------------------------------
# From an image to a label map. The steps are those of the authors' program (GroupViT's).


def inference_size(height, width, short_side, smallest):
    """The size at which the model sees an image; its long side is at most 2048."""
    factor = min(2048 / max(height, width), short_side / min(height, width))
    return max(int(height * factor + 0.5), smallest), max(int(width * factor + 0.5), smallest)


def window_starts(length, window, stride):
    """One window every stride; the last one is moved back inside, over its neighbour."""
    count = max(length - window + stride - 1, 0) // stride + 1
    return [min(i * stride, length - window) for i in range(count)]


def max_over_synonyms(scores, classes, dim):
    """Scores of words -> of classes, along this dimension. classes: C lists of words."""
    if scores.shape[dim] == len(classes):
        return scores
    parts = scores.split([len(words) for words in classes], dim)
    return torch.cat([part.amax(dim, keepdim=True) for part in parts], dim)


def region_cosines(encoding, text):
    """Regions [B, L, E], words [Q, E] -> [B, L, Q]."""
    return F.normalize(encoding.regions.float(), dim=-1) @ text.T


def region_scores(encoding, text, scale, top_k=5):
    """Scores of regions [B, L, E] for words [Q, E] -> [B, L, Q], between 0 and 1.

    A softmax over all words times a softmax over the top_k words of the image feature: GroupViT's
    rule, which the authors inherited. The paper has the cosines alone.
    """
    logits = scale * region_cosines(encoding, text)  # [B, L, Q]
    image_logits = F.normalize(encoding.features.float(), dim=-1) @ text.T  # [B, Q]
    top = image_logits.topk(min(top_k, len(text)), dim=-1).indices
    left_out = torch.ones_like(image_logits, dtype=torch.bool).scatter(1, top, False)
    top_logits = logits.masked_fill(left_out[:, None], -torch.inf)
    return logits.softmax(dim=-1) * top_logits.softmax(dim=-1)


def add_background(scores, threshold):
    """[B, L, C] -> [B, L, 1 + C]: background is 1 in regions with no class above the threshold.

    At most the best score of the window serves as the threshold.
    """
    threshold = scores.amax(dim=(1, 2)).clamp(max=threshold)  # [B]
    background = (scores.amax(dim=2) < threshold[:, None]).float()  # [B, L]
    return torch.cat([background[..., None], scores], dim=2)


def entropy_background(cosines, scale, protocol):
    """PACL's background mask, from cosines [Q, H, W] -> [1, H, W].

    It is 1 where the entropy of the softmax over the classes, in nats, exceeds the threshold.
    """
    log_p = (scale * max_over_synonyms(cosines, protocol.classes, dim=0)).log_softmax(dim=0)
    entropy = -(log_p.exp() * log_p).sum(dim=0, keepdim=True)
    return (entropy > protocol.background_entropy).to(cosines.dtype)


def spread(maps, patch, stride):
    """Values of patches [B, C, rows, columns] -> of points at equal distances that fill the image.

    Patches that touch do so already. With the stride trick they overlap: the outermost have their
    centers half a patch inside, and the margin repeats them.
    """
    if stride < patch:
        rows, columns = maps.shape[-2:]
        maps = F.interpolate(maps, (stride * rows, stride * columns), mode="bilinear")
        margin = (patch - stride) // 2
        maps = F.pad(maps, 2 * (margin, patch - stride - margin), mode="replicate")
    return maps


def upsample(maps, size, patch, stride):
    """Values of patches [B, C, rows, columns] -> of pixels [B, C, *size]."""
    return F.interpolate(spread(maps, patch, stride), size, mode="bilinear")


def pixel_regions(soft, size, grid, patch, stride):
    """The region of each pixel, from the assignment of patches [B, N, L] -> [B, *size]."""
    maps = soft.float().transpose(1, 2).unflatten(2, grid)  # [B, N, L] -> [B, L, H/P, W/P]
    return upsample(maps, size, patch, stride).argmax(dim=1)


def window_scores(encoding, text, scale, protocol):
    """Scores of each window's regions -> [B, L, channels].

    Channels are classes, with background where it has a threshold; by cosines, words; with
    background by entropy, which is found on pixels, the classes and the words.
    """
    if protocol.scoring == "cosines":
        return region_cosines(encoding, text)
    scores = region_scores(encoding, text, scale, protocol.top_k)
    scores = max_over_synonyms(scores, protocol.classes, dim=2)
    if protocol.background_entropy is not None:
        return torch.cat([scores, region_cosines(encoding, text)], dim=2)
    if protocol.background_threshold is not None:
        return add_background(scores, protocol.background_threshold)
    return scores


def class_scores(maps, scale, protocol):
    """The channels of window_scores on pixels [channels, H, W] -> scores of classes [C, H, W]."""
    scores = cosines = maps
    if protocol.scoring == "cosines":  # probabilities, as in SCLIP
        scores = max_over_synonyms((scale * cosines).softmax(dim=0), protocol.classes, dim=0)
    elif protocol.background_entropy is not None:
        scores, cosines = maps.tensor_split([len(protocol.classes)])
    if protocol.background_entropy is not None:
        scores = torch.cat([entropy_background(cosines, scale, protocol), scores])
    return scores


def choose_classes(scores, protocol):
    """Scores of classes [C, H, W] -> labels uint8 [H, W]."""
    if protocol.scoring == "regions":
        # The softmax only changes ties, as in the authors' program.
        return scores.softmax(dim=0).max(dim=0).indices.byte()
    best, label = scores.max(dim=0)
    if protocol.background_threshold is not None:
        label[best < protocol.background_threshold] = 0
    return label.byte()


def drop_small_classes(parts, area_threshold):
    """Scores [C, rows, W] of all parts of an image, without classes of too small an area."""
    num_classes = len(parts[0])
    area = sum(torch.bincount(x.argmax(dim=0).flatten(), minlength=num_classes) for x in parts)
    keep = area > area_threshold * area[1:].sum()
    keep[0] = True  # background
    return [scores * keep[:, None, None] for scores in parts]


def upsample_rows(maps, size, first, last):
    """Rows first to last of F.interpolate(maps, size, mode="bilinear"): [B, C, last - first, W].

    Up to rounding: this is the way in which most of torch's CPU kernels round.
    """
    height, width = size
    if last - first == height:
        return F.interpolate(maps, size, mode="bilinear")
    scale = torch.tensor(maps.shape[2] / height, dtype=torch.float32).double()
    y = (scale * (torch.arange(first, last) + 0.5) - 0.5).float().clamp(min=0)
    above = y.long()
    below = (above + 1).clamp(max=maps.shape[2] - 1)
    weight = (y - above)[:, None].to(maps.device)  # of the row below
    start = above[0].item()
    maps = maps[:, :, start : below[-1] + 1]
    maps = F.interpolate(maps, (maps.shape[2], width), mode="bilinear")
    above = maps.index_select(2, (above - start).to(maps.device))
    below = maps.index_select(2, (below - start).to(maps.device))
    return below.mul_(weight).addcmul_(above, 1 - weight)


PAMR_MARGIN = 11 * 16  # pixels that can change a pixel: ten iterations, and the deviation


def pamr(scores, image, iterations=10, dilations=(8, 16)):
    """Pixel-adaptive refinement (Araslanov and Roth, CVPR 2020): scores [C, H, W], image [3, H, W].

    In each iteration a pixel takes the mean of its neighbours' scores, in eight directions at each
    of these distances. The weights are a softmax over the differences of their colours, in tenths
    of the standard deviation in the neighbourhood.
    """
    steps = [(d * y, d * x) for d in dilations for y in (-1, 0, 1) for x in (-1, 0, 1)]
    margin = max(dilations)
    height, width = image.shape[-2:]

    def neighbours(x):  # one shifted copy of x [channels, H, W] for each step
        x = F.pad(x[None], [margin] * 4, mode="replicate")[0]
        for dy, dx in steps:
            yield x[:, margin + dy : margin + dy + height, margin + dx : margin + dx + width]

    around = torch.stack(list(neighbours(image)))  # [steps, 3, H, W], with the pixel itself
    deviation = around.std(dim=0)
    affinity = -((around - image).abs() / (0.1 * deviation + 1e-8)).mean(dim=1)  # [steps, H, W]
    itself = torch.tensor([step == (0, 0) for step in steps], device=image.device)
    affinity = affinity.masked_fill(itself[:, None, None], -torch.inf).softmax(dim=0)
    for _ in range(iterations):
        scores = sum(weight * shifted for weight, shifted in zip(affinity, neighbours(scores)))
    return scores


STRIP_NUMBERS = 2**24  # scores of pixels that are computed at a time: 64 MiB


class Segmentation(NamedTuple):
    label: np.ndarray  # uint8 [H, W], at the image's own size
    regions: np.ndarray | None  # [h, w]; None where patches are the regions
    seen: tuple  # h, w: the inference resolution
    maps: torch.Tensor  # [channels, h, w], from which class_scores finds the scores of classes
    features: torch.Tensor  # [windows, E], image features


class Segmenter:
    """A model with the features of words [Q, E] and a protocol, ready to label images."""

    def __init__(self, model, text, protocol, batch_size=16, bf16=False):
        self.model = model
        self.text = text
        self.protocol = protocol
        self.batch_size = batch_size  # windows that are encoded together
        self.bf16 = bf16
        self.scale = protocol.logit_scale
        if self.scale is None:
            self.scale = model.clip.logit_scale.exp().clamp(max=100)
        self.patch = model.visual.patch_size
        self.stride = protocol.stride_trick or self.patch

    def encode(self, crops):
        """[n, 3, h, w], in mini-batches -> ImageEncoding of all."""
        self.model.visual.stride = self.stride
        with torch.autocast(crops.device.type, torch.bfloat16, enabled=self.bf16):
            parts = [self.model.encode_image(batch) for batch in crops.split(self.batch_size)]
        fields = [None if field[0] is None else torch.cat(field) for field in zip(*parts)]
        return type(parts[0])(*fields)

    @torch.inference_mode()
    def __call__(self, images):
        """(sample, resized image uint8 [h, w, 3]) ... -> (sample, Segmentation) ...

        Windows of several images share a batch.
        """
        waiting = []
        crops = []
        window = self.protocol.window
        for sample, resized in images:
            image = torch.tensor(resized, device=self.text.device).permute(2, 0, 1)
            image = normalise(image)  # [3, h, w]
            size = (window, window) if window else image.shape[1:]
            sides = zip(image.shape[1:], size)
            starts = [window_starts(*lengths, self.protocol.stride) for lengths in sides]
            starts = list(itertools.product(*starts))
            h, w = (side // self.patch * self.patch for side in size)  # whole patches only
            crops += [image[:, y : y + h, x : x + w] for y, x in starts]
            waiting.append((sample, image, starts))
            if len(crops) >= self.batch_size or not window:
                yield from self.finish(waiting, crops, size)
                waiting = []
                crops = []
        if waiting:
            yield from self.finish(waiting, crops, size)

    def finish(self, waiting, crops, size):
        """(sample, image [3, h, w], starts of its windows) ..., and the windows of all of them."""
        crops = torch.stack(crops)
        encoding = self.encode(crops)
        grid = self.model.visual.grid(*crops.shape[-2:])
        scores = window_scores(encoding, self.text, self.scale, self.protocol)  # [n, L, channels]
        how = self.patch, self.stride
        by_patch = encoding.soft is None  # the regions are patches: interpolate between them
        if not by_patch:
            regions = pixel_regions(encoding.soft, size, grid, *how)  # [n, *size]
        first = 0
        for sample, image, starts in waiting:
            seen = tuple(image.shape[1:])
            maps = scores.new_zeros(scores.shape[2], *seen)
            count = scores.new_zeros(seen)
            region_map = torch.zeros_like(count, dtype=torch.int)
            for i, (y, x) in enumerate(starts, first):
                place = (..., slice(y, y + size[0]), slice(x, x + size[1]))
                if by_patch:
                    patches = scores[i].T.unflatten(1, grid)[None]  # [1, channels, rows, columns]
                    maps[place] += upsample(patches, size, *how)[0]
                else:
                    maps[place] += scores[i][regions[i]].permute(2, 0, 1)  # [channels, h, w]
                    region_map[place] = regions[i] + (i - first) * scores.shape[1]
                count[place] += 1
            maps = maps / count
            if by_patch and not self.protocol.window:
                # As in NACLIP, patches are upsampled to the image's own size in one step.
                maps = spread(patches, *how)[0]
            features = encoding.features[first : first + len(starts)]
            first += len(starts)
            label = self.label(maps, sample.image, image).cpu().numpy()
            region_map = None if by_patch else region_map.cpu().numpy()
            yield sample, Segmentation(label, region_map, seen, maps, features)

    def label(self, maps, original, image):
        """Maps [channels, h, w] -> labels uint8 [H, W] at the original size.

        original: uint8 [H, W, 3]. image: [3, h, w], as the model saw it.
        """
        parts = self.scores_by_rows(maps, original, image)
        if self.protocol.area_threshold is not None:
            parts = drop_small_classes(list(parts), self.protocol.area_threshold)
        return torch.cat([choose_classes(scores, self.protocol) for scores in parts])

    def scores_by_rows(self, maps, original, image):
        """Yields the scores of classes [C, rows, W] at the original size, a few rows at a time.

        So the memory does not depend on the image's own size.
        """
        size = height, width = original.shape[:2]
        margin = PAMR_MARGIN if self.protocol.refine else 0
        rows = max(1, STRIP_NUMBERS // (len(maps) * width))
        for first in range(0, height, rows):
            last = min(first + rows, height)
            top = max(first - margin, 0)
            bottom = min(last + margin, height)
            scores = upsample_rows(maps[None], size, top, bottom)[0]
            if self.protocol.refine:
                if self.protocol.scoring == "cosines":  # SCLIP and NACLIP enlarge the reduced image
                    guide = upsample_rows(image[None], size, top, bottom)[0]
                else:
                    guide = torch.tensor(original[top:bottom], device=image.device)
                    guide = guide.permute(2, 0, 1).float()
                scores = pamr(scores, guide)
            yield class_scores(scores[:, first - top : last - top], self.scale, self.protocol)


def load_image(dataset, protocol, patch, index):
    """In a worker process: -> sample, its image as the model sees it uint8 [h, w, 3]."""
    sample = dataset[index]
    if protocol.name == "classify":
        return sample, center_crop(sample.image, protocol.window)
    smallest = protocol.window or patch
    size = inference_size(*sample.image.shape[:2], protocol.short_side, smallest)
    return sample, resize_bilinear(sample.image, *size)


def try_to_load(*arguments):
    """load_image, or what is wrong with the image."""
    try:
        return load_image(*arguments)
    except InputError as error:
        return str(error)


def load_images(segmenter, dataset, indices, workers, unreadable=None):
    """Yields (sample, resized image) of this process's share of these indices, in order.

    Those that cannot be read are appended to the list `unreadable`, and the first three named;
    without a list, one raises InputError.
    """
    rank, world = rank_and_world()
    indices = indices[rank::world]
    load = functools.partial(try_to_load, dataset, segmenter.protocol, segmenter.patch)
    images = parallel_map(load, indices, workers)
    if rank == 0:
        images = progress(images, len(indices), "images")
    for image in images:
        if isinstance(image, str) and unreadable is None:
            raise InputError(image)
        if isinstance(image, str):
            unreadable.append(image)
            if len(unreadable) <= 3:
                print(image, file=sys.stderr)
        else:
            yield image


# --------------------------------------------------------------------------------------------------
# Metrics


class Confusion:
    """Pixel counts over a data set: per class correct, predicted, labelled, as mmsegmentation."""

    def __init__(self, num_classes):
        self.counts = np.zeros((3, num_classes), np.int64)

    def add(self, prediction, label):
        """One image: uint8 arrays of the same shape. Pixels whose label is 255 do not count."""
        scored = label != 255
        prediction = prediction[scored]
        label = label[scored]
        n = self.counts.shape[1]
        correct = prediction[prediction == label]
        for counts, values in zip(self.counts, (correct, prediction, label[label < n])):
            counts += np.bincount(values, minlength=n)

    def iou(self):
        """[C] of fractions; NaN for a class that is neither predicted nor labelled."""
        correct, predicted, labelled = self.counts
        union = predicted + labelled - correct
        return np.divide(correct, union, out=np.full(len(union), np.nan), where=union > 0)

    def accuracy(self):
        """[C] of fractions; NaN for a class that is not labelled."""
        correct, _, labelled = self.counts
        return np.divide(correct, labelled, out=np.full(len(correct), np.nan), where=labelled > 0)

    def summary(self):
        """-> mIoU, mAcc and aAcc, as fractions."""
        correct, _, labelled = self.counts.sum(axis=1)
        overall = float(correct / max(labelled, 1))
        return {"mIoU": mean(self.iou()), "mAcc": mean(self.accuracy()), "aAcc": overall}


def mean(values):
    """The mean of the values that are not NaN; 0 if there is none."""
    values = np.asarray(values, float)
    return 0.0 if np.isnan(values).all() else float(np.nanmean(values))


def sum_over_processes(device, *counts):
    """Arrays of integers, each summed over all processes."""
    for count in counts:
        total = torch.as_tensor(np.asarray(count), device=device)
        if dist.is_initialized():
            dist.all_reduce(total)
        yield total.cpu().numpy()


def evaluate(segmenter, dataset, output=None, limit=None, workers=2):
    """Labels a data set, each process its share -> on the first process its metrics, else {}.

    output: a folder for predictions/NAME.png and examples.png, or None. limit: only the first
    images. "images" counts those with a label map, without which there is no mIoU; "unreadable"
    those that were left out.
    """
    names = class_names(dataset, segmenter.protocol)
    colours = palette(len(names))
    confusion = Confusion(len(names))
    labelled = 0
    unreadable = []
    examples = []
    images = load_images(segmenter, dataset, range(len(dataset))[:limit], workers, unreadable)
    for sample, result in segmenter(images):
        if output:
            save_label(output / "predictions" / f"{sample.name}.png", result.label, colours)
        if sample.label is not None:
            confusion.add(result.label, sample.label)
            labelled += 1
        if len(examples) < 6:
            examples.append((sample.image, sample.label, result.regions, result.label))
    counts = confusion.counts, labelled, len(unreadable)
    confusion.counts, images, left_out = sum_over_processes(segmenter.text.device, *counts)
    rank, _ = rank_and_world()
    if rank:
        return {}
    if output and examples:
        columns = {"image": "image", "ground truth": "label"}
        columns |= {"regions": "regions", "result": "label"}
        draw_examples(examples, columns, names, colours, output / "examples.png")
    metrics = {"images": int(images), "unreadable": int(left_out)}
    if images:
        iou = [None if np.isnan(x) else float(x) for x in confusion.iou()]
        metrics |= confusion.summary() | {"IoU": dict(zip(names, iou))}
    return metrics


def class_names(dataset, protocol):
    thresholds = protocol.background_threshold, protocol.background_entropy
    return ["background"] * (thresholds != (None, None)) + dataset.words


# Zero-shot classification


def center_crop(image, size):
    """uint8 [H, W, 3] -> [size, size, 3], as CLIP's preprocessing (torchvision's on Pillow)."""
    image = Image.fromarray(image)
    short_side = min(image.size)
    image = image.resize([size * side // short_side for side in image.size], Image.BICUBIC)
    left, top = (round((side - size) / 2) for side in image.size)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def image_scores(model, encoding, text):
    """Scores of whole images [B, Q]: PACL's compatibility, or the cosine of the image feature."""
    if isinstance(model, PACL):
        return compatibility(encoding.regions.float(), text, model.config.patch_scale)
    return F.normalize(encoding.features.float(), dim=-1) @ text.T


@torch.inference_mode()
def classify(segmenter, dataset, limit=None, workers=2):
    """Zero-shot classification of a ClassFolder -> on the first process its metrics, else {}."""
    num_classes = len(dataset.words)
    counts = np.zeros((3, num_classes), np.int64)  # images of a class, top-1 correct, top-5 correct
    unreadable = []
    images = load_images(segmenter, dataset, range(len(dataset))[:limit], workers, unreadable)
    while batch := list(itertools.islice(images, segmenter.batch_size)):
        samples, crops = zip(*batch)
        image = torch.as_tensor(np.stack(crops), device=segmenter.text.device)
        encoding = segmenter.encode(normalise(image.permute(0, 3, 1, 2)))
        scores = image_scores(segmenter.model, encoding, segmenter.text)
        scores = max_over_synonyms(scores, segmenter.protocol.classes, dim=1)
        top = scores.topk(min(5, num_classes)).indices.cpu().numpy()  # [B, 5]
        for sample, best in zip(samples, top):
            counts[:, sample.label] += [1, best[0] == sample.label, sample.label in best]
    counts = counts, len(unreadable)
    counts, left_out = sum_over_processes(segmenter.text.device, *counts)
    total, top_1, top_5 = counts.sum(axis=1).tolist()
    rank, _ = rank_and_world()
    if rank or not total:
        return {}
    accuracy = [correct / number if number else None for number, correct, _ in counts.T.tolist()]
    metrics = {"images": total, "unreadable": int(left_out)}
    metrics |= {"top-1": top_1 / total, "top-5": top_5 / total}
    return metrics | {"accuracy": dict(zip(dataset.folders, accuracy))}


# --------------------------------------------------------------------------------------------------
# Drawing

# Easy to tell apart, on light and on dark.
COLOURS = """
e6194b 3cb44b ffe119 4363d8 f58231 911eb4 42d4f4 f032e6 bfef45 fabed4 469990 dcbeff 9a6324 800000
aaffc3 808000 ffd8b1 000075 808080""".split()


def palette(n):
    """n colours -> uint8 [n, 3]; after the first ones, hues a golden ratio of the circle apart."""
    colours = [f"#{colour}" for colour in COLOURS[:n]]
    for i in range(n - len(colours)):
        saturation = (85, 55)[i % 2]
        value = (95, 75, 55)[i % 3]
        colours.append(f"hsv({i * 222.5 % 360}, {saturation}%, {value}%)")
    return np.array([ImageColor.getrgb(colour) for colour in colours], np.uint8)


# Fonts of Linux, macOS and Windows, for words that Pillow's own font cannot write.
FONTS = ("DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "msyh.ttc", "arial.ttf")


def font_for(words, size):
    """A font with every letter of the words; Pillow's own, and a warning, if there is none."""
    letters = {letter for word in words for letter in word if not letter.isspace()}
    fonts = [ImageFont.load_default(size)]
    for name in FONTS:
        with contextlib.suppress(OSError):  # this system does not have it
            fonts.append(ImageFont.truetype(name, size))
    for font in fonts:
        no_letter = bytes(font.getmask("\uffff"))
        if all(bytes(font.getmask(letter)) != no_letter for letter in letters):
            return font
    print("some words are drawn as boxes: no font with all of their letters", file=sys.stderr)
    return fonts[0]


def with_legend(image, entries):
    """The image with a legend below it: (colour, word) ..., in columns."""
    words = [word for _, word in entries]
    font = font_for(words, max(12, image.width // 50))
    side = font.size
    column = int(3 * side + max(font.getlength(word) for word in words))
    columns = max(1, image.width // column)
    rows = math.ceil(len(entries) / columns)
    height = image.height + (3 * rows + 1) * side // 2
    sheet = Image.new("RGB", (max(image.width, column), height), "white")
    sheet.paste(image)
    draw = ImageDraw.Draw(sheet)
    for n, (colour, word) in enumerate(entries):
        x = side // 2 + n % columns * column
        y = image.height + side // 2 + n // columns * side * 3 // 2
        draw.rectangle((x, y, x + side, y + side), tuple(map(int, colour)), "black")
        draw.text((x + 1.4 * side, y + side / 2), word, "black", font, anchor="lm")
    return sheet


def paint(numbers, colours, size):
    """An integer array [h, w] -> a PIL image of this size (W, H), a colour for each number."""
    picture = Image.fromarray(np.take(colours, numbers, axis=0, mode="wrap"))
    return picture.resize(size, Image.NEAREST)


def overlay(picture, label, colours):
    """The colours of the labels over the grey image, with white outlines -> a PIL image."""
    from skimage.segmentation import find_boundaries  # here, since it takes a while to load

    grey = picture.convert("L").convert("RGB")
    mixed = np.array(Image.blend(grey, paint(label, colours, picture.size), 0.5))
    label = Image.fromarray(label).resize(picture.size, Image.NEAREST)
    smooth = label.filter(ImageFilter.ModeFilter(5))  # single pixels have no outline
    mixed[find_boundaries(np.asarray(smooth), mode="inner")] = 255
    return Image.fromarray(mixed)


def heat(picture, scores, word):
    """Scores [h, w] over the grey image: from dark (lowest) through red to yellow, with legend."""
    low, high = scores.min(), scores.max()
    shares = (255 * (scores - low) / max(high - low, 1e-9)).astype(np.uint8)
    shares = Image.fromarray(shares).resize(picture.size, Image.BILINEAR)
    dark, bright = (50, 50, 50), (255, 230, 0)
    colour = ImageOps.colorize(shares, dark, bright, mid="red")
    mixed = Image.blend(picture.convert("L").convert("RGB"), colour, 0.6)
    return with_legend(mixed, [(dark, f"{word}: {low:.3g}"), (bright, f"{high:.3g}")])


def draw_examples(examples, columns, words, colours, path, width=200):
    """One row per example, one column per title.

    columns: {title: what it shows}, an "image" uint8 [H, W, 3], a "label" map uint8 [h, w] or
    "regions" int [h, w]; the first is an image. An example has one of each, or None.
    """
    colours = np.vstack([colours, np.full((256 - len(colours), 3), 255, np.uint8)])  # 255 is white
    colours_of = {"label": colours, "regions": palette(64)}
    shown = []  # title, what it shows, its value in each example; without empty columns
    for (title, what), values in zip(columns.items(), zip(*examples)):
        if any(value is not None for value in values):
            shown.append((title, what, values))
    rows = []
    for n, example in enumerate(examples):
        height = round(width * example[0].shape[0] / example[0].shape[1])
        size = width, min(max(1, height), 2 * width)
        tiles = []
        for _, what, values in shown:
            if values[n] is None:
                tile = Image.new("RGB", size, "white")
            elif what == "image":
                tile = Image.fromarray(values[n]).resize(size)
            else:
                tile = paint(values[n], colours_of[what], size)
            tiles.append(ImageOps.expand(tile, 4, "white"))
        rows.append(np.hstack(tiles))
    sheet = ImageOps.expand(Image.fromarray(np.vstack(rows)), (0, 24, 0, 0), "white")
    draw = ImageDraw.Draw(sheet)
    for n, (title, _, _) in enumerate(shown):
        x = 4 + n * (width + 8)
        draw.text((x, 5), title, "black", ImageFont.load_default(14))
    label_maps = [x for _, what, values in shown if what == "label" for x in values]
    used = set().union(*(np.unique(x) for x in label_maps if x is not None))
    entries = [(colours[c], words[c]) for c in sorted(used - {255})]
    if 255 in used:
        entries.append((colours[255], "not scored"))
    with_legend(sheet, entries).save(path)


def save_label(path, label, colours):
    """A palette PNG, written completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(label)
    image.putpalette(colours.ravel().tolist())
    image.save(path.with_suffix(".part"), "PNG")
    os.replace(path.with_suffix(".part"), path)


def show_image(segmenter, dataset, output, with_heat):
    """Writes overlay, labels and regions of a data set's one image; prints the classes' shares."""
    images = [load_image(dataset, segmenter.protocol, segmenter.patch, 0)]
    ((sample, result),) = segmenter(images)
    picture = Image.fromarray(sample.image)
    picture.thumbnail((2048, 2048))
    words = class_names(dataset, segmenter.protocol)
    colours = palette(len(words))
    share = 100 * np.bincount(result.label.ravel(), minlength=len(words)) / result.label.size
    present = [c for c in np.argsort(-share) if share[c] > 0]
    for c in present:
        print(f"{words[c]:>20}  {share[c]:5.1f} %")
    entries = [(colours[c], f"{words[c]} {share[c]:.1f} %") for c in present]
    files = {"overlay": with_legend(overlay(picture, result.label, colours), entries)}
    if result.regions is not None:
        files["regions"] = paint(result.regions, palette(64), picture.size)
    if with_heat:
        scores = class_scores(result.maps, segmenter.scale, segmenter.protocol)
        for c, word in enumerate(words):
            letters = "".join(letter if letter.isalnum() else "_" for letter in word)
            heat_map = heat(picture, scores[c].float().cpu().numpy(), word)
            files[f"heat_{c}_{letters[:60]}"] = heat_map
    paths = {name: output / f"{sample.name}_{name}.png" for name in ("labels", *files)}
    save_label(paths["labels"], result.label, colours)
    for name, picture in files.items():
        picture.save(paths[name])
    print(f"wrote {', '.join(map(str, paths.values()))}")


# --------------------------------------------------------------------------------------------------
# What every program does


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, and whose help keeps the lines of commands."""

    def __init__(self, description=None, **others):
        style = functools.partial(
            argparse.RawDescriptionHelpFormatter, max_help_position=26, width=100
        )
        super().__init__(
            usage="%(prog)s [flags]",
            description=description,
            epilog="[x] is the default.",
            formatter_class=style,
            allow_abbrev=False,
            **others,
        )

    def error(self, message):
        raise InputError(f"{message} (see --help)")


def number(kind, least, most=1e9):
    """An argparse type: an int or float between these limits."""

    def parse(text):
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not between {least:g} and {most:g}")
        return value

    parse.__name__ = "number"  # argparse says "invalid number value"
    return parse


def pick_device(name):
    """ "cpu", "cuda:1", ... -> torch.device; None is the GPU if there is one. Raises InputError."""
    device = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: not available here ({first_line(error)})") from None


def start_processes(device_name):
    """Joins the processes that torchrun started, if any -> the device of this one."""
    torch.backends.cudnn.allow_tf32 = False  # fp32 is fp32 on GPUs, too
    device = pick_device(device_name)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if device.type == "cuda":
            device = pick_device(f"cuda:{os.environ['LOCAL_RANK']}")
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def run_program(main, if_interrupted):
    """Runs main() and ends the process. What the user gave wrong is one line, a bug a traceback."""
    complaint = None
    status = 1
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
        status = 0
    except SystemExit as ended:  # --help, or a run that a signal has stopped
        status = ended.code
    except KeyboardInterrupt:
        complaint = if_interrupted
        status = 130
    except Exception as error:
        # The message of a worker's exception is its whole traceback; the last line is the error.
        lines = str(error).strip().splitlines() or [type(error).__name__]
        lost = isinstance(error, (EOFError, ConnectionError))
        if lost or lines[0].startswith("DataLoader worker"):
            complaint = "a worker process was killed; if memory ran out, give fewer --workers"
        elif isinstance(error, (InputError, OSError)):
            complaint = lines[-1].removeprefix("model.InputError: ")
        else:
            complaint = traceback.format_exc().rstrip()
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback while Python ends
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # or torch complains about the workers' end
        for worker in multiprocessing.active_children():
            worker.kill()
    if complaint and not complaint.startswith("Traceback"):
        complaint = f"{Path(sys.argv[0]).name}: {complaint}"
    if complaint:
        print(complaint, file=sys.stderr)
    if not dist.is_initialized():
        sys.exit(status)
    # Several processes skip Python's cleanup: gloo's threads can deadlock there on the GIL (torch
    # 2.4 to 2.13).
    if not complaint:
        dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


# --------------------------------------------------------------------------------------------------
# The program

SCENES = {"synthetic": "val", "synthetic-unseen": "unseen"}  # their split
DATASETS = [*SCENES, *sorted(BENCHMARKS)]
RUNS = {  # of train.py
    "segclip": "runs/synthetic",
    "clip": "runs/clip",
    "pacl": "runs/pacl",
    "groupvit": "runs/groupvit",
}
OWN_RUNS = {name: f"runs/own-{name}" for name in RUNS} | {"segclip": "runs/own"}  # of own pairs
DEFAULT_CHECKPOINT = f"{RUNS['segclip']}/checkpoint.pt"
# Fields of Protocol that are flags, too.
PROTOCOL_FLAGS = (
    "templates",
    "short_side",
    "window",
    "stride",
    "stride_trick",
    "refine",
    "top_k",
    "logit_scale",
    "area_threshold",
    "background_entropy",
)


def add_arguments(parser):
    # fmt: off
    add = parser.add_argument_group("what to label").add_argument
    add("--dataset", choices=DATASETS, default="synthetic", metavar="NAME",
        help="a data set with label maps: %(choices)s [%(default)s]")
    add("--data-root", metavar="DIR", help="its folder, for example VOCdevkit/VOC2012")
    add("--image", metavar="FILE", help="one image: writes an overlay, the labels and the regions")
    add("--images", metavar="DIR", help="a folder of your own images")
    add("--labels-dir", metavar="DIR",
        help="label maps of --images, NAME.png: class numbers from 0 in one byte, 255 not scored")
    add("--classify", metavar="DIR", help="classify whole images: one folder per class")
    add("--ignore", type=number(int, 0, 255), nargs="+", default=(), metavar="N",
        help="values of --labels-dir that are not scored, as 255 is never")
    add("--words", metavar="W",
        help='the classes: "cat, grass, sky", or a file with one class per line and synonyms '
        "between commas; needed by --image and --images")
    add("--limit", type=number(int, 1), metavar="N", help="only the first N images [all]")
    add = parser.add_argument_group("the model").add_argument
    add("--checkpoint", "--model", metavar="FILE",
        help="of train.py, the authors' segclip.bin, a GroupViT or a CLIP: a file, or ViT-B/16 "
        f"[{DEFAULT_CHECKPOINT}; for --words that it does not know: ViT-B/16]")
    add("--readout", choices=READOUTS,
        help="how a CLIP's last block makes patch tokens; see read_out in model.py [clip]")
    add("--dino", metavar="FILE",
        help="DINO's ViT-B/8 or ViT-B/16, for --readout proxyclip, whose patches it has")
    add("--activation", choices=ACTIVATIONS,
        help="of a CLIP: gelu for LAION-2B's and DataComp's weights [quick_gelu, OpenAI's]")
    add("--vocabulary", metavar="FILE", help="OpenAI's BPE vocabulary [cache, or download]")
    add("--device", help="cpu, cuda, cuda:1, ... [a GPU if there is one]")
    add("--precision", choices=("bf16", "fp32"), default="fp32", help="[%(default)s]")
    add("--batch-size", type=number(int, 1), default=16, metavar="B",
        help="windows that are encoded together [%(default)s]")
    add("--workers", type=number(int, 0), default=2, metavar="N",
        help="processes that read images; 0: only this one [%(default)s]")
    add = parser.add_argument_group("the protocol, and changes to it").add_argument
    add("--protocol", choices=[name for name in PROTOCOLS if name != "classify"], default="segclip",
        help="the settings of a paper's tables, by data set; dense is sclip [%(default)s]")
    add("--templates", type=int, choices=TEMPLATES, help="sentences around a word")
    add("--short-side", type=number(int, 1), metavar="PIXELS", help="inference resolution")
    add("--window", type=number(int, 0), metavar="PIXELS",
        help="side of a window; 0: the whole image at once")
    add("--stride", type=number(int, 1), metavar="PIXELS", help="from one window to the next")
    add("--stride-trick", type=number(int, 1), metavar="PIXELS",
        help="from one patch to the next: less than the patch size for finer maps [patch size]")
    add("--refine", choices=("pamr",), help="align borders with color edges by PAMR [no]")
    add("--top-k", type=number(int, 1), metavar="K", help="by regions: most classes per window [5]")
    add("--logit-scale", type=number(float, 0), metavar="S",
        help="inverse temperature of the softmax over words; by regions it is the model's")
    add("--area-threshold", type=number(float, 0, 1), metavar="SHARE",
        help="leave out classes with less of the foreground; by cosines [sclip on VOC: 0.1]")
    add("--background", type=number(float, 0, 1), nargs="?", const=-1.0, metavar="T",
        help="own images: add a background class, where no word scores T; data sets: change T")
    add("--background-entropy", type=number(float, 0), metavar="T",
        help="instead: where the entropy of the softmax over the words exceeds T; PACL: 1.5 on VOC")
    add = parser.add_argument_group("the result").add_argument
    add("--output", metavar="DIR", help="[scenes: the checkpoint's folder; else runs/NAME]")
    add("--heat", action="store_true",
        help="with --image: a heat map of each word, from its lowest score to its highest")
    # fmt: on


def parse_args(argv=None, parser=None):
    """-> the flags. Raises InputError for flags that do not go together."""
    parser = parser or Parser(__doc__)
    add_arguments(parser)
    args = parser.parse_args(argv)
    own = [flag for flag in ("image", "images", "classify") if getattr(args, flag)]
    if len(own) > 1:
        parser.error(f"--{own[0]} or --{own[1]}, not both")
    if own and args.data_root:
        parser.error(f"--data-root is for --dataset, not for --{own[0]}")
    if args.dataset in BENCHMARKS and not own and not args.data_root:
        parser.error(f"--dataset {args.dataset} needs --data-root, the folder that holds it")
    if args.dataset in SCENES and args.data_root:
        parser.error("--data-root needs --dataset; --images is for images of your own")
    if (args.image or args.images) and not args.words:
        parser.error('--image and --images need --words "cat, grass, sky" or --words FILE')
    if args.image and os.path.isdir(args.image):
        parser.error("--image is one file; a folder is --images")
    if args.heat and not args.image or args.labels_dir and not args.images:
        parser.error("--heat is for --image, --labels-dir for --images")
    if args.ignore and not args.labels_dir:
        parser.error("--ignore is for --labels-dir")
    if args.background is not None and args.background_entropy is not None:
        parser.error("--background-entropy: it is this or --background")
    if args.classify and args.protocol != "segclip":
        parser.error("--classify has no --protocol")
    for name in PROTOCOL_FLAGS:
        value = getattr(args, name)
        if args.classify and value is not None and name not in ("templates", "stride_trick"):
            parser.error(f"--classify has no --{name.replace('_', '-')}")
    return args


def open_dataset(name, root, image_size):
    """One of DATASETS: scenes of this size, or a benchmark in the folder root."""
    if name in SCENES:
        return SyntheticScenes(image_size, split=SCENES[name])
    return SegmentationFolder(name, root)


def open_segmenter(
    model,
    tokenizer,
    dataset,
    protocol="segclip",
    classes=None,
    batch_size=16,
    bf16=False,
    **changes,
):
    """A model with the words of a data set, ready to label its images -> Segmenter.

    classes: words in place of the data set's. changes: see choose_protocol. Raises InputError.
    """
    protocol = choose_protocol(protocol, dataset, model.config, classes, **changes)
    text = class_features(model.eval(), tokenizer, protocol)
    return Segmenter(model, text, protocol, batch_size, bf16)


def unknown_words(tokenizer, classes):
    """The words that a vocabulary learned from captions splits into several tokens."""
    if tokenizer.vocab_size == Config.vocab_size:
        return []
    words = [word for synonyms in classes for word in synonyms]
    return [w for w in words if any(len(tokenizer.pieces(part)) > 1 for part in tokenizer.words(w))]


def choose_model(checkpoint, readout, classes):
    """-> the checkpoint and the read-out to use. Raises InputError.

    Without a checkpoint, the model of train.py; or, if there are classes with words that it does
    not know, a CLIP that is in the cache.
    """
    if checkpoint:
        return checkpoint, readout
    reason = f"{DEFAULT_CHECKPOINT} does not exist"
    if os.path.exists(DEFAULT_CHECKPOINT):
        unknown = unknown_words(load_tokenizer(DEFAULT_CHECKPOINT), classes or [])
        if not unknown:
            return DEFAULT_CHECKPOINT, readout
        reason = f"{DEFAULT_CHECKPOINT} does not know {', '.join(unknown)}"
    if not classes:
        raise InputError(f"{reason}; run `python train.py`, or give --checkpoint FILE")
    flags = "--checkpoint ViT-B/16 --readout naclip"
    if not find("ViT-B/16"):
        raise InputError(f"{reason}; add {flags}, which downloads 600 MB once")
    print(f"{reason}: using {flags}", file=sys.stderr)
    return "ViT-B/16", readout or "naclip"


def report(metrics):
    """Prints what metrics.json has."""
    kind = "IoU" if "IoU" in metrics else "accuracy"
    for name, value in metrics[kind].items():
        percent = "    -" if value is None else f"{100 * value:5.1f} %"
        print(f"{name:>20}  {kind} {percent}")
    totals = [name for name in ("mIoU", "mAcc", "aAcc", "top-1", "top-5") if name in metrics]
    line = "  ".join(f"{name} {100 * metrics[name]:.2f} %" for name in totals)
    print(f"{line}  over {metrics['images']} images  protocol {metrics['protocol']['name']}")


def open_model(name_or_path, readout=None, activation=None, dino=None, vocabulary=None):
    """-> model, tokenizer. Raises InputError."""
    model = load_model(name_or_path, readout or "clip", activation, dino)
    tokenizer = load_tokenizer(name_or_path, vocabulary)
    if model.config.vocab_size != tokenizer.vocab_size:
        sizes = f"{model.config.vocab_size} tokens, but the vocabulary has {tokenizer.vocab_size}"
        raise InputError(f"{name_or_path}: made for {sizes}")
    return model, tokenizer


def describe_resolution(protocol, config):
    """One line: how large the model sees images, and how large it saw crops in its training."""
    windows = f"windows of {protocol.window}" if protocol.window else "no windows"
    sides = f"short side {protocol.short_side}, crops of {config.image_size} in training"
    return f"inference resolution: {sides}; {windows}"


def output_folder(source, checkpoint):
    """Where results go without --output: of scenes, to the checkpoint's own folder -> Path."""
    home = Path(checkpoint).parent
    if checkpoint in MODELS:
        home = Path("runs", checkpoint.replace("/", "-"))
    homes = {"synthetic": home, "synthetic-unseen": home / "unseen"}
    return homes.get(source, Path("runs", source))


def main(argv=None):
    args = parse_args(argv)
    device = start_processes(args.device)
    classes = read_classes(args.words) if args.words else None
    checkpoint, readout = choose_model(args.checkpoint, args.readout, classes)
    files = args.activation, args.dino, args.vocabulary
    model, tokenizer = open_model(checkpoint, readout, *files)
    kinds = {"image": args.image, "images": args.images, "classify": args.classify}
    source = next((kind for kind, path in kinds.items() if path), args.dataset)
    output = Path(args.output or output_folder(source, checkpoint))
    has_background = args.background is not None or args.background_entropy is not None
    if args.classify:
        dataset = ClassFolder(args.classify)
    elif args.image or args.images:
        words = [synonyms[0] for synonyms in classes]
        how = args.labels_dir, words, has_background, output, args.ignore
        dataset = ImageFolder(args.image or args.images, *how)
    else:
        dataset = open_dataset(args.dataset, args.data_root, model.config.image_size)
        if has_background and not dataset.has_background:
            raise InputError(f"--background(-entropy): {args.dataset} has no background")
    changes = {name: getattr(args, name) for name in PROTOCOL_FLAGS}
    if args.background != -1:
        changes["background_threshold"] = args.background
    protocol = "classify" if args.classify else args.protocol
    how = protocol, classes, args.batch_size, args.precision == "bf16"
    segmenter = open_segmenter(model.to(device), tokenizer, dataset, *how, **changes)
    output.mkdir(parents=True, exist_ok=True)
    rank, _ = rank_and_world()
    if rank == 0 and not args.classify:
        print(describe_resolution(segmenter.protocol, model.config), file=sys.stderr)
    unknown = unknown_words(tokenizer, segmenter.protocol.classes)
    if rank == 0 and unknown and dataset.name not in DATASETS:
        print(f"rare or unknown in the captions of training: {', '.join(unknown)}", file=sys.stderr)
    if args.image:
        if rank == 0:
            show_image(segmenter, dataset, output, args.heat)
        return
    if args.classify:
        metrics = classify(segmenter, dataset, args.limit, args.workers)
    else:
        metrics = evaluate(segmenter, dataset, output, args.limit, args.workers)
    if rank:
        return
    if metrics.get("images"):
        path = fetch(checkpoint) if checkpoint in MODELS else checkpoint
        metrics["checkpoint_sha256"] = sha256_of(path)
        metrics["protocol"] = vars(segmenter.protocol)
        metrics["flags"] = {name: value for name, value in vars(args).items() if value is not None}
        (output / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
        report(metrics)
    print(f"wrote {output}", file=sys.stderr)
    if metrics.get("unreadable"):
        raise InputError(f"unreadable images were left out: {metrics['unreadable']}")


if __name__ == "__main__":
    run_program(main, "stopped")
