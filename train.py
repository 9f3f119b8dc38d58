"""Train SegCLIP on image-text pairs, or PACL, GroupViT, or the CLIP that they are compared with.

python train.py                      a small SegCLIP from scratch on synthetic scenes, in minutes
python train.py --method clip        the CLIP of the scenes
python train.py --method pacl        PACL on that CLIP
python train.py --method groupvit    GroupViT; --stages 1 or 2
python train.py --recipe paper --data "cc3m/{00000..00331}.tar" dataset_coco.json=coco
torchrun --nproc_per_node=8 train.py --recipe paper ...       the same, on eight GPUs
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports ends the program without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import dataclasses
import datetime
import fcntl
import functools
import itertools
import json
import math
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import ConcatDataset, DataLoader

import evaluate
import model as model_module
from clip_loader import (
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
    SyntheticScenes,
    TrainingPairs,
    collate,
    normalise,
    open_pairs,
    parallel_map,
    rank_and_world,
    read_lines,
    start_worker,
)
from evaluate import OWN_RUNS, RUNS, Parser, number
from losses import contrastive_loss, total_loss
from model import CLIP, PACL, Block, Config, DenseCLIP, GroupViT, InputError, SegCLIP

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
# What GroupViT has in place of SMALL and of Config's defaults.
GROUPVIT_SIZES = {
    "small": {
        "vision_layers": 4,
        "group_tokens": 32,
        "gumbel_tau": 1.0,
        "projector_width": 256,
    },
    "paper": {
        "vision_width": 384,
        "text_width": 256,
        "embed_dim": 256,
        "first_stage_layers": 6,
        "gumbel_tau": 1.0,
    },
}
VOCABULARY_CAPTIONS = 10_000
PROMPTS = 3  # of GroupViT, beside the caption
NO_NOUNS = (None, "none")
SMALL_RECIPE = {
    "data": ["synthetic"],
    "output": RUNS["segclip"],
    "save_every": 100,
    "vocabulary": "learned",
    "steps": 1100,
    "batch_size": 128,
    "lr": 1.5e-3,
    "warmup": 0.1,
    "crop_scale": 1.0,
    "mirror": False,
}
# What it has for other pairs than the scenes: fewer images, which show things at many scales.
OWN_PAIRS = {"crop_scale": 0.2, "mirror": True, "nouns": None}
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
    "mirror": False,
}
CONTRASTIVE = {"clip_lr": None, "reconstruction_weight": 0.0, "superpixel_weight": 0.0}
CLIP_OF_SCENES = f"{RUNS['clip']}/checkpoint.pt"
CLIP_OF_OWN = f"{OWN_RUNS['clip']}/checkpoint.pt"
PACL_RECIPE = CONTRASTIVE | {"freeze": False, "weight_decay": 0.2}
SMALL_PACL = {"init": CLIP_OF_SCENES, "nouns": "synthetic", "steps": 600, "lr": 3e-3}
# As others quote the PACL paper; the crop and the text length are SegCLIP's.
PAPER_PACL = {"lr": 5e-4, "batch_size": 4096, "warmup": 0.0}
# The optimizer and the augmentations are SegCLIP's (docs/differences.md).
PAPER_GROUPVIT = CONTRASTIVE | {
    "output": "runs/paper-groupvit",
    "init": None,
    "freeze": False,
    "text_length": None,
    "epochs": 30.0,
    "batch_size": 4096,
    "lr": 1.6e-3,
    "warmup": 2 / 30,
    "crop_scale": 0.08,
}
SMALL_GROUPVIT = CONTRASTIVE | {"output": RUNS["groupvit"], "nouns": "synthetic"}
RECIPES = {
    ("small", "segclip"): SMALL_RECIPE,
    ("small", "clip"): SMALL_RECIPE | CONTRASTIVE | {"output": RUNS["clip"]},
    ("small", "pacl"): SMALL_RECIPE | PACL_RECIPE | SMALL_PACL | {"output": RUNS["pacl"]},
    ("small", "groupvit"): SMALL_RECIPE | SMALL_GROUPVIT,
    ("paper", "segclip"): PAPER_RECIPE,
    ("paper", "clip"): PAPER_RECIPE | CONTRASTIVE | {"output": "runs/paper-clip", "lr": 4e-6},
    ("paper", "pacl"): PAPER_RECIPE | PACL_RECIPE | PAPER_PACL | {"output": "runs/paper-pacl"},
    ("paper", "groupvit"): PAPER_RECIPE | PAPER_GROUPVIT,
}
SIZES = {size.name: size for size in dataclasses.fields(Config)}
del SIZES["vocab_size"], SIZES["crop_zoom"]  # these follow
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
OF_SEGCLIP = ("first_stage_layers", *ADDED, *CONTRASTIVE)
OF_PACL = ("patch_scale", "image_encoder")
OF_GROUPVIT = ("stages", "group_tokens", "projector_width")
UNUSED = {  # flags that a method does not have
    "segclip": OF_PACL + OF_GROUPVIT,
    "clip": OF_SEGCLIP + OF_PACL + OF_GROUPVIT,
    "pacl": OF_SEGCLIP + OF_GROUPVIT + ("from_scratch", "freeze"),
    "groupvit": (
        *OF_PACL,
        *CONTRASTIVE,
        "cross_layers",
        "mask_ratio",
        "decoder_layers",
        "from_scratch",
        "freeze",
        "init",
    ),
}
# What the authors' program does not train when it starts from CLIP.
FROZEN = (
    "clip.visual.conv1.",
    "clip.visual.positional_embedding",
    "clip.visual.ln_pre.",
    "clip.token_embedding.",
    "clip.positional_embedding",
)
# Flags that may change on resume. The schedule becomes that of the new number of steps; the others
# change results by rounding at most (--device: also the noise).
RESUME_MAY_CHANGE = {"output", "resume", "save_every", "log_every", "device", "workers", "compile"}
RESUME_MAY_CHANGE |= {"eval_every", "eval_dataset", "eval_root", "max_errors", "steps", "epochs"}
RESUME_MAY_CHANGE |= {"accumulate", "checkpoint_activations"}


# fmt: off
COUNT = number(int, 1)
SHARE = number(float, 0, 1)
RATE = number(float, 0, 1e3)


def add_arguments(parser, method="segclip"):
    add = parser.add_argument_group("the run").add_argument
    add("--output", metavar="DIR", help="for checkpoint.pt and log.jsonl [%(default)s]")
    add("--resume", action="store_true",
        help="continue from the last checkpoint in DIR, if any; --steps may be other than before")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, metavar="N", help="[%(default)s]")
    add("--save-every", type=COUNT, metavar="STEPS", help="[%(default)s]")
    add("--log-every", type=COUNT, default=20, metavar="STEPS",
        help="several GPUs see Ctrl-C only then [%(default)s]")
    add("--eval-every", type=number(int, 0), default=0, metavar="STEPS",
        help="score the model in training and keep the best as best.pt; 0: never")
    add("--eval-dataset", choices=evaluate.DATASETS, default="synthetic", metavar="NAME",
        help="as --dataset of evaluate.py [%(default)s]")
    add("--eval-root", metavar="DIR", help="its folder")
    add("--max-errors", type=SHARE, default=0.01, metavar="SHARE",
        help="of pairs that may be unusable before the run stops [%(default)s]")
    add = parser.add_argument_group("the machine").add_argument
    add("--device", help="cpu, cuda, cuda:1, ... [a GPU if there is one]")
    add("--precision", choices=("bf16", "fp16", "fp32"), help="[bf16; fp16 on a GPU without it]")
    add("--workers", type=number(int, 0), default=2, metavar="N",
        help="processes that prepare pairs, per GPU; 0: only this one [%(default)s]")
    add("--accumulate", type=COUNT, default=1, metavar="K",
        help="split a batch into K chunks, for less memory; the whole batch gives the negatives")
    add("--checkpoint-activations", action="store_true",
        help="for less memory: compute each block's forward pass twice")
    add("--compile", action="store_true", help="torch.compile: for long runs")
    add_recipe(parser.add_argument_group("the recipe").add_argument)
    add = parser.add_argument_group("the model: see Config in model.py").add_argument
    small, paper = (choose_sizes(recipe, method, {}) for recipe in ("small", "paper"))
    for name, size in SIZES.items():
        values = f"[small: {getattr(small, name)}, paper: {getattr(paper, name)}]"
        add("--" + name.replace("_", "-"), type=size.type, metavar="N", help=values)


def add_recipe(add):
    add("--init", metavar="MODEL", help="start from ViT-B/16, a CLIP or a SegCLIP [%(default)s]")
    add("--freeze", action=argparse.BooleanOptionalAction, default=False,
        help="keep CLIP's patch, position and token embeddings as they are")
    add("--image-encoder", metavar="FILE",
        help="pacl: embed the patches of a DINO, dino_vitbase16_pretrain.pth [CLIP's]")
    add("--vocabulary", metavar="V",
        help=f"learned, from up to {VOCABULARY_CAPTIONS:,} captions; openai; or a file "
        "[%(default)s, or that of --init]")
    add("--text-length", type=number(int, 2), metavar="T",
        help="tokens of a caption, longer ones are cut [--context-length; paper: 32]")
    add("--nouns", metavar="FILE",
        help="one noun per line: the text of a pair is the caption or one of its nouns in one of "
        "OpenAI's 7 templates, as in PACL; of GroupViT for its multi-label loss; synthetic: the "
        "words of the scenes; or none")
    add("--steps", type=number(int, 0), metavar="N", help="0 writes the untrained model")
    add("--epochs", type=number(float, 0), metavar="N", help="in place of --steps [paper: 10]")
    add("--batch-size", type=COUNT, metavar="B", help="of all processes together [%(default)s]")
    add("--lr", type=RATE, metavar="LR", help="peak learning rate [%(default)s]")
    add("--clip-lr", type=RATE, metavar="LR",
        help="of the text encoder and the image blocks before the group module [--lr; paper: 4e-6]")
    add("--warmup", type=SHARE, metavar="SHARE", help="of the steps [%(default)s]")
    add("--weight-decay", type=RATE, default=0.05, metavar="W",
        help="of everything but biases [%(default)s]")
    add("--crop-scale", type=number(float, 1e-4, 1), metavar="SHARE",
        help="smallest share of an image in a crop; with the small recipe, evaluate.py enlarges "
        "images for it [%(default)s; own pairs, small: 0.2]")
    add("--mirror", action=argparse.BooleanOptionalAction,
        help="half of the crops; not where captions have left and right [own pairs, small: yes]")
    add("--superpatch", choices=("floor", "majority"), default="floor",
        help="rule for patches on superpixel borders [%(default)s, the paper's]")
    for name, loss in (("reconstruction", "L_rec"), ("superpixel", "L_sup")):
        add(f"--{name}-weight", type=number(float, 0), default=1.0, metavar="W",
            help=f"of {loss} in Eq. 7; 0: none [%(default)s]")
# fmt: on


def parse_args(argv=None):
    """-> the flags, with the recipe's values where none was given. Raises InputError."""
    choices = Parser(add_help=False)
    choices.add_argument("--recipe", choices=("small", "paper"), default="small", help="[small]")
    choices.add_argument(
        "--method",
        choices=("segclip", "clip", "pacl", "groupvit"),
        default="segclip",
        help="clip: the same encoders with CLIP's loss alone; pacl: an embedder for the patches "
        "of a frozen CLIP [%(default)s]",
    )
    choices.add_argument(
        "--data",
        nargs="+",
        metavar="PAIRS",
        help="one or more of: synthetic; CAPTIONS.json=FOLDER (COCO's or Karpathy's); LIST.tsv, "
        ".csv, .txt or .jsonl (=FOLDER) with columns path, file or image, and caption, title or "
        'text; "SHARDS{000..331}.tar" of img2dataset',
    )
    choices.add_argument("--from-scratch", action="store_true", help="paper: no --init")
    known, _ = choices.parse_known_args(argv)
    defaults = dict(RECIPES[known.recipe, known.method])
    if known.recipe == "small" and known.data not in (None, ["synthetic"]):
        defaults |= OWN_PAIRS | {"output": OWN_RUNS[known.method]}
        if known.method == "pacl":
            defaults["init"] = CLIP_OF_OWN
    if known.from_scratch:
        defaults |= {"init": None, "freeze": False, "clip_lr": None}
        defaults["lr"] = RECIPES[known.recipe, "segclip"]["lr"]
    length = {name: defaults.pop(name, None) for name in ("steps", "epochs")}
    parser = Parser(__doc__, parents=[choices])
    add_arguments(parser, known.method)
    parser.set_defaults(**defaults)
    args = parser.parse_args(argv)

    for name in UNUSED[args.method]:
        if getattr(args, name):
            parser.error(f"--method {args.method} has no --{name.replace('_', '-')}")
    pacl = args.method == "pacl"
    whole = args.method == "groupvit" and args.accumulate > 1
    needs_root = args.eval_every and args.eval_dataset in BENCHMARKS and not args.eval_root
    scene_nouns = args.nouns == "synthetic" and "synthetic" not in (args.data or ())
    for is_wrong, message in (
        (args.data is None, f"--recipe {args.recipe} needs --data"),
        (args.steps is not None and args.epochs is not None, "--steps or --epochs, not both"),
        (args.from_scratch and args.init, "--from-scratch or --init, not both"),
        (pacl and not args.init, "--method pacl needs --init, a CLIP"),
        (pacl and args.accumulate > 1, "--accumulate: the loss of PACL works in chunks already"),
        (whole, "--accumulate: GroupViT's BatchNorm needs the whole batch at once"),
        (needs_root, f"--eval-dataset {args.eval_dataset} needs --eval-root, its folder"),
        (scene_nouns, "--nouns synthetic: the words of the scenes; give --nouns FILE, or none"),
    ):
        if is_wrong:
            parser.error(message)
    if args.steps is None and args.epochs is None:
        args.steps = length["steps"]
        args.epochs = length["epochs"]
    return args


def check_resumed(saved, flags, path):
    """Raises InputError unless a checkpoint is of a run with the same flags."""
    if "flags" not in saved:
        raise InputError(f"{path}: not a checkpoint of train.py that could be resumed")
    changed = []
    for name, before in saved["flags"].items():
        if before != flags.get(name) and name not in RESUME_MAY_CHANGE:
            changed.append(f"--{name.replace('_', '-')} {before}, not {flags.get(name)}")
    if changed:
        advice = "give the same, or another --output"
        raise InputError(f"{path}: was trained with {'; '.join(changed)}; {advice}")


# --------------------------------------------------------------------------------------------------
# Model and optimizer


def choose_sizes(recipe, method, sizes, crop_scale=1.0):
    """The recipe's Config with the sizes {name: value} that were given. Raises InputError."""
    config = Config()  # evaluated at 224 pixels, though it is trained on crops
    if recipe == "small":
        # The smallest crops are enlarged by the power -0.5. More hardly matters for whole images,
        # and gains where training images were cut out of larger ones: docs/results.md, own pairs.
        config = dataclasses.replace(SMALL, crop_zoom=crop_scale**-0.75)
    if method == "groupvit":
        return dataclasses.replace(config, **GROUPVIT_SIZES[recipe] | sizes)
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
    elif method == "groupvit":
        model = GroupViT(config)
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
    model.config.crop_zoom = config.crop_zoom
    return model


def learn_vocabulary(sources):
    """A tokenizer with 500 merges, learned from the first captions of the sources."""
    captions = itertools.chain.from_iterable(source.captions() for source in sources)
    return Tokenizer.learn(itertools.islice(captions, VOCABULARY_CAPTIONS), num_merges=500)


def freeze(model, embeddings=False, reconstruction=False, prompts=False):
    """Switches off gradients: of CLIP's embeddings; of what only the reconstruction, or only the
    loss over prompts, would need."""
    prefixes = FROZEN if embeddings else ()
    if reconstruction:
        prefixes = (*prefixes, "reconstruction_layer.", "reconstruction_blocks.", "decoder.")
    if prompts:
        prefixes = (*prefixes, "multi_label_logit_scale")
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
            decay = (
                0.0 if name.endswith("bias") else weight_decay
            )  # as in the authors' program; norms and temperatures do
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


def compute_gradients(parallel, batch, noise, weights, precision, scaler, extra, chunks=1):
    """The gradients of a batch's loss (Eq. 7), in .grad of the parameters, scaled by `scaler`.

    parallel: the model, or the DistributedDataParallel around it. batch: image [b, 3, H, W],
    superpatch [b, N], text [b, T] (see collate); these and the noise are this process's rows.
    weights: of L_rec and L_sup. extra: numbers [n] to be summed over the processes on the way.
    -> the losses of the whole batch and `extra`, one tensor, and the names of the losses.

    With chunks > 1 the activations of one chunk at a time are kept, and the contrastive loss still
    has the negatives of the whole batch (see gradients_of_features).
    """
    model = getattr(parallel, "module", parallel)
    _, world = rank_and_world()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[precision]
    context = torch.autocast(batch[0].device.type, dtype, enabled=dtype is not None)
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
        for name, parameter in parallel.named_parameters():
            if name.endswith("logit_scale"):
                parameter.clamp_(max=math.log(100))
    return torch.cat([values, norm[None]]), names


# --------------------------------------------------------------------------------------------------
# The run


class GracefulExit:
    """Inside `with`, Ctrl-C and SIGTERM only set a wish, so that the step can end and be saved."""

    def __enter__(self):
        self.signal = None
        self.parent = os.getppid()
        self.handlers = {s: signal.signal(s, self.ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def ask(self, number, frame):
        self.signal = number

    def asked(self):
        """Also true when torchrun has died, whose processes would go on for ever."""
        return bool(self.signal) or (dist.is_initialized() and os.getppid() != self.parent)

    def status(self):
        """As a shell would say it: 130 after Ctrl-C, 143 after SIGTERM, also another process's."""
        return 128 + (self.signal or signal.SIGTERM)

    def __exit__(self, *_):
        for which, handler in self.handlers.items():
            signal.signal(which, handler)


def open_log(folder, resumed_step):
    """FOLDER/log.jsonl for appending: of a resumed run up to its step, else empty.

    A folder that holds an earlier run is moved away. The file is locked while the process lives.
    -> None on all processes but the first. Raises InputError if another run writes to it, or if the
    folder holds something else.
    """
    rank, _ = rank_and_world()
    if rank:
        return None
    path = folder / "log.jsonl"
    replaced = resumed_step is None and any(folder.glob("checkpoint*.pt"))
    if replaced and not path.exists():
        raise InputError(f"{folder}: holds a checkpoint of something else; give another --output")
    folder.mkdir(parents=True, exist_ok=True)
    log = open(path, "a+", errors="replace")
    try:
        fcntl.lockf(log, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, workers do not inherit it
    except BlockingIOError:
        raise InputError(f"{folder}: another run is writing to it; give another --output") from None
    if replaced:
        n = 1
        while Path(f"{folder}.{n}").exists():
            n += 1
        os.rename(folder, f"{folder}.{n}")
        print(f"{folder} held another run, which is now in {folder}.{n}", file=sys.stderr)
        return open_log(folder, None)
    log.seek(0)
    lines = log.readlines() if resumed_step is not None else []
    log.truncate(0)
    for line in lines:
        try:
            if json.loads(line)["step"] <= resumed_step:
                log.write(line.rstrip("\n") + "\n")
        except (ValueError, LookupError, TypeError):  # a line that was cut off
            continue
    log.flush()
    return log


def write_log(log, state, batches, rows, weights, seconds):
    """Appends a line to log.jsonl, and prints it. rows: {name: value} of the last steps."""
    finite = [row for row in rows if math.isfinite(row["grad"])]
    if log is None or not finite:
        return
    # As in total_loss. What is missing here is not logged.
    weights = {"con": 1.0, "label": 1.0, "rec": weights[0], "sup": weights[1]}
    names = [name for name in (*weights, "grad") if name in finite[0]]
    line = {"step": state.step}
    line |= {name: sum(row[name] for row in finite) / len(finite) for name in names}
    parts = names[:-1]
    line["loss"] = sum(weights[name] * line[name] for name in parts)
    line["lr"] = max(group["lr"] for group in state.optimizer.param_groups)
    line["scale"] = state.model.clip.logit_scale.exp().item()
    line["pairs_per_second"] = len(rows) * batches.batch_size / seconds
    line["errors"] = state.errors
    log.write(json.dumps(line) + "\n")
    log.flush()
    steps = batches.steps.stop
    eta = round((steps - state.step) * seconds / len(rows))
    losses = " ".join(f"{name} {line[name]:.2f}" for name in parts)
    print(  # in 100 columns
        f"step {state.step}/{steps}  loss {line['loss']:.3f}: {losses}  grad {line['grad']:.1f}  "
        f"lr {line['lr']:.0e}  {line['pairs_per_second']:.0f} pairs/s  "
        f"ETA {datetime.timedelta(seconds=eta)}",
        flush=True,
    )


def introduce(state, saved, sources, batches, superpixels_needed, warmup):
    """Prints what is trained, and on what; on the first process."""
    rank, world = rank_and_world()
    if rank:
        return
    config = state.model.config
    for group in state.optimizer.param_groups:
        count = sum(p.numel() for p in group["params"]) / 1e6
        rates = f"lr {group['peak_lr']:.1e}  weight decay {group['weight_decay']}"
        print(f"{count:8.2f} M parameters  {rates}")
    frozen = sum(p.numel() for p in state.model.parameters() if not p.requires_grad) / 1e6
    print(f"{frozen:8.2f} M parameters  frozen")
    stores = [source.superpixels for source in sources if hasattr(source, "superpixels")]
    missing = sum(store.places is None for store in stores)
    if missing and superpixels_needed:
        sizes = f"--image-size {config.image_size} --patch-size {config.patch_size}"
        print(
            f"{missing} of {len(stores)} shards or lists have no superpixels; to compute them: "
            f"python data.py superpixels {sizes} --data ..."
        )
    steps = batches.steps.stop
    print(
        f"{sum(batches.sizes):,} pairs, {steps} steps of {batches.batch_size}; a vocabulary of "
        f"{state.tokenizer.vocab_size} tokens; {world} x {state.device.type}, "
        f"{state.flags['precision']}"
    )
    mirrored = ", half of them mirrored" * state.flags["mirror"]
    short_side = round(config.image_size * config.crop_zoom)
    print(
        f"crops of {state.flags['crop_scale']:.0%} of an image or more{mirrored}; "
        f"inference resolution: short side {short_side}"
    )
    if saved:
        before = saved["flags"]["steps"]
        changed = f", on the schedule of {steps} steps in place of {before}"
        peak = max(group["peak_lr"] for group in state.optimizer.param_groups)
        rate = f"learning rate {peak * lr_factor(state.step, steps, warmup):.1e}"
        print(f"resumed at step {state.step}, {rate}{changed if before != steps else ''}")
    elif state.flags["resume"]:
        print("nothing to resume: a new run")
    sys.stdout.flush()


def wrap_model(model, activations, compiled):
    """The model as it is called in training: with activation checkpointing, compiled, in DDP."""
    if activations:
        checkpoint_activations(model)
    if compiled:
        # In bf16, a compiled backward pass rounds otherwise and finds no maximum.
        model_module.max_over_regions = torch.compiler.disable(model_module.max_over_regions)
        model.compile()
    return DistributedDataParallel(model) if dist.is_initialized() else model


def choose_nouns(name):
    """The words of --nouns. Raises InputError."""
    if name in NO_NOUNS:
        return ()
    nouns = SCENE_WORDS if name == "synthetic" else read_lines(name)
    if not nouns:
        raise InputError(f"--nouns {name}: no noun in it; there should be one per line")
    return tuple(nouns)


def open_run(open_data, saved, path, method, init, config, sizes, vocabulary, image_encoder):
    """A new run, or that of a checkpoint -> model, tokenizer, sources of pairs. Raises InputError.

    open_data: Config -> sources. saved, path: from last_checkpoint. Others: see build_model.
    """
    if saved:
        model = load_model(path)
        return model, Tokenizer(saved["merges"]), open_data(model.config)
    if init in (CLIP_OF_SCENES, CLIP_OF_OWN) and not Path(init).exists():
        command = "python train.py --method clip" + " --data ..." * (init == CLIP_OF_OWN)
        raise InputError(f"{init}: run `{command}`, or give another --init")
    sources = None
    if init is None:  # the vocabulary may be learned from the captions
        sources = open_data(config)
    if vocabulary == "learned" and sources:
        tokenizer = learn_vocabulary(sources)
    else:
        own = None if vocabulary in ("openai", "learned") else vocabulary
        tokenizer = load_tokenizer(init, own)
    model = build_model(method, init, config, sizes, tokenizer.vocab_size, image_encoder)
    return model, tokenizer, sources or open_data(model.config)  # crops of the weights' size


@dataclass
class State:
    """What a checkpoint holds."""

    path: Path  # of checkpoint.pt
    model: torch.nn.Module
    tokenizer: Tokenizer
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    pairs: list  # the number in each source
    flags: dict
    step: int = 0
    errors: int = 0
    saved_step: int | None = None

    @property
    def device(self):
        return self.model.clip.logit_scale.device

    def save(self):
        """Writes checkpoint.pt, unless it has this step already; on the first process."""
        rank, _ = rank_and_world()
        if rank or self.step == self.saved_step:
            return
        self.saved_step = self.step
        save_checkpoint(
            self.path,
            self.model,
            rotate=True,
            merges=self.tokenizer.merges,
            optimizer=self.optimizer.state_dict(),
            scaler=self.scaler.state_dict(),
            pairs=self.pairs,
            flags=self.flags,
            step=self.step,
            errors=self.errors,
        )

    def restore(self, saved, path, steps):
        """Raises InputError for other data, too few steps, or processes with other checkpoints."""
        if saved:
            step = saved["step"]
            if saved["pairs"] != self.pairs:
                before = sum(saved["pairs"])
                raise InputError(f"{path}: was trained on {before} pairs, not {sum(self.pairs)}")
            if step > steps:
                advice = f"give --steps {step} or more, or another --output"
                raise InputError(f"{path}: has step {step}, --steps is {steps}; {advice}")
            self.optimizer.load_state_dict(saved["optimizer"])
            self.scaler.load_state_dict(saved["scaler"])
            self.step = step
            self.saved_step = step
            self.errors = saved["errors"]
        if dist.is_initialized():
            numbers = torch.tensor([self.step, sum(self.pairs)], device=self.device)
            extremes = torch.stack([numbers, -numbers])
            dist.all_reduce(extremes, dist.ReduceOp.MAX)
            if extremes.sum(dim=0).any():
                raise InputError(f"{path}: processes find different files; use a shared disk")


def rows_of_process(batch_size, chunks):
    """The rows of each batch that are this process's -> slice. Raises InputError."""
    rank, world = rank_and_world()
    if batch_size % (world * chunks):
        parts = f"{world} processes x {chunks} chunks"
        raise InputError(f"--batch-size {batch_size}: cannot be split over {parts}")
    share = batch_size // world
    return slice(rank * share, (rank + 1) * share)


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


def tune_cpu(device, num_workers, config):
    """Settings that change the speed on a CPU."""
    if device.type != "cpu":
        return
    num_patches = (config.image_size // config.patch_size) ** 2
    # The fused attention is for long sequences: in bf16 its backward pass is slow for short ones.
    torch.backends.cuda.enable_flash_sdp(num_patches >= 128)
    if hasattr(torch.backends.cuda, "allow_fp16_bf16_reduction_math_sdp"):  # torch 2.5
        # The other one would convert bf16 to fp32 and back.
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    if num_workers and not dist.is_initialized():
        # Threads that compete with the workers for cores cost a third of the speed.
        free = max(1, (os.cpu_count() or 1) - num_workers)
        torch.set_num_threads(min(torch.get_num_threads(), free))


def draw_noise(model, batches, step):
    """The noise of this process's rows in a step: a function of the seed and the step."""
    config = model.config
    generator = torch.Generator(model.clip.logit_scale.device)
    generator.manual_seed(batches.seed * 1_000_003 + step)
    num_patches = (config.image_size // config.patch_size) ** 2
    noise = model.draw_noise(batches.batch_size, num_patches, generator)
    return {name: values[batches.rows] for name, values in noise.items()}


def make_loader(pairs, sources, batches, workers):
    """The batches of the steps that are left, prepared by worker processes.

    Scenes without crops are the same in each epoch: for more than one, all are prepared first.
    """
    scenes = all(isinstance(source, SyntheticScenes) for source in sources)
    total = sum(batches.sizes)
    again = total < len(batches.steps) * batches.batch_size
    random = pairs.crop_scale < 1 or pairs.mirror or pairs.nouns
    if scenes and again and not random:
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
        worker_init_fn=start_worker,
    )


def score(state, dataset, workers):
    """Prints the mIoU on a data set, and keeps the best model as best.pt."""
    segmenter = evaluate.open_segmenter(state.model, state.tokenizer, dataset)
    metrics = evaluate.evaluate(segmenter, dataset, workers=workers)
    state.model.train()
    if not metrics:  # not the first process
        return
    print(f"step {state.step}  mIoU {100 * metrics['mIoU']:.2f} %", flush=True)
    metrics["dataset"] = dataset.name
    path = state.path.with_name("best.pt")
    best = read_weights(path)["metrics"] if path.exists() else {}
    if best.get("dataset") != dataset.name or metrics["mIoU"] > best["mIoU"]:
        others = {"merges": state.tokenizer.merges, "step": state.step, "metrics": metrics}
        save_checkpoint(path, state.model, **others)


def train(
    state, loader, parallel, weights, precision, chunks, warmup, log, score, every, max_errors
):
    """One step for each batch of the loader -> the exit status: 0, or 128 + the signal that came.

    score: a function, or None. every: the steps between log lines, checkpoints, and scores.
    Raises InputError for a broken run.
    """
    log_every, save_every, eval_every = every
    batches = loader.batch_sampler
    last = batches.steps.stop
    unread = []  # numbers of the last steps, on the device
    rows = []  # of the steps since the last log line
    since = time.time()
    skipped = 0  # in a row
    stopped = False
    state.model.train()
    with GracefulExit() as stop:
        for *batch, errors in loader:  # image, superpatch, text: see collate
            for error in errors if state.errors < 10 else ():
                print(error, file=sys.stderr)
            for group in state.optimizer.param_groups:
                group["lr"] = group["peak_lr"] * lr_factor(state.step, last, warmup)
            extra = torch.tensor([stop.asked(), len(errors)], dtype=torch.float32)
            batch = [x.to(state.device, non_blocking=True) for x in (*batch, extra)]
            noise = draw_noise(state.model, batches, state.step)
            values, names = take_step(
                parallel, state.optimizer, batch, noise, weights, precision, state.scaler, chunks
            )
            unread.append(values)
            state.step += 1
            log_now = state.step % log_every == 0 or state.step in (batches.steps.start + 1, last)
            score_now = score and (state.step % eval_every == 0 or state.step == last)
            save_now = state.step % save_every == 0 or score_now
            # Reading waits for a GPU. Several processes must read, and stop, at the same step.
            free = state.device.type == "cpu" or (stop.asked() and not dist.is_initialized())
            while unread and (log_now or save_now or free):
                row = dict(zip([*names, "stop", "errors", "grad"], unread.pop(0).tolist()))
                stopped = stopped or row["stop"] > 0
                state.errors += int(row["errors"])
                skipped = 0 if math.isfinite(row["grad"]) else skipped + 1
                rows.append(row)
                if skipped == 10:
                    raise InputError("10 gradients in a row are not finite; try a lower --lr")
            if log_now:
                write_log(log, state, batches, rows, weights, time.time() - since)
                rows = []
                since = time.time()
            if state.errors > max_errors * max(1000, state.step * batches.batch_size):
                state.save()
                advice = "repair the data and start again, or allow more --max-errors and --resume"
                raise InputError(f"unusable pairs by step {state.step}: {state.errors}; {advice}")
            if stopped:
                break
            if save_now:
                state.save()
            if score_now:
                score()
        state.save()
    return stop.status() if state.step < last else 0


def main(argv=None):
    args = parse_args(argv)
    device = evaluate.start_processes(args.device)
    rows = rows_of_process(args.batch_size, args.accumulate)
    precision = choose_precision(args.precision, device)
    flags = vars(args) | {"precision": precision}
    path = Path(args.output) / "checkpoint.pt"
    saved, found = last_checkpoint(path) if args.resume else (None, path)
    check_resumed(saved or {"flags": flags}, flags, found)
    torch.manual_seed(args.seed)
    sizes = {name: getattr(args, name) for name in SIZES if getattr(args, name) is not None}
    config = choose_sizes(args.recipe, args.method, sizes, args.crop_scale)
    options = {"seed": args.seed, "workers": args.workers, "max_errors": args.max_errors}
    open_data = functools.partial(open_pairs, args.data, **options)
    init = args.method, args.init, config, sizes, args.vocabulary, args.image_encoder
    model, tokenizer, sources = open_run(open_data, saved, found, *init)
    lengths = [len(source) for source in sources]
    steps = args.steps
    if steps is None:
        steps = math.ceil(args.epochs * sum(lengths) / args.batch_size)
    freeze(model.to(device), args.freeze, not args.reconstruction_weight, args.nouns in NO_NOUNS)
    groups = parameter_groups(model, args.lr, args.clip_lr, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-6, fused=True)
    # Without fp16 it scales by 1, and only skips steps whose gradients are not finite.
    scaler = torch.amp.GradScaler(device.type, 2.0**16 if precision == "fp16" else 1.0)
    state = State(path, model, tokenizer, optimizer, scaler, lengths, flags | {"steps": steps})
    state.restore(saved, found, steps)

    pairs = TrainingPairs(
        ConcatDataset(sources),
        tokenizer,
        model.config,
        crop_scale=args.crop_scale,
        mirror=args.mirror,
        seed=args.seed,
        text_length=args.text_length,
        rule=args.superpatch if args.superpixel_weight else None,
        nouns=choose_nouns(args.nouns),
        templates=evaluate.TEMPLATES[7],
        prompts=PROMPTS * (args.method == "groupvit"),
    )
    batches = Batches(lengths, args.seed, args.batch_size, rows, range(state.step, steps))
    loader = make_loader(pairs, sources, batches, args.workers)
    scored = None
    if args.eval_every:
        dataset = evaluate.open_dataset(args.eval_dataset, args.eval_root, model.config.image_size)
        scored = functools.partial(score, state, dataset, args.workers)
    log = open_log(path.parent, state.step if saved else None)
    introduce(state, saved, sources, batches, args.superpixel_weight, args.warmup)
    tune_cpu(device, loader.num_workers, model.config)
    parallel = wrap_model(model, args.checkpoint_activations, args.compile)
    weights = args.reconstruction_weight, args.superpixel_weight
    every = args.log_every, args.save_every, args.eval_every
    how = weights, precision, args.accumulate, args.warmup, log, scored, every, args.max_errors
    status = train(state, loader, parallel, *how)
    if log:
        advice = ", --resume continues it" if status else ""
        print(f"{path} has step {state.step} of {steps}{advice}; unusable pairs: {state.errors}")
    if status:
        sys.exit(status)


if __name__ == "__main__":
    evaluate.run_program(main, "stopped")
