"""Train SegCLIP on image-text pairs, or PACL, or the CLIP that both are compared with.

python train.py                      a small SegCLIP from scratch on synthetic scenes, in minutes
python train.py --method clip        the CLIP of the scenes
python train.py --method pacl        PACL on that CLIP
python train.py --recipe paper --data "cc3m/{00000..00331}.tar" dataset_coco.json=coco
torchrun --nproc_per_node=8 train.py --recipe paper ...       the same, on eight GPUs
"""

import argparse
import dataclasses
import datetime
import functools
import json
import math
import os
import signal
import sys
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import ConcatDataset, DataLoader

import evaluate
from clip_loader import (
    MODELS,
    Tokenizer,
    last_checkpoint,
    load_clip,
    load_dino,
    load_model,
    load_segclip,
    load_tokenizer,
    read_weights,
    save_checkpoint,
)
from data import (
    BENCHMARKS,
    SCENE_WORDS,
    Batches,
    InMemory,
    SampleError,
    SyntheticScenes,
    TrainingPairs,
    collate,
    ignore_signals,
    normalise,
    open_pairs,
    parallel_map,
    read_lines,
)
from evaluate import RUNS, Parser, number
from losses import contrastive_loss, total_loss
from model import CLIP, PACL, Block, Config, DenseCLIP, InputError, SegCLIP

# --------------------------------------------------------------------------------------------------
# Recipes: the defaults of the flags, by --recipe and --method

# The default, for scenes: the paper's architecture, smaller. Its weights start otherwise: linear
# layers as PyTorch's, blocks around the group module at the identity (linear_std=0, see
# init_weights), larger centers, and keys with a smaller gain, so that the scores of a patch do not
# saturate the softmax over the centers. docs/results.md has the ablations.
SMALL = Config(
    image_size=64,
    patch_size=8,
    vision_width=128,
    vision_layers=3,
    embed_dim=128,
    context_length=24,
    text_width=128,
    text_layers=1,
    activation="gelu",
    first_stage_layers=2,
    num_centers=16,
    cross_layers=1,
    center_std=1.0,
    key_gain=0.3,
    linear_std=0.0,
    decoder_layers=1,
    decoder_heads=1,
)
SMALL_RECIPE = {
    "data": ["synthetic"],
    "output": RUNS["segclip"],
    "save_every": 200,
    "vocabulary": "learned",
    "steps": 1700,
    "batch_size": 64,
    "lr": 1e-3,
    "warmup": 0.1,
    "crop_scale": 1.0,
}
# Section 3.2. The warm-up, the crop and what is frozen are those of the authors' code.
PAPER_RECIPE = {
    "output": "runs/paper",
    "save_every": 2000,
    "init": "ViT-B/16",
    "freeze": True,
    "vocabulary": "openai",
    "text_length": 32,
    "epochs": 10.0,
    "batch_size": 768,
    "lr": 4e-3,
    "clip_lr": 4e-6,
    "warmup": 0.15,
    "crop_scale": 0.5,
}
CONTRASTIVE = {"clip_lr": None, "reconstruction_weight": 0.0, "superpixel_weight": 0.0}
CLIP_OF_SCENES = f"{RUNS['clip']}/checkpoint.pt"
PACL_RECIPE = CONTRASTIVE | {"freeze": False, "weight_decay": 0.2}
SMALL_PACL = {"init": CLIP_OF_SCENES, "nouns": "synthetic", "steps": 600, "lr": 3e-3}
# As others quote the PACL paper; the crop and the text length are SegCLIP's.
PAPER_PACL = {"lr": 5e-4, "batch_size": 4096, "warmup": 0.0}
RECIPES = {
    ("small", "segclip"): SMALL_RECIPE,
    ("small", "clip"): SMALL_RECIPE | CONTRASTIVE | {"output": RUNS["clip"]},
    ("small", "pacl"): SMALL_RECIPE | PACL_RECIPE | SMALL_PACL | {"output": RUNS["pacl"]},
    ("paper", "segclip"): PAPER_RECIPE,
    ("paper", "clip"): PAPER_RECIPE | CONTRASTIVE | {"output": "runs/paper-clip", "lr": 4e-6},
    ("paper", "pacl"): PAPER_RECIPE | PACL_RECIPE | PAPER_PACL | {"output": "runs/paper-pacl"},
}
SIZES = {size.name: size for size in dataclasses.fields(Config) if size.name != "vocab_size"}
# Sizes that --init with a plain CLIP does not decide.
ADDED = (
    "num_centers",
    "cross_layers",
    "center_std",
    "key_gain",
    "linear_std",
    "gumbel_tau",
    "mask_ratio",
    "decoder_layers",
    "decoder_heads",
)
# What the authors' program does not train when it starts from CLIP.
FROZEN = (
    "clip.visual.conv1.",
    "clip.visual.positional_embedding",
    "clip.visual.ln_pre.",
    "clip.token_embedding.",
    "clip.positional_embedding",
)
# Flags that may change on resume: results differ by rounding at most (--device: also the noise).
RESUME_MAY_CHANGE = {"output", "resume", "save_every", "log_every", "device", "workers", "compile"}
RESUME_MAY_CHANGE |= {"eval_every", "eval_dataset", "eval_root", "max_errors"}
RESUME_MAY_CHANGE |= {"accumulate", "checkpoint_activations"}


def add_arguments(parser):
    # fmt: off
    add = parser.add_argument_group("the run").add_argument
    add("--data", nargs="+", metavar="PAIRS",
        help="one or more of: synthetic; CAPTIONS.json=FOLDER (COCO's or Karpathy's); LIST.tsv, "
        '.csv or .jsonl (=FOLDER) of paths and captions; "SHARDS{000..331}.tar" of img2dataset')
    add("--output", metavar="DIR", help="for checkpoint.pt and log.jsonl [%(default)s]")
    add("--resume", action="store_true", help="continue from the last checkpoint in DIR, if any")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, metavar="N",
        help="of the order, the new weights and all noise [%(default)s]")
    add("--save-every", type=number(int, 1), metavar="STEPS",
        help="steps between checkpoints [%(default)s]")
    add("--log-every", type=number(int, 1), default=20, metavar="STEPS",
        help="steps between log lines; several GPUs see Ctrl-C only then [%(default)s]")
    add("--eval-every", type=number(int, 0), default=0, metavar="STEPS",
        help="score the model in training and keep the best as best.pt; 0: never")
    add("--eval-dataset", choices=evaluate.DATASETS, default="synthetic", metavar="NAME",
        help="as --dataset of evaluate.py [%(default)s]")
    add("--eval-root", metavar="DIR", help="its folder")
    add("--max-errors", type=number(float, 0, 1), default=0.01, metavar="SHARE",
        help="of pairs that may be unusable before the run stops [%(default)s]")
    add = parser.add_argument_group("the machine").add_argument
    add("--device", help="cpu, cuda, cuda:1, ... [a GPU if there is one]")
    add("--precision", choices=("bf16", "fp16", "fp32"),
        help="[bf16; fp16 on a GPU without it]")
    add("--workers", type=number(int, 0), default=2, metavar="N",
        help="processes that prepare pairs, per GPU; 0: only this one [%(default)s]")
    add("--accumulate", type=number(int, 1), default=1, metavar="K",
        help="split a batch into K chunks, for less memory; the whole batch gives the negatives")
    add("--checkpoint-activations", action="store_true",
        help="for less memory: compute each block's forward pass twice")
    add("--compile", action="store_true", help="torch.compile: for long runs")
    add = parser.add_argument_group("the recipe").add_argument
    add("--init", metavar="MODEL", help="start from ViT-B/16, a CLIP or a SegCLIP [%(default)s]")
    add("--freeze", action=argparse.BooleanOptionalAction, default=False,
        help="keep CLIP's patch, position and token embeddings as they are")
    add("--image-encoder", metavar="FILE",
        help="pacl: embed the patches of a DINO, dino_vitbase16_pretrain.pth [CLIP's]")
    add("--vocabulary", metavar="V",
        help="learned, from the first captions; openai; or a file [%(default)s, or that of --init]")
    add("--text-length", type=number(int, 2), metavar="T",
        help="tokens of a caption, longer ones are cut [--context-length; paper: 32]")
    add("--nouns", metavar="FILE",
        help="one noun per line: the text of a pair is the caption or one of its nouns in one of "
        "OpenAI's 7 templates, as in PACL; synthetic: the words of the scenes; or none")
    add("--steps", type=number(int, 0), metavar="N", help="0 writes the untrained model")
    add("--epochs", type=number(float, 0), metavar="N", help="in place of --steps [paper: 10]")
    add("--batch-size", type=number(int, 1), metavar="B",
        help="pairs per step, of all processes together [%(default)s]")
    add("--lr", type=number(float, 0, 1e3), metavar="LR", help="peak learning rate [%(default)s]")
    add("--clip-lr", type=number(float, 0, 1e3), metavar="LR",
        help="of the text encoder and the image blocks before the group module [--lr; paper: 4e-6]")
    add("--warmup", type=number(float, 0, 1), metavar="SHARE", help="of the steps [%(default)s]")
    add("--weight-decay", type=number(float, 0, 1e3), default=0.05, metavar="W",
        help="of everything but biases [%(default)s]")
    add("--crop-scale", type=number(float, 1e-4, 1), metavar="SHARE",
        help="smallest share of an image in a crop [%(default)s]")
    add("--superpatch", choices=("floor", "majority"), default="floor",
        help="rule for patches on superpixel borders [%(default)s, the paper's]")
    add("--reconstruction-weight", type=number(float, 0), default=1.0, metavar="W",
        help="of L_rec in Eq. 7; 0: none [%(default)s]")
    add("--superpixel-weight", type=number(float, 0), default=1.0, metavar="W",
        help="of L_sup in Eq. 7; 1/L is the authors'; 0: none [%(default)s]")
    add = parser.add_argument_group("the model: see Config in model.py").add_argument
    for name, size in SIZES.items():
        values = f"[small: {getattr(SMALL, name)}, paper: {size.default}]"
        add("--" + name.replace("_", "-"), type=size.type, metavar="N", help=values)
    # fmt: on


def parse_args(argv=None):
    """-> the flags, with the recipe's values where none was given. Raises InputError."""
    choices = Parser(add_help=False)
    choices.add_argument("--recipe", choices=("small", "paper"), default="small", help="[small]")
    choices.add_argument(
        "--method",
        choices=("segclip", "clip", "pacl"),
        default="segclip",
        help="clip: the same encoders with CLIP's loss alone; pacl: an embedder for the patches "
        "of a frozen CLIP [%(default)s]",
    )
    choices.add_argument("--from-scratch", action="store_true", help="paper: no --init")
    known, _ = choices.parse_known_args(argv)
    defaults = dict(RECIPES[known.recipe, known.method])
    if known.from_scratch:
        defaults |= {"init": None, "freeze": False, "clip_lr": None}
        defaults["lr"] = RECIPES[known.recipe, "segclip"]["lr"]
    length = {name: defaults.pop(name, None) for name in ("steps", "epochs")}
    parser = Parser(__doc__, parents=[choices])
    add_arguments(parser)
    parser.set_defaults(**defaults)
    args = parser.parse_args(argv)
    if args.steps is not None and args.epochs is not None:
        parser.error("--steps or --epochs, not both")
    if args.steps is None and args.epochs is None:
        args.steps = length["steps"]
        args.epochs = length["epochs"]
    check(args, parser.error)
    return args


def check(args, error):
    """Calls error(message) for flags that do not go together."""
    if args.data is None:
        error(f"--recipe {args.recipe} needs --data")
    if args.from_scratch and args.init:
        error("--from-scratch or --init, not both")
    if args.nouns == "synthetic" and "synthetic" not in args.data:
        error("--nouns synthetic: those are the words of the scenes; give --nouns FILE, or none")
    if args.method == "pacl" and not args.init:
        error("--method pacl needs --init, a CLIP")
    if args.eval_every and args.eval_dataset in BENCHMARKS and not args.eval_root:
        error(f"--eval-dataset {args.eval_dataset} needs --eval-root, the folder that holds it")
    if args.method == "pacl" and args.accumulate > 1:
        error("--accumulate: the loss of --method pacl works in chunks already")
    of_segclip = ("first_stage_layers", *ADDED, *CONTRASTIVE)
    of_pacl = ("patch_scale", "image_encoder")
    unused = {
        "segclip": of_pacl,
        "clip": of_segclip + of_pacl,
        "pacl": (*of_segclip, "from_scratch", "freeze"),
    }
    for name in unused[args.method]:
        if getattr(args, name):
            error(f"--method {args.method} has no --{name.replace('_', '-')}")


def check_resumed(saved, flags, path):
    """Raises InputError unless a checkpoint is of a run with the same flags."""
    if not {"model", "merges", "optimizer", "scaler", "step", "pairs", "flags"} <= saved.keys():
        raise InputError(f"{path}: not a checkpoint of train.py that could be resumed")
    for name, value in flags.items():
        before = saved["flags"].get(name)
        if before != value and name not in RESUME_MAY_CHANGE:
            flag = name.replace("_", "-")
            raise InputError(f"{path}: was trained with --{flag} {before}, not {value}")


# --------------------------------------------------------------------------------------------------
# Model and optimizer


def choose_sizes(recipe, method, sizes):
    """The recipe's Config with the sizes {name: value} that were given. Raises InputError."""
    config = SMALL if recipe == "small" else Config()
    if method == "clip":  # there is no group module that other blocks would follow
        layers = sizes.get("vision_layers", config.vision_layers)
        sizes = sizes | {"first_stage_layers": layers}
    return dataclasses.replace(config, **sizes)


def build_model(method, init, config, sizes, vocab_size, image_encoder=None):
    """A model of this method, from `init` or from scratch. Raises InputError.

    config: from choose_sizes. sizes: those that were given, which the weights of init must have.
    """
    config = dataclasses.replace(config, vocab_size=vocab_size)
    activation = sizes.get("activation")
    if method == "clip":
        model = DenseCLIP(load_clip(init, activation) if init else CLIP(config))
    elif method == "pacl":
        clip = load_clip(init, activation)
        clip.config = dataclasses.replace(clip.config, patch_scale=config.patch_scale)
        model = PACL(clip, load_dino(image_encoder) if image_encoder else None)
    elif init is None:
        model = SegCLIP(config)
    else:
        added = {name: getattr(config, name) for name in ADDED}
        if "first_stage_layers" in sizes:  # otherwise it follows from the CLIP's depth
            added["first_stage_layers"] = sizes["first_stage_layers"]
        model = load_segclip(init, activation, **added)
    for name, value in sizes.items():
        actual = getattr(model.config, name)
        if value != actual:
            raise InputError(f"--{name.replace('_', '-')} {value}: {init} has {actual}")
    if model.config.vocab_size != vocab_size:
        tokens = f"{model.config.vocab_size} tokens, but the vocabulary has {vocab_size}"
        raise InputError(f"{init}: made for {tokens}")
    return model


def learn_vocabulary(source):
    """A tokenizer with 500 merges, learned from the first 500 captions of a source."""
    captions = []
    for i in range(min(500, len(source))):
        try:
            captions.append(source[i].caption)
        except SampleError:
            continue
    return Tokenizer.learn(captions, num_merges=500)


def freeze(model, embeddings=False, reconstruction=False):
    """Switches off the gradients of CLIP's embeddings, and of what only reconstruction needs."""
    prefixes = FROZEN if embeddings else ()
    if reconstruction:
        prefixes = (*prefixes, "reconstruction_layer.", "reconstruction_blocks.", "decoder.")
    for name, parameter in model.named_parameters():
        if name.startswith(prefixes):
            parameter.requires_grad_(False)


def parameter_groups(model, lr, clip_lr=None, weight_decay=0.0):
    """What is trained, by peak learning rate and weight decay, for AdamW (Section 3.2).

    clip_lr is for CLIP's text encoder, temperature and image blocks before the group module. All
    else has lr: what SegCLIP adds, and the blocks after it, pre-trained or not.
    """
    config = model.config
    late = ()
    if isinstance(model, SegCLIP):
        blocks = range(config.first_stage_layers, config.vision_layers)
        late = [f"clip.visual.transformer.resblocks.{i}." for i in blocks]
        late = (*late, "clip.visual.ln_post.", "clip.visual.proj")
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            early = name.startswith("clip.") and not name.startswith(late)
            rate = clip_lr if early and clip_lr is not None else lr
            decay = 0.0 if name.endswith("bias") else weight_decay  # as in the authors' program
            groups.setdefault((rate, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "peak_lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in sorted(groups.items())
    ]


def lr_factor(step, steps, warmup):
    """Linear warm-up to 1 in a share `warmup` of the steps, then a cosine to 0 (Section 3.2)."""
    warmup_steps = max(1, round(warmup * steps))
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))


def checkpoint_activations(model):
    """Keeps only the input of each block, and computes the rest again for the gradient."""
    for module in model.modules():
        if isinstance(module, Block):
            module.forward = functools.partial(
                checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False
            )


# --------------------------------------------------------------------------------------------------
# One step


def autocast(device, precision):
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[precision]
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def compute_gradients(parallel, batch, noise, weights, precision, scaler, extra, chunks=1):
    """The gradients of a batch's loss (Eq. 7), in .grad of the parameters, scaled by `scaler`.

    parallel: the model, or the DistributedDataParallel around it. batch: image [b, 3, H, W],
    superpatch [b, N], text [b, T]; these and the noise are this process's rows. weights: of L_rec
    and L_sup. extra: numbers [n] to be summed over the processes on the way. -> the losses of the
    whole batch and `extra`, one tensor, and the names of the losses.

    With chunks > 1 the activations of one chunk at a time are kept, and the contrastive loss still
    has the negatives of the whole batch (see gradients_of_features).
    """
    model = getattr(parallel, "module", parallel)
    world = dist.get_world_size() if dist.is_initialized() else 1
    context = autocast(batch[0].device, precision)
    parts_of_batch = list(zip(*(x.chunk(chunks) for x in batch)))
    parts_of_noise = [{n: x.chunk(chunks)[k] for n, x in noise.items()} for k in range(chunks)]
    if chunks > 1:
        con, g_image, g_text, g_scale = gradients_of_features(
            model, parts_of_batch, parts_of_noise, context
        )
    totals = 0
    for k, (image, superpatch, text) in enumerate(parts_of_batch):
        last = k == chunks - 1
        with nullcontext() if last or model is parallel else parallel.no_sync():
            with context:
                outputs = parallel(image, text, **parts_of_noise[k], reconstruct=weights[0] > 0)
            if chunks == 1:
                loss, parts = total_loss(outputs, image, superpatch, *weights)
            else:  # surrogate with the gradient of the whole batch's contrastive loss
                inner = (outputs["image_features"] * g_image[k]).sum()
                inner = inner + (outputs["text_features"] * g_text[k]).sum()
                inner = inner + outputs["logit_scale"] * g_scale / chunks
                loss, parts = total_loss(outputs, image, superpatch, *weights, con=inner * chunks)
                parts["con"] = con
            totals = totals + torch.stack(list(parts.values())).detach() / chunks
            if last:
                values = torch.cat([totals / world, extra])
                if world > 1:
                    dist.all_reduce(values)
                # If one process's loss is not finite, the gradients of all must not be.
                finite = values[: len(parts)].isfinite().all()
                loss = loss * torch.where(finite, 1.0, math.nan)
            scaler.scale(loss / chunks).backward()
    return values, list(parts)


def gradients_of_features(model, parts_of_batch, parts_of_noise, context):
    """The contrastive loss of a batch in chunks, and its gradients with respect to the features.

    First all features without gradient, then the loss. The second pass, chunk by chunk with the
    same noise, carries these gradients on to the parameters (Gao et al., 2021, "Scaling deep
    contrastive learning batch size under memory limited setup").
    """
    features = []
    with torch.no_grad(), context:
        for (image, _, text), noise in zip(parts_of_batch, parts_of_noise):
            outputs = model(image, text, **noise, reconstruct=False)
            features.append((outputs["image_features"].float(), outputs["text_features"].float()))
    image_features, text_features = (torch.cat(x).requires_grad_() for x in zip(*features))
    scale = model.clip.logit_scale.detach().requires_grad_()
    con = contrastive_loss(image_features, text_features, scale)
    g_image, g_text, g_scale = torch.autograd.grad(con, (image_features, text_features, scale))
    chunks = len(features)
    return con.detach(), g_image.chunk(chunks), g_text.chunk(chunks), g_scale


def take_step(parallel, optimizer, batch, noise, weights, precision, scaler, chunks=1):
    """Gradients, clipped to norm 1, and the optimizer's step. Nothing here waits for the GPU.

    batch: image uint8 [b, 3, H, W], superpatch, text, extra. Other arguments and results: see
    compute_gradients; the gradients' norm is appended to the numbers.
    """
    image, superpatch, text, extra = batch
    batch = normalise(image), superpatch, text
    optimizer.zero_grad()
    values, names = compute_gradients(
        parallel, batch, noise, weights, precision, scaler, extra, chunks
    )
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(parallel.parameters(), 1.0)
    scaler.step(optimizer)  # skipped if a gradient is not finite; after DDP's sum on all processes
    scaler.update(None if precision == "fp16" else 1.0)
    with torch.no_grad():  # beyond the loss's clamp it would have no gradient, and never come back
        getattr(parallel, "module", parallel).clip.logit_scale.clamp_(max=math.log(100))
    return torch.cat([values, norm[None]]), names


class GracefulExit:
    """Inside `with`, Ctrl-C and SIGTERM only set `asked`, so that the step can end and be saved."""

    def __enter__(self):
        self.asked = False
        self.handlers = {s: signal.signal(s, self.ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def ask(self, number, frame):
        self.asked = True

    def __exit__(self, *_):
        for which, handler in self.handlers.items():
            signal.signal(which, handler)


class Meter:
    """Averages the losses since the last log line, and counts sample errors and skipped steps."""

    def __init__(self, state, steps, batch_size, weights):
        self.errors = state.errors
        self.steps = steps
        self.batch_size = batch_size
        self.weights = {"con": 1.0, "rec": weights[0], "sup": weights[1]}
        self.printed = Counter()
        self.unread = []
        self.recent = []
        self.skipped = 0
        self.restart(state.step)

    def restart(self, step):
        self.since = time.time()
        self.since_step = step

    def extra(self, stop, errors):
        """What is summed over the processes: a wish to stop, and errors by kind."""
        kinds = [error.args[0] for error in errors]
        for kind, error in zip(kinds, errors):
            self.printed[kind] += 1
            if self.printed[kind] <= 3:
                more = "; more of the kind are only counted" if self.printed[kind] == 3 else ""
                print(f"{error}{more}", file=sys.stderr)
        counts = [kinds.count(kind) for kind in SampleError.KINDS]
        return torch.tensor([stop, *counts], dtype=torch.float32)

    def add(self, values, names, wait):
        """The numbers of one step. With `wait` they are read, which waits for the GPU.

        -> whether a process wants to stop, the same on all. Raises InputError for a broken run.
        """
        self.unread.append(values)
        if not wait:
            return False
        # Losses (compute_gradients), what extra() made, the norm (take_step).
        names = [*names, "stop", *SampleError.KINDS, "grad"]
        stop = False
        for numbers in torch.stack(self.unread).tolist():
            row = dict(zip(names, numbers))
            stop = stop or row["stop"] > 0
            self.errors.update({kind: int(row[kind]) for kind in SampleError.KINDS if row[kind]})
            if math.isfinite(row["grad"]):
                self.skipped = 0
                self.recent.append(row)
            else:
                self.skipped += 1
        self.unread = []
        if self.skipped >= 10:
            raise InputError(f"{self.skipped} gradients in a row are not finite; try a lower --lr")
        return stop

    def log(self, file, names, step, **others):
        """Appends a line to log.jsonl, and prints it: means since the last one, and `others`."""
        rows = self.recent
        self.recent = []
        if file is None or not rows:  # file is the first process's
            return
        means = {name: sum(row[name] for row in rows) / len(rows) for name in (*names, "grad")}
        loss = sum(self.weights[name] * means[name] for name in names)
        steps_per_second = (step - self.since_step) / (time.time() - self.since)
        rate = steps_per_second * self.batch_size
        line = {"step": step, **means, "loss": loss, **others, "pairs_per_second": rate}
        line["errors"] = self.errors.total()
        file.write(json.dumps(line) + "\n")
        file.flush()
        eta = datetime.timedelta(seconds=round((self.steps - step) / steps_per_second))
        losses = " ".join(f"{name} {means[name]:.2f}" for name in names)
        print(  # in 100 columns
            f"step {step}/{self.steps}  loss {loss:.3f}: {losses}  grad {means['grad']:.1f}  "
            f"lr {line['lr']:.0e}  {rate:.0f} pairs/s  ETA {eta}",
            flush=True,
        )
        self.restart(step)

    def too_many_errors(self, step, share):
        return self.errors.total() > share * max(1000, step * self.batch_size)

    def summary(self):
        return ", ".join(f"{count} x {kind}" for kind, count in self.errors.most_common())


# --------------------------------------------------------------------------------------------------
# The run


def open_log(folder, resumed_step):
    """FOLDER/log.jsonl for appending: of a resumed run up to its step, else empty.

    A folder that holds an earlier run is moved away.
    """
    path = folder / "log.jsonl"
    lines = []
    if resumed_step is None and path.exists() and any(folder.glob("checkpoint*.pt")):
        n = 1
        while Path(f"{folder}.{n}").exists():
            n += 1
        os.rename(folder, f"{folder}.{n}")
        print(f"{folder} held another run, which is now in {folder}.{n}", file=sys.stderr)
    elif resumed_step is None and any(folder.glob("checkpoint*.pt")):
        raise InputError(f"{folder}: holds a checkpoint of something else; give another --output")
    elif resumed_step is not None and path.exists():
        for line in path.read_text(errors="replace").splitlines():
            try:
                if json.loads(line)["step"] <= resumed_step:
                    lines.append(line + "\n")
            except (ValueError, LookupError, TypeError):  # a line that was cut off
                continue
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines))
    return open(path, "a")


def introduce(state, sources, superpixel_weight):
    """Prints what is trained, and how many sources have saved superpixels."""
    total = sum(p.numel() for p in state.model.parameters())
    for group in state.optimizer.param_groups:
        count = sum(p.numel() for p in group["params"])
        total -= count
        rates = f"lr {group['peak_lr']:.1e}  weight decay {group['weight_decay']}"
        print(f"{count / 1e6:8.2f} M parameters  {rates}")
    print(f"{total / 1e6:8.2f} M parameters  frozen")
    stores = [source.superpixels for source in sources if hasattr(source, "superpixels")]
    if stores and superpixel_weight:
        saved = sum(store.places is not None for store in stores)
        config = state.model.config
        sizes = f"--image-size {config.image_size} --patch-size {config.patch_size}"
        print(
            f"{saved} of {len(stores)} shards or lists have superpixels; to compute them: "
            f"python data.py superpixels {sizes} --data ..."
        )


def wrap_model(model, activations, compiled):
    """The model as it is called in training: with activation checkpointing, compiled, in DDP."""
    if activations:
        checkpoint_activations(model)
    if compiled:
        model.compile()
    return DistributedDataParallel(model) if dist.is_initialized() else model


def choose_nouns(name):
    """The words of --nouns. Raises InputError."""
    if name in (None, "none"):
        return ()
    nouns = SCENE_WORDS if name == "synthetic" else read_lines(name)
    if not nouns:
        raise InputError(f"--nouns {name}: no noun in it; there should be one per line")
    return tuple(nouns)


def open_new_run(open_data, method, init, config, sizes, vocabulary, image_encoder):
    """-> model, tokenizer, sources of pairs. Raises InputError.

    open_data: Config -> sources. Others: see build_model.
    """
    if init and init not in MODELS and not Path(init).is_file():
        advice = f"it takes a file or one of {', '.join(MODELS)}"
        if init == CLIP_OF_SCENES:
            advice = "run `python train.py --method clip`, or give another --init"
        raise InputError(f"--init {init}: does not exist; {advice}")
    sources = None
    if init is None:  # the vocabulary may be learned from the captions
        sources = open_data(config)
    if vocabulary == "learned" and sources:
        tokenizer = learn_vocabulary(sources[0])
    else:
        checkpoint_file = None if init in MODELS else init
        named = vocabulary in ("openai", "learned")
        tokenizer = load_tokenizer(checkpoint_file, None if named else vocabulary)
    model = build_model(method, init, config, sizes, tokenizer.vocab_size, image_encoder)
    return model, tokenizer, sources or open_data(model.config)  # crops of the weights' size


@dataclass
class State:
    """What a checkpoint holds, so that a run can be resumed."""

    model: torch.nn.Module
    tokenizer: Tokenizer
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    lengths: list  # of the sources
    flags: dict
    step: int = 0
    errors: Counter = field(default_factory=Counter)
    saved_step: int | None = None

    def save(self, folder, rank):
        """Writes checkpoint.pt, unless it has this step already; on the first process."""
        if rank or self.step == self.saved_step:
            return
        self.saved_step = self.step
        save_checkpoint(
            folder / "checkpoint.pt",
            self.model,
            rotate=True,
            merges=self.tokenizer.merges,
            optimizer=self.optimizer.state_dict(),
            scaler=self.scaler.state_dict(),
            pairs=self.lengths,
            flags=self.flags,
            step=self.step,
            errors=dict(self.errors),
        )

    def restore(self, saved, path):
        """Raises InputError if the data has changed, or processes find different checkpoints."""
        if saved and saved["pairs"] != self.lengths:
            before = sum(saved["pairs"])
            raise InputError(f"{path}: was trained on {before} pairs, not {sum(self.lengths)}")
        if saved:
            self.optimizer.load_state_dict(saved["optimizer"])
            self.scaler.load_state_dict(saved["scaler"])
            self.step = saved["step"]
            self.saved_step = self.step
            self.errors = Counter(saved["errors"])
        if dist.is_initialized():
            device = next(self.model.parameters()).device
            extremes = torch.tensor([self.step, -self.step], device=device)
            dist.all_reduce(extremes, dist.ReduceOp.MAX)
            if extremes.sum():
                raise InputError(
                    f"{path}: every process must find the same file; use a shared disk"
                )


def choose_precision(precision, device):
    """--precision, or the best that the device has. Sets TF32 for what is not in half precision."""
    if precision is None:
        precision = "bf16"
        if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            precision = "fp16"
    if device.type == "cuda" and precision != "fp32":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
    return precision


def tune_cpu(num_workers, num_patches, world):
    """Settings that change the speed on a CPU."""
    # The fused attention is for long sequences: in bf16 its backward pass is slow for short ones.
    torch.backends.cuda.enable_flash_sdp(num_patches >= 128)
    # The other one would convert bf16 to fp32 and back.
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    if world == 1 and num_workers:
        # Threads that compete with the workers for cores cost a third of the speed.
        free = max(1, (os.cpu_count() or 1) - num_workers)
        torch.set_num_threads(min(torch.get_num_threads(), free))


def draw_noise(model, seed, step, batch_size, num_patches, rows, generator):
    """The noise of a step, of these rows of the batch: a function of the seed and the step."""
    generator.manual_seed(seed * 1_000_003 + step)
    noise = model.draw_noise(batch_size, num_patches, generator)
    return {name: values[rows] for name, values in noise.items()}


def make_loader(pairs, sources, batches, workers):
    """The batches of the steps that are left, prepared by worker processes.

    Scenes without crops are the same in each epoch: for more than one, all are prepared first.
    """
    scenes = all(isinstance(source, SyntheticScenes) for source in sources)
    total = sum(batches.sizes)
    again = total < len(batches.steps) * batches.batch_size
    if scenes and again and pairs.crop_scale == 1 and not pairs.nouns:
        if batches.rows.start == 0:  # the first process
            print(f"preparing {total:,} scenes, before the first step", flush=True)
        keys = [(i, i) for i in range(total)]
        pairs = InMemory(list(parallel_map(pairs.__getitem__, keys, workers)))
        workers = 0
    return DataLoader(
        pairs,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=ignore_signals,
    )


class Scorer:
    """Scores the model in training, and keeps the best one as best.pt."""

    def __init__(self, name, root, config, folder, workers):
        self.workers = workers
        self.dataset = evaluate.open_dataset(name, root, config.image_size)
        self.protocol = evaluate.choose_protocol("segclip", self.dataset, config)
        self.path = folder / "best.pt"

    def __call__(self, model, tokenizer, step, rank, world):
        model.eval()
        text, class_of_word = evaluate.class_features(model, tokenizer, self.protocol)
        segmenter = evaluate.Segmenter(model, text, class_of_word, self.protocol)
        metrics = evaluate.evaluate(
            segmenter, self.dataset, workers=self.workers, rank=rank, world=world
        )
        model.train()
        if metrics is None:  # not the first process
            return
        print(f"step {step}  mIoU {100 * metrics['mIoU']:.2f} %", flush=True)
        metrics["dataset"] = self.dataset.name
        best = read_weights(self.path)["metrics"] if self.path.exists() else {}
        if best.get("dataset") != self.dataset.name or metrics["mIoU"] > best["mIoU"]:
            save_checkpoint(self.path, model, merges=tokenizer.merges, step=step, metrics=metrics)


def main(argv=None):
    args = parse_args(argv)
    nouns = choose_nouns(args.nouns)
    rank, world, device = evaluate.start_processes(args.device)
    if args.batch_size % (world * args.accumulate):
        parts = f"{world} processes x {args.accumulate} chunks"
        raise InputError(f"--batch-size {args.batch_size}: cannot be split over {parts}")
    precision = choose_precision(args.precision, device)
    flags = vars(args) | {"precision": precision}
    folder = Path(args.output)
    saved, resumed = last_checkpoint(folder / "checkpoint.pt") if args.resume else (None, None)
    if saved:
        check_resumed(saved, flags, resumed)

    torch.manual_seed(args.seed)
    sizes = {name: getattr(args, name) for name in SIZES if getattr(args, name) is not None}
    config = choose_sizes(args.recipe, args.method, sizes)
    open_data = functools.partial(
        open_pairs,
        args.data,
        seed=args.seed,
        workers=args.workers,
        max_errors=args.max_errors,
        rank=rank,
        world=world,
    )
    if saved:
        model = load_model(resumed)
        tokenizer = Tokenizer(saved["merges"])
        sources = open_data(model.config)
    else:
        model, tokenizer, sources = open_new_run(
            open_data, args.method, args.init, config, sizes, args.vocabulary, args.image_encoder
        )
    model.to(device)
    config = model.config
    if args.text_length and args.text_length > config.context_length:
        raise InputError(f"--text-length {args.text_length}: more than {config.context_length}")
    lengths = [len(source) for source in sources]
    steps = args.steps
    if steps is None:
        steps = math.ceil(args.epochs * sum(lengths) / args.batch_size)

    no_decoder = args.method == "segclip" and not args.reconstruction_weight
    freeze(model, embeddings=args.freeze, reconstruction=no_decoder)
    groups = parameter_groups(model, args.lr, args.clip_lr, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-6, fused=True)
    # Without fp16 it scales by 1, and only skips steps whose gradients are not finite.
    scaler = torch.amp.GradScaler(device.type, 2.0**16 if precision == "fp16" else 1.0)
    state = State(model, tokenizer, optimizer, scaler, lengths, flags)
    state.restore(saved, resumed)

    pairs = TrainingPairs(
        ConcatDataset(sources),
        tokenizer,
        config,
        crop_scale=args.crop_scale,
        seed=args.seed,
        text_length=args.text_length,
        rule=args.superpatch if args.superpixel_weight else None,
        nouns=nouns,
        templates=evaluate.TEMPLATES[7],
    )
    share = args.batch_size // world
    rows = slice(rank * share, (rank + 1) * share)  # of each batch, this process's
    left = range(state.step, steps)
    batches = Batches(lengths, args.seed, args.batch_size, rows, left)
    loader = make_loader(pairs, sources, batches, args.workers)
    scorer = None
    if args.eval_every:
        scorer = Scorer(args.eval_dataset, args.eval_root, config, folder, args.workers)
    log = None
    if rank == 0:
        log = open_log(folder, state.step if saved else None)
        introduce(state, sources, args.superpixel_weight)
        print(
            f"{sum(lengths):,} pairs, {steps} steps of {args.batch_size}; a vocabulary of "
            f"{tokenizer.vocab_size} tokens; {world} x {device.type}, {precision}",
            flush=True,
        )
        if args.resume:
            print(f"resumed at step {state.step}" if saved else "nothing to resume: a new run")
    num_patches = (config.image_size // config.patch_size) ** 2
    if device.type == "cpu":
        tune_cpu(loader.num_workers, num_patches, world)
    parallel = wrap_model(model, args.checkpoint_activations, args.compile)
    weights = args.reconstruction_weight, args.superpixel_weight
    meter = Meter(state, steps, args.batch_size, weights)
    generator = torch.Generator(device)
    broken = False
    model.train()
    with GracefulExit() as stop:
        for image, superpatch, text, errors in loader:
            factor = lr_factor(state.step, steps, args.warmup)
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
            extra = meter.extra(stop.asked, errors)
            batch = [x.to(device, non_blocking=True) for x in (image, superpatch, text, extra)]
            noise = draw_noise(
                model, args.seed, state.step, args.batch_size, num_patches, rows, generator
            )
            values, names = take_step(
                parallel, optimizer, batch, noise, weights, precision, scaler, args.accumulate
            )
            state.step += 1
            last = state.step == steps
            log_now = state.step % args.log_every == 0 or state.step == left.start + 1 or last
            score_now = scorer and (state.step % args.eval_every == 0 or last)
            save_now = state.step % args.save_every == 0 or score_now
            read_now = log_now or save_now or device.type == "cpu"  # waits for the GPU
            read_now = read_now or (stop.asked and world == 1)
            stopped = meter.add(values, names, read_now)
            if log_now:
                scale = model.clip.logit_scale.exp().item()
                meter.log(log, names, state.step, lr=args.lr * factor, scale=scale)
            broken = meter.too_many_errors(state.step, args.max_errors)
            if stopped or broken:
                break
            if save_now:
                state.save(folder, rank)
            if score_now:
                scorer(model, tokenizer, state.step, rank, world)
                meter.restart(state.step)
        state.save(folder, rank)
    if broken:
        advice = "repair the data and start again, or allow more and --resume"
        raise InputError(f"{meter.summary()}: more than --max-errors {args.max_errors}; {advice}")
    if rank == 0:
        if state.errors:
            print(meter.summary())
        if state.step < steps:
            print(f"stopped at step {state.step} of {steps}: --resume continues")
        print(f"{folder / 'checkpoint.pt'} has step {state.step}")


if __name__ == "__main__":
    evaluate.run_program(main, "stopped")
