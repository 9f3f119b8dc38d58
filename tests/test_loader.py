"""Tokenizer, archives, checkpoints; and files that are not what they should be."""

import dataclasses
import gzip
import hashlib
import pickle

import pytest
import torch

import clip_loader
from clip_loader import (
    InputError,
    Tokenizer,
    load_clip,
    load_dino,
    load_model,
    load_segclip,
    load_tokenizer,
    read_weights,
    save_checkpoint,
)
from conftest import TINY, assert_one_line, rebuild_weights
from model import CLIP, PACL, DenseCLIP, SegCLIP


def assert_same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer


def test_a_learned_vocabulary_joins_the_frequent_words():
    tokenizer = Tokenizer.learn(["a red ball", "a red red star", "one ball"], num_merges=100)
    assert [len(tokenizer.encode(word)) for word in ("red", "ball", "star", "a")] == [1, 1, 1, 1]
    assert tokenizer.encode("Red  BALL") == tokenizer.encode("red ball")
    assert len(tokenizer.encode("xyz")) == 3  # never seen: its bytes
    assert len(tokenizer.encode("ü")) == 2
    assert Tokenizer(tokenizer.merges).encode("a red starball") == tokenizer.encode("a red starball")


def test_merges_are_applied_in_the_order_of_the_list():
    first = Tokenizer(["a b</w>", "c a"])
    then = Tokenizer(["c a", "a b</w>"])
    assert len(first.encode("cab")) == len(then.encode("cab")) == 2
    assert first.encode("cab") != then.encode("cab")


def test_texts_begin_with_start_and_always_end_with_end():
    tokenizer = Tokenizer()
    ids = tokenizer(["ab", "", "a longer text than fits"], context_length=6)
    assert ids.shape == (3, 6) and ids.dtype == torch.long
    assert (ids[:, 0] == tokenizer.start).all()
    assert ids[0].tolist() == [tokenizer.start, *tokenizer.encode("ab"), tokenizer.end, 0, 0]
    assert ids[1].tolist() == [tokenizer.start, tokenizer.end, 0, 0, 0, 0]
    assert ids[2, -1] == tokenizer.end
    assert tokenizer("ab").shape == (1, 77)


def test_a_vocabulary_file_of_the_same_format(tmp_path):
    path = tmp_path / "vocabulary.txt.gz"
    path.write_bytes(gzip.compress("a header\nc a\nca t</w>".encode()))
    assert len(Tokenizer.from_file(path).encode("cat")) == 1
    path.write_bytes(b"not gzip")
    with pytest.raises(InputError) as error:
        Tokenizer.from_file(path)
    assert_one_line(error, path, "--vocabulary", "https://")
    with pytest.raises(InputError) as error:
        Tokenizer.from_file(tmp_path / "none")
    assert_one_line(error, tmp_path / "none")


# ---------------------------------------------------------------------------------------------------------------------
# The cache and the web


@pytest.fixture
def download(tmp_path, monkeypatch):
    """A file to fetch, at an address that this machine serves."""
    content = b"x" * 3_000_000
    source = tmp_path / "source.bin"
    source.write_bytes(content)
    monkeypatch.setenv("CLIP_CACHE", str(tmp_path / "cache"))
    entry = (hashlib.sha256(content).hexdigest(), "file.bin", source.as_uri())
    monkeypatch.setitem(clip_loader.DOWNLOADS, "thing", entry)
    return source, tmp_path / "cache" / "file.bin"


def test_fetch_downloads_once_and_checks_every_time(download, capsys):
    source, cached = download
    assert clip_loader.fetch("thing") == cached
    assert cached.read_bytes() == source.read_bytes()
    content = source.read_bytes()
    source.unlink()
    assert clip_loader.fetch("thing") == cached
    cached.write_bytes(b"damaged")
    source.write_bytes(content)
    assert clip_loader.fetch("thing").read_bytes() == content
    assert "wrong checksum" in capsys.readouterr().err


def test_a_wrong_download_is_not_kept(download):
    source, cached = download
    source.write_bytes(b"something else")
    with pytest.raises(InputError) as error:
        clip_loader.fetch("thing")
    assert_one_line(error, cached, source.as_uri(), "SHA-256")
    assert list(cached.parent.iterdir()) == []


def test_a_vocabulary_that_cannot_be_found(tmp_path, monkeypatch):
    monkeypatch.setenv("CLIP_CACHE", str(tmp_path / "cache"))
    sha256, file, _ = clip_loader.DOWNLOADS[clip_loader.VOCABULARY]
    address = (tmp_path / "nothing").as_uri()
    monkeypatch.setitem(clip_loader.DOWNLOADS, clip_loader.VOCABULARY, (sha256, file, address))
    with pytest.raises(InputError) as error:
        load_tokenizer()
    assert_one_line(error, tmp_path / "cache" / file, address, "--vocabulary FILE")


def test_the_default_cache_is_openais(monkeypatch):
    monkeypatch.delenv("CLIP_CACHE", raising=False)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert str(clip_loader.cache_dir()) == "/home/somebody/.cache/clip"


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints that can be read


def openai_state(clip, half=False):
    state = {name: tensor.half() if half else tensor for name, tensor in clip.state_dict().items()}
    sizes = {"input_resolution": clip.config.image_size, "context_length": clip.config.context_length}
    return state | {name: torch.tensor(n) for name, n in (sizes | {"vocab_size": clip.config.vocab_size}).items()}


def sizes(config):
    """The part of a Config that a CLIP has."""
    new = ("first_stage_layers", "num_centers", "cross_layers", "gumbel_tau", "mask_ratio", "decoder_layers", "center_std")
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in new}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_openai_archive_torchscript_in_half_precision(tiny_clip, tmp_path):
    """As OpenAI's: a TorchScript archive, fp16, with three sizes among its buffers. -> fp32."""
    for name, value in openai_state(tiny_clip).items():
        if name not in tiny_clip.state_dict():
            tiny_clip.register_buffer(name, value)
    script = torch.jit.trace(tiny_clip.half(), (torch.zeros(2, 3, 32, 32).half(), torch.zeros(2, 12, dtype=torch.long)))
    script.save(tmp_path / "clip.pt")
    clip = load_clip(tmp_path / "clip.pt")
    assert sizes(clip.config) == sizes(TINY)
    for name, tensor in clip.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, script.state_dict()[name].float())


@pytest.mark.parametrize("zipped", [True, False])
def test_plain_state_dict(tiny_clip, tmp_path, zipped):
    path = tmp_path / "clip.pt"
    torch.save(openai_state(tiny_clip), path, _use_new_zipfile_serialization=zipped)
    clip = load_clip(str(path))
    assert_same_weights(clip, tiny_clip)
    assert sizes(clip.config) == sizes(TINY)


def test_model_by_name(tiny_clip, tmp_path, monkeypatch):
    path = tmp_path / "ViT-B-16.pt"
    torch.save(openai_state(tiny_clip), path)
    entry = hashlib.sha256(path.read_bytes()).hexdigest(), path.name, "https://example.invalid/"
    monkeypatch.setitem(clip_loader.DOWNLOADS, "ViT-B/16", entry)
    monkeypatch.setenv("CLIP_CACHE", str(tmp_path))
    assert_same_weights(load_clip("ViT-B/16"), tiny_clip)
    assert_same_weights(load_segclip("ViT-B/16").clip, tiny_clip)


def test_our_checkpoint_is_itself_again(tiny, tmp_path):
    save_checkpoint(tmp_path / "new" / "checkpoint.pt", tiny, merges=["a b"])
    again = load_segclip(tmp_path / "new" / "checkpoint.pt")
    assert again.config == TINY
    assert_same_weights(again, tiny)
    assert load_tokenizer(tmp_path / "new" / "checkpoint.pt").merges == ["a b"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["checkpoint.pt"]


def test_a_clip_to_start_from(tiny_clip, tmp_path, capsys):
    torch.save(openai_state(tiny_clip), tmp_path / "clip.pt")
    for source in (tiny_clip, tmp_path / "clip.pt"):
        model = load_segclip(source, "quick_gelu")
        assert_same_weights(model.clip, tiny_clip)
        report = capsys.readouterr().err
        assert report.count("\n") == 1 and all(f"{part}." in report for part in ("group", "reconstruction_layer", "decoder"))
    assert model.config.first_stage_layers == TINY.vision_layers - 2


@pytest.mark.parametrize("layers, before", [(24, 22), (12, 10), (3, 1), (2, 0), (1, 0)])
def test_the_group_module_goes_before_the_last_two_blocks_of_any_clip(layers, before):
    clip = CLIP(dataclasses.replace(TINY, vision_layers=layers, first_stage_layers=0))
    model = load_segclip(clip)
    assert model.config.first_stage_layers == before
    assert len(model.reconstruction_blocks) == layers - before
    assert load_segclip(clip, first_stage_layers=layers).config.first_stage_layers == layers  # unless a flag says otherwise


def test_a_clip_of_another_activation_is_not_read_as_openais_in_silence(tiny_clip, tiny, tmp_path, capsys):
    path = tmp_path / "laion.pt"
    torch.save(tiny_clip.state_dict(), path)
    assert load_clip(path).config.activation == "quick_gelu"
    note = capsys.readouterr().err
    assert str(path) in note and "--activation gelu" in note and note.count("\n") == 1
    for load in (load_clip, lambda *args: load_model(args[0], "clip", args[1]), load_segclip):
        model = load(path, "gelu")
        assert model.config.activation == "gelu"
        clip = model if isinstance(model, CLIP) else model.clip
        assert isinstance(clip.visual.transformer.resblocks[0].mlp.gelu, torch.nn.GELU)
    assert "--activation" not in capsys.readouterr().err
    torch.save(openai_state(tiny_clip), path)  # OpenAI's archives name their sizes
    load_clip(path)
    assert capsys.readouterr().err == ""
    save_checkpoint(path, DenseCLIP(model.clip))  # our own checkpoints hold their activation
    assert load_clip(path).config.activation == "gelu" and capsys.readouterr().err == ""
    for given, kind in (("quick_gelu", DenseCLIP(model.clip)), ("gelu", tiny)):
        save_checkpoint(path, kind)
        with pytest.raises(InputError) as error:
            load_model(path, "clip", given)
        assert_one_line(error, path, "was trained with --activation")


def test_a_clip_whose_heads_are_not_openais_is_refused(tmp_path):
    config = dataclasses.replace(TINY, vision_width=1280, vision_layers=1, first_stage_layers=0)
    torch.save(CLIP(config).state_dict(), tmp_path / "vit_h.pt")
    for load in (load_clip, load_model, load_segclip):
        with pytest.raises(InputError) as error:
            load(tmp_path / "vit_h.pt")
        assert_one_line(error, tmp_path / "vit_h.pt", "width 1280", "heads")


def test_what_is_in_a_file_decides_how_it_is_read(tiny, tiny_clip, tmp_path):
    torch.save(openai_state(tiny_clip), tmp_path / "clip.pt")
    save_checkpoint(tmp_path / "dense.pt", DenseCLIP(tiny_clip))
    save_checkpoint(tmp_path / "segclip.pt", tiny)
    for name in ("clip.pt", "dense.pt"):
        dense = load_model(tmp_path / name)
        assert isinstance(dense, DenseCLIP)
        for clip in (dense.clip, load_clip(tmp_path / name), load_segclip(tmp_path / name).clip):
            assert_same_weights(clip, tiny_clip)
    assert_same_weights(load_model(tmp_path / "segclip.pt"), tiny)
    with pytest.raises(InputError) as error:
        load_clip(tmp_path / "segclip.pt")
    assert_one_line(error, tmp_path / "segclip.pt", "a SegCLIP")
    with pytest.raises(InputError) as error:
        load_model(tmp_path / "segclip.pt", "naclip")
    assert_one_line(error, tmp_path / "segclip.pt", "--readout naclip is for a CLIP")
    save_checkpoint(tmp_path / "pacl.pt", PACL(tiny_clip))
    assert isinstance(load_model(tmp_path / "pacl.pt"), PACL)
    with pytest.raises(InputError) as error:
        load_clip(tmp_path / "pacl.pt")
    assert_one_line(error, tmp_path / "pacl.pt", "a PACL, where a CLIP is needed")


def test_dino_as_published_as_a_teacher_and_in_a_pacl(tiny_clip, dino_state, tmp_path):
    torch.save(dino_state, tmp_path / "dino.pth")
    dino = load_dino(tmp_path / "dino.pth")
    teacher = {f"backbone.{name}": tensor for name, tensor in dino_state.items()} | {"head.mlp.0.weight": torch.zeros(1)}
    torch.save({"teacher": teacher, "epoch": 3}, tmp_path / "teacher.pth")
    assert_same_weights(load_dino(tmp_path / "teacher.pth"), dino)
    assert sum(tensor.numel() for tensor in dino.state_dict().values()) == sum(x.numel() for x in dino_state.values())
    pacl = PACL(tiny_clip, dino).eval()
    save_checkpoint(tmp_path / "pacl.pt", pacl)
    again = load_model(tmp_path / "pacl.pt").eval()
    assert_same_weights(again, pacl)
    image = torch.randn(2, 3, 32, 32)
    assert torch.equal(again.encode_image(image).regions, pacl.encode_image(image).regions)


def test_dino_and_clip_in_each_others_place(tiny, tiny_clip, dino_state, tmp_path):
    torch.save(dino_state, tmp_path / "dino.pth")
    torch.save({"teacher": dino_state}, tmp_path / "teacher.pth")
    for name in ("dino.pth", "teacher.pth"):
        for load in (load_clip, load_model, load_segclip):
            with pytest.raises(InputError) as error:
                load(tmp_path / name)
            assert_one_line(error, tmp_path / name, "a DINO, where a CLIP is needed", "--image-encoder")
    torch.save(openai_state(tiny_clip), tmp_path / "clip.pt")
    save_checkpoint(tmp_path / "segclip.pt", tiny)
    for name in ("clip.pt", "segclip.pt"):
        with pytest.raises(InputError) as error:
            load_dino(tmp_path / name)
        assert_one_line(error, tmp_path / name, "a CLIP, or made of one, where a DINO is needed", "--init")


def test_a_file_that_is_no_dino(dino_state, tmp_path):
    path = tmp_path / "dino.pth"
    with pytest.raises(InputError) as error:
        load_dino(path)
    assert_one_line(error, path, "no such file", clip_loader.DINO_ADDRESS)
    faults = {"patch_embed.proj.weight": torch.zeros(128, 3), "pos_embed": 3}
    for state in ({"fc.weight": torch.zeros(1)}, {"teacher": 3}, *(dino_state | {name: x} for name, x in faults.items())):
        torch.save(state, path)
        with pytest.raises(InputError) as error:
            load_dino(path)
        assert_one_line(error, path, "DINO")
    state = dino_state | {"stranger": torch.zeros(1), "norm.bias": torch.zeros(7)}
    del state["cls_token"], state["blocks.1.attn.qkv.bias"]
    torch.save(state, path)
    with pytest.raises(InputError) as error:
        load_dino(path)
    missing = ("missing class_embedding", "missing transformer.resblocks.1.attn.in_proj_bias")
    assert_one_line(error, path, *missing, "unexpected stranger", "ln_post.bias is [7], not [128]")


def test_the_authors_checkpoint_with_and_without_decoder(tmp_path, capsys):
    weights, recipe = rebuild_weights("authors_segclip_mini.json")
    weights["vis_mae_decoder.decoder_pos_embed"] = torch.zeros(1, 17, 64)  # fixed, and in their file
    path = tmp_path / "segclip.bin"
    torch.save(weights, path)
    model = load_segclip(path)
    expected = recipe["config"] | {"patch_scale": 10, "activation": "quick_gelu", "center_std": 0.02}
    assert dataclasses.asdict(model.config) == expected
    assert capsys.readouterr().err == ""
    torch.save({name: tensor for name, tensor in weights.items() if not name.startswith("vis_mae")}, path)
    assert_same_weights(load_segclip(path).group, model.group)
    report = capsys.readouterr().err
    assert report.count("\n") == 1 and "decoder.*" in report and str(path) in report


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints that cannot


def test_every_wrong_parameter_is_named(tiny_clip, tmp_path):
    state = openai_state(tiny_clip)
    del state["ln_final.bias"], state["visual.transformer.resblocks.1.ln_1.bias"]
    state["stranger"] = torch.zeros(1)
    state["visual.ln_pre.weight"] = torch.zeros(7)
    path = tmp_path / "clip.pt"
    torch.save(state, path)
    with pytest.raises(InputError) as error:
        load_clip(path)
    assert_one_line(
        error,
        path,
        "missing ln_final.bias",
        "missing visual.transformer.resblocks.1.ln_1.bias",
        "unexpected stranger",
        "visual.ln_pre.weight is [7], not [64]",
    )


def test_a_part_of_the_decoder_is_not_enough(tmp_path):
    weights, _ = rebuild_weights("authors_segclip_mini.json")
    del weights["vis_mae_decoder.mask_token"]
    torch.save(weights, tmp_path / "segclip.bin")
    with pytest.raises(InputError, match="missing decoder.mask_token"):
        load_segclip(tmp_path / "segclip.bin")


class Runs:
    """Unpickled by an unguarded reader, this would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


KINDS = (
    "missing empty folder text truncated legacy list resnet other width rank no_tensor own_list own_names own_config".split()
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_no_checkpoint(kind, tiny_clip, tmp_path):
    path = tmp_path / "file.pt"
    if kind == "empty":
        path.touch()
    elif kind == "folder":
        path.mkdir()
    elif kind == "text":
        path.write_text("Some text, which is not what it should be.")
    elif kind == "truncated":
        torch.save(openai_state(tiny_clip), path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "legacy":
        torch.save(openai_state(tiny_clip), path, _use_new_zipfile_serialization=False)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "list":
        torch.save([1, 2], path)
    elif kind == "resnet":
        torch.save({"visual.layer1.0.conv1.weight": torch.zeros(1)}, path)
    elif kind == "other":
        torch.save({"fc.weight": torch.zeros(1)}, path)
    elif kind == "width":
        torch.save(openai_state(tiny_clip) | {"visual.conv1.weight": torch.zeros(100, 3, 8, 8)}, path)
    elif kind == "rank":
        torch.save(openai_state(tiny_clip) | {"visual.conv1.weight": torch.zeros(100)}, path)
    elif kind == "no_tensor":
        torch.save(openai_state(tiny_clip) | {"visual.proj": 3}, path)
    elif kind == "own_list":
        torch.save({"config": {}, "model": [1]}, path)
    elif kind == "own_names":
        torch.save({"config": {}, "model": {1: torch.zeros(1)}}, path)
    elif kind == "own_config":
        torch.save({"config": [1], "model": openai_state(tiny_clip)}, path)
    for load in (load_clip, load_segclip, load_model):
        with pytest.raises(InputError) as error:
            load(path)
        assert_one_line(error, path)
        assert "could run code" not in str(error.value)


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_a_checkpoint_that_would_run_code_is_refused(how, tmp_path):
    path, victim = tmp_path / "evil.pt", tmp_path / "victim"
    if how == "pickle":
        path.write_bytes(pickle.dumps({"model": Runs(victim)}))
    else:
        torch.save({"model": Runs(victim)}, path)
    with pytest.raises(InputError) as error:
        load_segclip(path)
    assert_one_line(error, path, "could run code")
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
    with pytest.raises(InputError) as error:
        load_clip(tmp_path / "evil.pt")
    assert_one_line(error, tmp_path / "evil.pt")
    assert not (tmp_path / "victim").exists()


def test_a_checkpoint_of_another_architecture(tiny, tmp_path):
    config = dataclasses.asdict(dataclasses.replace(TINY, num_centers=5))
    torch.save({"model": tiny.state_dict(), "config": config}, tmp_path / "a.pt")
    with pytest.raises(InputError) as error:
        load_segclip(tmp_path / "a.pt")
    assert_one_line(error, "group.centers is [4, 64], not [5, 64]")
    for field, value in {"colour": 1, "image_size": 100, "first_stage_layers": 9}.items():
        torch.save({"model": tiny.state_dict(), "config": config | {field: value}}, tmp_path / "a.pt")
        with pytest.raises(InputError) as error:
            load_segclip(tmp_path / "a.pt")
        assert_one_line(error, tmp_path / "a.pt", field)


def test_a_failed_save_leaves_the_old_checkpoint(tiny, tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, tiny, step=1)

    def full(_, file):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError):
        save_checkpoint(path, tiny, step=2)
    assert read_weights(path)["step"] == 1


def test_clip_and_segclip_share_their_names():
    assert {f"clip.{name}" for name in CLIP(TINY).state_dict()} <= set(SegCLIP(TINY).state_dict())
