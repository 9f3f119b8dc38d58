"""The losses of SegCLIP and PACL, as pure functions from tensors to scalars. Equation numbers are the SegCLIP paper's."""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F


class GatherRows(torch.autograd.Function):
    """Rows [b, E] of every rank -> [B, E] on every rank; the gradient of a row is the sum of what all ranks ask of it."""

    @staticmethod
    def forward(ctx, x):
        rows = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, x.contiguous())
        return torch.cat(rows)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def contrastive_loss(image_features, text_features, logit_scale):
    """Symmetric cross-entropy between images and texts (Eqs. 8-10), with negatives from every rank.

    image_features, text_features: [b, E], of this rank, row i a pair; not normalised.
    logit_scale: the logarithm of the learned inverse temperature, which is clamped at 100 as in CLIP. (Eqs. 9 and 10
        leave the temperature out; without it the softmax of cosines could hardly tell a pair from its negatives.)
    The mean of this loss over the ranks is the loss of the whole batch, and so are its gradients averaged by DDP.
    """
    z_p = F.normalize(image_features.float(), dim=-1)
    z_w = F.normalize(text_features.float(), dim=-1)
    all_p, all_w, first = z_p, z_w, 0
    if dist.is_initialized() and dist.get_world_size() > 1:
        all_p, all_w, first = GatherRows.apply(z_p), GatherRows.apply(z_w), dist.get_rank() * len(z_p)
    scale = logit_scale.exp().clamp(max=100)
    return symmetric_cross_entropy(scale * z_p @ all_w.T, scale * z_w @ all_p.T, first)


def symmetric_cross_entropy(image_to_text, text_to_image, first):
    """Logits of each image against all texts [b, B], and of each text against all images; row i's own is column first + i."""
    own = torch.arange(first, first + len(image_to_text), device=image_to_text.device)
    i2t = F.cross_entropy(image_to_text, own)  # the sum in Eq. 9, which the paper calls t2i
    t2i = F.cross_entropy(text_to_image, own)  # Eq. 10, likewise
    return (i2t + t2i) / 2  # Eq. 8


AT_ONCE = 2**21  # numbers; 8 MiB in float32 for each of the [b, N, B] tensors in `phi`


def compatibility(patches, text, scale):
    """PACL's compatibility of every picture with every text: embedded patches [b, N, E], texts [B, E] -> [b, B], cosines."""
    return Compatibility.apply(patches, F.normalize(text, dim=-1), scale)


class Compatibility(torch.autograd.Function):
    """phi, a few pictures at a time; what the gradient needs of them is computed again when it is asked for. (As checkpoint of
    torch.utils, but with each part's gradient written where it belongs: half the memory.)"""

    @staticmethod
    def parts(patches, text):
        return patches.split(max(1, AT_ONCE // (patches.shape[1] * len(text))))

    @staticmethod
    def forward(ctx, patches, text, scale):
        ctx.save_for_backward(patches, text)
        ctx.scale = scale
        return torch.cat([phi(few, text, scale) for few in Compatibility.parts(patches, text)])

    @staticmethod
    def backward(ctx, gradient):
        patches, text = ctx.saved_tensors
        g_patches, g_text = torch.empty_like(patches), torch.zeros_like(text)
        first, text = 0, text.detach().requires_grad_()
        for few in Compatibility.parts(patches, text):
            rows, few = slice(first, first + len(few)), few.detach().requires_grad_()
            with torch.enable_grad():
                compatible = phi(few, text, ctx.scale)
            g_patches[rows], g = torch.autograd.grad(compatible, (few, text), gradient[rows])
            first, g_text = rows.stop, g_text + g
        return g_patches, g_text, None


def phi(patches, text, scale):
    """s, the cosine of each patch with the text, weighs the patches, a = softmax(scale * s) over them; phi is the cosine of the
    text with the sum of the patches so weighted. (The slides do not tell the scale; Config has others' choice.)

    No such sum is ever made, of which there would be [b, B, E]: its product with the text is the sum of the patches' products,
    and its length is in the products of the patches with each other.
    """
    dots = patches @ text.T  # [b, N, B]
    a = (scale * dots / patches.norm(dim=-1, keepdim=True).clamp(min=1e-6)).softmax(dim=1)
    length = (a * (patches @ patches.transpose(1, 2) @ a)).sum(dim=1)  # [b, B], squared
    return (a * dots).sum(dim=1) / length.clamp(min=1e-12).sqrt()


def pacl_loss(patches, text_features, logit_scale, patch_scale):
    """Symmetric cross-entropy between images and texts over PACL's compatibility, with negatives from every rank.

    patches: [b, N, E] of this rank, embedded; text_features: [b, E]; logit_scale as in contrastive_loss.
    """
    patches, text, first = patches.float(), text_features.float(), 0
    gathered = dist.is_initialized() and dist.get_world_size() > 1
    if gathered:
        text, first = GatherRows.apply(text), dist.get_rank() * len(patches)
    ours = compatibility(patches, text, patch_scale)  # [b, B]
    everyones = GatherRows.apply(ours) if gathered else ours  # [B, B]
    scale = logit_scale.exp().clamp(max=100)
    return symmetric_cross_entropy(scale * ours, scale * everyones.T[first : first + len(patches)], first)


def superpixel_kl_loss(assign, superpatch):
    """Patches of one superpixel should go to one center (Eqs. 5-6).

    assign: [B, N, L], the mapping matrix M, one-hot with a straight-through gradient.
    superpatch: [B, N] integers; patches of an image with the same number form a super-patch G.
    P_j is the softmax of row j of M, and its target the softmax of the mean of the rows of G_j. (Eq. 5 as printed takes
    the softmax twice, which would leave a loss where the rows of a super-patch agree perfectly.) The sum is divided by
    2N as in Eq. 6; the authors' program divides by 2NL, so weight this loss by 1/L for theirs.
    """
    assign = assign.float()
    same = (superpatch[:, :, None] == superpatch[:, None, :]).float()  # [B, N, N]
    mean = same @ assign / same.sum(dim=-1, keepdim=True)  # [B, N, L], Eq. 5
    log_p, log_q = assign.log_softmax(dim=-1), mean.log_softmax(dim=-1)
    # KL(P, Q) + KL(Q, P) = sum of (P - Q) (log P - log Q)
    divergence = ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(dim=-1)  # [B, N]
    return divergence.mean() / 2  # Eq. 6, averaged over the batch


def patchify(image, patch_size):
    """[B, 3, H, W] -> [B, N, P*P*3]: the pixels of each patch, row by row, the colours of a pixel together."""
    x = F.unfold(image, patch_size, stride=patch_size)  # [B, 3*P*P, N]
    return x.unflatten(1, (3, -1)).permute(0, 3, 2, 1).flatten(2)  # [B, 3, P*P, N] -> [B, N, P*P*3]


def reconstruction_loss(pixels, image, mask):
    """Mean squared error of the hidden patches (Section 2.3).

    pixels: [B, N, P*P*3], predicted; image: [B, 3, H, W], as the encoder sees it (normalised); mask: [B, N], 1 = hidden.
    The paper does not say that only hidden patches count; the authors' program and MAE do so.
    """
    target = patchify(image, math.isqrt(pixels.shape[-1] // 3))
    error = (pixels.float() - target).square().mean(dim=-1)  # [B, N]
    return (error * mask).sum() / mask.sum().clamp(min=1)  # a picture of one patch hides none


def total_loss(outputs, image, superpatch, reconstruction_weight=1.0, superpixel_weight=1.0, con=None):
    """L_con + L_rec + L_sup (Eq. 7) of what a model's forward returns -> (total, {name: part before its weight}).

    con: the contrastive loss, if these rows are a part of a batch, and so cannot tell it.
    """
    if "patches" in outputs:
        con = pacl_loss(**outputs)
    elif con is None:
        con = contrastive_loss(outputs["image_features"], outputs["text_features"], outputs["logit_scale"])
    parts, total = {"con": con}, con
    if "pixels" in outputs:
        parts["rec"] = reconstruction_loss(outputs["pixels"], image, outputs["mask"])
        total = total + reconstruction_weight * parts["rec"]
    if superpixel_weight:
        parts["sup"] = superpixel_kl_loss(outputs["assign"], superpatch)
        total = total + superpixel_weight * parts["sup"]
    return total, parts
