"""Image-text pairs with superpixels for training, and labelled images for evaluation.

python data.py superpixels --data "cc3m/{00000..00331}.tar"    # computes them before training
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports ends the program without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import contextlib
import csv
import datetime
import functools
import glob
import hashlib
import io
import json
import math
import os
import re
import sys
import tarfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset

from model import IMAGE_MEAN, IMAGE_STD, Config, InputError


class Sample(NamedTuple):
    image: np.ndarray  # uint8 [H, W, 3]
    label: np.ndarray | int | None  # uint8 [H, W] of classes, 255 is not scored; or one class
    name: str
    caption: str = ""
    segments: np.ndarray | None = None  # int [h, w], superpixels computed before training


class SampleError(Exception):
    """A training pair that cannot be used: (kind, text)."""

    KINDS = ["broken image", "no caption in UTF-8"]

    def __str__(self):
        return ": ".join(self.args)


def first_line(error):
    """The first sentence of an exception's message, at most 150 characters."""
    text = repr(error) if isinstance(error, KeyError) else str(error)
    lines = text.splitlines() or [type(error).__name__]
    return lines[0].split(". ")[0][:150]


@contextlib.contextmanager
def reading(path, what):
    """A `with` in which any exception becomes an InputError; a damaged file can cause all kinds.

    A pipe or a device is refused, since it could be read for ever.
    """
    try:
        if not os.path.isfile(path):
            raise OSError("no such file")
        yield
    except Exception as error:
        raise InputError(f"{path}: not a readable {what} ({first_line(error)})") from None


def normalise(image):
    """uint8 [..., 3, H, W] -> float32, with CLIP's mean and standard deviation."""
    mean, std = image_statistics(image.device)
    return (image.float() / 255 - mean) / std


@functools.cache  # copying them to a GPU at each step would wait for the step before
def image_statistics(device):
    return [torch.tensor(values, device=device).view(3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD)]


def parallel_map(function, inputs, workers):
    """Yields function(x) for each x of a list, in order, computed by worker processes."""
    yield from DataLoader(
        inputs,
        batch_size=None,  # so collate_fn gets one item at a time
        collate_fn=function,
        num_workers=workers,
        worker_init_fn=start_worker,
    )


def start_worker(number):
    """A worker outlives Ctrl-C and SIGTERM, until the main process has saved its work."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, args=[os.getppid()], daemon=True).start()


def end_with_parent(parent):
    """torch's workers end with a killed parent only while they wait for work."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def rank_and_world():
    """-> the number of this process, from 0, and how many torchrun started."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def progress(items, total, what):
    """Yields the items; every five seconds prints how many of `total` have come."""
    start = last_line = time.time()
    for n, item in enumerate(items, 1):
        yield item
        if time.time() - last_line > 5:
            last_line = time.time()
            rate = n / (last_line - start)
            eta = datetime.timedelta(seconds=round((total - n) / rate))
            print(f"{n} of {total} {what}, {rate:.1f} per second, ETA {eta}", file=sys.stderr)


# --------------------------------------------------------------------------------------------------
# Synthetic scenes: objects on textured grounds, with a label map and a caption
#
# They are the same on every machine: NumPy has frozen RandomState's stream, and integer arithmetic
# decides every pixel.

# fmt: off
COLOURS = {
    "red": (205, 40, 40), "orange": (235, 130, 30), "yellow": (240, 215, 70),
    "green": (45, 130, 60), "blue": (45, 80, 200), "purple": (130, 55, 165),
    "pink": (240, 140, 185), "brown": (125, 75, 45), "grey": (190, 190, 195),
}
# An object has a shape, two possible colours, a second colour, and a pattern: where this one shows.
# u (to the right) and v (down) are the object's own coordinates, from -64 to 64.
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
    "heart": (lambda u, v: ((abs(u) - 28) ** 2 + (v + 20) ** 2 < 34**2)
            | ((v > -20) & (v < 60 - 5 * abs(u) // 4)),
        ("pink", "purple"), (255, 200, 205), lambda u, v: (u + 28) ** 2 + (v + 26) ** 2 < 12**2),
    "fish": (lambda u, v: ((u + 14) ** 2 + 3 * v * v // 2 < 48**2)
            | ((u > 20) & (u < 62) & (abs(v) < u - 10)),
        ("orange", "blue"), (40, 40, 60), lambda u, v: (u // 8 % 2 == 0) & (v // 6 % 2 == 0)),
}
# A ground has two colours and a pattern: their mixture (0 to 64), from position and grain (to 63).
# Most repeat after 8 pixels, the default patch size, so that all patches of a ground look alike.
GROUNDS = {
    "grass": ((40, 110, 35), (130, 190, 70),
        lambda x, y, grain: grain * (1 + (x + grain // 16) % 3) // 3),
    "sand": ((190, 160, 105), (235, 210, 160),
        lambda x, y, grain: 20 + grain * 2 // 3),
    "water": ((40, 95, 150), (125, 185, 215),
        lambda x, y, grain: 20 * ((y + abs(x % 8 - 4)) // 4 % 2) + grain // 2),
    "brick": ((150, 70, 55), (205, 195, 185),
        lambda x, y, grain: 56 * ((y % 4 == 0) | ((x + y // 4 * 4) % 8 == 0)) + grain // 8),
    "snow": ((215, 225, 235), (255, 255, 255),
        lambda x, y, grain: grain),
    "wood": ((120, 80, 45), (180, 130, 80),
        lambda x, y, grain: 8 * abs(x % 8 - 4) + grain // 2),
}
# fmt: on
SCENE_WORDS = [*GROUNDS, *THINGS]  # the classes, in the order of their labels
CAPTIONS = [  # most name everything in the image,
    "a photo of {things} on {grounds}.",
    "{things} on {grounds}",
    "there is {things} over {grounds} today",
    "{grounds} with {things}",
    "a nice picture of {grounds} and {things}",
    "look, {things} lying on the {grounds}!",
    "my friend found {things} somewhere on {grounds}",
    "{things}, and behind it only {grounds}",
    # some only one object or ground, so that single words are texts that a model has seen
    "a photo of {one}.",
]


class SyntheticScenes:
    """Scenes number 0, 1, 2, ... of a seed, as Samples. split: "train", "val" or "unseen".

    On two grounds in three, one of the two colours of an object never occurs in "train" and "val":
    stars on grass are not orange, stars on water not yellow. "unseen" has only these combinations.
    """

    words = SCENE_WORDS
    has_background = False  # every pixel has a class

    def __init__(self, size, seed=0, split="train"):
        self.size = size
        self.split = split
        self.key = [seed, ["train", "val", "unseen"].index(split)]
        self.name = "synthetic-unseen" if split == "unseen" else "synthetic"
        self.y, self.x = np.mgrid[:size, :size]

    def __len__(self):
        return 24_000 if self.split == "train" else 500  # an epoch; every index has a scene

    def __getitem__(self, index):
        rng = np.random.RandomState([*self.key, index])
        size = self.size
        image = np.empty((size, size, 3), np.int64)
        label = np.empty((size, size), np.uint8)
        grounds = rng.permutation(len(GROUNDS))[: 1 if rng.randint(3) else 2]
        dx = rng.randint(-8, 9)
        dy = rng.choice([-8, 8])
        distance = dx * (self.x - size // 2) + dy * (self.y - size // 2)
        beyond = distance > 8 * rng.randint(-size // 6, size // 6 + 1)  # a straight line
        for ground, where in zip(grounds, [np.ones_like(beyond), beyond]):
            low, high, pattern = GROUNDS[SCENE_WORDS[ground]]
            grain = rng.randint(0, 64, (size, size))
            mix = pattern(self.x + rng.randint(64), self.y + rng.randint(64), grain)[..., None]
            pixels = jitter(rng, low) * (64 - mix) + jitter(rng, high) * mix
            image[where] = pixels[where] // 64
            label[where] = ground
        things = self.draw_things(rng, image, label, grounds)
        grounds = [SCENE_WORDS[ground] for ground in grounds]
        caption = CAPTIONS[rng.randint(len(CAPTIONS))].format(
            things=" and ".join(things),
            grounds=" and ".join(grounds),
            one=(things + grounds)[rng.randint(len(things + grounds))],
        )
        return Sample(image.clip(0, 255).astype(np.uint8), label, f"scene{index:05}", caption)

    def captions(self):
        """Yields some, for a vocabulary: they all have the same words."""
        return (self[i].caption for i in range(min(500, len(self))))

    def draw_things(self, rng, image, label, grounds):
        """Draws one or two objects -> their descriptions."""
        choices = []  # for each kind of object, the colours that it can have here
        for kind in range(len(THINGS)):
            unseen = {(kind + ground) % 3 for ground in grounds}
            choices.append({0, 1} & unseen if self.split == "unseen" else {0, 1} - unseen)
        kinds = [kind for kind in rng.permutation(len(THINGS)) if choices[kind]]
        kinds = kinds[: rng.randint(1, 3)]
        things = []
        for kind, quarter in zip(kinds, rng.permutation(4)):  # so that objects hardly overlap
            word = list(THINGS)[kind]
            shape, colours, second, pattern = THINGS[word]
            colour = colours[rng.choice(sorted(choices[kind]))]
            u, v = self.coordinates(rng, quarter, alone=len(kinds) == 1)
            where = shape(u, v)
            grain = rng.randint(-8, 9, (self.size, self.size, 1))
            second = jitter(rng, second)
            pixels = np.where(pattern(u, v)[..., None], second, jitter(rng, COLOURS[colour]))
            image[where] = (pixels + grain)[where]
            label[where] = len(GROUNDS) + kind
            article = "an" if colour[0] == "o" else "a"
            things.append(f"a {word}" if rng.randint(3) else f"{article} {colour} {word}")
        return things

    def coordinates(self, rng, quarter, alone):
        """u and v of each pixel, for an object of random size, angle and position."""
        size = self.size
        offset = rng.randint(-size // 10, size // 10 + 1, 2)
        cx, cy = size // 4 + np.array([quarter % 2, quarter // 2]) * size // 2 + offset
        if alone:
            cx, cy = rng.randint(size // 4, size * 3 // 4 + 1, 2)
        radius = rng.randint(size * 18, size * (30 if alone else 25)) // 60
        angle = rng.randint(-30, 31) * math.pi / 180
        c = round(1024 * math.cos(angle))  # integers, so that no machine's cosine decides a pixel
        s = round(1024 * math.sin(angle))
        dx = self.x - cx
        dy = self.y - cy
        return (c * dx + s * dy) // (16 * radius), (c * dy - s * dx) // (16 * radius)


def jitter(rng, colour):
    return np.array(colour) + rng.randint(-24, 25, 3)


# --------------------------------------------------------------------------------------------------
# Image files

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")  # EPS would start a program


def open_image(file):
    """A path or an open file -> Pillow's image, not decoded yet. Any exception can come.

    Pillow refuses more than 179 megapixels. Images longer than 100 times their width are refused
    too, since a small one of these needs gigabytes when its short side is enlarged.
    """
    image = Image.open(file, formats=FORMATS)
    if max(image.size) > 100 * min(image.size):
        size = f"{image.width}x{image.height} pixels"
        raise ValueError(f"{size}, one side over 100 times as long as the other")
    return image


def decode_image(file, shortest=None):
    """A path or an open file -> uint8 [H, W, 3], as a viewer shows it. Any exception can come.

    A JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, with sides of at least `shortest` pixels.
    """
    with open_image(file) as image:
        if shortest:
            image.draft(None, (shortest, shortest))
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip at 255
            image = Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def read_image(path):
    """Any image file -> uint8 [H, W, 3]. Raises InputError."""
    with reading(path, "image"):
        return decode_image(path)


def read_label(path, image, table):
    """The label map of an image -> uint8 [H, W] of classes, by a value_table. Raises InputError."""
    height, width = image.shape[:2]
    with reading(path, "label map"), open_image(path) as file:
        fits = file.size == (width, height) and file.mode in ("L", "P")
        label = np.asarray(file) if fits else None
    if not fits:
        needed = f"{width}x{height} in mode L or P"
        raise InputError(f"{path}: is {file.width}x{file.height} in mode {file.mode}, not {needed}")
    classes = table[label]
    if classes.min() < 0:
        value = label[classes < 0].min()
        advice = f"of your own label maps, --ignore {value} leaves it out"
        raise InputError(f"{path}: has the value {value}, which is none of the classes; {advice}")
    return classes.astype(np.uint8)


def resize_bilinear(image, height, width):
    """OpenCV's bilinear resize of uint8 [H, W, 3], bit for bit.

    The benchmarks' published numbers were made with it, and no other library rounds as it does.
    """
    if image.shape[:2] == (height, width):
        return image
    if image.shape[:2] == (2 * height, 2 * width):  # OpenCV's special case: the mean of 2x2 pixels
        blocks = image.reshape(height, 2, width, 2, -1)
        return ((blocks.sum(axis=(1, 3), dtype=np.uint16) + 2) >> 2).astype(np.uint8)

    def neighbours(n_in, n_out):  # of each output pixel: two input pixels, and weights in 11 bits
        position = ((np.arange(n_out) + 0.5) * (1 / (n_out / n_in)) - 0.5).astype(np.float32)
        first = np.floor(position)
        weights = np.rint(2048 * np.stack([first + 1 - position, position - first]))
        before, after = ((first + i).clip(0, n_in - 1).astype(np.int64) for i in (0, 1))
        return before, after, weights.astype(np.int32)

    left, right, weights = neighbours(image.shape[1], width)
    a0, a1 = weights[:, None, :, None]
    above, below, weights = neighbours(image.shape[0], height)
    b0, b1 = weights[:, :, None, None]

    def stretched(rows):  # of the image -> int32 [height, width, 3]
        return (image[rows[:, None], left] * a0 + image[rows[:, None], right] * a1) >> 4

    upper = (b0 * stretched(above)) >> 16
    lower = (b1 * stretched(below)) >> 16
    return ((upper + lower + 2) >> 2).astype(np.uint8)


def split_commas(names):
    """ "cat, dog" -> ["cat", "dog"]."""
    return [name.strip() for name in names.split(",") if name.strip()]


def read_lines(path):
    """The lines of a text file that are not empty, stripped. Raises InputError."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a readable list ({first_line(error)})") from None
    return [line.strip() for line in lines if line.strip()]


def image_files(folder):
    """All images in a folder and its subfolders, sorted, without hidden ones."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in IMAGE_SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]


# --------------------------------------------------------------------------------------------------
# Superpixels, and crops that keep them aligned

# The authors', for image_size 224. The names of saved superpixels depend on them: for another
# algorithm change them too, or delete what is saved.
FELZENSZWALB = {"scale": 224, "sigma": 0.9}


def superpixels(image, image_size, patch_size):
    """Felzenszwalb's segments of an image uint8 [H, W, 3], reduced -> int [h, w] (Section 2.4)."""
    from skimage.segmentation import felzenszwalb  # here, since it takes a while to load

    height, width = reduced_size(*image.shape[:2], image_size)
    image = np.asarray(Image.fromarray(image).resize((width, height), Image.BICUBIC))
    return felzenszwalb(image, min_size=patch_size**2 * 7 // 8, **FELZENSZWALB)


def reduced_size(height, width, short_side):
    """The size with this short side; the long side is at most eight times as long."""
    scale = short_side / min(height, width)
    longest = 8 * short_side
    return tuple(min(max(round(scale * x), short_side), longest) for x in (height, width))


def patch_labels(segments, patch_size, rule="floor"):
    """The super-patch that each patch belongs to (Section 2.4): [H, W] -> [N].

    "floor" is the paper's rule, the floor of the mean id. But ids are names: a patch between
    superpixels 2 and 8 joins superpixel 5, a stranger. "majority" takes the most frequent id.
    """
    rows = segments.shape[0] // patch_size
    columns = segments.shape[1] // patch_size
    patches = segments.reshape(rows, patch_size, columns, patch_size)  # [H/P, P, W/P, P]
    if rule == "floor":
        return patches.mean(axis=(1, 3)).astype(np.int64).ravel()
    ids = patches.transpose(0, 2, 1, 3).reshape(-1, patch_size**2).astype(np.int64)  # [N, P*P]
    return torch.from_numpy(ids).mode().values.numpy()


def random_resized_crop(image, segments, size, rng, scale):
    """A random part, at least `scale` of the area, as torchvision's RandomResizedCrop chooses it.

    image uint8 [H, W, 3], segments int [h, w] -> uint8 [size, size, 3], int [size, size].
    """
    height, width = image.shape[:2]
    for _ in range(10):
        area = height * width * rng.uniform(scale, 1)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w = round(math.sqrt(area * ratio))
        h = round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left = rng.randint(width - w + 1)
            top = rng.randint(height - h + 1)
            break
    else:  # no ratio fits: the center, as much of it as the ratio allows
        w = min(width, round(height * 4 / 3))
        h = min(height, round(width * 4 / 3))
        left = (width - w) // 2
        top = (height - h) // 2
    box = (left, top, left + w, top + h)
    image = Image.fromarray(image).resize((size, size), Image.BICUBIC, box)
    x = segments.shape[1] / width  # superpixels are those of a reduced image
    y = segments.shape[0] / height
    box = (left * x, top * y, (left + w) * x, (top + h) * y)
    segments = Image.fromarray(segments.astype(np.int32)).resize((size, size), Image.NEAREST, box)
    return np.asarray(image), np.asarray(segments)


# --------------------------------------------------------------------------------------------------
# Training pairs: sources -> shuffled -> Batches -> TrainingPairs -> collate
#
# What is seen at a position of training depends on the seed and the position alone, so resumed runs
# and runs of more processes see the same.

SHUFFLE_CHUNK = 10_000  # pairs; larger sources are split into chunks of this size
SHUFFLE_BUFFER = 50_000  # pairs
SHUFFLE_SHARDS = 32  # chunks in the buffer at most


def shuffled(sizes, seed, start=0):
    """Yields indices into sources of these sizes, in the endless order of training from `start` on.

    Each epoch shuffles the chunks, then the pairs of as many as fill a buffer, so that only a few
    shards are in use at a time.
    """
    chunks = []
    for end, size in zip(np.cumsum(sizes).tolist(), sizes):
        for first in range(end - size, end, SHUFFLE_CHUNK):
            chunks.append(range(first, min(first + SHUFFLE_CHUNK, end)))
    epoch, skip = divmod(start, sum(sizes))
    while True:
        rng = np.random.RandomState([seed, epoch])
        buffer = []
        order = rng.permutation(len(chunks))
        for n, chunk in enumerate(order, 1):
            buffer.append(chunks[chunk])
            full = sum(map(len, buffer)) >= SHUFFLE_BUFFER or len(buffer) == SHUFFLE_SHARDS
            if full or n == len(order):
                indices = rng.permutation(np.concatenate(buffer))
                yield from indices[skip:].tolist()
                skip = max(0, skip - len(indices))
                buffer = []
        epoch += 1


@dataclass
class Batches:
    """Batch sampler: for each step, this process's rows of the batch, as (position, index)."""

    sizes: list  # of the sources
    seed: int
    batch_size: int  # of all processes together
    rows: slice
    steps: range

    def __iter__(self):
        start = self.steps.start * self.batch_size
        order = enumerate(shuffled(self.sizes, self.seed, start), start)
        for _ in self.steps:
            yield [next(order) for _ in range(self.batch_size)][self.rows]


@dataclass
class TrainingPairs(Dataset):
    """pairs[position, index] is pair `index`, as it is seen at this position of training.

    -> image uint8 [S, S, 3], super-patches int [N], token ids [T], with prompts [1 + K, T], list of
    SampleErrors.
    """

    source: Dataset  # source[index] is a Sample, or raises SampleError
    tokenizer: object
    config: Config
    crop_scale: float = 1.0
    mirror: bool = False  # half of the crops
    seed: int = 0
    text_length: int | None = None  # tokens; None: the model's context length
    rule: str | None = "floor"  # of patch_labels; None: no superpixels are needed
    nouns: tuple = ()
    templates: tuple = ()
    prompts: int = 0  # GroupViT's, beside the caption

    def __post_init__(self):
        longest = self.config.context_length
        if (self.text_length or 0) > longest:
            raise InputError(f"--text-length {self.text_length}: more than {longest}")

    def __getitem__(self, key):
        position, index = key
        position %= 2**32  # RandomState takes no larger seed
        rng = np.random.RandomState([self.seed, position])
        sample, errors = self.find_sample(position, index)
        segments = self.find_segments(sample)
        size = self.config.image_size
        image, segments = random_resized_crop(sample.image, segments, size, rng, self.crop_scale)
        if self.mirror and rng.randint(2):
            image = image[:, ::-1]
            segments = segments[:, ::-1]
        superpatch = patch_labels(segments, self.config.patch_size, self.rule or "floor")
        texts = self.choose_texts(sample.caption, rng)
        text = self.tokenizer(texts, self.text_length or self.config.context_length)
        return image, superpatch, text.squeeze(0).numpy(), errors

    def find_sample(self, position, index):
        """The Sample at `index`; if it cannot be used, a random one. InputError after 1,000."""
        errors = []
        for tries in range(1, 1001):
            try:
                return self.source[index], errors
            except SampleError as error:
                errors = errors or [error]
                rng = np.random.RandomState([self.seed, position, tries])
                index = rng.randint(len(self.source))
        raise InputError(f"1,000 pairs in a row cannot be used; the first: {errors[0]}")

    def find_segments(self, sample):
        """The superpixels that were saved, or computed now -> int [h, w]."""
        size = reduced_size(*sample.image.shape[:2], self.config.image_size)
        if self.rule is None:
            return np.zeros(size, np.uint8)
        if sample.segments is not None and sample.segments.shape == size:
            return sample.segments
        return superpixels(sample.image, self.config.image_size, self.config.patch_size)

    def choose_texts(self, caption, rng):
        """The caption, or one of its nouns in one of the templates, all equally often (PACL).

        With prompts, the caption and K of its nouns, each in any template; for a noun that is
        missing, the caption (GroupViT).
        """
        if not self.nouns:
            return [caption]
        found = dict.fromkeys(self.noun_pattern.findall(caption.lower()))  # each once, in order
        if self.prompts:
            nouns = rng.permutation(list(found))[: self.prompts]
            texts = [self.templates[rng.randint(len(self.templates))].format(x) for x in nouns]
            return [caption, *texts, *[caption] * (self.prompts - len(texts))]
        texts = [caption, *(template.format(noun) for noun in found for template in self.templates)]
        return [texts[rng.randint(len(texts))]]

    @functools.cached_property
    def noun_pattern(self):
        """Matches the nouns, longest first, and simple plurals: "two dogs" has "dog"."""
        words = sorted(map(str.lower, self.nouns), key=len, reverse=True)
        return re.compile(rf"\b({'|'.join(map(re.escape, words))})(?:e?s)?\b")


@dataclass
class InMemory(Dataset):
    """Pairs of which nothing is random, prepared once."""

    items: list

    def __getitem__(self, key):
        return self.items[key[1]]


def collate(items):
    """Pairs -> image uint8 [B, 3, S, S], super-patches [B, N], token ids [B, T], SampleErrors.

    T is the length of the longest text: nothing attends to the padding after the end token.
    """
    images, superpatches, texts, errors = zip(*items)
    image, superpatch, text = (torch.from_numpy(np.stack(x)) for x in (images, superpatches, texts))
    image = image.permute(0, 3, 1, 2)  # [B, S, S, 3] -> [B, 3, S, S]
    text = text[..., : text.argmax(dim=-1).max() + 1]  # the end token has the largest id
    return image, superpatch, text, [error for each in errors for error in each]


# --------------------------------------------------------------------------------------------------
# Sources of pairs: lists of image files, and tar shards
#
# Both are rows (name, offset, size, caption). The image of a list's row is the file `name`, that of
# a tar's row lies in the tar itself.


def open_pairs(specs, config, seed, workers=0, max_errors=0.01):
    """What --data names -> a list of sources, Datasets of Samples. Raises InputError.

    specs: "synthetic"; a list (COCO's JSON, or one of READERS), with "=FOLDER" for its images; tar
    shards, "cc3m/{00000..00331}.tar" or with * and ?, of which damage may take a share `max_errors`
    of the pairs. Each process indexes its share of the shards.
    """
    sources = []
    for spec in specs:
        path, _, folder = (spec, "", "") if Path(spec).is_file() else spec.partition("=")
        path = Path(path)
        if spec == "synthetic":
            sources.append(SyntheticScenes(config.image_size, seed))
        elif spec.endswith(".tar"):
            sources += open_shards(spec, config, workers, max_errors)
        elif path.suffix.lower() in READERS:
            sources.append(open_list(path, Path(folder or path.parent), config))
        else:
            kinds = "synthetic, CAPTIONS.json=FOLDER, LIST.tsv, .csv, .txt or .jsonl, or SHARDS.tar"
            raise InputError(f"--data {spec}: not one of {kinds}")
    return sources


class Pairs(Dataset):
    """Image-text pairs of one list or tar. pairs[i] is a Sample, or raises SampleError.

    path: the list or the tar. rows: bytes, each row as a line of JSON. folder: of a list's images.
    """

    def __init__(self, path, rows, config, folder=None):
        self.path = path
        self.rows = rows  # one object: workers would copy many small ones
        self.ends = np.flatnonzero(np.frombuffer(rows, np.uint8) == ord("\n"))
        self.folder = folder
        self.shortest = config.image_size * 3 // 2  # of reduced JPEGs; most crops are smaller
        self.superpixels = SuperpixelStore(path, rows, config)

    def __len__(self):
        return len(self.ends)

    def row(self, i):
        """-> name, offset, size, caption."""
        name, *others = json.loads(self.rows[self.ends[i - 1] if i else 0 : self.ends[i]])
        return os.path.join(self.folder or self.path, name), *others

    def __getitem__(self, i):
        name, caption = self.caption(i)
        return Sample(self.image(i), None, name, caption, self.superpixels.read(i))

    def caption(self, i):
        """-> name and caption of row i. Raises SampleError."""
        name, _, _, caption = self.row(i)
        # Surrogates stand for bytes that are not UTF-8.
        if not isinstance(caption, str) or not re.fullmatch("[^\ud800-\udfff]+", caption.strip()):
            raise SampleError("no caption in UTF-8", name)
        return name, caption

    def captions(self):
        """Yields all that can be used, without opening an image."""
        for i in range(len(self)):
            with contextlib.suppress(SampleError):
                yield self.caption(i)[1]

    def image(self, i):
        """Decodes the image of row i -> uint8 [H, W, 3]. Raises SampleError."""
        name, offset, size, _ = self.row(i)
        try:
            file = name if self.folder else read_part(self.path, offset, size)
            return decode_image(file, self.shortest)
        except Exception as error:  # a damaged file can make a decoder fail in any way
            raise SampleError("broken image", f"{name} ({first_line(error)})") from None


def pack(rows):
    """(name, offset, size, caption) ... -> bytes, each row as a line of JSON."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def read_part(path, offset, size):
    """`size` bytes at `offset` of a file -> BytesIO; fewer where the file ends. Raises OSError."""
    return io.BytesIO(os.pread(open_file(path).fileno(), size, offset))


@functools.lru_cache(2 * SHUFFLE_SHARDS)  # keeps tars and their superpixels open
def open_file(path):
    return open(path, "rb")


class SuperpixelStore:
    """The saved superpixels of Pairs: PNGs one after the other in NAME.superpixels-SIZE-P-KEY.bin.

    KEY is a hash of the rows and of FELZENSZWALB. places, from the .npy beside it, int64
    [pairs, 2]: where a pair's PNG begins and ends, 0 and 0 if it has none. None without a file.
    """

    def __init__(self, path, rows, config):
        key = hashlib.sha256(rows)
        key.update(repr(FELZENSZWALB).encode())
        name = f"superpixels-{config.image_size}-{config.patch_size}-{key.hexdigest()[:8]}"
        self.data = path.with_suffix(f".{name}.bin")

    @functools.cached_property
    def places(self):
        try:
            return np.load(self.data.with_suffix(".npy"), mmap_mode="r")
        except (OSError, ValueError, EOFError):  # no file, or a damaged one
            return None

    def read(self, i):
        """-> int [h, w]; None if they were not computed or are damaged."""
        with contextlib.suppress(Exception):
            first, last = self.places[i].tolist()
            png = read_part(self.data, first, last - first)
            return np.asarray(Image.open(png, formats=["PNG"]))
        return None


# Lists of image files

COLUMNS = (
    ("path", "filepath", "file", "file_name", "filename", "image", "image_name", "image_path"),
    ("caption", "title", "text", "comment"),
)


def open_list(path, folder, config):
    """A list of image files with captions -> Pairs. Raises InputError.

    Rows whose image does not exist, and those that cannot be read, are left out and counted.
    """
    rows = []
    missing = []
    is_file = functools.cache(os.path.isfile)
    with (
        reading(path, "list of pairs"),
        open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file,
    ):
        for n, (name, caption) in enumerate(READERS[path.suffix.lower()](file), 1):
            image = os.path.join(folder, str(name))
            if is_file(image):
                rows.append((str(name), 0, 0, caption))
            else:
                missing.append(f"{image} (row {n})")
    if not rows:
        wrong = f"{missing[0]} does not exist, nor any other" if missing else "no pair in it"
        names = " and ".join("/".join(names) for names in COLUMNS)
        advice = f"--data {path}=FOLDER names the folder of the images"
        raise InputError(f"{path}: {wrong}; {advice}; columns are a path and a caption, or {names}")
    if missing and rank_and_world()[0] == 0:
        count = f"{len(missing):,} of {len(missing) + len(rows):,} rows"
        print(f"{path}: no image for {count}, the first {missing[0]}", file=sys.stderr)
    # COCO's captions of one image stand side by side.
    order = np.random.RandomState(0).permutation(len(rows))
    return Pairs(path, pack(rows[i] for i in order), config, folder)


def read_json(file):
    """COCO's captions, or Karpathy's split of them, of which the paper uses "train"."""
    content = json.load(file)
    if "annotations" in content:
        names = {image.get("id"): image.get("file_name") for image in content["images"]}
        for annotation in content["annotations"]:
            yield names.get(annotation.get("image_id")), annotation.get("caption")
        return
    for image in content["images"]:
        if image["split"] == "train":
            for sentence in image["sentences"]:
                yield os.path.join(image.get("filepath", ""), image["filename"]), sentence["raw"]


def read_jsonl(file):
    for line in filter(str.strip, file):
        row = "", ""
        with contextlib.suppress(Exception):  # a line can hold anything
            row = choose_columns(json.loads(line))
        yield row


def read_table(file):
    """Two columns, a path and a caption, or any with a header that names these.

    They stand between tabs, commas or, in Flickr30k, "|". Flickr8k's NAME.jpg#0 is NAME.jpg.
    """
    first = file.readline()
    delimiter = next((mark for mark in "\t," if mark in first), "|")
    header = [cell.strip().lower() for cell in first.split(delimiter)]
    if not all(set(names) & set(header) for names in COLUMNS):
        header = ["path", "caption"]
        file.seek(0)
    csv.field_size_limit(2**31 - 1)  # a caption may be longer than 131,072 characters
    quoting = csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE
    for row in csv.DictReader(file, header, delimiter=delimiter, quoting=quoting):
        name, caption = choose_columns(row)
        yield re.sub(r"#\d+$", "", name), caption


def choose_columns(row):
    """{column: value} -> path and caption, "" where there is none."""
    return [next(filter(None, map(row.get, names)), "") for names in COLUMNS]


READERS = {".json": read_json, ".jsonl": read_jsonl}
READERS |= dict.fromkeys((".csv", ".tsv", ".txt"), read_table)


# Tar shards of img2dataset: NAME.jpg (.png, .webp), and NAME.txt or NAME.json with a "caption"


def open_shards(pattern, config, workers, max_errors):
    """The shards that a pattern names -> list of Pairs. Raises InputError."""
    rank, world = rank_and_world()
    paths = expand(pattern)
    if world > 1:  # then every process finds all indices
        for _ in parallel_map(index_shard, paths[rank::world], workers):
            pass
        dist.barrier()
    indices = parallel_map(index_shard, paths, workers)
    if rank == 0:
        indices = progress(indices, len(paths), "shards have an index")
    indices = list(indices)
    shards = [Pairs(path, rows, config) for path, rows, _ in indices if rows]
    complete = [rows.count(b"\n") for _, rows, error in indices if not error]
    expected = len(paths) * (np.mean(complete) if complete else np.inf)
    damaged = [
        f"{path} ({error or 'no pair'})" for path, rows, error in indices if error or not rows
    ]
    line = f"{len(damaged)} of {len(paths)} shards are missing or damaged: {', '.join(damaged[:3])}"
    if not shards:
        raise InputError(f"--data {pattern}: {line}")
    if sum(map(len, shards)) < (1 - max_errors) * expected:
        lost = f"more than {100 * max_errors:g} % of the pairs are lost (--max-errors)"
        raise InputError(f"--data {pattern}: {line}; {lost}")
    if damaged and rank == 0:
        print(f"{line}; the others are used", file=sys.stderr)
    return shards


def expand(pattern):
    """ "cc3m/{00000..00331}.tar" -> 332 paths; * and ? match existing files."""
    if braces := re.search(r"\{(\d+)\.\.(\d+)\}", pattern):
        first, last = braces.groups()
        numbers = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
        return [path for n in numbers for path in expand(pattern.replace(braces[0], n, 1))]
    return [Path(path) for path in sorted(glob.glob(pattern)) or [pattern]]


def index_shard(path):
    """-> path, rows, and what is wrong with the tar, "" if nothing.

    The rows of a whole tar are kept as NAME.index beside it, if the folder is writable.
    """
    index = path.with_suffix(".index")
    if not path.is_file():
        return path, b"", "no such file"
    try:
        stat = os.stat(path)
        stamp = b"rows of %d bytes, %d ns\n" % (stat.st_size, stat.st_mtime_ns)
        content = index.read_bytes() if index.is_file() else b""
        if not content.startswith(stamp):
            rows, error = scan_tar(path, stat.st_size)
            if error:
                return path, rows, error
            content = stamp + rows
            partial = index.with_suffix(f".{os.getpid()}.part")
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
                with open(partial, "xb") as file:  # never through a link that is there
                    file.write(content)
                os.replace(partial, index)
    except Exception as error:  # a damaged tar can fail in any way
        return path, b"", first_line(error)
    return path, content.removeprefix(stamp), ""


def scan_tar(path, size):
    """-> the rows of a tar of `size` bytes, and what is wrong with it. Raises for other files."""
    pairs = {}
    with tarfile.open(path, "r:") as tar:
        read = functools.partial(os.pread, tar.fileobj.fileno())
        with contextlib.suppress(Exception):  # a damaged header
            while (member := tar.next()) and member.size >= 0:  # others lead back, for ever
                tar.members.clear()
                folder, base = os.path.split(member.name)
                stem, _, kind = base.partition(".")  # as in webdataset: at the first dot
                pair = pairs.setdefault(os.path.join(folder, stem), {})
                kind = kind.lower()
                place = (member.size, member.offset_data)
                if not member.isfile() or sum(place) > size:
                    continue
                if f".{kind}" in IMAGE_SUFFIXES:
                    pair["image"] = place[::-1]
                elif kind == "txt":
                    pair["caption"] = read(*place).decode(errors="surrogateescape")
                elif kind == "json":
                    with contextlib.suppress(Exception):  # it can hold anything
                        pair.setdefault("caption", json.loads(read(*place))["caption"])
        is_cut = member is not None or read(512, tar.offset) != bytes(512)
    rows = [
        (name, *pair.get("image", (0, 0)), pair.get("caption"))
        for name, pair in pairs.items()
        if len(pair) > is_cut  # then the last pair may be incomplete
    ]
    return pack(rows), "it is cut off or damaged" if is_cut else ""


# --------------------------------------------------------------------------------------------------
# Labelled images: benchmarks in the folders that mmsegmentation documents, and your own


def value_table(values, ignored=()):
    """The class of each value in a label map, int [256]: class c has values[c], one or a list.

    255 and the ignored values are not scored, 255; all others are errors, -1.
    """
    table = np.full(256, -1, np.int16)
    table[[255, *ignored]] = 255
    for c, value in enumerate(values):
        table[value] = c
    return table


# COCO-Stuff's raw maps hold the category's number less one: 80 things, then 91 stuffs from 91 on.
COCO_THINGS = sorted(set(range(90)) - {11, 25, 28, 29, 44, 65, 67, 68, 70, 82})
COCO_STUFF_TABLE = value_table([*COCO_THINGS, *range(91, 182)])
# In COCO-Object, everything but an object is background, the unlabelled pixels too.
COCO_OBJECT_TABLE = value_table([[255, *range(91, 182)], *COCO_THINGS])
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)


# fmt: off
VOC = split_commas("""
aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, table, dog, horse, motorbike,
person, plant, sheep, sofa, train, monitor
""")
CONTEXT = split_commas("""
airplane, bag, bed, bedclothes, bench, bicycle, bird, boat, book, bottle, building, bus, cabinet,
car, cat, ceiling, chair, cloth, computer, cow, cup, curtain, dog, door, fence, floor, flower,
food, grass, ground, horse, keyboard, light, motorbike, mountain, mouse, person, plate, platform,
plant, road, rock, sheep, shelves, sidewalk, sign, sky, snow, sofa, table, track, train, tree,
truck, monitor, wall, water, window, wood
""")
COCO = split_commas("""
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant,
stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra,
giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite,
baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork,
knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut,
cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, mouse, remote, keyboard,
cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear,
hair drier, toothbrush, banner, blanket, branch, bridge, building-other, bush, cabinet, cage,
cardboard, carpet, ceiling-other, ceiling-tile, cloth, clothes, clouds, counter, cupboard,
curtain, desk-stuff, dirt, door-stuff, fence, floor-marble, floor-other, floor-stone, floor-tile,
floor-wood, flower, fog, food-other, fruit, furniture-other, grass, gravel, ground-other, hill,
house, leaves, light, mat, metal, mirror-stuff, moss, mountain, mud, napkin, net, paper, pavement,
pillow, plant-other, plastic, platform, playingfield, railing, railroad, river, road, rock, roof,
rug, salad, sand, sea, shelf, sky-other, skyscraper, snow, solid-other, stairs, stone, straw,
structural-other, table, tent, textile-other, towel, tree, vegetable, wall-brick, wall-concrete,
wall-other, wall-panel, wall-stone, wall-tile, wall-wood, water-other, waterdrops, window-blind,
window-other, wood
""")
ADE20K = split_commas("""
wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk,
person, earth, door, table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf,
house, sea, mirror, rug, field, armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub,
railing, cushion, base, box, column, signboard, chest of drawers, counter, sand, sink, skyscraper,
fireplace, refrigerator, grandstand, path, stairs, runway, case, pool table, pillow, screen door,
stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill, bench,
countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, hovel,
bus, towel, light, truck, tower, chandelier, awning, streetlight, booth, television receiver,
airplane, dirt track, apparel, pole, land, bannister, escalator, ottoman, bottle, buffet, poster,
stage, van, ship, fountain, conveyer belt, canopy, washer, plaything, swimming pool, stool,
barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball, food, step, tank, trade name,
microwave, pot, animal, bicycle, lake, dishwasher, screen, blanket, sculpture, hood, sconce, vase,
traffic light, tray, ashcan, fan, pier, crt screen, plate, monitor, bulletin board, shower,
radiator, glass, clock, flag
""")
CITYSCAPES = split_commas("""
road, sidewalk, building, wall, fence, pole, traffic light, traffic sign, vegetation, terrain,
sky, person, rider, car, truck, bus, train, motorcycle, bicycle
""")
# fmt: on


class Benchmark(NamedTuple):
    """Where a data set keeps its files, and what the values of its label maps mean."""

    words: list  # names of the classes, without background
    has_background: bool  # whether the pixels of no class are a class of their own
    images: str  # folder
    suffix: str  # of the images' names
    # (folder, suffix, value table), ...; the first that exists is read. In a table, background
    # comes before the words.
    labels: tuple
    split: str | None  # file with the names; None: all images in the folder and its subfolders
    root: str  # the usual folder


# fmt: off
BENCHMARKS = {
    "pascal_voc": Benchmark(VOC, True, "JPEGImages", ".jpg",
        (("SegmentationClass", ".png", value_table(range(21))),),
        "ImageSets/Segmentation/val.txt", "VOCdevkit/VOC2012"),
    "pascal_context": Benchmark(CONTEXT, True, "JPEGImages", ".jpg",
        (("SegmentationClassContext", ".png", value_table(range(60))),),
        "ImageSets/SegmentationContext/val.txt", "VOCdevkit/VOC2010"),
    "coco_object": Benchmark(COCO[:80], True, "images/val2017", ".jpg",
        (("annotations/val2017", "_instanceTrainIds.png", value_table(range(81))),
         ("annotations/val2017", ".png", COCO_OBJECT_TABLE),
         ("stuffthingmaps/val2017", ".png", COCO_OBJECT_TABLE)), None, "coco_stuff164k"),
    "coco_stuff": Benchmark(COCO, False, "images/val2017", ".jpg",
        (("annotations/val2017", "_labelTrainIds.png", value_table(range(171))),
         ("annotations/val2017", ".png", COCO_STUFF_TABLE),
         ("stuffthingmaps/val2017", ".png", COCO_STUFF_TABLE)), None, "coco_stuff164k"),
    "ade20k": Benchmark(ADE20K, False, "images/validation", ".jpg",
        (("annotations/validation", ".png", value_table(range(1, 151), [0])),),
        None, "ade/ADEChallengeData2016"),
    "cityscapes": Benchmark(CITYSCAPES, False, "leftImg8bit/val", "_leftImg8bit.png",
        (("gtFine/val", "_gtFine_labelTrainIds.png", value_table(range(19))),
         ("gtFine/val", "_gtFine_labelIds.png", value_table(CITYSCAPES_IDS, range(34)))),
        None, "cityscapes"),
}
# fmt: on
# The same files without the background class: its pixels are not scored.
for _name, _n in (("pascal_voc", 20), ("pascal_context", 59)):
    ((_folder, _suffix, _),) = BENCHMARKS[_name].labels
    _labels = ((_folder, _suffix, value_table(range(1, _n + 1), [0])),)
    BENCHMARKS[f"{_name}{_n}"] = BENCHMARKS[_name]._replace(has_background=False, labels=_labels)


class LabelledImages(Dataset):
    """Images with labels, each the path of a label map, a class or None, as Samples."""

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        image = read_image(self.paths[index])
        label = self.labels[index]
        if isinstance(label, Path):
            label = read_label(label, image, self.table)
        return Sample(image, label, self.names[index])


class SegmentationFolder(LabelledImages):
    """A benchmark on disk, in the order of its list or of the file names. Raises InputError."""

    def __init__(self, name, root):
        benchmark = BENCHMARKS[name]
        self.name = name
        self.words = benchmark.words
        self.has_background = benchmark.has_background

        def find(*places):
            paths = [Path(root, place) for place in places]
            for path in paths:
                if path.exists():
                    return path
            advice = f"--data-root should be the folder of {name}, for example {benchmark.root}"
            raise InputError(f"{' or '.join(map(str, paths))}: does not exist; {advice}")

        images = find(benchmark.images)
        end = benchmark.suffix
        if benchmark.split:
            self.names = read_lines(find(benchmark.split))
        else:
            files = [str(path.relative_to(images)) for path in image_files(images)]
            self.names = [file.removesuffix(end) for file in files if file.endswith(end)]
        if not self.names:
            raise InputError(f"{root}: no image to label")
        self.paths = [images / f"{name}{end}" for name in self.names]
        first = self.names[0]
        maps = [Path(folder, f"{first}{suffix}") for folder, suffix, _ in benchmark.labels]
        found = find(*maps).relative_to(root)
        folder, suffix, self.table = benchmark.labels[maps.index(found)]
        self.labels = [Path(root, folder, f"{name}{suffix}") for name in self.names]


class ImageFolder(LabelledImages):
    """Your own images: all in a folder, or one. Raises InputError.

    labels: a folder of label maps, NAME.png for NAME.jpg, classes from 0. output: a folder of
    results, whose images are no input. ignored: values in the label maps that are not scored.
    """

    name = "images"

    def __init__(self, path, labels, words, has_background=False, output=None, ignored=()):
        path = Path(path)
        if not path.exists():
            raise InputError(f"{path}: does not exist")
        self.words = words
        self.has_background = has_background
        self.table = value_table(range(len(words) + has_background))
        self.table[list(ignored)] = 255
        others = {Path(folder).resolve() for folder in (labels, output) if folder}
        files = [file for file in image_files(path) if others.isdisjoint(file.resolve().parents)]
        self.paths = files if path.is_dir() else [path]
        if not self.paths:
            raise InputError(f"{path}: no image to label (label maps need a folder of their own)")
        root = path if path.is_dir() else path.parent
        self.names = [str(file.relative_to(root).with_suffix("")) for file in self.paths]
        maps = [Path(labels or "", f"{name}.png") for name in self.names]
        self.labels = [file if labels and file.is_file() else None for file in maps]
        if labels and not any(self.labels):
            raise InputError(f"{maps[0]}: does not exist, nor a label map of any other image")
        lower = sorted(map(str.lower, self.names))  # some file systems ignore case
        for one, other in zip(lower, lower[1:]):
            if one == other:
                raise InputError(f"{root / one}: two images of this name, but one result")


class ClassFolder(LabelledImages):
    """Images in one folder per class. Raises InputError."""

    name = "classify"
    has_background = False

    def __init__(self, root):
        root = Path(root)
        folders = [path for path in sorted(root.glob("[!.]*")) if path.is_dir()]
        if not folders:
            raise InputError(f"{root}: no such folder, or no folder in it; it needs one per class")
        self.folders = [folder.name for folder in folders]
        self.words = [name.replace("_", " ") for name in self.folders]
        self.paths = []
        self.labels = []
        for c, folder in enumerate(folders):
            files = image_files(folder)
            if not files:
                raise InputError(f"{folder}: no image in it, and it is a class")
            self.paths += files
            self.labels += [c] * len(files)
        self.names = list(map(str, self.paths))


# --------------------------------------------------------------------------------------------------
# python data.py superpixels


def segment_to_png(source, config, i):
    """The superpixels of row i of Pairs -> a PNG; b"" for a broken image, which is reported."""
    try:
        segments = superpixels(source.image(i), config.image_size, config.patch_size)
    except SampleError as error:
        print(error, file=sys.stderr)
        return b""
    png = io.BytesIO()
    dtype = np.uint8 if segments.max() < 256 else np.uint16
    Image.fromarray(segments.astype(dtype)).save(png, "PNG")
    return png.getvalue()


def compute_superpixels(source, config, workers):
    """Computes and saves those that Pairs lack, and prints how many."""
    store = source.superpixels
    index = store.data.with_suffix(".npy")
    if store.places is None or not store.data.exists():
        np.save(index, np.zeros((len(source), 2), np.int64))
    places = np.load(index, mmap_mode="r+")
    images = {}  # the rows of each
    for i in np.flatnonzero(places[:, 1] == 0):
        images.setdefault(source.row(i)[0], []).append(i)
    compute = functools.partial(segment_to_png, source, config)
    pngs = parallel_map(compute, [rows[0] for rows in images.values()], workers)
    broken = 0
    with open(store.data, "ab", buffering=0) as file:
        for rows, png in zip(images.values(), progress(pngs, len(images), "images")):
            file.write(png)
            places[rows] = (file.tell() - len(png), file.tell()) if png else 0
            broken += not png
    line = f"superpixels of {len(images) - broken} images; {broken} broken images"
    print(f"{store.data}: {line}")


def main(argv=None):
    from evaluate import Parser, number  # which imports this file

    parser = Parser(__doc__)
    add = functools.partial(parser.add_argument, metavar="N")
    parser.add_argument("what", choices=["superpixels"], help="stopped, the same command continues")
    parser.add_argument("--data", nargs="+", required=True, metavar="PAIRS", help="as for train.py")
    add("--image-size", type=int, default=224, help="of the model [%(default)s]")
    add("--patch-size", type=int, default=16, help="of the model [%(default)s]")
    add("--workers", type=number(int, 0), default=os.cpu_count(), help="processes [%(default)s]")
    args = parser.parse_args(argv)
    config = Config(image_size=args.image_size, patch_size=args.patch_size)
    for source in open_pairs(args.data, config, 0, args.workers, max_errors=1.0):
        if isinstance(source, Pairs):
            compute_superpixels(source, config, args.workers)


if __name__ == "__main__":
    from evaluate import run_program

    run_program(main, "stopped; the same command continues")
