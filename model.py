"""Every nn.Module of the project: CLIP, and what labels pictures on top of it: SegCLIP, PACL, and CLIP itself as the baseline.

Read from the top: Attention and Block are what everything is made of; VisionTransformer and CLIP are OpenAI's model
(Radford et al., 2021) with OpenAI's parameter names; SemanticGroup is the idea of SegCLIP (Luo et al., ICML 2023), and
SegCLIP plugs it between two blocks of CLIP's image encoder; at the end PACL (Mukhoti et al., CVPR 2023), which aligns CLIP's
patches, or DINO's, with words. Equation numbers are those of the SegCLIP paper.

Symbols, as in the paper: B batch, N patches, L centers, D width, E embedding, P patch size, T text tokens, V visible
patches; H_p patch tokens before the group module, H_c centers, M the mapping matrix, Z_p region tokens after the last block.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training pictures
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass
class Config:
    """Every size of the architecture; saved in each checkpoint. The defaults are the paper's (ViT-B/16)."""

    image_size: int = 224  # side of the square that the encoder is trained on, in pixels
    patch_size: int = 16  # P: side of a patch, in pixels
    vision_width: int = 768  # D; the number of heads is D / 64, as in all of OpenAI's models
    vision_layers: int = 12  # blocks of the image encoder, before and after the semantic group module
    embed_dim: int = 512  # E: where pictures and texts meet
    context_length: int = 77  # T: tokens of a text, with start and end
    vocab_size: int = 49408  # the tokenizer's
    text_width: int = 512  # D of the text encoder
    text_layers: int = 12  # its blocks
    activation: str = "quick_gelu"  # of CLIP's MLPs: quick_gelu in OpenAI's weights, gelu in LAION's and DataComp's
    # What SegCLIP adds (Section 3.2):
    first_stage_layers: int = 10  # blocks before the semantic group module
    num_centers: int = 8  # L: at most so many regions in a picture
    cross_layers: int = 2  # times that the centers look at the patches before the assignment (Eq. 1)
    center_std: float = 0.02  # standard deviation of the centers at the start
    gumbel_tau: float = 0.9  # temperature of the assignment in training (Eq. 2): the higher, the softer its gradient
    mask_ratio: float = 0.75  # share of the patches that the reconstruction hides
    decoder_layers: int = 3  # blocks of the MAE decoder
    # What PACL adds:
    patch_scale: float = 10.0  # multiplies the cosines before the softmax over the patches: the higher, the fewer count

    def __post_init__(self):
        may_be_zero = ("first_stage_layers", "cross_layers", "center_std", "decoder_layers")
        for name, value in vars(self).items():
            if name != "activation" and (value < 0 or value == 0 and name not in may_be_zero):
                raise ValueError(f"{name} is {value}, which is too small")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation is {self.activation}; there are {', '.join(ACTIVATIONS)}")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.vision_width % 64 or self.text_width % 64:
            raise ValueError(f"vision_width {self.vision_width} and text_width {self.text_width} must be multiples of 64")
        if not 0 <= self.first_stage_layers <= self.vision_layers:
            raise ValueError(f"first_stage_layers is {self.first_stage_layers}, of {self.vision_layers} vision_layers")
        if self.mask_ratio >= 1:
            raise ValueError(f"mask_ratio is {self.mask_ratio}; it must be less than 1")


# ---------------------------------------------------------------------------------------------------------------------
# The transformer


class QuickGELU(nn.Module):
    """OpenAI's approximation of GELU; their weights were trained with it, so nn.GELU in its place costs accuracy."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": QuickGELU, "gelu": nn.GELU}


class Attention(nn.Module):
    """Multi-head attention of `query` [B, Q, D] over `memory` [B, K, D]; parameters named as in nn.MultiheadAttention."""

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
            sizes = (query.shape[-1], 2 * query.shape[-1])
            (w_q, w_kv), (b_q, b_kv) = self.in_proj_weight.split(sizes), self.in_proj_bias.split(sizes)
            q, (k, v) = F.linear(query, w_q, b_q), F.linear(memory, w_kv, b_kv).chunk(2, dim=-1)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))  # [B, heads, Q or K, D/heads]
        x = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out_proj(x.transpose(1, 2).flatten(2))  # [B, heads, Q, D/heads] -> [B, Q, D]


class MLP(nn.Sequential):
    """Two linear layers with an activation between them; OpenAI's parameter names."""

    def __init__(self, width, activation=QuickGELU):
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.gelu = activation()
        self.c_proj = nn.Linear(4 * width, width)


class Block(nn.Module):
    """Residual attention block, normalised first: x + attention, then x + MLP. [B, N, D] -> [B, N, D]."""

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
    def __init__(self, width, layers, activation="quick_gelu"):
        super().__init__()
        self.resblocks = nn.ModuleList(
            Block(width, width // 64, ACTIVATIONS[activation]) for _ in range(layers)
        )

    def forward(self, x, causal=False):
        for block in self.resblocks:
            x = block(x, causal)
        return x


# ---------------------------------------------------------------------------------------------------------------------
# CLIP


class VisionTransformer(nn.Module):
    """CLIP's image encoder. Any input whose sides are multiples of P works: the position grid is interpolated."""

    def __init__(self, config):
        super().__init__()
        width, self.patch_size = config.vision_width, config.patch_size
        num_patches = (config.image_size // config.patch_size) ** 2
        self.conv1 = nn.Conv2d(3, width, config.patch_size, config.patch_size, bias=False)
        self.class_embedding = nn.Parameter(width**-0.5 * torch.randn(width))
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(1 + num_patches, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, config.vision_layers, config.activation)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(width**-0.5 * torch.randn(width, config.embed_dim))

    def embed_patches(self, image):
        """[B, 3, H, W] -> [B, N, D]: patches with their positions, before ln_pre. Raises ValueError on a bad size."""
        height, width = image.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"image sides must be multiples of the patch size {self.patch_size}, not {height}x{width}")
        x = self.conv1(image).flatten(2).transpose(1, 2)  # [B, D, H/P, W/P] -> [B, N, D]
        return x + self.patch_positions(*self.grid(height, width))

    def grid(self, height, width):
        """Rows and columns of patches. They touch, unless PACL's stride trick has set conv1.stride to less than P."""
        stride = self.conv1.stride[0]
        return (height - self.patch_size) // stride + 1, (width - self.patch_size) // stride + 1

    def patch_positions(self, rows, columns):
        """The learned position grid, stretched to rows x columns: -> [rows * columns, D]."""
        grid = self.positional_embedding[1:]
        side = math.isqrt(len(grid))
        if (rows, columns) == (side, side):
            return grid
        grid = grid.unflatten(0, (side, side)).permute(2, 0, 1)[None]  # [N, D] -> [1, D, side, side]
        grid = F.interpolate(grid.float(), (rows, columns), mode="bicubic", align_corners=False)
        return grid[0].flatten(1).T  # [D, rows, columns] -> [N, D]

    def embed(self, image):
        """[B, 3, H, W] -> [B, 1 + N, D]: the class token, then the patches, before the first block."""
        patches = self.embed_patches(image)
        class_token = (self.class_embedding + self.positional_embedding[0]).expand(len(patches), 1, -1)
        return self.ln_pre(torch.cat([class_token, patches], dim=1))

    def forward(self, image):
        """[B, 3, H, W] -> [B, 1 + N, D]: the same after the last block."""
        return self.transformer(self.embed(image))

    def project(self, x):
        """[..., D] -> [..., E]: into the space that is shared with the text."""
        return self.ln_post(x) @ self.proj


class CLIP(nn.Module):
    """CLIP with a ViT image encoder (Radford et al., 2021). Parameter names are exactly those of OpenAI's state dict."""

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
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # log of the inverse temperature
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        for transformer in (self.visual.transformer, self.transformer):
            init_blocks(transformer.resblocks)

    def encode_image(self, image):
        """[B, 3, H, W] -> [B, E], from the class token."""
        return self.visual.project(self.visual(image)[:, 0])

    def encode_patches(self, image, readout="clip"):
        """[B, 3, H, W] -> [B, N, E], by one of READOUTS; "clip" sends patch tokens the way that was trained for the class token."""
        return self.visual.project(self.dense_tokens(image, readout)[1])

    def dense_tokens(self, image, readout="clip"):
        """[B, 3, H, W] -> the class token [B, D] and the patches [B, N, D], before ln_post and projection."""
        visual, x = self.visual, self.visual.embed(image)
        *blocks, last = visual.transformer.resblocks
        for block in blocks:
            x = block(x)
        trained = last(x)  # [B, 1 + N, D]
        dense = trained if readout == "clip" else read_out(last, x, readout, visual.grid(*image.shape[-2:]))
        return trained[:, 0], dense[:, 1:]

    def encode_text(self, text):
        """[B, T] token ids -> [B, E], from the end token: the largest id, and the one place that has seen every word."""
        x = self.token_embedding(text) + self.positional_embedding[: text.shape[1]]  # [B, T, D]
        x = self.transformer(x, causal=True)
        x = x[torch.arange(len(x), device=x.device), text.argmax(dim=-1)]  # [B, T, D] -> [B, D]
        return self.ln_final(x) @ self.text_projection

    def forward(self, image, text):
        """-> (logits_per_image [B, B'], logits_per_text [B', B]): cosine similarities times the learned scale."""
        image_features = F.normalize(self.encode_image(image), dim=-1)
        text_features = F.normalize(self.encode_text(text), dim=-1)
        logits_per_image = self.logit_scale.exp() * image_features @ text_features.T
        return logits_per_image, logits_per_image.T


READOUTS = ("clip", "maskclip", "sclip", "clearclip", "naclip")


def read_out(block, x, readout, grid):
    """CLIP's last block, in ways it was not trained in: [B, 1 + N, D] -> [B, 1 + N, D]. As it was trained, a patch looks at what
    the whole picture needs; so each of these lets it look at itself or its like. Raises ValueError for any other:

    maskclip (Zhou et al., ECCV 2022): a token looks at itself alone.
    sclip (Wang et al., ECCV 2024): queries look at queries, and keys at keys, each as alike as they are; both are added.
    clearclip (Lan et al., ECCV 2024): queries at queries. No residual, no MLP, which hold what is the same all over the picture.
    naclip (Hajimiri et al., WACV 2025): keys at keys, and all the more the nearer. No residual, no MLP.
    grid: rows and columns of the N patches.
    """
    attn = block.attn
    qkv = F.linear(block.ln_1(x), attn.in_proj_weight, attn.in_proj_bias)
    q, k, v = qkv.unflatten(-1, (3, attn.heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, heads, 1 + N, D/heads]

    def look(a, bonus=0):
        return (a @ a.transpose(-2, -1) / math.sqrt(a.shape[-1]) + bonus).softmax(dim=-1) @ v

    if readout == "maskclip":
        y = v
    elif readout == "sclip":
        y = look(q) + look(k)
    elif readout == "clearclip":
        y = look(q)
    elif readout == "naclip":
        y = look(k, nearness(*grid, x.device))
    else:
        raise ValueError(f"readout {readout}: there are {', '.join(READOUTS)}")
    y = attn.out_proj(y.transpose(1, 2).flatten(2))  # [B, heads, 1 + N, D/heads] -> [B, 1 + N, D]
    if readout in ("clearclip", "naclip"):
        return y
    x = x + y
    return x + block.mlp(block.ln_2(x))


def nearness(rows, columns, device=None, sigma=5.0):
    """exp(-d^2 / (2 sigma^2)) for patches at a distance of d patches; 0 from and to the class token. -> [1 + N, 1 + N]"""
    places = torch.cartesian_prod(torch.arange(rows, device=device), torch.arange(columns, device=device)).float()  # [N, 2]
    gauss = (-torch.cdist(places, places).square() / (2 * sigma**2)).exp()
    return F.pad(gauss, (1, 0, 1, 0))


def init_blocks(blocks):
    """OpenAI's initialisation: the deeper the stack, the less each residual branch adds at the start."""
    for block in blocks:
        width = block.ln_1.normalized_shape[0]
        nn.init.normal_(block.attn.out_proj.weight, std=width**-0.5 * (2 * len(blocks)) ** -0.5)
        nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(block.mlp.c_proj.weight, std=width**-0.5 * (2 * len(blocks)) ** -0.5)
        for bias in (block.attn.out_proj.bias, block.mlp.c_fc.bias, block.mlp.c_proj.bias):
            nn.init.zeros_(bias)


def init_weights(module):
    """The start of what SegCLIP adds to CLIP, as in the authors' program; for `nn.Module.apply`.

    It decides how training begins. Centers this small score all patches nearly alike, so that at first the Gumbel noise
    assigns them and every center gets a gradient. Centers of standard deviation 1 begin with a nearly saturated
    assignment (Config.center_std). What torch draws otherwise is left: the norms, and the projections to keys and values.
    """
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, Attention):
        nn.init.xavier_uniform_(module.in_proj_weight)
        nn.init.zeros_(module.in_proj_bias)


# ---------------------------------------------------------------------------------------------------------------------
# SegCLIP: the semantic group module


class CrossBlock(nn.Module):
    """Residual cross-attention block (Eq. 1): the centers [B, L, D] look at the patches [B, N, D]."""

    def __init__(self, width):
        super().__init__()
        self.attn = Attention(width, width // 64)
        self.ln_x = nn.LayerNorm(width)
        self.ln_k = nn.LayerNorm(width)
        self.mlp = MLP(width)
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, centers, patches):
        # The paper's keys and values are the patches; the authors' code adds the centers, so that they see each other.
        memory = self.ln_k(torch.cat([centers, patches], dim=1))  # [B, L + N, D]
        centers = centers + self.attn(self.ln_x(centers), memory)
        return centers + self.mlp(self.ln_2(centers))


def draw_gumbel(*shape, generator=None, device=None):
    """Noise with the Gumbel distribution: -log(-log(u)) for u uniform between 0 and 1."""
    u = torch.rand(*shape, generator=generator, device=device)
    return -(-u.clamp(min=1e-20).log()).log()


def assign_patches(scores, tau, gumbel_noise=None):
    """Give every patch to one center (Eq. 2): scores [B, N, L] -> mapping matrix M [B, N, L] with one-hot rows.

        M = onehot(argmax over centers of softmax((scores + noise) / tau)),   scores = keys @ centers^T

    Without noise, as at inference, M is the argmax. With it (training; zeros are noise switched off) M is the one-hot of
    the Gumbel-softmax (Jang et al., 2017), and its gradient is that of the soft assignment (straight-through).
    """
    if gumbel_noise is None:
        return F.one_hot(scores.argmax(dim=-1), scores.shape[-1]).to(scores.dtype)
    soft = ((scores + gumbel_noise) / tau).softmax(dim=-1)
    hard = F.one_hot(soft.argmax(dim=-1), scores.shape[-1]).to(soft.dtype)
    return hard + (soft - soft.detach())  # the brackets keep the rows exactly one-hot


class SemanticGroup(nn.Module):
    """Gathers patches [B, N, D] around L learnable centers into semantic regions [B, L, D] (Section 2.2)."""

    def __init__(self, config):
        super().__init__()
        width, heads, self.tau = config.vision_width, config.vision_width // 64, config.gumbel_tau
        self.centers = nn.Parameter(config.center_std * torch.randn(config.num_centers, width))  # H_c
        self.cross_blocks = nn.ModuleList(CrossBlock(width) for _ in range(config.cross_layers))
        self.ln_centers = nn.LayerNorm(width)
        self.ln_patches = nn.LayerNorm(width)
        # Eqs. 2 and 3 have H_p itself as keys and values. The authors' code projects it, after a norm: one linear layer per
        # head, as a grouped 1x1 convolution.
        self.to_keys = nn.Conv1d(width, width, 1, groups=heads, bias=False)
        self.ln_keys = nn.LayerNorm(width)
        self.to_values = nn.Conv1d(width, width, 1, groups=heads, bias=False)
        self.ln_out = nn.LayerNorm(width)
        self.mlp = MLP(width, nn.GELU)
        self.activation = QuickGELU()
        self.apply(init_weights)

    def forward(self, patches, gumbel_noise=None):
        """-> regions [B, L, D], M [B, N, L], soft [B, N, L]. In training, None draws the Gumbel noise."""
        centers = self.centers.expand(len(patches), -1, -1)  # [L, D] -> [B, L, D]
        for block in self.cross_blocks:
            centers = block(centers, patches)  # Eq. 1
        centers = self.ln_centers(centers)

        h = self.ln_patches(patches).transpose(1, 2)  # [B, N, D] -> [B, D, N]
        keys = self.ln_keys(self.to_keys(h).transpose(1, 2))  # [B, N, D]
        values = self.to_values(h).transpose(1, 2)  # [B, N, D]
        scores = (keys @ centers.transpose(1, 2)).float()  # [B, N, L]; no 1/sqrt(D), as in Eq. 2
        if self.training and gumbel_noise is None:
            gumbel_noise = draw_gumbel(*scores.shape, device=scores.device)
        M = assign_patches(scores, self.tau, gumbel_noise if self.training else None)  # Eq. 2

        count = M.sum(dim=1).clamp(min=1)  # [B, L]; a center without patches gets a mean of zero
        mean = M.transpose(1, 2) @ values / count[..., None]  # [B, L, D]
        regions = self.activation(self.mlp(self.ln_out(mean + centers)))  # Eq. 3; norm and activation: the authors' code
        return regions, M, scores.softmax(dim=-1)


# ---------------------------------------------------------------------------------------------------------------------
# SegCLIP: masked reconstruction


class ReconstructionLayer(nn.Module):
    """Restores patch tokens from regions (Eq. 4): M [B, V, L] and regions [B, L, D] -> [B, V, D].

    In the paper the linear layer follows the product; the authors' code has it before, over the L columns of M."""

    def __init__(self, config):
        super().__init__()
        self.linear = nn.Linear(config.num_centers, config.num_centers)
        self.activation = QuickGELU()
        self.apply(init_weights)

    def forward(self, M, regions):
        return self.activation(self.linear(M) @ regions)


class MAEDecoder(nn.Module):
    """The decoder of MAE (He et al., 2022): visible tokens and mask tokens in, the pixels of every patch out."""

    def __init__(self, config):
        super().__init__()
        width = config.vision_width // 2
        self.embed = nn.Linear(config.vision_width, width)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.blocks = nn.ModuleList(Block(width, 8, nn.GELU) for _ in range(config.decoder_layers))
        self.norm = nn.LayerNorm(width)
        self.pixels = nn.Linear(width, 3 * config.patch_size**2)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 1e-6  # as in MAE
        self.apply(init_weights)
        for block in self.blocks:  # MAE's queries, keys and values come from one nn.Linear
            nn.init.normal_(block.attn.in_proj_weight, std=0.02)

    def forward(self, x, restore, grid):
        """x [B, 1 + V, D], a global token then the visible ones; restore [B, N] their places -> [B, N, P*P*3]."""
        x = self.embed(x)
        first, visible = x[:, :1], x[:, 1:]
        hidden = self.mask_token.expand(len(x), restore.shape[1] - visible.shape[1], -1)
        x = torch.cat([visible, hidden], dim=1)
        x = x.gather(1, restore[..., None].expand(-1, -1, x.shape[-1])) + sincos_positions(x.shape[-1], *grid, x.device)
        x = torch.cat([first, x], dim=1)  # [B, 1 + N, D/2]; the global token has no position
        for block in self.blocks:
            x = block(x)
        return self.pixels(self.norm(x[:, 1:]))


def sincos_positions(width, rows, columns, device=None):
    """MAE's fixed 2-D sine-cosine positions: -> [rows * columns, width]; half for the column, half for the row."""
    omega = 10000 ** -(torch.arange(width // 4, device=device) / (width / 4))  # [width/4]

    def encode(position):  # [n] -> [n, width/2]
        angle = position[:, None] * omega
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    y, x = encode(torch.arange(rows, device=device)), encode(torch.arange(columns, device=device))
    return torch.cat([x.repeat(rows, 1), y.repeat_interleave(columns, dim=0)], dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# What SegCLIP, PACL and the baseline have in common


class ImageEncoding(NamedTuple):
    features: torch.Tensor  # [B, E]    image feature: of SegCLIP the max over the region tokens, else CLIP's class token
    regions: torch.Tensor  # [B, L, E]  projected region tokens
    hard: torch.Tensor  # [B, N, L]     mapping matrix M: one-hot rows, straight-through gradient in training
    soft: torch.Tensor  # [B, N, L]     softmax over the centers, no noise
    # hard and soft are None where each patch is a region of its own, L = N.


class OnCLIP(nn.Module):
    """What train.py and evaluate.py ask of a model, all of which stand on a CLIP."""

    def __init__(self, clip):
        super().__init__()
        self.config, self.clip = clip.config, clip

    @property
    def visual(self):
        """The image encoder whose patches are labelled."""
        return self.clip.visual

    def encode_text(self, text):
        """[B, T] token ids -> [B, E], CLIP's own."""
        return self.clip.encode_text(text)

    def encode_image(self, image):
        """[B, 3, H, W] -> ImageEncoding."""
        raise NotImplementedError

    def patch_tokens(self, image):
        """[B, 3, H, W] -> [B, N, D], before anything brings them near the texts."""
        raise NotImplementedError

    def draw_noise(self, batch, num_patches, generator=None):
        """All the randomness of one training step, as keyword arguments of forward; here a step has none."""
        return {}

    def forward(self, image, text, reconstruct=True):
        """-> what the losses need, as a dictionary. The one entry that DistributedDataParallel wraps."""
        raise NotImplementedError


# ---------------------------------------------------------------------------------------------------------------------
# SegCLIP


@torch.compiler.disable  # in bf16, a compiled backward pass rounds otherwise, and finds no region that has the maximum
def max_over_regions(regions):
    """[B, L, D] -> [B, D]. Where regions tie, as they often do in bf16, amax divides the gradient between them; max would
    give it to the first, always the same one, and the others would learn no word."""
    return regions.amax(dim=1)


class SegCLIP(OnCLIP):
    """CLIP with a semantic group module between two blocks of its image encoder (Luo et al., ICML 2023)."""

    def __init__(self, config):
        super().__init__(CLIP(config))
        width, heads = config.vision_width, config.vision_width // 64
        self.group = SemanticGroup(config)
        self.reconstruction_layer = ReconstructionLayer(config)
        num_last = config.vision_layers - config.first_stage_layers
        self.reconstruction_blocks = nn.ModuleList(Block(width, heads) for _ in range(num_last)).apply(init_weights)
        self.decoder = MAEDecoder(config)
        # SegCLIP has no class token: the image feature is the maximum over the regions.
        self.visual.class_embedding.requires_grad_(False)

    def first_stage(self, patches):
        """The blocks before the group module: [B, N, D] -> [B, N, D]."""
        for block in self.visual.transformer.resblocks[: self.config.first_stage_layers]:
            patches = block(patches)
        return patches

    def third_stage(self, regions):
        """The blocks after it: [B, L, D] -> [B, L, D]."""
        for block in self.visual.transformer.resblocks[self.config.first_stage_layers :]:
            regions = block(regions)
        return regions

    def patch_tokens(self, image):
        """[B, 3, H, W] -> H_p [B, N, D], what the group module sees."""
        visual = self.visual
        return self.first_stage(visual.ln_pre(visual.embed_patches(image)))

    def encode_image(self, image, gumbel_noise=None):
        """[B, 3, H, W] -> ImageEncoding. gumbel_noise [B, N, L] replaces the noise drawn in training."""
        visual, patches = self.visual, self.patch_tokens(image)  # H_p [B, N, D]
        # At inference an argmax decides, and in bf16 one pixel in eighty got another label; in training the Gumbel noise
        # is far larger than the rounding.
        with nullcontext() if self.training else torch.autocast(image.device.type, enabled=False):
            regions, hard, soft = self.group(patches, gumbel_noise)  # [B, L, D]
        regions = self.third_stage(regions)  # Z_p [B, L, D]
        return ImageEncoding(visual.project(max_over_regions(regions)), visual.project(regions), hard, soft)

    def reconstruct(self, image, mask_noise=None, gumbel_noise=None):
        """Hide most patches, group the rest, predict the pixels of all (Section 2.3).

        mask_noise [B, N] uniform: the patches with the smallest values stay visible. gumbel_noise [B, visible, L].
        Returns pixels [B, N, P*P*3], and mask [B, N] with 1 where the patch was hidden.
        """
        visual = self.visual
        patches = visual.ln_pre(visual.embed_patches(image))  # [B, N, D]
        B, N, D = patches.shape
        if mask_noise is None:
            mask_noise = torch.rand(B, N, device=image.device)
        num_visible = self.num_visible(N)
        order = mask_noise.argsort(dim=1)  # [B, N]
        restore = order.argsort(dim=1)  # [B, N]: where each patch went in that order
        visible = patches.gather(1, order[:, :num_visible, None].expand(-1, -1, D))  # [B, V, D]

        regions, M, _ = self.group(self.first_stage(visible), gumbel_noise)
        z = self.reconstruction_layer(M, regions)  # Eq. 4
        for block in self.reconstruction_blocks:
            z = block(z)
        z = torch.cat([z.mean(dim=1, keepdim=True), z], dim=1)  # MAE's class token, here the mean
        return self.decoder(z, restore, visual.grid(*image.shape[-2:])), (restore >= num_visible).float()

    def num_visible(self, num_patches):
        """How many of N patches the masked pass sees: 48 of 196. The authors count the class token, then drop it."""
        return max(1, int((num_patches + 1) * (1 - self.config.mask_ratio)) - 1)

    def draw_noise(self, batch, num_patches, generator=None):
        """Of the assignment, of what is hidden, and of the assignment of the rest."""
        options, L = {"generator": generator, "device": generator.device if generator else None}, self.config.num_centers
        return {
            "gumbel_noise": draw_gumbel(batch, num_patches, L, **options),
            "mask_noise": torch.rand(batch, num_patches, **options),
            "masked_gumbel_noise": draw_gumbel(batch, self.num_visible(num_patches), L, **options),
        }

    def forward(self, image, text, gumbel_noise=None, mask_noise=None, masked_gumbel_noise=None, reconstruct=True):
        encoding = self.encode_image(image, gumbel_noise)
        outputs = {
            "image_features": encoding.features,
            "text_features": self.encode_text(text),
            "logit_scale": self.clip.logit_scale,
            "assign": encoding.hard,
        }
        if reconstruct:
            outputs["pixels"], outputs["mask"] = self.reconstruct(image, mask_noise, masked_gumbel_noise)
        return outputs


class DenseCLIP(OnCLIP):
    """The baseline: CLIP, trained with its class token, and each patch token read as a region of its own; see READOUTS."""

    def __init__(self, clip, readout="clip"):
        super().__init__(clip)
        self.readout = readout

    def encode_image(self, image):
        """[B, 3, H, W] -> ImageEncoding: the class token's feature, and the patches'."""
        class_token, patches = self.clip.dense_tokens(image, self.readout)
        return ImageEncoding(self.visual.project(class_token), self.visual.project(patches), None, None)

    def patch_tokens(self, image):
        """[B, 3, H, W] -> [B, N, D], as `readout` makes them."""
        return self.clip.dense_tokens(image, self.readout)[1]

    def forward(self, image, text, reconstruct=False):
        return {
            "image_features": self.clip.encode_image(image),
            "text_features": self.encode_text(text),
            "logit_scale": self.clip.logit_scale,
        }


# ---------------------------------------------------------------------------------------------------------------------
# PACL (Mukhoti et al., CVPR 2023)


class DINO(VisionTransformer):
    """DINO's image encoder (Caron et al., ICCV 2021), trained on pictures alone. It is CLIP's, with CLIP's parameter names, but
    for what is replaced here. Its position grid is stretched to exactly the size that is asked for; DINO's own program adds
    0.1 patches to that size, and so gives slightly other positions for pictures that are not of the size it was trained on."""

    def __init__(self, config):
        super().__init__(config)
        self.conv1 = nn.Conv2d(3, config.vision_width, config.patch_size, config.patch_size)  # with a bias
        self.ln_pre, self.proj = nn.Identity(), None
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 1e-6
            elif isinstance(module, MLP):
                module.gelu = nn.GELU()
        clip_mean, clip_std, mean, std = (
            torch.tensor(values).view(3, 1, 1)
            for values in (IMAGE_MEAN, IMAGE_STD, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # the last two: ImageNet's
        )
        self.register_buffer("scale", clip_std / std, persistent=False)
        self.register_buffer("shift", (clip_mean - mean) / std, persistent=False)

    def forward(self, image):
        """[B, 3, H, W], normalised for CLIP -> [B, 1 + N, D] after the last block and its norm, as DINO's program gives them."""
        return self.ln_post(super().forward(image * self.scale + self.shift))


class PatchEmbedder(nn.Module):
    """The vision embedder e_v: patch tokens [..., D] -> [..., E], a residual block whose skip is a linear layer."""

    def __init__(self, width, embed_dim):
        super().__init__()
        self.linear_1 = nn.Linear(width, embed_dim)
        self.linear_2 = nn.Linear(embed_dim, embed_dim)
        self.skip = nn.Linear(width, embed_dim)

    def forward(self, x):
        return self.linear_2(F.relu(self.linear_1(x))) + self.skip(x)


class PACL(OnCLIP):
    """A frozen CLIP, and an embedder that is trained until its patches point where the words of their captions do.

    dino: a DINO, frozen too, whose patches are embedded in place of CLIP's.
    """

    def __init__(self, clip, dino=None):
        super().__init__(clip.requires_grad_(False))
        if dino and dino.patch_size != clip.config.patch_size:  # one number says in all of this project what a patch is
            raise ValueError(
                f"DINO has patches of {dino.patch_size} pixels, CLIP of {clip.config.patch_size}: take two that agree"
            )
        self.dino = dino and dino.requires_grad_(False)
        self.embedder = PatchEmbedder(self.visual.conv1.out_channels, clip.config.embed_dim)

    @property
    def visual(self):
        return self.dino or self.clip.visual

    def encode_image(self, image):
        """[B, 3, H, W] -> ImageEncoding: CLIP's feature of the whole picture, and the embedded patches."""
        x = self.clip.visual(image)  # [B, 1 + N, D], before ln_post and projection
        tokens = self.dino(image) if self.dino else x
        return ImageEncoding(self.clip.visual.project(x[:, 0]), self.embedder(tokens[:, 1:]), None, None)

    def patch_tokens(self, image):
        """[B, 3, H, W] -> [B, N, D], what the embedder sees."""
        return self.visual(image)[:, 1:]

    def forward(self, image, text, reconstruct=False):
        """What pacl_loss needs. Only the embedder has gradients."""
        with torch.no_grad():
            tokens, text_features = self.patch_tokens(image), self.encode_text(text)
        return {
            "patches": self.embedder(tokens),  # [B, N, E]
            "text_features": text_features,
            "logit_scale": self.clip.logit_scale,
            "patch_scale": self.config.patch_scale,
        }
