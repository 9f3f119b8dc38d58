"""Training: it learns, it can be interrupted, and two processes do what one does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from clip_loader import InputError, load_segclip, load_tokenizer, read_weights
from conftest import recorder
from data import SyntheticScenes, TrainingPairs, collate, normalise
from losses import contrastive_loss

SMALL_RUN = (
    "--device cpu --precision fp32 --image-size 32 --vision-width 64 --text-width 64 --vision-layers 3 --first-stage-layers 2 "
    "--text-layers 1 --num-centers 6 --cross-layers 1 --embed-dim 32 --batch-size 8 --steps 6 --workers 0"
)


def run(output, *more):
    train.main([*SMALL_RUN.split(), "--output", str(output), *more])
    return read_weights(output / "checkpoint.pt")


def log_of(output):
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        if isinstance(a[name], dict):
            assert_equal(a[name], b[name])
        else:
            assert torch.equal(a[name], b[name]) if isinstance(a[name], torch.Tensor) else a[name] == b[name], name


@torch.no_grad()
def held_out_loss(path):
    """The contrastive loss of 64 scenes that training never saw."""
    model = load_segclip(path).eval()
    scenes = SyntheticScenes(model.config.image_size, seed=0, split="val")
    pairs = TrainingPairs(scenes, load_tokenizer(path), model.config, crop_scale=1.0, seed=0)
    pictures, _, texts, _ = collate([pairs[i, i] for i in range(64)])
    features = model.encode_image(normalise(pictures)).features
    return contrastive_loss(features, model.encode_text(texts), model.clip.logit_scale).item()


def test_a_short_run_learns_to_tell_pairs_apart(tmp_path):
    untrained = run(tmp_path / "untrained", "--steps", "0")
    assert untrained["step"] == 0
    trained = run(tmp_path / "trained", "--steps", "60", "--batch-size", "32", "--precision", "bf16")
    before, after = (held_out_loss(tmp_path / name / "checkpoint.pt") for name in ("untrained", "trained"))
    assert after < before - 0.5
    assert trained["args"]["batch_size"] == 32 and trained["step"] == 60
    last = log_of(tmp_path / "trained")[-1]
    assert last["step"] == 60 and last["loss"] == pytest.approx(last["con"] + last["rec"] + last["sup"], rel=1e-5)
    assert last["pairs_per_second"] > 0


class Interrupt(Exception):
    pass


def test_a_run_that_was_interrupted_ends_bit_for_bit_the_same(tmp_path, monkeypatch):
    whole = run(tmp_path / "whole")
    save = train.save_checkpoint

    def save_and_stop(*args, **others):
        save(*args, **others)
        raise Interrupt

    monkeypatch.setattr(train, "save_checkpoint", save_and_stop)
    with pytest.raises(Interrupt):
        run(tmp_path / "parts", "--save-every", "4")
    monkeypatch.setattr(train, "save_checkpoint", save)
    assert read_weights(tmp_path / "parts/checkpoint.pt")["step"] == 4
    resumed = run(tmp_path / "parts", "--resume")
    assert_equal(whole["model"], resumed["model"])
    assert_equal(whole["optimizer"]["state"], resumed["optimizer"]["state"])
    assert whole["step"] == resumed["step"] == 6


def test_a_run_goes_on_with_its_own_flags_only(tmp_path):
    run(tmp_path)
    for flags in ("--num-centers 5", "--seed 1", "--gumbel-tau 2", "--steps 7", "--reconstruction-weight 0"):
        with pytest.raises(InputError) as error:
            run(tmp_path, "--resume", *flags.split())
        assert flags.split()[0] in str(error.value) and "same flags" in str(error.value)
    torch.save({"model": {}, "config": {}}, tmp_path / "checkpoint.pt")
    with pytest.raises(InputError, match="not a checkpoint of train.py"):
        run(tmp_path, "--resume")


def test_a_finished_run_resumed_is_left_as_it_is(tmp_path):
    whole = run(tmp_path)
    assert_equal(whole["model"], run(tmp_path, "--resume")["model"])


def test_workers_and_seeds(tmp_path):
    one = run(tmp_path / "a", "--steps", "2")
    same = run(tmp_path / "b", "--steps", "2", "--workers", "2")
    for name, values in one["model"].items():  # not bit for bit: with workers, torch computes on fewer threads
        assert torch.allclose(values, same["model"][name], atol=1e-5), name
    other = run(tmp_path / "c", "--steps", "2", "--seed", "1")
    assert not torch.equal(one["model"]["clip.visual.conv1.weight"], other["model"]["clip.visual.conv1.weight"])


def test_two_processes_do_what_one_does(tmp_path):
    one = run(tmp_path / "one", "--steps", "3")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(Path(train.__file__)), *SMALL_RUN.split(), "--steps", "3", "--output", str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    two, start = read_weights(tmp_path / "two/checkpoint.pt"), run(tmp_path / "start", "--steps", "0")
    for name, values in one["model"].items():
        assert torch.allclose(values, two["model"][name], atol=2e-5), name
    assert (one["model"]["group.centers"] - start["model"]["group.centers"]).abs().max() > 1e-3
    for ours, theirs in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        for name in ("loss", "con", "rec", "sup", "grad"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name


def test_gradients_that_are_not_finite_change_nothing(tmp_path, monkeypatch):
    start = run(tmp_path / "a", "--steps", "0")
    monkeypatch.setattr(train, "normalise", lambda picture: picture.float() / 0)
    end = run(tmp_path / "b", "--steps", "9")
    assert_equal(start["model"], end["model"])
    with pytest.raises(InputError, match="not finite"):
        run(tmp_path / "c", "--steps", "11", "--save-every", "4")
    assert_equal(end["model"], read_weights(tmp_path / "c/checkpoint.pt")["model"])


def test_learning_rate_by_hand():
    args = train.parse_args("--steps 110 --warmup 0.0909".split())  # 10 steps up, 100 down
    rates = [train.lr_factor(step, args) for step in range(110)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1
    assert rates[60] == pytest.approx(0.5) and rates[35] == pytest.approx(0.5 + 0.5**1.5)
    assert 0 < rates[109] < 0.0005


def test_weight_decay_is_for_matrices(tiny):
    args = train.parse_args("--weight-decay 0.3".split())
    others, decayed = train.build_optimizer(tiny, args).param_groups
    assert decayed["weight_decay"] == 0.3 and others["weight_decay"] == 0
    together = {id(p) for group in (decayed, others) for p in group["params"]}
    assert together == {id(p) for name, p in tiny.named_parameters() if name != "clip.visual.class_embedding"}
    assert any(p is tiny.group.to_keys.weight for p in decayed["params"])
    assert any(p is tiny.clip.visual.ln_pre.weight for p in others["params"])


def test_weights_of_the_losses(tmp_path):
    run(tmp_path, "--steps", "1", "--superpixel-weight", "5", "--reconstruction-weight", "0.25")
    line = log_of(tmp_path)[-1]
    assert line["loss"] == pytest.approx(line["con"] + 0.25 * line["rec"] + 5 * line["sup"], rel=1e-5)


def test_every_flag_is_read(tmp_path, monkeypatch):
    args, read = recorder(train.parse_args([*SMALL_RUN.split(), "--output", str(tmp_path), "--steps", "1"]))
    monkeypatch.setattr(train, "parse_args", lambda argv: args)
    train.main()
    assert set(vars(args)) <= read


def test_losses_that_are_left_out(tmp_path):
    start = run(tmp_path, "--steps", "0")["model"]
    end = run(tmp_path, "--steps", "2", "--reconstruction-weight", "0")["model"]
    assert torch.equal(start["decoder.mask_token"], end["decoder.mask_token"])
    assert not torch.equal(start["group.centers"], end["group.centers"])
    assert "rec" not in log_of(tmp_path)[-1]


@pytest.mark.parametrize(
    "flags, word",
    [
        ("--image-size 30", "patch_size"),
        ("--first-stage-layers 9", "first_stage_layers"),
        ("--batch-size 0", "batch-size"),
        ("--vision-width 100", "width"),
        ("--patch-size 0", "patch_size"),
        ("--num-centers 0", "num_centers"),
        ("--gumbel-tau 0", "gumbel_tau"),
        ("--mask-ratio 1", "mask_ratio"),
        ("--crop-scale 0", "crop-scale"),
        ("--workers -1", "workers"),
        ("--seed -1", "seed"),
        ("--output /dev/null", "/dev/null"),
    ],
)
def test_flags_that_make_no_sense(tmp_path, flags, word):
    with pytest.raises(InputError) as error:
        run(tmp_path, *flags.split())
    assert word in str(error.value) and "\n" not in str(error.value)
