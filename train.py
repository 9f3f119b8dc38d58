"""Train SegCLIP on image-text pairs, or PACL, or the CLIP that both are compared with.

python train.py                      a small SegCLIP from scratch on synthetic scenes, in minutes
python train.py --method pacl        the embedder of PACL, on a CLIP of the scenes, trained first
python train.py --recipe paper --data "cc3m/{00000..00331}.tar" dataset_coco.json=coco
torchrun --nproc_per_node=8 train.py --recipe paper ...       the same, split over eight processes
"""

import argparse
import dataclasses
import datetime
import functools
import inspect
import json
import math
import os
import re
import shlex
import signal
import sys
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

import evaluate
from clip_loader import (
    MODELS,
    InputError,
    ManualPage,
    Tokenizer,
    git_revision,
    last_checkpoint,
    load_clip,
    load_dino,
    load_model,
    load_segclip,
    load_tokenizer,
    make_folder,
    read_weights,
    run_program,
    save_checkpoint,
    start_processes,
)
from data import (
    SCENE_WORDS,
    Batches,
    Fault,
    Prepared,
    SyntheticScenes,
    TrainingPairs,
    collate,
    ignore_signals,
    normalise,
    open_pairs,
    raised,
    read_lines,
)
from losses import contrastive_loss, total_loss
from model import CLIP, PACL, Block, Config, DenseCLIP, SegCLIP

# The embedded default. Two parts of the paper's model are left out of it, the cross-attention layers and the blocks after
# the group module: with either, words end up on the wrong regions (the README has the numbers). They let each region see
# the whole picture, and the maximum over the regions never asks which one carries which word.
SMALL = Config(
    image_size=64,
    patch_size=8,
    vision_width=128,
    vision_layers=2,
    embed_dim=128,
    context_length=24,
    text_width=128,
    text_layers=2,
    first_stage_layers=2,
    num_centers=16,  # without cross-attention they are the same for all pictures: enough for each word to have its own
    cross_layers=0,
    gumbel_tau=3.0,  # from scratch the scores are so far apart that 0.9 leaves the assignment hardly any gradient
    decoder_layers=1,
)
CLIP_OF_SCENES = f"{evaluate.RUNS['clip']}/checkpoint.pt"  # where --method clip leaves it, and --method pacl looks for it
_SMALL = {
    "data": ["synthetic"],
    "output": evaluate.RUNS["segclip"],
    "save_every": 200,
    "vocabulary": "learned",
    "steps": 1700,
    "batch_size": 64,
    "lr": 1e-3,
    "warmup": 0.1,
    "crop_scale": 1.0,
}
_PAPER = {  # Section 3.2; warm-up, decay, crop and what is frozen are the authors' code's, of which the paper is silent
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
_CONTRASTIVE = {"clip_lr": None, "reconstruction_weight": 0.0, "superpixel_weight": 0.0}
_PACL = _CONTRASTIVE | {"freeze": False, "weight_decay": 0.2}
RECIPES = {  # the defaults, by --recipe and --method
    "small": {
        "segclip": _SMALL,
        "clip": {**_SMALL, **_CONTRASTIVE, "output": evaluate.RUNS["clip"]},
        "pacl": {
            **_SMALL,
            **_PACL,
            "output": evaluate.RUNS["pacl"],
            "init": CLIP_OF_SCENES,
            "nouns": "synthetic",
            "steps": 600,
            "lr": 3e-3,
        },
    },
    "paper": {
        "segclip": _PAPER,
        "clip": {
            **_PAPER,
            **_CONTRASTIVE,
            "output": "runs/paper-clip",
            "lr": _PAPER["clip_lr"],
        },  # all that it trains is CLIP's
        # As others quote the paper; the crop and the length of texts are SegCLIP's.
        "pacl": {**_PAPER, **_PACL, "output": "runs/paper-pacl", "lr": 5e-4, "batch_size": 4096, "warmup": 0.0},
    },
}
SIZES = [field for field in dataclasses.fields(Config) if field.name != "vocab_size"]  # that one is the tokenizer's
ADDED = ("num_centers", "cross_layers", "center_std", "gumbel_tau", "mask_ratio", "decoder_layers")
# What the authors' program does not train when it starts from CLIP (the class token is not used at all).
FROZEN = (
    *("clip.visual.conv1.", "clip.visual.positional_embedding", "clip.visual.ln_pre."),
    *("clip.token_embedding.", "clip.positional_embedding"),
)
# Flags with which a run may go on otherwise than it began: they change no number but by rounding (--device: and the noise).
FREE = (
    *("output", "resume", "save_every", "save_minutes", "keep", "evaluate", "eval_every", "log_every", "device", "workers"),
    *("max_faults", "accumulate", "checkpoint_activations", "compile"),
)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        usage="python train.py [--recipe small|paper] [--method segclip|clip|pacl] [--data PAIRS] [...]",
        description=__doc__,
        epilog="[x] is the default. To see those of the paper: python train.py --recipe paper --help",
        formatter_class=ManualPage,
    )
    # fmt: off
    run = parser.add_argument_group("the run")
    add = run.add_argument
    add("--recipe", choices=RECIPES, default="small", help="sets the defaults below: for minutes on a laptop, or the paper's")
    add("--method", choices=RECIPES["small"], default="segclip",
        help="clip: the baseline, the same encoder and texts with CLIP's class token and its loss alone; pacl: an embedder of "
        "the patches of a frozen CLIP [%(default)s]")
    add("--data", nargs="+", metavar="PAIRS",
        help="one or more of: synthetic; CAPTIONS.json=FOLDER (COCO's or Karpathy's, and the folder of its pictures); a .tsv, "
        '.csv or .jsonl of paths and captions (likewise); "SHARDS{000..331}.tar" of img2dataset [synthetic; paper: needed]')
    add("--output", metavar="DIR", help="for checkpoint.pt and log.jsonl; a run that is there is moved aside [%(default)s]")
    add("--resume", action="store_true", help="go on from the last good checkpoint in DIR; begin if there is none")
    add("--seed", type=int, default=0, metavar="N", help="of the order, the new weights and all noise [%(default)s]")
    add("--save-every", type=int, metavar="STEPS", help="between checkpoints; 0: by the clock alone [%(default)s]")
    add("--save-minutes", type=float, default=15, metavar="M", help="between checkpoints at most [%(default)s]")
    add("--keep", type=int, default=2, metavar="N", help="checkpoints: checkpoint.pt, checkpoint.1.pt, ... [%(default)s]")
    add("--log-every", type=int, default=20, metavar="STEPS", help="between log lines [%(default)s]")
    add("--eval-every", type=int, default=0, metavar="STEPS",
        help="score the model on the way, and keep the best as best.pt; 0: do not [%(default)s]")
    add("--evaluate", default="--dataset synthetic", metavar="FLAGS", help='of evaluate.py, for that ["%(default)s"]')
    add("--max-faults", type=float, default=0.01, metavar="SHARE",
        help="of the pairs that may be unusable before the run stops; more for data that you know to be dirty [%(default)s]")
    machine = parser.add_argument_group("the machine; it changes numbers by rounding only (--device: and the noise)")
    add = machine.add_argument
    add("--device", help="cpu, cuda, cuda:1, ... [a GPU if there is one]")
    add("--precision", choices=("bf16", "fp16", "fp32"),
        help="fp32 for an old CPU, or to compare to the last digit [bf16; fp16 on a GPU that does not know it]")
    add("--workers", type=int, default=2, metavar="N",
        help="processes that prepare pairs, more where the GPU waits for them; 0: none but this [%(default)s]")
    add("--accumulate", type=int, default=1, metavar="K",
        help="for less memory: work in K chunks, with the whole batch as negatives, at the price of one forward pass more "
        "[%(default)s]")
    add("--checkpoint-activations", action="store_true",
        help="for less memory, too: compute each block's forward pass twice")
    add("--compile", action="store_true", help="torch.compile: minutes at the start, then faster steps; for long runs")
    recipe = parser.add_argument_group("the recipe")
    add = recipe.add_argument
    add("--init", metavar="MODEL", help="weights to start from: ViT-B/16, a CLIP, a SegCLIP [none; paper: ViT-B/16]")
    add("--from-scratch", action="store_true", help="no --init, and with it no --freeze and no --clip-lr by default")
    add("--freeze", action=argparse.BooleanOptionalAction, default=False,
        help="keep CLIP's patch, position and token embeddings as they are [no; paper: yes]")
    add("--image-encoder", metavar="FILE",
        help="pacl: embed the patches of a DINO, dino_vitbase16_pretrain.pth; the paper's Table 3, where CLIP's do better "
        "[CLIP's]")
    add("--vocabulary", metavar="V",
        help='"learned" of the first captions, "openai", or a file; of --init, if it has one [%(default)s]')
    add("--text-length", type=int, metavar="T",
        help="tokens of a caption; fewer are faster, and longer captions are cut [--context-length; paper: 32]")
    add("--nouns", metavar="FILE",
        help="a noun in each line: the text of a pair is then the caption or one of its nouns in one of OpenAI's 7 templates, as "
        "in PACL; all as often, so that with two nouns one text in 15 is the caption. \"synthetic\": the words of the scenes; "
        '"none": captions alone [none; pacl on the scenes: synthetic]')
    add("--steps", type=int, metavar="N",
        help="length of the run; 300 for a first look; 0 writes the untrained model, to compare with "
        f"[small: {_SMALL['steps']}; with pacl {RECIPES['small']['pacl']['steps']}]")
    add("--epochs", type=float, metavar="N", help="in place of --steps: how often each pair is seen [paper: 10]")
    add("--batch-size", type=int, metavar="B", help="pairs in a step, over all processes together [%(default)s]")
    add("--lr", type=float, metavar="LR", help="learning rate at its peak; less if the loss jumps [%(default)s]")
    add("--clip-lr", type=float, metavar="LR",
        help="the same for the text encoder and the image blocks before the group module [--lr; paper: 4e-6]")
    add("--warmup", type=float, metavar="SHARE", help="of the steps in which the rates rise [%(default)s]")
    add("--weight-decay", type=float, default=0.05, metavar="W", help="of everything but biases [%(default)s]")
    add("--crop-scale", type=float, metavar="SHARE", help="of a picture that a crop has at least [%(default)s]")
    add("--superpatch", choices=("floor", "majority"), default="floor",
        help="rule for patches between superpixels: the paper's, or the id that most pixels have [%(default)s]")
    add("--reconstruction-weight", type=float, default=1.0, metavar="W", help="of L_rec in Eq. 7; 0: none [%(default)s]")
    add("--superpixel-weight", type=float, default=1.0, metavar="W",
        help="of L_sup in Eq. 7; 1/L is the authors'; 0: none [%(default)s]")
    sizes = parser.add_argument_group("the model; with --init, what CLIP has stays as it is")
    # fmt: on
    comments = dict(  # the same words as there
        re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Config), re.MULTILINE)
    )
    for field in SIZES:
        values = f"[small: {getattr(SMALL, field.name)}, paper: {field.default}]"
        what = f"{comments.get(field.name, '')} {values}".lstrip()
        sizes.add_argument("--" + field.name.replace("_", "-"), type=field.type, metavar="N", help=what)

    # The recipe's values become the defaults, so that every flag that is given stands. (Of steps and epochs, one is given.)
    defaults = recipe_defaults(argv)
    length = {name: defaults.pop(name, None) for name in ("steps", "epochs")}
    parser.set_defaults(**defaults)
    args = parser.parse_args(argv)
    if args.steps is None and args.epochs is None:
        args.steps, args.epochs = length["steps"], length["epochs"]
    return args


def recipe_defaults(argv):
    """The entry of RECIPES that the command line asks for; what is wrong in it is left for parse_args to say."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("--recipe", choices=RECIPES, default="small")
    parser.add_argument("--method", choices=RECIPES["small"], default="segclip")
    parser.add_argument("--from-scratch", action="store_true")
    try:
        args = parser.parse_known_args(argv)[0]
    except argparse.ArgumentError:
        args = parser.parse_args([])
    defaults = dict(RECIPES[args.recipe][args.method])
    if args.from_scratch:
        defaults |= {"init": None, "freeze": False, "clip_lr": None, "lr": RECIPES[args.recipe]["segclip"]["lr"]}
    return defaults


def check(args, world):
    """Raises InputError for flags that make no sense."""
    limits = {"seed": 2**32 - 1, "warmup": 1.0, "epochs": 1e6, "lr": 1e3, "clip_lr": 1e3, "max_faults": 0.99}
    least = {"keep": 1, "log_every": 1, "accumulate": 1, "text_length": 2, "save_minutes": 1e-3, "batch_size": 1}
    others = ("save_every", "eval_every", "workers", "steps", "weight_decay")
    for name in (*others, "reconstruction_weight", "superpixel_weight", *limits, *least):
        value = getattr(args, name)
        if value is not None and not least.get(name, 0) <= value <= limits.get(name, math.inf):
            raise InputError(f"--{name.replace('_', '-')} {value}: out of range")
    if args.batch_size % (world * args.accumulate):
        chunks = f" of {args.accumulate} chunks each" if args.accumulate > 1 else ""
        raise InputError(f"--batch-size {args.batch_size} cannot be split over {world} processes{chunks}")
    if not 0 < args.crop_scale <= 1:
        raise InputError(f"--crop-scale {args.crop_scale}: must be more than 0 and at most 1")
    if args.steps is not None and args.epochs is not None:
        raise InputError("--steps or --epochs, not both")
    if args.data is None:
        raise InputError(f"--recipe {args.recipe} needs --data")
    if args.init == CLIP_OF_SCENES and args.data != ["synthetic"]:
        advice = "a CLIP that knows their words, for example of train.py --method clip --data ..."
        raise InputError(f"--method {args.method} on other data than the scenes needs --init, {advice}")
    if args.nouns == "synthetic" and "synthetic" not in args.data:
        raise InputError("--nouns synthetic: the words of the scenes, which are not in --data; --nouns FILE, or none")
    if args.from_scratch and args.init:
        raise InputError("--from-scratch or --init, not both")
    of_segclip = ("first_stage_layers", *ADDED, "clip_lr", "reconstruction_weight", "superpixel_weight")
    of_pacl = ("patch_scale", "image_encoder")
    unread = {"segclip": of_pacl, "clip": of_segclip + of_pacl, "pacl": (*of_segclip, "from_scratch", "freeze")}
    for name in unread[args.method]:
        if getattr(args, name):
            raise InputError(f"--method {args.method} has no --{name.replace('_', '-')}")
    if args.method == "pacl" and args.accumulate > 1:
        raise InputError("--accumulate: the loss of --method pacl works in chunks already")


def check_resumed(state, args, path):
    """Raises InputError unless the checkpoint is of a run with the same flags: it could not go on as it began."""
    if not {"model", "merges", "optimizer", "scaler", "step", "pairs", "faults", "args"} <= state.keys():
        raise InputError(f"{path}: not a checkpoint of train.py, which could be resumed")
    for name, value in vars(args).items():
        if name not in FREE and state["args"].get(name) != value:
            flag = "--" + name.replace("_", "-")
            had, now = ("its default" if x is None else x for x in (state["args"].get(name), value))
            raise InputError(f"{path}: its run had {flag} {had}, not {now}; use the same flags")


def choose_tokenizer(args, sources):
    if args.init is None and args.vocabulary == "learned":
        captions = []
        for i in range(min(500, len(sources[0]))):
            try:
                captions.append(sources[0][i].caption)
            except Fault:
                continue
        return Tokenizer.learn(captions, num_merges=500)
    file = args.init if args.init and Path(args.init).is_file() else None
    return load_tokenizer(file, None if args.vocabulary in ("openai", "learned") else args.vocabulary)


def choose_sizes(args):
    """The recipe's Config, with the flags that were given. Raises InputError for sizes that do not fit together."""
    base = SMALL if args.recipe == "small" else Config()
    given = {field.name: getattr(args, field.name) for field in SIZES if getattr(args, field.name) is not None}
    if args.method == "clip":  # there is no group module to come after some of the blocks
        given["first_stage_layers"] = given.get("vision_layers", base.vision_layers)
    try:
        return dataclasses.replace(base, **given)
    except ValueError as error:
        raise InputError(str(error)) from None


def build_model(args, vocab_size):
    """--method's model, from --init or from scratch. Raises InputError for sizes that do not fit the weights."""
    config = dataclasses.replace(choose_sizes(args), vocab_size=vocab_size)
    try:
        if args.method == "clip":
            model = DenseCLIP(load_clip(args.init, args.activation) if args.init else CLIP(config))
        elif args.method == "pacl":
            clip = load_clip(args.init, args.activation)
            clip.config = dataclasses.replace(clip.config, patch_scale=config.patch_scale)
            model = PACL(clip, load_dino(args.image_encoder) if args.image_encoder else None)
        elif args.init is None:
            model = SegCLIP(config)
        else:
            added = {name: getattr(config, name) for name in ADDED}
            if args.first_stage_layers is not None:  # else it follows from the CLIP's depth
                added["first_stage_layers"] = args.first_stage_layers
            model = load_segclip(args.init, args.activation, **added)
    except ValueError as error:
        raise InputError(str(error)) from None
    for field in SIZES:
        given, actual = getattr(args, field.name), getattr(model.config, field.name)
        if given is not None and given != actual:
            raise InputError(f"--{field.name.replace('_', '-')} {given}: {args.init} has {actual}")
    if model.config.vocab_size != vocab_size:
        raise InputError(f"{args.init}: made for {model.config.vocab_size} tokens, but the vocabulary has {vocab_size}")
    return model


class Run:
    """A run of training, new or resumed: its model, optimizer, tokenizer, sources of pairs, steps done and faults met."""

    def __init__(self, args, device, rank, world):
        """Raises InputError. Of args, what only the data can tell is filled in: steps, where epochs were given."""
        self.args, self.flags, self.rank, self.path = args, dict(vars(args)), rank, Path(args.output) / "checkpoint.pt"
        self.step, self.faults, self.saved_step, self.last_save = 0, Counter(), None, time.time()
        saved, self.resumed = last_checkpoint(self.path) if args.resume else (None, None)  # its content, its path
        torch.manual_seed(args.seed)
        self.tokenizer, self.model, self.sources = open_parts(args, saved, self.resumed, rank, world)
        self.model, self.lengths = self.model.to(device), [len(source) for source in self.sources]
        if (args.text_length or 0) > self.model.config.context_length:
            most = self.model.config.context_length
            raise InputError(f"--text-length {args.text_length}: the model takes at most {most} tokens")
        if args.steps is None:
            args.steps = math.ceil(args.epochs * sum(self.lengths) / args.batch_size)
        freeze(self.model, args)
        self.optimizer = build_optimizer(self.model, args)
        # Without fp16 it scales by 1, and only skips steps whose gradients are not finite.
        self.scaler = torch.amp.GradScaler(device.type, 2.0**16 if args.precision == "fp16" else 1.0)
        if saved:
            if saved["pairs"] != self.lengths:
                counts = f"its run had {sum(saved['pairs'])} pairs, the data has {sum(self.lengths)} now"
                raise InputError(f"{self.resumed}: {counts}")
            self.optimizer.load_state_dict(saved["optimizer"])
            self.scaler.load_state_dict(saved["scaler"])
            self.step, self.saved_step, self.faults = saved["step"], saved["step"], Counter(saved["faults"])
        if world > 1:
            ends = torch.tensor([self.step, -self.step], device=device)
            dist.all_reduce(ends, dist.ReduceOp.MAX)
            if ends.sum():
                folder = self.path.parent
                raise InputError(f"{folder}: not every process finds the same checkpoint there; it must be on a shared disk")

    def save(self):
        self.saved_step, self.last_save = self.step, time.time()
        if self.rank == 0:
            state = {"merges": self.tokenizer.merges, "step": self.step, "pairs": self.lengths, "faults": dict(self.faults)}
            state |= {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
            save_checkpoint(self.path, self.model, self.args.keep, **state, args=self.flags, git=git_revision())

    def save_is_due(self):
        """By the number of steps, or by the clock."""
        every, late = self.args.save_every, time.time() - self.last_save > 60 * self.args.save_minutes
        return late or every and self.step % every == 0


def open_parts(args, saved, saved_path, rank, world):
    """-> tokenizer, model and sources of pairs: of the run that was saved, of --init, or new. Raises InputError."""
    open_data = functools.partial(
        open_pairs, args.data, seed=args.seed, workers=args.workers, max_faults=args.max_faults, rank=rank, world=world
    )
    if saved:
        check_resumed(saved, args, saved_path)
        model = load_model(saved_path)
        return Tokenizer(saved["merges"]), model, open_data(model.config)
    if args.init:
        if args.init not in MODELS and not Path(args.init).is_file():
            raise InputError(f"--init {args.init}: no such file, and no model of this name; there are {', '.join(MODELS)}")
        tokenizer = choose_tokenizer(args, None)
        model = build_model(args, tokenizer.vocab_size)
        return tokenizer, model, open_data(model.config)  # crops are of the size that the weights are made for
    sources = open_data(choose_sizes(args))  # the vocabulary may be learned of them
    tokenizer = choose_tokenizer(args, sources)
    return tokenizer, build_model(args, tokenizer.vocab_size), sources


def freeze(model, args):
    """Switch off the gradient of what the recipe does not train."""
    for name, parameter in model.named_parameters():
        if args.freeze and name.startswith(FROZEN):
            parameter.requires_grad_(False)
    if args.method == "segclip" and not args.reconstruction_weight:
        for part in (model.reconstruction_layer, model.reconstruction_blocks, model.decoder):
            part.requires_grad_(False)


def parameter_groups(model, args):
    """What is trained, by peak learning rate and weight decay (for AdamW), as Section 3.2 says.

    --clip-lr is for CLIP's text encoder, temperature and image blocks before the group module. All else has --lr: what
    SegCLIP adds, and what comes after it in the image encoder, pre-trained or not. (The other methods have no --clip-lr.)
    """
    config, visual, late = model.config, "clip.visual.", ()
    if args.method == "segclip":
        late = [f"{visual}transformer.resblocks.{i}." for i in range(config.first_stage_layers, config.vision_layers)]
        late = (*late, f"{visual}ln_post.", f"{visual}proj")
    clip_lr = args.lr if args.clip_lr is None else args.clip_lr
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            lr = clip_lr if name.startswith("clip.") and not name.startswith(late) else args.lr
            decay = 0.0 if name.endswith("bias") else args.weight_decay  # as in the authors' program
            groups.setdefault((lr, decay), []).append(parameter)
    return [{"params": p, "lr": lr, "peak_lr": lr, "weight_decay": decay} for (lr, decay), p in sorted(groups.items())]


def build_optimizer(model, args):
    """Adam with decoupled weight decay, fused where torch can: then a step that must be skipped is, without being asked."""
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    return torch.optim.AdamW(parameter_groups(model, args), betas=(0.9, 0.98), eps=1e-6, fused=fused)


def lr_factor(step, args):
    """Linear warm-up to 1, then a cosine to 0 (Section 3.2)."""
    warmup = max(1, round(args.warmup * args.steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, args.steps - warmup)))


def checkpoint_activations(model):
    """Keep only what goes into each block, and compute the rest again when its gradient is asked for."""
    for module in model.modules():
        if isinstance(module, Block):
            module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False)


def autocast(device, precision):
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[precision]
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def compute_gradients(parallel, batch, noise, args, scaler, extra):
    """The gradients of a batch's loss (Eq. 7), in .grad of the parameters, scaled by `scaler`.

    parallel: the model, or the DistributedDataParallel around it. batch: image [b, 3, H, W], superpatch [b, N], text [b, T];
    these and the noise are this process's rows. extra: numbers [n] that are to be summed over the processes on the way.
    Returns the losses of the whole batch with `extra` behind them, one tensor, and the names of the losses.

    With args.accumulate = K > 1 activations are kept of one chunk in K only, and the contrastive loss still has the whole
    batch as negatives: see gradients_of_features.
    """
    model = getattr(parallel, "module", parallel)
    K, world = args.accumulate, dist.get_world_size() if dist.is_initialized() else 1
    precision = autocast(batch[0].device, args.precision)
    weights, reconstruct = (args.reconstruction_weight, args.superpixel_weight), args.reconstruction_weight > 0
    chunks = [[x.chunk(K)[k] for x in batch] + [{n: x.chunk(K)[k] for n, x in noise.items()}] for k in range(K)]
    if K > 1:
        con, g_p, g_w, g_scale = gradients_of_features(model, chunks, precision)
    totals = 0
    for k, (image, superpatch, text, chunk_noise) in enumerate(chunks):
        last = k == K - 1
        with nullcontext() if last or model is parallel else parallel.no_sync():
            with precision:
                outputs = parallel(image, text, **chunk_noise, reconstruct=reconstruct)
            if K == 1:
                loss, parts = total_loss(outputs, image, superpatch, *weights)
            else:  # a number whose gradient is that of the contrastive loss of the whole batch
                inner = (outputs["image_features"] * g_p[k]).sum() + (outputs["text_features"] * g_w[k]).sum()
                inner = inner + outputs["logit_scale"] * g_scale / K
                loss, parts = total_loss(outputs, image, superpatch, *weights, con=inner * K)
                parts["con"] = con
            totals = totals + torch.stack(list(parts.values())).detach() / K
            if last:
                values = torch.cat([totals / world, extra])
                if world > 1:
                    dist.all_reduce(values)
                # If any process has a loss that is not finite, then all get gradients that are not.
                loss = loss * torch.where(values[: len(parts)].isfinite().all(), 1.0, math.nan)
            scaler.scale(loss / K).backward()
    return values, list(parts)


def gradients_of_features(model, chunks, precision):
    """The contrastive loss of a batch in chunks, and its gradient with respect to the features of each: first all features
    without gradient, then the loss. Going on from there, chunk by chunk with the same noise, gives the gradient of the
    parameters (Gao et al., 2021, "Scaling deep contrastive learning batch size under memory limited setup")."""
    features = []
    with torch.no_grad(), precision:
        for image, _, text, noise in chunks:
            outputs = model(image, text, **noise, reconstruct=False)
            features.append((outputs["image_features"].float(), outputs["text_features"].float()))
    z_p, z_w = (torch.cat(x).requires_grad_() for x in zip(*features))
    scale = model.clip.logit_scale.detach().requires_grad_()
    con = contrastive_loss(z_p, z_w, scale)
    g_p, g_w, g_scale = torch.autograd.grad(con, (z_p, z_w, scale))
    return con.detach(), g_p.chunk(len(chunks)), g_w.chunk(len(chunks)), g_scale


def take_step(parallel, optimizer, batch, noise, args, scaler, extra):
    """Gradients, clipped, and the optimiser's step. Nothing here waits for the GPU.

    batch: picture uint8 [b, 3, H, W], superpatch, text. Returns the numbers of compute_gradients with the gradient's norm
    behind them, one tensor, and the names of the losses.
    """
    picture, superpatch, text = batch
    optimizer.zero_grad()
    values, parts = compute_gradients(parallel, (normalise(picture), superpatch, text), noise, args, scaler, extra)
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(parallel.parameters(), 1.0)
    scaler.step(optimizer)  # or not, if a gradient is not finite; after DDP's sum that is so on all processes
    scaler.update(None if args.precision == "fp16" else 1.0)
    with torch.no_grad():  # where the loss clamps the scale it has no gradient, and could never come back
        getattr(parallel, "module", parallel).clip.logit_scale.clamp_(max=math.log(100))
    return torch.cat([values, norm[None]]), parts


class Interruption:
    """While it is entered, Ctrl-C and SIGTERM are only noted, so that the step can be ended and saved."""

    def __enter__(self):
        self.asked = False
        self.handlers = {s: signal.signal(s, self.note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number, frame):
        self.asked = True

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


class Watch:
    """What a run says of itself. Of the steps' numbers the last are left alone, since reading them would wait for the GPU."""

    def __init__(self, run, log):
        self.run, self.args, self.log = run, run.args, log
        self.unread, self.recent, self.skipped, self.named = [], [], 0, Counter()
        self.since, self.last_step = time.time(), run.step

    def add(self, values):
        """The numbers of a step, on their way from the GPU."""
        arrived = torch.cuda.Event() if values.is_cuda else None
        self.unread.append((values.to("cpu", non_blocking=True), arrived))
        if arrived:
            arrived.record()

    def extra(self, stop_asked, met):
        """What else is to be summed over the processes at this step, see `read`. The first faults of each kind are printed."""
        for kind, text in met:
            self.named[kind] += 1
            if self.named[kind] <= 3:
                more = "; more of the kind are only counted" if self.named[kind] == 3 else ""
                print(f"fault: {text}{more}", file=sys.stderr)
        kinds = [kind for kind, _ in met]
        return torch.tensor([stop_asked, *(kinds.count(kind) for kind in Fault.KINDS)], dtype=torch.float32)

    def read(self, parts, all_steps):
        """All steps' numbers, or all but the last's -> whether any process wants to stop: the same on all processes, since
        the numbers are. Raises InputError if too many steps in a row were skipped."""
        stop = False
        while len(self.unread) > (not all_steps):
            values, arrived = self.unread.pop(0)
            if arrived:
                arrived.synchronize()
            row = dict(zip([*parts, "stop", *Fault.KINDS, "grad"], values.tolist()))
            stop = stop or row["stop"] > 0
            self.run.faults.update({kind: int(row[kind]) for kind in Fault.KINDS if row[kind]})
            self.skipped = 0 if math.isfinite(row["grad"]) else self.skipped + 1
            self.recent += [] if self.skipped else [row]
        if self.skipped >= 10:
            raise InputError(
                f"step {self.run.step}: {self.skipped} gradients in a row are not finite, the run is broken; try a lower --lr "
                "(the last checkpoint is kept)"
            )
        return stop

    def write(self, parts, lr, scale):
        """The line of the log: means since the last one."""
        if not self.recent:
            return
        args, done, now = self.args, self.run.step, time.time()
        line = {"step": done, **{name: sum(row[name] for row in self.recent) / len(self.recent) for name in (*parts, "grad")}}
        weights = {"con": 1.0, "rec": args.reconstruction_weight, "sup": args.superpixel_weight}
        line["loss"] = sum(weights[name] * line[name] for name in parts)
        rate = (done - self.last_step) / (now - self.since)
        line |= {
            "lr": lr,
            "scale": scale,
            "pairs_per_second": rate * args.batch_size,
            "faults": sum(self.run.faults.values()),
        }
        self.log.write(json.dumps(line) + "\n")
        self.log.flush()
        eta = datetime.timedelta(seconds=round((args.steps - done) / rate))
        losses = " ".join(f"{name} {line[name]:.2f}" for name in parts)
        print(  # in 100 columns; log.jsonl has all of it
            f"step {done}/{args.steps}  loss {line['loss']:.3f}: {losses}  grad {line['grad']:.1f}  lr {lr:.0e}  "
            f"{line['pairs_per_second']:.0f} pairs/s  ETA {eta}",
            flush=True,
        )
        self.recent, self.since, self.last_step = [], now, done

    def check_faults(self):
        """Raises InputError, when all is saved, if the data has too many."""
        run, limit = self.run, self.args.max_faults
        if sum(run.faults.values()) > limit * max(1000, run.step * self.args.batch_size):
            run.save()
            advice = f"more than --max-faults {limit}; mend the data or allow more, and --resume"
            raise InputError(f"step {run.step}: {self.faults_so_far()}: {advice}")

    def faults_so_far(self):
        counts = ", ".join(f"{count} x {kind}" for kind, count in self.run.faults.most_common())
        return f"of {self.run.step * self.args.batch_size} pairs, {counts}"


def make_loader(run, rows, nouns, device):
    """The batches of all steps that are left, of each these rows: picture, superpatch, text and the faults met.

    Step s takes the pairs at places s * batch_size and on, whatever ran before it and however many processes there are: with
    the noise of main, nothing else is random, and so a resumed run is the run that was not interrupted.
    """
    args, sources, start, workers = run.args, run.sources, run.step, run.args.workers
    rule = args.superpatch if args.superpixel_weight else None
    pairs = torch.utils.data.ConcatDataset(sources)
    pairs = TrainingPairs(
        pairs,
        run.tokenizer,
        run.model.config,
        args.crop_scale,
        args.seed,
        args.text_length,
        rule,
        nouns,
        evaluate.TEMPLATES[7],
    )
    # Whole scenes are always the same: if some are to be seen twice, all are prepared now, and no process is needed then.
    whole_scenes = args.crop_scale == 1 and not nouns and all(isinstance(source, SyntheticScenes) for source in sources)
    total = sum(run.lengths)
    if whole_scenes and total < args.steps * args.batch_size and start < args.steps:
        if run.rank == 0:
            print(f"preparing {total:,} scenes, before the first step", flush=True)
        pairs, workers = Prepared(pairs, total, workers), 0
    return DataLoader(
        pairs,
        batch_sampler=Batches(run.lengths, args.seed, args.batch_size, rows, range(start, args.steps)),
        num_workers=workers,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
        worker_init_fn=ignore_signals,
    )


def choose_nouns(args):
    """The words of --nouns. Raises InputError."""
    if args.nouns in (None, "none"):
        return []
    nouns = SCENE_WORDS if args.nouns == "synthetic" else read_lines(args.nouns)
    if not nouns:
        raise InputError(f"{args.nouns}: no noun in it; there should be one in each line")
    return nouns


def needs_clip_of_scenes(args):
    """Whether --method pacl is to begin without --init. Raises InputError if it would fail after that CLIP was trained."""
    if args.init != CLIP_OF_SCENES or args.resume and any(Path(args.output).glob("checkpoint*.pt")):
        return False
    if args.image_encoder:
        load_dino(args.image_encoder)
    return True


def train_clip_of_scenes(args, world):
    """The CLIP that --method pacl takes on the scenes, unless it is there -> whether it is now. Raises InputError."""
    if Path(CLIP_OF_SCENES).exists():
        state = read_weights(CLIP_OF_SCENES)
        if state["args"]["data"] != ["synthetic"]:
            raise InputError(f"{CLIP_OF_SCENES}: not a CLIP of the scenes; move it away, or name it with --init")
        if state["args"]["epochs"] or state["step"] == state["args"]["steps"]:
            return True
    if world > 1:
        raise InputError(f"{CLIP_OF_SCENES}: not there, or not finished; make it with `python train.py --method clip`")
    print(f"{CLIP_OF_SCENES} comes first: python train.py --method clip --resume", flush=True)
    return main(
        ["--method", "clip", "--resume", "--workers", str(args.workers), *(["--device", args.device] if args.device else [])]
    )


def main(argv=None):
    """-> whether all steps are done. Raises InputError."""
    args, world = parse_args(argv), int(os.environ.get("WORLD_SIZE", 1))
    check(args, world)
    nouns = choose_nouns(args)
    if needs_clip_of_scenes(args) and not train_clip_of_scenes(args, world):
        return False
    rank, world, device = start_processes(args.device)  # each works on its rows of every batch
    if args.precision is None:
        known = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
        args.precision = "bf16" if known else "fp16"
    if device.type == "cuda" and args.precision != "fp32":
        torch.set_float32_matmul_precision("high")  # TF32 for what is not in half precision
        torch.backends.cudnn.allow_tf32 = True

    run = Run(args, device, rank, world)
    model, config, start = run.model, run.model.config, run.step
    eval_args = plan_evaluations(args, config)
    parallel = wrap_model(model, args, world)
    share = args.batch_size // world
    rows = slice(rank * share, (rank + 1) * share)
    generator = torch.Generator(device)
    num_patches = (config.image_size // config.patch_size) ** 2
    # The fused kernel for the CPU is made for long sequences; its backward pass in bf16 halves the speed of short ones.
    torch.backends.cuda.enable_flash_sdp(device.type != "cpu" or num_patches >= 128)

    log = None
    if rank == 0:
        log = open_log(run.path.parent, start if run.resumed else None)
        introduce(run, world, device)
    loader, watch = make_loader(run, rows, nouns, device), Watch(run, log)
    if device.type == "cpu" and world == 1 and loader.num_workers:  # threads that fight the workers for cores cost a third
        torch.set_num_threads(max(1, min(torch.get_num_threads(), (os.cpu_count() or 1) - loader.num_workers)))
    model.train()
    with Interruption() as interruption:
        for picture, superpatch, text, met in raised(loader):
            factor = lr_factor(run.step, args)
            for group in run.optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
            extra = watch.extra(interruption.asked, met)
            picture, superpatch, text, extra = (x.to(device, non_blocking=True) for x in (picture, superpatch, text, extra))
            generator.manual_seed(args.seed * 1_000_003 + run.step)
            noise = model.draw_noise(args.batch_size, num_patches, generator)
            noise = {name: values[rows] for name, values in noise.items()}
            batch = picture, superpatch, text
            values, parts = take_step(parallel, run.optimizer, batch, noise, args, run.scaler, extra)
            watch.add(values)

            run.step += 1
            last = run.step == args.steps
            log_now = run.step % args.log_every == 0 or run.step == start + 1 or last
            look = args.eval_every and (run.step % args.eval_every == 0 or last)
            stop = watch.read(parts, all_steps=log_now or device.type == "cpu")
            if log_now and rank == 0:
                watch.write(parts, args.lr * factor, model.clip.logit_scale.exp().item())
            watch.check_faults()
            if stop:
                break
            if run.save_is_due() or look:
                run.save()
            if look:
                paused = time.time()
                evaluate_model(eval_args, model, run.tokenizer, rank, world, run.step)
                watch.since += time.time() - paused
        if run.saved_step != run.step:
            run.save()
    if rank == 0:
        if run.faults:
            print(watch.faults_so_far())
        stopped = f"; stopped at step {run.step} of {args.steps}: --resume goes on" if run.step < args.steps else ""
        idle = run.resumed and run.step == start
        print(f"{run.path}: all {start} steps are done already" if idle and not stopped else f"wrote {run.path}{stopped}")
    return run.step == args.steps


def plan_evaluations(args, config):
    """The flags of evaluate.py for --eval-every. Raises InputError for what is wrong with them, now and not in hours."""
    eval_args = evaluate.parse_args([*shlex.split(args.evaluate), "--output", str(Path(args.output, "evaluation"))])
    if args.eval_every:
        if eval_args.classify:
            raise InputError("--evaluate: --classify has no mIoU, by which the best model is kept")
        evaluate.plan(eval_args, config)
    return eval_args


def wrap_model(model, args, world):
    """The model, as it is to be called in training."""
    if args.checkpoint_activations:
        checkpoint_activations(model)
    if args.compile:
        model.compile()
    return DistributedDataParallel(model) if world > 1 else model


def open_log(output, resumed_step):
    """OUTPUT/log.jsonl, for appending: a resumed run's up to its step, else empty. An earlier run is moved away."""
    make_folder(output)
    if resumed_step is None and any(output.glob("checkpoint*.pt")):
        n = 1
        while Path(f"{output}.{n}").exists():
            n += 1
        os.rename(output, f"{output}.{n}")
        print(f"{output} held another run, which is now in {output}.{n}", file=sys.stderr)
        make_folder(output)
    path = output / "log.jsonl"
    lines = path.read_text().splitlines(keepends=True) if resumed_step is not None and path.exists() else []
    lines = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= resumed_step]
    path.write_text("".join(lines))
    return open(path, "a")


def introduce(run, world, device):
    """Print what is going to be trained, and how."""
    args = run.args
    trained = sum(p.numel() for group in run.optimizer.param_groups for p in group["params"])
    total = sum(p.numel() for p in run.model.parameters())
    for group in run.optimizer.param_groups:
        count = sum(p.numel() for p in group["params"]) / 1e6
        print(f"{count:8.2f} M parameters  lr {group['peak_lr']:.1e}  weight decay {group['weight_decay']}")
    print(f"{(total - trained) / 1e6:8.2f} M parameters  frozen")
    print(
        f"{sum(run.lengths):,} pairs, {args.steps} steps of {args.batch_size}; a vocabulary of {run.tokenizer.vocab_size} tokens; "
        f"{world} x {device.type}, {args.precision}",
        flush=True,
    )
    known = [source.superpixels for source in run.sources if hasattr(source, "superpixels")]
    if known and args.superpixel_weight:
        there = sum(path.exists() for path in known)
        config = run.model.config
        sizes = f"--image-size {config.image_size} --patch-size {config.patch_size}"
        print(f"superpixels computed before for {there} of {len(known)} shards or lists (`data.py superpixels {sizes}`)")
    if args.resume:
        print(
            f"resumed {run.resumed} at step {run.step}" if run.resumed else f"{run.path}: nothing to resume; a new run begins"
        )


def evaluate_model(eval_args, model, tokenizer, rank, world, step):
    """Score the model as it is now, print it, and keep it as best.pt if none before was better."""
    model.eval()
    metrics = evaluate.evaluate(eval_args, model, tokenizer, rank, world, {"step": step})
    model.train()
    if rank == 0 and metrics:
        print(f"step {step}  mIoU {100 * metrics['mIoU']:.2f} % over {metrics['pictures']} pictures", flush=True)
        path = Path(eval_args.output).with_name("best.pt")
        if not path.exists() or metrics["mIoU"] > read_weights(path)["metrics"]["mIoU"]:
            save_checkpoint(path, model, merges=tokenizer.merges, step=step, metrics=metrics)


if __name__ == "__main__":
    run_program(main, if_interrupted="stopped before the first step")
