"""From files, on disk or on the web, to a tokenizer, weights and models.

Files are data: nothing that one holds is ever executed.
"""

import dataclasses
import fcntl
import functools
import gzip
import hashlib
import html
import importlib.util
import json
import math
import os
import pickle
import sys
import urllib.error
import urllib.request
import zipfile
import zlib
from collections import Counter, defaultdict
from http.client import HTTPException
from pathlib import Path

import ftfy
import regex
import torch

from model import CLIP, DINO, PACL, Config, DenseCLIP, GroupViT, InputError, SegCLIP

# --------------------------------------------------------------------------------------------------
# Byte-level BPE
#
# A text becomes tokens in three steps. Take "Two naïve cats!":
#   1. Clean it (repair broken Unicode, collapse spaces, lower-case) and cut it into words and runs
#      of punctuation with one regular expression: "two", "naïve", "cats", "!".
#   2. Write each word as its UTF-8 bytes: "naïve" is n a c3 af v e. There are only 256 bytes, so no
#      text in any language is unknown. To print them, each byte has its own letter (c3 is "Ã", af
#      is "¯"), and the last one of a word is marked with "</w>": n a Ã ¯ v e</w>. The 256 letters
#      without and with the mark are the first 512 tokens.
#   3. Merge. The vocabulary is a list of pairs, most frequent in its training text first: "i n",
#      "t h", "a n", ... In each word, the adjacent pair that comes first in the list is joined,
#      again and again until no pair of the word is in the list: c a t s</w> -> c at s</w> ->
#      cat s</w> -> cats</w>. Each pair adds one token, so a frequent word becomes a single token
#      and a rare word a few. Two special tokens, start and end of text, come last.


def byte_letters():
    """A printable letter for each of the 256 bytes: its own, or one from U+0100 on."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def merge_pair(symbols, pair):
    """("c", "a", "t", "s</w>") with the pair ("a", "t") -> ("c", "at", "s</w>")."""
    merged = []
    i = 0
    while i < len(symbols):
        if symbols[i : i + 2] == pair:
            merged.append(symbols[i] + symbols[i + 1])
            i += 2
        else:
            merged.append(symbols[i])
            i += 1
    return tuple(merged)


class Tokenizer:
    """CLIP's byte-level BPE tokenizer. merges: strings "left right", most frequent pair first."""

    START, END = "<|startoftext|>", "<|endoftext|>"
    WORDS = regex.compile(
        r"<\|startoftext\|>|<\|endoftext\|>"  # the special tokens, if they are written out
        r"|'s|'t|'re|'ve|'m|'ll|'d"  # English contractions: don't -> don 't
        r"|[\p{L}]+"  # a word: letters of any alphabet
        r"|[\p{N}]"  # one digit at a time
        r"|[^\s\p{L}\p{N}]+",  # a run of anything else but space
        regex.IGNORECASE,
    )

    def __init__(self, merges=()):
        self.merges = list(merges)
        self.letters = byte_letters()
        pairs = [tuple(merge.split()) for merge in self.merges]
        if any(len(pair) != 2 for pair in pairs):
            raise ValueError("a merge is not a pair")
        self.rank = {pair: i for i, pair in enumerate(pairs)}
        letters = list(self.letters.values())
        tokens = letters + [letter + "</w>" for letter in letters]
        tokens += ["".join(pair) for pair in pairs]
        tokens += [self.START, self.END]
        self.ids = {token: i for i, token in enumerate(tokens)}
        self.vocab_size = len(tokens)
        self.start, self.end = self.ids[self.START], self.ids[self.END]
        # Word -> ids, since captions repeat their words.
        self.cache = {self.START: [self.start], self.END: [self.end]}

    @classmethod
    def from_file(cls, path):
        """OpenAI's vocabulary file: a header, the merges, then lines that CLIP does not use."""
        try:
            with gzip.open(path, "rt", encoding="utf-8") as file:
                lines = file.read(1 << 24).split("\n")
            merges = [line for line in lines[1 : 49152 - 256 - 2 + 1] if line]
            if not merges:
                raise ValueError("it has no merges")
            return cls(merges)
        except (OSError, EOFError, ValueError, zlib.error) as error:
            address = DOWNLOADS[VOCABULARY][2][0]
            raise InputError(
                f"{path}: not a BPE vocabulary ({error}); get it from {address} "
                "and point to it with --vocabulary FILE"
            ) from None

    @classmethod
    def learn(cls, texts, num_merges):
        """Learn merges from texts: join the most frequent pair of neighbours, num_merges times."""
        blank = cls()
        words = Counter(word for text in texts for word in blank.words(text))
        words = {blank.symbols(word): count for word, count in words.items()}
        pairs = Counter()

        def count_pairs(symbols, count):
            for pair in zip(symbols, symbols[1:]):
                pairs[pair] += count

        for symbols, count in words.items():
            count_pairs(symbols, count)
        merges = []
        while len(merges) < num_merges and +pairs:  # else every word is one token already
            best = min(pairs, key=lambda pair: (-pairs[pair], pair))
            merges.append(" ".join(best))
            for symbols in [symbols for symbols in words if best[0] in symbols]:
                count = words.pop(symbols)
                count_pairs(symbols, -count)
                symbols = merge_pair(symbols, best)
                count_pairs(symbols, count)
                words[symbols] = count
        return cls(merges)

    def words(self, text):
        text = ftfy.fix_text(text)
        text = html.unescape(html.unescape(text))  # twice, as OpenAI: the web has "&amp;lt;"
        text = " ".join(text.split()).lower()
        return self.WORDS.findall(text)

    def symbols(self, word):
        letters = [self.letters[byte] for byte in word.encode()]
        return (*letters[:-1], letters[-1] + "</w>")

    def pieces(self, word):
        """One word -> the ids of its tokens."""
        if word in self.cache:
            return self.cache[word]
        symbols = self.symbols(word)
        while len(symbols) > 1:
            best = min(zip(symbols, symbols[1:]), key=lambda pair: self.rank.get(pair, math.inf))
            if best not in self.rank:
                break
            symbols = merge_pair(symbols, best)
        if len(self.cache) > 100_000:  # the web never runs out of new words
            self.cache = {token: self.cache[token] for token in (self.START, self.END)}
        self.cache[word] = [self.ids[symbol] for symbol in symbols]
        return self.cache[word]

    def encode(self, text, most=math.inf):
        """str -> list of token ids, without start and end; at least the first `most`."""
        tokens = []
        for word in self.words(text):
            length = 8 * most  # letters; a longer word takes time that grows with their square
            while length < len(word) and len(self.pieces(word[:length])) < 2 * most:
                length *= 2
            tokens += self.pieces(word[: min(length, len(word))])
            if len(tokens) >= most:
                break
        return tokens

    def __call__(self, texts, context_length=77):
        """str or list of n strings -> LongTensor [n, context_length]: start, tokens, end, zeros.

        A text that is too long is cut, and its last token is still the end token: CLIP reads the
        feature of the text there.
        """
        texts = [texts] if isinstance(texts, str) else texts
        result = torch.zeros(len(texts), context_length, dtype=torch.long)
        for row, text in zip(result, texts):
            tokens = self.encode(text, context_length)
            tokens = [self.start, *tokens][: context_length - 1] + [self.end]
            row[: len(tokens)] = torch.tensor(tokens)
        return result


# --------------------------------------------------------------------------------------------------
# The cache and the web

HUB = "https://huggingface.co"  # $HF_ENDPOINT names a mirror
VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
DOWNLOADS = {  # name: (SHA-256, file name in the cache, addresses)
    VOCABULARY: (
        "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a",
        VOCABULARY,
        (
            f"https://github.com/openai/CLIP/raw/main/clip/{VOCABULARY}",
            f"https://dl.fbaipublicfiles.com/dinov3/thirdparty/{VOCABULARY}",
        ),
    )
}
MODELS = {  # OpenAI's CLIPs: the SHA-256 and address of open_clip's file, the SHA-256 of OpenAI's
    "ViT-B/32": (
        "e6d1bd7789aa45192b3bf90570a789b478bae1b74ebcce7eddd908e83a2b7c31",
        "timm/vit_base_patch32_clip_224.openai/resolve/a6f597a30f7b82c51704746581f9a4e41421e878",
        "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    ),
    "ViT-B/16": (
        "4b8699299b1e8997753c64b052ba32031449d5d853f55a039148560ee02b820f",
        "timm/vit_base_patch16_clip_224.openai/resolve/977e3dd0ec55ab8da155f2fbeb6b5f54948b6e3d",
        "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    ),
    "ViT-L/14": (
        "9ce2e8a8ebfff3793d7d375ad6d3c35cb9aebf3de7ace0fc7308accab7cd207e",
        "timm/vit_large_patch14_clip_224.openai/resolve/18d0535469bb561bf468d76c1d73aa35156c922b",
        "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    ),
    "ViT-L/14@336px": (
        "fbc415c3d0d7b79faed8f5ccfb740c32b7c4f5ffe7283b851f89c6231c01a8e0",
        "timm/vit_large_patch14_clip_336.openai/resolve/81e38efc4637de5023b10e75a7f9bd1c6fa6b010",
        "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
    ),
}
for _name, (_sha256, _place, _) in MODELS.items():
    _file = regex.sub("[/@]", "-", _name) + ".safetensors"
    DOWNLOADS[_name] = (_sha256, _file, (f"{HUB}/{_place}/open_clip_model.safetensors",))
DINO_ADDRESS = (
    "https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth"
)


def cache_dir():
    """$CLIP_CACHE, else ~/.cache/clip, where OpenAI's package keeps the same files."""
    return Path(os.environ.get("CLIP_CACHE") or Path.home() / ".cache" / "clip")


def sha256_of(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def find(name):
    """A valid copy of a file of DOWNLOADS on this machine -> its path, or None."""
    sha256, file, _ = DOWNLOADS[name]
    path = cache_dir() / file
    copies = {path: sha256}
    if name in MODELS:  # OpenAI's own archive, from when there was an address of it
        copies[path.with_suffix(".pt")] = MODELS[name][2]
    else:  # in packages, which are not imported
        for spec in filter(None, map(importlib.util.find_spec, ("open_clip", "clip"))):
            copies |= {Path(x, file): sha256 for x in spec.submodule_search_locations or ()}
    for path, expected in copies.items():
        if path.is_file():
            if sha256_of(path) == expected:
                return path
            print(f"{path}: not used, wrong SHA-256", file=sys.stderr)


def download(url, path, sha256):
    """Saves a file as `path`, by way of path.part, which the next call goes on with. -> path."""
    partial = path.with_name(path.name + ".part")
    done = partial.stat().st_size if partial.exists() else 0
    headers = {"User-Agent": "clip_loader", "Range": f"bytes={done}-"}
    try:
        request = urllib.request.Request(url, headers=headers)
        with urllib.request.urlopen(request, timeout=60) as answer, open(partial, "ab") as file:
            if answer.status != 206:  # all of it, whatever was asked for
                file.truncate(0)
                done = 0
            total = done + int(answer.headers["Content-Length"] or 0)
            while chunk := answer.read(1 << 22):
                done += file.write(chunk)
                print(f"\r{path.name}: {done:,} of {total:,} bytes", end="", file=sys.stderr)
            print(file=sys.stderr)
        if done < total:
            raise OSError("the connection broke; run it again to go on from there")
    except urllib.error.HTTPError as error:
        if error.code != 416:  # nothing is left to send
            raise
    if sha256_of(partial) != sha256:
        partial.unlink()
        raise OSError("a file with a wrong SHA-256")
    return partial.replace(path)


def fetch(name):
    """The path of a file of DOWNLOADS, its SHA-256 verified; downloaded if needed."""
    path = find(name)
    if path:
        return path
    sha256, file, addresses = DOWNLOADS[name]
    path = cache_dir() / file
    failures = []
    for url in addresses:
        url = url.replace(HUB, (os.environ.get("HF_ENDPOINT") or HUB).rstrip("/"))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(f"{path}.lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # of several processes, one downloads
                return find(name) or download(url, path, sha256)
        except (OSError, HTTPException, ValueError) as error:
            failures.append(f"{url} ({error})")
    raise InputError(
        f"{path}: no valid file, and none from {' or '.join(failures)}; without network, save it "
        f"there by hand (SHA-256 {sha256}); HF_ENDPOINT names a mirror of {HUB}; or give another "
        "by --vocabulary FILE, --init FILE or --checkpoint FILE"
    )


def load_tokenizer(checkpoint=None, vocabulary=None):
    """A checkpoint's own Tokenizer, else a vocabulary file's, else OpenAI's. Raises InputError."""
    merges = None
    if checkpoint is not None and checkpoint not in MODELS:
        merges = read_weights(checkpoint).get("merges")
    if merges is None:
        return Tokenizer.from_file(vocabulary or fetch(VOCABULARY))
    try:
        return Tokenizer(merges)
    except (AttributeError, TypeError, ValueError):
        raise InputError(f"{checkpoint}: its merges are not pairs of tokens") from None


# --------------------------------------------------------------------------------------------------
# Files of weights

SAFETENSORS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
}


def without_duplicates(pairs):
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name is there twice")
    return dict(pairs)


def read_safetensors(path):
    """The tensors of a safetensors file, mapped. Anything odd in it raises an exception.

    8 bytes hold the length of the header. The header, in JSON, holds the type, the shape and the
    place of each tensor. The rest is the numbers, without holes or overlaps.
    """
    size = path.stat().st_size
    data = torch.from_file(str(path), size=size, dtype=torch.uint8)
    start = 8 + int.from_bytes(data[:8].tolist(), "little")
    if start > min(size, 8 + 100_000_000) or data[8] != ord("{"):
        raise ValueError("no header")
    header = data[8:start].numpy().tobytes().decode()
    header = json.loads(header, object_pairs_hook=without_duplicates)
    header.pop("__metadata__", None)
    weights = {}
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, stop = entry["data_offsets"]
        shape = entry["shape"]
        dtype = SAFETENSORS[entry["dtype"]]
        if len(shape) > 8 or not all(type(n) is int and 0 <= n <= size for n in shape):
            raise ValueError(f"{name} has no shape")
        length = math.prod(shape) * dtype.itemsize
        if not begin == end == stop - length <= size - start - length:
            raise ValueError(f"{name} does not lie where it should")
        end = stop
        numbers = data[start + begin : start + stop]
        if (start + begin) % dtype.itemsize:
            numbers = numbers.clone()  # aligned
        weights[name] = numbers.view(dtype).reshape(shape)
    if start + end != size:
        raise ValueError(f"{size} bytes, not {start + end}")
    return weights


class Ignored:
    """In place of the settings in NVlabs' checkpoints, which are objects of OmegaConf."""


OMEGACONF = (
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    "omegaconf.nodes.AnyNode",
    "typing.Any",
)


@functools.cache
def allow_omegaconf():
    """Lets torch.load read objects of these names, as empty ones of a class without methods."""
    classes = [int, list, dict, defaultdict]  # what they are made of
    for path in OMEGACONF:
        module, name = path.rsplit(".", 1)
        classes.append(type(name, (Ignored,), {"__module__": module}))
    torch.serialization.add_safe_globals(classes)


class Module:
    """Any class of a TorchScript archive: attributes, no methods."""


class TorchScriptReader(pickle.Unpickler):
    """The tensors of a TorchScript archive; torch.jit.load would run code from the file.

    An archive is a zip: data.pkl is a tree of modules, whose tensors' numbers are files in data/.
    Only what find_class returns can be called.
    """

    def __init__(self, archive):
        tree = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        folder = tree.removesuffix(".pkl")
        self.read = functools.cache(lambda key: bytearray(archive.read(f"{folder}/{key}")))
        super().__init__(archive.open(tree))

    def find_class(self, module, name):
        if module.startswith("__torch__") or name == "OrderedDict":
            return Module
        if name == "_rebuild_tensor_v2":
            return lambda numbers, start, size, stride, *_: numbers.as_strided(size, stride, start)
        if module == "torch.jit._pickle":  # lists of numbers and the like
            return lambda values, *_: values
        dtype = getattr(torch, name.removesuffix("Storage").lower(), None)
        if isinstance(dtype, torch.dtype):  # HalfStorage -> torch.half
            return dtype
        raise pickle.UnpicklingError(f"Weights only load failed: {module}.{name}")  # torch's words

    def persistent_load(self, reference):
        _, dtype, key, *_ = reference
        return torch.frombuffer(self.read(key), dtype=dtype)

    def state_dict(self):
        def collect(module, prefix):
            for name, value in vars(module).items():
                if isinstance(value, torch.Tensor):
                    yield prefix + name, value
                elif isinstance(value, Module):
                    yield from collect(value, f"{prefix}{name}.")

        return dict(collect(self.load(), ""))


def read_zip(path):
    with zipfile.ZipFile(path) as archive:
        if sum(file.file_size for file in archive.infolist()) > 10 * path.stat().st_size:
            raise ValueError("packed, as weights never are")
        if any(name.endswith("/constants.pkl") for name in archive.namelist()):
            return TorchScriptReader(archive).state_dict()
    allow_omegaconf()
    # Mapped, so that tensors that are not used (an optimiser's) cost nothing.
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def read_weights(path):
    """A file of torch.save, TorchScript or safetensors -> its dictionary, on CPU.

    Raises InputError for a file that is missing, damaged, or would need Python code to be run.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: neither a file nor one of the models {', '.join(MODELS)}")
    problem = "not a checkpoint, or a damaged one; download or copy it again"
    try:
        with open(path, "rb") as file:
            start = file.read(99)
        if start.startswith(b"version https://git-lfs"):
            problem = "only stands for a file, which `git lfs pull` fetches"
            raise ValueError
        if path.suffix == ".safetensors" or start[4:9] == b"\0\0\0\0{":
            problem = "a damaged safetensors file ({}); download or copy it again"
            weights = read_safetensors(path)
        elif zipfile.is_zipfile(path):
            weights = read_zip(path)
        else:
            allow_omegaconf()
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damage can raise anything
        reason = " ".join(str(error).split())
        # torch says the same of a text, which does not begin as a zip file or a pickle does.
        is_pickle = regex.match(rb"PK|\x80|[](}]|L\d|c\w+\n", start)
        if is_pickle and "Weights only load failed" in reason:
            problem = "refused, it holds Python objects that could run code; save tensors only"
        elif isinstance(error, OSError):
            problem = "{}"
        raise InputError(f"{path}: {problem.format(reason)}") from None
    if not isinstance(weights, dict):
        raise InputError(f"{path}: holds a {type(weights).__name__}, not a dictionary of weights")
    return weights


def save_checkpoint(path, model, rotate=False, **others):
    """Write a checkpoint that load_model reads. At every moment there is a whole one on disk.

    rotate: the one before it becomes checkpoint.1.pt, beside checkpoint.pt.
    others: further entries, of tensors and plain values.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    content = {"model": model.state_dict(), "config": dataclasses.asdict(model.config), **others}
    try:
        with open(partial, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())  # the content must reach the disk before the name does
    except (OSError, RuntimeError) as error:  # torch.save's RuntimeError follows an OSError
        partial.unlink(missing_ok=True)
        reason = error if isinstance(error, OSError) else error.__context__ or error
        raise InputError(f"{path}: cannot be written, {reason}") from None
    if rotate and zipfile.is_zipfile(path):  # a truncated one is not worth keeping
        os.replace(path, path.with_suffix(f".1{path.suffix}"))
    os.replace(partial, path)


def last_checkpoint(path):
    """checkpoint.pt, or checkpoint.1.pt if that is damaged or missing -> (its content, its path).

    (None, None) if there is neither. Raises InputError if none can be read.
    """
    path = Path(path)
    older = path.with_suffix(f".1{path.suffix}")
    try:
        if path.exists():
            return read_weights(path), path
    except InputError as error:
        if not older.exists():
            raise
        print(f"{error}; trying the one before it", file=sys.stderr)
    if older.exists():
        return read_weights(older), older
    return None, None


# --------------------------------------------------------------------------------------------------
# From weights to models

# Parts of other programs' names, replaced by ours in this order.
BLOCK_NAMES = {  # in the blocks of MAE's decoder, of DINO and of transformers
    ".layer_norm": ".ln_",
    ".self_attn.": ".attn.",
    ".norm1.": ".ln_1.",
    ".norm2.": ".ln_2.",
    ".attn.qkv.": ".attn.in_proj_",
    ".attn.proj.": ".attn.out_proj.",
    ".fc1.": ".c_fc.",
    ".fc2.": ".c_proj.",
}
AUTHORS_NAMES = {
    ".layers0.": ".resblocks.",
    "clip.visual.transformer.layers_mae2.": "reconstruction_blocks.",
    "clip.visual.transformer.reconstruct_layer2.rec_proj_a.a_fc": "reconstruction_layer.linear",
    "clip.visual.transformer.semantic_layer2.": "group.",
    "group.semantic_center": "group.centers",
    "group.cross_att.": "group.cross_blocks.",
    "group.cross_ln.": "group.ln_centers.",
    "group.norm.": "group.ln_patches.",
    "group.k_conv.": "group.to_keys.",
    "group.k_ln.": "group.ln_keys.",
    "group.v_conv.": "group.to_values.",
    "group.proj_o.ln.": "group.ln_out.",
    "group.proj_o.mlp.": "group.mlp.",
    "vis_mae_decoder.": "decoder.",
    "decoder.decoder_": "decoder.",
    "decoder.pred.": "decoder.pixels.",
    **BLOCK_NAMES,
}
TRANSFORMERS_NAMES = {  # of CLIPModel
    "vision_model.": "visual.",
    "text_model.": "",
    "visual_projection.weight": "visual.proj",
    "text_projection.weight": "text_projection",
    "embeddings.patch_embedding.": "conv1.",
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.": "",
    "pre_layrnorm.": "ln_pre.",
    "post_layernorm.": "ln_post.",
    "final_layer_norm.": "ln_final.",
    "encoder.layers.": "transformer.resblocks.",
    **BLOCK_NAMES,
}
DINO_NAMES = {
    "backbone.": "",
    "cls_token": "class_embedding",
    "pos_embed": "positional_embedding",
    "patch_embed.proj.": "conv1.",
    **BLOCK_NAMES,
    "norm.": "ln_post.",
    "blocks.": "transformer.resblocks.",
}
GROUPVIT_NAMES = {  # of NVlabs' checkpoints, and of transformers'
    "logit_scale": "clip.logit_scale",
    "multi_label_clip.": "multi_label_",
    "text_model.encoder.layers.": "clip.transformer.resblocks.",
    "text_model.embeddings.position_embedding.weight": "clip.positional_embedding",
    "text_model.embeddings.": "clip.",
    "text_model.final_layer_norm.": "clip.ln_final.",
    "text_encoder.": "clip.",
    "vision_model.embeddings.position_embeddings": "clip.visual.positional_embedding",
    "vision_model.embeddings.patch_embeddings.projection.": "clip.visual.conv1.",
    "vision_model.embeddings.layernorm.": "clip.visual.ln_pre.",
    "vision_model.encoder.": "clip.visual.",
    "vision_model.layernorm.": "clip.visual.ln_post.",
    "img_encoder.pos_embed": "clip.visual.positional_embedding",
    "img_encoder.patch_embed.proj.": "clip.visual.conv1.",
    "img_encoder.patch_embed.norm.": "clip.visual.ln_pre.",
    "img_encoder.norm.": "clip.visual.ln_post.",
    "img_encoder.layers.": "clip.visual.stages.",
    ".layers.": ".blocks.",
    "img_projector.": "visual_projection.",
    "text_projector.": "text_projection.",
    "_projection.linear_hidden.": "_projection.",
    "_projection.linear_out.": "_projection.3.",
    "visual_projection.": "clip.visual.proj.",
    "text_projection.": "clip.text_projection.",
    ".group_token": ".group_tokens",
    ".group_projector.": ".carry.",
    ".downsample.norm_tokens.": ".grouping.ln_tokens.",
    ".downsample.norm_x.": ".grouping.ln_x.",
    ".downsample.mlp_inter.": ".grouping.mixer.",
    ".downsample.norm_post_tokens.": ".grouping.ln_mixed.",
    ".downsample.pre_assign_attn.norm_post.": ".grouping.ln_queries.",
    ".downsample.pre_assign_attn.": ".grouping.",
    ".downsample.assign.q_proj.": ".grouping.to_queries.",
    ".downsample.assign.k_proj.": ".grouping.to_keys.",
    ".downsample.assign.v_proj.": ".grouping.to_values.",
    ".downsample.assign.proj.": ".grouping.out_proj.",
    ".downsample.norm_new_x.": ".grouping.ln_out.",
    ".downsample.mlp_channels.": ".grouping.mlp_out.",
    **BLOCK_NAMES,
}
SIGNS = {  # part of a name: the first that occurs tells the model
    "visual.stages.": "GroupViT",
    "img_encoder.": "GroupViT",
    "vision_model.encoder.stages.": "GroupViT",
    "semantic_layer2.": "SegCLIP",
    "group.": "SegCLIP",
    "embedder.": "PACL",
    "visual.": "CLIP",
    "patch_embed.": "DINO",
}


def rename(state, names):
    """A state dict with another program's names -> with ours, by such a table."""
    renamed = {}
    for name, tensor in state.items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        renamed[name] = tensor
    return renamed


def part(state, prefix):
    """What a state dict holds under `prefix`, named without it."""
    return {name[len(prefix) :]: state[name] for name in state if name.startswith(prefix)}


def count_layers(state, prefix):
    """How many blocks "<prefix>0.", "<prefix>1.", ... there are."""
    return len({name.split(".")[0] for name in part(state, prefix)})


def from_authors(state):
    """The SegCLIP authors' state dict -> (the same with our names, first_stage_layers)."""
    first = count_layers(state, "clip.visual.transformer.layers0.")
    last = count_layers(state, "clip.visual.transformer.layers2.")
    blocks = {f".layers2.{i}.": f".resblocks.{first + i}." for i in range(last)}
    state = rename(state, blocks | AUTHORS_NAMES)
    state.pop("decoder.pos_embed", None)  # fixed, so computed
    return state, first


def join_qkv(state):
    """The q_proj, k_proj and v_proj of an attention become in_proj, as OpenAI's."""
    joined = {}
    for name, tensor in state.items():
        parts = [regex.sub(r"\.[qkv]_proj\.", f".{part}_proj.", name) for part in "qkv"]
        if parts[0] != parts[1] and all(part in state for part in parts):
            name = parts[0].replace(".q_proj.", ".in_proj_")
            tensor = torch.cat([state[part] for part in parts])
        joined[name] = tensor
    return joined


def from_transformers(state):
    """The state dict of transformers' CLIPModel -> the same as OpenAI's."""
    state = join_qkv(rename(state, TRANSFORMERS_NAMES))
    for name in state.keys() & {"visual.proj", "text_projection"}:
        state[name] = state[name].t()
    return {name: x for name, x in state.items() if not name.endswith("position_ids")}  # fixed


def from_groupvit(state):
    """NVlabs' or transformers' state dict -> the same with our names."""
    state = join_qkv(rename(state, GROUPVIT_NAMES))
    state.pop("clip.position_ids", None)  # of older files of transformers; fixed
    last = count_layers(state, "clip.visual.stages.") - 1
    state = rename(state, {f"visual.stages.{last}.blocks.": "visual.transformer.resblocks."})
    for name, tensor in state.items():
        if "proj" in name and tensor.dim() == 3:
            state[name] = tensor[..., 0]  # a convolution of size 1
        elif name.endswith((".group_tokens", "visual.positional_embedding")):
            state[name] = tensor.squeeze(0)
    return state


def kind_of(state):
    """The model whose parameters have such names: one of SIGNS, or None."""
    return next((kind for sign, kind in SIGNS.items() if any(sign in x for x in state)), None)


def check_kind(state, needed, source):
    kind = kind_of(state)
    if kind not in (needed, None):
        raise InputError(
            f"{source}: a {kind}, where a {needed} is needed; --init takes a CLIP, "
            "--method pacl --image-encoder a DINO"
        )


def groupvit_sizes(state, last):
    """The sizes that only a GroupViT has. last: blocks after its stages. Raises ValueError."""
    tokens = state["visual.stages.0.group_tokens"]
    stages = count_layers(state, "visual.stages.")
    depths = [count_layers(state, f"visual.stages.{s}.blocks.") for s in range(stages)]
    if {*depths[1:], last} != {last}:
        raise ValueError(f"blocks in its stages: {[*depths, last]}")
    groups = state[f"visual.stages.{stages - 1}.grouping.mixer.c_proj.bias"]
    return {
        "vision_layers": sum(depths) + last,
        "first_stage_layers": depths[0],
        "stages": stages,
        "group_tokens": tokens.shape[0],
        "num_centers": groups.shape[0],
        "projector_width": state["visual.proj.0.bias"].shape[0],
    }


def config_from_shapes(kind, state, source, **known):
    """The Config of a model with our names: what its shapes tell, else `known`, else the paper's.

    Raises InputError, also where the model would be far larger than the state dict.
    """
    visual = "" if kind == "DINO" else "visual."
    held = sum(x.numel() for x in state.values())
    state = state | part(state, "clip.")
    try:
        width, _, patch_size, _ = state[f"{visual}conv1.weight"].shape
        side = math.isqrt(state[f"{visual}positional_embedding"].shape[0])  # with a class token's
        layers = count_layers(state, f"{visual}transformer.resblocks.")
        sizes = {
            "image_size": side * patch_size,
            "patch_size": patch_size,
            "vision_width": width,
            "vision_layers": layers,
            "first_stage_layers": known.get("first_stage_layers", layers),
        }
        if kind != "DINO":
            projection = "text_projection.3.bias" if kind == "GroupViT" else "text_projection"
            sizes |= {
                "embed_dim": state[projection].shape[-1],
                "context_length": state["positional_embedding"].shape[0],
                "vocab_size": state["token_embedding.weight"].shape[0],
                "text_width": state["ln_final.weight"].shape[0],
                "text_layers": count_layers(state, "transformer.resblocks."),
            }
        if kind == "GroupViT":
            sizes |= groupvit_sizes(state, layers)
        if kind == "SegCLIP":
            sizes |= {
                "num_centers": state["group.centers"].shape[0],
                "cross_layers": count_layers(state, "group.cross_blocks."),
            }
            if part(state, "decoder."):
                sizes["decoder_layers"] = count_layers(state, "decoder.blocks.")
        config = Config(**known | sizes)
        if max(n for name, n in vars(config).items() if name.endswith("layers")) > 200:
            raise ValueError("more than 200 blocks")
        with torch.device("meta"):  # where nothing is allocated
            models = {"SegCLIP": SegCLIP, "GroupViT": GroupViT, "DINO": DINO}
            model = models.get(kind, CLIP)(config)
        if sum(x.numel() for x in model.parameters()) > 2 * held:
            raise ValueError(f"too few parameters, {held}")
        return config
    except KeyError as error:
        raise InputError(f"{source}: not a {kind} with a ViT: no parameter named {error}") from None
    except (ValueError, IndexError, RuntimeError) as error:
        raise InputError(f"{source}: not the architecture of a {kind} ({error})") from None


def load_strictly(model, state, source, new=()):
    """Load `state`, all of it and nothing else. A whole module of those in `new` may be missing."""
    new = tuple(prefix for prefix in new if not part(state, prefix))
    fresh = {name: value for name, value in model.state_dict().items() if name.startswith(new)}
    try:
        model.load_state_dict(fresh | state)
    except (RuntimeError, IndexError) as error:
        raise InputError(f"{source}: {' '.join(str(error).split())}") from None
    broken = [name for name, x in model.named_parameters() if not x.isfinite().all()]
    if broken:
        raise InputError(f"{source}: has numbers that are not finite, first in {broken[0]}")
    if new:
        names = ", ".join(f"{prefix}*" for prefix in new)
        print(f"{source}: new parameters, not in this file: {names}", file=sys.stderr)
    return model


def read_model(source, activation=None):
    """One of OpenAI's names or a file -> (state dict, what is known of its Config).

    That is all of it in our checkpoints, which must be of this activation. Raises InputError.
    """
    path = Path(fetch(source) if source in MODELS else source)
    state = read_weights(path)
    if isinstance(state.get("config"), Ignored):
        del state["config"]
    known = {"activation": activation} if activation else {}
    if {"config", "model"} <= state.keys():
        types = {field.name: type(field.default) for field in dataclasses.fields(Config)}
        try:
            known = {name: types[name](value) for name, value in state["config"].items()}
            config = Config(**known)
        except Exception as error:  # anything can be in a file
            error = f"{type(error).__name__}: {error}"
            raise InputError(f"{source}: of another version of this project ({error})") from None
        if activation not in (None, config.activation):
            raise InputError(f"{source}: was trained with --activation {config.activation}")
        state = state["model"]
    else:  # from the training of DINO, open_clip or GroupViT
        keys = ("teacher", "state_dict", "model")
        state = next((state[key] for key in keys if key in state), state)
    check_tensors(state, source, path.stat().st_size)
    state = {name.removeprefix("module."): x for name, x in state.items()}
    if any(name.startswith("vision_model.encoder.layers.") for name in state):
        try:
            state = from_transformers(state)
        except RuntimeError as error:
            raise InputError(f"{source}: not the architecture of a CLIP ({error})") from None
    return state, known


def check_tensors(state, source, size):
    """Raises InputError unless these are plain tensors with names, no larger than the file."""
    for name, x in state.items() if isinstance(state, dict) else [(None, None)]:
        if not isinstance(name, str) or not isinstance(x, torch.Tensor):
            raise InputError(f"{source}: not a model's weights, which are tensors with names")
        if x.layout != torch.strided or x.device.type != "cpu" or x.is_quantized:
            raise InputError(f"{source}: {name} is sparse, quantised or on no device")
    if sum(x.numel() * x.element_size() for x in state.values()) > size:
        raise InputError(f"{source}: damaged, its tensors would be larger than it")


def load_clip(name_or_path, activation=None):
    """-> CLIP in float32: one of OpenAI's names ("ViT-B/16"), a file of OpenAI, open_clip or
    transformers, or a checkpoint of `train.py --method clip`. Raises InputError.

    activation: "quick_gelu" or "gelu"; None is our checkpoint's own, else see GELU_WEIGHTS.
    """
    state, known = read_model(name_or_path, activation)
    return clip_from_state(state, name_or_path, **known)


GELU_WEIGHTS = "(?i)laion-?2b|datacomp"  # in a file's name; others are read with QuickGELU


def clip_from_state(state, source, **known):
    check_kind(state, "CLIP", source)
    if "activation" not in known:
        known["activation"] = "gelu" if regex.search(GELU_WEIGHTS, str(source)) else "quick_gelu"
        if source not in MODELS and "input_resolution" not in state:  # not surely OpenAI's
            note = "OpenAI's weights need quick_gelu; LAION-2B's and DataComp's: --activation gelu"
            print(f"{source}: read with {known['activation']}; {note}", file=sys.stderr)
    config = config_from_shapes("CLIP", state, source, **known)
    if config.vision_width > 1024:
        width = f"width {config.vision_width}, whose heads are not 64 wide"
        raise InputError(f"{source}: of {width}; only ViT-B and ViT-L are supported")
    sizes = ("input_resolution", "context_length", "vocab_size")  # in OpenAI's archives
    state = {name.removeprefix("clip."): x for name, x in state.items() if name not in sizes}
    return load_strictly(CLIP(config), state, source)


def load_model(name_or_path, readout="clip", activation=None, dino=None):
    """Any file -> SegCLIP, PACL, GroupViT, or for a CLIP a DenseCLIP with this readout.

    dino: the file of a DINO, for the readout "proxyclip". Raises InputError.
    """
    state, known = read_model(name_or_path, activation)
    kind = kind_of(state)
    if kind not in ("SegCLIP", "PACL", "GroupViT"):
        clip = clip_from_state(state, name_or_path, **known)
        return DenseCLIP(clip, readout, load_dino(dino) if dino else None)
    if readout != "clip" or dino:
        raise InputError(f"{name_or_path}: --readout and --dino are for a CLIP; this is a {kind}")
    if kind == "SegCLIP":
        return segclip_from_state(state, name_or_path, known)
    if kind == "GroupViT":
        return groupvit_from_state(state, name_or_path, known)
    config = config_from_shapes("PACL", state, name_or_path, **known)
    dino = part(state, "dino.")
    dino = DINO(config_from_shapes("DINO", dino, name_or_path)) if dino else None
    return load_strictly(PACL(CLIP(config), dino), state, name_or_path)


def load_segclip(path_or_clip, activation=None, **sizes):
    """-> SegCLIP in float32: our checkpoint, the authors' segclip.bin, or a CLIP to start from.

    To a CLIP (an object, name or file) it adds random weights, and groups before the last two
    blocks, as in the paper. sizes: fields of Config that a CLIP lacks; a SegCLIP takes gumbel_tau
    and mask_ratio and ignores others. Raises InputError.
    """
    source = path_or_clip
    if isinstance(source, CLIP):
        clip = source
        source = "CLIP"
    else:
        state, known = read_model(source, activation)
        if kind_of(state) == "SegCLIP":
            return segclip_from_state(state, source, known, sizes)
        clip = clip_from_state(state, source, **known)
    sizes = {"first_stage_layers": max(clip.config.vision_layers - 2, 0), **sizes}
    state = {f"clip.{name}": tensor for name, tensor in clip.state_dict().items()}
    new = ("group.", "reconstruction_layer.", "reconstruction_blocks.", "decoder.")
    return load_strictly(SegCLIP(dataclasses.replace(clip.config, **sizes)), state, source, new)


def segclip_from_state(state, source, known, sizes=()):
    new = ()
    if "first_stage_layers" not in known:  # not ours
        state, known["first_stage_layers"] = from_authors(state)
        new = ("decoder.",)
    known |= {name: sizes[name] for name in ("gumbel_tau", "mask_ratio") if name in sizes}
    config = config_from_shapes("SegCLIP", state, source, **known)
    return load_strictly(SegCLIP(config), state, source, new)


def groupvit_from_state(state, source, known):
    new = ()
    if "first_stage_layers" not in known:  # not ours
        try:
            state = from_groupvit(state)
        except (RuntimeError, IndexError) as error:
            raise InputError(f"{source}: not the architecture of a GroupViT ({error})") from None
        known["gumbel_tau"] = 1.0
        new = ("multi_label_logit_scale",)  # of training only; transformers' files lack it
    config = config_from_shapes("GroupViT", state, source, **known)
    return load_strictly(GroupViT(config), state, source, new)


def load_dino(path):
    """-> DINO in float32, from dino_vitbase16_pretrain.pth or a teacher. Raises InputError.

    What DINO's training saves also holds a Python object and is refused: save its "teacher" alone.
    """
    if not Path(path).exists():
        raise InputError(f"{path}: no such file; ViT-B/16 is at {DINO_ADDRESS}, ViT-B/8 likewise")
    state, _ = read_model(path)
    check_kind(state, "DINO", path)
    state = rename(state, DINO_NAMES)
    state = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
    for name in state.keys() & {"class_embedding", "positional_embedding"}:
        state[name] = state[name].squeeze()  # [1, 1, D] -> [D], [1, 1 + N, D] -> [1 + N, D]
    return load_strictly(DINO(config_from_shapes("DINO", state, path)), state, path)
