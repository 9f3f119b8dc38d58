"""What must hold of the model whatever its weights are."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from clip_loader import load_dino
from conftest import TINY, assert_close
from data import normalise
from losses import total_loss
from model import CLIP, PACL, READOUTS, Config, DenseCLIP, SegCLIP, assign_patches, max_over_regions, sincos_positions


def one(noise, i):
    return {name: values[i : i + 1] for name, values in noise.items()}


def test_the_image_feature_is_the_maximum_over_the_regions():
    regions = torch.tensor([[[1.0, 5.0], [3.0, 5.0], [2.0, -1.0]]], requires_grad=True)
    feature = max_over_regions(regions)
    assert feature.tolist() == [[3.0, 5.0]]
    feature.sum().backward()
    assert regions.grad.tolist() == [[[0, 0.5], [1, 0.5], [0, 0]]]  # those that tie share the gradient


def test_training_starts_from_the_authors_weights():
    """Statistics of the start that were measured on the authors' program, at the paper's sizes."""
    torch.manual_seed(0)
    model = SegCLIP(dataclasses.replace(Config(), vision_layers=3, first_stage_layers=2, text_layers=1, vocab_size=100))
    group = model.group
    assert 0.019 < group.centers.std() < 0.021
    new = [group, model.reconstruction_layer, model.reconstruction_blocks, model.decoder]
    linear = [m for part in new for m in part.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linear) == 23 and all(not m.bias.any() for m in linear)
    assert all(abs(m.weight.std() - 0.02) < 1e-3 for m in linear if m.weight.numel() > 64)
    for block in [*group.cross_blocks, *model.reconstruction_blocks]:  # Xavier's for queries, keys and values together
        assert not block.attn.in_proj_bias.any()
        assert abs(block.attn.in_proj_weight.abs().max() - math.sqrt(6 / (4 * 768))) < 1e-3
    assert all(abs(block.attn.in_proj_weight.std() - 0.02) < 1e-3 for block in model.decoder.blocks)
    assert all(m.eps == 1e-6 for m in model.decoder.modules() if isinstance(m, torch.nn.LayerNorm))

    patches = torch.randn(8, 196, 768) + torch.randn(1, 1, 768)  # tokens of a ViT have much in common
    with torch.no_grad():
        centers = group.centers.expand(8, -1, -1)
        for block in group.cross_blocks:
            centers = block(centers, patches)
        centers = group.ln_centers(centers)
        scores = group.ln_keys(group.to_keys(group.ln_patches(patches).mT).mT) @ centers.mT  # [B, N, L]
        p = ((scores + model.draw_noise(8, 196)["gumbel_noise"]) / 0.9).softmax(dim=-1)
    unit = F.normalize(centers[0], dim=-1)
    cosine = ((unit @ unit.T).sum() - 8) / 56
    assert cosine.item() == pytest.approx(0.995, abs=0.003)  # with centers of standard deviation 1: 0.27
    assert scores.std(dim=-1).mean().item() == pytest.approx(2.0, abs=0.4)  # 22.1
    assert p.amax(dim=-1).mean().item() == pytest.approx(0.688, abs=0.03)  # 0.963
    assert (p * (1 - p)).sum(dim=-1).mean().item() == pytest.approx(0.422, abs=0.05)  # 0.053


def test_the_activation_of_clip_is_a_size_of_it(tiny_clip, batch):
    image, text, _ = batch
    gelu = CLIP(dataclasses.replace(TINY, activation="gelu"))
    gelu.load_state_dict(tiny_clip.state_dict())
    assert not torch.allclose(gelu.encode_image(image), tiny_clip.encode_image(image), atol=1e-4)
    assert not torch.allclose(gelu.encode_text(text), tiny_clip.encode_text(text), atol=1e-4)
    with pytest.raises(ValueError, match="activation is relu"):
        Config(activation="relu")


def test_a_row_of_a_batch_equals_the_picture_alone_in_training(tiny, batch):
    image, text, noise = batch
    tiny.train()
    together = tiny(image, text, **noise)
    for i in range(8):
        alone = tiny(image[i : i + 1], text[i : i + 1], **one(noise, i))
        for name in ("image_features", "text_features", "assign", "pixels", "mask"):
            assert torch.allclose(together[name][i : i + 1], alone[name], atol=1e-5), name


@pytest.mark.parametrize("name", ["image_features", "assign", "pixels"])
def test_a_loss_on_one_row_has_no_gradient_for_other_pictures(tiny, batch, name):
    image, text, noise = batch
    image.requires_grad_()
    output = tiny.train()(image, text, **noise)[name]
    (output[3] * torch.randn_like(output[3])).sum().backward()
    touched = image.grad.flatten(1).abs().sum(dim=1) > 0
    assert touched.tolist() == [i == 3 for i in range(8)]


@pytest.mark.parametrize("training", [True, False])
def test_assignment_rows_are_one_hot(tiny, batch, training):
    image = batch[0]
    M = tiny.train(training).encode_image(image).hard.detach()
    assert M.shape == (8, 16, 4)
    assert torch.equal(M.sum(dim=-1), torch.ones(8, 16))
    assert torch.equal(M.amax(dim=-1), torch.ones(8, 16))


def test_straight_through_gradient_is_the_soft_one():
    generator = torch.Generator().manual_seed(0)
    scores, noise, weight = torch.randn(3, 2, 5, 4, generator=generator, dtype=torch.double)
    hard_scores, soft_scores = scores.clone().requires_grad_(), scores.clone().requires_grad_()
    M = assign_patches(hard_scores, 0.9, noise)
    soft = ((soft_scores + noise) / 0.9).softmax(dim=-1)
    assert not torch.allclose(M, soft)
    (M * weight).sum().backward()
    (soft * weight).sum().backward()
    assert torch.allclose(hard_scores.grad, soft_scores.grad)


def test_training_draws_noise_and_evaluation_does_not(tiny, batch):
    image = batch[0]
    assert torch.equal(tiny.eval().encode_image(image).features, tiny.encode_image(image).features)
    tiny.train().group.tau = 1e3  # so that the noise decides
    assert not torch.equal(tiny.encode_image(image).features, tiny.encode_image(image).features)


def test_gumbel_noise_makes_argmax_sample_from_the_softmax():
    """The Gumbel-max trick: argmax(scores + noise) has the distribution softmax(scores)."""
    noise = SegCLIP(TINY).draw_noise(1000, 16, torch.Generator().manual_seed(0))["gumbel_noise"]  # [1000, 16, 4]
    scores = torch.tensor([0.0, 1.0, 2.0, -1.0])
    M = assign_patches(scores + torch.zeros_like(noise), 0.9, noise)
    assert torch.allclose(M.mean(dim=(0, 1)), scores.softmax(dim=0), atol=0.02)


@pytest.mark.parametrize("training", [True, False])
def test_a_center_without_patches_is_finite(tiny, batch, training):
    image, text, noise = batch
    tiny.train(training)
    noise["gumbel_noise"] = torch.tensor([1e4, 0, 0, 0]).expand(8, 16, 4)
    noise["masked_gumbel_noise"] = noise["gumbel_noise"][:, : tiny.num_visible(16)]
    if not training:
        tiny.group.to_keys.weight.data.zero_()  # all scores equal: the first center takes everything
        tiny.group.ln_keys.bias.data.zero_()
    outputs = tiny(image, text, **noise)
    assert outputs["assign"].detach().sum(dim=1)[:, 1:].abs().max() < 1e-5
    (outputs["image_features"].sum() + outputs["pixels"].sum()).backward()
    for name, parameter in tiny.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    assert outputs["image_features"].isfinite().all() and outputs["pixels"].isfinite().all()


def test_mean_over_the_patches_of_each_center(tiny):
    """Eq. 3's MEAN, seen through an identity in place of the MLP."""
    group = tiny.group.eval()
    group.ln_out = group.mlp = group.activation = torch.nn.Identity()
    patches = torch.randn(2, 6, 64)
    regions, M, _ = group(patches)
    centers = group.centers.expand(2, -1, -1)
    for block in group.cross_blocks:
        centers = block(centers, patches)
    centers = group.ln_centers(centers)
    values = group.to_values(group.ln_patches(patches).transpose(1, 2)).transpose(1, 2)
    for b in range(2):
        for k in range(4):
            mine = [values[b, j] for j in range(6) if M[b, j, k] == 1]
            mean = torch.stack(mine).mean(dim=0) if mine else torch.zeros(64)
            assert torch.allclose(regions[b, k], mean + centers[b, k], atol=1e-5)


@pytest.mark.parametrize("height, width", [(32, 32), (16, 48), (64, 40), (8, 8)])
def test_any_multiple_of_the_patch_size(tiny, tiny_clip, height, width):
    image, N = torch.randn(2, 3, height, width), height * width // 64
    encoding = tiny.encode_image(image)
    assert encoding.features.shape == (2, 16) and encoding.hard.shape == (2, N, 4)
    pixels, mask = tiny.reconstruct(image)
    assert pixels.shape == (2, N, 192) and mask.shape == (2, N)
    assert tiny_clip.encode_patches(image).shape == (2, N, 16)
    assert tiny_clip.encode_image(image).isfinite().all()


def test_other_sizes_are_refused(tiny):
    with pytest.raises(ValueError, match="multiples of the patch size 8, not 30x32"):
        tiny.encode_image(torch.randn(1, 3, 30, 32))
    with pytest.raises(ValueError, match="not a multiple"):
        Config(image_size=100)


def test_positions_are_interpolated_in_space(tiny_clip):
    """A grid that grows from left to right still does so when it is stretched, row for row."""
    visual = tiny_clip.visual
    ramp = torch.arange(4.0).repeat(4)[:, None].expand(16, 64)
    visual.positional_embedding.data[1:] = ramp
    stretched = visual.patch_positions(4, 8)[:, 0].view(4, 8)
    assert torch.allclose(stretched, stretched[:1].expand(4, 8), atol=1e-5)
    assert (stretched[0].diff() > 0).all()
    assert torch.equal(visual.patch_positions(4, 4), ramp)


def test_masking_hides_what_the_noise_says(tiny, batch):
    """What is hidden cannot reach the prediction, and what is visible does."""
    image, _, noise = batch
    noise = {"mask_noise": noise["mask_noise"], "gumbel_noise": noise["masked_gumbel_noise"]}
    tiny.train()
    pixels, mask = tiny.reconstruct(image, **noise)
    assert (mask.sum(dim=1) == 16 - tiny.num_visible(16)).all()
    visible = noise["mask_noise"].argsort(dim=1)[:, : tiny.num_visible(16)]
    assert (mask.gather(1, visible) == 0).all()
    on_pixels = mask.view(8, 1, 4, 4).repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
    changed, _ = tiny.reconstruct(image + on_pixels, **noise)
    assert torch.equal(changed, pixels)
    changed, _ = tiny.reconstruct(image + 1 - on_pixels, **noise)
    assert not torch.allclose(changed, pixels)


def test_number_of_visible_patches_is_the_authors():
    model = SegCLIP(TINY)
    assert model.num_visible(196) == 48
    assert model.num_visible(1) == 1


def test_every_patch_has_its_own_decoder_position():
    positions = sincos_positions(32, 3, 5)
    assert positions.shape == (15, 32)
    distances = torch.cdist(positions, positions) + torch.eye(15) * 9
    assert distances.min() > 0.1


def test_text_feature_ignores_what_follows_the_end_token(tiny_clip):
    text = torch.tensor([[598, 5, 6, 599, 0, 0, 0, 0]])
    longer = torch.tensor([[598, 5, 6, 599, 7, 8, 9, 0, 0, 0]])
    assert torch.allclose(tiny_clip.encode_text(text), tiny_clip.encode_text(longer), atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Read-outs of CLIP


def read_out_slowly(block, tokens, readout, rows, columns):
    """One picture's tokens [1 + N, D], from the papers' equations: one head, one query and one key at a time."""
    width, heads = tokens.shape[1], block.attn.heads
    size, (w_q, w_k, w_v) = width // heads, block.attn.in_proj_weight.chunk(3)
    b_q, b_k, b_v = block.attn.in_proj_bias.chunk(3)
    h = block.ln_1(tokens)
    summed = torch.zeros_like(tokens)
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        q, k, v = ([token @ w[part].T + b[part] for token in h] for w, b in ((w_q, b_q), (w_k, b_k), (w_v, b_v)))
        for i in range(len(tokens)):
            looks = {"clip": [(q, k)], "maskclip": [], "sclip": [(q, q), (k, k)], "clearclip": [(q, q)], "naclip": [(k, k)]}
            for ours, theirs in looks[readout]:
                weights = []
                for j in range(len(tokens)):
                    score = (ours[i] * theirs[j]).sum().item() / math.sqrt(size)
                    if readout == "naclip" and i and j:
                        y, x = (i - 1) // columns - (j - 1) // columns, (i - 1) % columns - (j - 1) % columns
                        score += math.exp(-(y * y + x * x) / (2 * 5**2))
                    weights.append(math.exp(score))
                for j, weight in enumerate(weights):
                    summed[i, part] += weight / sum(weights) * v[j]
            if readout == "maskclip":
                summed[i, part] = v[i]
    out = summed @ block.attn.out_proj.weight.T + block.attn.out_proj.bias
    if readout in ("clip", "maskclip", "sclip"):
        out = tokens + out
        out = out + block.mlp(block.ln_2(out))
    return out


@pytest.mark.parametrize("readout", READOUTS)
@torch.no_grad()
def test_readouts_follow_their_equations(readout):
    torch.manual_seed(0)
    clip = CLIP(dataclasses.replace(TINY, vision_width=128)).double()  # two heads
    for parameter in clip.visual.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))  # no bias is 0, and no attention even
    image = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    x = clip.visual.embed(image)
    for block in clip.visual.transformer.resblocks[:-1]:
        x = block(x)
    slow = torch.stack([read_out_slowly(clip.visual.transformer.resblocks[-1], tokens, readout, 2, 3) for tokens in x])
    patches = clip.encode_patches(image, readout)
    torch.testing.assert_close(patches, clip.visual.project(slow[:, 1:]), rtol=1e-6, atol=1e-6)
    others = [clip.encode_patches(image, other) for other in READOUTS if other != readout]
    assert all((patches - other).abs().max() > 0.01 for other in others)
    encoding = DenseCLIP(clip, readout).encode_image(image)
    torch.testing.assert_close(encoding.regions, patches)
    torch.testing.assert_close(encoding.features, clip.encode_image(image))  # whatever the patches are


# ---------------------------------------------------------------------------------------------------------------------
# DINO


def dino_slowly(state, picture, stride):
    """DINO, from its published names and F alone: picture uint8 [B, 3, H, W] -> [B, 1 + N, D]."""

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6)

    mean, std = (torch.tensor(x)[:, None, None] for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    x = (picture / 255 - mean) / std
    x = F.conv2d(x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=stride)
    positions = state["pos_embed"][:, 1:].reshape(1, 6, 6, 128).permute(0, 3, 1, 2)
    x = x + F.interpolate(positions, x.shape[2:], mode="bicubic")
    x = torch.cat([(state["cls_token"] + state["pos_embed"][:, :1]).expand(len(x), -1, -1), x.flatten(2).mT], dim=1)
    for i in range(2):
        q, k, v = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv").split(128, dim=-1)
        heads = [slice(0, 64), slice(64, 128)]
        y = [(q[..., h] @ k[..., h].mT / 8).softmax(dim=-1) @ v[..., h] for h in heads]
        x = x + linear(torch.cat(y, dim=-1), f"blocks.{i}.attn.proj")
        y = linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1")
        x = x + linear(y * (1 + torch.erf(y / math.sqrt(2))) / 2, f"blocks.{i}.mlp.fc2")
    return norm(x, "norm")


@pytest.mark.parametrize("height, width, stride", [(48, 48, 8), (32, 32, 8), (40, 72, 8), (32, 32, 4)])
def test_dino_is_what_its_formulas_say(dino_state, tmp_path, height, width, stride):
    torch.save(dino_state, tmp_path / "dino.pth")
    dino = load_dino(tmp_path / "dino.pth")
    dino.conv1.stride = (stride, stride)
    picture = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    rows, columns = dino.grid(height, width)
    with torch.no_grad():
        tokens = dino(normalise(picture))
    assert tokens.shape == (2, 1 + rows * columns, 128)
    assert_close(tokens, dino_slowly(dino_state, picture, stride), f"DINO at {height}x{width}, stride {stride}", 1e-5)


def test_pacl_embeds_the_patches_of_dino(tiny_clip, dino_state, tmp_path, batch):
    image, text, _ = batch
    torch.save(dino_state, tmp_path / "dino.pth")
    dino = load_dino(tmp_path / "dino.pth")
    pacl = PACL(tiny_clip, dino)
    assert pacl.visual is dino and PACL(tiny_clip).visual is tiny_clip.visual
    encoding = pacl.encode_image(image)
    torch.testing.assert_close(encoding.features, tiny_clip.encode_image(image))
    torch.testing.assert_close(encoding.regions, pacl.embedder(dino(image)[:, 1:]))
    outputs = pacl(image, text)
    torch.testing.assert_close(outputs["patches"], encoding.regions)
    total_loss(outputs, image, None, superpixel_weight=0)[0].backward()
    for name, parameter in pacl.named_parameters():
        trained = name.startswith("embedder.")
        assert parameter.requires_grad == trained and (parameter.grad is not None) == trained, name
    assert all(parameter.grad.abs().max() > 0 for parameter in pacl.embedder.parameters())
    with pytest.raises(ValueError, match="DINO has patches of 8 pixels, CLIP of 16"):
        PACL(CLIP(dataclasses.replace(TINY, patch_size=16)), dino)
