"""Zero-shot segmentation: score a checkpoint on a data set, or label your own images.

python evaluate.py                   the model of `python train.py`, on scenes it has never seen
python evaluate.py --dataset pascal_voc --data-root VOCdevkit/VOC2012 --checkpoint segclip.bin
python evaluate.py --images photos --words words.txt --checkpoint segclip.bin
python evaluate.py --image photo.jpg --words "cat, grass" --checkpoint ViT-B/16 --readout naclip
python evaluate.py --classify photos --checkpoint pacl.pt        whole images, one folder per class
"""

import argparse
import colorsys
import functools
import itertools
import json
import multiprocessing
import os
import signal
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from skimage.segmentation import find_boundaries

from clip_loader import MODELS, fetch, load_model, load_tokenizer, sha256_of
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

# What SCLIP's tables have in place of a class's name, and what they count as background.
PERSON = split_commas("""
person, person in shirt, person in jeans, person in dress, person in sweater, person in skirt,
person in jacket""")
SCREEN = split_commas("television monitor, tv monitor, monitor, television, screen")
BACKGROUND = split_commas("""
sky, wall, tree, wood, grass, road, sea, river, mountain, sands, desk, bed, building, cloud, lamp,
door, window, wardrobe, ceiling, shelf, curtain, stair, floor, hill, rail, fence""")
VOC_WORDS = {"boat": ["ship"], "person": PERSON, "plant": ["pottedplant"], "monitor": SCREEN}
CONTEXT_WORDS = {"airplane": ["aeroplane"], "plant": ["pottedplant"], "monitor": ["tvmonitor"]}
SYNONYMS = {
    "pascal_voc": VOC_WORDS | {"background": BACKGROUND},
    "pascal_voc20": VOC_WORDS,
    "pascal_context": CONTEXT_WORDS,
    "pascal_context59": CONTEXT_WORDS,
    "coco_object": {"background": BACKGROUND, "person": [*PERSON, "body"]},
}
# ClearCLIP's, in place of the synonyms.
PLAIN_WORDS = {
    "boat": "ship",
    "plant": "pottedplant",
    "monitor": "tvmonitor",
    "airplane": "aeroplane",
}


def class_words(kind, dataset, classes, has_background):
    """The words of each class, background among them where it has words -> list of lists.

    kind: "names", "synonyms" or "plain". classes: the user's own list of lists, or None.
    """
    words = classes or [[word] for word in dataset.words]
    if kind == "names":
        return words
    if has_background:
        words = [["background"], *words]
    if classes:
        return words
    if dataset.name in ("coco_stuff", "ade20k", "cityscapes"):
        words = [[word.replace(" ", "")] for [word] in words]
    synonyms = SYNONYMS.get(dataset.name, {})
    if kind == "synonyms":
        return [synonyms.get(word, [word]) for [word] in words]
    return [[PLAIN_WORDS.get(word, word) if word in synonyms else word] for [word] in words]


def read_classes(words):
    """ "cat, grass", or a file of one class per line, synonyms between commas -> list of lists.

    Raises InputError.
    """
    classes = [[word] for word in split_commas(words)]
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
    """-> unit vectors of the Q words, means over templates [Q, E]; the class of each word [Q]."""
    device = model.clip.logit_scale.device
    features = []
    class_of_word = []
    for c, words in enumerate(protocol.classes):
        for word in words:
            prompts = [template.format(word) for template in TEMPLATES[protocol.templates]]
            text = tokenizer(prompts, model.config.context_length).to(device)
            feature = model.encode_text(text)  # [templates, E]
            if protocol.scoring == "cosines":  # as OpenAI and SCLIP; not so GroupViT
                feature = F.normalize(feature, dim=-1)
            features.append(F.normalize(feature.mean(dim=0), dim=-1))
            class_of_word.append(c)
    return torch.stack(features), torch.tensor(class_of_word, device=device)


# --------------------------------------------------------------------------------------------------
# Protocols: the settings with which published numbers were made

SCLIP = {
    "scoring": "cosines",
    "words": "synonyms",
    "templates": 80,
    "short_side": 336,
    "window": 224,
    "stride": 112,
    "logit_scale": 40.0,
    "background_threshold": 0.1,
}
CLEARCLIP = {
    "words": "plain",
    "short_side": 448,
    "window": 448,
    "stride": 224,
    "logit_scale": 50.0,
    "background_threshold": 0.5,
}
SEGCLIP = {
    "scoring": "regions",
    "words": "names",
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
    "groupvit": {
        "": SEGCLIP
        | {"short_side": 448, "window": 448, "stride": 224, "background_threshold": 0.95},
        "pascal_context": {"background_threshold": 0.35},
    },
    # Zero-shot classification of whole images, with OpenAI's seven templates.
    "classify": {"": SEGCLIP | {"scoring": "cosines", "templates": 7, "top_k": None}},
}
PROTOCOLS["dense"] = PROTOCOLS["sclip"]


@dataclass
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
    # Background by entropy has no words and no threshold.
    has_background = dataset.has_background and changes.get("background_entropy") is None
    if not has_background:
        fields["background_threshold"] = None
    fields["classes"] = class_words(fields.pop("words"), dataset, classes, has_background)
    changes = {key: value for key, value in changes.items() if value is not None}
    protocol = Protocol(name=name, **(fields | changes))
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


def max_over_synonyms(scores, class_of_word, num_classes):
    """Scores of words [..., Q] -> of classes [..., C]."""
    if len(class_of_word) == num_classes:
        return scores
    out = scores.new_full((*scores.shape[:-1], num_classes), -torch.inf)
    return out.scatter_reduce(-1, class_of_word.expand(scores.shape), scores, "amax")


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


def entropy_background(cosines, class_of_word, scale, protocol):
    """PACL's background mask, from cosines [Q, H, W] -> [1, H, W].

    It is 1 where the entropy of the softmax over the classes, in nats, exceeds the threshold.
    """
    cosines = max_over_synonyms(cosines.movedim(0, -1), class_of_word, len(protocol.classes))
    log_p = (scale * cosines).log_softmax(dim=-1)
    entropy = -(log_p.exp() * log_p).sum(dim=-1)
    return (entropy > protocol.background_entropy)[None].to(cosines.dtype)


def upsample(maps, size, patch, stride):
    """Values of patches [B, C, rows, columns] -> of pixels [B, C, *size], each patch where it lies.

    Patches that touch fill the image. With the stride trick they overlap: the outermost have their
    centers half a patch inside, and the margin repeats them.
    """
    if stride < patch:
        rows, columns = maps.shape[-2:]
        maps = F.interpolate(maps, (stride * rows, stride * columns), mode="bilinear")
        margin = (patch - stride) // 2
        maps = F.pad(maps, 2 * (margin, patch - stride - margin), mode="replicate")
    return F.interpolate(maps, size, mode="bilinear")


def pixel_regions(encoding, size, grid, patch, stride):
    """The region of each pixel -> [B, *size]; where patches are the regions, the nearest patch."""
    if encoding.soft is not None:
        soft = encoding.soft.float().transpose(1, 2)  # [B, N, L] -> [B, L, N]
        soft = soft.unflatten(2, grid)  # [B, L, H/P, W/P]
        return upsample(soft, size, patch, stride).argmax(dim=1)
    device = encoding.regions.device
    rows, columns = (torch.arange(n, device=device).float() for n in grid)
    places = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))[None]  # [1, 2, H/P, W/P]
    row, column = upsample(places, size, patch, stride)[0].round().long()
    return (row * grid[1] + column).expand(len(encoding.regions), -1, -1)


def window_scores(encoding, text, class_of_word, scale, protocol):
    """Scores of each window's regions -> [B, L, channels].

    Channels are classes, with background where it has a threshold; by cosines, words; with
    background by entropy, which is found on pixels, the classes and the words.
    """
    if protocol.scoring == "cosines":
        return region_cosines(encoding, text)
    scores = region_scores(encoding, text, scale, protocol.top_k)
    scores = max_over_synonyms(scores, class_of_word, len(protocol.classes))
    if protocol.background_entropy is not None:
        return torch.cat([scores, region_cosines(encoding, text)], dim=2)
    if protocol.background_threshold is not None:
        return add_background(scores, protocol.background_threshold)
    return scores


def labels_by_regions(scores, class_of_word, scale, protocol):
    """The mean of window_scores [channels, H, W] -> scores [C, H, W] and labels [H, W]."""
    if protocol.background_entropy is not None:
        scores, cosines = scores.tensor_split([len(protocol.classes)])
        background = entropy_background(cosines, class_of_word, scale, protocol)
        scores = torch.cat([background, scores])
    # The softmax only changes ties, as in the authors' program.
    return scores, scores.softmax(dim=0).argmax(dim=0)


def labels_by_cosines(cosines, class_of_word, protocol):
    """Cosines of the words [Q, H, W] -> probabilities [C, H, W], labels [H, W], as in SCLIP."""
    scores = (protocol.logit_scale * cosines).softmax(dim=0).movedim(0, -1)
    scores = max_over_synonyms(scores, class_of_word, len(protocol.classes)).movedim(-1, 0)
    if protocol.background_entropy is not None:
        scale = protocol.logit_scale
        background = entropy_background(cosines, class_of_word, scale, protocol)
        scores = torch.cat([background, scores])
    if protocol.area_threshold is not None:
        area = torch.bincount(scores.argmax(dim=0).flatten(), minlength=len(scores))[1:]
        scores[1:] *= (area > protocol.area_threshold * area.sum())[:, None, None]
    best, label = scores.max(dim=0)
    if protocol.background_threshold is not None:
        label[best < protocol.background_threshold] = 0
    return scores, label


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


class Segmentation(NamedTuple):
    label: np.ndarray  # uint8 [H, W], at the image's own size
    regions: np.ndarray  # [h, w] at the inference resolution; whole images at their own size
    seen: tuple  # h, w: the inference resolution
    scores: torch.Tensor  # [C, H, W]
    features: torch.Tensor  # [windows, E], image features


class Segmenter:
    """A model with words (features [Q, E], classes [Q]) and a protocol, ready to label images."""

    def __init__(self, model, text, class_of_word, protocol, batch_size=16, bf16=False):
        self.model = model
        self.text = text
        self.class_of_word = class_of_word
        self.protocol = protocol
        self.batch_size = batch_size  # windows that are encoded together
        self.bf16 = bf16
        # The model's own; by cosines protocol.logit_scale takes its place.
        self.scale = model.clip.logit_scale.exp().clamp(max=100)
        self.patch = model.visual.patch_size
        self.stride = protocol.stride_trick or self.patch

    def encode_batches(self, encoder, crops):
        """Applies an encoder of the model to [n, 3, h, w], in mini-batches -> list of results."""
        visual = self.model.visual
        visual.stride = self.stride
        with torch.autocast(crops.device.type, torch.bfloat16, enabled=self.bf16):
            parts = [encoder(batch) for batch in crops.split(self.batch_size)]
        visual.stride = self.patch
        return parts

    def encode(self, crops):
        """[n, 3, h, w] -> ImageEncoding of all."""
        parts = self.encode_batches(self.model.encode_image, crops)
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
            height, width = image.shape[1:]
            if window:
                ys, xs = (window_starts(n, window, self.protocol.stride) for n in (height, width))
                starts = list(itertools.product(ys, xs))
                crops += [image[:, y : y + window, x : x + window] for y, x in starts]
            else:  # without the pixels beyond the last whole patch
                starts = [(0, 0)]
                rows, columns = (n // self.patch * self.patch for n in (height, width))
                crops = [image[:, :rows, :columns]]
            waiting.append((sample, image, starts))
            if len(crops) >= self.batch_size or not window:
                yield from self.finish(waiting, crops)
                waiting = []
                crops = []
        if waiting:
            yield from self.finish(waiting, crops)

    def finish(self, waiting, crops):
        """(sample, image [3, h, w], starts of its windows) ..., and the windows of all of them."""
        crops = torch.stack(crops)
        grid = [(n - self.patch) // self.stride + 1 for n in crops.shape[-2:]]
        encoding = self.encode(crops)
        scores = window_scores(encoding, self.text, self.class_of_word, self.scale, self.protocol)
        window = self.protocol.window
        # As in NACLIP, the map of a whole image is upsampled to the image's own size in one step.
        size = (window, window) if window else waiting[0][0].image.shape[:2]
        regions = pixel_regions(encoding, size, grid, self.patch, self.stride)  # [n, *size]
        first = 0
        for sample, image, starts in waiting:
            seen = tuple(image.shape[1:])
            canvas = scores.new_zeros(scores.shape[2], *(seen if window else size))
            count = scores.new_zeros(canvas.shape[1:])
            region_map = regions.new_zeros(canvas.shape[1:])
            for i, (y, x) in enumerate(starts, first):
                place = (..., slice(y, y + size[0]), slice(x, x + size[1]))
                if encoding.soft is None:  # the regions are patches: interpolate between them
                    maps = scores[i].T.unflatten(1, grid)[None]  # [1, channels, rows, columns]
                    canvas[place] += upsample(maps, size, self.patch, self.stride)[0]
                else:
                    canvas[place] += scores[i][regions[i]].permute(2, 0, 1)  # [channels, h, w]
                count[place] += 1
                region_map[place] = regions[i] + (i - first) * scores.shape[1]
            features = encoding.features[first : first + len(starts)]
            first += len(starts)
            pixels, label = self.label(canvas / count, sample.image, image)
            label = label.byte().cpu().numpy()
            yield sample, Segmentation(label, region_map.cpu().numpy(), seen, pixels, features)

    def label(self, scores, original, image):
        """Scores at any size -> scores [C, H, W] and labels [H, W] at the original size.

        original: uint8 [H, W, 3]. image: [3, h, w], as the model saw it.
        """
        size = original.shape[:2]
        scores = F.interpolate(scores[None], size, mode="bilinear")[0]
        if self.protocol.refine:
            guide = torch.tensor(original, device=image.device).permute(2, 0, 1).float()
            if self.protocol.scoring == "cosines":
                # SCLIP and NACLIP enlarge the reduced image again.
                guide = F.interpolate(image[None], size, mode="bilinear")[0]
            scores = pamr(scores, guide)
        if self.protocol.scoring == "cosines":
            return labels_by_cosines(scores, self.class_of_word, self.protocol)
        return labels_by_regions(scores, self.class_of_word, self.scale, self.protocol)


def load_image(dataset, protocol, patch, index):
    """In a worker process: -> sample, its image as the model sees it uint8 [h, w, 3]."""
    sample = dataset[index]
    if protocol.name == "classify":
        return sample, center_crop(sample.image, protocol.window)
    smallest = protocol.window or patch
    size = inference_size(*sample.image.shape[:2], protocol.short_side, smallest)
    return sample, resize_bilinear(sample.image, *size)


def load_images(segmenter, dataset, indices, workers, show_progress=False):
    """(sample, resized image) of these indices, read by worker processes."""
    load = functools.partial(load_image, dataset, segmenter.protocol, segmenter.patch)
    images = parallel_map(load, indices, workers)
    return progress(images, len(indices), "images") if show_progress else images


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


def sum_over_processes(counts, device):
    """An array of integers, summed over all processes."""
    total = torch.as_tensor(np.asarray(counts), device=device)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.cpu().numpy()


def evaluate(segmenter, dataset, output=None, limit=None, workers=2, rank=0, world=1):
    """Labels a data set, each process its share -> metrics on process 0; None without label maps.

    output: a folder for predictions/NAME.png and examples.png, or None. limit: only the first
    images.
    """
    names = class_names(dataset, segmenter.protocol)
    colours = palette(len(names))
    confusion = Confusion(len(names))
    labelled = 0
    examples = []
    indices = range(len(dataset))[:limit][rank::world]
    images = load_images(segmenter, dataset, indices, workers, show_progress=rank == 0)
    for sample, result in segmenter(images):
        if output:
            save_label(output / "predictions" / f"{sample.name}.png", result.label, colours)
        if sample.label is not None:
            confusion.add(result.label, sample.label)
            labelled += 1
        if len(examples) < 6:
            examples.append((sample.image, sample.label, result.regions, result.label))
    device = segmenter.text.device
    confusion.counts = sum_over_processes(confusion.counts, device)
    labelled = int(sum_over_processes([labelled], device)[0])
    if rank:
        return None
    if output:
        draw_examples(examples, names, colours, output / "examples.png")
    if not labelled:
        return None
    iou = {name: None if np.isnan(x) else float(x) for name, x in zip(names, confusion.iou())}
    return confusion.summary() | {"IoU": iou, "images": labelled}


def class_names(dataset, protocol):
    background = (
        protocol.background_threshold is not None or protocol.background_entropy is not None
    )
    return ["background"] * background + dataset.words


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
def classify(segmenter, dataset, limit=None, workers=2, rank=0, world=1):
    """Zero-shot classification of a ClassFolder -> metrics on process 0."""
    num_classes = len(dataset.words)
    counts = np.zeros((3, num_classes), np.int64)  # images of a class, top-1 correct, top-5 correct
    indices = range(len(dataset))[:limit][rank::world]
    images = iter(load_images(segmenter, dataset, indices, workers, show_progress=rank == 0))
    while batch := list(itertools.islice(images, segmenter.batch_size)):
        samples, crops = zip(*batch)
        image = torch.as_tensor(np.stack(crops), device=segmenter.text.device)
        encoding = segmenter.encode(normalise(image.permute(0, 3, 1, 2)))
        scores = image_scores(segmenter.model, encoding, segmenter.text)
        scores = max_over_synonyms(scores, segmenter.class_of_word, num_classes)
        top = scores.topk(min(5, num_classes)).indices.cpu().numpy()  # [B, 5]
        for sample, best in zip(samples, top):
            counts[:, sample.label] += [1, best[0] == sample.label, sample.label in best]
    counts = sum_over_processes(counts, segmenter.text.device)
    if rank:
        return None
    total, top_1, top_5 = counts.sum(axis=1).tolist()
    accuracy = {}
    for name, (number, correct, _) in zip(dataset.folders, counts.T.tolist()):
        accuracy[name] = correct / number if number else None
    return {
        "top-1": top_1 / total,
        "top-5": top_5 / total,
        "accuracy": accuracy,
        "images": total,
    }


# --------------------------------------------------------------------------------------------------
# Drawing

# Easy to tell apart, on light and on dark.
COLOURS = """
e6194b 3cb44b ffe119 4363d8 f58231 911eb4 42d4f4 f032e6 bfef45 fabed4 469990 dcbeff 9a6324 800000
aaffc3 808000 ffd8b1 000075 808080""".split()


def palette(n):
    """n colours -> uint8 [n, 3]; after the first ones, hues a golden ratio of the circle apart."""
    colours = [tuple(bytes.fromhex(colour)) for colour in COLOURS[:n]]
    for i in range(n - len(colours)):
        saturation = (0.85, 0.55)[i % 2]
        value = (0.95, 0.75, 0.55)[i % 3]
        red, green, blue = colorsys.hsv_to_rgb(i * 0.618 % 1, saturation, value)
        colours.append((255 * red, 255 * green, 255 * blue))
    return np.array(colours).astype(np.uint8)


def legend(draw, box, entries, font):
    """Draws swatches with words, row by row, in box = (left, top, right) -> bottom."""
    left, top, right = box
    side = font.size
    x = left
    y = top
    for colour, word in entries:
        width = 2.4 * side + draw.textlength(word, font)
        if x > left and x + width > right:
            x = left
            y += 1.5 * side
        draw.rectangle((x, y, x + side, y + side), tuple(int(v) for v in colour), "black")
        draw.text((x + 1.4 * side, y + side / 2), word, "black", font, anchor="lm")
        x += width
    return int(y + 2 * side)


def with_legend(image, entries):
    """The image with a legend below it: (colour, word) ..."""
    font = ImageFont.load_default(max(12, image.width // 50))
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    widest = max(3.4 * font.size + draw.textlength(word, font) for _, word in entries)
    width = max(image.width, int(widest))
    box = (font.size // 2, image.height + font.size // 2, width)
    sheet = Image.new("RGB", (width, legend(draw, box, entries, font)), "white")
    sheet.paste(image)
    legend(ImageDraw.Draw(sheet), box, entries, font)
    return sheet


def grey(image):
    return np.asarray(Image.fromarray(image).convert("L"))


def overlay(image, label, colours):
    """The colours of the labels over the grey image, with white outlines."""
    mixed = 0.5 * grey(image)[..., None] + 0.5 * colours[label]
    mixed[find_boundaries(label, mode="inner")] = 255
    return Image.fromarray(mixed.astype(np.uint8))


def heat(image, scores):
    """Scores [H, W] of one word over the grey image: from dark (lowest) through red to yellow."""
    scores = (scores - scores.min()) / max(np.ptp(scores), 1e-9)
    dark = 0.4 * grey(image)
    red = dark + (255 - dark) * (2 * scores).clip(max=1)
    green = dark + (230 - dark) * (2 * scores - 1).clip(min=0)
    return Image.fromarray(np.stack([red, green, dark * (1 - scores)], -1).astype(np.uint8))


def draw_examples(examples, words, colours, path, side=160):
    """One row per example (image, label or None, regions, prediction)."""
    margin = 8
    head = 24
    step = side + margin
    sheet = Image.new("RGB", (margin + 4 * step, head + len(examples) * step), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(("image", "ground truth", "regions", "result")):
        draw.text((margin + column * step, 5), title, "black", ImageFont.load_default(13))
    used = set()
    colours = np.vstack([colours, np.full((256 - len(colours), 3), 255, np.uint8)])  # 255 is white
    for row, (image, label, regions, prediction) in enumerate(examples):
        columns = [image, None, palette(64)[regions % 64], colours[prediction]]
        used |= set(prediction.flat)
        if label is not None:
            columns[1] = colours[label]
            used |= set(label.flat)
        for column, pixels in enumerate(columns):
            if pixels is not None:
                tile = Image.fromarray(pixels)
                scale = side / max(tile.size)
                tile = tile.resize([max(1, round(n * scale)) for n in tile.size], Image.NEAREST)
                sheet.paste(tile, (margin + column * step, head + row * step))
    with_legend(sheet, [(colours[c], words[c]) for c in sorted(used - {255})]).save(path)


def save_label(path, label, colours):
    """A palette PNG, written completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(label)
    image.putpalette(colours.ravel().tolist())
    image.save(path.with_suffix(".part"), "PNG")
    os.replace(path.with_suffix(".part"), path)


def show_image(segmenter, dataset, output, with_heat):
    """Writes overlay, labels and regions of a data set's one image; prints the classes' shares."""
    images = load_images(segmenter, dataset, [0], workers=0)
    ((sample, result),) = segmenter(images)
    words = class_names(dataset, segmenter.protocol)
    colours = palette(len(words))
    share = np.bincount(result.label.ravel(), minlength=len(words)) / result.label.size
    present = [c for c in np.argsort(-share) if share[c] > 0]
    for c in present:
        print(f"{words[c]:>20}  {100 * share[c]:5.1f} %")
    entries = [(colours[c], f"{words[c]} {100 * share[c]:.0f} %") for c in present]
    regions = Image.fromarray(palette(64)[result.regions % 64])
    files = {
        "overlay": with_legend(overlay(sample.image, result.label, colours), entries),
        "regions": regions.resize(result.label.shape[::-1], Image.NEAREST),
    }
    if with_heat:
        for c, word in enumerate(words):
            letters = "".join(letter if letter.isalnum() else "_" for letter in word)
            scores = result.scores[c].cpu().numpy()
            files[f"heat_{c}_{letters[:60]}"] = heat(sample.image, scores)
    paths = {name: output / f"{sample.name}_{name}.png" for name in ("labels", *files)}
    save_label(paths["labels"], result.label, colours)
    for name, image in files.items():
        image.save(paths[name])
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
    """-> rank, number of processes, device: one process, or as many as torchrun started."""
    torch.backends.cudnn.allow_tf32 = False  # fp32 is fp32 on GPUs, too
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(device_name)
    if world > 1:
        if device.type == "cuda":
            device = pick_device(f"cuda:{os.environ['LOCAL_RANK']}")
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return rank, world, device


def run_program(main, if_interrupted):
    """Runs main() and ends the process. What the user gave wrong is one line, a bug a traceback."""
    complaint = None
    try:
        main()
    except KeyboardInterrupt:
        complaint = if_interrupted
    except (InputError, OSError) as error:
        # The message of a worker's exception is its whole traceback; the last line is the error.
        lines = (str(error).strip() or type(error).__name__).splitlines()
        complaint = lines[-1].removeprefix("model.InputError: ")
    except Exception:
        complaint = traceback.format_exc().rstrip()
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # or torch complains about the workers' end
        for worker in multiprocessing.active_children():
            worker.kill()
    if complaint and not complaint.startswith("Traceback"):
        complaint = f"{Path(sys.argv[0]).name}: {complaint}"
    if not dist.is_initialized():
        sys.exit(complaint)
    # Several processes skip Python's cleanup: gloo's threads can deadlock there on the GIL (torch
    # 2.4 to 2.13).
    if complaint:
        print(complaint, file=sys.stderr)
    else:
        dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1 if complaint else 0)


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
    add("--words", metavar="W",
        help='the classes: "cat, grass, sky", or a file with one class per line and synonyms '
        "between commas; needed by --image and --images")
    add("--limit", type=number(int, 1), metavar="N", help="only the first N images [all]")
    add = parser.add_argument_group("the model").add_argument
    add("--checkpoint", "--model", default=DEFAULT_CHECKPOINT, metavar="FILE",
        help="a checkpoint of train.py, the authors' segclip.bin, a GroupViT or a CLIP: a file, or "
        "ViT-B/16 [%(default)s]")
    add("--readout", choices=READOUTS, default="clip",
        help="how a CLIP's last block makes patch tokens; see read_out in model.py [%(default)s]")
    add("--activation", choices=ACTIVATIONS,
        help="of a CLIP that is not OpenAI's: gelu for LAION's and DataComp's weights [quick_gelu]")
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
    add("--top-k", type=number(int, 1), metavar="K",
        help="by regions: most classes per window [5]")
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
    if args.background is not None and args.background_entropy is not None:
        parser.error("--background-entropy: it is this or --background")
    if args.classify:
        for name in (*PROTOCOL_FLAGS, "background"):
            if name not in ("templates", "stride_trick") and getattr(args, name) is not None:
                parser.error(f"--classify has no --{name.replace('_', '-')}")
        if args.protocol != "segclip":
            parser.error("--classify has no --protocol")
    return args


def open_dataset(name, root, image_size):
    """A data set by name: scenes of this size, or a benchmark's folder. Raises InputError."""
    if name in SCENES:
        return SyntheticScenes(image_size, split=SCENES[name])
    return SegmentationFolder(name, root)


def warn_of_unknown_words(tokenizer, classes):
    """Names the words that a vocabulary learned from captions splits into several tokens."""
    words = [word for synonyms in classes for word in synonyms]
    rare = [w for w in words if any(len(tokenizer.pieces(part)) > 1 for part in tokenizer.words(w))]
    if rare and tokenizer.vocab_size < Config.vocab_size:
        print(
            f"rare or unknown in this model's training captions: {', '.join(rare)}", file=sys.stderr
        )


def report(metrics):
    """Prints what metrics.json has."""
    kind = "IoU" if "IoU" in metrics else "accuracy"
    for name, value in metrics[kind].items():
        percent = "    -" if value is None else f"{100 * value:5.1f} %"
        print(f"{name:>20}  {kind} {percent}")
    totals = [name for name in ("mIoU", "mAcc", "aAcc", "top-1", "top-5") if name in metrics]
    line = "  ".join(f"{name} {100 * metrics[name]:.2f} %" for name in totals)
    print(f"{line}  over {metrics['images']} images  protocol {metrics['protocol']['name']}")


def open_segmenter(args, device):
    """What the flags ask for -> Segmenter, tokenizer, data set. Raises InputError."""
    path = fetch(args.checkpoint) if args.checkpoint in MODELS else Path(args.checkpoint)
    if args.checkpoint == DEFAULT_CHECKPOINT and not path.exists():
        raise InputError(
            f"{path}: does not exist; run `python train.py`, or give --checkpoint FILE"
        )
    model = load_model(path, args.readout, args.activation).to(device).eval()
    tokenizer = load_tokenizer(path, args.vocabulary)
    config = model.config
    if config.vocab_size != tokenizer.vocab_size:
        sizes = f"{config.vocab_size} tokens, but the vocabulary has {tokenizer.vocab_size}"
        raise InputError(f"{args.checkpoint}: made for {sizes}")

    classes = read_classes(args.words) if args.words else None
    has_background = args.background is not None or args.background_entropy is not None
    own = args.image or args.images
    if args.classify:
        dataset = ClassFolder(args.classify)
    elif own:
        words = [synonyms[0] for synonyms in classes]
        dataset = ImageFolder(own, args.labels_dir, words, has_background, output_folder(args))
    else:
        dataset = open_dataset(args.dataset, args.data_root, config.image_size)
        if has_background and not dataset.has_background:
            raise InputError(f"--background(-entropy): {args.dataset} has no background")
    if classes and len(classes) != len(dataset.words):
        counts = f"{len(classes)} classes, but {dataset.name} has {len(dataset.words)}"
        raise InputError(f"--words {args.words}: {counts}")
    if not len(dataset):
        raise InputError(f"{args.images or args.data_root}: no image to label")

    changes = {name: getattr(args, name) for name in PROTOCOL_FLAGS}
    if args.background is not None and args.background >= 0:
        changes["background_threshold"] = args.background
    name = "classify" if args.classify else args.protocol
    protocol = choose_protocol(name, dataset, config, classes, **changes)
    text, class_of_word = class_features(model, tokenizer, protocol)
    bf16 = args.precision == "bf16"
    segmenter = Segmenter(model, text, class_of_word, protocol, args.batch_size, bf16)
    return segmenter, tokenizer, dataset


def output_folder(args):
    """--output, or of the scenes the checkpoint's own folder, or runs/NAME."""
    kind = next((x for x in ("image", "images", "classify") if getattr(args, x)), args.dataset)
    home = Path(args.checkpoint).parent
    if args.checkpoint in MODELS:
        home = Path("runs", args.checkpoint.replace("/", "-"))
    homes = {"synthetic": home, "synthetic-unseen": home / "unseen"}
    return Path(args.output or homes.get(kind, f"runs/{kind}"))


def main(argv=None):
    args = parse_args(argv)
    rank, world, device = start_processes(args.device)
    segmenter, tokenizer, dataset = open_segmenter(args, device)
    protocol = segmenter.protocol
    output = output_folder(args)
    output.mkdir(parents=True, exist_ok=True)
    if rank == 0 and (args.image or args.images or args.classify):
        warn_of_unknown_words(tokenizer, protocol.classes)
    if args.image:
        if rank == 0:
            show_image(segmenter, dataset, output, args.heat)
        return
    if args.classify:
        metrics = classify(segmenter, dataset, args.limit, args.workers, rank, world)
    else:
        metrics = evaluate(segmenter, dataset, output, args.limit, args.workers, rank, world)
    if rank:
        return
    if metrics:
        path = fetch(args.checkpoint) if args.checkpoint in MODELS else args.checkpoint
        metrics["checkpoint_sha256"] = sha256_of(path)
        metrics["protocol"] = vars(protocol)
        metrics["flags"] = {name: value for name, value in vars(args).items() if value is not None}
        (output / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
        report(metrics)
    elif args.labels_dir:
        print(f"{args.labels_dir}: no label map has the name of an image", file=sys.stderr)
    print(f"wrote {output}", file=sys.stderr)


if __name__ == "__main__":
    run_program(main, "stopped")
