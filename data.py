"""What goes in: image-text pairs with superpixels for training, pictures with labels for evaluation.

python data.py superpixels --data "cc3m/{00000..00331}.tar"      once; training then finds them
"""

import argparse
import csv
import datetime
import functools
import glob
import hashlib
import io
import itertools
import json
import math
import os
import re
import signal
import sys
import tarfile
import time
import zipfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps
from skimage.segmentation import felzenszwalb
from torch.utils.data import DataLoader

from clip_loader import InputError, ManualPage, cache_dir, first_line, make_folder, run_program
from model import IMAGE_MEAN, IMAGE_STD


class Sample(NamedTuple):
    picture: np.ndarray  # uint8 [H, W, 3]
    # uint8 [H, W], the class of each pixel; 255 is not scored. Never seen in training. Of a ClassFolder, the picture's class.
    label: np.ndarray | int | None
    name: str
    caption: str = ""
    segments: object = None  # int [h, w], superpixels computed before; a Fault if they should be there and are not


class Fault(Exception):
    """One pair cannot be used, or not as it should be: it is counted, and training goes on. `kind` is one of KINDS."""

    KINDS = ("broken picture", "no caption", "caption not in UTF-8", "unreadable shard", "missing superpixels")

    def __init__(self, kind, name, reason=""):
        super().__init__(kind, name, reason)  # the arguments are what crosses to another process
        self.kind, self.text = kind, f"{name}" + (f" ({reason})" if reason else "")

    def __str__(self):
        return f"{self.kind}: {self.text}"


def normalise(image):
    """uint8 [..., 3, H, W] -> float32 as CLIP sees it."""
    mean, std = image_statistics(image.device)
    return (image.float() / 255 - mean) / std


@functools.cache  # a copy to a GPU at each step would wait for the step before
def image_statistics(device):
    return [torch.tensor(values, device=device).view(3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD)]


# ---------------------------------------------------------------------------------------------------------------------
# Synthetic scenes: things on grounds, a word for every pixel, a caption for every picture
#
# They need no file and no network, and they are the same on every machine: RandomState's stream is frozen by NumPy, and
# everything that decides a pixel is integer arithmetic.

COLOURS = {
    "red": (205, 40, 40),
    "orange": (235, 130, 30),
    "yellow": (240, 215, 70),
    "green": (45, 130, 60),
    "blue": (45, 80, 200),
    "purple": (130, 55, 165),
    "pink": (240, 140, 185),
    "brown": (125, 75, 45),
    "grey": (190, 190, 195),
}
# A thing is a shape, the colours it comes in, its second colour, and where that one shows. u and v are its own
# coordinates, -64 to 64 from side to side, to the right and down.
# fmt: off
THINGS = {
    "ball": (lambda u, v: u * u + v * v < 60**2,
        ("red", "blue"), (250, 250, 245), lambda u, v: abs(v) < 18),
    "star": (lambda u, v: ((v < 36) & (v > 2 * abs(u) - 72)) | ((v > -36) & (v < 72 - 2 * abs(u))),
        ("yellow", "orange"), (255, 250, 200), lambda u, v: abs(u) + abs(v) < 24),
    "tree": (lambda u, v: (v < 60) & (v > 2 * abs(u) - 68),
        ("green", "brown"), (20, 70, 35), lambda u, v: (u // 7 + v // 7) % 2 == 0),
    "house": (lambda u, v: (abs(u) < 46) & (v < 56) & (v > abs(u) * 4 // 5 - 62),
        ("red", "grey"), (60, 40, 40), lambda u, v: (v < -20) | ((abs(u) < 14) & (v > 12))),
    "moon": (lambda u, v: (u * u + v * v < 62**2) & ((u - 40) ** 2 + v * v > 40**2),
        ("yellow", "grey"), (255, 255, 255), lambda u, v: (u // 8 * 3 + v // 8 * 5) % 7 < 2),
    "donut": (lambda u, v: (u * u + v * v < 62**2) & (u * u + v * v > 20**2),
        ("pink", "brown"), (250, 245, 230), lambda u, v: (u // 8 * 5 + v // 8 * 3) % 7 < 2),
    "heart": (lambda u, v: ((abs(u) - 28) ** 2 + (v + 20) ** 2 < 34**2) | ((v > -20) & (v < 60 - 5 * abs(u) // 4)),
        ("pink", "purple"), (255, 200, 205), lambda u, v: (u + 28) ** 2 + (v + 26) ** 2 < 12**2),
    "fish": (lambda u, v: ((u + 14) ** 2 + 3 * v * v // 2 < 48**2) | ((u > 20) & (u < 62) & (abs(v) < u - 10)),
        ("orange", "blue"), (40, 40, 60), lambda u, v: (u // 8 % 2 == 0) & (v // 6 % 2 == 0)),
}
# fmt: on
# A ground is two colours and, from the pixel's place and some grain (0 to 63), how to mix them (0 to 64). Most of
# the patterns repeat after 8 pixels, the patch size of the default model, so that all patches of a ground look much alike.
GROUNDS = {
    "grass": ((40, 110, 35), (130, 190, 70), lambda x, y, grain: grain * (1 + (x + grain // 16) % 3) // 3),
    "sand": ((190, 160, 105), (235, 210, 160), lambda x, y, grain: 20 + grain * 2 // 3),
    "water": ((40, 95, 150), (125, 185, 215), lambda x, y, grain: 20 * ((y + abs(x % 8 - 4)) // 4 % 2) + grain // 2),
    "brick": (
        (150, 70, 55),
        (205, 195, 185),
        lambda x, y, grain: 56 * ((y % 4 == 0) | ((x + y // 4 * 4) % 8 == 0)) + grain // 8,
    ),
    "snow": ((215, 225, 235), (255, 255, 255), lambda x, y, grain: grain),
    "wood": ((120, 80, 45), (180, 130, 80), lambda x, y, grain: 8 * abs(x % 8 - 4) + grain // 2),
}
SCENE_WORDS = [*GROUNDS, *THINGS]  # the classes, in the order of their label
SCENE_PALETTE = np.array(  # and the colours that show them
    [
        *[(120, 190, 90), (235, 215, 160), (110, 175, 225), (175, 95, 75), (240, 245, 250), (150, 110, 75)],
        *[(220, 40, 40), (250, 200, 40), (20, 95, 50), (100, 60, 160), (250, 235, 130), (235, 120, 190)],
        *[(255, 70, 130), (250, 130, 30)],
    ],
    np.uint8,
)
CAPTIONS = [  # most of them name everything,
    "a photo of {things} on {grounds}.",
    "{things} on {grounds}",
    "there is {things} over {grounds} today",
    "{grounds} with {things}",
    "a nice picture of {grounds} and {things}",
    "look, {things} lying on the {grounds}!",
    "my friend found {things} somewhere on {grounds}",
    "{things}, and behind it only {grounds}",
    # and some only one thing or ground, as people do; without these a word alone would be a text never seen.
    "a photo of {one}.",
]


class SyntheticScenes:
    """Scenes number 0, 1, 2, ... of a seed. `split` keeps training and evaluation apart.

    On two grounds in three, one of the two colours of a thing is never seen, neither in training ("train") nor in evaluation
    ("val"): stars on grass are not orange, stars on water not yellow. The split "unseen" has nothing but these.
    """

    words, palette = SCENE_WORDS, SCENE_PALETTE
    has_background = False  # every pixel has a word

    def __init__(self, size, seed=0, split="train"):
        self.size, self.split = size, split
        self.key = [seed, ["train", "val", "unseen"].index(split)]
        self.length = 12_000 if split == "train" else 500  # an epoch; there is a scene for every number
        self.y, self.x = np.mgrid[:size, :size]

    def __len__(self):
        return self.length

    @property
    def names(self):
        return [f"scene{i:05}" for i in range(len(self))]

    def picture_path(self, index):
        return None  # drawn, not read

    def __getitem__(self, index):
        rng = np.random.RandomState([*self.key, index])
        size, x, y = self.size, self.x, self.y
        picture, label = np.empty((size, size, 3), np.int64), np.empty((size, size), np.uint8)

        grounds = rng.permutation(len(GROUNDS))[: 1 if rng.randint(3) else 2]
        dx, dy = rng.randint(-8, 9), rng.choice([-8, 8])
        beyond = dx * (x - size // 2) + dy * (y - size // 2) > 8 * rng.randint(-size // 6, size // 6 + 1)
        for ground, where in zip(grounds, [np.ones_like(beyond), beyond]):
            picture[where] = self.ground(rng, SCENE_WORDS[ground])[where]
            label[where] = ground

        # kind + ground modulo 3 is the colour that is unseen there; 2 is none.
        unseen = [{(kind + ground) % 3 for ground in grounds} - {2} for kind in range(len(THINGS))]
        choices = unseen if self.split == "unseen" else [{0, 1} - colours for colours in unseen]
        kinds = [kind for kind in rng.permutation(len(THINGS)) if choices[kind]][: rng.randint(1, 3)]
        places = rng.permutation(4)  # one quarter of the picture each, so that none hides much of another
        things = []
        for kind, place in zip(kinds, places):
            word = list(THINGS)[kind]
            shape, colours, second, pattern = THINGS[word]
            colour = colours[rng.choice(sorted(choices[kind]))]
            u, v = self.coordinates(rng, place, alone=len(kinds) == 1)
            where, grain = shape(u, v), rng.randint(-8, 9, (size, size, 1))
            pixels = np.where(pattern(u, v)[..., None], self.jitter(rng, second), self.jitter(rng, COLOURS[colour]))
            picture[where] = (pixels + grain)[where]
            label[where] = len(GROUNDS) + kind
            things.append(f"a {word}" if rng.randint(3) else f"{'an' if colour[0] == 'o' else 'a'} {colour} {word}")

        grounds = [SCENE_WORDS[ground] for ground in grounds]
        caption = CAPTIONS[rng.randint(len(CAPTIONS))].format(
            things=" and ".join(things),
            grounds=" and ".join(grounds),
            one=(things + grounds)[rng.randint(len(things + grounds))],
        )
        return Sample(picture.clip(0, 255).astype(np.uint8), label, f"scene{index:05}", caption)

    @staticmethod
    def jitter(rng, colour):
        return np.array(colour) + rng.randint(-24, 25, 3)

    def ground(self, rng, word):
        low, high, pattern = GROUNDS[word]
        grain = rng.randint(0, 64, (self.size, self.size))
        mix = pattern(self.x + rng.randint(64), self.y + rng.randint(64), grain)[..., None]  # [H, W, 1]
        return (self.jitter(rng, low) * (64 - mix) + self.jitter(rng, high) * mix) // 64

    def coordinates(self, rng, place, alone):
        """u and v of every pixel, for a thing of random size and tilt in one quarter of the picture, or if alone anywhere."""
        size = self.size
        cx, cy = (size // 4 + half * size // 2 + rng.randint(-size // 10, size // 10 + 1) for half in (place % 2, place // 2))
        if alone:
            cx, cy = rng.randint(size // 4, size * 3 // 4 + 1, 2)
        radius = rng.randint(size * 18, size * (30 if alone else 25)) // 60
        angle = rng.randint(-30, 31) * math.pi / 180
        # Rounded to integers, so that no machine's sine decides a pixel.
        c, s = round(1024 * math.cos(angle)), round(1024 * math.sin(angle))
        dx, dy = self.x - cx, self.y - cy
        return (c * dx + s * dy) // (16 * radius), (c * dy - s * dx) // (16 * radius)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures as people have them

UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what Pillow raises on a damaged file


def decode_picture(file, shortest=None):
    """A path or an open file -> uint8 [H, W, 3], as a viewer would show it. Raises one of UNREADABLE.

    With `shortest`, a JPEG may come at a half, a quarter or an eighth of its size, sides no shorter than this: much faster.
    """
    with Image.open(file) as image:
        if shortest:
            image.draft(None, (shortest, shortest))
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16-bit grey, which convert() would cut off at 255
            image = Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.asarray(image.convert("RGB"))


def read_picture(path):
    """Any picture file -> uint8 [H, W, 3]. Raises InputError."""
    try:
        return decode_picture(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such picture") from None
    except UNREADABLE as error:
        raise InputError(f"{path}: not a picture that can be read ({first_line(error)}); mend it or take it away") from None


def read_label(path, picture, table):
    """A palette or grey PNG of the picture's size -> uint8 [H, W] of classes, through `table`, int [256].

    Raises InputError for another size, another kind of file, or a value that the table does not have.
    """
    try:
        with Image.open(path) as image:
            label = np.asarray(image)
    except FileNotFoundError:
        raise InputError(f"{path}: no such label map") from None
    except UNREADABLE as error:
        raise InputError(f"{path}: not a label map that can be read ({error})") from None
    if label.ndim != 2 or label.dtype != np.uint8:
        raise InputError(f"{path}: not a label map: its mode must be P or L, one byte a pixel, not {image.mode}")
    if label.shape != picture.shape[:2]:
        size, expected = (f"{shape[1]}x{shape[0]}" for shape in (label.shape, picture.shape))
        raise InputError(f"{path}: the label map is {size}, its picture {expected}")
    classes = table[label]
    if classes.min() < 0:
        raise InputError(f"{path}: has the value {label[classes < 0].min()}, which is none of the classes")
    return classes.astype(np.uint8)


def resize_bilinear(image, height, width):
    """OpenCV's bilinear resize of uint8 [H, W, 3], bit for bit: fixed-point weights, no antialiasing.

    The benchmarks' published numbers were made with it, and no other library rounds as it does.
    """
    if image.shape[:2] == (height, width):
        return image
    if image.shape[:2] == (2 * height, 2 * width):  # OpenCV's own special case: the mean of 2x2 pixels
        blocks = image.reshape(height, 2, width, 2, -1).astype(np.int64)
        return ((blocks.sum(axis=(1, 3)) + 2) >> 2).astype(np.uint8)

    def weights(n_in, n_out):
        position = ((np.arange(n_out) + 0.5) * (1 / (n_out / n_in)) - 0.5).astype(np.float32)
        first = np.floor(position).astype(np.int64)
        return first, position - first.astype(np.float32)

    def fixed(fraction):  # 11 bits
        return np.rint(2048 * (1 - fraction)).astype(np.int64), np.rint(2048 * fraction).astype(np.int64)

    x, fx = weights(image.shape[1], width)
    fx = np.where((x < 0) | (x >= image.shape[1] - 1), np.float32(0), fx)
    x = x.clip(0, image.shape[1] - 1)
    a0, a1 = (a[None, :, None] for a in fixed(fx))
    right = (x + 1).clip(max=image.shape[1] - 1)
    y, fy = weights(image.shape[0], height)
    b0, b1 = (b[:, None, None] for b in fixed(fy))
    image = image.astype(np.int64)
    rows = image[:, x] * a0 + image[:, right] * a1  # [H, width, 3]
    above, below = rows[y.clip(0, len(rows) - 1)] >> 4, rows[(y + 1).clip(0, len(rows) - 1)] >> 4
    return ((((b0 * above) >> 16) + ((b1 * below) >> 16) + 2) >> 2).astype(np.uint8)


IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


def listed(names):
    """ "cat, dog" -> ["cat", "dog"]."""
    return [name.strip() for name in names.split(",") if name.strip()]


def visible_files(folder):
    """All files in a folder and its folders, sorted; without hidden ones."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [path for path in paths if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def read_lines(path):
    """The lines of a text file that are not empty, without the space around them. Raises InputError."""
    try:
        return [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a list of names ({error})") from None


# ---------------------------------------------------------------------------------------------------------------------
# Superpixels, and crops that keep them aligned


def superpixels(picture, image_size, patch_size):
    """Felzenszwalb's segments of a picture uint8 [H, W, 3], its short side reduced to image_size -> int [h, w].

    The settings are the authors', who have 224 and 16.
    """
    height, width = reduced_size(*picture.shape[:2], image_size)
    if (height, width) != picture.shape[:2]:
        picture = np.asarray(Image.fromarray(picture).resize((width, height), Image.BICUBIC))
    return felzenszwalb(picture, scale=224, sigma=0.9, min_size=patch_size**2 * 7 // 8)


def reduced_size(height, width, short_side):
    """The size with this short side; the long one is at most eight times as long, whatever the picture."""
    scale = short_side / min(height, width)
    return tuple(min(max(round(scale * side), short_side), 8 * short_side) for side in (height, width))


def patch_labels(segments, patch_size, rule="floor"):
    """The super-patch that each patch belongs to (Section 2.4): [H, W] -> [N], by one of two rules.

    "floor" is the paper's: the floor of the mean superpixel id. But ids are names and not quantities, so a patch between
    superpixels 2 and 8 joins superpixel 5, a stranger. "majority" takes the id that most of the patch's pixels have.
    """
    height, width = segments.shape
    patches = segments.reshape(height // patch_size, patch_size, width // patch_size, patch_size)  # [H/P, P, W/P, P]
    if rule == "floor":
        return patches.mean(axis=(1, 3)).astype(np.int64).ravel()
    ids = patches.transpose(0, 2, 1, 3).reshape(-1, patch_size**2).astype(np.int64)  # [N, P*P]
    num_ids = ids.max() + 1
    counts = np.bincount((ids + num_ids * np.arange(len(ids))[:, None]).ravel(), minlength=len(ids) * num_ids)
    return counts.reshape(len(ids), num_ids).argmax(axis=1)


def random_resized_crop(picture, segments, size, rng, scale):
    """A random part of the picture, at least `scale` of its area, and the same part of its superpixels, size x size."""
    height, width = picture.shape[:2]
    for _ in range(10):
        area, ratio = height * width * rng.uniform(scale, 1), math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(width - w + 1), rng.randint(height - h + 1)
            break
    else:  # too long for any of these: the middle, as much of it as the ratio allows
        w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
        left, top = (width - w) // 2, (height - h) // 2
    picture = Image.fromarray(picture).resize((size, size), Image.BICUBIC, (left, top, left + w, top + h))
    x, y = segments.shape[1] / width, segments.shape[0] / height  # superpixels are those of a reduced picture
    box = (left * x, top * y, (left + w) * x, (top + h) * y)
    segments = Image.fromarray(segments.astype(np.int32)).resize((size, size), Image.NEAREST, box)
    return np.asarray(picture), np.asarray(segments)


# ---------------------------------------------------------------------------------------------------------------------
# Image-text pairs, as training sees them

SHUFFLE_CHUNK, SHUFFLE_BUFFER = 10_000, 50_000  # pairs
SHUFFLE_SHARDS = 32  # at most so many in the buffer, and open in each process


def shuffled(sizes, seed, start=0):
    """The order of training, without end: indices of the pairs of sources (or shards) of these sizes, from `start` on.

    Each epoch has another order: the shards are shuffled (large sources count as several), then the pairs of as many
    shards as fill a buffer. So only a few shards are in use at a time. It is a function of the seed and of nothing else:
    not of the number of processes or workers, and not of where a run was interrupted.
    """
    chunks = []  # (first index, last + 1)
    for end, size in zip(np.cumsum(sizes).tolist(), sizes):
        chunks += [(first, min(first + SHUFFLE_CHUNK, end)) for first in range(end - size, end, SHUFFLE_CHUNK)]
    epoch, skip = divmod(start, sum(sizes))
    while True:
        rng, buffer = np.random.RandomState([seed, epoch]), []
        order = rng.permutation(len(chunks))
        for n, chunk in enumerate(order, 1):
            buffer.append(np.arange(*chunks[chunk]))
            if sum(map(len, buffer)) >= SHUFFLE_BUFFER or len(buffer) == SHUFFLE_SHARDS or n == len(order):
                indices = rng.permutation(np.concatenate(buffer))
                yield from indices[skip:].tolist()
                skip, buffer = max(0, skip - len(indices)), []
        epoch += 1


class Batches:
    """What a DataLoader of TrainingPairs asks for: of each step's batch, this process's rows, as (place, index) pairs."""

    def __init__(self, sizes, seed, batch_size, rows, steps):
        self.sizes, self.seed, self.batch_size, self.rows, self.steps = sizes, seed, batch_size, rows, steps

    def __iter__(self):
        place = self.steps.start * self.batch_size
        order = shuffled(self.sizes, self.seed, place)
        for _ in self.steps:
            batch = [(place + i, next(order)) for i in range(self.batch_size)]
            place += self.batch_size
            yield batch[self.rows]


class TrainingPairs(torch.utils.data.Dataset):
    """pairs[place, index] is pair `index` of the source, as it is seen at this place of the order of training:

    picture uint8 [H, W, 3] (both image_size), super-patches int [N], token ids [T] (NumPy's, to cross between processes), and
    the faults met: (kind, text), ...
    `source[i]` is a Sample, or raises a Fault; then the next one stands in, and if many in a row fail, one chosen at random.
    What is seen at a place depends on nothing else: not on who asks, nor when, nor on faults elsewhere. (An InputError is
    returned and not raised, see `raised`.) rule: for patch_labels; None: no superpixels are needed. nouns, templates: see `text`.
    """

    def __init__(
        self, source, tokenizer, config, crop_scale=1.0, seed=0, text_length=None, rule="floor", nouns=(), templates=()
    ):
        self.source, self.tokenizer, self.config, self.crop_scale = source, tokenizer, config, crop_scale
        self.seed, self.text_length, self.rule = seed, text_length or config.context_length, rule
        self.templates, longest_first = templates, sorted(map(str.lower, nouns), key=len, reverse=True)
        # Simple plurals count as the noun: "two dogs" has "dog", "benches" has "bench".
        self.nouns = re.compile(rf"\b({'|'.join(map(re.escape, longest_first))})(?:e?s)?\b") if nouns else None

    def __getitem__(self, key):
        place, index = key
        size, patch_size = self.config.image_size, self.config.patch_size
        place %= 2**32  # what RandomState can take
        rng, faults = np.random.RandomState([self.seed, place]), []
        sample, tries = None, 0
        while sample is None:
            try:
                sample = self.source[index]
            except Fault as fault:
                tries += 1
                if tries == 1:
                    faults.append((fault.kind, str(fault)))
                if tries == 1000:
                    return InputError(f"1,000 pairs in a row cannot be used; the last: {fault}")
                far = np.random.RandomState([self.seed, place, tries]).randint(len(self.source))
                index = (index + 1) % len(self.source) if tries % 10 else far
        segments = sample.segments if self.rule else np.zeros(reduced_size(*sample.picture.shape[:2], size), np.uint8)
        if isinstance(segments, np.ndarray) and segments.shape != reduced_size(*sample.picture.shape[:2], size):
            segments = Fault("missing superpixels", sample.name, "those that are there are of another picture")
        if isinstance(segments, Fault):
            faults.append((segments.kind, str(segments)))
        if not isinstance(segments, np.ndarray):
            segments = superpixels(sample.picture, size, patch_size)
        picture, segments = random_resized_crop(sample.picture, segments, size, rng, self.crop_scale)
        superpatch = patch_labels(segments, patch_size, self.rule or "floor")
        text = self.tokenizer(self.text(sample.caption, rng), self.text_length)[0]
        return picture, superpatch, text.numpy(), faults

    def text(self, caption, rng):
        """The caption, or one of the nouns in it in one of the templates: each of these texts as often (PACL)."""
        if not self.nouns:
            return caption
        found = dict.fromkeys(self.nouns.findall(caption.lower()))  # each once, in order
        texts = [caption, *(template.format(noun) for noun in found for template in self.templates)]
        return texts[rng.randint(len(texts))]


class Prepared(torch.utils.data.Dataset):
    """Pairs of which nothing is random, each prepared once, by so many processes, and kept: [place, index] as before."""

    def __init__(self, pairs, count, workers):
        self.items = list(raised(in_parallel(pairs, workers, [(i, i) for i in range(count)])))

    def __getitem__(self, key):
        return self.items[key[1]]


def collate(items):
    """Pairs -> picture uint8 [B, 3, H, W], super-patches [B, N], token ids [B, T], and all their faults."""
    for item in items:
        if isinstance(item, InputError):
            return item
    pictures, superpatches, texts, faults = zip(*items)
    pictures, superpatches, texts = (torch.from_numpy(np.stack(x)) for x in (pictures, superpatches, texts))
    pictures = pictures.permute(0, 3, 1, 2)  # [B, H, W, 3] -> [B, 3, H, W]
    return pictures, superpatches, texts, [fault for each in faults for fault in each]


def raised(loader):
    """The items of a loader; an InputError among them is raised. (A worker that raised it would put its trace around it.)"""
    for item in loader:
        if isinstance(item, InputError):
            raise item
        yield item


def in_parallel(dataset, workers, indices=None):
    """The items of a dataset as they are, in order, made by so many processes."""
    return DataLoader(
        dataset, None, sampler=indices, num_workers=workers, collate_fn=unchanged, worker_init_fn=ignore_signals
    )


def unchanged(item):
    return item


def progress(items, total, what):
    """The same items; every five seconds a line tells how many of `total` have come."""
    start = last_line = time.time()
    for n, item in enumerate(items, 1):
        yield item
        if time.time() - last_line > 5:
            last_line = time.time()
            rate = n / (last_line - start)
            eta = datetime.timedelta(seconds=round((total - n) / rate))
            print(f"{n} of {total} {what}, {rate:.1f} a second, ETA {eta}", file=sys.stderr)


def ignore_signals(worker=None):
    """Ctrl-C and SIGTERM reach a DataLoader's workers too, which are needed until the main process has saved its work."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


# ---------------------------------------------------------------------------------------------------------------------
# Where pairs come from: tables of picture files, and tar shards
#
# Each source has a length, and source[i] is a Sample or raises a Fault. Those of files can have superpixels computed before:
# unsegmented() lists the pictures that have none, picture(one of these) reads it, save_superpixels() writes what was computed.


def open_pairs(specs, config, seed, workers=0, max_faults=0.01, rank=0, world=1):
    """What --data names -> a list of sources: each has a length, and its [i] is a Sample or raises a Fault.

    spec: "synthetic"; a COCO captions JSON, a TSV, CSV or JSONL, with "=FOLDER" for its pictures; or tar shards,
        "cc3m/{00000..00331}.tar" or with * and ?. Each of `world` processes reads its share of shards that have no index.
    Raises InputError for what is not there, and when more than a share `max_faults` of the shards' pairs is lost.
    """
    sources, suffix = [], f".superpixels-{config.image_size}-{config.patch_size}"
    for spec in specs:
        path, _, folder = (spec, "", "") if Path(spec).is_file() else spec.partition("=")
        if spec == "synthetic":
            sources.append(SyntheticScenes(config.image_size, seed))
        elif spec.endswith(".tar"):
            sources += open_shards(spec, config.image_size, suffix, workers, max_faults, rank, world)
        elif Path(path).suffix.lower() in (".json", ".jsonl", ".csv", ".tsv"):
            sources.append(PairTable(Path(path), Path(folder or Path(path).parent), config.image_size, suffix))
        else:
            raise InputError(
                f"--data {spec}: not one of synthetic, CAPTIONS.json=FOLDER, TABLE.tsv, .csv or .jsonl, or SHARDS.tar"
            )
    return sources


def check_caption(caption, name):
    """The caption, if it is one. Raises a Fault."""
    if not isinstance(caption, str) or not caption.strip():
        raise Fault("no caption", name)
    if not caption.isascii() and any(0xD800 <= ord(letter) < 0xE000 for letter in caption):  # what UTF-8 could not read
        raise Fault("caption not in UTF-8", name)
    return caption


def decode_for_training(file, name, image_size):
    """uint8 [H, W, 3]; a JPEG is reduced while it is decoded, if most crops still have image_size pixels. Raises a Fault."""
    try:
        return decode_picture(file, image_size * 3 // 2)
    except Exception as error:  # a damaged file can make a decoder fail in any way
        raise Fault("broken picture", name, first_line(error)) from None


def decode_segments(file, name):
    """Saved superpixels -> int [h, w], or the Fault of having none."""
    try:
        with Image.open(file) as image:
            return np.asarray(image)
    except UNREADABLE as error:
        return Fault("missing superpixels", name, first_line(error))


class PairTable:
    """Picture files with a caption each, listed in one file. Raises InputError for a list that cannot be read.

    A COCO captions JSON, or Karpathy's split of it (of which, as in the paper, "train" is used); or a TSV, CSV or JSONL
    whose columns are a path and a caption, or are named so. Superpixels are sought beside the list, in NAME.superpixels-SIZE-P/.
    """

    PATHS = ("path", "filepath", "file", "file_name", "filename", "image", "image_path")
    CAPTIONS = ("caption", "title", "text")

    def __init__(self, path, folder, image_size, suffix):
        self.path, self.folder, self.image_size = path, folder, image_size
        self.superpixels = path.with_suffix(suffix)
        if not path.is_file() or not folder.is_dir():
            raise InputError(f"{folder if path.is_file() else path}: not there")
        try:
            with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
                rows = list(getattr(self, "read_" + path.suffix.lower()[1:])(file))
            if not rows:
                raise InputError(f"{path}: no pair of a picture and a caption in it")
            # One string and its cuts, where a million small ones would be copied into each worker bit by bit.
            rows = [json.dumps(row).encode() for row in rows]
            self.rows, self.ends = b"".join(rows), np.cumsum([len(row) for row in rows])
            self.order = np.random.RandomState(0).permutation(len(rows))  # COCO's five captions of a picture lie side by side
            names = [str(self.row(i)[0]) for i in self.order[:100]]
            there = any((folder / name).is_file() for name in names)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
            raise InputError(f"{path}: not a list of pictures and captions ({first_line(error)})") from None
        if not there:
            raise InputError(f"{folder / names[0]}: not there, nor others of {path}; name their folder, --data {path}=FOLDER")

    def read_json(self, file):
        content = json.load(file)
        if "annotations" in content:
            names = {image["id"]: image["file_name"] for image in content["images"]}
            return ((names[a["image_id"]], a["caption"]) for a in content["annotations"])
        return (
            (os.path.join(image.get("filepath", ""), image["filename"]), sentence["raw"])
            for image in content["images"]
            if image["split"] == "train"
            for sentence in image["sentences"]
        )

    def read_jsonl(self, file):
        for line in filter(str.strip, file):
            row = json.loads(line)
            yield [next((row[name] for name in names if name in row), "") for names in (self.PATHS, self.CAPTIONS)]

    def read_csv(self, file, **dialect):
        rows = filter(None, csv.reader(file, **dialect))
        first = next(rows, [])
        lower = [cell.strip().lower() for cell in first]
        if set(lower) & set(self.PATHS) and set(lower) & set(self.CAPTIONS):  # a header
            places = [lower.index(next(n for n in names if n in lower)) for names in (self.PATHS, self.CAPTIONS)]
        else:
            places, rows = [0, 1], itertools.chain(filter(None, [first]), rows)
        for row in rows:
            yield tuple(row[place] if place < len(row) else "" for place in places)

    def read_tsv(self, file):
        return self.read_csv(file, delimiter="\t", quoting=csv.QUOTE_NONE)

    def __len__(self):
        return len(self.ends)

    def row(self, i):
        """-> name of the picture, caption."""
        return json.loads(self.rows[self.ends[i - 1] if i else 0 : self.ends[i]])

    def __getitem__(self, i):
        name, caption = self.row(self.order[i])
        if not isinstance(name, str) or not name:
            raise Fault("broken picture", f"{self.path}, a row without a path")
        caption = check_caption(caption, name)
        picture = self.picture(name)
        there = self.superpixels.is_dir()
        return Sample(picture, None, name, caption, decode_segments(self.saved(name), name) if there else None)

    def picture(self, name):
        return decode_for_training(self.folder / name, name, self.image_size)

    def saved(self, name):
        """The file of a picture's superpixels."""
        return self.superpixels / "/".join([part for part in Path(f"{name}.png").parts if part not in ("/", "..")])

    def unsegmented(self):
        """Names of the pictures that have no superpixels yet."""
        names = dict.fromkeys(name for i in range(len(self)) if isinstance(name := self.row(i)[0], str) and name)
        return [name for name in names if not self.saved(name).exists()]

    def save_superpixels(self, results):
        """Writes what comes as (name, PNG as bytes) ..."""
        for name, png in results:
            make_folder(self.saved(name).parent)
            partial = self.saved(name).with_suffix(".part")
            partial.write_bytes(png)
            os.replace(partial, self.saved(name))


class TarShard:
    """The pairs of one tar as img2dataset writes it: NAME.jpg (.png, .webp), and NAME.txt or NAME.json with a "caption".

    Pairs are read where they lie, through an index that is made once and kept as NAME.index.npz beside the tar (or, where
    that cannot be written, in the cache). Superpixels are sought in NAME.superpixels-SIZE-P.zip.
    """

    def __init__(self, path, image_size, suffix):
        self.path, self.image_size = path, image_size
        self.superpixels = path.with_suffix(suffix + ".zip")
        names, _, self.complete = shard_index(path)
        self.length = len(names)

    def __len__(self):
        return self.length

    def reader(self):
        try:
            return ShardReader.of(self.path, self.superpixels, os.getpid())
        except (OSError, tarfile.TarError) as error:
            raise Fault("unreadable shard", self.path, first_line(error)) from None

    def __getitem__(self, i):
        reader = self.reader()
        name, place = reader.entry(i)
        name, caption = f"{self.path}/{name}", reader.read(place[2:4])
        if place[4]:
            try:
                caption = json.loads(caption)["caption"]
            except (ValueError, KeyError, TypeError):
                caption = None
        else:
            caption = caption.decode(errors="surrogateescape")
        caption = check_caption(caption, name)
        return Sample(self.picture(i), None, name, caption, reader.segments(i))

    def picture(self, i):
        reader = self.reader()
        name, place = reader.entry(i)
        return decode_for_training(io.BytesIO(reader.read(place[:2])), f"{self.path}/{name}", self.image_size)

    def unsegmented(self):
        """Numbers of the pictures that have no superpixels yet: all or none."""
        return [] if self.superpixels.exists() else range(len(self))

    def save_superpixels(self, results):
        """Writes what comes as (number, PNG as bytes) ... into a zip, when all of it has come."""
        partial, reader = self.superpixels.with_suffix(".part"), self.reader()
        with zipfile.ZipFile(partial, "w") as archive:
            for i, png in results:
                archive.writestr(reader.entry(i)[0] + ".png", png)
        os.replace(partial, self.superpixels)


class ShardReader:
    """An open tar, its index, and its superpixels where there are some."""

    def __init__(self, path, superpixels):
        self.path, self.file = path, open(path, "rb")
        self.names, self.places, _ = shard_index(path)
        try:
            self.zip = zipfile.ZipFile(superpixels) if superpixels.exists() else None
        except (OSError, zipfile.BadZipFile) as error:
            self.zip = Fault("missing superpixels", superpixels, first_line(error))

    @staticmethod
    @functools.lru_cache(maxsize=SHUFFLE_SHARDS)
    def of(path, superpixels, process):
        """The reader of a shard, from those in use; processes share none, because a zip has one position in its file."""
        return ShardReader(path, superpixels)

    def entry(self, i):
        if i >= len(self.names):
            raise Fault("unreadable shard", self.path, "it has fewer pairs than at the start")
        return self.names[i].decode(errors="replace"), self.places[i].tolist()

    def read(self, place):
        offset, size = place
        try:
            content = os.pread(self.file.fileno(), size, offset)
        except OSError as error:  # a network disk that is gone, say
            raise Fault("unreadable shard", self.path, first_line(error)) from None
        if len(content) < size:
            raise Fault("unreadable shard", self.path, "it is shorter than at the start")
        return content

    def segments(self, i):
        if not isinstance(self.zip, zipfile.ZipFile):
            return self.zip
        name = self.entry(i)[0] + ".png"
        try:
            return decode_segments(io.BytesIO(self.zip.read(name)), f"{self.path}/{name}")
        except Exception as error:  # a damaged file can make a reader fail in any way
            return Fault("missing superpixels", f"{self.path}/{name}", first_line(error))


def shard_index(path):
    """The index of a tar: names [n], places [n, 5] (see scan_tar), and whether it is complete; made if there is none."""
    stat = os.stat(path)
    stamp = [stat.st_size, stat.st_mtime_ns]
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    kept = (path.with_suffix(".index.npz"), cache_dir() / "shards" / f"{digest}.npz")
    for index in kept:
        try:
            with np.load(index, allow_pickle=False) as saved:
                if saved["stamp"].tolist() == stamp:
                    return saved["names"], saved["places"], bool(saved["complete"])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            pass
    names, places, complete = scan_tar(path, stat.st_size)
    for index in kept:
        try:
            index.parent.mkdir(parents=True, exist_ok=True)
            partial = index.with_suffix(f".{os.getpid()}.part")
            with open(partial, "wb") as file:
                np.savez(file, names=names, places=places, complete=complete, stamp=stamp)
            os.replace(partial, index)
            break
        except OSError:
            continue
    return names, places, complete


def scan_tar(path, size):
    """-> names [n] of its pairs; where each lies, int [n, 5]: picture's offset and size, caption's offset and size, and
    whether that is JSON; and whether the tar has its end. Raises OSError or tarfile.TarError for what is no tar."""
    entries, complete = {}, True
    with tarfile.open(path, "r:") as tar:
        while True:
            try:
                member = tar.next()
            except tarfile.TarError:
                member, complete = None, False
            tar.members.clear()
            if member is None:
                break
            folder, base = os.path.split(member.name)
            stem, _, kind = base.partition(".")  # as in webdataset, the name ends at the first dot
            if not member.isfile() or member.offset_data + member.size > size:
                continue
            entry, kind = entries.setdefault(os.path.join(folder, stem), [0] * 5), kind.lower()
            if f".{kind}" in IMAGE_SUFFIXES:
                entry[:2] = member.offset_data, member.size
            elif kind == "txt" or kind == "json" and not entry[3]:
                entry[2:] = member.offset_data, member.size, kind == "json"
        with open(path, "rb") as file:
            complete = complete and os.pread(file.fileno(), 512, tar.offset) == bytes(512)
    if not complete:  # the last pair may be half there
        entries = {name: entry for name, entry in entries.items() if entry[1] and entry[3]}
    names = np.array([name.encode(errors="surrogateescape") for name in entries], "S")
    return names, np.array(list(entries.values()), np.int64).reshape(-1, 5), complete


def expand(pattern):
    """ "cc3m/{00000..00331}.tar" -> its 332 paths; * and ? stand for what is there. Raises InputError for none."""
    if braces := re.search(r"\{(\d+)\.\.(\d+)\}", pattern):
        first, last = braces[1], braces[2]
        if int(last) < int(first):
            raise InputError(f"--data {pattern}: {last} is less than {first}")
        numbers = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
        return [path for n in numbers for path in expand(pattern[: braces.start()] + n + pattern[braces.end() :])]
    paths = sorted(glob.glob(pattern)) if any(c in pattern for c in "*?[") else [pattern]
    if not paths:
        raise InputError(f"--data {pattern}: there is no such file")
    return [Path(path) for path in paths]


class Shards(torch.utils.data.Dataset):
    """The TarShard of each path, or the reason why there is none; a Dataset so that many workers make the indices."""

    def __init__(self, paths, image_size, suffix):
        self.paths, self.settings = paths, (image_size, suffix)

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        try:
            return TarShard(self.paths[i], *self.settings)
        except (OSError, tarfile.TarError) as error:
            return first_line(error)


def open_shards(pattern, image_size, suffix, workers, max_faults, rank, world):
    paths, shards, damaged = expand(pattern), [], []
    if world > 1:  # each process makes its share of the indices; then all find all
        for _ in in_parallel(Shards(paths[rank::world], image_size, suffix), workers):
            pass
        dist.barrier()
    opened = in_parallel(Shards(paths, image_size, suffix), workers)
    for path, shard in zip(paths, progress(opened, len(paths), "shards have an index") if rank == 0 else opened):
        if isinstance(shard, TarShard) and len(shard):
            shards.append(shard)
        if not isinstance(shard, TarShard) or not shard.complete:
            damaged.append(f"{path} ({'it is cut off' if isinstance(shard, TarShard) else shard})")
    whole = [len(shard) for shard in shards if shard.complete]
    if not whole:
        raise InputError(f"--data {pattern}: no shard is whole: {', '.join(damaged[:3])}")
    found, expected = sum(map(len, shards)), len(paths) * sum(whole) / len(whole)
    if damaged:
        line = f"{len(damaged)} of {len(paths)} shards are missing or damaged: {', '.join(damaged[:3])}"
        if found < (1 - max_faults) * expected:
            raise InputError(f"{line}; more than {100 * max_faults:g} % of the pairs are lost (--max-faults)")
        if rank == 0:
            print(f"unreadable shard: {line}; the others are used", file=sys.stderr)
    return shards


# ---------------------------------------------------------------------------------------------------------------------
# Benchmarks, in the folders that mmsegmentation documents


def voc_palette(n=256):
    """The VOC colours: the bits of a class number, dealt out to red, green and blue from the highest bit down."""
    bits = (np.arange(n)[:, None, None] >> (3 * np.arange(8)[:, None] + np.arange(3))) & 1  # [n, 8, 3]
    return (bits << (7 - np.arange(8))[:, None]).sum(axis=1).astype(np.uint8)  # [n, 3]


def value_table(classes):
    """{value in the file: class} -> int [256]; 255 stays 255, which is not scored; any other value is an error, -1."""
    table = np.full(256, -1)
    table[255] = 255
    table[list(classes.keys())] = list(classes.values())
    return table


def identity(n):
    return value_table({i: i for i in range(n)})


def from_one(n):
    """Classes counted from 1; 0 is nothing that is scored. mmsegmentation calls it reduce_zero_label."""
    return value_table({0: 255} | {i + 1: i for i in range(n)})


# The raw COCO-Stuff maps have the category's number less one: 80 things below 90, 91 stuffs from 91 to 181.
COCO_THINGS = sorted(set(range(90)) - {11, 25, 28, 29, 44, 65, 67, 68, 70, 82})
COCO_STUFF_TABLE = value_table({v: i for i, v in enumerate([*COCO_THINGS, *range(91, 182)])})
# Everything but an object is background here, the unlabelled pixels too: none is left out of the score.
COCO_OBJECT_TABLE = value_table({255: 0} | {v: 0 for v in range(91, 182)} | {v: 1 + i for i, v in enumerate(COCO_THINGS)})
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)  # the 19 that are scored
CITYSCAPES_TABLE = value_table({i: 255 for i in range(34)} | {i: c for c, i in enumerate(CITYSCAPES_IDS)})


VOC = listed(
    "aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, table, dog, horse, motorbike, person, "
    "plant, sheep, sofa, train, monitor"
)
CONTEXT = listed(
    "airplane, bag, bed, bedclothes, bench, bicycle, bird, boat, book, bottle, building, bus, cabinet, car, cat, "
    "ceiling, chair, cloth, computer, cow, cup, curtain, dog, door, fence, floor, flower, food, grass, ground, "
    "horse, keyboard, light, motorbike, mountain, mouse, person, plate, platform, plant, road, rock, sheep, "
    "shelves, sidewalk, sign, sky, snow, sofa, table, track, train, tree, truck, monitor, wall, water, window, "
    "wood"
)
COCO = listed(
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,"
    " parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, "
    "umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove,"
    " skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, "
    "sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining "
    "table, toilet, tv, laptop, mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, "
    "refrigerator, book, clock, vase, scissors, teddy bear, hair drier, toothbrush, banner, blanket, branch, "
    "bridge, building-other, bush, cabinet, cage, cardboard, carpet, ceiling-other, ceiling-tile, cloth, clothes,"
    " clouds, counter, cupboard, curtain, desk-stuff, dirt, door-stuff, fence, floor-marble, floor-other, "
    "floor-stone, floor-tile, floor-wood, flower, fog, food-other, fruit, furniture-other, grass, gravel, "
    "ground-other, hill, house, leaves, light, mat, metal, mirror-stuff, moss, mountain, mud, napkin, net, paper,"
    " pavement, pillow, plant-other, plastic, platform, playingfield, railing, railroad, river, road, rock, roof,"
    " rug, salad, sand, sea, shelf, sky-other, skyscraper, snow, solid-other, stairs, stone, straw, "
    "structural-other, table, tent, textile-other, towel, tree, vegetable, wall-brick, wall-concrete, wall-other,"
    " wall-panel, wall-stone, wall-tile, wall-wood, water-other, waterdrops, window-blind, window-other, wood"
)
ADE20K = listed(
    "wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth, "
    "door, table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, "
    "field, armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, "
    "signboard, chest of drawers, counter, sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, "
    "stairs, runway, case, pool table, pillow, screen door, stairway, river, bridge, bookcase, blind, coffee "
    "table, toilet, flower, book, hill, bench, countertop, stove, palm, kitchen island, computer, swivel chair, "
    "boat, bar, arcade machine, hovel, bus, towel, light, truck, tower, chandelier, awning, streetlight, booth, "
    "television receiver, airplane, dirt track, apparel, pole, land, bannister, escalator, ottoman, bottle, "
    "buffet, poster, stage, van, ship, fountain, conveyer belt, canopy, washer, plaything, swimming pool, stool, "
    "barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball, food, step, tank, trade name, microwave,"
    " pot, animal, bicycle, lake, dishwasher, screen, blanket, sculpture, hood, sconce, vase, traffic light, "
    "tray, ashcan, fan, pier, crt screen, plate, monitor, bulletin board, shower, radiator, glass, clock, flag"
)
CITYSCAPES = listed(
    "road, sidewalk, building, wall, fence, pole, traffic light, traffic sign, vegetation, terrain, sky, person, "
    "rider, car, truck, bus, train, motorcycle, bicycle"
)


class Benchmark(NamedTuple):
    """Where a data set keeps what, and what its pixels mean."""

    words: list  # of the classes, without background
    has_background: bool  # whether the pixels of no class are a class of their own
    pictures: str  # folder
    suffix: str  # of the pictures' names
    labels: tuple  # (folder, suffix, value table), ...; the first that is there is read
    split: str | None = None  # file with the names; without it, all pictures in the folder and its folders
    usual_root: str = ""


# fmt: off
BENCHMARKS = {
    "pascal_voc": Benchmark(VOC, True, "JPEGImages", ".jpg",
        (("SegmentationClass", ".png", identity(21)),), "ImageSets/Segmentation/val.txt", "VOCdevkit/VOC2012"),
    "pascal_context": Benchmark(CONTEXT, True, "JPEGImages", ".jpg",
        (("SegmentationClassContext", ".png", identity(60)),), "ImageSets/SegmentationContext/val.txt", "VOCdevkit/VOC2010"),
    "coco_object": Benchmark(COCO[:80], True, "images/val2017", ".jpg",
        (("annotations/val2017", "_instanceTrainIds.png", identity(81)),
         ("annotations/val2017", ".png", COCO_OBJECT_TABLE),
         ("stuffthingmaps/val2017", ".png", COCO_OBJECT_TABLE)), None, "coco_stuff164k"),
    "coco_stuff": Benchmark(COCO, False, "images/val2017", ".jpg",
        (("annotations/val2017", "_labelTrainIds.png", identity(171)),
         ("annotations/val2017", ".png", COCO_STUFF_TABLE),
         ("stuffthingmaps/val2017", ".png", COCO_STUFF_TABLE)), None, "coco_stuff164k"),
    "ade20k": Benchmark(ADE20K, False, "images/validation", ".jpg",
        (("annotations/validation", ".png", from_one(150)),), None, "ade/ADEChallengeData2016"),
    "cityscapes": Benchmark(CITYSCAPES, False, "leftImg8bit/val", "_leftImg8bit.png",
        (("gtFine/val", "_gtFine_labelTrainIds.png", identity(19)),
         ("gtFine/val", "_gtFine_labelIds.png", CITYSCAPES_TABLE)), None, "cityscapes"),
}
# fmt: on
# The same files without the background class: its pixels are not scored.
for _name, _n in (("pascal_voc", 20), ("pascal_context", 59)):
    _whole = BENCHMARKS[_name]
    _labels = tuple((folder, suffix, from_one(_n)) for folder, suffix, _ in _whole.labels)
    BENCHMARKS[f"{_name}{_n}"] = _whole._replace(has_background=False, labels=_labels)


class SegmentationFolder:
    """A benchmark on disk: Samples by number, in the order of its list or of the names. Raises InputError."""

    def __init__(self, name, root):
        self.benchmark, self.root = BENCHMARKS[name], Path(root)
        b = self.benchmark
        self.words, self.has_background, self.palette = b.words, b.has_background, voc_palette()
        advice = f"--data-root should be the folder of {name}" + (f", {b.usual_root}" if b.usual_root else "")
        for path in (b.pictures, b.split):
            if path and not (self.root / path).exists():
                raise InputError(f"{self.root / path}: not there; {advice}")
        if b.split:
            self.names = read_lines(self.root / b.split)
        else:
            folder = self.root / b.pictures
            found = [str(path.relative_to(folder)) for path in visible_files(folder)]
            self.names = [name.removesuffix(b.suffix) for name in found if name.endswith(b.suffix)]
        candidates = [
            self.root / folder / f"{self.names[0] if self.names else '*'}{suffix}" for folder, suffix, _ in b.labels
        ]
        there = [i for i, path in enumerate(candidates) if path.exists()]
        if self.names and not there:
            raise InputError(f"{' or '.join(map(str, candidates))}: not there; {advice}")
        self.labels = b.labels[there[0] if there else 0]

    def __len__(self):
        return len(self.names)

    def picture_path(self, index):
        return self.root / self.benchmark.pictures / f"{self.names[index]}{self.benchmark.suffix}"

    def __getitem__(self, index):
        name, (folder, suffix, table) = self.names[index], self.labels
        picture = read_picture(self.picture_path(index))
        return Sample(picture, read_label(self.root / folder / f"{name}{suffix}", picture, table), name)


class PictureFolder:
    """Pictures of your own, with label maps (class numbers, counted from 0; 255: not scored) where there are some."""

    def __init__(self, pictures, labels, words, has_background=False, paths=None, output=None):
        self.root, self.labels = Path(pictures), labels and Path(labels)
        for folder in (self.root, self.labels):
            if folder and not folder.is_dir():
                raise InputError(f"{folder}: no such folder")
        self.words, self.has_background, self.palette = words, has_background, voc_palette()
        self.table = identity(len(words) + has_background)
        others = [folder.resolve() for folder in (self.labels, output) if folder]  # they may lie in the same folder
        self.paths = paths or [
            path
            for path in visible_files(self.root)
            if path.suffix.lower() in IMAGE_SUFFIXES and not any(map(path.resolve().is_relative_to, others))
        ]
        self.names = [str(p.relative_to(self.root).with_suffix("")) for p in self.paths]
        lower = sorted(name.lower() for name in self.names)  # two names that differ in case are one file on some systems
        for one, other in zip(lower, lower[1:]):
            if one == other:
                raise InputError(f"{self.root / one}: two pictures of this name; their results would be one file")

    def __len__(self):
        return len(self.names)

    def picture_path(self, index):
        return self.paths[index]

    def __getitem__(self, index):
        picture = read_picture(self.paths[index])
        path = self.labels and self.labels / f"{self.names[index]}.png"
        return Sample(picture, read_label(path, picture, self.table) if path and path.exists() else None, self.names[index])


class ClassFolder:
    """Pictures of your own in one folder a class: Samples by number, each with the number of its class as its label."""

    has_background = False

    def __init__(self, root):
        if not Path(root).is_dir():
            raise InputError(f"{root}: no such folder")
        folders = sorted(path for path in Path(root).iterdir() if path.is_dir() and not path.name.startswith("."))
        if not folders:
            raise InputError(f"{root}: no folder in it; there should be one for each class, with its pictures")
        self.folders, self.words = [f.name for f in folders], [f.name.replace("_", " ") for f in folders]
        self.paths, self.classes = [], []
        for c, folder in enumerate(folders):
            paths = [path for path in visible_files(folder) if path.suffix.lower() in IMAGE_SUFFIXES]
            if not paths:
                raise InputError(f"{folder}: no picture in it, and it is a class")
            self.paths, self.classes = self.paths + paths, self.classes + [c] * len(paths)

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return Sample(read_picture(self.paths[index]), self.classes[index], str(self.paths[index]))


# ---------------------------------------------------------------------------------------------------------------------
# The program: superpixels computed once


class SuperpixelJobs(torch.utils.data.Dataset):
    """For each of a source's pictures: what the source calls it, and its superpixels as a PNG, or the Fault of it."""

    def __init__(self, source, todo, image_size, patch_size):
        self.source, self.todo, self.sizes = source, todo, (image_size, patch_size)

    def __len__(self):
        return len(self.todo)

    def __getitem__(self, i):
        try:
            segments = superpixels(self.source.picture(self.todo[i]), *self.sizes)
        except Fault as fault:
            return self.todo[i], fault
        png = io.BytesIO()
        Image.fromarray(segments.astype(np.uint8 if segments.max() < 256 else np.uint16)).save(png, "PNG")
        return self.todo[i], png.getvalue()


def main(argv=None):
    parser = argparse.ArgumentParser(
        usage="python data.py superpixels --data PAIRS [PAIRS ...] [flags]",
        description=__doc__,
        epilog="[x] is the default.",
        formatter_class=ManualPage,
    )
    add = parser.add_argument
    add("what", choices=["superpixels"], help="what is computed once, beside the data; stopped, it goes on where it was")
    add("--data", nargs="+", required=True, metavar="PAIRS", help="as for train.py")
    add("--image-size", type=int, default=224, metavar="N", help="of the model that they are for [%(default)s]")
    add("--patch-size", type=int, default=16, metavar="N", help="of the model that they are for [%(default)s]")
    add("--workers", type=int, default=os.cpu_count(), metavar="N", help="processes that compute [%(default)s]")
    args = parser.parse_args(argv)
    sizes = args.image_size, args.patch_size
    if min(sizes) < 1 or args.workers < 0:
        raise InputError("--image-size and --patch-size must be at least 1, --workers at least 0")
    sources = open_pairs(args.data, argparse.Namespace(image_size=sizes[0], patch_size=sizes[1]), 0, args.workers, 1.0)
    sources = [source for source in sources if not isinstance(source, SyntheticScenes)]
    if not sources:
        raise InputError("synthetic scenes are drawn anew each time: their superpixels cannot be computed before")
    start, counts = time.time(), Counter()
    for source in sources:
        todo = source.unsegmented()
        if todo:
            results = progress(in_parallel(SuperpixelJobs(source, todo, *sizes), args.workers), len(todo), "pictures")
            try:
                source.save_superpixels(counted(results, counts))
            except (OSError, Fault) as error:
                raise InputError(f"{source.superpixels}: cannot be written ({first_line(error)})") from None
            print(f"wrote {source.superpixels}")
    print(
        f"superpixels of {counts['done']} pictures in {time.time() - start:.0f} s, "
        f"{counts['bytes'] / max(counts['done'], 1):.0f} bytes each; {counts['broken']} broken pictures have none"
    )


def counted(results, counts):
    """The results that are superpixels; those, their bytes, and the pictures that have none are counted."""
    for name, result in results:
        if isinstance(result, Fault):
            counts["broken"] += 1
            print(result, file=sys.stderr)
        else:
            counts.update(done=1, bytes=len(result))
            yield name, result


if __name__ == "__main__":
    run_program(main, if_interrupted="stopped; the same command goes on from here")
