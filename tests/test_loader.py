"""Tokenizer, archives, checkpoints; and files that are not what they should be."""

import dataclasses
import gzip
import os
import pickle

import pytest
import torch

import clip_loader
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
from conftest import TINY, assert_one_line, rebuild_weights
from model import CLIP, PACL, DenseCLIP, InputError


def assert_same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def assert_refused(load, path, *parts):
    """One line that names the file and these."""
    with pytest.raises(InputError) as error:
        load(path)
    assert_one_line(error, path, *parts)
    return str(error.value)


def test_a_learned_vocabulary_joins_the_frequent_words():
    tokenizer = Tokenizer.learn(["a red ball", "a red red star", "one ball"], num_merges=100)
    assert [len(tokenizer.encode(word)) for word in ("red", "ball", "star", "a")] == [1, 1, 1, 1]
    assert tokenizer.encode("Red  BALL") == tokenizer.encode("red ball")
    assert len(tokenizer.encode("xyz")) == 3  # never seen: its bytes
    assert len(tokenizer.encode("ü")) == 2
    again = Tokenizer(tokenizer.merges)
    assert again.encode("a red starball") == tokenizer.encode("a red starball")


def test_merges_are_applied_in_the_order_of_the_list():
    first = Tokenizer(["a b</w>", "c a"])
    then = Tokenizer(["c a", "a b</w>"])
    assert len(first.encode("cab")) == len(then.encode("cab")) == 2
    assert first.encode("cab") != then.encode("cab")


def test_texts_begin_with_start_and_always_end_with_end():
    tokenizer = Tokenizer()
    ids = tokenizer(["ab", "", "a longer text than fits"], context_length=6)
    assert ids.shape == (3, 6) and ids.dtype == torch.long
    assert ids[0].tolist() == [tokenizer.start, *tokenizer.encode("ab"), tokenizer.end, 0, 0]
    assert ids[1].tolist() == [tokenizer.start, tokenizer.end, 0, 0, 0, 0]
    assert ids[2, -1] == tokenizer.end
    assert tokenizer("ab").shape == (1, 77)


def test_a_vocabulary_file_of_the_same_format(tmp_path):
    path = tmp_path / "vocabulary.txt.gz"
    path.write_bytes(gzip.compress("a header\nc a\nca t</w>".encode()))
    assert len(Tokenizer.from_file(path).encode("cat")) == 1
    path.write_bytes(b"not gzip")
    assert_refused(Tokenizer.from_file, path, "--vocabulary", "https://")
    assert_refused(Tokenizer.from_file, tmp_path / "none")


@pytest.fixture
def download(tmp_path, monkeypatch):
    """A file to fetch, and where it is cached."""
    source = tmp_path / "source.bin"
    source.write_bytes(b"x" * 300_000)
    monkeypatch.setenv("CLIP_CACHE", str(tmp_path / "cache"))
    entry = (clip_loader.sha256_of(source), "file.bin", source.as_uri())
    for name in ("thing", clip_loader.VOCABULARY):
        monkeypatch.setitem(clip_loader.DOWNLOADS, name, entry)
    return source, tmp_path / "cache" / "file.bin"


def test_fetch_downloads_once_and_checks_every_time(download, capsys):
    source, cached = download
    content = source.read_bytes()
    assert clip_loader.fetch("thing") == cached
    source.unlink()
    assert clip_loader.fetch("thing") == cached
    assert cached.read_bytes() == content
    cached.write_bytes(b"damaged")
    source.write_bytes(content)
    assert clip_loader.fetch("thing").read_bytes() == content
    assert "wrong SHA-256" in capsys.readouterr().err


def test_what_cannot_be_downloaded(download):
    source, cached = download
    source.write_bytes(b"something else")
    assert_refused(lambda _: clip_loader.fetch("thing"), cached, source.as_uri(), "hash")
    assert list(cached.parent.iterdir()) == []
    source.unlink()
    parts = (source.as_uri(), "by hand", "--vocabulary FILE")
    assert_refused(lambda _: load_tokenizer(), cached, *parts)


def openai_state(clip):
    """With three sizes, as in OpenAI's archives."""
    config = clip.config
    sizes = {"input_resolution": config.image_size, "context_length": config.context_length}
    sizes["vocab_size"] = config.vocab_size
    return clip.state_dict() | {name: torch.tensor(size) for name, size in sizes.items()}


def assert_same_sizes(config):
    """TINY's, in all that a CLIP has."""
    added = ("first_stage_layers", "num_centers", "cross_layers", "decoder_layers")
    assert dataclasses.replace(config, **{name: getattr(TINY, name) for name in added}) == TINY


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_openai_archive_torchscript_in_half_precision(tiny_clip, tmp_path):
    """As OpenAI's: a TorchScript archive, fp16, with three sizes among its buffers. -> fp32."""
    for name, value in openai_state(tiny_clip).items():
        if name not in tiny_clip.state_dict():
            tiny_clip.register_buffer(name, value)
    image = torch.zeros(2, 3, 32, 32).half()
    script = torch.jit.trace(tiny_clip.half(), (image, torch.zeros(2, 12, dtype=torch.long)))
    script.save(tmp_path / "clip.pt")
    clip = load_clip(tmp_path / "clip.pt")
    assert_same_sizes(clip.config)
    for name, tensor in clip.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, script.state_dict()[name].float())


def test_model_by_name(tiny_clip, tmp_path, monkeypatch):
    path = tmp_path / "ViT-B-16.pt"
    torch.save(openai_state(tiny_clip), path, _use_new_zipfile_serialization=False)
    monkeypatch.setattr(clip_loader, "fetch", {"ViT-B/16": path}.get)
    assert_same_weights(load_clip("ViT-B/16"), tiny_clip)
    assert_same_weights(load_segclip("ViT-B/16").clip, tiny_clip)


def test_our_checkpoint_is_itself_again(tiny, tmp_path):
    path = tmp_path / "new" / "checkpoint.pt"
    save_checkpoint(path, tiny, merges=["a b"])
    again = load_segclip(path)
    assert again.config == TINY
    assert_same_weights(again, tiny)
    assert load_tokenizer(path).merges == ["a b"]
    assert os.listdir(path.parent) == ["checkpoint.pt"]


def test_a_clip_to_start_from(tiny_clip, tmp_path, capsys):
    torch.save(openai_state(tiny_clip), tmp_path / "clip.pt")
    for source in (tiny_clip, tmp_path / "clip.pt"):
        assert_same_weights(load_segclip(source, "quick_gelu").clip, tiny_clip)
        report = capsys.readouterr().err
        assert report.count("\n") == 1
        assert all(part in report for part in ("group.", "reconstruction_layer.", "decoder."))


@pytest.mark.parametrize("layers, before", [(24, 22), (12, 10), (3, 1), (2, 0), (1, 0)])
def test_the_group_module_goes_before_the_last_two_blocks_of_any_clip(layers, before):
    clip = CLIP(dataclasses.replace(TINY, vision_layers=layers, first_stage_layers=0))
    model = load_segclip(clip)
    assert model.config.first_stage_layers == before
    assert len(model.reconstruction_blocks) == layers - before
    other = load_segclip(clip, first_stage_layers=layers)  # unless a flag says otherwise
    assert other.config.first_stage_layers == layers


def test_the_activation_that_no_shape_tells(tiny_clip, tmp_path, capsys):
    path = tmp_path / "laion.pt"
    torch.save(tiny_clip.state_dict(), path)
    assert load_clip(path).config.activation == "quick_gelu"
    note = capsys.readouterr().err
    assert str(path) in note and "--activation gelu" in note and note.count("\n") == 1
    clips = (load_clip(path, "gelu"), load_model(path, "clip", "gelu").clip)
    for clip in (*clips, load_segclip(path, "gelu").clip):
        assert clip.config.activation == "gelu"
        assert isinstance(clip.visual.transformer.resblocks[0].mlp.gelu, torch.nn.GELU)
    assert "--activation" not in capsys.readouterr().err
    torch.save(openai_state(tiny_clip), path)  # OpenAI's archives name their sizes
    load_clip(path)
    save_checkpoint(path, DenseCLIP(clips[0]))  # our own checkpoints hold their activation
    assert load_clip(path).config.activation == "gelu"
    assert capsys.readouterr().err == ""
    note = "was trained with --activation gelu"
    assert_refused(lambda path: load_model(path, activation="quick_gelu"), path, note)


def test_what_is_in_a_file_decides_how_it_is_read(tiny, tiny_clip, tmp_path):
    path = tmp_path / "file.pt"
    torch.save(openai_state(tiny_clip), path)
    for _ in ("OpenAI's", "ours"):
        dense = load_model(path)
        assert isinstance(dense, DenseCLIP)
        for clip in (dense.clip, load_clip(path), load_segclip(path).clip):
            assert_same_weights(clip, tiny_clip)
        save_checkpoint(path, dense)
    save_checkpoint(path, tiny)
    assert_same_weights(load_model(path), tiny)
    assert_refused(load_clip, path, "a SegCLIP, where a CLIP is needed")
    assert_refused(lambda path: load_model(path, "naclip"), path, "--readout naclip is for a CLIP")
    for save in (save_checkpoint, lambda path, model: torch.save(model.state_dict(), path)):
        save(path, PACL(tiny_clip))
        assert isinstance(load_model(path), PACL)
        assert_refused(load_clip, path, "a PACL, where a CLIP is needed")


def test_dino_as_published_as_a_teacher_and_in_a_pacl(tiny_clip, dino_state, tmp_path):
    path = tmp_path / "dino.pth"
    torch.save(dino_state, path)
    dino = load_dino(path)
    teacher = {f"module.backbone.{name}": tensor for name, tensor in dino_state.items()}
    torch.save({"teacher": teacher | {"head.mlp.0.weight": torch.zeros(1)}, "epoch": 3}, path)
    assert_same_weights(load_dino(path), dino)
    pacl = PACL(tiny_clip, dino).eval()
    save_checkpoint(path, pacl)
    again = load_model(path).eval()
    assert_same_weights(again, pacl)
    image = torch.randn(2, 3, 32, 32)
    assert torch.equal(again.encode_image(image).regions, pacl.encode_image(image).regions)


def test_dino_and_clip_in_each_others_place(tiny_clip, dino_state, tmp_path):
    path = tmp_path / "dino.pth"
    torch.save({"teacher": dino_state}, path)
    for load in (load_clip, load_model, load_segclip):
        assert_refused(load, path, "a DINO, where a CLIP is needed", "--image-encoder")
    torch.save(openai_state(tiny_clip), path)
    assert_refused(load_dino, path, "a CLIP, where a DINO is needed", "--init")


def test_a_file_that_is_no_dino(dino_state, tmp_path):
    path = tmp_path / "dino.pth"
    assert_refused(load_dino, path, "no such file", clip_loader.DINO_ADDRESS)
    faults = (
        {"fc.weight": torch.zeros(1)},
        {"teacher": 3},
        dino_state | {"patch_embed.proj.weight": torch.zeros(128, 3)},
        dino_state | {"pos_embed": 3},
    )
    for state in faults:
        torch.save(state, path)
        assert_refused(load_dino, path)
    state = dino_state | {"stranger": torch.zeros(1), "norm.bias": torch.zeros(7)}
    del state["cls_token"], state["blocks.1.attn.qkv.bias"]
    torch.save(state, path)
    missing = ("class_embedding", "transformer.resblocks.1.attn.in_proj_bias")
    assert_refused(load_dino, path, *missing, '"stranger"', "mismatch for ln_post.bias")


def test_the_authors_checkpoint_with_and_without_decoder(tmp_path, capsys):
    weights, recipe = rebuild_weights("authors_segclip_mini.json")
    weights["vis_mae_decoder.decoder_pos_embed"] = torch.zeros(1, 17, 64)  # fixed, in their file
    path = tmp_path / "segclip.bin"
    torch.save(weights, path)
    model = load_segclip(path)
    others = {"patch_scale": 10, "activation": "quick_gelu"}
    others |= {"center_std": 0.02, "key_gain": 1.0, "linear_std": 0.02, "decoder_heads": 8}
    assert dataclasses.asdict(model.config) == recipe["config"] | others
    assert capsys.readouterr().err == ""
    del weights["vis_mae_decoder.mask_token"]
    torch.save(weights, path)  # a part of it is not enough
    assert_refused(load_segclip, path, "Missing", "decoder.mask_token")
    torch.save({name: x for name, x in weights.items() if not name.startswith("vis_mae")}, path)
    assert_same_weights(load_segclip(path).group, model.group)
    report = capsys.readouterr().err
    assert report.count("\n") == 1 and "decoder.*" in report


def test_every_wrong_parameter_is_named(tiny_clip, tmp_path):
    state = openai_state(tiny_clip)
    del state["ln_final.bias"], state["visual.transformer.resblocks.1.ln_1.bias"]
    state |= {"stranger": torch.zeros(1), "visual.ln_pre.weight": torch.zeros(7)}
    torch.save(state, tmp_path / "clip.pt")
    missing = 'Missing key(s) in state_dict: "visual.transformer.resblocks.1.ln_1.bias", "ln_final.'
    wrong = ('Unexpected key(s) in state_dict: "stranger"', "visual.ln_pre.weight", "[7]", "[64]")
    assert_refused(load_clip, tmp_path / "clip.pt", missing, *wrong)


class Runs:
    """Unpickled by an unguarded reader, this would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


NOT_WEIGHTS = {
    "list": lambda state: [1, 2],
    "resnet": lambda state: {"visual.conv1.weight": torch.zeros(32, 3, 3, 3)},
    "other": lambda state: {"fc.weight": torch.zeros(1)},
    "width": lambda state: state | {"visual.conv1.weight": torch.zeros(100, 3, 8, 8)},
    "rank": lambda state: state | {"visual.conv1.weight": torch.zeros(100)},
    "no_tensor": lambda state: state | {"visual.proj": 3},
    "own_list": lambda state: {"config": {}, "model": [1]},
    "own_names": lambda state: {"config": {}, "model": {1: torch.zeros(1)}},
    "own_config": lambda state: {"config": [1], "model": state},
}


FILES = ("missing", "folder", "empty", "text", "zip", "pickle")


@pytest.mark.parametrize("kind", (*FILES, *NOT_WEIGHTS))
def test_a_file_that_is_no_checkpoint(kind, tiny_clip, tmp_path):
    path = tmp_path / "file.pt"
    if kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("Some text, which is not what it should be.")
    elif kind in ("zip", "pickle"):  # truncated
        torch.save(openai_state(tiny_clip), path, _use_new_zipfile_serialization=kind == "zip")
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind != "missing":
        torch.save(NOT_WEIGHTS[kind](openai_state(tiny_clip)), path)
    for load in (load_clip, load_segclip, load_model):
        assert "could run code" not in assert_refused(load, path)


def test_a_clip_whose_heads_are_not_openais_is_refused(tmp_path):
    config = dataclasses.replace(TINY, vision_width=1280, vision_layers=1, first_stage_layers=0)
    torch.save(CLIP(config).state_dict(), tmp_path / "vit_h.pt")
    assert_refused(load_model, tmp_path / "vit_h.pt", "width 1280", "heads")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("how", [pickle.dump, torch.save])
def test_a_checkpoint_that_would_run_code_is_refused(how, protocol, tmp_path):
    path, victim = tmp_path / "evil.pt", tmp_path / "victim"
    option = "protocol" if how is pickle.dump else "pickle_protocol"
    with open(path, "wb") as file:
        how({"model": Runs(victim)}, file, **{option: protocol})
    assert_refused(load_segclip, path, "could run code")
    assert not victim.exists()


class Scripted(torch.nn.Module):
    """Loaded with torch.jit.load, this would write a file."""

    def __init__(self, path):
        super().__init__()
        self.path, self.training = path, False

    @torch.jit.export
    def __getstate__(self):
        return self.path, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]):
        self.path, self.training = state[0], state[1]
        torch.save(torch.zeros(1), self.path)

    def forward(self, x):
        return x


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_code_in_a_torchscript_archive_never_runs(tmp_path):
    torch.jit.script(Scripted(str(tmp_path / "victim"))).save(tmp_path / "evil.pt")
    (tmp_path / "victim").unlink(missing_ok=True)
    assert_refused(load_clip, tmp_path / "evil.pt")
    assert not (tmp_path / "victim").exists()


def test_a_checkpoint_of_another_architecture(tiny, tmp_path):
    path = tmp_path / "a.pt"
    config = dataclasses.asdict(dataclasses.replace(TINY, num_centers=5))
    torch.save({"model": tiny.state_dict(), "config": config}, path)
    assert_refused(load_segclip, path, "group.centers", "[4, 64]", "[5, 64]")
    for field, value in {"colour": 1, "image_size": 100, "first_stage_layers": 9}.items():
        torch.save({"model": tiny.state_dict(), "config": config | {field: value}}, path)
        assert_refused(load_segclip, path, field)


def test_the_checkpoint_before_the_last_is_kept(tiny, tmp_path, capsys):
    path = tmp_path / "checkpoint.pt"
    older = tmp_path / "checkpoint.1.pt"
    assert last_checkpoint(path) == (None, None)
    for step in (1, 2, 3):
        save_checkpoint(path, tiny, rotate=True, step=step)
    assert read_weights(older)["step"] == 2
    content, source = last_checkpoint(path)
    assert content["step"] == 3 and source == path
    path.write_bytes(path.read_bytes()[:1000])
    assert last_checkpoint(path)[1] == older
    assert str(path) in capsys.readouterr().err
    save_checkpoint(path, tiny, rotate=True, step=4)  # which does not keep the damaged one
    assert sorted(os.listdir(tmp_path)) == [older.name, path.name]
    path.unlink()
    content, source = last_checkpoint(path)
    assert content["step"] == 2 and source == older
    for damaged in (older, path):
        damaged.write_bytes(b"")
        assert_refused(lambda _: last_checkpoint(path), older)


def test_a_failed_save_leaves_the_old_checkpoint(tiny, tmp_path, monkeypatch):
    def full(_, file):
        file.write(b"half")
        raise OSError("no space left")

    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, tiny, step=1)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError):
        save_checkpoint(path, tiny, rotate=True, step=2)
    assert read_weights(path)["step"] == 1
