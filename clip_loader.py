"""From bytes, on disk or on the web, to a tokenizer, weights and models.

Four kinds of checkpoint are read: OpenAI's CLIP archives, the SegCLIP authors' release, DINO's, and our own. All of them
are data to us: nothing that a file holds is ever executed as Python.
"""

import argparse
import dataclasses
import gzip
import hashlib
import html
import http.client
import math
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import traceback
import urllib.request
import warnings
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import ftfy
import regex
import torch
import torch.distributed as dist

from model import CLIP, DINO, PACL, Config, DenseCLIP, SegCLIP


class InputError(Exception):
    """Something that the user gave cannot be used. The message is one line: what is wrong, in which file, what to do."""


def first_line(error):
    """What an error of a library says, without the pages that some say."""
    return (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0][:150]


# ---------------------------------------------------------------------------------------------------------------------
# Byte-level BPE
#
# A text becomes tokens in three steps. Take "Two naïve cats!":
#   1. Clean it (mend broken Unicode, collapse spaces, lower-case) and cut it into words and runs of punctuation with one
#      regular expression: "two", "naïve", "cats", "!".
#   2. Write each word as its UTF-8 bytes: "naïve" is n a c3 af v e. There are only 256 bytes, so no text in any language
#      is unknown. To print them, each byte gets a letter of its own (c3 is "Ã", af is "¯"), and the last one of a word is
#      marked with "</w>": n a Ã ¯ v e</w>. The 256 letters with and without the mark are the first 512 tokens.
#   3. Merge. The vocabulary is a list of pairs, most frequent in its training text first: "i n", "t h", "a n", ...
#      In each word, the adjacent pair that stands earliest in the list is joined, again and again until none is in it:
#      c a t s</w> -> c at s</w> -> cat s</w> -> cats</w>. Each pair adds one token, so frequent words become a single
#      one and rare words a few pieces. Two special tokens, start and end of text, come last.


def byte_letters():
    """A printable letter for each of the 256 bytes: itself where it prints, else one from U+0100 upwards."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def merge_pair(symbols, pair):
    """("c", "a", "t", "s</w>") with the pair ("a", "t") -> ("c", "at", "s</w>")."""
    merged, i = [], 0
    while i < len(symbols):
        if symbols[i : i + 2] == pair:
            merged.append(symbols[i] + symbols[i + 1])
            i += 2
        else:
            merged.append(symbols[i])
            i += 1
    return tuple(merged)


class Tokenizer:
    """CLIP's byte-level BPE tokenizer. `merges` is the vocabulary: strings "left right", most frequent pair first."""

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
        self.rank = {pair: i for i, pair in enumerate(pairs)}
        letters = list(self.letters.values())
        tokens = letters + [x + "</w>" for x in letters] + ["".join(pair) for pair in pairs] + [self.START, self.END]
        self.ids = {token: i for i, token in enumerate(tokens)}
        self.vocab_size = len(tokens)
        self.start, self.end = self.ids[self.START], self.ids[self.END]
        self.cache = {self.START: [self.start], self.END: [self.end]}  # captions repeat their words

    @classmethod
    def from_file(cls, path):
        """OpenAI's vocabulary file: a header, the merges, and after those more lines that CLIP does not use."""
        try:
            lines = gzip.decompress(Path(path).read_bytes()).decode().split("\n")
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise InputError(f"{path}: not a BPE vocabulary ({error}); {VOCABULARY_ADVICE}") from None
        return cls(lines[1 : 49152 - 256 - 2 + 1])

    @classmethod
    def learn(cls, texts, num_merges):
        """Find the merges in your own texts: join the most frequent pair of neighbours, num_merges times."""
        blank = cls()
        words = Counter(word for text in texts for word in blank.words(text))
        words = {blank.symbols(word): count for word, count in words.items()}
        merges = []
        while len(merges) < num_merges:
            pairs = Counter()
            for symbols, count in words.items():
                for pair in zip(symbols, symbols[1:]):
                    pairs[pair] += count
            if not pairs:  # every word is one token already
                break
            best = min(pairs, key=lambda pair: (-pairs[pair], pair))
            merges.append(" ".join(best))
            words = {merge_pair(symbols, best): count for symbols, count in words.items()}
        return cls(merges)

    def words(self, text):
        text = html.unescape(html.unescape(ftfy.fix_text(text)))  # twice, as OpenAI: the web has "&amp;lt;"
        text = " ".join(text.split()).lower()
        return self.WORDS.findall(text)

    def symbols(self, word):
        letters = [self.letters[byte] for byte in word.encode()]
        return (*letters[:-1], letters[-1] + "</w>")

    def pieces(self, word):
        """One word -> its tokens' ids."""
        if word in self.cache:
            return self.cache[word]
        symbols = self.symbols(word)
        while len(symbols) > 1:
            best = min(zip(symbols, symbols[1:]), key=lambda pair: self.rank.get(pair, math.inf))
            if best not in self.rank:
                break
            symbols = merge_pair(symbols, best)
        if len(self.cache) > 100_000:  # the web has words without end
            self.cache = {token: self.cache[token] for token in (self.START, self.END)}
        self.cache[word] = [self.ids[symbol] for symbol in symbols]
        return self.cache[word]

    def encode(self, text):
        """str -> list of token ids, without start and end."""
        return [token for word in self.words(text) for token in self.pieces(word)]

    def __call__(self, texts, context_length=77):
        """str or list of n strings -> LongTensor [n, context_length]: start, tokens, end, then zeros.

        A text that is too long is cut, and its last token is still the end token: CLIP reads the text's feature there.
        """
        texts = [texts] if isinstance(texts, str) else texts
        result = torch.zeros(len(texts), context_length, dtype=torch.long)
        for row, text in zip(result, texts):
            tokens = [self.start, *self.encode(text)][: context_length - 1] + [self.end]
            row[: len(tokens)] = torch.tensor(tokens)
        return result


# ---------------------------------------------------------------------------------------------------------------------
# The cache and the web

VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
DOWNLOADS = {  # name: (SHA-256, file name, address)
    VOCABULARY: (
        "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a",
        VOCABULARY,
        f"https://github.com/openai/CLIP/raw/main/clip/{VOCABULARY}",
    )
}
for _name, _sha256 in {
    "ViT-B/32": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    "ViT-B/16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    "ViT-L/14": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    "ViT-L/14@336px": "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
}.items():
    _file = _name.replace("/", "-").replace("@", "-") + ".pt"
    DOWNLOADS[_name] = _sha256, _file, f"https://openaipublic.azureedge.net/clip/models/{_sha256}/{_file}"
DINO_ADDRESS = "https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth"
MODELS = [name for name in DOWNLOADS if name != VOCABULARY]
VOCABULARY_ADVICE = f"get it from {DOWNLOADS[VOCABULARY][2]} and point to it with --vocabulary FILE"


def cache_dir():
    """$CLIP_CACHE, else ~/.cache/clip, where OpenAI's package keeps the same files."""
    return Path(os.environ.get("CLIP_CACHE") or Path.home() / ".cache" / "clip")


def sha256_of(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def fetch(name):
    """The path of a file of DOWNLOADS in the cache; downloaded if it is not there, and always checked."""
    sha256, file, url = DOWNLOADS[name]
    path = cache_dir() / file
    if path.is_file():
        if sha256_of(path) == sha256:
            return path
        print(f"{path}: wrong checksum, downloading it again", file=sys.stderr)
    partial = path.with_name(f"{file}.{os.getpid()}.part")  # several processes may start at once
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=30) as response, open(partial, "wb") as out:
            total = int(response.headers.get("Content-Length") or 0)
            while chunk := response.read(1 << 20):
                out.write(chunk)
                print(f"\r{file}: {out.tell() >> 20} of {total >> 20} MiB", end="", file=sys.stderr)
        print(file=sys.stderr)
        if sha256_of(partial) != sha256:
            raise OSError("the download's SHA-256 is wrong")
        os.replace(partial, path)
    except (OSError, http.client.HTTPException) as error:
        raise InputError(f"{path}: not there, and {url} could not be fetched ({error}); put it there by hand") from None
    finally:
        partial.unlink(missing_ok=True)
    return path


def load_tokenizer(checkpoint=None, vocabulary=None):
    """The tokenizer that a checkpoint was trained with: its own merges where it has some, else OpenAI's vocabulary.

    `vocabulary` is a file to use in place of the cache and the download. Raises InputError if there is none.
    """
    merges = None if checkpoint is None else read_weights(checkpoint).get("merges")
    if merges is not None:
        return Tokenizer(merges)
    if vocabulary is None:
        try:
            vocabulary = fetch(VOCABULARY)
        except InputError as error:
            raise InputError(f"{error}, or point to it with --vocabulary FILE") from None
    return Tokenizer.from_file(vocabulary)


# ---------------------------------------------------------------------------------------------------------------------
# Weights


class Attributes:
    """Stands in for any class of a TorchScript archive: keeps what it holds, does nothing."""

    def __setstate__(self, state):
        vars(self).update(state)


class TorchScriptReader(pickle.Unpickler):
    """The tensors of a TorchScript archive. torch.jit.load would give them too, but it runs code that is in the file.

    An archive is a zip: data.pkl, the tree of modules, in which each tensor refers to a file of raw numbers under data/.
    Only what is listed in find_class is ever called.
    """

    def __init__(self, path):
        self.archive = zipfile.ZipFile(path)
        self.root = next(n for n in self.archive.namelist() if n.endswith("/data.pkl")).removesuffix("data.pkl")
        super().__init__(self.archive.open(self.root + "data.pkl"))

    def find_class(self, module, name):
        if module.startswith("__torch__"):
            return Attributes
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return torch._utils._rebuild_tensor_v2
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch.jit._pickle":  # lists of numbers and the like
            return lambda values, *_: values
        if module == "torch" and name.endswith("Storage"):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"Unsupported global {module}.{name}")

    def persistent_load(self, reference):
        _, kind, key, _, _ = reference
        numbers = torch.frombuffer(bytearray(self.archive.read(f"{self.root}data/{key}")), dtype=torch.uint8)
        return torch.storage.TypedStorage(wrap_storage=numbers.untyped_storage(), dtype=kind.dtype, _internal=True)

    def state_dict(self):
        def collect(module, prefix):
            for name, value in vars(module).items():
                if isinstance(value, torch.Tensor):
                    yield prefix + name, value
                elif isinstance(value, Attributes):
                    yield from collect(value, f"{prefix}{name}.")

        return dict(collect(self.load(), ""))


def read_weights(path):
    """A state dict or a checkpoint dictionary from a TorchScript archive or a torch.save file, on the CPU.

    Raises InputError for a file that is missing, truncated, or would need Python code to be run.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: is a folder, not a checkpoint")
    if not path.is_file():
        raise InputError(f"{path}: no such file, and no model of this name; there are {', '.join(MODELS)}")
    is_pickle = False
    try:
        with open(path, "rb") as file:
            head = file.read(2)
        is_zip, is_pickle = head == b"PK", head[:1] == b"\x80"
        if is_zip and not zipfile.is_zipfile(path):
            raise EOFError("the file is cut off")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if is_zip and any(name.endswith("/constants.pkl") for name in zipfile.ZipFile(path).namelist()):
                return TorchScriptReader(path).state_dict()
            # Mapped, not read: the tensors that nobody asks for (an optimiser's, say) cost nothing.
            weights = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # a damaged file can make the reader fail in any way
        if "Unsupported global" in str(error) or is_pickle and "Unsupported" in str(error):
            raise InputError(f"{path}: refused, it holds Python objects that could run code; save tensors only") from None
        reason = f" ({first_line(error)})" if isinstance(error, (OSError, EOFError)) else ""
        raise InputError(f"{path}: not a checkpoint, or a damaged one{reason}; download or copy it again") from None
    if not isinstance(weights, dict):
        raise InputError(f"{path}: holds a {type(weights).__name__}, not a dictionary of weights")
    return weights


def load_strictly(model, state, source, new=()):
    """Load `state`, all of it and nothing else; parameters whose names start with `new` may be missing, as a whole."""
    own = model.state_dict()
    new = tuple(prefix for prefix in new if not any(name.startswith(prefix) for name in state))
    fresh = {name for name in own if new and name.startswith(new)}
    faults = [f"missing {name}" for name in own if name not in state and name not in fresh]
    for name, tensor in state.items():
        if name not in own:
            faults.append(f"unexpected {name}")
        elif not isinstance(tensor, torch.Tensor):
            faults.append(f"{name} is no tensor")
        elif tensor.shape != own[name].shape:
            faults.append(f"{name} is {list(tensor.shape)}, not {list(own[name].shape)}")
    if faults:
        raise InputError(f"{source}: not the weights of this architecture: {'; '.join(faults)}")
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, strict=not fresh)
    if fresh:
        print(f"{source}: new parameters, not in this file: {', '.join(x + '*' for x in new)}", file=sys.stderr)
    return model


def count_layers(state, prefix):
    """How many blocks "<prefix>0.", "<prefix>1.", ... the state dict holds."""
    return len({name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)})


def vision_sizes(state, prefix):
    """The sizes of an image encoder, from the shapes in a state dict with OpenAI's names."""
    width, _, patch_size, _ = state[f"{prefix}conv1.weight"].shape
    num_positions = state[f"{prefix}positional_embedding"].shape[0]
    return {
        "image_size": patch_size * math.isqrt(num_positions - 1),
        "patch_size": patch_size,
        "vision_width": width,
        "vision_layers": count_layers(state, f"{prefix}transformer.resblocks."),
    }


def clip_config(state, source, activation=None):
    """The architecture, from the shapes in a state dict with OpenAI's names. Raises InputError.

    No shape tells the activation or the number of heads. OpenAI's archives name their sizes, and so can be told from
    those of others, which may have been trained with GELU; of those it is said how they are read.
    """
    if "visual.layer1.0.conv1.weight" in state:
        raise InputError(f"{source}: a CLIP with a ResNet; only those with a ViT are supported")
    try:
        sizes = vision_sizes(state, "visual.")
        if sizes["vision_width"] > 1024:
            raise InputError(
                f"{source}: a CLIP of width {sizes['vision_width']}, whose heads are not 64 wide as OpenAI's are (ViT-H/14 has "
                "80); only ViT-B and ViT-L are supported"
            )
        if activation is None and "input_resolution" not in state and source not in DOWNLOADS:
            print(
                f"{source}: read with QuickGELU, as OpenAI's weights were trained; for LAION's or DataComp's: --activation gelu",
                file=sys.stderr,
            )
        return Config(
            **sizes,
            activation=activation or "quick_gelu",
            embed_dim=state["text_projection"].shape[1],
            context_length=state["positional_embedding"].shape[0],
            vocab_size=state["token_embedding.weight"].shape[0],
            text_width=state["ln_final.weight"].shape[0],
            text_layers=count_layers(state, "transformer.resblocks."),
            first_stage_layers=sizes["vision_layers"],  # there is no group module
        )
    except KeyError as error:
        raise InputError(f"{source}: not a CLIP: no parameter named {error}") from None
    except (ValueError, IndexError, AttributeError) as error:
        raise InputError(f"{source}: not the architecture of a CLIP ({error})") from None


def read_model(name_or_path):
    """-> the weights in the file of one of OpenAI's models ("ViT-B/16"), or in any other; and the Config, if it is a
    checkpoint of ours, else None. Raises InputError."""
    state, config = read_weights(fetch(name_or_path) if name_or_path in DOWNLOADS else name_or_path), None
    if {"config", "model"} <= state.keys():
        try:
            state, config = state["model"], Config(**state["config"])
        except (TypeError, ValueError) as error:
            raise InputError(f"{name_or_path}: made by another version of this project ({error})") from None
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise InputError(f"{name_or_path}: not a checkpoint: it has no parameters with names")
    return state, config


def is_segclip(state):
    """Whether there is a semantic group module, by our name or by the authors'."""
    return any(name.startswith(("group.", "clip.visual.transformer.semantic_layer2.")) for name in state)


def is_pacl(state):
    return "embedder.skip.weight" in state


def load_clip(name_or_path, activation=None):
    """-> CLIP in float32: one of OpenAI's by name ("ViT-B/16"), or from a file: their TorchScript archive, a state dict, or
    a checkpoint of `train.py --method clip`. Raises InputError.

    activation: "quick_gelu" or "gelu", for a state dict that is not OpenAI's archive; None is "quick_gelu", and says so.
    """
    state, config = read_model(name_or_path)
    return clip_from_state(state, name_or_path, config, activation)


def clip_from_state(state, source, config=None, activation=None):
    if is_segclip(state):
        raise InputError(f"{source}: a SegCLIP, where a CLIP is needed")
    if is_pacl(state):
        raise InputError(f"{source}: a PACL, where a CLIP is needed")
    if is_dino(state):
        raise InputError(f"{source}: a DINO, where a CLIP is needed; a DINO is for train.py --method pacl --image-encoder")
    if config:
        state = {name.removeprefix("clip."): tensor for name, tensor in state.items()}
    config = check_activation(config, activation, source) if config else clip_config(state, source, activation)
    sizes = ("input_resolution", "context_length", "vocab_size")  # in OpenAI's archives; the shapes tell the same
    state = {name: tensor for name, tensor in state.items() if name not in sizes}
    return load_strictly(CLIP(config), state, source)


def check_activation(config, activation, source):
    """The Config of a checkpoint, unless another activation was asked for: then InputError."""
    if activation not in (None, config.activation):
        raise InputError(f"{source}: was trained with --activation {config.activation}")
    return config


# The names in the blocks of a ViT that comes from timm, as MAE's decoder and DINO do, and ours.
TIMM_NAMES = [
    (r"^((?:decoder\.)?blocks\.\d+)\.norm(\d)\.", r"\1.ln_\2."),
    (r"^((?:decoder\.)?blocks\.\d+)\.attn\.qkv\.", r"\1.attn.in_proj_"),
    (r"^((?:decoder\.)?blocks\.\d+)\.attn\.proj\.", r"\1.attn.out_proj."),
    (r"^((?:decoder\.)?blocks\.\d+)\.mlp\.fc1\.", r"\1.mlp.c_fc."),
    (r"^((?:decoder\.)?blocks\.\d+)\.mlp\.fc2\.", r"\1.mlp.c_proj."),
]
# The authors' names and ours, in the order in which they are replaced.
AUTHORS_NAMES = [
    (r"^clip\.visual\.transformer\.layers0\.", r"clip.visual.transformer.resblocks."),
    (r"^clip\.visual\.transformer\.layers_mae2\.", r"reconstruction_blocks."),
    (r"^clip\.visual\.transformer\.reconstruct_layer2\.rec_proj_a\.a_fc", r"reconstruction_layer.linear"),
    (r"^clip\.visual\.transformer\.semantic_layer2\.", r"group."),
    (r"^group\.semantic_center$", r"group.centers"),
    (r"^group\.cross_att\.", r"group.cross_blocks."),
    (r"^group\.cross_ln\.", r"group.ln_centers."),
    (r"^group\.norm\.", r"group.ln_patches."),
    (r"^group\.k_conv\.", r"group.to_keys."),
    (r"^group\.k_ln\.", r"group.ln_keys."),
    (r"^group\.v_conv\.", r"group.to_values."),
    (r"^group\.proj_o\.ln\.", r"group.ln_out."),
    (r"^group\.proj_o\.mlp\.fc1\.", r"group.mlp.c_fc."),
    (r"^group\.proj_o\.mlp\.fc2\.", r"group.mlp.c_proj."),
    (r"^vis_mae_decoder\.(decoder_)?", r"decoder."),
    (r"^decoder\.pred\.", r"decoder.pixels."),
    *TIMM_NAMES,
]
DINO_NAMES = [  # likewise
    (r"^(module\.)?(backbone\.)?", r""),  # of a whole teacher
    (r"^cls_token$", r"class_embedding"),
    (r"^pos_embed$", r"positional_embedding"),
    (r"^patch_embed\.proj\.", r"conv1."),
    (r"^norm\.", r"ln_post."),
    *TIMM_NAMES,
    (r"^blocks\.", r"transformer.resblocks."),
]


def rename(name, names):
    for pattern, replacement in names:
        name = regex.sub(pattern, replacement, name)
    return name


def from_authors(state):
    """The SegCLIP authors' state dict under our names; their fixed position table, which we compute, is dropped."""
    first_stage = count_layers(state, "clip.visual.transformer.layers0.")
    renamed = {}
    for name, tensor in state.items():
        if name == "vis_mae_decoder.decoder_pos_embed":
            continue
        if match := regex.match(r"clip\.visual\.transformer\.layers2\.(\d+)\.", name):
            name = f"clip.visual.transformer.resblocks.{first_stage + int(match[1])}.{name[match.end() :]}"
        renamed[rename(name, AUTHORS_NAMES)] = tensor
    return renamed, first_stage


def segclip_config(state, first_stage_layers, source):
    """The architecture, from the shapes in a SegCLIP state dict; what no shape tells keeps the paper's value."""
    clip = {name.removeprefix("clip."): tensor for name, tensor in state.items() if name.startswith("clip.")}
    if "group.centers" not in state:
        raise InputError(f"{source}: not a whole SegCLIP: its group module has no centers")
    return dataclasses.replace(
        clip_config(clip, source, "quick_gelu"),  # the authors start from OpenAI's weights
        first_stage_layers=first_stage_layers,
        num_centers=state["group.centers"].shape[0],
        cross_layers=count_layers(state, "group.cross_blocks."),
        decoder_layers=count_layers(state, "decoder.blocks.") or Config.decoder_layers,
    )


def load_model(name_or_path, readout="clip", activation=None):
    """What can label pictures, from any file: a SegCLIP, a PACL, or a CLIP, read by `readout`. Raises InputError.

    activation: as in load_clip, of a CLIP.
    """
    state, config = read_model(name_or_path)
    if not is_segclip(state) and not is_pacl(state):
        return DenseCLIP(clip_from_state(state, name_or_path, config, activation), readout)
    if config:
        check_activation(config, activation, name_or_path)
    if readout != "clip":
        raise InputError(
            f"{name_or_path}: --readout {readout} is for a CLIP, and this is a {'PACL' if is_pacl(state) else 'SegCLIP'}"
        )
    if is_pacl(state):
        dino = {name.removeprefix("dino."): tensor for name, tensor in state.items() if name.startswith("dino.")}
        return load_strictly(PACL(CLIP(config), dino_of(dino, name_or_path) if dino else None), state, name_or_path)
    return segclip_from_state(state, name_or_path, config)


def load_segclip(path_or_clip, activation=None, **sizes):
    """-> SegCLIP in float32, from our checkpoint, the authors' segclip.bin (with or without its decoder), or a CLIP.

    A CLIP (the object, one of OpenAI's names, or a file) is something to start training from: what SegCLIP adds to it is
    new, at random, and goes before its last two blocks, as in the paper (in a CLIP of one or two blocks, before the first).
    sizes: fields of Config for what the weights do not decide: all that SegCLIP adds to a CLIP; gumbel_tau and mask_ratio
        of a SegCLIP (others are ignored). Raises InputError.
    """
    if isinstance(path_or_clip, CLIP):
        return segclip_from_clip(path_or_clip, "CLIP", sizes)
    state, config = read_model(path_or_clip)
    if is_segclip(state):
        return segclip_from_state(state, path_or_clip, config, sizes)
    return segclip_from_clip(clip_from_state(state, path_or_clip, config, activation), path_or_clip, sizes)


def segclip_from_state(state, source, config=None, sizes=()):
    free = {name: sizes[name] for name in ("gumbel_tau", "mask_ratio") if name in sizes}
    if config:
        return load_strictly(SegCLIP(dataclasses.replace(config, **free)), state, source)
    state, first_stage_layers = from_authors(state)
    model = SegCLIP(dataclasses.replace(segclip_config(state, first_stage_layers, source), **free))
    return load_strictly(model, state, source, new=["decoder."])


def segclip_from_clip(clip, source, sizes):
    sizes = {"first_stage_layers": max(clip.config.vision_layers - 2, 0), **sizes}
    state = {f"clip.{name}": tensor for name, tensor in clip.state_dict().items()}
    new = ["group.", "reconstruction_layer.", "reconstruction_blocks.", "decoder."]
    return load_strictly(SegCLIP(dataclasses.replace(clip.config, **sizes)), state, source, new)


def is_dino(state):
    """Whether these are weights of DINO by its own names, or its training's dictionary of student and teacher."""
    return any(str(name).endswith("patch_embed.proj.weight") for name in (*state, *dino_teacher(state)))


def dino_teacher(state):
    return state["teacher"] if isinstance(state.get("teacher"), dict) else state


def dino_of(state, source):
    """A DINO of the sizes that the shapes in a state dict with our names have; its weights are not loaded."""
    try:
        return DINO(Config(**vision_sizes(state, ""), first_stage_layers=0))
    except KeyError as error:
        raise InputError(f"{source}: not a DINO: no parameter named {error}") from None
    except (ValueError, IndexError, AttributeError) as error:
        raise InputError(f"{source}: not the architecture of a DINO ({error})") from None


def load_dino(path):
    """-> DINO in float32, from the state dict that its authors publish, dino_vitbase16_pretrain.pth, or one of a teacher with
    its head. No checksum of them is published, so there is no name to fetch it by. Raises InputError.

    (What DINO's training saves holds its flags as a Python object, and is refused; save its "teacher" alone.)
    """
    if not Path(path).exists():
        raise InputError(f"{path}: no such file; DINO ViT-B/16 is at {DINO_ADDRESS}")
    state, config = read_model(path)
    if config or any(name.startswith(("visual.", "clip.")) for name in state):
        raise InputError(f"{path}: a CLIP, or made of one, where a DINO is needed; a CLIP is for --init")
    if not is_dino(state):
        raise InputError(f"{path}: not a DINO: no parameter named patch_embed.proj.weight; it is at {DINO_ADDRESS}")
    renamed = {}
    for name, tensor in dino_teacher(state).items():
        name = rename(str(name), DINO_NAMES)
        if name in ("class_embedding", "positional_embedding") and isinstance(tensor, torch.Tensor):
            tensor = tensor.squeeze()  # [1, 1, D] -> [D], [1, 1 + N, D] -> [1 + N, D]
        if not name.startswith("head."):
            renamed[name] = tensor
    return load_strictly(dino_of(renamed, path), renamed, path)


def save_checkpoint(path, model, keep=1, **others):
    """Write a checkpoint that load_model reads. Atomic: `path` holds the old one or the new one, never a part.

    The `keep` last ones are kept: checkpoint.pt, before it checkpoint.1.pt, and so on.
    `others` are entries beside the model's: tensors, numbers, strings, lists and dictionaries of those.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    with open(partial, "wb") as file:
        torch.save({"model": model.state_dict(), "config": dataclasses.asdict(model.config), **others}, file)
        file.flush()
        os.fsync(file.fileno())  # so that the name never comes to the disk before the numbers
    for i in range(keep - 1, 1, -1):
        if numbered(path, i - 1).exists():
            os.replace(numbered(path, i - 1), numbered(path, i))
    if keep > 1 and zipfile.is_zipfile(path):  # and not one that was cut off
        second = path.with_name(path.name + ".link")
        second.unlink(missing_ok=True)
        try:
            os.link(path, second)
        except OSError:  # a disk without links
            second = path
        os.replace(second, numbered(path, 1))
    os.replace(partial, path)


def numbered(path, i):
    """checkpoint.pt, checkpoint.1.pt, checkpoint.2.pt, ...: the newest first."""
    return path.with_suffix(f".{i}{path.suffix}") if i else path


def last_checkpoint(path):
    """The newest of the numbered checkpoints that can be read -> (its content, its path), or (None, None) if there is none.

    Raises InputError if there are some, but all are damaged.
    """
    damage = None
    for candidate in filter(Path.exists, (numbered(path, i) for i in range(1000))):
        try:
            return read_weights(candidate), candidate
        except InputError as error:
            damage = error
            print(f"{error}; trying the one before it", file=sys.stderr)
    if damage:
        raise damage
    return None, None


# ---------------------------------------------------------------------------------------------------------------------
# What every program does


def pick_device(name):
    """ "cpu", "cuda", "cuda:1", ... -> torch.device; None takes the GPU if there is one. Raises InputError."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        return device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: not available here ({first_line(error)})") from None


def start_processes(device_name):
    """-> (rank, world size, device): one process, or as many as torchrun started, joined to a group. Raises InputError."""
    torch.backends.cudnn.allow_tf32 = False  # fp32 is fp32 on GPUs, too
    rank, world, device = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), pick_device(device_name)
    if world > 1:
        if device.type == "cuda":
            device = pick_device(f"cuda:{os.environ['LOCAL_RANK']}")
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return rank, world, device


def run_program(main, if_interrupted):
    """The whole of a program: main(), what stopped it in one line, and the end of this process."""
    program, complaint = Path(sys.argv[0]).name, None
    try:
        main()
    except InputError as error:
        complaint = f"{program}: {error}"
    except KeyboardInterrupt:
        complaint = f"{program}: {if_interrupted}"
    except Exception:
        if not dist.is_initialized():
            raise
        complaint = traceback.format_exc().rstrip()
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # or torch would complain of their end
        for worker in multiprocessing.active_children():  # of a DataLoader that an error has left; see data.ignore_signals
            worker.kill()
    if not dist.is_initialized():
        sys.exit(complaint)
    # One of several processes leaves at once, without the usual clearing up. That ends gloo's threads while it holds Python's
    # lock, and a thread which has yet to let go of a tensor of ours needs that lock: both wait for ever (torch 2.4 to 2.13).
    if complaint:
        print(complaint, file=sys.stderr)
    else:
        dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1 if complaint else 0)


class ManualPage(argparse.RawDescriptionHelpFormatter):
    """--help in at most 100 columns, with the commands of the description as they are written."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=26, width=min(100, shutil.get_terminal_size().columns))


def git_revision():
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def make_folder(path):
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be made a folder ({error})") from None
