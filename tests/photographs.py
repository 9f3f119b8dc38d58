"""Synthetic scenes as files, to try training on your own pairs without data.

`python tests/photographs.py` writes photographs/: 3,000 JPEGs, listed with captions in train.tsv,
300 more in val/ with their label maps in labels/, and words.txt.
"""

import sys
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from data import SCENE_WORDS, SyntheticScenes
from evaluate import Parser, run_program


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--images", type=int, default=3000, help="for training [%(default)s]")
    parser.add_argument("--output", type=Path, default="photographs", help="folder [%(default)s]")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    for folder in ("train", "val", "labels"):
        (args.output / folder).mkdir(parents=True, exist_ok=True)
    (args.output / "words.txt").write_text("\n".join(SCENE_WORDS))
    with open(args.output / "train.tsv", "w") as rows:
        for split, count in {"train": args.images, "val": args.images // 10}.items():
            scenes = SyntheticScenes(120, split=split)
            for i in range(count):
                image, label, name, caption = scenes[i]
                image = Image.fromarray(image).resize((480, 360), Image.BICUBIC)
                image.save(args.output / split / f"{name}.jpg")
                if split == "train":
                    rows.write(f"train/{name}.jpg\t{caption}\n")
                else:
                    label = Image.fromarray(label).resize((480, 360), Image.NEAREST)
                    label.save(args.output / "labels" / f"{name}.png")


if __name__ == "__main__":
    run_program(main)
