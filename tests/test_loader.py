"""Tokenizer, archives, checkpoints; and files that are not what they should be."""

import base64
import dataclasses
import gzip
import http.server
import json
import os
import pickle
import struct
import sys
import threading
import time
import tracemalloc
import zipfile

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
    for content in ("", "a header", "a header\nonly_one", "a header\na b c"):
        path.write_bytes(gzip.compress(content.encode()))
        assert_refused(Tokenizer.from_file, path, "--vocabulary", "merge")


def test_a_long_word_takes_no_time_and_gives_the_same_tokens():
    letters = base64.b64encode(
        torch.randn(20_000, generator=torch.manual_seed(0)).numpy().tobytes()
    )
    word = "".join(x for x in letters.decode() if x.isalpha())
    texts = [word[i : i + 9] for i in range(0, 3000, 9)] + ["-" * 256] * 9
    tokenizer = Tokenizer.learn(texts, num_merges=500)
    for text in ("a " + word[:2000], "a " + 500 * "thatis", "-" * 30_000):
        expected = [tokenizer.start, *tokenizer.encode(text)][:76]
        assert tokenizer(text)[0, :76].tolist() == expected
    begin = time.monotonic()
    ids = tokenizer([word, "-" * 100_000])
    assert time.monotonic() - begin < 2
    assert (ids[:, -1] == tokenizer.end).all()


class Hub(http.server.BaseHTTPRequestHandler):
    """Sends `content` under any address, as the hub does: parts of it, after a redirection."""

    content = b""
    whole = False  # send all of it, whatever part is asked for
    cut = None  # break the connection after so many bytes
    status = None  # of an error
    asked = []

    def do_GET(self):
        first = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        self.asked.append((self.path, first))
        if not self.path.startswith("/cdn"):
            self.send_response(302)
            self.send_header("Location", "/cdn" + self.path)
            self.end_headers()
            return
        if self.whole:
            first = 0
        part = self.content[first:]
        status = 206
        if self.whole:
            status = 200
        elif not part:
            status = 416
        self.send_response(self.status or status)
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part[: self.cut])

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in for the hub that has one file, and where this is cached."""

    class Handler(Hub):
        content = os.urandom(3_000_000)
        asked = []

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        Handler.address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("CLIP_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_ENDPOINT", Handler.address + "/")
        path = tmp_path / "source.bin"
        path.write_bytes(Handler.content)
        url = f"{clip_loader.HUB}/someone/thing/resolve/0123/file.bin"
        entry = (clip_loader.sha256_of(path), "file.bin", ("http://127.0.0.1:1/gone", url))
        monkeypatch.setitem(clip_loader.DOWNLOADS, "thing", entry)
        yield Handler, tmp_path / "cache" / "file.bin"
        server.shutdown()


def test_fetch_downloads_once_and_checks_every_time(hub, capsys):
    server, cached = hub
    assert clip_loader.fetch("thing") == cached
    assert server.asked[0] == ("/someone/thing/resolve/0123/file.bin", 0)
    assert "3,000,000 of 3,000,000 bytes" in capsys.readouterr().err
    assert clip_loader.fetch("thing") == cached and len(server.asked) == 2
    assert cached.read_bytes() == server.content
    cached.write_bytes(b"damaged")
    assert clip_loader.fetch("thing").read_bytes() == server.content
    assert "wrong SHA-256" in capsys.readouterr().err


@pytest.mark.parametrize("whole", [False, True])
def test_an_interrupted_download_goes_on(whole, hub):
    server, cached = hub
    server.cut = 1_234_567
    assert_refused(lambda _: clip_loader.fetch("thing"), cached, "the connection broke")
    assert cached.with_name("file.bin.part").stat().st_size == 1_234_567
    server.cut, server.whole = None, whole
    assert clip_loader.fetch("thing").read_bytes() == server.content
    assert server.asked[-1] == ("/cdn/someone/thing/resolve/0123/file.bin", 1_234_567)
    # Stopped when all was there, but not yet renamed:
    cached.rename(cached.with_name("file.bin.part"))
    assert clip_loader.fetch("thing").read_bytes() == server.content


def test_what_cannot_be_downloaded(hub, monkeypatch):
    server, cached = hub
    by_hand = (cached, clip_loader.DOWNLOADS["thing"][0], "by hand", "HF_ENDPOINT", server.address)
    server.content = b"something else"
    assert_refused(lambda _: clip_loader.fetch("thing"), *by_hand, "wrong SHA-256")
    server.status = 404
    assert_refused(lambda _: clip_loader.fetch("thing"), *by_hand, "404")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    refusal = assert_refused(lambda _: clip_loader.fetch("thing"), cached, "refused")
    assert refusal.count("127.0.0.1:1/") == 2  # both addresses
    monkeypatch.setenv("HF_ENDPOINT", "nonsense")
    assert_refused(lambda _: clip_loader.fetch("thing"), cached, "nonsense/someone")
    assert not cached.exists() and not cached.with_name("file.bin.part").exists()


def test_processes_that_need_one_file_download_it_once(hub):
    server, cached = hub
    threads = [threading.Thread(target=clip_loader.fetch, args=("thing",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cached.read_bytes() == server.content and len(server.asked) == 2
    assert not cached.with_name("file.bin.part").exists()


def test_copies_from_elsewhere_serve(hub, tiny_clip, tmp_path, monkeypatch):
    server, cached = hub
    cached.parent.mkdir()
    archive = cached.with_name("ViT-B-16.pt")  # downloaded from OpenAI, long ago
    torch.save(openai_state(tiny_clip), archive)
    entry = (*clip_loader.MODELS["ViT-B/16"][:2], clip_loader.sha256_of(archive))
    monkeypatch.setitem(clip_loader.MODELS, "ViT-B/16", entry)
    assert clip_loader.fetch("ViT-B/16") == archive
    package = tmp_path / "open_clip"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    (package / clip_loader.VOCABULARY).write_bytes(gzip.compress(b"a header\na b"))
    sha256 = clip_loader.sha256_of(package / clip_loader.VOCABULARY)
    entry = (sha256, *clip_loader.DOWNLOADS[clip_loader.VOCABULARY][1:])
    monkeypatch.setitem(clip_loader.DOWNLOADS, clip_loader.VOCABULARY, entry)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert load_tokenizer().merges == ["a b"]
    assert server.asked == []


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


def safetensors_bytes(state, header=None, padding=0):
    """A safetensors file of a state dict; header: changes to its entries, None removes one."""
    entries = {"__metadata__": {"format": "pt"}}
    data = b""
    types = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    types |= {torch.float64: "F64", torch.int64: "I64"}
    for name, x in state.items():
        numbers = x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        offsets = [len(data), len(data) + len(numbers)]
        entries[name] = {"dtype": types[x.dtype], "shape": list(x.shape), "data_offsets": offsets}
        data += numbers
    text = (json.dumps(entries | (header or {})) + padding * " ").encode()
    return struct.pack("<Q", len(text)) + text + data


TRANSFORMERS_NAMES = {  # ours: those of CLIPModel
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "transformer.resblocks.": "text_model.encoder.layers.",
    ".attn.": ".self_attn.",
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.": "vision_model.embeddings.patch_embedding.",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.": "vision_model.pre_layrnorm.",
    "visual.ln_post.": "vision_model.post_layernorm.",
    "visual.proj": "visual_projection.weight",
    "token_embedding.": "text_model.embeddings.token_embedding.",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.": "text_model.final_layer_norm.",
    "text_projection": "text_projection.weight",
}


def transformers_state(clip):
    """The state dict that transformers' CLIPModel would have, in an old file."""
    state = {
        f"{x}_model.embeddings.position_ids": torch.arange(9)[None] for x in ("text", "vision")
    }
    for name, x in clip.state_dict().items():
        for ours, theirs in TRANSFORMERS_NAMES.items():
            name = name.replace(ours, theirs)
        if ".in_proj_" in name:
            for letter, third in zip("qkv", x.chunk(3)):
                state[name.replace("in_proj_", f"{letter}_proj.")] = third
        else:
            state[name] = x.T if "projection" in name else x
    return state


def write_safetensors(state, path, **others):
    path.write_bytes(safetensors_bytes(state, **others))


def training_state(clip):
    """What open_clip's training saves."""
    state = {f"module.{name}": x for name, x in clip.state_dict().items()}
    return {"epoch": 3, "name": "run", "state_dict": state, "optimizer": {"state": {}}}


FORMATS = {
    "open_clip_model.safetensors": lambda clip, path: write_safetensors(clip.state_dict(), path),
    "open_clip_pytorch_model.bin": lambda clip, path: torch.save(clip.state_dict(), path),
    "epoch_3.pt": lambda clip, path: torch.save(training_state(clip), path),
    "model.safetensors": lambda clip, path: write_safetensors(transformers_state(clip), path),
    "pytorch_model.bin": lambda clip, path: torch.save(transformers_state(clip), path),
    "old.bin": lambda clip, path: torch.save(
        transformers_state(clip), path, _use_new_zipfile_serialization=False
    ),
    "unaligned.safetensors": lambda clip, path: write_safetensors(
        clip.state_dict(), path, padding=3
    ),
}


@pytest.mark.parametrize("file", FORMATS)
def test_files_of_other_programs_give_the_same_parameters(file, tiny_clip, tmp_path):
    path = tmp_path / file
    with torch.no_grad():
        for parameter in tiny_clip.parameters():  # none is 0 or 1
            parameter.add_(torch.randn_like(parameter))
    FORMATS[file](tiny_clip, path)
    for clip in (load_clip(path), load_model(path).clip, load_segclip(path).clip):
        assert_same_weights(clip, tiny_clip)
        assert_same_sizes(clip.config)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_safetensors_of_other_precisions(dtype, tiny_clip, tmp_path):
    path = tmp_path / "model.safetensors"
    state = {name: x.to(dtype) for name, x in tiny_clip.state_dict().items()}
    write_safetensors(state, path)
    clip = load_clip(path)
    for name, x in clip.state_dict().items():
        assert x.dtype == torch.float32 and torch.equal(x, state[name].float())


X = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
Y = {"dtype": "F32", "shape": [2], "data_offsets": [24, 32]}


def headed(text, data=bytes(32), length=None):
    text = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def changed(data=bytes(32), x=X, y=Y):
    return headed(json.dumps({"x": x, "y": y}), data)


MALFORMED = {
    "empty": b"",
    "shorter than the length": b"\x10\0\0",
    "length alone": struct.pack("<Q", 2),
    "header of no length": headed("", b"", 0),
    "header beyond the end": headed(json.dumps({"x": X}), length=10_000),
    "header of 200 MB": headed(json.dumps({"x": X}), length=200_000_000),
    "header of 2**63 bytes": headed(json.dumps({"x": X}), length=2**63),
    "cut within the header": changed()[:60],
    "cut within the numbers": changed()[:-1],
    "longer than the numbers": changed(bytes(33)),
    "list for a header": headed("[1, 2]"),
    "space before the header": headed(" " + json.dumps({"x": X, "y": Y})),
    "no JSON": headed('{"x": '),
    "no UTF-8": headed(b'{"\xff": 1}'),
    "deeply nested": headed('{"x":' * 100_000),
    "name twice": headed(f'{{"x": {json.dumps(X)}, "x": {json.dumps(X)}, "y": {json.dumps(Y)}}}'),
    "entry is a number": headed('{"x": 3}'),
    "without offsets": changed(x={"dtype": "F32", "shape": [2, 3]}),
    "three offsets": changed(x=X | {"data_offsets": [0, 24, 24]}),
    "offsets of text": changed(x=X | {"data_offsets": ["0", "24"]}),
    "negative offset": changed(x=X | {"data_offsets": [-24, 0]}),
    "offset beyond the end": changed(y=Y | {"data_offsets": [2**40, 2**40 + 8]}),
    "reversed offsets": changed(x=X | {"data_offsets": [24, 0]}),
    "overlap": changed(y=Y | {"data_offsets": [16, 24]}),
    "hole": changed(bytes(40), y=Y | {"data_offsets": [32, 40]}),
    "hole at the beginning": changed(x={"dtype": "F32", "shape": [4], "data_offsets": [8, 24]}),
    "unknown type": changed(x=X | {"dtype": "F31"}),
    "type is a list": changed(x=X | {"dtype": []}),
    "other size of type": changed(x=X | {"dtype": "F16"}),
    "larger shape": changed(x=X | {"shape": [2, 4]}),
    "negative shape": changed(x=X | {"shape": [-2, -3]}),
    "shape of fractions": changed(x=X | {"shape": [2.0, 3]}),
    "shape of lists": changed(x=X | {"shape": [[0], 1_000_000_000_000]}),
    "shape that overflows": changed(x=X | {"shape": [2**33, 2**33]}),
    "shape of no numbers that overflows": changed(
        x={"dtype": "F32", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}
    ),
    "shape of a million sides": changed(x=X | {"shape": [10**9] * 1_000_000}),
    "shape is a number": changed(x=X | {"shape": 6}),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_safetensors(name, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(changed())
    assert read_weights(path)["x"].shape == (2, 3)
    path.write_bytes(MALFORMED[name])
    begin = time.monotonic()
    assert_refused(read_weights, path, "a damaged safetensors file (")
    assert time.monotonic() - begin < 2


def test_safetensors_are_known_by_their_content(tiny_clip, tmp_path):
    path = tmp_path / "weights"
    write_safetensors(tiny_clip.state_dict(), path)
    assert_same_weights(load_clip(path), tiny_clip)
    path.write_bytes(path.read_bytes()[:-1])
    assert_refused(load_clip, path, "a damaged safetensors file")


def test_a_pointer_of_git_lfs(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4b86\nsize 598516980\n")
    assert_refused(load_clip, path, "git lfs pull")


def test_model_by_name(tiny_clip, tmp_path, monkeypatch, capsys):
    path = tmp_path / "ViT-B-16.safetensors"
    write_safetensors(tiny_clip.state_dict(), path)
    monkeypatch.setattr(clip_loader, "fetch", {"ViT-B/16": path}.get)
    for clip in (load_clip("ViT-B/16"), load_segclip("ViT-B/16").clip):
        assert_same_weights(clip, tiny_clip)
        assert clip.config.activation == "quick_gelu"
    assert "--activation" not in capsys.readouterr().err  # it is known
    assert load_clip("ViT-B/16", "gelu").config.activation == "gelu"


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
    folder = tmp_path / "CLIP-ViT-B-16-laion2B-s34B-b88K"
    folder.mkdir()
    torch.save(tiny_clip.state_dict(), folder / "open_clip_pytorch_model.bin")
    assert load_clip(folder / "open_clip_pytorch_model.bin").config.activation == "gelu"
    assert "read with gelu" in capsys.readouterr().err
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
    for others in ({"readout": "naclip"}, {"dino": path}):
        refusal = "--readout and --dino are for a CLIP; this is a SegCLIP"
        assert_refused(lambda path: load_model(path, **others), path, refusal)
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
    others |= {"stages": 2, "group_tokens": 64, "projector_width": 4096, "crop_zoom": 1.0}
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
@pytest.mark.parametrize("protocol", [0, 2, 4])
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
    config = dataclasses.asdict(TINY)
    faults = {"colour": 1, "image_size": 100, "first_stage_layers": 9, "gumbel_tau": "warm"}
    faults |= {"mask_ratio": torch.zeros(2), "num_centers": [4], "activation": 7}
    for field, value in faults.items():
        torch.save({"model": tiny.state_dict(), "config": config | {field: value}}, path)
        assert_refused(load_segclip, path)
    for fault in (3, [3], ["a b", "c"], "merges"):
        torch.save({"model": tiny.state_dict(), "config": config, "merges": fault}, path)
        assert_refused(load_tokenizer, path, "merges")


def test_checkpoints_that_would_need_more_memory_than_they_have(tiny, tiny_clip, tmp_path):
    path = tmp_path / "a.pt"
    config = dataclasses.asdict(TINY)
    huge = {"vision_width": 2**20, "text_layers": 10**9, "decoder_layers": 10**9}
    huge |= {"vocab_size": 10**12, "embed_dim": 10**12, "num_centers": 10**12}
    torch.save({"model": tiny.state_dict(), "config": config | huge}, path)
    assert_same_weights(load_segclip(path), tiny)  # the weights' own sizes count
    state = openai_state(tiny_clip)
    no_decoder = {x: y for x, y in tiny.state_dict().items() if not x.startswith("decoder.")}
    faults = [{"model": no_decoder, "config": config | huge}]
    names = {"visual.conv1.weight": (100_000, 3, 1, 1), "text_projection": (0, 10**12)}
    faults += [state | {name: torch.zeros(shape)} for name, shape in names.items()]
    blocks = {f"visual.transformer.resblocks.{i}.x": torch.zeros(1) for i in range(500)}
    faults.append(state | blocks)
    for fault in faults:
        torch.save(fault, path)
        assert_refused(load_model, path, "architecture")
    faults = [{"visual.proj": torch.zeros(1).expand(10**6, 10**6)}]  # many numbers, one place
    faults.append({f"a{i}": state["token_embedding.weight"] for i in range(5)})
    for fault in faults:
        torch.save(state | fault, path)
        assert_refused(load_model, path, "its tensors would be larger")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("a/constants.pkl", b"")  # as TorchScript's archives
        packed.writestr("a/data.pkl", pickle.dumps(bytes(30_000_000)))
    tracemalloc.start()
    assert_refused(load_model, path)
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tensors_that_are_not_plain_numbers(tiny_clip, tmp_path):
    path = tmp_path / "a.pt"
    proj = tiny_clip.visual.proj.detach()
    tensors = [proj.to_sparse(), proj.to("meta"), torch.nested.nested_tensor([proj])]
    tensors.append(torch.quantize_per_tensor(proj, 0.1, 0, torch.qint8))
    for tensor in tensors:
        torch.save(openai_state(tiny_clip) | {"visual.proj": tensor}, path)
        assert_refused(load_clip, path)
    for value in (torch.nan, torch.inf):
        torch.save(openai_state(tiny_clip) | {"visual.proj": proj * value}, path)
        assert_refused(load_clip, path, "visual.proj", "not finite")


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
    with pytest.raises(InputError, match="checkpoint.pt: cannot be written, no space left"):
        save_checkpoint(path, tiny, rotate=True, step=2)
    assert list(tmp_path.iterdir()) == [path]
    assert read_weights(path)["step"] == 1
