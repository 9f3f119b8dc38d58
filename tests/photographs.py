"""A data set like your own: images with captions for training, others with label maps for scoring.

python tests/photographs.py                              3,000 and 300 images in ./photographs

The images are JPEGs of 480x360: two to five of the scenes' objects on one to three grounds, with
light that changes from corner to corner. Captions name a part of what is there, with synonyms.
train.tsv lists the images of train/ with their captions; val/ has images, labels/ their label maps,
words.txt the classes.
"""

import functools
import os
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from data import COLOURS, GROUNDS, SCENE_WORDS, THINGS, jitter, parallel_map
from evaluate import Parser, run_program

HEIGHT, WIDTH = 120, 160  # of what is drawn
ENLARGED = 3
SYNONYMS = {
    "grass": "lawn",
    "sand": "beach",
    "water": "lake",
    "snow": "ice",
    "tree": "fir",
    "house": "cottage",
}
CAPTIONS = ["a photo of {}", "{}", "my picture of {}", "{} in the afternoon", "we saw {} there"]


def draw_grounds(rng, image, label):
    """One to three grounds, one beyond the other, behind straight borders."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    slope = rng.uniform(-0.4, 0.4)
    depth = y + slope * (x - WIDTH / 2)
    borders = np.sort(rng.uniform(0.15, 0.85, rng.randint(3))) * HEIGHT
    layer = sum((depth > border).astype(int) for border in borders) + np.zeros_like(x)
    for i, ground in enumerate(rng.permutation(len(GROUNDS))[: len(borders) + 1]):
        low, high, pattern = GROUNDS[SCENE_WORDS[ground]]
        mix = pattern(x, y, rng.randint(0, 64, x.shape))[..., None] / 64
        pixels = jitter(rng, low) * (1 - mix) + jitter(rng, high) * mix
        image[layer == i] = pixels[layer == i]
        label[layer == i] = ground


def draw_things(rng, image, label):
    """Two to five objects with a radius of a twelfth to a fifth of the height."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    for kind in rng.permutation(len(THINGS))[: rng.randint(2, 6)]:
        shape, colours, second, pattern = list(THINGS.values())[kind]
        radius = HEIGHT * rng.uniform(1 / 12, 1 / 5)
        dx = x - rng.uniform(radius, WIDTH - radius)
        dy = y - rng.uniform(radius, HEIGHT - radius)
        angle = rng.uniform(-0.5, 0.5)
        u = (64 / radius * (np.cos(angle) * dx + np.sin(angle) * dy)).astype(int)
        v = (64 / radius * (np.cos(angle) * dy - np.sin(angle) * dx)).astype(int)
        colour = jitter(rng, COLOURS[colours[rng.randint(2)]])
        pixels = np.where(pattern(u, v)[..., None], jitter(rng, second), colour)
        image[shape(u, v)] = pixels[shape(u, v)]
        label[shape(u, v)] = len(GROUNDS) + kind


def draw(rng):
    """-> image and label map of 480x360 pixels, caption."""
    image = np.empty((HEIGHT, WIDTH, 3))
    label = np.empty((HEIGHT, WIDTH), np.uint8)
    draw_grounds(rng, image, label)
    draw_things(rng, image, label)
    light = np.linspace(*rng.uniform(0.7, 1.2, 2), HEIGHT)[:, None]
    light = light * np.linspace(*rng.uniform(0.8, 1.1, 2), WIDTH)
    image = image * light[..., None] + rng.normal(0, 6, image.shape)  # the grain of a camera
    image = Image.fromarray(image.clip(0, 255).astype(np.uint8))
    image = image.resize((ENLARGED * WIDTH, ENLARGED * HEIGHT), Image.BICUBIC)
    seen = rng.permutation(np.unique(label))
    words = [SCENE_WORDS[c] for c in seen[: rng.randint(1, min(4, len(seen)) + 1)]]
    words = [SYNONYMS.get(word, word) if rng.randint(3) == 0 else word for word in words]
    caption = CAPTIONS[rng.randint(len(CAPTIONS))].format(" and ".join(words))
    return image, Image.fromarray(label).resize(image.size, Image.NEAREST), caption


def write(output, number):
    """Writes image `number`, from 0 for training and from -1 downwards for scoring -> caption."""
    image, label, caption = draw(np.random.RandomState([number >= 0, abs(number)]))
    folder = output / ("train" if number >= 0 else "val")
    image.save(folder / f"{abs(number):05}.jpg", quality=85)
    if number < 0:
        label.save(output / "labels" / f"{abs(number):05}.png")
    return caption


def main():
    parser = Parser(__doc__)
    parser.add_argument("--output", type=Path, default="photographs", metavar="DIR")
    parser.add_argument("--images", type=int, default=3000, metavar="N", help="[%(default)s]")
    parser.add_argument("--val", type=int, default=300, metavar="N", help="[%(default)s]")
    args = parser.parse_args()
    for folder in ("train", "val", "labels"):
        (args.output / folder).mkdir(parents=True, exist_ok=True)
    function = functools.partial(write, args.output)
    numbers = [*range(args.images), *range(-args.val, 0)]
    captions = list(parallel_map(function, numbers, os.cpu_count()))
    rows = [f"train/{i:05}.jpg\t{captions[i]}\n" for i in range(args.images)]
    (args.output / "train.tsv").write_text("".join(rows))
    words = [", ".join(filter(None, [word, SYNONYMS.get(word)])) for word in SCENE_WORDS]
    (args.output / "words.txt").write_text("\n".join(words) + "\n")
    print(f"{args.images} images for training and {args.val} for scoring in {args.output}")


if __name__ == "__main__":
    run_program(main, "stopped")
