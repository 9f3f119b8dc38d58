"""Every nn.Module of the project: CLIP, and the models that label its patches.

SegCLIP (Luo et al., ICML 2023) inserts a SemanticGroup between two blocks of CLIP's image encoder.
PACL (Mukhoti et al., CVPR 2023) aligns the patches of CLIP, or of DINO, with words. GroupViT (Xu et
al., CVPR 2022), the baseline of both, learns to group patches from captions alone. Equation
numbers and symbols are those of the SegCLIP paper: B batch, N patches, L centers, D width,
E embedding, P patch size, T text tokens, V visible patches; H_p patch tokens before the group
module, H_c centers, M mapping matrix, Z_p region tokens after the last block.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial, reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from losses import gather_rows

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


class InputError(ValueError):
    """Unusable input of the user. The message is one line: what is wrong, where, what to do."""


@dataclass
class Config:
    """Every size of the architecture; saved in each checkpoint. The defaults are the paper's."""

    image_size: int = 224  # side of the square training images, in pixels
    patch_size: int = 16  # P: side of a patch, in pixels
    vision_width: int = 768  # D; the number of heads is D / 64, as in all of OpenAI's models
    vision_layers: int = 12  # blocks of the image encoder, before and after the group module
    embed_dim: int = 512  # E: the space that images and texts share
    context_length: int = 77  # T: tokens of a text, with start and end
    vocab_size: int = 49408  # tokens of the vocabulary
    text_width: int = 512  # D of the text encoder
    text_layers: int = 12  # blocks of the text encoder
    activation: str = "quick_gelu"  # quick_gelu: OpenAI's CLIPs; gelu: LAION-2B's and DataComp's
    # What SegCLIP adds (Section 3.2):
    first_stage_layers: int = 10  # blocks before the semantic group module
    num_centers: int = 8  # L: the most regions in an image
    cross_layers: int = 2  # cross-attention blocks from the centers to the patches (Eq. 1)
    center_std: float = 0.02  # standard deviation of the centers at the start
    key_gain: float = 1.0  # gain of the keys' norm at the start: less is less decided
    linear_std: float = 0.02  # of what SegCLIP adds, at the start; 0: see init_weights
    gumbel_tau: float = 0.9  # temperature of the assignment in training (Eq. 2): higher is softer
    mask_ratio: float = 0.75  # share of the patches that the reconstruction hides
    decoder_layers: int = 3  # blocks of the MAE decoder
    decoder_heads: int = 8  # and their attention heads
    # What PACL adds:
    patch_scale: float = 10.0  # inverse temperature of the softmax over the patches
    # What GroupViT adds:
    stages: int = 2  # how often tokens are grouped, 1 or 2; first_stage_layers come before
    group_tokens: int = 64  # in the first stage; with two stages also the groups that it makes
    projector_width: int = 4096  # of the MLPs into the shared space
    # How much larger evaluate.py makes images than its protocol says, since random crops of the
    # training images made objects larger.
    crop_zoom: float = 1.0

    def __post_init__(self):
        may_be_zero = (
            "first_stage_layers",
            "cross_layers",
            "center_std",
            "linear_std",
            "decoder_layers",
        )
        for name, value in vars(self).items():
            if name == "activation":
                continue
            if not (value > 0 or value == 0 and name in may_be_zero):  # refuses NaN too
                raise InputError(f"{name} cannot be {value}")
            if name in ("vision_width", "text_width") and value % 64:
                raise InputError(f"{name} is {value}, which is not a multiple of 64")
        if self.activation not in ACTIVATIONS:
            raise InputError(f"activation is {self.activation}; there are {', '.join(ACTIVATIONS)}")
        size = self.image_size
        if size % self.patch_size:
            raise InputError(f"image_size {size} is not a multiple of patch_size {self.patch_size}")
        if self.first_stage_layers > self.vision_layers:
            raise InputError(f"first_stage_layers is more than {self.vision_layers} vision_layers")
        if self.stages > 2:
            raise InputError(f"stages is {self.stages}; there are 1 and 2")
        if self.mask_ratio >= 1:
            raise InputError(f"mask_ratio is {self.mask_ratio}; it must be less than 1")


# --------------------------------------------------------------------------------------------------
# CLIP


class QuickGELU(nn.Module):
    """OpenAI's approximation of GELU. Their weights were trained with it and need it."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": QuickGELU, "gelu": nn.GELU}


class Attention(nn.Module):
    """Multi-head attention of `query` [B, Q, D] over `memory` [B, K, D] -> [B, Q, D]."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.normal_(self.in_proj_weight, std=width**-0.5)

    def forward(self, query, memory, causal=False):
        if memory is query:  # self-attention: queries, keys and values in one product
            q, k, v = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        else:
            D = query.shape[-1]
            q = F.linear(query, self.in_proj_weight[:D], self.in_proj_bias[:D])
            kv = F.linear(memory, self.in_proj_weight[D:], self.in_proj_bias[D:])
            k, v = kv.chunk(2, dim=-1)
        # [B, Q or K, D] -> [B, heads, Q or K, D/heads]
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        x = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out_proj(x.transpose(1, 2).flatten(2))  # [B, heads, Q, D/heads] -> [B, Q, D]


class MLP(nn.Sequential):
    """Two linear layers with an activation between them; OpenAI's parameter names."""

    def __init__(self, width, activation=QuickGELU, hidden=None, out=None):
        super().__init__()
        hidden = hidden or 4 * width
        self.c_fc = nn.Linear(width, hidden)
        self.gelu = activation()
        self.c_proj = nn.Linear(hidden, out or width)


class Block(nn.Module):
    """Pre-norm residual attention block: x + attention, then x + MLP. [B, N, D] -> [B, N, D]."""

    def __init__(self, width, heads, activation=QuickGELU):
        super().__init__()
        self.attn = Attention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = MLP(width, activation)
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x, causal=False):
        h = self.ln_1(x)
        x = x + self.attn(h, h, causal)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width, layers, activation):
        super().__init__()
        blocks = [Block(width, width // 64, ACTIVATIONS[activation]) for _ in range(layers)]
        self.resblocks = nn.Sequential(*blocks)

    def forward(self, x, causal=False):
        for block in self.resblocks:
            x = block(x, causal)
        return x


class VisionTransformer(nn.Module):
    """CLIP's image encoder, for images whose sides are any multiples of P."""

    def __init__(self, config):
        super().__init__()
        width = config.vision_width
        P = config.patch_size
        num_patches = (config.image_size // P) ** 2
        self.patch_size = P
        self.stride = P  # pixels from one patch to the next; PACL's stride trick takes fewer
        self.conv1 = nn.Conv2d(3, width, P, P, bias=False)
        self.class_embedding = nn.Parameter(width**-0.5 * torch.randn(width))
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(1 + num_patches, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, config.vision_layers, config.activation)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(width**-0.5 * torch.randn(width, config.embed_dim))

    def grid(self, height, width):
        """Rows and columns of patches of an image."""
        P = self.patch_size
        return (height - P) // self.stride + 1, (width - P) // self.stride + 1

    def patch_positions(self, rows, columns):
        """The learned positions, interpolated to rows x columns: -> [rows * columns, D]."""
        side = math.isqrt(len(self.positional_embedding))
        grid = self.positional_embedding[-(side**2) :]  # without that of a class token
        if (rows, columns) == (side, side):
            return grid
        grid = grid.float().unflatten(0, (side, side)).permute(2, 0, 1)  # [N, D] -> [D, side, side]
        grid = F.interpolate(grid[None], (rows, columns), mode="bicubic", align_corners=False)
        return grid[0].flatten(1).T  # [D, rows, columns] -> [N, D]

    def cut_patches(self, image):
        """[B, 3, H, W] -> [B, N, D], without positions. InputError if P does not divide H and W."""
        P = self.patch_size
        H, W = image.shape[-2:]
        if H % P or W % P:
            raise InputError(f"image sides must be multiples of the patch size {P}, not {H}x{W}")
        x = F.conv2d(image, self.conv1.weight, self.conv1.bias, self.stride)
        return x.flatten(2).transpose(1, 2)  # [B, D, rows, columns] -> [B, N, D]

    def embed_patches(self, image):
        """[B, 3, H, W] -> [B, N, D], before ln_pre."""
        return self.cut_patches(image) + self.patch_positions(*self.grid(*image.shape[-2:]))

    def embed(self, image):
        """[B, 3, H, W] -> [B, 1 + N, D]: class token and patches, before the first block."""
        class_token = self.class_embedding + self.positional_embedding[0]
        patches = self.embed_patches(image)
        return self.ln_pre(torch.cat([class_token.expand(len(patches), 1, -1), patches], dim=1))

    def forward(self, image):
        """[B, 3, H, W] -> [B, 1 + N, D]: the same after the last block."""
        return self.transformer(self.embed(image))

    def project(self, x):
        """[..., D] -> [..., E]: into the space shared with the texts."""
        return self.ln_post(x) @ self.proj


class CLIP(nn.Module):
    """CLIP with a ViT (Radford et al., 2021); OpenAI's parameter names."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        width = config.text_width
        self.visual = VisionTransformer(config)
        self.transformer = Transformer(width, config.text_layers, config.activation)
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(config.context_length, width))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(width**-0.5 * torch.randn(width, config.embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # log of 1 / temperature
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        for transformer in (self.visual.transformer, self.transformer):
            init_blocks(transformer.resblocks)

    def encode_image(self, image):
        """[B, 3, H, W] -> [B, E], from the class token."""
        return self.visual.project(self.visual(image)[:, 0])

    def encode_patches(self, image, readout="clip"):
        """[B, 3, H, W] -> [B, N, E]. readout: one of READOUTS; "clip" is CLIP as trained."""
        return self.visual.project(self.dense_tokens(image, readout)[1])

    def dense_tokens(self, image, readout="clip", dino=None):
        """[B, 3, H, W] -> class token [B, D], patches [B, N, D], before ln_post and projection.

        dino: for "proxyclip" a DINO, whose patches these are then.
        """
        blocks = self.visual.transformer.resblocks
        inputs = [self.visual.embed(image)]  # of each block, [B, 1 + N, D]
        for block in blocks:
            inputs.append(block(inputs[-1]))
        trained = inputs.pop()
        grid = self.visual.grid(*image.shape[-2:])
        if readout == "clip":
            dense = trained[:, 1:]
        elif readout == "proxyclip":
            dense = proxy_read_out(blocks[-1], inputs[-1], grid, dino, image)
        else:
            dense = read_out(blocks, inputs, readout, grid)[:, 1:]
        return trained[:, 0], dense

    def encode_text(self, text):
        """[B, T] token ids -> [B, E]."""
        return self.text_tokens(text) @ self.text_projection

    def text_tokens(self, text):
        """[B, T] token ids -> [B, D]: the end token, which attends to all before it."""
        x = self.token_embedding(text) + self.positional_embedding[: text.shape[1]]  # [B, T, D]
        x = self.transformer(x, causal=True)
        end = text.argmax(dim=-1)  # the end token has the largest id
        x = x[torch.arange(len(x), device=x.device), end]  # [B, T, D] -> [B, D]
        return self.ln_final(x)

    def forward(self, image, text):
        """-> logits per image [B, B'] and per text [B', B]: cosines times the learned scale."""
        image_features = F.normalize(self.encode_image(image), dim=-1)
        text_features = F.normalize(self.encode_text(text), dim=-1)
        logits = self.logit_scale.exp() * image_features @ text_features.T
        return logits, logits.T


READOUTS = ("clip", "maskclip", "sclip", "clearclip", "naclip", "keymean", "proxyclip")


def read_out(blocks, inputs, readout, grid):
    """CLIP's last block with another attention: [B, 1 + N, D] -> [B, 1 + N, D].

    As trained, patches gather what describes the whole image. Here a patch attends to itself or to
    similar patches. inputs: of each of the blocks. grid: rows and columns of the patches. Raises
    InputError for another readout.

    maskclip (Zhou et al., ECCV 2022): each token attends to itself only.
    sclip (Wang et al., ECCV 2024): query-query attention plus key-key attention.
    clearclip (Lan et al., ECCV 2024): query-query attention, without residual connection and MLP.
    naclip (Hajimiri et al., WACV 2025): key-key attention with a bias towards near patches, without
        residual connection and MLP.
    keymean (a baseline of RF-CLIP, AAAI 2026): key-key attention, its mean over all blocks. Whether
        with the residual connection is not published; with it the scenes score better.
    """
    block = blocks[-1]
    q, k, v = queries_keys_values(block, inputs[-1])

    def attention(a, bias=0):
        return (a @ a.mT / math.sqrt(a.shape[-1]) + bias).softmax(dim=-1)

    if readout == "maskclip":
        y = v
    elif readout == "sclip":
        y = (attention(q) + attention(k)) @ v
    elif readout == "clearclip":
        y = attention(q) @ v
    elif readout == "naclip":
        y = attention(k, gaussian_bias(*grid, k.device)) @ v
    elif readout == "keymean":
        keys = [queries_keys_values(*pair)[1] for pair in zip(blocks, inputs)]
        y = sum(map(attention, keys)) / len(keys) @ v
    else:
        raise InputError(f"readout {readout}: there are {', '.join(READOUTS)}")
    # [B, heads, 1 + N, D/heads] -> [B, 1 + N, D]
    y = block.attn.out_proj(y.transpose(1, 2).flatten(2))
    # The others have no residual connection and no MLP.
    if readout not in ("maskclip", "sclip", "keymean"):
        return y
    x = inputs[-1] + y
    return x + block.mlp(block.ln_2(x))


def queries_keys_values(block, x):
    """[B, 1 + N, D] -> q, k, v of a block's attention: [B, heads, 1 + N, D/heads]."""
    qkv = F.linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias)
    return qkv.unflatten(-1, (3, block.attn.heads, -1)).permute(2, 0, 3, 1, 4)


def proxy_read_out(block, x, grid, dino, image):
    """ProxyCLIP (Lan et al., ECCV 2024): patches attend to those that a DINO finds alike.

    x [B, 1 + N, D], of N patches in a `grid` -> [B, N', D], of the DINO's N' patches.
    """
    f = F.normalize(dino(image)[:, 1:], dim=-1)  # [B, N', width of dino]
    cosines = f @ f.mT
    scores = 3 * (cosines - 1.2 * cosines.mean(dim=(1, 2), keepdim=True))  # [B, N', N']
    itself = torch.eye(f.shape[1], dtype=torch.bool, device=f.device)  # or a row could be empty
    A = scores.masked_fill((scores < 0) & ~itself, -torch.inf).softmax(dim=-1)
    v = queries_keys_values(block, x)[2, :, :, 1:]  # [B, heads, N, D/heads]
    v = v.transpose(2, 3).flatten(1, 2).unflatten(2, grid)  # [B, D, rows, columns]
    v = F.interpolate(v, dino.grid(*image.shape[-2:]), mode="bilinear")
    return block.attn.out_proj(A @ v.flatten(2).mT)


def gaussian_bias(rows, columns, device):
    """[1 + N, 1 + N]: exp(-d^2 / 50) for two patches at distance d, 0 for the class token."""
    y = torch.arange(rows, device=device)
    x = torch.arange(columns, device=device)
    positions = torch.cartesian_prod(y, x).float()  # [N, 2]
    gauss = (-torch.cdist(positions, positions).square() / 50).exp()  # sigma 5
    return F.pad(gauss, (1, 0, 1, 0))


def init_blocks(blocks):
    """OpenAI's initialisation: residual branches start smaller in a deeper stack."""
    for block in blocks:
        width = block.ln_1.normalized_shape[0]
        residual_std = width**-0.5 * (2 * len(blocks)) ** -0.5
        nn.init.normal_(block.attn.out_proj.weight, std=residual_std)
        nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(block.mlp.c_proj.weight, std=residual_std)
        for bias in (block.attn.out_proj.bias, block.mlp.c_fc.bias, block.mlp.c_proj.bias):
            nn.init.zeros_(bias)


def start_at_identity(blocks):
    """Sets the last layer of each residual branch to zero: at first, a block returns its input."""
    for block in blocks:
        for layer in (block.attn.out_proj, block.mlp.c_proj):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)


# --------------------------------------------------------------------------------------------------
# What all models have in common, and the baseline


class ImageEncoding(NamedTuple):
    """hard and soft are None where each patch is a region of its own, L = N."""

    features: torch.Tensor  # [B, E], image features
    regions: torch.Tensor  # [B, L, E], projected region tokens
    hard: torch.Tensor | None = None  # [B, N, L], M: one-hot rows, in training straight-through
    soft: torch.Tensor | None = None  # [B, N, L], softmax over the centers, no noise


class OnCLIP(nn.Module):
    """What train.py and evaluate.py need of a model. Every model is built on a CLIP, and defines:

    encode_image: [B, 3, H, W] -> ImageEncoding.
    patch_tokens: [B, 3, H, W] -> [B, N, D], before they are grouped, embedded or projected.
    forward: image, text, noise and reconstruct -> what the losses need, as a dictionary.
    """

    def __init__(self, clip, dino=None):
        super().__init__()
        self.config = clip.config
        self.clip = clip
        self.dino = dino

    @property
    def visual(self):
        """The image encoder whose patches are labelled."""
        return self.dino or self.clip.visual

    def encode_text(self, text):
        """[B, T] token ids -> [B, E], by CLIP."""
        return self.clip.encode_text(text)

    def draw_noise(self, batch, num_patches, generator=None):
        """The random numbers of a training step, as keyword arguments of forward; here none."""
        return {}


class DenseCLIP(OnCLIP):
    """The baseline: CLIP, with each patch as a region.

    readout: one of READOUTS. dino: for "proxyclip" a DINO, whose patches are labelled then.
    """

    def __init__(self, clip, readout="clip", dino=None):
        super().__init__(clip, dino)
        if (readout == "proxyclip") != (dino is not None):
            raise InputError("--readout proxyclip and --dino FILE need each other")
        self.readout = readout

    def encode_image(self, image):
        """[B, 3, H, W] -> ImageEncoding, with the class token's feature."""
        tokens = self.clip.dense_tokens(image, self.readout, self.dino)
        return ImageEncoding(*map(self.clip.visual.project, tokens))

    def patch_tokens(self, image):
        """[B, 3, H, W] -> [B, N, D], by `readout`."""
        return self.clip.dense_tokens(image, self.readout, self.dino)[1]

    def forward(self, image, text, reconstruct=False):
        return {
            "image_features": self.clip.encode_image(image),
            "text_features": self.encode_text(text),
            "logit_scale": self.clip.logit_scale,
        }


# --------------------------------------------------------------------------------------------------
# SegCLIP


def init_weights(module, linear_std=0.02):
    """The authors' initial weights of what SegCLIP adds to CLIP; for nn.Module.apply.

    With such small centers (Config.center_std) the scores of a patch are nearly equal at first: the
    Gumbel noise assigns it, and every center gets a gradient. With a standard deviation of 1 the
    assignment would start nearly saturated. Norms and convolutions keep PyTorch's initialisation.
    So does everything with linear_std 0: PyTorch's deviation of 1 / sqrt(3 D) is 0.02 for a width
    of 768 too, but 0.05 for 128, and a small decoder hardly begins to learn with less. Then the
    cross-attention and the blocks after the group module also start at the identity. Otherwise
    these would outweigh the small region tokens from the start, every region would hold the words
    of the whole image, and the maximum over the regions would not mind.
    """
    if linear_std == 0:
        return
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=linear_std)
        nn.init.zeros_(module.bias)
    elif isinstance(module, Attention):
        nn.init.xavier_uniform_(module.in_proj_weight)
        nn.init.zeros_(module.in_proj_bias)


class CrossBlock(nn.Module):
    """Residual cross-attention block (Eq. 1): centers [B, L, D] attend to patches [B, N, D]."""

    def __init__(self, width):
        super().__init__()
        self.attn = Attention(width, width // 64)
        self.ln_x = nn.LayerNorm(width)
        self.ln_k = nn.LayerNorm(width)
        self.mlp = MLP(width)
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, centers, patches):
        # The paper has only the patches as memory; the authors' code adds the centers.
        memory = self.ln_k(torch.cat([centers, patches], dim=1))  # [B, L + N, D]
        centers = centers + self.attn(self.ln_x(centers), memory)
        return centers + self.mlp(self.ln_2(centers))


def draw_gumbel(*shape, **options):
    """-log(-log(u)) for u uniform between 0 and 1. options: those of torch.rand."""
    u = torch.rand(*shape, **options)
    return -(-u.clamp(min=1e-20).log()).log()


def assign_patches(scores, tau, gumbel_noise=None):
    """Assign each patch to one center (Eq. 2): scores [B, N, L] -> M [B, N, L] with one-hot rows.

        M = onehot(argmax over centers of softmax((scores + noise) / tau))

    Without noise (inference), M is the argmax of the scores. With noise (training), it is that of
    the Gumbel-softmax (Jang et al., 2017), with the gradient of the soft assignment.
    """
    if gumbel_noise is None:
        return F.one_hot(scores.argmax(dim=-1), scores.shape[-1]).to(scores.dtype)
    soft = ((scores + gumbel_noise) / tau).softmax(dim=-1)
    hard = F.one_hot(soft.argmax(dim=-1), scores.shape[-1]).to(soft.dtype)
    return hard + (soft - soft.detach())  # the brackets keep the rows exactly one-hot


def exact_grouping(model):
    """A context for grouping: float32 at inference.

    There an argmax decides, and bf16 would change the label of one pixel in eighty. In training the
    Gumbel noise is far larger than the rounding.
    """
    device = next(model.parameters()).device
    return nullcontext() if model.training else torch.autocast(device.type, enabled=False)


def training_noise(scores, gumbel_noise, training):
    """The noise of an assignment: none at inference; in training None draws it."""
    if training and gumbel_noise is None:
        return draw_gumbel(*scores.shape, device=scores.device)
    return gumbel_noise if training else None


class SemanticGroup(nn.Module):
    """Groups patches [B, N, D] around L learned centers into regions [B, L, D] (Section 2.2)."""

    def __init__(self, config):
        super().__init__()
        width = config.vision_width
        heads = width // 64
        self.tau = config.gumbel_tau
        self.centers = nn.Parameter(config.center_std * torch.randn(config.num_centers, width))
        self.cross_blocks = nn.ModuleList(CrossBlock(width) for _ in range(config.cross_layers))
        self.ln_centers = nn.LayerNorm(width)
        self.ln_patches = nn.LayerNorm(width)
        # Keys and values are H_p in Eqs. 2 and 3. The authors' code projects H_p after a norm: one
        # linear layer per head, as a grouped 1x1 convolution.
        self.to_keys = nn.Conv1d(width, width, 1, groups=heads, bias=False)
        self.ln_keys = nn.LayerNorm(width)
        self.to_values = nn.Conv1d(width, width, 1, groups=heads, bias=False)
        self.ln_out = nn.LayerNorm(width)
        self.mlp = MLP(width, nn.GELU)
        self.activation = QuickGELU()
        self.apply(partial(init_weights, linear_std=config.linear_std))
        nn.init.constant_(self.ln_keys.weight, config.key_gain)

    def forward(self, patches, gumbel_noise=None):
        """-> regions [B, L, D], M [B, N, L], soft [B, N, L]. In training, None draws the noise."""
        centers = self.centers.expand(len(patches), -1, -1)  # H_c: [L, D] -> [B, L, D]
        for block in self.cross_blocks:
            centers = block(centers, patches)  # Eq. 1
        centers = self.ln_centers(centers)

        h = self.ln_patches(patches).transpose(1, 2)  # [B, N, D] -> [B, D, N]
        keys = self.ln_keys(self.to_keys(h).transpose(1, 2))  # [B, N, D]
        values = self.to_values(h).transpose(1, 2)  # [B, N, D]
        scores = (keys @ centers.transpose(1, 2)).float()  # [B, N, L]; no 1/sqrt(D), as in Eq. 2
        gumbel_noise = training_noise(scores, gumbel_noise, self.training)
        M = assign_patches(scores, self.tau, gumbel_noise)  # Eq. 2

        count = M.sum(dim=1).clamp(min=1)  # [B, L]; a center without patches gets a mean of zero
        mean = M.transpose(1, 2) @ values / count[..., None]  # [B, L, D]
        # Eq. 3; the norm and the activation are in the authors' code only.
        regions = self.activation(self.mlp(self.ln_out(mean + centers)))
        return regions, M, scores.softmax(dim=-1)


def random_masking(patches, noise, num_visible):
    """Keep the patches [B, N, D] with the smallest noise [B, N], as MAE (He et al., 2022) does.

    -> visible [B, V, D], in the order of their noise; restore [B, N], the rank of each patch in
    that order; mask [B, N], 1 where a patch is hidden, 0 where it is visible.
    """
    order = noise.argsort(dim=1)  # [B, N]
    restore = order.argsort(dim=1)
    keep = order[:, :num_visible, None].expand(-1, -1, patches.shape[-1])  # [B, V, D]
    return patches.gather(1, keep), restore, (restore >= num_visible).float()


class ReconstructionLayer(nn.Module):
    """Restores patch tokens from regions (Eq. 4): M [B, V, L], regions [B, L, D] -> [B, V, D]."""

    def __init__(self, config):
        super().__init__()
        self.linear = nn.Linear(config.num_centers, config.num_centers)
        self.activation = QuickGELU()
        self.apply(partial(init_weights, linear_std=config.linear_std))

    def forward(self, M, regions):
        # The linear layer follows the product in the paper, precedes it in the authors' code.
        return self.activation(self.linear(M) @ regions)


class MAEDecoder(nn.Module):
    """MAE's decoder: from visible tokens to the pixels of every patch."""

    def __init__(self, config):
        super().__init__()
        width = config.vision_width // 2
        self.embed = nn.Linear(config.vision_width, width)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        heads = config.decoder_heads
        blocks = [Block(width, heads, nn.GELU) for _ in range(config.decoder_layers)]
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(width)
        self.pixels = nn.Linear(width, 3 * config.patch_size**2)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 1e-6  # as in MAE
        self.apply(partial(init_weights, linear_std=config.linear_std))
        for block in self.blocks:  # in MAE these are the weights of an nn.Linear
            if config.linear_std:
                nn.init.normal_(block.attn.in_proj_weight, std=config.linear_std)

    def forward(self, x, restore, grid):
        """x [B, 1 + V, D]: class token, visible patches; restore [B, N] -> pixels [B, N, P*P*3]."""
        x = self.embed(x)  # [B, 1 + V, D/2]
        class_token, visible = x[:, :1], x[:, 1:]
        hidden = self.mask_token.expand(len(x), restore.shape[1] - visible.shape[1], -1)
        patches = torch.cat([visible, hidden], dim=1)  # [B, N, D/2], in the order of the noise
        patches = patches.gather(1, restore[..., None].expand_as(patches))  # in that of the image
        patches = patches + sincos_positions(x.shape[-1], *grid, x.device)
        x = self.blocks(torch.cat([class_token, patches], dim=1))
        return self.pixels(self.norm(x[:, 1:]))


def sincos_positions(width, rows, columns, device=None):
    """MAE's fixed positions [rows * columns, width]: half for the column, half for the row."""
    omega = 10000 ** -(torch.arange(width // 4, device=device) / (width / 4))  # [width/4]

    def encode(length):  # -> [length, width/2]
        angle = torch.arange(length, device=device)[:, None] * omega
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    x = encode(columns).repeat(rows, 1)
    y = encode(rows).repeat_interleave(columns, dim=0)
    return torch.cat([x, y], dim=1)


def max_over_regions(regions):
    """[B, L, D] -> [B, D]. In bf16 regions often tie. amax divides the gradient between them; max
    would always give it to the first, and the others would learn no word."""
    return regions.amax(dim=1)


class SegCLIP(OnCLIP):
    """CLIP with a semantic group module between two blocks of its image encoder."""

    def __init__(self, config):
        super().__init__(CLIP(config))
        width = config.vision_width
        num_last = config.vision_layers - config.first_stage_layers
        self.group = SemanticGroup(config)
        self.reconstruction_layer = ReconstructionLayer(config)
        blocks = [Block(width, width // 64) for _ in range(num_last)]
        init = partial(init_weights, linear_std=config.linear_std)
        self.reconstruction_blocks = nn.Sequential(*blocks).apply(init)
        if config.linear_std == 0:
            late = self.visual.transformer.resblocks[config.first_stage_layers :]
            start_at_identity([*self.group.cross_blocks, *late, *self.reconstruction_blocks])
        self.decoder = MAEDecoder(config)
        # Unused: the image feature is the maximum over the regions.
        self.visual.class_embedding.requires_grad_(False)

    def first_stage(self, patches):
        """The blocks before the group module: [B, N, D] -> [B, N, D]."""
        return self.visual.transformer.resblocks[: self.config.first_stage_layers](patches)

    def third_stage(self, regions):
        """The blocks after the group module: [B, L, D] -> [B, L, D]."""
        return self.visual.transformer.resblocks[self.config.first_stage_layers :](regions)

    def patch_tokens(self, image):
        """[B, 3, H, W] -> H_p [B, N, D]."""
        return self.first_stage(self.visual.ln_pre(self.visual.embed_patches(image)))

    def encode_image(self, image, gumbel_noise=None):
        """[B, 3, H, W], gumbel_noise [B, N, L] -> ImageEncoding."""
        patches = self.patch_tokens(image)  # H_p [B, N, D]
        with exact_grouping(self):
            regions, hard, soft = self.group(patches, gumbel_noise)  # [B, L, D]
        regions = self.third_stage(regions)  # Z_p [B, L, D]
        features = self.visual.project(max_over_regions(regions))
        return ImageEncoding(features, self.visual.project(regions), hard, soft)

    def reconstruct(self, image, mask_noise=None, gumbel_noise=None):
        """Hide most patches, group the others, predict the pixels of all (Section 2.3).

        mask_noise [B, N], gumbel_noise [B, V, L] -> pixels [B, N, P*P*3]; mask [B, N], 1 = hidden.
        """
        patches = self.visual.ln_pre(self.visual.embed_patches(image))  # [B, N, D]
        B, N, _ = patches.shape
        if mask_noise is None:
            mask_noise = torch.rand(B, N, device=image.device)
        visible, restore, mask = random_masking(patches, mask_noise, self.num_visible(N))
        regions, M, _ = self.group(self.first_stage(visible), gumbel_noise)
        z = self.reconstruction_blocks(self.reconstruction_layer(M, regions))  # Eq. 4: [B, V, D]
        z = torch.cat([z.mean(dim=1, keepdim=True), z], dim=1)  # the mean is MAE's class token
        return self.decoder(z, restore, self.visual.grid(*image.shape[-2:])), mask

    def num_visible(self, num_patches):
        """V: 48 of 196 patches. The authors count the class token too, then drop it."""
        return max(1, int((num_patches + 1) * (1 - self.config.mask_ratio)) - 1)

    def draw_noise(self, batch, num_patches, generator=None):
        """Noise of the assignment, of the masking, and of the assignment of visible patches."""
        L = self.config.num_centers
        options = {"generator": generator, "device": generator.device if generator else None}
        return {
            "gumbel_noise": draw_gumbel(batch, num_patches, L, **options),
            "mask_noise": torch.rand(batch, num_patches, **options),
            "masked_gumbel_noise": draw_gumbel(batch, self.num_visible(num_patches), L, **options),
        }

    def forward(
        self,
        image,
        text,
        gumbel_noise=None,
        mask_noise=None,
        masked_gumbel_noise=None,
        reconstruct=True,
    ):
        encoding = self.encode_image(image, gumbel_noise)
        outputs = {
            "image_features": encoding.features,
            "text_features": self.encode_text(text),
            "logit_scale": self.clip.logit_scale,
            "assign": encoding.hard,
        }
        if reconstruct:
            pixels, mask = self.reconstruct(image, mask_noise, masked_gumbel_noise)
            outputs |= {"pixels": pixels, "mask": mask}
        return outputs


# --------------------------------------------------------------------------------------------------
# PACL


class ToImageNet(nn.Module):
    """From CLIP's normalisation of images to ImageNet's."""

    def __init__(self):
        super().__init__()
        clip_mean, clip_std = torch.tensor([IMAGE_MEAN, IMAGE_STD]).view(2, 3, 1, 1)
        mean, std = torch.tensor([(0.485, 0.456, 0.406), (0.229, 0.224, 0.225)]).view(2, 3, 1, 1)
        self.register_buffer("scale", clip_std / std, persistent=False)
        self.register_buffer("shift", (clip_mean - mean) / std, persistent=False)

    def forward(self, image):
        return image * self.scale + self.shift


class DINO(VisionTransformer):
    """DINO's image encoder (Caron et al., ICCV 2021): CLIP's, but for what is replaced here.

    DINO's own program interpolates the positions to 0.1 patches more than the grid of the image, so
    they differ slightly at sizes other than that of its training.
    """

    def __init__(self, config):
        super().__init__(config)
        self.conv1 = nn.Conv2d(3, config.vision_width, config.patch_size, config.patch_size)
        self.ln_pre = nn.Identity()
        self.proj = None
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 1e-6
            elif isinstance(module, MLP):
                module.gelu = nn.GELU()
        self.to_imagenet = ToImageNet()

    def forward(self, image):
        """[B, 3, H, W], normalised for CLIP -> [B, 1 + N, D], after the last norm."""
        return self.ln_post(super().forward(self.to_imagenet(image)))


class PatchEmbedder(nn.Module):
    """PACL's vision embedder e_v: patch tokens [..., D] -> [..., E], with a linear skip."""

    def __init__(self, width, embed_dim):
        super().__init__()
        self.linear_1 = nn.Linear(width, embed_dim)
        self.linear_2 = nn.Linear(embed_dim, embed_dim)
        self.skip = nn.Linear(width, embed_dim)

    def forward(self, x):
        return self.linear_2(F.relu(self.linear_1(x))) + self.skip(x)


class PACL(OnCLIP):
    """A frozen CLIP, and an embedder that is trained to align its patches with words.

    dino: a DINO, frozen too, whose patches are embedded in place of CLIP's. Raises InputError if
    its patch size is not CLIP's.
    """

    def __init__(self, clip, dino=None):
        super().__init__(clip.requires_grad_(False), dino and dino.requires_grad_(False))
        P = clip.config.patch_size
        if dino and dino.patch_size != P:  # the project reads config.patch_size everywhere
            raise InputError(
                f"DINO has patches of {dino.patch_size} pixels, CLIP of {P}: take two that agree"
            )
        self.embedder = PatchEmbedder(self.visual.conv1.out_channels, clip.config.embed_dim)

    def encode_image(self, image):
        """[B, 3, H, W] -> ImageEncoding: CLIP's image feature and the embedded patches."""
        x = self.clip.visual(image)  # [B, 1 + N, D], before ln_post and projection
        features = self.clip.visual.project(x[:, 0])
        tokens = self.dino(image) if self.dino else x
        return ImageEncoding(features, self.embedder(tokens[:, 1:]))

    def patch_tokens(self, image):
        """[B, 3, H, W] -> [B, N, D], the input of the embedder."""
        return self.visual(image)[:, 1:]

    def forward(self, image, text, reconstruct=False):
        """The arguments of pacl_loss. Only the embedder has gradients."""
        with torch.no_grad():
            tokens = self.patch_tokens(image)
            text_features = self.encode_text(text)
        return {
            "patches": self.embedder(tokens),  # [B, N, E]
            "text_features": text_features,
            "logit_scale": self.clip.logit_scale,
            "patch_scale": self.config.patch_scale,
        }


# --------------------------------------------------------------------------------------------------
# GroupViT


class TokenMixer(MLP):
    """An MLP over the tokens, not the channels: [B, G, D] -> [B, O, D]."""

    def forward(self, x):
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class GroupingBlock(nn.Module):
    """Groups tokens [B, N, D] by queries, which group tokens [B, G, D] make, into [B, O, D].

    The assignment is SegCLIP's (SemanticGroup), which comes from here. The cross-attention is not:
    its memory is the tokens alone, and a norm follows it and does not precede it. Nor is the mean:
    the sum is divided by the number of tokens plus 1.
    """

    def __init__(self, config, group_tokens, groups):
        super().__init__()
        width = config.vision_width
        self.tau = config.gumbel_tau
        self.ln_x = nn.LayerNorm(width)
        self.ln_tokens = nn.LayerNorm(width)
        self.mixer = TokenMixer(group_tokens, nn.GELU, width // 2, groups)
        self.ln_mixed = nn.LayerNorm(width)
        self.attn = Attention(width, width // 64)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = MLP(width, nn.GELU)
        self.ln_queries = nn.LayerNorm(width)
        self.to_queries = nn.Linear(width, width)
        self.to_keys = nn.Linear(width, width)
        self.to_values = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        self.ln_out = nn.LayerNorm(width)
        self.mlp_out = MLP(width, nn.GELU)

    def forward(self, x, group_tokens, gumbel_noise=None):
        """-> groups [B, O, D], M [B, N, O], soft [B, N, O]. In training, None draws the noise."""
        x = self.ln_x(x)
        queries = self.ln_mixed(self.mixer(self.ln_tokens(group_tokens)))  # [B, G, D] -> [B, O, D]
        queries = queries + self.attn(queries, x)
        queries = self.ln_queries(queries + self.mlp(self.ln_2(queries)))

        scores = self.to_keys(x) @ self.to_queries(queries).transpose(1, 2)
        scores = scores.float() * x.shape[-1] ** -0.5  # [B, N, O]
        M = assign_patches(scores, self.tau, training_noise(scores, gumbel_noise, self.training))
        # Without the 1 a group with almost no tokens would have huge gradients: those of the soft
        # assignment, divided by the hard one.
        mean = M.transpose(1, 2) @ self.to_values(x) / (M.sum(dim=1) + 1)[..., None]  # [B, O, D]
        groups = queries + self.out_proj(mean)
        return groups + self.mlp_out(self.ln_out(groups)), M, scores.softmax(dim=-1)


class GroupingStage(nn.Module):
    """Blocks over tokens and learned group tokens, then a GroupingBlock (Section 3.1)."""

    def __init__(self, config, layers, group_tokens, groups, tokens_before=None):
        super().__init__()
        width = config.vision_width
        std = 0.0 if tokens_before else config.center_std
        self.group_tokens = nn.Parameter(std * torch.randn(group_tokens, width))
        if tokens_before:
            mixer = TokenMixer(tokens_before, nn.GELU, width // 2, group_tokens)
            self.carry = nn.Sequential(nn.LayerNorm(width), mixer)
        blocks = [Block(width, width // 64, nn.GELU) for _ in range(layers)]
        self.blocks = nn.Sequential(*blocks)
        self.grouping = GroupingBlock(config, group_tokens, groups)

    def forward(self, x, tokens_before=None):
        """The blocks: x [B, N, D], group tokens of the stage before -> x, group tokens [B, G, D]"""
        tokens = self.group_tokens.expand(len(x), -1, -1)  # [G, D] -> [B, G, D]
        if tokens_before is not None:
            tokens = tokens + self.carry(tokens_before)
        sizes = x.shape[1], tokens.shape[1]
        return self.blocks(torch.cat([x, tokens], dim=1)).split(sizes, dim=1)


class BatchNorm(nn.BatchNorm1d):
    """Of rows [b, D]; in training with the statistics of the rows of all processes.

    nn.SyncBatchNorm, which the authors use, sends less, but works on GPUs only.
    """

    @torch.compiler.disable  # it cannot compile what sends
    def forward(self, x):
        rows, first = gather_rows(x.float()) if self.training else (x, 0)
        return super().forward(rows)[first : first + len(x)]


class Projector(nn.Sequential):
    """[..., D] -> [..., E], the space that images and texts share."""

    def __init__(self, width, config):
        hidden = config.projector_width
        layers = (nn.Linear(width, hidden), BatchNorm(hidden), nn.ReLU())
        super().__init__(*layers, nn.Linear(hidden, config.embed_dim))

    def forward(self, x):
        return super().forward(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


class GroupingTransformer(VisionTransformer):
    """GroupViT's image encoder: CLIP's, but for what is replaced here."""

    def __init__(self, config):
        super().__init__(config)
        width = config.vision_width
        num_patches = (config.image_size // config.patch_size) ** 2
        self.to_imagenet = ToImageNet()
        self.conv1 = nn.Conv2d(3, width, config.patch_size, config.patch_size)
        self.class_embedding = None
        self.positional_embedding = nn.Parameter(0.02 * torch.randn(num_patches, width))
        first = config.first_stage_layers
        others = config.vision_layers - first
        if others % config.stages:
            raise InputError(f"{others} blocks after the first stage, for {config.stages} stages")
        layers = others // config.stages
        self.stages = nn.ModuleList()
        before = None
        for depth, (tokens, groups) in zip((first, layers), stage_sizes(config)):
            self.stages.append(GroupingStage(config, depth, tokens, groups, before))
            before = tokens
        self.transformer = Transformer(width, layers, "gelu")  # over the segments
        self.apply(partial(init_weights, linear_std=config.linear_std))
        del self.proj  # a parameter, and here a module
        self.proj = Projector(width, config)

    def embed_patches(self, image):
        """[B, 3, H, W], normalised for CLIP -> [B, N, D]. The norm precedes the positions."""
        patches = self.ln_pre(self.cut_patches(self.to_imagenet(image)))
        return patches + self.patch_positions(*self.grid(*image.shape[-2:]))

    def forward(self, image, gumbel_noise=(None, None)):
        """[B, 3, H, W], the noise of each stage -> segments [B, L, D], M and soft [B, N, L]."""
        x = self.embed_patches(image)
        tokens = None
        hard = []
        soft = []
        for stage, noise in zip(self.stages, gumbel_noise):
            x, tokens = stage(x, tokens)
            with exact_grouping(self):
                x, stage_hard, stage_soft = stage.grouping(x, tokens, noise)
            hard.append(stage_hard)
            soft.append(stage_soft)
        with exact_grouping(self):  # [B, N, G] @ [B, G, L] -> [B, N, L]
            maps = reduce(torch.matmul, hard), reduce(torch.matmul, soft)
        return self.ln_post(self.transformer(x)), *maps


def stage_sizes(config):
    """The numbers of group tokens and of groups, of each stage that groups."""
    if config.stages == 1:
        return [(config.group_tokens, config.num_centers)]
    return [(config.group_tokens, config.group_tokens), (config.num_centers, config.num_centers)]


class GroupViT(OnCLIP):
    """GroupViT with one or two stages. Its text encoder is CLIP's, but for the projection.

    Images are normalised for CLIP, as everywhere here; the model turns that into ImageNet's.
    """

    def __init__(self, config):
        clip = CLIP(config)
        clip.visual = GroupingTransformer(config)
        del clip.text_projection
        clip.text_projection = Projector(config.text_width, config)
        super().__init__(clip)
        self.multi_label_logit_scale = nn.Parameter(clip.logit_scale.detach().clone())

    def encode_text(self, text):
        """[B, T] token ids -> [B, E]."""
        return self.clip.text_projection(self.clip.text_tokens(text))

    def encode_image(self, image):
        """[B, 3, H, W] -> ImageEncoding. Call eval() before: it projects images and segments, and
        in training the statistics of BatchNorm are those of the images."""
        segments, hard, soft = self.visual(image)
        project = self.visual.proj
        return ImageEncoding(project(segments.mean(dim=1)), project(segments), hard, soft)

    def patch_tokens(self, image):
        """[B, 3, H, W] -> [B, N, D], after the blocks of the first stage."""
        return self.visual.stages[0](self.visual.embed_patches(image))[0]

    def draw_noise(self, batch, num_patches, generator=None):
        """Noise of the assignment of each stage."""
        options = {"generator": generator, "device": generator.device if generator else None}
        noise = {}
        tokens = num_patches
        for stage, (_, groups) in enumerate(stage_sizes(self.config)):
            noise[f"gumbel_noise_{stage}"] = draw_gumbel(batch, tokens, groups, **options)
            tokens = groups
        return noise

    def forward(self, image, text, gumbel_noise_0=None, gumbel_noise_1=None, reconstruct=False):
        """text: [B, T], or captions with K prompts each, [B, 1 + K, T]."""
        segments, _, _ = self.visual(image, (gumbel_noise_0, gumbel_noise_1))
        texts = self.encode_text(text.flatten(0, -2)).unflatten(0, text.shape[:-1])
        outputs = {
            "image_features": self.visual.proj(segments.mean(dim=1)),
            "text_features": texts,  # [B, E]
            "logit_scale": self.clip.logit_scale,
        }
        if text.dim() == 3:
            outputs["text_features"] = texts[:, 0]
            outputs["prompt_features"] = texts[:, 1:]  # [B, K, E]
            outputs["multi_label_logit_scale"] = self.multi_label_logit_scale
        return outputs
