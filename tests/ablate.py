"""The paper's ablations on synthetic scenes: what each part does to the small default.

python tests/ablate.py          over an hour on two cores; stopped, the same command goes on

Each row is `python train.py` with other flags, shorter than the default, scored by
tests/analyse.py; the seed decides the scenes, their order, the new weights and all noise.
Runs lie in runs/ablation/STEPS/ROW/SEED, and are not done again: after a change of the code, give
another --output.
"""

import argparse
import contextlib
import functools
import json
import multiprocessing
import os
import shutil
import signal
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import train
import analyse
from data import SyntheticScenes, superpixels
from evaluate import Parser, run_program

ROWS = {  # name: (what, flags of train.py or None, flags of evaluate.py, the paper's mIoU on VOC)
    "default": ("the default: all losses, 16 centers, 1 cross-attention layer", "", "", "52.60"),
    "con": (
        "*Table 1*: contrastive loss alone",
        "--reconstruction-weight 0 --superpixel-weight 0",
        "",
        "47.95",
    ),
    "con-rec": ("with reconstruction", "--superpixel-weight 0", "", "49.14"),
    "con-sup": ("with superpixels", "--reconstruction-weight 0", "", "48.49"),
    "after-1": (
        "*Table 2*: group module after block 1 of 3",
        "--first-stage-layers 1",
        "",
        "43.75 (8 of 12)",
    ),
    "after-0": ("before all blocks", "--first-stage-layers 0", "", "35.28 (6 of 12)"),
    "centers-4": ("4 centers", "--num-centers 4", "", "47.03 (6)"),
    "centers-8": ("8 centers", "--num-centers 8", "", "47.95 (8)"),
    "centers-32": ("32 centers", "--num-centers 32", "", "44.89 (10)"),
    "cross-0": ("*Table 3*: no cross-attention", "--cross-layers 0", "", "44.44 (1 layer: 47.63)"),
    "cross-2": ("2 layers", "--cross-layers 2", "", "47.95"),
    "after-3": ("after all blocks", "--first-stage-layers 3", "", ""),
    "key-gain-1": ("keys whose norm starts with a gain of 1", "--key-gain 1", "", ""),
    "start": ("*The authors' start of the weights*", "{start}", "", ""),
    "start-cross-0": ("no cross-attention", "{start} --cross-layers 0", "", ""),
    "start-cross-2": ("2 layers", "{start} --cross-layers 2", "", ""),
    "start-after-1": (
        "group module after block 1 of 3",
        "{start} --first-stage-layers 1",
        "",
        "",
    ),
    "start-after-3": ("after all blocks", "{start} --first-stage-layers 3", "", ""),
    "init": (
        "*Table 4*: from the weights of the CLIP below",
        "--init {clip} --first-stage-layers 2",
        "",
        "52.6 (without: 33.3)",
    ),
    "init-cross-2": (
        "from them, 2 cross-attention layers",
        "--init {clip} --first-stage-layers 2 --cross-layers 2",
        "",
        "",
    ),
    "init-after-1": (
        "from them, group module after block 1 of 3",
        "--init {clip} --first-stage-layers 1",
        "",
        "",
    ),
    "majority": (
        "*Not the paper's*: patches join the superpixel that most of them is",
        "--superpatch majority",
        "",
        "",
    ),
    "sup-1/L": (
        "superpixel loss divided by L, as in the authors' program",
        "--superpixel-weight 0.0625",
        "",
        "",
    ),
    "no-top-k": (
        "the default without the authors' choice of five words",
        None,
        "--checkpoint {default} --top-k 14",
        "",
    ),
    "nouns": ("the default, of the nouns that PACL has below", "--nouns synthetic", "", ""),
    "clip": (
        "*Without a group module*: the same encoder trained as CLIP",
        "--method clip",
        "",
        "16.4",
    ),
    "maskclip": ("read as MaskCLIP", None, "--checkpoint {clip} --readout maskclip", "43.4"),
    "sclip": ("read as SCLIP", None, "--checkpoint {clip} --readout sclip", "59.1"),
    "clearclip": ("read as ClearCLIP", None, "--checkpoint {clip} --readout clearclip", "51.8"),
    "naclip": ("read as NACLIP", None, "--checkpoint {clip} --readout naclip", "58.9"),
    "keymean": ("read as mean of keys", None, "--checkpoint {clip} --readout keymean", "59.1"),
    "groupvit-1": ("*GroupViT*: one stage", "--method groupvit --stages 1", "", "28.1"),
    "groupvit-2": ("two stages", "--method groupvit --stages 2", "", "19.7"),
    "groupvit-1-captions": (
        "one stage, without the multi-label loss",
        "--method groupvit --stages 1 --nouns none",
        "",
        "",
    ),
    "pacl": ("PACL on it", "--method pacl --init {clip}", "", "72.3 (VOC-20)"),
    "pacl-captions": (
        "PACL, of the captions alone",
        "--method pacl --init {clip} --nouns none",
        "",
        "",
    ),
}
START = "--linear-std 0.02 --center-std 0.02 --key-gain 1"
FIRST = ("default", "clip")  # others need their checkpoints
COLUMNS = {  # those of tests/analyse.py: heading of the table
    "mIoU": "mIoU",
    "names perfect": "oracle classes",
    "purity": "purity",
    "named right": "segments correct",
    "patches": "patches correct",
    "captions": "captions",
}


class SegmentedScenes(SyntheticScenes):
    """Scenes that keep their superpixels, since many runs see the same."""

    def __init__(self, *args):
        super().__init__(*args)
        self.samples = {}

    def segmented(self, index):
        sample = super().__getitem__(index)
        segments = superpixels(sample.image, train.SMALL.image_size, train.SMALL.patch_size)
        return sample._replace(segments=segments.astype("uint8"), label=None)

    def __getitem__(self, index):
        if index not in self.samples:
            self.samples[index] = self.segmented(index)
        return self.samples[index]


@functools.lru_cache(maxsize=3)  # 0.4 GB each; a seed's rows come in two parts
def open_scenes(seed):
    return [SegmentedScenes(train.SMALL.image_size, seed)]


def start_worker():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends them
    torch.set_num_threads(1)


def run(job):
    """Train and score one row with one seed, unless that was done -> what to say of it."""
    name, seed, steps, limit, output = job
    folder, start = output / name.replace("/", "-") / str(seed), time.time()
    _, flags, scoring, _ = ROWS[name]
    if (folder / "analysis.json").exists():
        return f"{name}, seed {seed}: done before"
    train.open_pairs = lambda *args, seed, **options: open_scenes(seed)
    # A run that is stopped is begun again, and so must neither end early nor be scored.
    train.GracefulExit = lambda: contextlib.nullcontext(argparse.Namespace(asked=bool))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    others = {first: output / first / str(seed) / "checkpoint.pt" for first in FIRST}
    others["start"] = START
    with (
        open(folder / "output.txt", "w") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        if flags is not None:
            fixed = [
                "--steps",
                str(steps),
                "--seed",
                str(seed),
                "--output",
                str(folder),
                "--workers",
                "0",
            ]
            train.main([*flags.format(**others).split(), *fixed])
        fixed = ["--checkpoint", str(folder / "checkpoint.pt"), "--output", str(folder)]
        fixed += ["--workers", "0", "--limit", str(limit)]
        analyse.main([*fixed, *scoring.format(**others).split()])
    return f"{name}, seed {seed}: {100 * read(folder)['mIoU']:.2f} % in {time.time() - start:.0f} s"


def read(folder):
    """The COLUMNS of a run: {column: fraction}."""
    metrics = json.loads((folder / "analysis.json").read_text())
    return {"mIoU": metrics["mIoU"], **metrics["analysis"]}


def table(output, rows, seeds):
    """Markdown: of each row the mean over the seeds, and of the mIoU the standard deviation."""
    print(f"| | `--rows` | {' | '.join(COLUMNS.values())} | published, VOC |")
    print(f"|---|---|{'---|' * len(COLUMNS)}---|")
    for name in rows:
        what, _, _, paper = ROWS[name]
        results = [read(output / name.replace("/", "-") / str(seed)) for seed in seeds]
        cells = []
        for column in COLUMNS:
            values = [100 * result[column] for result in results if result[column] is not None]
            if not values:  # too few images for captions
                cells.append("-")
                continue
            spread = (
                f" ± {statistics.stdev(values):.1f}" if column == "mIoU" and len(values) > 1 else ""
            )
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        print(f"| {what} | `{name}` | {' | '.join(cells)} | {paper} |")


def main():
    parser = Parser(__doc__)
    parser.add_argument("--steps", type=int, default=300, help="of each run [%(default)s]")
    parser.add_argument("--seeds", type=int, default=3, help="how many [%(default)s]")
    parser.add_argument("--limit", type=int, default=500, help="images scored [%(default)s]")
    parser.add_argument(
        "--rows",
        nargs="+",
        choices=ROWS,
        default=list(ROWS),
        metavar="ROW",
        help=f"some of: {', '.join(ROWS)}",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/ablation"), help="folder [%(default)s]"
    )
    args = parser.parse_args()
    seeds, output = range(args.seeds), args.output / str(args.steps)
    with multiprocessing.get_context("spawn").Pool(
        min(os.cpu_count(), 2 * args.seeds), start_worker
    ) as pool:
        needed = {
            first
            for name in args.rows
            for first in FIRST
            if first == name or f"{{{first}}}" in f"{ROWS[name]}"
        }
        for names in (needed, [name for name in args.rows if name not in needed]):
            jobs = [
                (name, seed, args.steps, args.limit, output) for seed in seeds for name in names
            ]
            for line in pool.imap_unordered(run, jobs):
                print(line, file=sys.stderr, flush=True)
    table(output, args.rows, seeds)


if __name__ == "__main__":
    run_program(main, "stopped")
