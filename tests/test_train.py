"""Training: it learns, it can be interrupted, and two processes do what one does."""

import dataclasses
import functools
import gzip
import io
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import skimage.data
import torch
import torch.distributed as dist
from PIL import Image
from torch.nn.parallel import DistributedDataParallel

import data
import train
from clip_loader import load_model, load_segclip, load_tokenizer, read_weights
from conftest import GOLDEN, TINY, assert_one_line, recorder
from data import SyntheticScenes, TrainingPairs, collate, normalise
from losses import contrastive_loss
from model import CLIP, GroupViT, InputError, SegCLIP

CPU = "--device cpu --precision fp32 --batch-size 8 --workers 0"
SMALL_CLIP = (
    f"{CPU} --steps 6 --image-size 32 --vision-width 64 --vision-layers 3 "
    "--text-width 64 --text-layers 1 --embed-dim 32"
)
SMALL_GROUPVIT = (
    f"{SMALL_CLIP} --method groupvit --first-stage-layers 1 --num-centers 4 --group-tokens 5 "
    "--projector-width 32"
)
SMALL_SEGCLIP = f"{SMALL_CLIP} --first-stage-layers 2 --num-centers 6 --cross-layers 1"
THREADS = torch.get_num_threads()


def run(output, flags="", recipe=SMALL_SEGCLIP):
    """Trains in this process -> the content of the checkpoint."""
    torch.set_num_threads(THREADS)  # an earlier run with workers took fewer
    train.main([*recipe.split(), "--output", str(output), *flags.split()])
    return read_weights(output / "checkpoint.pt")


def logged(output, name):
    """What the lines of log.jsonl have under a name."""
    return [json.loads(line)[name] for line in (output / "log.jsonl").read_text().splitlines()]


assert_equal = functools.partial(torch.testing.assert_close, rtol=0, atol=0)


def of_clip(state):
    return {name: values for name, values in state.items() if name.startswith("clip.")}


def moved(start, end):
    """The parts of a model that training changed."""
    return {name.split(".")[0] for name in start if not torch.equal(start[name], end[name])}


@torch.no_grad()
def held_out_loss(path):
    """The contrastive loss of 64 scenes that training never saw."""
    model = load_segclip(path).eval()
    scenes = SyntheticScenes(model.config.image_size, seed=0, split="val")
    pairs = TrainingPairs(scenes, load_tokenizer(path), model.config)
    image, _, text, _ = collate([pairs[i, i] for i in range(64)])
    features = model.encode_image(normalise(image)).features
    return contrastive_loss(features, model.encode_text(text), model.clip.logit_scale).item()


def test_a_short_run_learns_to_tell_pairs_apart(tmp_path):
    assert run(tmp_path / "untrained", "--steps 0")["step"] == 0
    trained = run(tmp_path / "trained", "--steps 60 --batch-size 32 --precision bf16")
    before = held_out_loss(tmp_path / "untrained/checkpoint.pt")
    assert held_out_loss(tmp_path / "trained/checkpoint.pt") < before - 0.5
    assert trained["flags"]["batch_size"] == 32 and trained["step"] == 60
    assert logged(tmp_path / "trained", "step") == [1, 20, 40, 60]


# --------------------------------------------------------------------------------------------------
# Stop and resume

SCENES = SyntheticScenes(40, seed=5)


def write_list(folder):
    """100 images with a list of captions -> what --data takes."""
    lines = []
    for i in range(100):
        Image.fromarray(SCENES[i].image).save(folder / f"{i}.png")
        lines.append(f"{i}.png\t{SCENES[i].caption}\n")
    (folder / "pairs.tsv").write_text("".join(lines))
    return str(folder / "pairs.tsv")


def write_shards(folder):
    """Four shards of 30 pairs -> what --data takes."""
    for shard in range(4):
        with tarfile.open(folder / f"{shard:05}.tar", "w") as tar:
            for i in range(30 * shard, 30 * shard + 30):
                image = io.BytesIO()
                Image.fromarray(SCENES[i].image).save(image, "JPEG")
                files = {"jpg": image.getvalue(), "txt": SCENES[i].caption.encode()}
                for suffix, content in files.items():
                    member = tarfile.TarInfo(f"{i:09}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return str(folder / "{00000..00003}.tar")


@pytest.fixture
def shards(tmp_path):
    return write_shards(tmp_path)


def launch(output, flags="", processes=1, program=(train.__file__,), recipe=SMALL_SEGCLIP):
    """Starts a run as a user does, in a process group of its own."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [*program, *recipe.split(), "--output", str(output), *flags.split()]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(Path(train.__file__).parent)},
    )


def finish(process):
    """Waits for a process that should end well -> what it printed."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def wait_for_step(process, output, step):
    log = output / "log.jsonl"
    deadline = time.time() + 300
    while not log.exists() or len(log.read_text().splitlines()) < step:
        assert process.poll() is None and time.time() < deadline, process.communicate()
        time.sleep(0.005)


SLOW = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "processes, write",
    [SLOW(1, write_list), (1, write_shards), (2, write_shards), SLOW(2, write_list)],
)
def test_a_run_that_was_killed_and_resumed_ends_bit_for_bit_the_same(tmp_path, write, processes):
    flags = f"--steps 24 --save-every 4 --log-every 1 --workers 1 --data {write(tmp_path)}"
    output = tmp_path / "parts"
    process = launch(output, flags, processes)
    wait_for_step(process, output, 9)
    ranks = [process.pid]
    if processes > 1:
        ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for rank in ranks:
        os.kill(int(rank), signal.SIGKILL)
    process.communicate()
    assert 8 <= read_weights(output / "checkpoint.pt")["step"] < 24
    for name, resume in {"parts": "--resume", "whole": ""}.items():
        if processes == 1:
            run(tmp_path / name, f"{flags} {resume}")
        else:
            finish(launch(tmp_path / name, f"{flags} {resume}", processes))
    assert not (tmp_path / "parts.1").exists()  # it did not begin anew
    parts, whole = (read_weights(tmp_path / name / "checkpoint.pt") for name in ("parts", "whole"))
    assert parts["step"] == whole["step"] == 24
    assert_equal(parts["model"], whole["model"])
    assert_equal(parts["optimizer"]["state"], whole["optimizer"]["state"])
    assert logged(output, "step") == list(range(1, 25))
    assert logged(output, "loss") == logged(tmp_path / "whole", "loss")


def start_long_run(output, flags="", processes=1):
    """Starts a run that takes for ever, and waits for its tenth step."""
    flags = f"--steps 5000 --save-every 5000 --log-every 1 --workers 1 --crop-scale 0.9 {flags}"
    process = launch(output, flags, processes)  # crops, so scenes are not prepared in memory
    wait_for_step(process, output, 10)
    return process


@pytest.mark.parametrize(
    "processes, name", [(1, "SIGTERM"), (1, "SIGINT"), SLOW(2, "SIGTERM"), (2, "SIGKILL")]
)
def test_a_signal_saves_and_ends_the_run(tmp_path, processes, name):
    """Also SIGKILL of torchrun, whose processes live on, notice it, and end by themselves."""
    output = tmp_path / "run"
    process = start_long_run(output, processes=processes)
    if name == "SIGINT":
        os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does; the workers get it too
    else:
        process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=60)  # until the last process has closed its output
    step = read_weights(output / "checkpoint.pt")["step"]
    assert 10 <= step < 5000 and f"has step {step} of 5000, --resume continues" in out
    if processes == 1:  # torchrun adds a message of its own
        assert process.returncode == {"SIGINT": 130, "SIGTERM": 143}[name]
        assert "Traceback" not in err
    if name == "SIGKILL":
        flags = f"--log-every 1 --crop-scale 0.9 --resume --steps {step + 2}"
        assert run(output, flags)["step"] == step + 2
        assert logged(output, "step") == list(range(1, step + 3))


def test_two_runs_never_share_a_folder(tmp_path):
    first = start_long_run(tmp_path / "run")
    for flags in ("", "--resume"):
        with pytest.raises(InputError, match="run: another run is writing to it"):
            run(tmp_path / "run", flags)
    wait_for_step(first, tmp_path / "run", 15)
    first.terminate()
    out, _ = first.communicate(timeout=60)
    assert "--resume continues" in out and not (tmp_path / "run.1").exists()
    steps = logged(tmp_path / "run", "step")
    assert steps == list(range(1, len(steps) + 1))


def test_a_killed_worker_ends_the_run_in_one_line(tmp_path):
    process = start_long_run(tmp_path / "run")
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(workers[0]), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and err.count("\n") == 1
    assert "a worker process was killed" in err and "--workers" in err


@pytest.mark.parametrize("seconds", [0.1, 0.7, 1.8])
def test_ctrl_c_while_a_program_starts(tmp_path, seconds):
    process = launch(tmp_path / "run", "--steps 5000")
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (-signal.SIGINT, 130)  # without a handler, or with it
    assert "Traceback" not in err and err.count("\n") <= 1


def test_a_full_disk_loses_no_checkpoint(tmp_path):
    flags = "--save-every 2 --resume"
    run(tmp_path, f"{flags} --steps 2")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(InputError, match="checkpoint.pt: cannot be written") as error:
            run(tmp_path, f"{flags} --steps 6")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_one_line(error)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint.pt", "log.jsonl"}
    assert run(tmp_path, f"{flags} --steps 6")["step"] == 6


def test_the_last_good_checkpoint_is_found(tmp_path, capsys):
    whole = run(tmp_path / "whole")
    run(tmp_path / "parts", "--save-every 2")
    last, _ = paths = [tmp_path / f"parts/checkpoint{n}.pt" for n in ("", ".1")]
    assert [read_weights(path)["step"] for path in paths] == [6, 4]
    last.write_bytes(last.read_bytes()[:-1000])
    with open(tmp_path / "parts/log.jsonl", "a") as log:
        log.write('7\n{"step": 5, "los')  # was cut off
    assert_equal(run(tmp_path / "parts", "--resume")["model"], whole["model"])
    out, err = capsys.readouterr()
    assert f"{last}: not a checkpoint" in err and "resumed at step 4" in out
    assert logged(tmp_path / "parts", "step") == [1, 5, 6]
    for path in paths:
        path.write_bytes(b"")
    with pytest.raises(InputError, match="checkpoint"):
        run(tmp_path / "parts", "--resume")


def test_resume_of_nothing_and_of_a_finished_run(tmp_path, capsys):
    first = run(tmp_path / "run", "--resume --steps 1")
    assert "nothing to resume" in capsys.readouterr().out
    assert_equal(run(tmp_path / "run", "--resume --steps 1")["model"], first["model"])
    assert "resumed at step 1" in capsys.readouterr().out


def test_a_run_can_be_lengthened(tmp_path, capsys):
    short = run(tmp_path, "--steps 4 --log-every 1")
    end = run(tmp_path, "--steps 9 --log-every 1 --resume")
    rates = [short["flags"]["lr"] * train.lr_factor(step, 9, 0.1) for step in range(9)]
    line = (
        f"resumed at step 4, learning rate {rates[4]:.1e}, on the schedule of 9 steps in place of"
    )
    assert line in capsys.readouterr().out
    assert logged(tmp_path, "lr")[4:] == pytest.approx(rates[4:])
    assert end["step"] == 9 and moved(short["model"], end["model"]) >= {"clip", "group"}
    epochs = SMALL_SEGCLIP.replace("--steps 6", "--epochs 0.0035")
    assert run(tmp_path, "--resume", epochs)["step"] == 11  # 24,000 pairs in batches of 8
    with pytest.raises(InputError, match="has step 11, .* give --steps 11 or more, or another"):
        run(tmp_path, "--steps 9 --resume")


def test_a_new_run_loses_no_earlier_one(tmp_path):
    first = run(tmp_path / "run", "--steps 2")
    run(tmp_path / "run", "--steps 1")
    assert_equal(read_weights(tmp_path / "run.1/checkpoint.pt")["model"], first["model"])
    assert logged(tmp_path / "run.1", "step") == [1, 2] and logged(tmp_path / "run", "step") == [1]
    with pytest.raises(InputError, match="nowhere"):  # before anything is moved
        run(tmp_path / "run", "--nouns nowhere.txt")
    assert (tmp_path / "run/checkpoint.pt").exists() and not (tmp_path / "run.2").exists()


@pytest.mark.parametrize("file", ["log.jsonl", "model.pt"])
def test_a_folder_without_a_run_is_never_moved(tmp_path, file):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / file).write_text("")
    run(tmp_path / "run", "--steps 1")
    assert (tmp_path / "run" / file).exists() and not (tmp_path / "run.1").exists()


def test_a_run_goes_on_with_the_same_data_only(tmp_path, shards):
    run(tmp_path / "run", f"--data {shards}")
    with pytest.raises(InputError, match="--data"):
        run(tmp_path / "run", "--data synthetic --resume")
    os.remove(tmp_path / "00002.tar")
    with pytest.raises(InputError, match="was trained on 120 pairs, not 90"):
        run(tmp_path / "run", f"--data {shards} --resume --max-errors 0.5")


def test_a_run_goes_on_with_its_own_flags_only(tmp_path):
    run(tmp_path)
    changes = "--num-centers 5", "--seed 1", "--gumbel-tau 2", "--lr 2e-3", "--superpixel-weight 0"
    for flags in changes:
        with pytest.raises(InputError, match=f"was trained with {flags.split()[0]}"):
            run(tmp_path, f"--resume {flags}")
    torch.save({"model": {}, "config": {}}, tmp_path / "checkpoint.pt")
    with pytest.raises(InputError, match="not a checkpoint of train.py"):
        run(tmp_path, "--resume")


# --------------------------------------------------------------------------------------------------
# Processes, memory and precision change rounding only


def test_workers_and_seeds(tmp_path):
    one = run(tmp_path / "one", "--steps 2")["model"]
    same = run(tmp_path / "same", "--steps 2 --workers 2")["model"]
    torch.testing.assert_close(one, same, rtol=1e-5, atol=1e-5)  # fewer threads round otherwise
    assert moved(one, run(tmp_path / "other", "--steps 2 --seed 1")["model"]) >= {"clip", "group"}


@pytest.mark.parametrize(
    "flags",
    ["--eval-every 3", "--method groupvit", SLOW("--accumulate 2"), SLOW("--method pacl")],
)
def test_two_processes_do_what_one_does(tmp_path, flags):
    recipe = SMALL_SEGCLIP
    if "pacl" in flags:
        run(tmp_path / "clip", "--method clip --steps 0", SMALL_CLIP)
        recipe = f"{SMALL_CLIP} --method pacl --init {tmp_path}/clip/checkpoint.pt"
    tolerance = 2e-5
    if "groupvit" in flags:  # Adam enlarges what rounds: biases before a norm have no gradient
        recipe = SMALL_GROUPVIT
        tolerance = 2e-4
    recipe = f"{recipe} --steps 3 --log-every 1"
    process = launch(tmp_path / "two", flags, processes=2, recipe=recipe)
    one = run(tmp_path / "one", recipe=recipe)["model"]
    assert ("mIoU" in finish(process)) == ("eval" in flags)
    two = read_weights(tmp_path / "two/checkpoint.pt")["model"]
    torch.testing.assert_close(two, one, rtol=1e-5, atol=tolerance)
    for name in ("loss", "con", "grad"):
        expected = pytest.approx(logged(tmp_path / "one", name), rel=1e-4)
        assert logged(tmp_path / "two", name) == expected, name


@pytest.fixture
def inputs(batch):
    """Of compute_gradients: image, superpatch, text; and the noise."""
    image, text, noise = batch
    superpatch = torch.randint(0, 3, (8, 16), generator=torch.Generator().manual_seed(1))
    return (image, superpatch, text), noise


def gradients(parallel, batch, noise, weights=(1.0, 1.0), chunks=1):
    """-> {loss: value}, {parameter: gradient}."""
    parallel.zero_grad()
    world = dist.get_world_size() if dist.is_initialized() else 1
    scaler = torch.amp.GradScaler("cpu", 1.0)
    extra = torch.tensor([5.0, 7.0])
    values, names = train.compute_gradients(
        parallel.train(), batch, noise, weights, "fp32", scaler, extra, chunks
    )
    assert values[len(names) :].tolist() == [5 * world, 7 * world]
    named = getattr(parallel, "module", parallel).named_parameters()
    found = {name: p.grad.clone() for name, p in named if p.grad is not None}
    return dict(zip(names, values.tolist())), found


def assert_same_gradients(actual, expected):
    """To 1e-5 of the largest of each parameter."""
    assert actual[0] == pytest.approx(expected[0], rel=1e-5)
    assert actual[1].keys() == expected[1].keys() and "clip.logit_scale" in actual[1]
    for name, gradient in expected[1].items():
        difference = (gradient - actual[1][name]).abs().max()
        assert difference <= 1e-5 * gradient.abs().max() + 1e-7, name


@pytest.mark.parametrize("chunks, checkpointed", [(2, False), (8, False), (1, True), (4, True)])
def test_saving_memory_changes_no_gradient(tiny, inputs, chunks, checkpointed):
    """With all three losses, and negatives from the whole batch."""
    expected = gradients(tiny, *inputs, weights=(0.7, 3.0))
    if checkpointed:
        train.checkpoint_activations(tiny)
    assert_same_gradients(gradients(tiny, *inputs, (0.7, 3.0), chunks), expected)


def test_two_processes_give_the_gradients_of_one(tmp_path, tiny, inputs):
    torch.save(inputs, tmp_path / "inputs.pt")
    finish(launch(tmp_path, processes=2, program=(__file__, "gradients", str(tmp_path))))
    expected = gradients(tiny, *inputs)
    for chunks in (1, 2):
        two = torch.load(tmp_path / f"gradients{chunks}.pt", weights_only=True)
        assert_same_gradients(two, expected)


def save_gradients(folder):
    """On each of two processes: the gradients of the whole batch, from its half of the rows."""
    train.evaluate.start_processes("cpu")
    rank = dist.get_rank()
    batch, noise = torch.load(f"{folder}/inputs.pt", weights_only=True)
    batch = [x.chunk(2)[rank] for x in batch]
    noise = {name: x.chunk(2)[rank] for name, x in noise.items()}
    for chunks in (1, 2):
        torch.manual_seed(0)
        parallel = DistributedDataParallel(SegCLIP(TINY))
        result = gradients(parallel, batch, noise, chunks=chunks)
        if rank == 0:
            torch.save(result, f"{folder}/gradients{chunks}.pt")


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", ["", "--accumulate 2", "--checkpoint-activations", "--precision bf16"]
)
def test_a_compiled_run_follows_the_plain_one(tmp_path, flags):
    flags = f"--steps 4 --log-every 1 {flags}"
    run(tmp_path / "plain", flags)
    run(tmp_path / "compiled", f"{flags} --compile --eval-every 2")
    tolerance = 0.02 if "bf16" in flags else 1e-4
    expected = pytest.approx(logged(tmp_path / "plain", "loss"), rel=tolerance)
    assert logged(tmp_path / "compiled", "loss") == expected


# fp16 skips steps until its scale is right.
@pytest.mark.parametrize("precision, tolerance", [("bf16", 0.03), SLOW("fp16", 0.2)])
def test_precisions_follow_fp32(tmp_path, precision, tolerance):
    flags = "--steps 12 --log-every 12"
    run(tmp_path / "fp32", flags)
    state = run(tmp_path / precision, f"{flags} --precision {precision}")
    for name in ("con", "rec"):
        exact = logged(tmp_path / "fp32", name)[-1]
        assert logged(tmp_path / precision, name)[-1] == pytest.approx(exact, rel=tolerance), name
    assert (state["scaler"]["scale"] > 1) == (precision == "fp16")


# --------------------------------------------------------------------------------------------------
# Trouble in training, and flags


def train_with_trouble(kind, flags):
    """In the second process, the losses of steps 3 and 4 are infinite, or it fails."""
    total_loss = train.total_loss
    step = itertools.count(1)

    def troubled(*args, **options):
        loss, parts = total_loss(*args, **options)
        if next(step) in (3, 4) and os.environ["RANK"] == "1":
            if kind == "failure":
                raise OSError("the disk is gone")
            loss = loss + float("inf")
            parts["con"] = loss
        return loss, parts

    train.total_loss = troubled
    train.main(flags)


@pytest.mark.parametrize("kind", ["infinity", SLOW("failure")])
def test_trouble_on_one_process(tmp_path, kind):
    """An infinite loss skips the step on all processes; a failure ends all, with its message."""
    program = (__file__, "trouble", kind)
    process = launch(tmp_path, "--steps 8 --log-every 1", processes=2, program=program)
    if kind == "failure":
        _, err = process.communicate(timeout=300)
        assert process.returncode != 0 and "the disk is gone" in err
        return
    finish(process)
    assert logged(tmp_path, "step") == [1, 2, 5, 6, 7, 8]
    assert read_weights(tmp_path / "checkpoint.pt")["optimizer"]["state"][0]["step"] == 6


def test_gradients_that_are_not_finite_change_nothing(tmp_path, monkeypatch):
    start = run(tmp_path / "start", "--steps 0")["model"]
    monkeypatch.setattr(train, "normalise", lambda image: image.float() / 0)
    assert_equal(run(tmp_path / "end", "--steps 9")["model"], start)
    with pytest.raises(InputError, match="10 gradients in a row are not finite"):
        run(tmp_path / "ten", "--steps 11 --save-every 4")
    assert_equal(read_weights(tmp_path / "ten/checkpoint.pt")["model"], start)


def damage(folder, numbers):
    """Damages images of the first shard."""
    path = folder / "00000.tar"
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        for i in numbers:
            offset = tar.getmember(f"{i:09}.jpg").offset_data
            content[offset : offset + 7] = b"no JPEG"
    path.write_bytes(content)


def test_errors_are_counted_and_named(tmp_path, shards, capsys):
    damage(tmp_path, range(4))
    saved = run(tmp_path / "run", f"--data {shards} --steps 15 --log-every 5")
    out, err = capsys.readouterr()
    assert saved["errors"] == 4 and "unusable pairs: 4" in out
    assert err.count("broken image: ") == 4 and "00000.tar/00000000" in err
    assert logged(tmp_path / "run", "errors")[-1] == 4


def test_too_many_errors_stop_the_run_and_keep_it(tmp_path, shards):
    damage(tmp_path, range(20))
    flags = f"--data {shards} --steps 45"
    with pytest.raises(InputError, match="unusable pairs by step .*: 1.; .* --max-errors"):
        run(tmp_path / "run", flags)
    assert 0 < read_weights(tmp_path / "run/checkpoint.pt")["step"] < 45
    assert run(tmp_path / "run", f"{flags} --resume --max-errors 0.1")["step"] == 45


def test_learning_rate_by_hand():
    rates = [train.lr_factor(step, 110, 0.0909) for step in range(110)]  # 10 up, 100 down
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1
    assert rates[60] == pytest.approx(0.5) and rates[35] == pytest.approx(0.5 + 0.5**1.5)
    assert 0 < rates[109] < 0.0005


def test_everything_but_biases_decays(tiny):
    biases, others = train.parameter_groups(tiny, 1e-3, weight_decay=0.3)
    assert others["weight_decay"] == 0.3 and biases["weight_decay"] == 0
    trained = {name: id(p) for name, p in tiny.named_parameters() if p.requires_grad}
    expected = {i for name, i in trained.items() if name.endswith("bias")}
    assert {id(p) for p in biases["params"]} == expected
    assert {id(p) for p in others["params"]} == set(trained.values()) - expected


def test_weights_of_the_losses(tmp_path):
    run(tmp_path / "all", "--steps 1 --superpixel-weight 5 --reconstruction-weight 0.25")
    con, rec, sup = (logged(tmp_path / "all", name)[0] for name in ("con", "rec", "sup"))
    expected = con + 0.25 * rec + 5 * sup
    assert logged(tmp_path / "all", "loss")[0] == pytest.approx(expected, rel=1e-5)
    start = run(tmp_path / "start", "--steps 0")["model"]
    end = run(tmp_path / "end", "--steps 2 --reconstruction-weight 0")["model"]
    assert moved(start, end) == {"clip", "group"}
    assert "rec" not in (tmp_path / "end/log.jsonl").read_text()


def test_every_flag_is_read(tmp_path, monkeypatch):
    flags = SMALL_SEGCLIP.replace("--steps 6", "--epochs 0.01") + " --eval-every 1"
    args, read = recorder(train.parse_args([*flags.split(), "--output", str(tmp_path)]))
    monkeypatch.setattr(train, "parse_args", lambda argv: args)
    monkeypatch.setattr(SyntheticScenes, "__len__", lambda self: 30)
    train.main()
    assert set(vars(args)) - read == {"from_scratch"}  # it decides the defaults of others


@pytest.mark.parametrize(
    "flags, word",
    [
        ("--image-size 30", "patch_size"),
        ("--batch-size 0", "batch-size"),
        ("--activation relu", "relu"),
        ("--seed -1", "seed"),
        ("--output /dev/null", "/dev/null"),
        ("--text-length 99", "text-length"),
        ("--accumulate 3", "3 chunks"),
        ("--epochs 1", "--steps or --epochs"),
        ("--method clip", "--method clip has no --first-stage-layers"),
        ("--image-encoder dino.pth", "--method segclip has no --image-encoder"),
        ("--stages 1", "--method segclip has no --stages"),
        ("--method groupvit", "--method groupvit has no --cross-layers"),
        ("--data nowhere.tar", "nowhere.tar"),
        ("--init nowhere.pt", "nowhere.pt"),
        ("--nouns /dev/null", "/dev/null: no noun"),
        ("--nouns synthetic --data pairs.tsv", "--nouns synthetic"),
        ("--eval-every 1 --eval-dataset nothing", "--eval-dataset"),
        ("--eval-every 1 --eval-dataset pascal_voc", "--eval-root"),
        ("--eval-every 1 --eval-dataset pascal_voc --eval-root nowhere", "nowhere"),
    ],
)
def test_flags_that_make_no_sense(tmp_path, flags, word):
    with pytest.raises((InputError, OSError)) as error:
        run(tmp_path, flags)
    assert word in str(error.value) and "\n" not in str(error.value)


# --------------------------------------------------------------------------------------------------
# The paper's recipe


@pytest.fixture
def clip_file(tmp_path):
    """A tiny CLIP in clip.pt, and a vocabulary of its 600 tokens."""
    torch.manual_seed(1)
    clip = CLIP(TINY)
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    merges = [f"{x} {y}" for x in letters for y in letters][:86]
    content = "\n".join(["a header", *merges]).encode()
    (tmp_path / "vocabulary.gz").write_bytes(gzip.compress(content))
    return clip


def paper(output, flags=""):
    recipe = f"--recipe paper --data synthetic {CPU} --epochs 0.002084 --log-every 1"
    sizes = "--first-stage-layers 2 --num-centers 4 --cross-layers 1 --decoder-layers 1"
    files = f"--init {output.parent}/clip.pt --vocabulary {output.parent}/vocabulary.gz"
    return run(output, f"{sizes} {files} --text-length 10 {flags}", recipe)


def test_the_papers_recipe_starts_from_clip(tmp_path, clip_file, capsys):
    start = paper(tmp_path / "start", "--epochs 0")
    weights = {f"clip.{name}": values for name, values in clip_file.state_dict().items()}
    assert_equal(of_clip(start["model"]), weights)
    assert start["config"]["num_centers"] == 4 and start["config"]["image_size"] == 32
    end = paper(tmp_path / "end")
    assert end["step"] == 7  # 50 pairs in batches of 8
    distance = {}
    for name, values in end["model"].items():
        distance[name] = (values - start["model"][name]).abs().max()
    names = "conv1.weight class_embedding positional_embedding ln_pre.weight ln_pre.bias".split()
    frozen = {f"clip.visual.{name}" for name in names}
    frozen |= {"clip.positional_embedding", "clip.token_embedding.weight"}
    assert {name for name in distance if distance[name] == 0} == frozen
    late = ("clip.visual.transformer.resblocks.2.", "clip.visual.ln_post.", "clip.visual.proj")
    slow = {name for name in weights if not name.startswith(late)} - frozen
    assert {name for name in distance if 0 < distance[name] < 5e-5} == slow
    out = capsys.readouterr().out
    assert "lr 4.0e-06" in out and "lr 4.0e-03" in out and "frozen" in out
    os.remove(tmp_path / "clip.pt")  # the weights to start from are not needed any more
    assert_equal(paper(tmp_path / "end", "--resume")["model"], end["model"])


def test_the_papers_values():
    args = train.parse_args(["--recipe", "paper", "--data", "synthetic"])
    assert (args.init, args.freeze, args.vocabulary) == ("ViT-B/16", True, "openai")
    assert (args.epochs, args.steps, args.batch_size) == (10, None, 768)
    assert (args.lr, args.clip_lr, args.weight_decay) == (4e-3, 4e-6, 0.05)
    assert (args.text_length, args.crop_scale, args.superpatch) == (32, 0.5, "floor")
    assert (args.reconstruction_weight, args.superpixel_weight) == (1, 1)
    sizes = train.choose_sizes("paper", "segclip", {})
    assert sizes.first_stage_layers == 10
    added = {name: getattr(sizes, name) for name in train.ADDED}
    assert list(added.values()) == [8, 2, 0.02, 1.0, 0.02, 0.9, 0.75, 3, 8], added
    flags = "--recipe paper --data synthetic --from-scratch --lr 1e-3 --steps 5"
    args = train.parse_args(flags.split())
    assert (args.init, args.freeze, args.clip_lr, args.lr) == (None, False, None, 1e-3)
    assert (args.steps, args.epochs) == (5, None)


def test_the_data_choose_the_defaults():
    def chosen(flags):
        args = train.parse_args(flags.split())
        return args.crop_scale, args.mirror, args.nouns, args.output

    assert chosen("") == chosen("--data synthetic") == (1, False, None, "runs/synthetic")
    assert chosen("--data pairs.tsv") == (0.2, True, None, "runs/own")
    assert chosen("--data synthetic pairs.tsv") == (0.2, True, None, "runs/own")
    flags = "--data pairs.tsv --crop-scale 0.7 --no-mirror --output here"
    assert chosen(flags) == (0.7, False, None, "here")
    assert chosen("--recipe paper --data pairs.tsv") == (0.5, False, None, "runs/paper")
    args = train.parse_args("--method pacl --data pairs.tsv".split())
    assert (args.init, args.nouns) == ("runs/own-clip/checkpoint.pt", None)
    assert train.parse_args("--method clip --data pairs.tsv".split()).output == "runs/own-clip"


def test_the_vocabulary_has_the_words_of_all_sources():
    sources = [SCENES, SimpleNamespace(captions=lambda: ["zebra"] * 600 + ["quagga"] * 9)]
    tokenizer = train.learn_vocabulary(sources)
    assert {len(tokenizer.pieces(word)) for word in ("zebra", "quagga", *SCENES.words)} == {1}


@pytest.mark.parametrize(
    "flags, short_side",  # of a model of 32 pixels
    [("", 32), ("--data {own}", 107), ("--data {own} --crop-scale 0.5", 54), ("paper", 32)],
)
def test_the_crops_of_training_decide_the_inference_resolution(
    tmp_path, clip_file, flags, short_side, capsys
):
    folder = tmp_path / "run"
    if flags == "paper":
        paper(folder, "--epochs 0")
    else:
        run(folder, f"--steps 0 {flags.format(own=write_list(tmp_path))}")
    assert f"inference resolution: short side {short_side}\n" in capsys.readouterr().out
    files = f"--vocabulary {tmp_path}/vocabulary.gz"
    evaluates(folder / "checkpoint.pt", files)
    assert f"inference resolution: short side {short_side}," in capsys.readouterr().err
    used = json.loads((folder / "metrics.json").read_text())["protocol"]
    assert (used["short_side"], used["window"], used["stride"]) == (short_side, 32, 32)


def test_sizes_that_are_not_those_of_the_weights(tmp_path, clip_file):
    with pytest.raises(InputError, match="--patch-size 16: .*clip.pt has 8"):
        paper(tmp_path / "run", "--patch-size 16")
    with pytest.raises(InputError, match="first_stage_layers"):
        paper(tmp_path / "run", "--first-stage-layers 7")


# --------------------------------------------------------------------------------------------------
# Other methods and starts


def evaluates(checkpoint, flags=""):
    """Labels three scenes with a checkpoint."""
    flags = f"--checkpoint {checkpoint} --limit 3 --workers 0 --device cpu {flags}"
    train.evaluate.main(flags.split())
    return (checkpoint.parent / "metrics.json").exists()


def back(folder):
    """Makes the checkpoint before the last one the last."""
    os.replace(folder / "checkpoint.1.pt", folder / "checkpoint.pt")


def test_the_baseline_trains_scores_and_is_a_start(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "superpixels", None)  # it needs none
    flags = "--method clip --steps 40 --batch-size 16 --save-every 20"
    whole = run(tmp_path / "clip", flags, SMALL_CLIP)
    assert of_clip(whole["model"]) == whole["model"]
    losses = logged(tmp_path / "clip", "con")
    assert losses[-1] < losses[0] and losses == logged(tmp_path / "clip", "loss")
    back(tmp_path / "clip")
    again = run(tmp_path / "clip", f"{flags} --resume", SMALL_CLIP)
    assert_equal(again["model"], whole["model"])
    assert again["config"] == whole["config"]
    assert evaluates(tmp_path / "clip/checkpoint.pt")
    monkeypatch.undo()
    start = run(tmp_path / "segclip", f"--init {tmp_path}/clip/checkpoint.pt --steps 0")
    assert_equal(of_clip(start["model"]), whole["model"])
    assert start["config"]["num_centers"] == 6 and start["merges"] == whole["merges"]


@pytest.mark.parametrize("encoder", ["", "--image-encoder dino.pth"])
def test_pacl_trains_the_embedder_of_a_frozen_clip(tmp_path, monkeypatch, dino_state, encoder):
    monkeypatch.chdir(tmp_path)
    torch.save(dino_state, "dino.pth")
    flags = f"{CPU} --method pacl --steps 6 --save-every 3 {encoder}".split()
    with pytest.raises(InputError, match="run `python train.py --method clip`"):
        train.main(flags)
    train.main(f"{CPU} --method clip --steps 3".split())
    train.main(flags)
    clip = read_weights("runs/clip/checkpoint.pt")["model"]
    end = read_weights("runs/pacl/checkpoint.pt")["model"]
    assert moved(read_weights("runs/pacl/checkpoint.1.pt")["model"], end) == {"embedder"}
    assert_equal(of_clip(end), clip)
    assert any(name.startswith("dino.") for name in end) == bool(encoder)
    back(Path("runs/pacl"))
    os.rename("runs/clip", "elsewhere")  # the checkpoint of a PACL has its encoders
    os.remove("dino.pth")
    train.main([*flags, "--resume"])
    assert_equal(read_weights("runs/pacl/checkpoint.pt")["model"], end)
    assert evaluates(Path("runs/pacl/checkpoint.pt"), "--stride-trick 4 --refine pamr")
    flags += ["--image-encoder", "other.pth"]
    with pytest.raises(InputError, match="was trained with --image-encoder"):
        train.main([*flags, "--resume"])
    with pytest.raises(InputError, match="other.pth: no such file"):
        train.main([*flags, "--init", "elsewhere/checkpoint.pt"])


@pytest.mark.parametrize("flags", ["--stages 1", "--stages 2 --nouns none"])
def test_groupvit_trains_is_resumed_and_scores(tmp_path, monkeypatch, flags):
    monkeypatch.setattr(data, "superpixels", None)  # it needs none
    flags = f"{flags} --steps 40 --batch-size 16 --save-every 20"
    whole = run(tmp_path / "run", flags, SMALL_GROUPVIT)
    losses = logged(tmp_path / "run", "con")
    assert losses[-1] < losses[0]
    prompts = "none" not in flags
    assert ("label" in (tmp_path / "run/log.jsonl").read_text()) == prompts
    start = run(tmp_path / "start", f"{flags} --steps 0", SMALL_GROUPVIT)["model"]
    assert ("multi_label_logit_scale" in moved(start, whole["model"])) == prompts
    assert whole["model"]["clip.visual.proj.1.num_batches_tracked"] == 40
    back(tmp_path / "run")
    again = run(tmp_path / "run", f"{flags} --resume", SMALL_GROUPVIT)
    assert_equal(again["model"], whole["model"])
    assert_equal(again["optimizer"]["state"], whole["optimizer"]["state"])
    assert evaluates(tmp_path / "run/checkpoint.pt", "--protocol groupvit")
    with pytest.raises(InputError, match="BatchNorm"):
        run(tmp_path / "chunks", "--accumulate 2", SMALL_GROUPVIT)


def test_the_values_of_groupvits_authors():
    flags = "--recipe paper --method groupvit --data synthetic --nouns nouns.txt"
    args = train.parse_args(flags.split())
    assert (args.init, args.freeze, args.text_length) == (None, False, None)
    assert (args.epochs, args.batch_size, args.lr, args.weight_decay) == (30, 4096, 1.6e-3, 0.05)
    config = train.choose_sizes("paper", "groupvit", {})
    for stages, parameters in {1: 52_144_202, 2: 55_726_610}.items():  # two stages: NVlabs' model
        with torch.device("meta"):
            model = GroupViT(dataclasses.replace(config, stages=stages))
        assert sum(p.numel() for p in model.parameters()) == parameters


def test_a_run_can_start_from_a_segclip(tmp_path):
    first = run(tmp_path / "first")
    flags = f"--init {tmp_path}/first/checkpoint.pt --steps 0 --gumbel-tau 0.5"
    second = run(tmp_path / "second", flags)
    assert_equal(first["model"], second["model"])
    assert second["merges"] == first["merges"] and second["config"]["gumbel_tau"] == 0.5


def test_scenes_that_are_prepared_once_change_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(SyntheticScenes, "__len__", lambda self: 30)
    once = run(tmp_path / "once", "--workers 1 --save-every 3")["model"]
    assert "preparing 30 scenes" in capsys.readouterr().out
    back(tmp_path / "once")
    assert_equal(run(tmp_path / "once", "--save-every 3 --resume")["model"], once)
    capsys.readouterr()
    monkeypatch.setattr(train, "SyntheticScenes", type(None))  # so they are taken for files
    assert_equal(run(tmp_path / "anew")["model"], once)
    assert "preparing" not in capsys.readouterr().out


def test_the_best_model_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(SyntheticScenes, "__len__", lambda self: 30)
    plain = run(tmp_path / "plain", "--steps 8")["model"]
    evaluate = train.evaluate.evaluate
    scores = iter([0.1, 0.2, 0.4, 0.3])

    def scored(*args, **options):
        return evaluate(*args, **options) | {"mIoU": next(scores)}

    monkeypatch.setattr(train.evaluate, "evaluate", scored)
    end = run(tmp_path / "run", "--steps 8 --eval-every 2 --save-every 2")["model"]
    best = read_weights(tmp_path / "run/best.pt")
    assert best["step"] == 6 and best["metrics"]["mIoU"] == 0.4
    assert_equal(best["model"], read_weights(tmp_path / "run/checkpoint.1.pt")["model"])
    load_model(tmp_path / "run/best.pt")
    assert_equal(plain, end)  # evaluation does not change the training
    with pytest.raises(StopIteration):  # no fifth score: a failed evaluation loses no step
        run(tmp_path / "failed", "--steps 2 --eval-every 2")
    assert read_weights(tmp_path / "failed/checkpoint.pt")["step"] == 2


@pytest.mark.slow
def test_a_batch_of_photographs_is_learned_by_heart(tmp_path):
    """16 photographs with captions: the contrastive loss goes from ln 16 to under 0.1."""
    folder = Path(skimage.data.__file__).parent
    names = "astronaut chelsea coffee rocket retina horse brick grass moon camera coins page text"
    rows = [(next(folder.glob(f"{name}.*")), f"a {name}") for name in names.split()]
    voc = sorted((GOLDEN / "pipeline/voc_like/JPEGImages").glob("*.jpg"))[:3]
    rows += [(path, f"a photo of {path.stem}") for path in voc]
    (tmp_path / "pairs.tsv").write_text("".join(f"{path}\t{text}\n" for path, text in rows))
    flags = "--batch-size 16 --steps 120 --crop-scale 0.5 --workers 2"
    run(tmp_path / "run", f"--data {tmp_path}/pairs.tsv {flags}")
    losses = logged(tmp_path / "run", "con")
    assert losses[0] > 2.3 and losses[-1] < 0.1


if __name__ == "__main__":  # in each process that a test above has started
    job, value, *flags = sys.argv[1:]
    jobs = {
        "gradients": lambda: save_gradients(value),
        "trouble": lambda: train_with_trouble(value, flags),
    }
    train.evaluate.run_program(jobs[job], "interrupted")
