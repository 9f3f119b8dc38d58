"""The papers' ablations on synthetic scenes: what each part does to the small default.

python tests/ablate.py          about two hours on two cores; stopped, the same command goes on

Each row is train.py with other flags, shorter than the default, then tests/analyse.py. They write
to runs/ablation/STEPS/ROW/SEED. A row that has its analysis.json is not done again, so after a
change of the code give another --output.
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
from multiprocessing.pool import ThreadPool
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import train
from evaluate import Parser, run_program
from model import InputError

# The paper's recipe with the values of the small default: only the start of the weights differs.
AUTHORS = """--recipe paper --data synthetic --init none --no-freeze --vocabulary learned
--batch-size 128 --lr 3e-3 --clip-lr 3e-3 --warmup 0.1 --crop-scale 1"""
for _size in set(train.SMALL) & set(train.SIZES):
    AUTHORS += f" --{_size.replace('_', '-')} {train.SMALL[_size]}"
CLIP = "--checkpoint {clip} --readout"
# fmt: off
ROWS = {  # name: (what, flags of train.py or None, those of analyse.py, the paper's mIoU on VOC)
    "default": ("all losses, 16 centers, 1 cross-attention layer", "", "", "52.60"),
    "con": ("*Table 1*: contrastive loss alone",
        "--reconstruction-weight 0 --superpixel-weight 0", "", "47.95"),
    "con-rec": ("with reconstruction", "--superpixel-weight 0", "", "49.14"),
    "con-sup": ("with superpixels", "--reconstruction-weight 0", "", "48.49"),
    "after-1": ("*Table 2*: group module after block 1 of 3",
        "--first-stage-layers 1", "", "43.75 (8 of 12)"),
    "after-3": ("after all blocks", "--first-stage-layers 3", "", ""),
    "centers-8": ("8 centers", "--num-centers 8", "", "47.95 (8)"),
    "centers-32": ("32 centers", "--num-centers 32", "", "44.89 (10)"),
    "cross-0": ("*Table 3*: no cross-attention", "--cross-layers 0", "", "44.44 (1 layer: 47.63)"),
    "cross-2": ("2 layers", "--cross-layers 2", "", "47.95"),
    "authors": ("*The authors' start of the weights*", AUTHORS, "", ""),
    "from-clip": ("*Table 4*: from the weights of the CLIP below",
        "--init {clip} --first-stage-layers 2", "", "52.6 (without: 33.3)"),
    "clip": ("*Without a group module*: the same encoder as CLIP", "--method clip", "", "16.4"),
    "maskclip": ("read as MaskCLIP", None, f"{CLIP} maskclip", "43.4"),
    "sclip": ("read as SCLIP", None, f"{CLIP} sclip", "59.1"),
    "clearclip": ("read as ClearCLIP", None, f"{CLIP} clearclip", "51.8"),
    "naclip": ("read as NACLIP", None, f"{CLIP} naclip", "58.9"),
    "pacl": ("PACL on it", "--method pacl --init {clip}", "", "72.3 (VOC-20)"),
    "groupvit-1": ("*GroupViT*: one stage", "--method groupvit --stages 1", "", "28.1"),
    "groupvit-2": ("two stages", "--method groupvit --stages 2", "", "19.7"),
}
# fmt: on
COLUMNS = "mIoU", "regions named", "purity", "patches"  # of analysis.json


def run(name, seed, steps, output):
    """Train and score a row with a seed, unless that was done."""
    folder = output / name / str(seed)
    _, training, scoring, _ = ROWS[name]
    todo = [["tests/analyse.py", "--checkpoint", folder / "checkpoint.pt", *scoring.split()]]
    if training is not None:
        how = ["--steps", steps, "--seed", seed, "--workers", 0, "--resume"]
        todo.insert(0, ["train.py", *training.split(), *how])
    if not (folder / "analysis.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        clip = output / "clip" / str(seed) / "checkpoint.pt"
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with open(folder / "output.txt", "w") as log:
            for program, *flags in todo:
                flags = [str(flag).replace("{clip}", str(clip)) for flag in flags]
                command = [sys.executable, ROOT / program, *flags, "--output", folder]
                if subprocess.run(command, stdout=log, stderr=log, env=environment).returncode:
                    raise InputError(f"{program} failed; see {log.name}")
    print(folder, "is done", file=sys.stderr)


def table(output, rows, seeds):
    """Markdown: of each row the means over the seeds, and the standard deviation of the mIoU."""
    print("| | `--rows` | mIoU | oracle classes | purity | patches correct | published, VOC |")
    print("|---|---|---|---|---|---|---|")
    for name in rows:
        what, _, _, published = ROWS[name]
        files = [output / name / str(seed) / "analysis.json" for seed in seeds]
        results = [json.loads(file.read_text()) for file in files]
        values = [[100 * result[column] for result in results] for column in COLUMNS]
        cells = [f"{statistics.mean(x):.1f}" for x in values]
        if len(seeds) > 1:
            cells[0] += f" ± {statistics.stdev(values[0]):.1f}"
        print(f"| {what} | `{name}` | {' | '.join(cells)} | {published} |")


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--rows", nargs="+", choices=ROWS, default=[*ROWS], metavar="ROW", help=", ".join(ROWS))
    add("--steps", type=int, default=300, help="of each run [%(default)s]")
    add("--seeds", type=int, default=3, help="how many [%(default)s]")
    add("--jobs", type=int, default=os.cpu_count(), help="at once [%(default)s]")
    add("--output", type=Path, default=Path("runs/ablation"), help="folder [%(default)s]")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    seeds = range(args.seeds)
    output = args.output / str(args.steps)
    needed = ["clip"] * any("{clip}" in str(ROWS[name]) for name in args.rows)
    with ThreadPool(args.jobs) as pool:
        for names in needed, args.rows:
            pool.starmap(run, itertools.product(names, seeds, [args.steps], [output]), chunksize=1)
    table(output, args.rows, seeds)


if __name__ == "__main__":
    run_program(main)
