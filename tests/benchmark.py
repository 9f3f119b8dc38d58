"""Speed, as ratios between two ways in the same run; not a test.

python tests/benchmark.py evaluate      labelling photographs with a ViT-B/16 of random weights
python tests/benchmark.py train         a step of the paper's recipe: 8 pairs; 256 to 1,024 on a GPU
python tests/benchmark.py loader        pairs per second and core, from tar shards of photographs
python tests/benchmark.py pacl          the loss over a batch of 512, against every pooled vector

--smoke runs the same code on tiny sizes, to see that it runs.
"""

import contextlib
import copy
import io
import multiprocessing
import resource
import statistics
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import ConcatDataset, DataLoader
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))

import data
import model as model_py
import train
from clip_loader import Tokenizer
from data import Batches, SegmentationFolder, TrainingPairs, collate
from evaluate import Parser, Segmenter, choose_protocol, load_image, run_program
from losses import pacl_loss
from model import Config, SegCLIP

PHOTOGRAPHS = Path(__file__).parent / "golden/pipeline/voc_like"
TINY = {"vision_width": 64, "vision_layers": 3, "first_stage_layers": 1, "text_width": 64}
TINY |= {"text_layers": 1, "decoder_layers": 1}


def config_for(args):
    """The paper's sizes, or tiny ones at the same resolution."""
    return Config(**TINY) if args.smoke else Config()


def matrix_rate(dtype, device="cpu", n=1536):
    """Multiplications and additions per second of this processor, in matrix products."""
    n = n if device == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    times = []
    for _ in range(8):
        start = clock(device)
        a @ b
        times.append(clock(device) - start)
    return 2 * n**3 / statistics.median(times)


def clock(device="cpu"):
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def count_work(function):
    """Multiplications and additions of all matrix products in a call of the function."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return counter.get_total_flops()


# --------------------------------------------------------------------------------------------------
# evaluate


class AuthorsArrangement(Segmenter):
    """Our code, arranged as the authors' program: one window at a time, encoded twice."""

    def encode(self, crops):
        super().encode(crops)
        return super().encode(crops)


@torch.inference_mode()
def evaluate(args):
    torch.manual_seed(0)
    model = SegCLIP(config_for(args)).eval()
    model.clip.logit_scale.data.fill_(np.log(100))
    dataset = SegmentationFolder("pascal_voc", PHOTOGRAPHS)
    dataset.has_background = False
    protocol = choose_protocol("segclip", dataset, model.config)
    words = F.normalize(torch.randn(20, 512), dim=-1)
    ways = {
        "(a) as the authors, fp32": AuthorsArrangement(model, words, protocol, batch_size=1),
        "(b) ours, fp32": Segmenter(model, words, protocol),
        "(c) ours, bf16": Segmenter(model, words, protocol, bf16=True),
    }
    count = 1 if args.smoke else len(dataset)
    images = [load_image(dataset, protocol, 16, i) for i in range(count)]
    times, labels, encoding = {way: [] for way in ways}, {}, {way: [] for way in ways}
    for way, segmenter in ways.items():  # how much of the time is the encoder's
        segmenter.encode = timed(segmenter.encode, encoding[way])
    for turn in range(args.rounds + 1):
        for way, segmenter in ways.items():
            start = time.perf_counter()
            labels[way] = [result.label for _, result in segmenter(images)]
            if turn:  # the first warms up
                times[way].append((time.perf_counter() - start) / len(images))
    base = None
    for way in ways:
        seconds = statistics.median(times[way])
        base = base or seconds
        print(f"{way:26} {seconds:.3f} s per image, {base / seconds:.2f} times (a)")
    a, b, c = (np.concatenate([label.ravel() for label in labels[way]]) for way in ways)
    print(
        f"pixels of (b) equal to (a): {100 * (a == b).mean():.4f} %; "
        f"of (c) equal to (b): {100 * (c == b).mean():.2f} %"
    )
    windows = sum(-(-max(seen.shape[:2]) // 224) for _, seen in images) / len(images)
    work = windows * count_work(lambda: model.encode_image(torch.zeros(1, 3, 224, 224)))
    for way, dtype in (("(b) ours, fp32", torch.float32), ("(c) ours, bf16", torch.bfloat16)):
        calls = len(encoding[way]) // (args.rounds + 1)
        seconds = sum(encoding[way][calls:]) / args.rounds / len(images)
        print(
            f"{way}: the encoder takes {100 * seconds / statistics.median(times[way]):.0f} % of "
            f"the time, at {work / seconds / 1e9:.0f} GFLOP/s; "
            f"matrix products alone reach {matrix_rate(dtype) / 1e9:.0f}"
        )
    print(f"peak memory {peak_memory():.2f} GiB, {torch.get_num_threads()} threads")


def timed(function, times):
    def call(*args):
        start = time.perf_counter()
        result = function(*args)
        times.append(time.perf_counter() - start)
        return result

    return call


def peak_memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# --------------------------------------------------------------------------------------------------
# train


class AuthorsAttention(nn.MultiheadAttention):
    """torch's attention with tokens first, as OpenAI and the authors call it; our parameters."""

    def __init__(self, width, heads):
        super().__init__(width, heads)

    def forward(self, query, memory, causal=False):
        mask = nn.Transformer.generate_square_subsequent_mask(query.shape[1]) if causal else None
        query, memory = query.transpose(0, 1), memory.transpose(0, 1)  # [B, N, D] -> [N, B, D]
        return (
            super()
            .forward(query, memory, memory, need_weights=False, attn_mask=mask)[0]
            .transpose(0, 1)
        )


class Way:
    """One way to compute steps of the paper's recipe, with a model of its own."""

    def __init__(self, model, device, precision, compiled=False, authors=False):
        self.precision = precision
        self.model = copy.deepcopy(model).to(device).train()
        train.freeze(self.model, embeddings=True)
        if compiled:
            self.model.compile()
        groups = train.parameter_groups(self.model, 4e-3, 4e-6, 0.05)
        how = {"foreach": False} if authors else {"fused": True}
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-6, **how)
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-2 * group["peak_lr"]  # as in the warm-up
        self.scaler = torch.amp.GradScaler(device, 1.0)
        self.times, self.losses = [], []

    def step(self, image, superpatch, text, noise):
        extra = image.new_zeros(1, dtype=torch.float32)
        batch = image, superpatch, text, extra
        how = noise, (1.0, 1.0), self.precision, self.scaler
        return train.take_step(self.model, self.optimizer, batch, *how)[0]


def make_batch(model, batch_size, device, turn):
    generator = torch.Generator(device).manual_seed(turn)
    options = {"generator": generator, "device": device}
    image = torch.randint(0, 256, (batch_size, 3, 224, 224), dtype=torch.uint8, **options)
    superpatch = torch.randint(0, 30, (batch_size, 196), **options)
    text = torch.randint(1, 49000, (batch_size, 32), **options)
    text[:, 12] = 49407
    return image, superpatch, text, model.draw_noise(batch_size, 196, generator)


def train_on_cpu(args):
    torch.manual_seed(0)
    model = SegCLIP(config_for(args))
    size = (args.batch_sizes or [2 if args.smoke else 8])[0]
    with authors_blocks():
        theirs = SegCLIP(config_for(args))
    theirs.load_state_dict(model.state_dict())
    ways = {
        "(a) as the authors, fp32": Way(theirs, "cpu", "fp32", authors=True),
        "(b) ours, fp32": Way(model, "cpu", "fp32"),
        "(c) ours, bf16": Way(model, "cpu", "bf16"),
    }
    if args.compile:
        ways["(d) ours, bf16, compiled"] = Way(model, "cpu", "bf16", compiled=True)
    del theirs
    for turn in range(args.rounds + 1):
        batch = make_batch(model, size, "cpu", turn)
        for way in ways.values():
            start = time.perf_counter()
            values = way.step(*batch)
            if turn:
                way.times.append(time.perf_counter() - start)
            way.losses.append(values[:3].sum().item())
    work = count_work(lambda: Way(model, "cpu", "fp32").step(*batch))
    print(
        f"batch {size}, {torch.get_num_threads()} threads; "
        f"a step has {work / 1e12:.2f} T multiplications and additions"
    )
    rates = {"fp32": matrix_rate(torch.float32), "bf16": matrix_rate(torch.bfloat16)}
    base = statistics.median(ways["(a) as the authors, fp32"].times)
    exact = ways["(b) ours, fp32"].losses
    for name, way in ways.items():
        seconds, peak = statistics.median(way.times), rates[way.precision]
        off = max(abs(x - y) / y for x, y in zip(way.losses, exact))
        print(
            f"{name:26} {seconds:.2f} s per step, {base / seconds:.2f} times (a); "
            f"{work / seconds / 1e9:.0f} GFLOP/s, {100 * work / seconds / peak:.0f} % of what "
            f"matrix products reach ({peak / 1e9:.0f}); loss "
            f"{way.losses[0]:.4f} -> {way.losses[-1]:.4f}, at most {100 * off:.2f} % from (b)"
        )
    print(f"peak memory of all together {peak_memory():.1f} GiB")


@contextlib.contextmanager
def authors_blocks():
    ours, model_py.Attention = model_py.Attention, AuthorsAttention
    yield
    model_py.Attention = ours


def train_on_gpu(args):
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    model, peak = SegCLIP(config_for(args)), matrix_rate(torch.bfloat16, "cuda")
    print(f"{torch.cuda.get_device_name()}; bf16 matrix products reach {peak / 1e12:.0f} TFLOP/s")
    work = count_work(lambda: Way(model, "cuda", "bf16").step(*make_batch(model, 8, "cuda", 0))) / 8
    for compiled in [False, True] if args.compile else [False]:
        for size in args.batch_sizes or [256, 512, 768, 1024]:
            try:
                measure_on_gpu(model, size, compiled, args.rounds, work, peak)
            except torch.cuda.OutOfMemoryError:
                print(f"batch {size:5} bf16 {'compiled' * compiled:10} does not fit")


def measure_on_gpu(model, size, compiled, rounds, work, peak):
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    way, batch = Way(model, "cuda", "bf16", compiled), make_batch(model, size, "cuda", 0)
    for turn in range(rounds + 3):
        start = clock("cuda")
        way.step(*batch)
        if turn >= 3:
            way.times.append(clock("cuda") - start)
    seconds, memory = statistics.median(way.times), torch.cuda.max_memory_allocated() / 2**30
    print(
        f"batch {size:5} bf16 {'compiled' * compiled:10} {size / seconds:6.0f} pairs/s  "
        f"{memory:.0f} GiB  {work * size / seconds / 1e12:.0f} TFLOP/s, "
        f"{100 * work * size / seconds / peak:.0f} % of matrix products"
    )
    torch.cuda.set_sync_debug_mode("warn")  # tells of anything in a step that waits for the GPU
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        way.step(*batch)
    torch.cuda.set_sync_debug_mode("default")
    print(
        profile.key_averages().table(
            sort_by="cuda_time_total", row_limit=15, max_name_column_width=70
        )
    )


def train_step(args):
    (train_on_gpu if args.device == "cuda" else train_on_cpu)(args)


# --------------------------------------------------------------------------------------------------
# loader

WORDS = """a photo of two people with an umbrella who walk their brown dog along the wet street in
front of old houses""".split()


def photographs():
    return sorted(
        [*PHOTOGRAPHS.rglob("*.jpg"), *(PHOTOGRAPHS.parents[1] / "ade_sample").rglob("*.jpg")]
    )


def write_shards(folder, count, short_side):
    """Shards of 1,000 pairs of photographs; short_side reduces them as img2dataset does."""
    contents = []
    for path in photographs():
        content = path.read_bytes()
        if short_side:
            image, file = Image.open(path).convert("RGB"), io.BytesIO()
            scale = short_side / min(image.size)
            image.resize([round(side * scale) for side in image.size], Image.BICUBIC).save(
                file, "JPEG", quality=95
            )
            content = file.getvalue()
        contents.append(content)
    rng = np.random.RandomState(0)
    for n in range(count // 1000):
        with tarfile.open(folder / f"{n:05}.tar", "w") as tar:
            for i in range(1000 * n, 1000 * n + 1000):
                caption = " ".join(rng.permutation(WORDS)[:12])
                for suffix, content in (
                    ("jpg", contents[i % len(contents)]),
                    ("txt", caption.encode()),
                ):
                    member = tarfile.TarInfo(f"{i:09}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return str(folder / f"{{00000..{count // 1000 - 1:05}}}.tar")


def loader(args):
    torch.set_num_threads(1)
    count = 20 if args.smoke else 1000
    for short_side in (256,) if args.smoke else (256, None):
        with tempfile.TemporaryDirectory() as folder:
            shards = write_shards(Path(folder), 1000, short_side)
            what = "with a short side of 256" if short_side else "as they are, 300 to 586 pixels"
            print(f"photographs {what}")
            measure_loader(shards, min(count, 100), "superpixels computed while loading")
            if args.smoke:
                continue
            data.main(["superpixels", "--data", shards, "--workers", "2"])
            for _ in range(args.rounds):
                measure_loader(shards, count, "superpixels computed before")
            stages(shards, 500)
    if args.smoke:
        return
    # Memory, of this process, which prepares the pairs itself.
    with tempfile.TemporaryDirectory() as folder:
        shards = write_shards(Path(folder), 20_000, 256)
        known = {}  # superpixels, of photographs that come again and again
        for n, source in enumerate(data.open_pairs([shards], Config(), 0)):
            places = []
            with open(source.superpixels.data, "wb") as file:
                for i in range(1000):
                    k = (1000 * n + i) % len(photographs())
                    known.setdefault(k, data.segment_to_png(source, Config(), i))
                    first = file.tell()
                    file.write(known[k])
                    places.append((first, file.tell()))
            index = source.superpixels.data.with_suffix(".npy")
            np.save(index, np.array(places, np.int64))
        pairs, batches = training_pairs(shards, 20_000)
        seen = 0
        for batch in DataLoader(pairs, batch_sampler=batches, collate_fn=collate):
            seen += len(batch[0])
            if seen in (1000, 2000, 5000, 10_000, 15_000, 20_000):
                pages = int(Path("/proc/self/statm").read_text().split()[1])
                print(f"{seen:6} pairs streamed: {pages * resource.getpagesize() / 2**20:.0f} MiB")


def training_pairs(shards, count):
    sources = data.open_pairs([shards], Config(), 0)
    tokenizer = Tokenizer.learn([" ".join(WORDS)], 200)
    recipe = {"crop_scale": 0.5, "text_length": 32}
    pairs = TrainingPairs(ConcatDataset(sources), tokenizer, Config(), **recipe)
    lengths = [len(source) for source in sources]
    return pairs, Batches(lengths, 0, 20, slice(0, 20), range(count // 20))


def measure_loader(shards, count, what):
    pairs, batches = training_pairs(shards, count)
    start = time.perf_counter()
    for _ in DataLoader(pairs, batch_sampler=batches, collate_fn=collate):
        pass
    print(f"  {what}: {count / (time.perf_counter() - start):.0f} pairs/s on one core")


def stages(shards, count):
    """Where the time goes: each function's own, and with it that of what it calls."""
    times = {}
    names = ["decode_image", "random_resized_crop", "patch_labels", "superpixels"]
    originals = {name: getattr(data, name) for name in names}
    for name, original in originals.items():
        setattr(data, name, timed(original, times.setdefault(name, [])))
    pairs, batches = training_pairs(shards, count)
    pairs.tokenizer = timed(pairs.tokenizer, times.setdefault("tokenizer", []))
    start = time.perf_counter()
    for _ in DataLoader(pairs, batch_sampler=batches, collate_fn=collate):
        pass
    total = time.perf_counter() - start
    for name, original in originals.items():
        setattr(data, name, original)
    shares = {name: 1e3 * sum(values) / count for name, values in times.items()} | {
        "all": 1e3 * total / count
    }
    print(
        "  milliseconds a pair: "
        + ", ".join(f"{name} {value:.2f}" for name, value in shares.items())
    )


# --------------------------------------------------------------------------------------------------
# pacl


def naive_pacl_loss(patches, text, logit_scale, patch_scale):
    """PACL's loss by its equations: a pooled vector for each image and text, [B, B, E]."""
    t = F.normalize(text, dim=-1)
    a = (patch_scale * F.normalize(patches, dim=-1) @ t.T).softmax(dim=1)  # [B, N, B]
    pooled = a.transpose(1, 2) @ patches  # [B, B, E]
    logits = logit_scale.exp() * (F.normalize(pooled, dim=-1) * t).sum(dim=-1)
    target = torch.arange(len(text))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def measure_pacl(way, batch=512, num_patches=196, width=512):
    """In a process of its own -> seconds, GiB beyond the patches and their gradient, loss."""
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(batch, num_patches, width, generator=generator, requires_grad=True)
    text, scale = torch.randn(batch, width, generator=generator), torch.tensor(3.0)
    patches.grad = torch.zeros_like(patches)
    before, start = peak_memory(), time.perf_counter()
    loss = {"naive": naive_pacl_loss, "losses.py": pacl_loss}[way](patches, text, scale, 10.0)
    loss.backward()
    return time.perf_counter() - start, peak_memory() - before, loss.item()


def pacl(args):
    results = {"naive": [], "losses.py": []}
    size = 8 if args.smoke else 512
    for _ in range(args.rounds):
        for way, measured in results.items():
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                measured.append(pool.apply(measure_pacl, [way, size]))
    print(f"PACL's loss and its gradient, {size} images of 196 patches against as many texts")
    medians = {
        way: [statistics.median(values) for values in zip(*measured)]
        for way, measured in results.items()
    }
    for way, (seconds, memory, loss) in medians.items():
        print(f"  {way:>9}: {seconds:.2f} s, {memory:.2f} GiB, loss {loss:.6f}")
    (time_1, memory_1, _), (time_2, memory_2, _) = medians.values()
    print(
        f"  {memory_1 / max(memory_2, 1e-6):.1f} times less memory, "
        f"{time_1 / time_2:.2f} times as fast"
    )


def main():
    parser = Parser(__doc__)
    parser.add_argument("what", choices=["evaluate", "train", "loader", "pacl"])
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, one round")
    parser.add_argument(
        "--rounds", type=int, default=5, help="measured runs of each way [%(default)s]"
    )
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help="of train [%(default)s]"
    )
    parser.add_argument(
        "--batch-sizes", type=int, nargs="+", help="of train [cpu: 8; cuda: 256 512 768 1024]"
    )
    parser.add_argument(
        "--no-compile", dest="compile", action="store_false", help="train without torch.compile too"
    )
    args = parser.parse_args()
    if args.smoke:
        args.rounds = 1
        args.compile = False
    {"evaluate": evaluate, "train": train_step, "loader": loader, "pacl": pacl}[args.what](args)


if __name__ == "__main__":
    run_program(main, "stopped")
