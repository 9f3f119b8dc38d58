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
    label: np.ndarray  # uint8 [H, W], the class of each pixel; 255 is not scored. Never seen in training.
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
    "brick": ((150, 70, 55), (205, 195, 185), lambda x, y, grain: 56 * ((y % 4 == 0) | ((x + y // 4 * 4) % 8 == 0)) + grain // 8),
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
        self.source, self.tokenizer, self.config, self.crop_scale, self.seed = source, tokenizer, config, crop_scale, seed

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


def read_label(path, picture, num_classes):
    """A label map of the picture's size, uint8 [H, W]: a palette or grey PNG whose values are classes, or 255.

    Raises InputError for another size, another kind of file, or another value.
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
    if strangers := set(np.unique(label).tolist()) - {*range(num_classes), 255}:
        raise InputError(f"{path}: has the value {min(strangers)}, but the classes end at {num_classes - 1} (255: not scored)")
    return label


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
# Benchmarks


def voc_palette(n=256):
    """The VOC colours: the bits of a class number, dealt out to red, green and blue from the highest bit down."""
    bits = (np.arange(n)[:, None, None] >> (3 * np.arange(8)[:, None] + np.arange(3))) & 1  # [n, 8, 3]
    return (bits << (7 - np.arange(8))[:, None]).sum(axis=1).astype(np.uint8)  # [n, 3]


class PascalVOC:
    """PASCAL VOC 2012, the validation split: 20 classes and background, in the folders of VOCdevkit/VOC2012."""

    words = (
        "aeroplane bicycle bird boat bottle bus car cat chair cow table dog horse motorbike person plant sheep sofa train "
        "monitor"
    ).split()
    palette = voc_palette()
    background_threshold = 0.75  # Section 3.1; the authors' code has 0.80

    def __init__(self, root):
        self.root = Path(root)
        split = self.root / "ImageSets" / "Segmentation" / "val.txt"
        for path in (self.root / "JPEGImages", self.root / "SegmentationClass", split):
            if not path.exists():
                raise InputError(f"{path}: not there; --data-root should be the folder VOCdevkit/VOC2012 of PASCAL VOC")
        try:
            self.names = [line.strip() for line in split.read_text().splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{split}: not a list of names ({error})") from None

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        name = self.names[index]
        picture = read_picture(self.root / "JPEGImages" / f"{name}.jpg")
        label = read_label(self.root / "SegmentationClass" / f"{name}.png", picture, 1 + len(self.words))
        return Sample(picture, label, name)
