"""From files, on disk or on the web, to a tokenizer, weights and models.

Files are data: nothing that one holds is ever executed.
"""

import dataclasses
import functools
import gzip
import hashlib
import html
import math
import os
import pickle
import sys
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
            lines = gzip.decompress(Path(path).read_bytes()).decode().split("\n")
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise InputError(
                f"{path}: not a BPE vocabulary ({error}); get it from {DOWNLOADS[VOCABULARY][2]} "
                "and point to it with --vocabulary FILE"
            ) from None
        return cls(lines[1 : 49152 - 256 - 2 + 1])

    @classmethod
    def learn(cls, texts, num_merges):
        """Learn merges from texts: join the most frequent pair of neighbours, num_merges times."""
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

    def encode(self, text):
        """str -> list of token ids, without start and end."""
        return [token for word in self.words(text) for token in self.pieces(word)]

    def __call__(self, texts, context_length=77):
        """str or list of n strings -> LongTensor [n, context_length]: start, tokens, end, zeros.

        A text that is too long is cut, and its last token is still the end token: CLIP reads the
        feature of the text there.
        """
        texts = [texts] if isinstance(texts, str) else texts
        result = torch.zeros(len(texts), context_length, dtype=torch.long)
        for row, text in zip(result, texts):
            tokens = [self.start, *self.encode(text)][: context_length - 1] + [self.end]
            row[: len(tokens)] = torch.tensor(tokens)
        return result


# --------------------------------------------------------------------------------------------------
# The cache and the web

VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
DOWNLOADS = {  # name: (SHA-256, file name, address)
    VOCABULARY: (
        "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a",
        VOCABULARY,
        f"https://github.com/openai/CLIP/raw/main/clip/{VOCABULARY}",
    )
}
MODELS = {  # OpenAI's CLIPs: name: SHA-256
    "ViT-B/32": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    "ViT-B/16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    "ViT-L/14": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    "ViT-L/14@336px": "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
}
for _name, _sha256 in MODELS.items():
    _file = regex.sub("[/@]", "-", _name) + ".pt"
    _url = f"https://openaipublic.azureedge.net/clip/models/{_sha256}/{_file}"
    DOWNLOADS[_name] = (_sha256, _file, _url)
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


def fetch(name):
    """The path of a file of DOWNLOADS in the cache: downloaded if needed, its SHA-256 verified."""
    sha256, file, url = DOWNLOADS[name]
    path = cache_dir() / file
    if path.is_file():
        if sha256_of(path) == sha256:
            return path
        print(f"{path}: wrong SHA-256, downloading it again", file=sys.stderr)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)
    except (OSError, HTTPException, RuntimeError) as error:
        raise InputError(
            f"{path}: no valid file, and none from {url} ({error}); put it there by hand, or give "
            "--vocabulary FILE, --init FILE or --checkpoint FILE"
        ) from None
    return path


def load_tokenizer(checkpoint=None, vocabulary=None):
    """A checkpoint's own Tokenizer, else a vocabulary file's, else OpenAI's. Raises InputError."""
    merges = None if checkpoint is None else read_weights(checkpoint).get("merges")
    if merges is not None:
        return Tokenizer(merges)
    return Tokenizer.from_file(vocabulary or fetch(VOCABULARY))


# --------------------------------------------------------------------------------------------------
# Files of weights


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

    def __init__(self, path):
        self.archive = zipfile.ZipFile(path)
        tree = next(name for name in self.archive.namelist() if name.endswith("/data.pkl"))
        self.folder = tree.removesuffix(".pkl")
        super().__init__(self.archive.open(tree))

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
        raise pickle.UnpicklingError(f"Unsupported global {module}.{name}")

    def persistent_load(self, reference):
        _, dtype, key, *_ = reference
        return torch.frombuffer(bytearray(self.archive.read(f"{self.folder}/{key}")), dtype=dtype)

    def state_dict(self):
        def collect(module, prefix):
            for name, value in vars(module).items():
                if isinstance(value, torch.Tensor):
                    yield prefix + name, value
                elif isinstance(value, Module):
                    yield from collect(value, f"{prefix}{name}.")

        return dict(collect(self.load(), ""))


def read_weights(path):
    """A torch.save file or TorchScript archive -> its state dict or checkpoint dictionary, on CPU.

    Raises InputError for a file that is missing, damaged, or would need Python code to be run.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: neither a file nor one of the models {', '.join(MODELS)}")
    try:
        is_zip = zipfile.is_zipfile(path)
        files = zipfile.ZipFile(path).namelist() if is_zip else []
        if any(name.endswith("/constants.pkl") for name in files):
            return TorchScriptReader(path).state_dict()
        allow_omegaconf()
        # Mapped, so that tensors that are not used (an optimiser's) cost nothing.
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # damage can raise anything
        problem = "not a checkpoint, or a damaged one; download or copy it again"
        # Operand 149 is in every pickle of a newer protocol than torch.save's.
        if regex.search("(?i)unsupported (global|operand 149)", str(error)):
            problem = "refused, it holds Python objects that could run code; save tensors only"
        elif isinstance(error, OSError):
            problem = error
        raise InputError(f"{path}: {problem}") from None
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
    with open(partial, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())  # the content must reach the disk before the name does
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
TIMM_NAMES = {  # in the blocks of MAE's decoder and of DINO
    ".norm1.": ".ln_1.",
    ".norm2.": ".ln_2.",
    ".attn.qkv.": ".attn.in_proj_",
    ".attn.proj.": ".attn.out_proj.",
    ".mlp.fc1.": ".mlp.c_fc.",
    ".mlp.fc2.": ".mlp.c_proj.",
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
    **TIMM_NAMES,
}
DINO_NAMES = {
    "module.": "",
    "backbone.": "",
    "cls_token": "class_embedding",
    "pos_embed": "positional_embedding",
    "patch_embed.proj.": "conv1.",
    **TIMM_NAMES,
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
    ".self_attn.": ".attn.",
    ".layer_norm": ".ln_",
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
    **TIMM_NAMES,
    ".fc1.": ".c_fc.",
    ".fc2.": ".c_proj.",
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


def config_from_shapes(kind, state, source, **known):
    """The Config of a model with our names: `known`, what its shapes tell, else the paper's."""
    visual = "" if kind == "DINO" else "visual."
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
            "first_stage_layers": layers,
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
            tokens = state["visual.stages.0.group_tokens"]
            stages = count_layers(state, "visual.stages.")
            depths = [count_layers(state, f"visual.stages.{s}.blocks.") for s in range(stages)]
            if {*depths[1:], layers} != {layers}:
                raise ValueError(f"blocks in its stages: {[*depths, layers]}")
            groups = state[f"visual.stages.{stages - 1}.grouping.mixer.c_proj.bias"]
            sizes |= {
                "vision_layers": sum(depths) + layers,
                "first_stage_layers": depths[0],
                "stages": stages,
                "group_tokens": tokens.shape[0],
                "num_centers": groups.shape[0],
                "projector_width": state["visual.proj.0.bias"].shape[0],
            }
        if kind == "SegCLIP":
            sizes |= {
                "num_centers": state["group.centers"].shape[0],
                "cross_layers": count_layers(state, "group.cross_blocks."),
                "decoder_layers": count_layers(state, "decoder.blocks.") or Config.decoder_layers,
            }
        return Config(**sizes | known)
    except KeyError as error:
        raise InputError(f"{source}: not a {kind} with a ViT: no parameter named {error}") from None
    except (ValueError, IndexError) as error:
        raise InputError(f"{source}: not the architecture of a {kind} ({error})") from None


def load_strictly(model, state, source, new=()):
    """Load `state`, all of it and nothing else. A whole module of those in `new` may be missing."""
    new = tuple(prefix for prefix in new if not part(state, prefix))
    fresh = {name: value for name, value in model.state_dict().items() if name.startswith(new)}
    try:
        model.load_state_dict(fresh | state)
    except (RuntimeError, IndexError) as error:
        raise InputError(f"{source}: {' '.join(str(error).split())}") from None
    if new:
        names = ", ".join(f"{prefix}*" for prefix in new)
        print(f"{source}: new parameters, not in this file: {names}", file=sys.stderr)
    return model


def read_model(source, activation=None):
    """One of OpenAI's names or a file -> (state dict, Config if it is ours, of this activation)."""
    state = read_weights(fetch(source) if source in MODELS else source)
    config = None
    if isinstance(state.get("config"), Ignored):
        del state["config"]
    if {"config", "model"} <= state.keys():
        try:
            config = Config(**state["config"])
        except (TypeError, ValueError) as error:
            raise InputError(f"{source}: of another version of this project ({error})") from None
        if activation not in (None, config.activation):
            raise InputError(f"{source}: was trained with --activation {config.activation}")
        state = state["model"]
    for key in ("teacher", "model"):  # from DINO's training, from GroupViT's
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    entries = state.items() if isinstance(state, dict) else [(None, None)]
    if not all(isinstance(name, str) and isinstance(x, torch.Tensor) for name, x in entries):
        raise InputError(f"{source}: not a model's weights, which are tensors with names")
    return state, config


def load_clip(name_or_path, activation=None):
    """-> CLIP in float32, from one of OpenAI's names ("ViT-B/16"), their archive, a state dict, or
    a checkpoint of `train.py --method clip`. Raises InputError.

    activation: "quick_gelu" or "gelu"; None is our checkpoint's own, else "quick_gelu".
    """
    state, config = read_model(name_or_path, activation)
    return clip_from_state(state, name_or_path, config, activation)


def clip_from_state(state, source, config=None, activation=None):
    check_kind(state, "CLIP", source)
    if config is None:
        config = config_from_shapes("CLIP", state, source, activation=activation or "quick_gelu")
        if config.vision_width > 1024:
            width = f"width {config.vision_width}, whose heads are not 64 wide"
            raise InputError(f"{source}: of {width}; only ViT-B and ViT-L are supported")
        if activation is None and "input_resolution" not in state:  # not OpenAI's archive
            note = "as OpenAI's weights; for LAION's or DataComp's: --activation gelu"
            print(f"{source}: read with QuickGELU, {note}", file=sys.stderr)
    sizes = ("input_resolution", "context_length", "vocab_size")  # in OpenAI's archives
    state = {name.removeprefix("clip."): x for name, x in state.items() if name not in sizes}
    return load_strictly(CLIP(config), state, source)


def load_model(name_or_path, readout="clip", activation=None):
    """Any file -> SegCLIP, PACL, GroupViT, or for a CLIP a DenseCLIP with this readout.

    Raises InputError.
    """
    state, config = read_model(name_or_path, activation)
    kind = kind_of(state)
    if kind not in ("SegCLIP", "PACL", "GroupViT"):
        return DenseCLIP(clip_from_state(state, name_or_path, config, activation), readout)
    if readout != "clip":
        raise InputError(f"{name_or_path}: --readout {readout} is for a CLIP, and this is a {kind}")
    if kind == "SegCLIP":
        return segclip_from_state(state, name_or_path, config)
    if kind == "GroupViT":
        return groupvit_from_state(state, name_or_path, config)
    config = config or config_from_shapes("PACL", state, name_or_path)
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
        state, config = read_model(source, activation)
        if kind_of(state) == "SegCLIP":
            return segclip_from_state(state, source, config, sizes)
        clip = clip_from_state(state, source, config, activation)
    sizes = {"first_stage_layers": max(clip.config.vision_layers - 2, 0), **sizes}
    state = {f"clip.{name}": tensor for name, tensor in clip.state_dict().items()}
    new = ("group.", "reconstruction_layer.", "reconstruction_blocks.", "decoder.")
    return load_strictly(SegCLIP(dataclasses.replace(clip.config, **sizes)), state, source, new)


def segclip_from_state(state, source, config=None, sizes=()):
    new = ()
    if config is None:
        state, first = from_authors(state)
        config = config_from_shapes("SegCLIP", state, source, first_stage_layers=first)
        new = ("decoder.",)
    free = {name: sizes[name] for name in ("gumbel_tau", "mask_ratio") if name in sizes}
    return load_strictly(SegCLIP(dataclasses.replace(config, **free)), state, source, new)


def groupvit_from_state(state, source, config=None):
    new = ()
    if config is None:
        try:
            state = from_groupvit(state)
        except (RuntimeError, IndexError) as error:
            raise InputError(f"{source}: not the architecture of a GroupViT ({error})") from None
        config = config_from_shapes("GroupViT", state, source, gumbel_tau=1.0)
        new = ("multi_label_logit_scale",)  # of training only; transformers' files lack it
    return load_strictly(GroupViT(config), state, source, new)


def load_dino(path):
    """-> DINO in float32, from dino_vitbase16_pretrain.pth or a teacher. Raises InputError.

    What DINO's training saves also holds a Python object and is refused: save its "teacher" alone.
    """
    if not Path(path).exists():
        raise InputError(f"{path}: no such file; DINO ViT-B/16 is at {DINO_ADDRESS}")
    state, _ = read_model(path)
    check_kind(state, "DINO", path)
    state = rename(state, DINO_NAMES)
    state = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
    for name in state.keys() & {"class_embedding", "positional_embedding"}:
        state[name] = state[name].squeeze()  # [1, 1, D] -> [D], [1, 1 + N, D] -> [1 + N, D]
    return load_strictly(DINO(config_from_shapes("DINO", state, path)), state, path)
