"""Speed, as ratios between two ways in the same run; not a test.

python tests/benchmark.py evaluate      labelling photographs with a ViT-B/16 of random weights
"""

import argparse
import resource
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))

from data import SegmentationFolder
from evaluate import Seen, Segmenter, Settings
from model import Config, SegCLIP

PHOTOGRAPHS = Path(__file__).parent / "golden/pipeline/voc_like"


class AuthorsArrangement(Segmenter):
    """Our code in the order of the authors' program: windows one by one, and the encoder twice for each."""

    def encode(self, crops):
        parts = []
        for crop in crops:
            for _ in range(2):
                encoding = self.model.encode_image(crop[None])
            parts.append(encoding)
        return type(parts[0])(*(torch.cat(fields) for fields in zip(*parts)))


def matrix_rate(dtype, n=1536):
    """Multiplications and additions per second of this processor, in matrix products."""
    a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
    times = []
    for _ in range(8):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * n**3 / statistics.median(times)


def encoder_work(model):
    """Multiplications and additions of one window: the matrix products of every linear layer, and of attention."""
    c = model.config
    N, D, L = (c.image_size // c.patch_size) ** 2, c.vision_width, c.num_centers

    def block(tokens):
        return 2 * 12 * tokens * D**2 + 4 * tokens**2 * D

    first, third = c.first_stage_layers * block(N), (c.vision_layers - c.first_stage_layers) * block(L)
    cross = c.cross_layers * 2 * (2 * (N + L) + 10 * L) * D**2
    return 2 * N * 3 * c.patch_size**2 * D + first + third + cross


@torch.inference_mode()
def evaluate(rounds):
    torch.manual_seed(0)
    model = SegCLIP(Config()).eval()
    model.clip.logit_scale.data.fill_(np.log(100))
    dataset = SegmentationFolder("pascal_voc", PHOTOGRAPHS)
    settings = Settings("segclip", [[word] for word in dataset.words], 1, 224, 224, 224, 5, None, None, None)
    text, owner = F.normalize(torch.randn(20, 512), dim=-1), torch.arange(20)
    ways = {
        "(a) as the authors, fp32": AuthorsArrangement(model, text, owner, settings, batch_size=1),
        "(b) ours, fp32": Segmenter(model, text, owner, settings),
        "(c) ours, bf16": Segmenter(model, text, owner, settings, bf16=True),
    }
    pictures = [Seen(dataset, settings)[i] for i in range(len(dataset))]
    times, labels, encoding = {way: [] for way in ways}, {}, {way: [] for way in ways}
    for way, segmenter in ways.items():  # how much of the time is the encoder's
        segmenter.encode = timed(segmenter.encode, encoding[way])
    for turn in range(rounds + 1):
        for way, segmenter in ways.items():
            start = time.perf_counter()
            labels[way] = [label for _, label, _, _ in segmenter(pictures)]
            if turn:  # the first warms up
                times[way].append((time.perf_counter() - start) / len(pictures))
    base = None
    for way in ways:
        seconds = statistics.median(times[way])
        base = base or seconds
        print(f"{way:26} {seconds:.3f} s per picture, {base / seconds:.2f} times (a)")
    a, b, c = (np.concatenate([label.ravel() for label in labels[way]]) for way in ways)
    print(f"pixels of (b) equal to (a): {100 * (a == b).mean():.4f} %; of (c) equal to (b): {100 * (c == b).mean():.2f} %")
    windows = sum(-(-max(seen.shape[:2]) // 224) for _, seen in pictures) / len(pictures)
    for way, dtype in (("(b) ours, fp32", torch.float32), ("(c) ours, bf16", torch.bfloat16)):
        calls = len(encoding[way]) // (rounds + 1)
        seconds = sum(encoding[way][calls:]) / rounds / len(pictures)
        rate, peak = windows * encoder_work(model) / seconds, matrix_rate(dtype)
        print(
            f"{way}: the encoder takes {100 * seconds / statistics.median(times[way]):.0f} % of the time, at {rate / 1e9:.0f} GFLOP/s; "
            f"matrix products alone reach {peak / 1e9:.0f}"
        )
    print(
        f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB, {torch.get_num_threads()} threads"
    )


def timed(function, times):
    def call(*args):
        start = time.perf_counter()
        result = function(*args)
        times.append(time.perf_counter() - start)
        return result

    return call


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["evaluate"])
    parser.add_argument("--rounds", type=int, default=5, help="measured runs of each way [%(default)s]")
    args = parser.parse_args()
    evaluate(args.rounds)
