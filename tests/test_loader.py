"""Files to tokenizers and models: every format, and what is wrong with files."""

import dataclasses
import gzip
import hashlib
import json
import os
import pickle
import zipfile

import pytest
import torch

import clip_loader
from clip_loader import Tokenizer, load_dino, load_model, load_tokenizer, save_checkpoint
from conftest import GOLDEN, TINY, assert_one_line, rebuild_weights
from model import PACL, DenseCLIP, GroupViT, InputError, SegCLIP


def assert_same(a, b):
    torch.testing.assert_close(a.state_dict(), b.state_dict(), rtol=0, atol=0)


def assert_refused(source, *parts, load=load_model, **options):
    with pytest.raises(InputError) as error:
        load(source, **options)
    assert_one_line(error, *parts)


def test_tokens_are_openais(vocabulary):
    tokenizer = load_tokenizer(vocabulary=vocabulary)
    for text, ids in json.loads((GOLDEN / "tokenizer.json").read_text()):
        assert tokenizer.encode(text) == ids, text


def test_a_learned_vocabulary_in_a_checkpoint(tiny, tmp_path):
    tokenizer = Tokenizer.learn(["a red ball", "a red red star", "one ball"], num_merges=100)
    assert [len(tokenizer.encode(word)) for word in ("red", "ball", "star", "a")] == [1, 1, 1, 1]
    assert Tokenizer(["a b</w>", "c a"]).encode("cab") == [66, 512]  # c, ab</w>
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, tiny, merges=tokenizer.merges)
    text = "a red starball & ü"
    assert load_tokenizer(path).encode(text) == tokenizer.encode(text)
    assert_refused(path, path, "600 tokens", load=clip_loader.open_model)


def test_texts_begin_with_start_and_end_with_end():
    tokenizer = Tokenizer()
    short, long = tokenizer(["ab", "a longer text than fits"], context_length=6).tolist()
    assert short == [tokenizer.start, *tokenizer.encode("ab"), tokenizer.end, 0, 0]
    assert long[-1] == tokenizer.end


def test_a_file_that_is_no_vocabulary(tmp_path):
    path = tmp_path / "vocabulary.gz"
    path.write_bytes(gzip.compress(bytes(range(256)))[:-9])
    assert_refused(None, path, "vocabulary", load=load_tokenizer, vocabulary=path)


def save_archive(clip, path):
    for name in ("input_resolution", "context_length", "vocab_size"):
        clip.register_buffer(name, torch.tensor(32), persistent=False)
    inputs = {"encode_image": torch.zeros(2, 3, 32, 32).half()}
    inputs["encode_text"] = torch.zeros(2, 12, dtype=torch.long)
    torch.jit.trace_module(clip.half(), inputs).save(path)


DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
DTYPES[torch.int32] = "I32"


def save_safetensors(state, path):
    header = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, x in state.items():
        numbers = x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        place = [len(data), len(data) + len(numbers)]
        header[name] = {"dtype": DTYPES[x.dtype], "shape": [*x.shape], "data_offsets": place}
        data += numbers
    header = json.dumps(header).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def save_old(state, path):
    torch.save(state, path, _use_new_zipfile_serialization=False)


TRANSFORMERS_NAMES = """
visual.transformer.resblocks. vision_model.encoder.layers.
transformer.resblocks. text_model.encoder.layers.
.attn. .self_attn.
.ln_1. .layer_norm1.
.ln_2. .layer_norm2.
.mlp.c_fc. .mlp.fc1.
.mlp.c_proj. .mlp.fc2.
visual.class_embedding vision_model.embeddings.class_embedding
visual.conv1. vision_model.embeddings.patch_embedding.
visual.positional_embedding vision_model.embeddings.position_embedding.weight
visual.ln_pre. vision_model.pre_layrnorm.
visual.ln_post. vision_model.post_layernorm.
visual.proj visual_projection.weight
token_embedding. text_model.embeddings.token_embedding.
positional_embedding text_model.embeddings.position_embedding.weight
ln_final. text_model.final_layer_norm.
text_projection text_projection.weight
"""  # ours, and those of CLIPModel


def transformers_state(clip):
    state = {"text_model.embeddings.position_ids": torch.arange(12, dtype=torch.int32)}
    for name, x in clip.state_dict().items():
        for line in TRANSFORMERS_NAMES.split("\n")[1:-1]:
            name = name.replace(*line.split())
        if ".in_proj_" in name:
            for letter, third in zip("qkv", x.chunk(3)):
                state[name.replace("in_proj_", f"{letter}_proj.")] = third
        else:
            state[name] = x.T if "projection" in name else x
    return state


def save_training(clip, path):
    state = {"module._orig_mod." + name: x for name, x in clip.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state}, path)


FORMATS = {
    "OpenAI's archive": save_archive,
    "open_clip": lambda clip, path: save_safetensors(clip.half().state_dict(), path),
    "open_clip's training": save_training,
    "transformers": lambda clip, path: save_safetensors(transformers_state(clip.bfloat16()), path),
    "an old file": lambda clip, path: save_old(transformers_state(clip), path),
    "ours": lambda clip, path: save_checkpoint(path, DenseCLIP(clip), step=3),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("form", FORMATS)
def test_a_clip_in_every_format(form, tiny_clip, tmp_path):
    with torch.no_grad():
        for parameter in tiny_clip.parameters():  # none is 0 or 1
            parameter.add_(torch.randn_like(parameter))
    FORMATS[form](tiny_clip, tmp_path / "file")
    assert_same(load_model(tmp_path / "file").clip, tiny_clip.float())


@pytest.mark.parametrize("kind", ["SegCLIP", "PACL", "GroupViT"])
def test_our_checkpoint_is_itself_again(kind, tiny, tiny_clip, tmp_path):
    config = dataclasses.replace(TINY, vision_layers=4)
    model = {"SegCLIP": tiny, "PACL": PACL(tiny_clip), "GroupViT": GroupViT(config)}[kind]
    path = tmp_path / "new" / "checkpoint.pt"
    save_checkpoint(path, model)
    again = load_model(path)
    assert type(again) is type(model) and again.config == model.config
    assert_same(again, model)
    assert_refused(path, path, f"a {kind}, where a CLIP is needed", kinds=("CLIP",))
    assert_refused(path, path, f"this is a {kind}", readout="naclip")
    assert_refused(path, path, "trained with --activation quick_gelu", activation="gelu")


def test_the_authors_segclip_without_its_decoder(tmp_path):
    weights, _ = rebuild_weights("authors_segclip_mini.json")
    weights = {name: x for name, x in weights.items() if not name.startswith("vis_mae")}
    weights["vis_mae_decoder.decoder_pos_embed"] = torch.zeros(1, 17, 64)  # fixed
    torch.save(weights, tmp_path / "segclip.bin")
    assert isinstance(load_model(tmp_path / "segclip.bin"), SegCLIP)


def test_dino_alone_as_a_teacher_and_in_a_pacl(tiny_clip, dino_state, tmp_path):
    path = tmp_path / "dino.pth"
    torch.save(dino_state, path)
    dino = load_dino(path)
    teacher = {f"module.backbone.{name}": x for name, x in dino_state.items()}
    torch.save({"teacher": teacher | {"head.mlp.0.weight": torch.zeros(1)}, "epoch": 3}, path)
    assert_same(load_dino(path), dino)
    save_checkpoint(path, PACL(tiny_clip, dino))
    assert_same(load_model(path).dino, dino)


def test_the_activation_that_no_file_tells(tiny_clip, tmp_path, capsys):
    path = tmp_path / "laion.pt"
    torch.save(tiny_clip.state_dict(), path)
    assert load_model(path).config.activation == "quick_gelu"
    note = capsys.readouterr().err
    assert str(path) in note and "--activation gelu" in note and note.count("\n") == 1
    assert load_model(path, activation="gelu").config.activation == "gelu"
    assert "mean and std" in capsys.readouterr().err
    torch.save(tiny_clip.state_dict() | {"input_resolution": torch.tensor(32)}, path)  # OpenAI's
    assert_refused(path, path, "trained with --activation quick_gelu", activation="gelu")


def test_download_by_name(tiny_clip, tmp_path, monkeypatch):
    """From a mirror, which here is a folder."""
    name = "ViT-B/16"
    source, cached = tmp_path / "source", tmp_path / "cache" / "file"
    save_safetensors(tiny_clip.state_dict(), source)
    content = source.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    entry = sha256, "file", f"{clip_loader.HUB}/source"
    monkeypatch.setitem(clip_loader.DOWNLOADS, name, entry)
    monkeypatch.setenv("CLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", tmp_path.as_uri() + "/")
    source.write_bytes(content[:-1])
    assert_refused(name, cached, source.as_uri(), sha256, "by hand", "HF_ENDPOINT")
    cached.write_bytes(content[1:])
    source.write_bytes(content)
    assert_same(load_model(name).clip, tiny_clip)
    source.unlink()
    assert clip_loader.fetch(name) == cached


class Runs:
    """Unpickled by an unguarded reader, this would create a file."""

    def __reduce__(self):
        return open, ("victim", "w")


def save_torchscript(content, path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/constants.pkl", b"")
        archive.writestr("a/data.pkl", pickle.dumps(content))


@pytest.mark.parametrize("save", [torch.save, save_old, save_torchscript])
def test_nothing_in_a_file_is_executed(save, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save({"model": Runs()}, tmp_path / "evil.pt")
    assert_refused("evil.pt", "evil.pt", "could run code")
    assert not os.path.exists("victim")


@pytest.mark.parametrize("save", [torch.save, save_old, save_safetensors])
def test_truncated_files(save, tiny_clip, tmp_path):
    path = tmp_path / "file.pt"
    save(tiny_clip.state_dict(), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert_refused(path, path, "no weights")


CONV = "visual.conv1.weight"
STATES = {  # a word of the message: the content of a file
    "known model": lambda state: {"fc.weight": torch.zeros(1)},
    "a CLIP": lambda state: {CONV: torch.zeros(32, 3, 3, 3)},  # a ResNet
    "width 1280": lambda state: state | {CONV: torch.zeros(1280, 3, 8, 8)},  # ViT-H
    "ln_final.bias": lambda state: {x: state[x] for x in state if x != "ln_final.bias"},
    "finite": lambda state: state | {"visual.proj": torch.full((64, 16), torch.nan)},
    "version": lambda state: {"model": state, "config": {"key_gain": 1}},
}


@pytest.mark.parametrize("word", STATES)
def test_other_weights(word, tiny_clip, tmp_path):
    path = tmp_path / "file.pt"
    torch.save(STATES[word](tiny_clip.state_dict()), path)
    assert_refused(path, path, word)


def test_a_failed_save_leaves_the_old_checkpoint(tiny, tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, tiny, step=1)
    with pytest.raises((AttributeError, pickle.PicklingError)):
        save_checkpoint(path, tiny, step=lambda: 2)
    assert clip_loader.read_weights(path)["step"] == 1
