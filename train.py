"""Train SegCLIP on image-text pairs: contrastive, reconstruction and superpixel losses.

python train.py                          a small model from scratch on synthetic scenes, minutes on two CPU cores
torchrun --nproc_per_node=2 train.py     the same run, each batch split over two processes
"""

import argparse
import dataclasses
import datetime
import json
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from clip_loader import (
    InputError,
    Tokenizer,
    git_revision,
    load_strictly,
    make_folder,
    read_weights,
    save_checkpoint,
    start_processes,
)
from data import SyntheticScenes, TrainingPairs, normalise
from losses import total_loss
from model import Config, SegCLIP

# The embedded default. Two parts of the paper's model are left out of it, the cross-attention layers and the blocks after
# the group module: with either, words ended up on the wrong regions (the README has the numbers). Perhaps because on 64
# patches they let each region see all the others, and the maximum over the regions never asks which carries which word.
SMALL = Config(
    image_size=64,
    patch_size=8,
    vision_width=128,
    vision_layers=3,
    embed_dim=128,
    context_length=24,
    text_width=128,
    text_layers=2,
    first_stage_layers=3,
    num_centers=16,  # without cross-attention they are the same for all pictures: enough for each word to have its own
    cross_layers=0,
    gumbel_tau=3.0,  # from scratch the scores are so far apart that 0.9 leaves the assignment hardly any gradient
    decoder_layers=1,
)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] + " [x] is the default.")
    run = parser.add_argument_group("the run")
    run.add_argument("--output", default="runs/synthetic", help="folder for checkpoint.pt and log.jsonl [%(default)s]")
    run.add_argument("--resume", action="store_true", help="go on from OUTPUT/checkpoint.pt, with the same flags")
    run.add_argument(
        "--save-every", type=int, default=200, help="steps between checkpoints; 0: only one at the end [%(default)s]"
    )
    run.add_argument("--device", help="cpu, cuda, cuda:1, ... [a GPU if there is one]")
    run.add_argument(
        "--precision", choices=("bf16", "fp32"), default="bf16", help="fp32 if bf16 is slow on your hardware [%(default)s]"
    )
    run.add_argument("--workers", type=int, default=2, help="processes that prepare pairs; 0: none but this [%(default)s]")
    run.add_argument("--seed", type=int, default=0, help="of the scenes, the initial weights and all noise [%(default)s]")
    recipe = parser.add_argument_group("the recipe")
    recipe.add_argument("--steps", type=int, default=1200, help="0 writes the untrained model, to compare with [%(default)s]")
    recipe.add_argument("--batch-size", type=int, default=64, help="pairs in a step, over all processes [%(default)s]")
    recipe.add_argument("--lr", type=float, default=1e-3, help="learning rate at its peak [%(default)s]")
    recipe.add_argument("--warmup", type=float, default=0.1, help="share of the steps in which lr rises to it [%(default)s]")
    recipe.add_argument("--weight-decay", type=float, default=0.05, help="of matrices; vectors have none [%(default)s]")
    recipe.add_argument("--crop-scale", type=float, default=1.0, help="least share of a picture in a crop [%(default)s]")
    recipe.add_argument("--reconstruction-weight", type=float, default=1.0, help="of L_rec in Eq. 7; 0: none [%(default)s]")
    recipe.add_argument("--superpixel-weight", type=float, default=1.0, help="of L_sup; 1/L is the authors' [%(default)s]")
    sizes = parser.add_argument_group("the model (explained at Config in model.py)")
    for field in dataclasses.fields(Config):
        if field.name != "vocab_size":  # the tokenizer's
            default = getattr(SMALL, field.name)
            flag = "--" + field.name.replace("_", "-")
            sizes.add_argument(flag, type=field.type, default=default, metavar="N", help="[%(default)s]")
    return parser.parse_args(argv)


def check(args, world):
    """Raises InputError for flags that make no sense."""
    limits = {"seed": 2**32 - 1, "warmup": 1.0, "lr": 1e3}
    weights = ("weight_decay", "reconstruction_weight", "superpixel_weight")
    for name in ("save_every", "workers", "steps", *weights, *limits):
        if not 0 <= getattr(args, name) <= limits.get(name, math.inf):
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: out of range")
    if args.batch_size < 1 or args.batch_size % world:
        raise InputError(f"--batch-size {args.batch_size} cannot be split over {world} processes")
    if not 0 < args.crop_scale <= 1:
        raise InputError(f"--crop-scale {args.crop_scale}: must be more than 0 and at most 1")


def check_resumed(checkpoint, args, path):
    """Raises InputError unless the checkpoint is of a run with the same flags: it could not go on as it began."""
    if not {"model", "merges", "optimizer", "step", "args"} <= checkpoint.keys():
        raise InputError(f"{path}: not a checkpoint of train.py, which could be resumed")
    free = ("output", "resume", "save_every", "device", "workers")
    for name, value in vars(args).items():
        if name not in free and checkpoint["args"].get(name) != value:
            flag = "--" + name.replace("_", "-")
            raise InputError(f"{path}: its run had {flag} {checkpoint['args'].get(name)}, not {value}; use the same flags")


def learning_rate(step, args):
    """Linear warm-up to args.lr, then a cosine to zero (Section 3.2)."""
    warmup = max(1, round(args.warmup * args.steps))
    if step < warmup:
        return args.lr * (step + 1) / warmup
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, args.steps - warmup)))


def build_optimizer(model, args):
    """Adam with decoupled weight decay on every parameter that is a matrix."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": args.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), eps=1e-6)


def main(argv=None):
    args = parse_args(argv)
    check(args, int(os.environ.get("WORLD_SIZE", 1)))
    rank, world, device = start_processes(args.device)  # each works on its rows of every batch
    if world == 1 and args.workers:  # threads that fight the workers for cores cost a third of the speed
        torch.set_num_threads(max(1, torch.get_num_threads() - args.workers))
    share = args.batch_size // world
    rows = slice(rank * share, (rank + 1) * share)

    path = Path(args.output) / "checkpoint.pt"
    resumed = read_weights(path) if args.resume else None
    if resumed:
        check_resumed(resumed, args, path)
    scenes = SyntheticScenes(args.image_size, args.seed)
    if resumed:
        tokenizer = Tokenizer(resumed["merges"])
    else:
        tokenizer = Tokenizer.learn([scenes[i].caption for i in range(500)], num_merges=500)
    names = {field.name for field in dataclasses.fields(Config)} - {"vocab_size"}
    torch.manual_seed(args.seed)
    try:
        config = Config(vocab_size=tokenizer.vocab_size, **{name: getattr(args, name) for name in names})
        model = SegCLIP(config).to(device)
    except ValueError as error:
        raise InputError(str(error)) from None
    reconstruct = args.reconstruction_weight > 0
    if not reconstruct:
        for part in (model.reconstruction_layer, model.reconstruction_blocks, model.decoder):
            part.requires_grad_(False)
    optimizer, start = build_optimizer(model, args), 0
    if resumed:
        load_strictly(model, resumed["model"], path)
        optimizer.load_state_dict(resumed["optimizer"])
        start = resumed["step"]
    parallel = DistributedDataParallel(model) if world > 1 else model

    # Step s takes pairs s * batch_size and on, whatever ran before it and however many processes there are: with the
    # noise below, nothing else is random, and so a resumed run is the run that was not interrupted.
    pairs = TrainingPairs(scenes, tokenizer, config, args.crop_scale, args.seed)
    batches = [range(s * args.batch_size + rows.start, s * args.batch_size + rows.stop) for s in range(start, args.steps)]
    loader = DataLoader(pairs, batch_sampler=batches, num_workers=args.workers, pin_memory=device.type == "cuda")
    generator = torch.Generator(device)
    num_patches = (config.image_size // config.patch_size) ** 2

    def save(step):
        if rank == 0:
            state = {"merges": tokenizer.merges, "optimizer": optimizer.state_dict(), "step": step}
            save_checkpoint(path, model, **state, args=vars(args), git=git_revision())

    make_folder(path.parent)
    if rank == 0:
        log = open(path.parent / "log.jsonl", "a" if resumed else "w")
        count = sum(p.numel() for p in model.parameters()) / 1e6
        print(f"{count:.1f} M parameters, {tokenizer.vocab_size} tokens, {world} x {device.type}, {args.precision}")
        if resumed:
            print(f"resumed at step {start} of {args.steps}")
    model.train()
    # The fused kernel for the CPU is made for long sequences; its backward pass in bf16 halves the speed of short ones.
    short = device.type == "cpu" and num_patches < 128
    kernels = [SDPBackend.MATH] if short else [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    recent, skipped, since, last_step = [], 0, time.time(), start
    for step, (picture, superpatch, text) in enumerate(loader, start):
        lr = learning_rate(step, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        image, superpatch, text = normalise(picture.to(device)), superpatch.to(device), text.to(device)
        generator.manual_seed(args.seed * 1_000_003 + step)
        noise = model.draw_noise(args.batch_size, num_patches, generator)
        noise = {name: values[rows] for name, values in noise.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"), sdpa_kernel(kernels):
            outputs = parallel(image, text, **noise, reconstruct=reconstruct)
        loss, parts = total_loss(outputs, image, superpatch, args.reconstruction_weight, args.superpixel_weight)
        values = torch.stack([loss, *parts.values()]).detach()
        if world > 1:
            # Each process has the losses of its own rows. Summed here and not after backward(), whose collectives must be
            # the last: DDP (2.13) leaves gloo's threads behind, and one that holds a tensor of ours at exit aborts.
            dist.all_reduce(values)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        # One step that overflows is left out, as in the authors' program; all processes see the same norm.
        skipped = 0 if norm.isfinite() else skipped + 1
        if skipped == 10:
            raise InputError(f"step {step}: ten gradients in a row are not finite, the run is broken; try a lower --lr")
        if not skipped:
            optimizer.step()
            with torch.no_grad():  # where the loss clamps the scale it has no gradient, and could never come back
                model.clip.logit_scale.clamp_(max=math.log(100))

        done, now = step + 1, time.time()
        if rank == 0 and not skipped:
            recent.append(torch.cat([values / world, norm[None]]))
        if recent and (now - since > 5 or done == args.steps):
            means = dict(zip(("loss", *parts, "grad"), torch.stack(recent).mean(dim=0).tolist()))
            rate = (done - last_step) / (now - since)
            line = {"step": done, **means, "lr": lr, "scale": model.clip.logit_scale.exp().item()}
            line["pairs_per_second"] = rate * args.batch_size
            log.write(json.dumps(line) + "\n")
            log.flush()
            losses = " + ".join(f"{name} {means[name]:.3f}" for name in parts)
            eta = datetime.timedelta(seconds=round((args.steps - done) / rate))
            print(
                f"step {done}/{args.steps}  loss {means['loss']:.3f} = {losses}  grad {means['grad']:.1f}  lr {lr:.1e}"
                f"  scale {line['scale']:.1f}  {line['pairs_per_second']:.0f} pairs/s  ETA {eta}",
                flush=True,
            )
            recent, since, last_step = [], now, done
        if args.save_every and done % args.save_every == 0 and done < args.steps:
            save(done)
    save(max(start, args.steps))
    if rank == 0:
        print(f"wrote {path}")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"train.py: {error}")
    except KeyboardInterrupt:
        sys.exit("train.py: stopped; --resume goes on from the last checkpoint")
