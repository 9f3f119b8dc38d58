"""Speed, as ratios to a named way in the same run; not a test.

python tests/benchmark.py train         a step of the paper's recipe, against the authors' layers
python tests/benchmark.py evaluate      labeling photographs, against the authors' arrangement
python tests/benchmark.py loader        preparing pairs on one core, against decoding alone
python tests/benchmark.py pacl          PACL's loss, against a pooled vector for each pair

Weights are random. --smoke runs the same code on tiny sizes, to see that it runs.
"""

import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import data
import train
from clip_loader import Tokenizer
from evaluate import Parser, choose_protocol, run_program, segment, start_processes
from losses import pacl_loss, symmetric_cross_entropy, total_loss
from model import Config, ImageEncoding, SegCLIP

GOLDEN = Path(__file__).parent / "golden"
SIZES = {name: value for name, value in train.SMALL.items() if name in train.SIZES}
SMALL = Config(**SIZES, vocab_size=600)


def compare(ways, args, unit, count=1):
    """Calls the ways {name: function} in turns, and prints medians and ratios to the first way.

    count: of the units that a call takes. The first way should need the most memory: it is called
    last, since the peak of a process never falls.
    """
    times = {name: [] for name in ways}
    memory = {}
    before = peak_memory(args.device)
    for _ in range(2 if args.smoke else 6):
        for name in reversed(ways):
            if args.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = peak_memory("cuda")
            start = time.perf_counter()
            ways[name]()
            peak = peak_memory(args.device)
            times[name].append((time.perf_counter() - start) / count)
            memory.setdefault(name, peak - before)
    seconds = {name: np.median(times[name][1:]) for name in ways}  # the first call warms up
    for name, value in seconds.items():
        ratio = seconds[next(iter(ways))] / value
        print(f"{name:30} {value:.4f} s per {unit}  {ratio:.2f} times  {memory[name]:.2f} GiB more")
    if args.device == "cpu":
        print(f"{torch.get_num_threads()} threads; memory includes what the ways below have kept")


def peak_memory(device):
    """In GiB, of a GPU or of this process."""
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 2**30
    import resource  # here, since Windows has none

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB


class AuthorsAttention(nn.MultiheadAttention):
    """torch's attention with tokens first, as OpenAI and the authors call it."""

    def forward(self, query, memory, causal=False):
        N = query.shape[1]
        mask = query.new_full((N, N), -torch.inf).triu(1) if causal else None
        query = query.transpose(0, 1)  # [B, N, D] -> [N, B, D]
        memory = memory.transpose(0, 1)
        x, _ = super().forward(query, memory, memory, need_weights=False, attn_mask=mask)
        return x.transpose(0, 1)


def take_steps(model, batch, precision):
    """-> a function that takes a step of train.py's loop, with all losses."""
    groups = train.parameter_groups(model.train(), 4e-3, 4e-6, 0.05)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-6, fused=True)
    image, text, superpatch, noise = batch

    def step():
        if image.is_cuda:  # as train.py
            torch.set_float32_matmul_precision("high" if precision == "bf16" else "highest")
        optimizer.zero_grad()
        pixels = data.normalize(image)
        with torch.autocast(image.device.type, torch.bfloat16, enabled=precision == "bf16"):
            outputs = model(pixels, text, **noise)
        loss, _ = total_loss(outputs, pixels, superpatch, {"sup": 1.0})
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def benchmark_train(args):
    config = SMALL if args.smoke else Config()
    B = 2 if args.smoke else args.batch_size
    N = (config.image_size // config.patch_size) ** 2
    image = 255 * torch.rand(B, 3, config.image_size, config.image_size, device=args.device)
    text = torch.ones(B, min(32, config.context_length), device=args.device).long()
    superpatch = torch.arange(N, device=args.device).expand(B, N) // 8
    noise = SegCLIP(config).draw_noise(B, N, torch.Generator(args.device))
    batch = image, text, superpatch, noise
    with mock.patch("model.Attention", AuthorsAttention):
        theirs = SegCLIP(config).to(args.device)
    ways = {"as the authors, fp32": take_steps(theirs, batch, "fp32")}
    for precision in "fp32", "bf16":
        model = SegCLIP(config).to(args.device)
        ways[f"train.py, {precision}"] = take_steps(model, batch, precision)
    compare(ways, args, "step")


class AuthorsArrangement(SegCLIP):
    """One window at a time, encoded twice, as the authors' program does."""

    def encode_image(self, image, stride=None):
        windows = [SegCLIP.encode_image(self, x, stride) for x in image.split(1) for _ in range(2)]
        return ImageEncoding(*map(torch.cat, zip(*windows[::2])))


def benchmark_evaluate(args):
    config = SMALL if args.smoke else Config()
    dataset = data.open_benchmark("pascal_voc20", GOLDEN / "pipeline/voc_like")
    protocol = choose_protocol("segclip", dataset, config)
    images = [dataset[i].image for i in range(1 if args.smoke else len(dataset))]
    text = F.normalize(torch.randn(20, config.embed_dim, device=args.device), dim=-1)
    ours = SegCLIP(config).to(args.device).eval()
    theirs = AuthorsArrangement(config).to(args.device).eval()
    theirs.load_state_dict(ours.state_dict())

    def label_all(model):
        return [segment(model, text, image, protocol).label for image in images]

    ways = {"as the authors": lambda: label_all(theirs), "evaluate.py": lambda: label_all(ours)}
    compare(ways, args, "image", len(images))
    pairs = zip(label_all(theirs), label_all(ours))
    print(f"equal pixels: {100 * np.mean([(a == b).mean() for a, b in pairs]):.4f} %")


def benchmark_loader(args):
    torch.set_num_threads(1)
    photographs = sorted(GOLDEN.rglob("*.jpg"))[: 2 if args.smoke else None]
    count = len(photographs)
    caption = "two people walk their dog along a wet street"
    tokenizer = Tokenizer.learn([caption], 100)
    source = data.Pairs("", data.pack((str(path), caption) for path in photographs), 224)

    def prepare(has_superpixels):
        how = {"crop_scale": 0.5, "text_length": 32, "has_superpixels": has_superpixels}
        pairs = data.TrainingPairs(source, tokenizer, Config(), **how)
        return [pairs[i] for i in range(count)]

    ways = {
        "decoding alone": lambda: [np.asarray(Image.open(path)) for path in photographs],
        "pairs": lambda: prepare(False),
        "pairs with superpixels": lambda: prepare(True),
    }
    compare(ways, args, "pair", count)


def naive_pacl_loss(patches, text, logit_scale, patch_scale):
    """PACL's loss by its equations: a pooled vector for each image and text, [B, B, E]."""
    t = F.normalize(text, dim=-1)
    a = (patch_scale * F.normalize(patches, dim=-1) @ t.T).softmax(dim=1)  # [B, N, B]
    pooled = a.transpose(1, 2) @ patches  # [B, B, E]
    logits = logit_scale.exp() * (F.normalize(pooled, dim=-1) * t).sum(dim=-1)
    return symmetric_cross_entropy(logits, logits.T, 0)


def benchmark_pacl(args):
    B = 8 if args.smoke else 512
    patches = torch.randn(B, 196, 512, device=args.device, requires_grad=True)
    patches.grad = torch.zeros_like(patches)
    text = torch.randn(B, 512, device=args.device)
    inputs = patches, text, torch.tensor(3.0, device=args.device), 10.0
    ways = {
        "a pooled vector for each pair": lambda: naive_pacl_loss(*inputs).backward(),
        "pacl_loss": lambda: pacl_loss(*inputs).backward(),
    }
    compare(ways, args, "step")


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("what", choices=["train", "evaluate", "loader", "pacl"])
    add("--smoke", action="store_true", help="tiny sizes, one round")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--batch-size", type=int, default=8, help="of train; 256 on a GPU [%(default)s]")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    start_processes(args.device)  # one line if there is no such device
    globals()[f"benchmark_{args.what}"](args)


if __name__ == "__main__":
    run_program(main)
