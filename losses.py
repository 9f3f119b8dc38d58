"""The losses of SegCLIP, PACL and GroupViT. Equation numbers are those of the SegCLIP paper."""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F

CHUNK_NUMBERS = 2**21  # in each [b, N, B] tensor of `compatibility`: 8 MiB in float32


class GatherRows(torch.autograd.Function):
    """all_gather along the rows, with a gradient: that of a row is the sum over the ranks."""

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


def gather_rows(x):
    """Rows [b, E] -> the rows of all ranks [B, E], and the index of this rank's first row."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x, 0
    return GatherRows.apply(x), dist.get_rank() * len(x)


def contrastive_loss(image_features, text_features, logit_scale):
    """Symmetric cross-entropy between images and texts (Eqs. 8-10), with negatives from all ranks.

    image_features, text_features: [b, E] of this rank, not normalised; row i of both is a pair.
    logit_scale: logarithm of the learned inverse temperature, which is clamped at 100 as in CLIP.
        (Eqs. 9 and 10 omit it, but without it the softmax of cosines would be almost uniform.)
    The mean over the ranks is the loss of the whole batch; so DDP's averaged gradients are right.
    """
    z_p = F.normalize(image_features.float(), dim=-1)
    z_w = F.normalize(text_features.float(), dim=-1)
    all_p, first = gather_rows(z_p)
    all_w, _ = gather_rows(z_w)
    scale = logit_scale.exp().clamp(max=100)
    return symmetric_cross_entropy(scale * z_p @ all_w.T, scale * z_w @ all_p.T, first)


def symmetric_cross_entropy(image_to_text, text_to_image, first):
    """Logits [b, B], whose row i has its pair in column first + i -> scalar."""
    target = torch.arange(first, first + len(image_to_text), device=image_to_text.device)
    i2t = F.cross_entropy(image_to_text, target)  # the sum in Eq. 9, which the paper calls t2i
    t2i = F.cross_entropy(text_to_image, target)  # Eq. 10, likewise
    return (i2t + t2i) / 2  # Eq. 8


def multi_label_loss(image_features, prompt_features, logit_scale):
    """GroupViT's loss over prompts made of a caption's words, with negatives from all ranks.

    image_features: [b, E], prompt_features: [b, K, E] of this rank, not normalised. Symmetric soft
    cross-entropy: the target of an image is 1/K on each of its prompts, that of a prompt its image.
    logit_scale: as in contrastive_loss, but learned for this loss alone.
    """
    z_p = F.normalize(image_features.float(), dim=-1)
    z_w = F.normalize(prompt_features.float(), dim=-1)
    all_p, first = gather_rows(z_p)
    all_w, _ = gather_rows(z_w)  # [B, K, E]
    K = z_w.shape[1]
    scale = logit_scale.exp().clamp(max=100)
    target = torch.arange(first, first + len(z_p), device=z_p.device)
    log_p = (scale * z_p @ all_w.flatten(0, 1).T).log_softmax(dim=-1)  # [b, B * K]
    i2t = F.nll_loss(log_p.unflatten(1, (-1, K)).mean(dim=-1), target)
    t2i = F.cross_entropy(scale * z_w.flatten(0, 1) @ all_p.T, target.repeat_interleave(K))
    return (i2t + t2i) / 2


def compatibility(patches, text, scale):
    """PACL's compatibility of images with texts: patches [b, N, E], text [B, E] -> [b, B], cosines.

    scale: inverse temperature of the softmax over the patches.
    """
    return Compatibility.apply(patches, F.normalize(text, dim=-1), scale)


def phi(patches, text, scale):
    """The equations of `compatibility`, for texts of length 1.

    s is the cosine of a patch with the text, a = softmax(scale * s) over the patches, and phi the
    cosine of the text with the sum of the patches weighted by a. These sums, [b, B, E], are never
    formed: their products with the text are sums of the patches' products with it, and their
    lengths follow from the products of the patches with each other.
    """
    dots = patches @ text.T  # [b, N, B]
    a = (scale * dots / patches.norm(dim=-1, keepdim=True).clamp(min=1e-6)).softmax(dim=1)
    squared_length = (a * (patches @ patches.transpose(1, 2) @ a)).sum(dim=1)  # [b, B]
    return (a * dots).sum(dim=1) / squared_length.clamp(min=1e-12).sqrt()


class Compatibility(torch.autograd.Function):
    """phi for a chunk of images at a time, to save memory; the backward pass computes phi again.

    torch.utils.checkpoint would take twice the memory: it keeps the gradients of all chunks until
    it concatenates them.
    """

    @staticmethod
    def forward(ctx, patches, text, scale):
        ctx.save_for_backward(patches, text)
        ctx.scale = scale
        ctx.images = max(1, CHUNK_NUMBERS // (patches.shape[1] * len(text)))  # in a chunk
        return torch.cat([phi(chunk, text, scale) for chunk in patches.split(ctx.images)])

    @staticmethod
    def backward(ctx, gradient):
        patches, text = ctx.saved_tensors
        text = text.detach().requires_grad_()
        patches_gradient = torch.empty_like(patches)
        text_gradient = torch.zeros_like(text)
        for start in range(0, len(patches), ctx.images):
            rows = slice(start, start + ctx.images)
            chunk = patches[rows].detach().requires_grad_()
            with torch.enable_grad():
                output = phi(chunk, text, ctx.scale)
            gradients = torch.autograd.grad(output, (chunk, text), gradient[rows])
            patches_gradient[rows] = gradients[0]
            text_gradient += gradients[1]
        return patches_gradient, text_gradient, None


def pacl_loss(patches, text_features, logit_scale, patch_scale):
    """Symmetric cross-entropy over PACL's compatibility, with negatives from all ranks.

    patches: [b, N, E] of this rank, embedded. text_features: [b, E] of this rank.
    logit_scale: as in contrastive_loss. patch_scale: as `scale` in compatibility.
    """
    all_text, first = gather_rows(text_features.float())
    image_to_text = compatibility(patches.float(), all_text, patch_scale)  # [b, B]
    all_to_all, _ = gather_rows(image_to_text)  # [B, B]
    text_to_image = all_to_all.T[first : first + len(patches)]  # [b, B]
    scale = logit_scale.exp().clamp(max=100)
    return symmetric_cross_entropy(scale * image_to_text, scale * text_to_image, first)


def superpixel_kl_loss(assign, superpatch):
    """The patches of one superpixel should have one center (Eqs. 5-6).

    assign: [B, N, L], the mapping matrix M, one-hot with a straight-through gradient.
    superpatch: [B, N] integers; patches of an image with the same number form a super-patch G.
    P_j is the softmax of row j of M, and its target that of the mean of the rows of G_j. (Eq. 5 as
    printed takes the softmax twice; then rows that agree would still have a loss.) The sum is
    divided by 2N as in Eq. 6; for the authors' loss, divided by 2NL, take a weight of 1/L.
    """
    assign = assign.float()
    same = (superpatch[:, :, None] == superpatch[:, None, :]).float()  # [B, N, N]
    mean = same @ assign / same.sum(dim=-1, keepdim=True)  # [B, N, L], Eq. 5
    log_p = assign.log_softmax(dim=-1)
    log_q = mean.log_softmax(dim=-1)
    # KL(P, Q) + KL(Q, P) = sum of (P - Q) (log P - log Q)
    divergence = ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(dim=-1)  # [B, N]
    return divergence.mean() / 2  # Eq. 6, averaged over the batch


def patchify(image, patch_size):
    """[B, 3, H, W] -> [B, N, P*P*3]: pixels row by row, the three colours of a pixel together.

    H and W are multiples of P.
    """
    x = image.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))
    # [B, 3, rows, P, columns, P] -> [B, rows, columns, P, P, 3] -> [B, N, P*P*3]
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def reconstruction_loss(pixels, image, mask):
    """Mean squared error of the hidden patches (Section 2.3).

    pixels: [B, N, P*P*3], predicted. image: [B, 3, H, W], normalised. mask: [B, N], 1 = hidden.
    The paper does not say that only hidden patches count; the authors' program and MAE do so.
    """
    target = patchify(image, math.isqrt(pixels.shape[-1] // 3))
    error = F.mse_loss(pixels.float(), target, reduction="none").mean(dim=-1)  # [B, N]
    return (error * mask).sum() / mask.sum().clamp(min=1)  # an image of one patch hides none


def total_loss(
    outputs, image, superpatch, reconstruction_weight=1.0, superpixel_weight=1.0, con=None
):
    """L_con + L_rec + L_sup (Eq. 7) -> total, {name: loss before its weight}.

    outputs: of a model's forward; those of GroupViT with prompts have another loss, L_label.
    con: the contrastive loss, if the rows are only part of a batch.
    """
    if "patches" in outputs:
        con = pacl_loss(**outputs)
    elif con is None:
        con = contrastive_loss(
            outputs["image_features"], outputs["text_features"], outputs["logit_scale"]
        )
    parts = {"con": con}
    total = con
    if "prompt_features" in outputs:
        parts["label"] = multi_label_loss(
            outputs["image_features"],
            outputs["prompt_features"],
            outputs["multi_label_logit_scale"],
        )
        total = total + parts["label"]
    if "pixels" in outputs:
        parts["rec"] = reconstruction_loss(outputs["pixels"], image, outputs["mask"])
        total = total + reconstruction_weight * parts["rec"]
    if superpixel_weight:
        parts["sup"] = superpixel_kl_loss(outputs["assign"], superpatch)
        total = total + superpixel_weight * parts["sup"]
    return total, parts
