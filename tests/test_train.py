"""Training: it learns, it can be interrupted, and two processes do what one does."""

import gzip
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import skimage.data
import torch
from PIL import Image

import clip_loader
import data
import train
from clip_loader import InputError, load_model, load_segclip, load_tokenizer, read_weights
from conftest import GOLDEN, TINY, recorder
from data import SyntheticScenes, TrainingPairs, collate, normalise
from losses import contrastive_loss
from model import CLIP, SegCLIP

SMALL_CLIP = (
    "--device cpu --precision fp32 --image-size 32 --vision-width 64 --text-width 64 --vision-layers 3 --text-layers 1 "
    "--embed-dim 32 --batch-size 8 --steps 6 --workers 0"
)
SMALL_RUN = f"{SMALL_CLIP} --first-stage-layers 2 --num-centers 6 --cross-layers 1"


THREADS = torch.get_num_threads()


def run(output, *more, flags=SMALL_RUN):
    torch.set_num_threads(THREADS)  # an earlier run with workers took fewer
    train.main([*flags.split(), "--output", str(output), *more])
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


# ---------------------------------------------------------------------------------------------------------------------
# Stop and resume


@pytest.fixture
def shards(tmp_path):
    """Four shards of 30 small scenes with captions."""
    folder = tmp_path / "shards"
    folder.mkdir()
    scenes = SyntheticScenes(40, seed=5)
    for n in range(4):
        with tarfile.open(folder / f"{n:05}.tar", "w") as tar:
            for i in range(30 * n, 30 * n + 30):
                scene, picture = scenes[i], io.BytesIO()
                Image.fromarray(scene.picture).save(picture, "JPEG")
                for suffix, content in (("jpg", picture.getvalue()), ("txt", scene.caption.encode())):
                    member = tarfile.TarInfo(f"{i:09}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return str(folder / "{00000..00003}.tar")


def launch(output, *flags, processes=1, script=train.__file__, small=SMALL_RUN):
    """Start a run as a user does, in a process group of its own."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] * (processes > 1)
    command = [sys.executable, *torchrun, str(script), *small.split(), "--output", str(output), *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for_step(process, output, step):
    deadline = time.time() + 90
    while not (output / "log.jsonl").exists() or len((output / "log.jsonl").read_text().splitlines()) < step:
        assert process.poll() is None and time.time() < deadline, process.communicate()
        time.sleep(0.005)


LONG = ("--steps", "40", "--save-every", "7", "--log-every", "1")


@pytest.mark.parametrize("kind, processes", [("synthetic", 1), ("table", 2), ("shards", 1), ("shards", 2)])
def test_a_run_that_was_killed_and_resumed_ends_bit_for_bit_the_same(tmp_path, shards, kind, processes):
    data = ("--data", shards if kind == "shards" else "synthetic")
    if kind == "table":
        scenes = SyntheticScenes(40, seed=5)
        for i in range(100):
            Image.fromarray(scenes[i].picture).save(tmp_path / f"{i}.png")
        (tmp_path / "pairs.tsv").write_text("".join(f"{i}.png\t{scenes[i].caption}\n" for i in range(100)))
        data = ("--data", str(tmp_path / "pairs.tsv"), "--workers", "1")
    output = tmp_path / "parts"
    process = launch(output, *LONG, *data, processes=processes)
    wait_for_step(process, output, 16)
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split() if processes > 1 else [process.pid]
    for rank in map(int, ranks):
        os.kill(rank, signal.SIGKILL)
    process.communicate()
    killed = read_weights(output / "checkpoint.pt")["step"]
    assert 14 <= killed < 40
    for name, flags in {"parts": ("--resume",), "whole": ()}.items():
        if processes == 1:
            run(tmp_path / name, *LONG, *data, *flags)
        else:
            process = launch(tmp_path / name, *LONG, *data, *flags, processes=processes)
            out, err = process.communicate(timeout=120)
            assert process.returncode == 0, err
            assert (f"at step {killed}" in out) == (name == "parts")
    parts, whole = (read_weights(tmp_path / name / "checkpoint.pt") for name in ("parts", "whole"))
    assert parts["step"] == whole["step"] == 40
    assert_equal(whole["model"], parts["model"])
    assert_equal(whole["optimizer"]["state"], parts["optimizer"]["state"])
    steps = [line["step"] for line in log_of(output)]
    assert steps == sorted(set(steps)) and steps[-1] == 40
    for ours, theirs in zip(log_of(output)[killed + 1 :], log_of(tmp_path / "whole")[killed + 1 :], strict=True):
        assert ours["loss"] == theirs["loss"]


@pytest.mark.parametrize("processes, name", [(1, "SIGTERM"), (1, "SIGINT"), (2, "SIGTERM")])
def test_a_signal_saves_and_ends_the_run(tmp_path, processes, name):
    output = tmp_path / "run"
    flags = (
        *LONG,
        "--steps",
        "5000",
        "--save-every",
        "0",
        "--workers",
        "1",
        "--crop-scale",
        "0.9",
    )  # so none is prepared before
    process = launch(output, *flags, processes=processes)
    wait_for_step(process, output, 10)
    if name == "SIGINT":
        os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does, the workers get it too
    else:
        process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    step = read_weights(output / "checkpoint.pt")["step"]
    assert 10 <= step < 5000 and f"stopped at step {step} of 5000" in out
    if processes == 1:  # torchrun has a word of its own
        assert process.returncode == 0 and "Traceback" not in err


def test_the_last_good_checkpoint_is_found(tmp_path, capsys):
    whole = run(tmp_path / "whole")
    run(tmp_path / "parts", "--save-every", "2", "--keep", "3")
    paths = [tmp_path / "parts" / name for name in ("checkpoint.pt", "checkpoint.1.pt", "checkpoint.2.pt")]
    assert [read_weights(path)["step"] for path in paths] == [6, 4, 2]
    assert not (tmp_path / "parts/checkpoint.3.pt").exists()
    for path in paths[:2]:
        path.write_bytes(path.read_bytes()[:-1000])
    assert_equal(whole["model"], run(tmp_path / "parts", "--resume")["model"])
    streams = capsys.readouterr()
    assert f"{paths[0]}: not a checkpoint" in streams.err and f"resumed {paths[2]} at step 2" in streams.out
    for path in paths:
        path.write_bytes(b"")
    with pytest.raises(InputError, match="checkpoint"):
        run(tmp_path / "parts", "--resume")


def test_without_a_checkpoint_resume_begins(tmp_path, capsys):
    assert run(tmp_path / "new", "--resume", "--steps", "1")["step"] == 1
    assert "nothing to resume" in capsys.readouterr().out
    run(tmp_path / "new", "--resume", "--steps", "1")
    assert "done already" in capsys.readouterr().out


def test_a_new_run_loses_no_earlier_one(tmp_path):
    first = run(tmp_path / "run", "--steps", "2")
    run(tmp_path / "run", "--steps", "1")
    assert_equal(first["model"], read_weights(tmp_path / "run.1/checkpoint.pt")["model"])
    assert len(log_of(tmp_path / "run.1")) == 2 and len(log_of(tmp_path / "run")) == 1
    with pytest.raises(InputError):  # said before anything is moved
        run(tmp_path / "run", "--nouns", str(tmp_path / "nowhere.txt"))
    assert (tmp_path / "run/checkpoint.pt").exists() and not (tmp_path / "run.2").exists()


def test_a_run_goes_on_with_the_same_data_only(tmp_path, shards):
    run(tmp_path / "run", "--data", shards)
    with pytest.raises(InputError, match="--data"):
        run(tmp_path / "run", "--data", "synthetic", "--resume")
    os.remove(shards.replace("{00000..00003}", "00002"))
    with pytest.raises(InputError, match="had 120 pairs, the data has 90 now"):
        run(tmp_path / "run", "--data", shards, "--resume", "--max-faults", "0.5")


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


@pytest.mark.parametrize("chunks", ["1", "2"])
def test_two_processes_do_what_one_does(tmp_path, chunks):
    one = run(tmp_path / "one", "--steps", "3", "--log-every", "1")
    look = ("--eval-every", "3", "--evaluate", "--limit 3 --workers 0")
    process = launch(tmp_path / "two", "--steps", "3", "--log-every", "1", "--accumulate", chunks, *look, processes=2)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    two, start = read_weights(tmp_path / "two/checkpoint.pt"), run(tmp_path / "start", "--steps", "0")
    for name, values in one["model"].items():
        assert torch.allclose(values, two["model"][name], atol=2e-5), name
    assert (one["model"]["group.centers"] - start["model"]["group.centers"]).abs().max() > 1e-3
    for ours, theirs in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        for name in ("loss", "con", "rec", "sup", "grad"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name


def test_two_processes_train_pacl_as_one_does(tmp_path):
    run(tmp_path / "clip", flags=f"{SMALL_CLIP} --method clip --steps 0")
    flags = f"{SMALL_CLIP} --method pacl --steps 3 --log-every 1 --init {tmp_path}/clip/checkpoint.pt"
    process = launch(tmp_path / "two", processes=2, small=flags)
    one = run(tmp_path / "one", flags=flags)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    two = read_weights(tmp_path / "two/checkpoint.pt")
    for name, values in one["model"].items():
        assert torch.allclose(values, two["model"][name], atol=1e-6), name
    for ours, theirs in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        assert (ours["con"], ours["grad"]) == pytest.approx((theirs["con"], theirs["grad"]), rel=1e-4)


def gradients(model, batch, noise, *flags):
    """-> {loss: value}, gradient of each parameter."""
    args = train.parse_args(["--precision", "fp32", *flags])
    scaler = torch.amp.GradScaler("cpu", 1.0)
    model.zero_grad()
    values, names = train.compute_gradients(model.train(), batch, noise, args, scaler, torch.tensor([5.0, 7.0]))
    assert values[len(names) :].tolist() == [5, 7]
    return dict(zip(names, values.tolist())), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "flags", ["--accumulate 2", "--accumulate 8", "--checkpoint-activations", "--accumulate 4 --checkpoint-activations"]
)
def test_saving_memory_changes_no_gradient(tiny, batch, flags):
    """With all three losses, and negatives from the whole batch."""
    image, text, noise = batch
    superpatch = torch.randint(0, 3, (8, 16), generator=torch.Generator().manual_seed(1))
    inputs = (image, superpatch, text)
    weights = ("--reconstruction-weight", "0.7", "--superpixel-weight", "3")
    losses, expected = gradients(tiny, inputs, noise, *weights)
    if "--checkpoint" in flags:
        train.checkpoint_activations(tiny)
    ours, actual = gradients(tiny, inputs, noise, *weights, *flags.split())
    assert ours == pytest.approx(losses, rel=1e-5)
    assert actual.keys() == expected.keys() and "clip.logit_scale" in actual
    for name, gradient in expected.items():
        assert (gradient - actual[name]).abs().max() <= 1e-5 * gradient.abs().max() + 1e-7, name


def test_two_processes_give_the_gradients_of_one(tmp_path, batch):
    """To 1e-5 of the largest, with all three losses, with accumulation and without."""
    script = tmp_path / "rank.py"
    script.write_text(GRADIENTS_OF_A_RANK.format(root=str(Path(train.__file__).parent), folder=str(tmp_path)))
    image, text, noise = batch
    superpatch = torch.randint(0, 3, (8, 16), generator=torch.Generator().manual_seed(1))
    torch.save({"batch": [image, superpatch, text], "noise": noise}, tmp_path / "batch.pt")
    process = launch(tmp_path, processes=2, script=script)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    torch.manual_seed(0)
    losses, expected = gradients(SegCLIP(TINY), (image, superpatch, text), noise)
    for chunks in (1, 2):
        two = torch.load(tmp_path / f"gradients{chunks}.pt", weights_only=True)
        assert two["losses"] == pytest.approx(losses, rel=1e-5)
        for name, gradient in expected.items():
            assert (gradient - two["gradients"][name]).abs().max() <= 1e-5 * gradient.abs().max() + 1e-7, name


GRADIENTS_OF_A_RANK = """
import os, sys; sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import torch, torch.distributed as dist
import train
from conftest import TINY
from model import SegCLIP
dist.init_process_group("gloo")
rank, saved = dist.get_rank(), torch.load({folder!r} + "/batch.pt", weights_only=True)
rows = slice(4 * rank, 4 * rank + 4)
for chunks in (1, 2):
    torch.manual_seed(0)
    model = SegCLIP(TINY).train()
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    args = train.parse_args(["--precision", "fp32", "--accumulate", str(chunks)])
    values, names = train.compute_gradients(
        parallel, [x[rows] for x in saved["batch"]], {{k: v[rows] for k, v in saved["noise"].items()}}, args,
        torch.amp.GradScaler("cpu", 1.0), torch.zeros(1),
    )
    if rank == 0:
        gradients = {{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}
        losses = dict(zip(names, values.tolist()))
        torch.save({{"losses": losses, "gradients": gradients}}, {folder!r} + f"/gradients{{chunks}}.pt")
    dist.barrier()
os._exit(0)  # as clip_loader.run_program does
"""


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["", "--accumulate 2", "--checkpoint-activations", "--precision bf16"])
def test_a_compiled_run_follows_the_plain_one(tmp_path, flags):
    tolerance = 0.02 if "bf16" in flags else 1e-4
    flags = ("--steps", "4", "--log-every", "1", *flags.split())
    run(tmp_path / "plain", *flags)
    run(tmp_path / "compiled", *flags, "--compile", "--eval-every", "2", "--evaluate", "--limit 2 --workers 0")
    for ours, theirs in zip(log_of(tmp_path / "plain"), log_of(tmp_path / "compiled"), strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=tolerance)  # a step whose gradient is not finite has no line


@pytest.mark.parametrize("precision, tolerance", [("bf16", 0.03), ("fp16", 0.2)])  # fp16 skips steps until its scale is right
def test_precisions_follow_fp32(tmp_path, precision, tolerance):
    flags = ("--steps", "12", "--log-every", "12")
    run(tmp_path / "fp32", *flags)
    state = run(tmp_path / precision, *flags, "--precision", precision)
    for name in ("con", "rec"):
        ours, exact = (log_of(tmp_path / x)[-1][name] for x in (precision, "fp32"))
        assert ours == pytest.approx(exact, rel=tolerance), name
    assert (state["scaler"]["scale"] > 1) == (precision == "fp16")


@pytest.mark.parametrize("kind", ["loss", "dead"])
def test_trouble_on_one_process(tmp_path, kind):
    """A loss that is not finite skips the step on all processes; one that dies ends the job, with its error."""
    script = tmp_path / "trouble.py"
    script.write_text(TROUBLE.format(root=str(Path(train.__file__).parent), kind=kind))
    process = launch(tmp_path / "run", "--steps", "8", "--log-every", "1", processes=2, script=script)
    out, err = process.communicate(timeout=120)
    if kind == "dead":
        assert process.returncode != 0 and "the disk is gone" in err
        return
    assert process.returncode == 0, err
    assert [line["step"] for line in log_of(tmp_path / "run")] == [1, 2, 5, 6, 7, 8]
    assert read_weights(tmp_path / "run/checkpoint.pt")["optimizer"]["state"][0]["step"] == 6


TROUBLE = """
import os, sys; sys.path.insert(0, {root!r})
import train
count, original = 0, train.total_loss
def total_loss(*args, **options):
    global count
    count += 1
    loss, parts = original(*args, **options)
    if os.environ["RANK"] == "1" and count in (3, 4):
        if {kind!r} == "dead":
            raise OSError("the disk is gone")
        parts["con"] = loss = loss + float("inf")
    return loss, parts
train.total_loss = total_loss
train.main()
"""


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


def test_everything_but_biases_decays(tiny):
    """As in the authors' program, whose list of exceptions names biases, and LayerNorm by a name that nothing has."""
    args = train.parse_args("--weight-decay 0.3".split())
    others, decayed = train.build_optimizer(tiny, args).param_groups
    assert decayed["weight_decay"] == 0.3 and others["weight_decay"] == 0
    named = dict(tiny.named_parameters())
    del named["clip.visual.class_embedding"]  # frozen
    assert {id(p) for p in others["params"]} == {id(p) for name, p in named.items() if name.endswith("bias")}
    assert {id(p) for p in decayed["params"]} == {id(p) for name, p in named.items() if not name.endswith("bias")}


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
        ("--text-length 99", "text-length"),
        ("--accumulate 3", "3 chunks"),
        ("--epochs 1", "--steps or --epochs"),
        ("--method clip", "--method clip has no --first-stage-layers"),
        ("--patch-scale 3", "--method segclip has no --patch-scale"),
        ("--data nowhere.tar", "nowhere.tar"),
        ("--nouns nowhere.txt", "nowhere.txt"),
        ("--nouns /dev/null", "/dev/null: no noun"),
        ("--nouns synthetic --data pairs.tsv", "--nouns synthetic"),
        ("--eval-every 1 --evaluate=--stride=999", "--stride 999"),
        ("--eval-every 1 --evaluate=--classify=pictures", "--classify has no mIoU"),
    ],
)
def test_flags_that_make_no_sense(tmp_path, flags, word):
    with pytest.raises(InputError) as error:
        run(tmp_path, *flags.split())
    assert word in str(error.value) and "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# Faults in the data


def spoil(shards, numbers):
    """Put something that is no picture into pairs of the first shard."""
    path = Path(shards.replace("{00000..00003}", "00000"))
    content = path.read_bytes()
    with tarfile.open(path) as tar:
        for i in numbers:
            offset = tar.getmember(f"{i:09}.jpg").offset_data
            content = content[:offset] + b"no JPEG" + content[offset + 7 :]
    path.write_bytes(content)


def test_faults_are_counted_and_named(tmp_path, shards, capsys):
    spoil(shards, range(4))
    flags = ("--data", shards, "--steps", "15", "--log-every", "5")
    whole = run(tmp_path / "whole", *flags)
    streams = capsys.readouterr()
    assert whole["faults"] == {"broken picture": 4} and "of 120 pairs, 4 x broken picture" in streams.out
    assert streams.err.count("fault: broken picture: ") == 3 and "00000.tar/00000000" in streams.err
    assert log_of(tmp_path / "whole")[-1]["faults"] == 4


def test_too_many_faults_stop_the_run_and_keep_it(tmp_path, shards):
    spoil(shards, range(20))
    flags = ("--data", shards, "--steps", "45")
    with pytest.raises(InputError, match="1. x broken picture: more than --max-faults 0.01"):
        run(tmp_path / "run", *flags)
    assert 0 < read_weights(tmp_path / "run/checkpoint.pt")["step"] < 45
    assert run(tmp_path / "run", *flags, "--resume", "--max-faults", "0.1")["step"] == 45


# ---------------------------------------------------------------------------------------------------------------------
# The paper's recipe


@pytest.fixture
def clip_file(tmp_path):
    """A tiny CLIP, and a vocabulary of its 600 tokens."""
    torch.manual_seed(1)
    clip = CLIP(TINY)
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    merges = [f"{x} {y}" for x in letters for y in letters][:86]
    (tmp_path / "vocabulary.gz").write_bytes(gzip.compress("\n".join(["a header", *merges]).encode()))
    return tmp_path / "clip.pt", tmp_path / "vocabulary.gz", clip


PAPER = (
    "--recipe paper --data synthetic --device cpu --precision fp32 --workers 0 --epochs 0.004167 --batch-size 8 --log-every 1"
)
PAPER_NEW = "--first-stage-layers 2 --num-centers 4 --cross-layers 1 --decoder-layers 1 --text-length 10"


def paper(output, clip_file, *flags):
    path, vocabulary, _ = clip_file
    train.main(
        [
            *PAPER.split(),
            *PAPER_NEW.split(),
            "--init",
            str(path),
            "--vocabulary",
            str(vocabulary),
            "--output",
            str(output),
            *flags,
        ]
    )
    return read_weights(output / "checkpoint.pt")


def test_a_clip_by_name_is_read_densely(tmp_path, clip_file, monkeypatch, capsys):
    path, vocabulary, _ = clip_file
    entry = hashlib.sha256(path.read_bytes()).hexdigest(), path.name, "https://example.invalid/"
    monkeypatch.setitem(clip_loader.DOWNLOADS, "ViT-B/16", entry)
    monkeypatch.setenv("CLIP_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    train.evaluate.main(f"--checkpoint ViT-B/16 --vocabulary {vocabulary} --limit 3 --workers 0".split())
    assert "over 3 pictures" in capsys.readouterr().out
    assert (tmp_path / "runs/ViT-B-16/metrics.json").exists()


def test_the_papers_recipe_starts_from_clip(tmp_path, clip_file, capsys):
    start = paper(tmp_path / "start", clip_file, "--epochs", "0")
    for name, values in clip_file[2].state_dict().items():
        assert torch.equal(values, start["model"][f"clip.{name}"]), name
    assert start["config"]["num_centers"] == 4 and start["config"]["image_size"] == 32
    end = paper(tmp_path / "end", clip_file)
    assert end["step"] == 7  # 50 pairs in batches of 8
    moved = {name: (end["model"][name] - start["model"][name]).abs().max().item() for name in end["model"]}
    frozen = ["conv1.weight", "class_embedding", "positional_embedding", "ln_pre.weight", "ln_pre.bias"]
    frozen = {*(f"clip.visual.{name}" for name in frozen), "clip.positional_embedding", "clip.token_embedding.weight"}
    assert {name for name, distance in moved.items() if distance == 0} == frozen
    small = {name for name, distance in moved.items() if 0 < distance < 5e-5}
    late = ("clip.visual.transformer.resblocks.2.", "clip.visual.ln_post.", "clip.visual.proj")
    assert small == {name for name in moved if name.startswith("clip.") and not name.startswith(late)} - frozen
    out = capsys.readouterr().out
    assert "lr 4.0e-06" in out and "lr 4.0e-03" in out and "frozen" in out
    again = paper(tmp_path / "end", clip_file, "--resume")  # the weights to start from are not needed any more
    assert_equal(end["model"], again["model"])


def test_the_papers_values():
    args = train.parse_args(["--recipe", "paper"])
    expected = dict(
        init="ViT-B/16", freeze=True, epochs=10, steps=None, batch_size=768, lr=4e-3, clip_lr=4e-6, text_length=32
    )
    expected |= dict(crop_scale=0.5, superpixel_weight=1, reconstruction_weight=1, superpatch="floor", vocabulary="openai")
    assert {name: getattr(args, name) for name in expected} == expected
    sizes = train.choose_sizes(args)
    added = ("first_stage_layers", "num_centers", "cross_layers", "center_std", "gumbel_tau", "mask_ratio", "decoder_layers")
    assert [getattr(sizes, name) for name in added] == [10, 8, 2, 0.02, 0.9, 0.75, 3]
    args = train.parse_args("--recipe paper --from-scratch --lr 1e-3 --steps 5".split())
    assert (args.init, args.freeze, args.clip_lr, args.lr, args.steps, args.epochs) == (None, False, None, 1e-3, 5, None)


def test_sizes_that_are_not_those_of_the_weights(tmp_path, clip_file):
    with pytest.raises(InputError, match="--patch-size 16: .*clip.pt has 8"):
        paper(tmp_path / "run", clip_file, "--patch-size", "16")
    with pytest.raises(InputError, match="first_stage_layers"):
        paper(tmp_path / "run", clip_file, "--first-stage-layers", "7")


def test_the_baseline_trains_scores_and_is_a_start(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "superpixels", None)  # it needs none
    flags = f"{SMALL_CLIP} --method clip --steps 40 --batch-size 16 --save-every 20"
    whole = run(tmp_path / "clip", flags=flags)
    assert {name.split(".")[0] for name in whole["model"]} == {"clip"}
    first, *_, last = log_of(tmp_path / "clip")
    assert last["con"] < first["con"] and not {"rec", "sup"} & last.keys()
    os.replace(tmp_path / "clip/checkpoint.1.pt", tmp_path / "clip/checkpoint.pt")
    again = run(tmp_path / "clip", "--resume", flags=flags)
    assert_equal(again["model"], whole["model"])
    assert again["config"] == whole["config"]
    model = load_model(tmp_path / "clip/checkpoint.pt").eval()
    picture = normalise(torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8))
    encoding = model.encode_image(picture)
    torch.testing.assert_close(encoding.features, model.clip.encode_image(picture))
    torch.testing.assert_close(encoding.regions, model.clip.encode_patches(picture))
    patches = torch.arange(16).view(1, 4, 4).repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)
    assert torch.equal(train.evaluate.pixel_regions(encoding, (32, 32), (4, 4), 8, 8), patches.expand(2, -1, -1))
    train.evaluate.main(["--checkpoint", str(tmp_path / "clip/checkpoint.pt"), "--limit", "3", "--workers", "0", "--analyse"])
    assert "over 3 pictures" in capsys.readouterr().out
    monkeypatch.undo()
    start = run(tmp_path / "segclip", "--init", str(tmp_path / "clip/checkpoint.pt"), "--steps", "0")
    assert_equal(whole["model"], {name: start["model"][name] for name in whole["model"]})
    assert start["config"]["num_centers"] == 6 and start["merges"] == whole["merges"]


def test_pacl_trains_the_embedder_of_a_frozen_clip(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(train.RECIPES["small"]["clip"], "steps", 3)
    torch.set_num_threads(THREADS)
    assert train.main("--method pacl --steps 6 --batch-size 8 --workers 0 --save-every 3".split())
    assert "python train.py --method clip" in capsys.readouterr().out  # which it needs, comes first
    clip, end = (read_weights(f"runs/{name}/checkpoint.pt") for name in ("clip", "pacl"))
    assert clip["step"] == 3 and end["step"] == 6
    start = read_weights("runs/pacl/checkpoint.1.pt")["model"]
    moved = {name.split(".")[0] for name in start if not torch.equal(start[name], end["model"][name])}
    assert moved == {"embedder"}
    assert_equal(clip["model"], {name: values for name, values in end["model"].items() if name.startswith("clip.")})
    os.replace("runs/pacl/checkpoint.1.pt", "runs/pacl/checkpoint.pt")
    os.rename("runs/clip", "elsewhere")  # PACL's checkpoint has its CLIP
    assert train.main("--method pacl --steps 6 --batch-size 8 --workers 0 --save-every 3 --resume".split())
    assert "comes first" not in capsys.readouterr().out
    assert_equal(read_weights("runs/pacl/checkpoint.pt")["model"], end["model"])
    train.evaluate.main("--checkpoint runs/pacl/checkpoint.pt --limit 3 --workers 0 --stride-trick 4 --refine pamr".split())
    assert "over 3 pictures" in capsys.readouterr().out


def test_pacl_with_the_patches_of_dino(tmp_path, dino_state, capsys):
    torch.save(dino_state, tmp_path / "dino.pth")
    run(tmp_path / "clip", "--method", "clip", "--steps", "0", flags=SMALL_CLIP)
    flags = f"--method pacl --init {tmp_path}/clip/checkpoint.pt --image-encoder {tmp_path}/dino.pth --device cpu "
    flags += "--precision fp32 --batch-size 8 --steps 6 --workers 0 --save-every 3"
    end, start = run(tmp_path / "pacl", flags=flags), read_weights(tmp_path / "pacl/checkpoint.1.pt")["model"]
    moved = {name.split(".")[0] for name in start if not torch.equal(start[name], end["model"][name])}
    assert moved == {"embedder"} and {name.split(".")[0] for name in start} == {"clip", "dino", "embedder"}
    os.replace(tmp_path / "pacl/checkpoint.1.pt", tmp_path / "pacl/checkpoint.pt")
    os.remove(tmp_path / "dino.pth")  # it is in the checkpoint
    assert_equal(run(tmp_path / "pacl", "--resume", flags=flags)["model"], end["model"])
    with pytest.raises(InputError, match="its run had --image-encoder"):
        run(tmp_path / "pacl", "--resume", "--image-encoder", "other.pth", flags=flags)
    with pytest.raises(InputError, match="dino.pth: no such file"):
        run(tmp_path / "new", flags=flags)
    with pytest.raises(InputError, match="--method clip has no --image-encoder"):
        run(tmp_path / "new", "--method", "clip", "--image-encoder", "dino.pth", flags=SMALL_CLIP)
    for flags in ((), ("--stride-trick", "4")):
        flags = ("--output", str(tmp_path / "result"), "--limit", "3", "--workers", "0", *flags)
        train.evaluate.main(["--checkpoint", str(tmp_path / "pacl/checkpoint.pt"), "--analyse", *flags])
        assert "over 3 pictures" in capsys.readouterr().out


def test_scenes_that_are_prepared_once_change_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(SyntheticScenes, "__len__", lambda self: 30)
    once = run(tmp_path / "once", "--workers", "1", "--save-every", "3")
    assert "preparing 30 scenes" in capsys.readouterr().out
    os.replace(tmp_path / "once/checkpoint.1.pt", tmp_path / "once/checkpoint.pt")
    resumed = run(tmp_path / "once", "--save-every", "3", "--resume")
    monkeypatch.setattr(train, "Prepared", lambda pairs, count, workers: pairs)
    anew = run(tmp_path / "anew")
    for other in (resumed, anew):
        assert_equal(other["model"], once["model"])


def test_a_run_can_start_from_a_segclip(tmp_path):
    first = run(tmp_path / "first")
    flags = ("--init", str(tmp_path / "first/checkpoint.pt"), "--steps", "0", "--gumbel-tau", "0.5")
    second = run(tmp_path / "second", *flags)
    assert_equal(first["model"], second["model"])
    assert second["merges"] == first["merges"] and second["config"]["gumbel_tau"] == 0.5


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation on the way


def test_the_best_model_is_kept(tmp_path, monkeypatch):
    scores = iter([0.1, 0.4, 0.3, 0.2])
    evaluate = train.evaluate.evaluate

    def scored(*args):
        return evaluate(*args) | {"mIoU": next(scores)}

    monkeypatch.setattr(train.evaluate, "evaluate", scored)
    flags = ("--steps", "8", "--eval-every", "2", "--evaluate", "--limit 3 --workers 0", "--save-every", "2", "--keep", "4")
    end = run(tmp_path / "run", *flags)
    best = read_weights(tmp_path / "run/best.pt")
    assert best["step"] == 4 and best["metrics"]["mIoU"] == 0.4
    assert_equal(best["model"], read_weights(tmp_path / "run/checkpoint.2.pt")["model"])
    assert len(list((tmp_path / "run/evaluation/predictions").glob("*.png"))) == 3
    load_segclip(tmp_path / "run/best.pt")
    plain = run(tmp_path / "plain", "--steps", "8")
    assert_equal(plain["model"], end["model"])  # looking changes nothing
    with pytest.raises(StopIteration):  # there is no fifth score: an evaluation that fails loses nothing of the training
        run(
            tmp_path / "failed",
            "--steps",
            "2",
            "--eval-every",
            "2",
            "--evaluate",
            "--limit 3 --workers 0",
            "--save-every",
            "0",
        )
    assert read_weights(tmp_path / "failed/checkpoint.pt")["step"] == 2


# ---------------------------------------------------------------------------------------------------------------------
# Photographs

PHOTOGRAPHS = {
    "astronaut": "a smiling astronaut in an orange suit before a flag",
    "chelsea": "the face of a ginger cat, close up",
    "coffee": "a cup of espresso with a spoon on a wooden table",
    "rocket": "a rocket on its launch pad at night",
    "hubble_deep_field": "galaxies in deep space",
    "retina": "the retina of an eye",
    "horse": "the black shape of a horse on white",
    "motorcycle_left": "a motorcycle in a workshop",
    "brick": "a brick wall",
    "grass": "green grass seen from above, in grey",
    "moon": "craters on the moon",
    "camera": "a man behind a camera on a tripod",
    "coins": "old coins in rows",
}


def test_a_batch_of_photographs_is_learned_by_heart(tmp_path):
    """16 real pictures with captions: the contrastive loss goes from ln 16 to under 0.1."""
    rows = [(Path(skimage.data.__file__).parent / name, caption) for name, caption in PHOTOGRAPHS.items()]
    rows = [(next(path.parent.glob(f"{path.name}.*")), caption) for path, caption in rows]
    voc = GOLDEN / "pipeline/voc_like/JPEGImages"
    rows += [(path, f"photograph {path.stem[-4:]} of the tests") for path in sorted(voc.glob("*.jpg"))[:3]]
    (tmp_path / "pairs.tsv").write_text("".join(f"{path}\t{caption}\n" for path, caption in rows))
    flags = ("--data", str(tmp_path / "pairs.tsv"), "--batch-size", "16", "--steps", "120", "--crop-scale", "0.5")
    run(tmp_path / "run", *flags, "--log-every", "20", "--workers", "2")
    lines = log_of(tmp_path / "run")
    assert lines[0]["con"] > 2.3 and lines[-1]["con"] < 0.1
