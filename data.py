"""What goes in: image-text pairs with superpixels for training, pictures with label maps for evaluation."""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from skimage.segmentation import felzenszwalb

from clip_loader import InputError

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training pictures
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


class Sample(NamedTuple):
    picture: np.ndarray  # uint8 [H, W, 3]
    label: np.ndarray | None  # uint8 [H, W], the class of each pixel; 255 is not scored. Never seen in training.
    name: str
    caption: str = ""


def normalise(image):
    """uint8 [..., 3, H, W] -> float32 as CLIP sees it."""
    mean = torch.tensor(IMAGE_MEAN, device=image.device).view(3, 1, 1)
    std = torch.tensor(IMAGE_STD, device=image.device).view(3, 1, 1)
    return (image.float() / 255 - mean) / std


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
THINGS = {
    "ball": (
        lambda u, v: u * u + v * v < 60**2,
        ("red", "blue", "green", "purple"),
        (250, 250, 245),
        lambda u, v: (u + 10) // 20 % 2 == 0,
    ),
    "star": (
        lambda u, v: ((v < 32) & (v > 2 * abs(u) - 64)) | ((v > -32) & (v < 64 - 2 * abs(u))),
        ("yellow", "orange", "pink"),
        (255, 250, 200),
        lambda u, v: abs(u) + abs(v) < 24,
    ),
    "tree": (
        lambda u, v: (v < 62) & (v > 2 * abs(u) - 64),
        ("green", "brown", "orange"),
        (20, 70, 35),
        lambda u, v: v // 12 % 2 == 0,
    ),
    "house": (
        lambda u, v: (abs(u) < 46) & (v < 56) & (v > abs(u) * 4 // 5 - 62),
        ("red", "yellow", "blue", "grey"),
        (60, 40, 40),
        lambda u, v: (v < -24) | ((abs(abs(u) - 22) < 10) & (abs(v - 14) < 14)),
    ),
    "moon": (
        lambda u, v: (u * u + v * v < 62**2) & ((u - 32) ** 2 + v * v > 46**2),
        ("yellow", "grey"),
        (255, 255, 255),
        lambda u, v: u < -44,
    ),
    "donut": (
        lambda u, v: (u * u + v * v < 62**2) & (u * u + v * v > 24**2),
        ("pink", "brown", "purple"),
        (250, 245, 230),
        lambda u, v: (u // 8 * 5 + v // 8 * 3) % 7 < 2,
    ),
    "heart": (
        lambda u, v: ((abs(u) - 28) ** 2 + (v + 20) ** 2 < 34**2) | ((v > -20) & (v < 60 - 5 * abs(u) // 4)),
        ("red", "pink", "purple"),
        (255, 200, 205),
        lambda u, v: (u + 28) ** 2 + (v + 26) ** 2 < 12**2,
    ),
    "fish": (
        lambda u, v: ((u + 14) ** 2 + 2 * v * v < 48**2) | ((u > 20) & (u < 62) & (abs(v) < u - 16)),
        ("orange", "blue", "grey"),
        (40, 40, 60),
        lambda u, v: (u // 8 % 2 == 0) & (v // 6 % 2 == 0),
    ),
}
# A ground is two colours and, from the pixel's place and some grain (0 to 63), how to mix them (0 to 64). The patterns
# repeat after 8 pixels, the patch size of the default model, so that all patches of a ground look much alike.
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
CAPTIONS = [  # half of them name everything,
    "a photo of {things} on {grounds}.",
    "{things} on {grounds}",
    "there is {things} over {grounds}",
    "{grounds} with {things}",
    "a picture of {grounds} and {things}",
    "look, {things} lying on the {grounds}!",
    # and half only one thing or ground, as people do; without these a word alone would be a text never seen.
    "a photo of {one}.",
    "{one}",
    "there is {one}",
    "a picture of {one}",
    "look, {one}!",
    "we see {one} here",
]


class SyntheticScenes:
    """Scenes number 0, 1, 2, ... of a seed. `split` keeps training and evaluation apart."""

    words, palette = SCENE_WORDS, SCENE_PALETTE
    background_threshold = None  # every pixel has a word

    def __init__(self, size, seed=0, split="train"):
        self.size = size
        self.key = [seed, ["train", "val"].index(split)]
        self.y, self.x = np.mgrid[:size, :size]

    def __len__(self):
        return 500  # as many as are scored; there is a scene for every number

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

        kinds = rng.permutation(len(THINGS))[: rng.randint(1, 4)]
        places = rng.permutation(4)  # one quarter of the picture each, so that none hides another
        things = []
        for kind, place in zip(kinds, places):
            word = list(THINGS)[kind]
            shape, colours, second, pattern = THINGS[word]
            colour = colours[rng.randint(len(colours))]
            u, v = self.coordinates(rng, place, large=len(kinds) == 1)
            where, grain = shape(u, v), rng.randint(-8, 9, (size, size, 1))
            pixels = np.where(pattern(u, v)[..., None], self.jitter(rng, second), self.jitter(rng, COLOURS[colour]))
            picture[where] = (pixels + grain)[where]
            label[where] = len(GROUNDS) + kind
            things.append(f"a {word}" if rng.randint(3) else f"a {colour} {word}")

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

    def coordinates(self, rng, place, large):
        """u and v of every pixel, for a thing of random size and tilt in one quarter of the picture."""
        size = self.size
        cx = size // 4 + place % 2 * size // 2 + rng.randint(-size // 10, size // 10 + 1)
        cy = size // 4 + place // 2 * size // 2 + rng.randint(-size // 10, size // 10 + 1)
        radius = rng.randint(size * 12, size * (21 if large else 18)) // 60
        angle = rng.randint(-30, 31) * math.pi / 180
        # Rounded to integers, so that no machine's sine decides a pixel.
        c, s = round(1024 * math.cos(angle)), round(1024 * math.sin(angle))
        dx, dy = self.x - cx, self.y - cy
        return (c * dx + s * dy) // (16 * radius), (c * dy - s * dx) // (16 * radius)


# ---------------------------------------------------------------------------------------------------------------------
# Superpixels, and crops that keep them aligned


def superpixels(picture, patch_size):
    """Felzenszwalb's segments of a picture uint8 [H, W, 3] -> int [H, W]. Settings of the authors, who have P = 16."""
    return felzenszwalb(picture, scale=224, sigma=0.9, min_size=patch_size**2 * 7 // 8)


def patch_labels(segments, patch_size):
    """The super-patch that each patch belongs to (Section 2.4): the floor of the mean superpixel id. [H, W] -> [N].

    Ids are names and not quantities, so a patch between superpixels 2 and 8 joins superpixel 5, a stranger. We follow the
    paper.
    """
    height, width = segments.shape
    patches = segments.reshape(height // patch_size, patch_size, width // patch_size, patch_size)
    return patches.mean(axis=(1, 3)).astype(np.int64).ravel()


def random_resized_crop(picture, segments, size, rng, scale):
    """A random part of the picture, at least `scale` of its area, and the same part of its superpixels, size x size."""
    height, width = segments.shape
    for _ in range(10):
        area, ratio = height * width * rng.uniform(scale, 1), math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if w <= width and h <= height:
            break
    else:  # too long for any of these: as much of it as the ratio allows
        w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = rng.randint(width - w + 1), rng.randint(height - h + 1)
    box = (left, top, left + w, top + h)
    picture = Image.fromarray(picture).resize((size, size), Image.BICUBIC, box)
    segments = Image.fromarray(segments.astype(np.int32)).resize((size, size), Image.NEAREST, box)
    return np.asarray(picture), np.asarray(segments)


class TrainingPairs(torch.utils.data.Dataset):
    """What a step of training sees: pair i is (picture uint8 [3, H, W], super-patches [N], token ids [T]).

    `source[i]` is a Sample. Pair i is the same whoever asks for it and when.
    """

    def __init__(self, source, tokenizer, config, crop_scale, seed):
        self.source, self.tokenizer, self.config, self.crop_scale, self.seed = (
            source,
            tokenizer,
            config,
            crop_scale,
            seed,
        )

    def __getitem__(self, index):
        sample, rng = self.source[index], np.random.RandomState([self.seed, index])
        size, patch_size = self.config.image_size, self.config.patch_size
        segments = superpixels(sample.picture, patch_size)
        picture, segments = random_resized_crop(sample.picture, segments, size, rng, self.crop_scale)
        text = self.tokenizer(sample.caption, self.config.context_length)[0]
        return torch.tensor(picture).permute(2, 0, 1), torch.tensor(patch_labels(segments, patch_size)), text


# ---------------------------------------------------------------------------------------------------------------------
# Pictures as people have them

UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what Pillow raises on a damaged file


def read_picture(path):
    """Any picture file -> uint8 [H, W, 3], as a viewer would show it. Raises InputError."""
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16-bit grey, which convert() would cut off at 255
                image = Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return np.asarray(image.convert("RGB"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such picture") from None
    except UNREADABLE as error:
        raise InputError(f"{path}: not a picture that can be read ({error})") from None


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


# ---------------------------------------------------------------------------------------------------------------------
# Benchmarks, in the folders that mmsegmentation documents

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


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


def listed(names):
    return [name.strip() for name in names.split(",") if name.strip()]


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
    background_threshold: float | None  # Section 3.1; None where the data set has no background
    pictures: str  # folder
    suffix: str  # of the pictures' names
    labels: tuple  # (folder, suffix, value table), ...; the first that is there is read
    split: str | None = None  # file with the names; without it, all pictures in the folder and its folders
    usual_root: str = ""


BENCHMARKS = {
    "pascal_voc": Benchmark(
        VOC,
        0.75,  # the authors' code has 0.80
        "JPEGImages",
        ".jpg",
        (("SegmentationClass", ".png", identity(21)),),
        "ImageSets/Segmentation/val.txt",
        "VOCdevkit/VOC2012",
    ),
    "pascal_context": Benchmark(
        CONTEXT,
        0.25,
        "JPEGImages",
        ".jpg",
        (("SegmentationClassContext", ".png", identity(60)),),
        "ImageSets/SegmentationContext/val.txt",
        "VOCdevkit/VOC2010",
    ),
    "coco_object": Benchmark(
        COCO[:80],
        0.65,
        "images/val2017",
        ".jpg",
        (
            ("annotations/val2017", "_instanceTrainIds.png", identity(81)),
            ("annotations/val2017", ".png", COCO_OBJECT_TABLE),
            ("stuffthingmaps/val2017", ".png", COCO_OBJECT_TABLE),
        ),
        usual_root="coco_stuff164k",
    ),
    "coco_stuff": Benchmark(
        COCO,
        None,
        "images/val2017",
        ".jpg",
        (
            ("annotations/val2017", "_labelTrainIds.png", identity(171)),
            ("annotations/val2017", ".png", COCO_STUFF_TABLE),
            ("stuffthingmaps/val2017", ".png", COCO_STUFF_TABLE),
        ),
        usual_root="coco_stuff164k",
    ),
    "ade20k": Benchmark(
        ADE20K,
        None,
        "images/validation",
        ".jpg",
        (("annotations/validation", ".png", from_one(150)),),
        usual_root="ade/ADEChallengeData2016",
    ),
    "cityscapes": Benchmark(
        CITYSCAPES,
        None,
        "leftImg8bit/val",
        "_leftImg8bit.png",
        (
            ("gtFine/val", "_gtFine_labelTrainIds.png", identity(19)),
            ("gtFine/val", "_gtFine_labelIds.png", CITYSCAPES_TABLE),
        ),
        usual_root="cityscapes",
    ),
}
# The same files without the background class: its pixels are not scored.
for _name, _n in (("pascal_voc", 20), ("pascal_context", 59)):
    _whole = BENCHMARKS[_name]
    _labels = tuple((folder, suffix, from_one(_n)) for folder, suffix, _ in _whole.labels)
    BENCHMARKS[f"{_name}{_n}"] = _whole._replace(background_threshold=None, labels=_labels)


class SegmentationFolder:
    """A benchmark on disk: Samples by number, in the order of its list or of the names. Raises InputError."""

    def __init__(self, name, root):
        self.benchmark, self.root = BENCHMARKS[name], Path(root)
        b = self.benchmark
        self.words, self.background_threshold, self.palette = b.words, b.background_threshold, voc_palette()
        advice = f"--data-root should be the folder {b.usual_root} of {name}"
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

    def __init__(self, pictures, labels, words, background_threshold=None, paths=None):
        self.root, self.labels = Path(pictures), labels and Path(labels)
        for folder in (self.root, self.labels):
            if folder and not folder.is_dir():
                raise InputError(f"{folder}: no such folder")
        self.words, self.background_threshold, self.palette = words, background_threshold, voc_palette()
        self.table = identity(len(words) + (background_threshold is not None))
        self.paths = paths or [
            path
            for path in visible_files(self.root)
            if path.suffix.lower() in IMAGE_SUFFIXES and not (self.labels and path.is_relative_to(self.labels))
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


def visible_files(folder):
    """All files in a folder and its folders, sorted; without hidden ones."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [path for path in paths if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def read_lines(path):
    """The lines of a text file that are not empty, without the space around them. Raises InputError."""
    try:
        return [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a list of names ({error})") from None
