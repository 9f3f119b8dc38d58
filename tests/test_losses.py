"""Each loss on a case that can be worked out on paper."""

import math

import pytest
import torch
import torch.nn.functional as F

import losses
from losses import (
    compatibility,
    contrastive_loss,
    pacl_loss,
    patchify,
    reconstruction_loss,
    superpixel_kl_loss,
    total_loss,
)


def test_contrastive_loss_by_hand():
    """Images along the axes, the second text at 45 degrees, scale 2. Lengths do not matter."""
    images = torch.tensor([[3.0, 0.0], [0.0, 0.5]])
    texts = torch.tensor([[1.0, 0.0], [7.0, 7.0]])
    a = 2 * math.sqrt(0.5)  # 2 cos 45 degrees; logits: [[2, a], [0, a]]
    i2t = (math.log(math.exp(2) + math.exp(a)) - 2 + math.log(1 + math.exp(a)) - a) / 2
    t2i = (math.log(math.exp(2) + 1) - 2 + math.log(2)) / 2
    loss = contrastive_loss(images, texts, torch.tensor(math.log(2)))
    assert loss.item() == pytest.approx((i2t + t2i) / 2, rel=1e-5)


def test_temperature_is_learned_and_clamped_at_100():
    images, texts = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    at_100 = contrastive_loss(images, texts, torch.tensor(math.log(100)))
    assert contrastive_loss(images, texts, torch.tensor(9.0)).item() == pytest.approx(at_100.item())
    scale = torch.tensor(1.0, requires_grad=True)
    contrastive_loss(images, texts, scale).backward()
    assert scale.grad != 0


def test_compatibility_by_hand():
    """Two patches along the axes, of lengths 1 and 3; a text along the first axis."""
    patches = torch.tensor([[[1.0, 0.0], [0.0, 3.0]]])
    text = torch.tensor([[5.0, 0.0]])
    a = math.exp(2) / (math.exp(2) + 1)  # softmax of twice the cosines 1 and 0
    expected = a / math.hypot(a, 3 * (1 - a))
    assert compatibility(patches, text, 2.0).item() == pytest.approx(expected)
    mean = 1 / math.hypot(1, 3)  # of the patches
    assert compatibility(patches, text, 0.0).item() == pytest.approx(mean)


@pytest.mark.parametrize("chunk_numbers", [1, 100, 2**22])
def test_pacl_loss_is_that_of_every_pooled_vector(monkeypatch, chunk_numbers):
    """Against the equations as they stand, with one vector for each image and text."""
    monkeypatch.setattr(losses, "CHUNK_NUMBERS", chunk_numbers)
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(6, 7, 5, generator=generator, requires_grad=True)
    text = torch.randn(6, 5, generator=generator, requires_grad=True)
    logit_scale = torch.tensor(1.5)
    t = F.normalize(text, dim=-1)
    s = F.normalize(patches, dim=-1) @ t.T  # [B, N, B]
    pooled = ((4.0 * s).softmax(dim=1)[..., None] * patches[:, :, None]).sum(dim=1)  # [B, B, E]
    logits = logit_scale.exp() * (F.normalize(pooled, dim=-1) * t).sum(dim=-1)
    target = torch.arange(6)
    naive = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    loss = pacl_loss(patches, text, logit_scale, 4.0)
    assert loss.item() == pytest.approx(naive.item(), rel=1e-5)
    gradients = [torch.autograd.grad(x, (patches, text)) for x in (loss, naive)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_superpixel_loss_by_hand():
    """Three patches, two centers. Patches 1 and 2 are one super-patch and disagree."""
    assign = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]])
    superpatch = torch.tensor([[4, 4, 9]])
    p = math.e / (math.e + 1)  # softmax of (1, 0); the target is the softmax of (1/2, 1/2)
    forward = p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))  # KL(P, Q)
    backward = -0.5 * math.log(2 * p) - 0.5 * math.log(2 * (1 - p))  # KL(Q, P)
    expected = 2 * (forward + backward) / (2 * 3)  # two such patches; Eq. 6 divides by 2N
    assert superpixel_kl_loss(assign, superpatch).item() == pytest.approx(expected, rel=1e-5)


def test_superpixel_loss_is_zero_where_super_patches_agree_and_ids_are_only_names():
    assign = torch.eye(4)[torch.tensor([[0, 0, 1, 1, 3]])]
    agree = superpixel_kl_loss(assign, torch.tensor([[7, 7, 0, 0, 2]]))
    assert agree.item() == pytest.approx(0, abs=1e-7)
    disagree = superpixel_kl_loss(assign, torch.tensor([[0, 0, 0, 1, 1]]))
    assert disagree > 0
    assert superpixel_kl_loss(assign, torch.tensor([[-5, -5, -5, 90, 90]])) == disagree


def test_super_patches_do_not_cross_images():
    assign = torch.eye(2)[torch.tensor([[0, 0], [1, 1]])]
    loss = superpixel_kl_loss(assign, torch.tensor([[3, 3], [3, 3]]))
    assert loss.item() == pytest.approx(0, abs=1e-7)


def test_patchify_order():
    """Patches row by row; in a patch pixels row by row, the colours of a pixel together."""
    image = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6).float()
    patches = patchify(image, 2)
    assert patches.shape == (2, 6, 12)
    assert patches[0, 1, :6].tolist() == [2, 26, 50, 3, 27, 51]  # colours of pixels (0, 2), (0, 3)
    rows = image.view(2, 3, 2, 2, 3, 2)  # [B, colour, row, y, column, x]
    assert torch.equal(patches, rows.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2))


def test_reconstruction_loss_counts_hidden_patches_only():
    image = torch.zeros(1, 3, 2, 4)
    pixels = torch.tensor([[100.0], [3.0]]).expand(1, 2, 12)
    mask = torch.tensor([[0.0, 1.0]])
    assert reconstruction_loss(pixels, image, mask).item() == pytest.approx(9)
    image[:, :, :, 2:] = 1
    assert reconstruction_loss(pixels, image, mask).item() == pytest.approx(4)


def test_total_is_the_weighted_sum(tiny, batch):
    image, text, noise = batch
    superpatch = torch.arange(16).expand(8, 16) // 3
    outputs = tiny.train()(image, text, **noise)
    total, parts = total_loss(outputs, image, superpatch, 0.5, 3.0)
    assert set(parts) == {"con", "rec", "sup"}
    expected = parts["con"] + 0.5 * parts["rec"] + 3 * parts["sup"]
    assert total.item() == pytest.approx(expected.item())
    outputs = tiny(image, text, **noise, reconstruct=False)
    assert set(total_loss(outputs, image, superpatch)[1]) == {"con", "sup"}
