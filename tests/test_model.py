"""What must hold of the models for any weights."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from clip_loader import load_dino
from conftest import TINY, assert_close
from data import normalise
from losses import total_loss
from model import (
    CLIP,
    PACL,
    READOUTS,
    Config,
    DenseCLIP,
    InputError,
    SegCLIP,
    assign_patches,
    max_over_regions,
    random_masking,
    sincos_positions,
)


def final_centers(group, patches):
    """The centers after cross-attention and norm: [B, L, D]."""
    centers = group.centers.expand(len(patches), -1, -1)
    for block in group.cross_blocks:
        centers = block(centers, patches)
    return group.ln_centers(centers)


def test_the_image_feature_is_the_maximum_over_the_regions():
    regions = torch.tensor([[[1.0, 5.0], [3.0, 5.0], [2.0, -1.0]]], requires_grad=True)
    feature = max_over_regions(regions)
    assert feature.tolist() == [[3.0, 5.0]]
    feature.sum().backward()
    assert regions.grad.tolist() == [[[0, 0.5], [1, 0.5], [0, 0]]]  # ties share the gradient


def test_training_starts_from_the_authors_weights():
    """Statistics that were measured on the authors' program, at the paper's sizes."""
    torch.manual_seed(0)
    config = Config(vision_layers=3, first_stage_layers=2, text_layers=1, vocab_size=100)
    model = SegCLIP(config)
    group = model.group
    assert 0.019 < group.centers.std() < 0.021
    new = [group, model.reconstruction_layer, model.reconstruction_blocks, model.decoder]
    linear = [m for part in new for m in part.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linear) == 23 and not any(m.bias.any() for m in linear)
    assert all(abs(m.weight.std() - 0.02) < 1e-3 for m in linear if m.weight.numel() > 64)
    for block in [*group.cross_blocks, *model.reconstruction_blocks]:  # Xavier's
        assert not block.attn.in_proj_bias.any()
        assert abs(block.attn.in_proj_weight.abs().max() - math.sqrt(6 / (4 * 768))) < 1e-3
    for block in model.decoder.blocks:
        assert abs(block.attn.in_proj_weight.std() - 0.02) < 1e-3
    norms = [m for m in model.decoder.modules() if isinstance(m, torch.nn.LayerNorm)]
    assert all(m.eps == 1e-6 for m in norms)

    patches = torch.randn(8, 196, 768) + torch.randn(1, 1, 768)  # a ViT's have much in common
    with torch.no_grad():
        centers = final_centers(group, patches)
        keys = group.ln_keys(group.to_keys(group.ln_patches(patches).mT).mT)
        scores = keys @ centers.mT  # [B, N, L]
        p = ((scores + model.draw_noise(8, 196)["gumbel_noise"]) / 0.9).softmax(dim=-1)
    unit = F.normalize(centers[0], dim=-1)
    cosine = ((unit @ unit.T).sum() - 8) / 56
    # In brackets: with centers of standard deviation 1.
    assert cosine.item() == pytest.approx(0.995, abs=0.003)  # (0.27)
    assert scores.std(dim=-1).mean().item() == pytest.approx(2.0, abs=0.4)  # (22.1)
    assert p.amax(dim=-1).mean().item() == pytest.approx(0.688, abs=0.03)  # (0.963)
    assert (p * (1 - p)).sum(dim=-1).mean().item() == pytest.approx(0.422, abs=0.05)  # (0.053)


def test_the_activation_is_a_part_of_the_config(tiny_clip, batch):
    image, text, _ = batch
    gelu = CLIP(dataclasses.replace(TINY, activation="gelu"))
    gelu.load_state_dict(tiny_clip.state_dict())
    assert not torch.allclose(gelu.encode_image(image), tiny_clip.encode_image(image), atol=1e-4)
    assert not torch.allclose(gelu.encode_text(text), tiny_clip.encode_text(text), atol=1e-4)


@pytest.mark.parametrize(
    "size, message",
    [
        ({"activation": "relu"}, "activation is relu"),
        ({"image_size": 100}, "image_size 100 is not a multiple of patch_size 16"),
        ({"text_width": 100}, "text_width is 100, which is not a multiple of 64"),
        ({"num_centers": 0}, "num_centers cannot be 0"),
        ({"decoder_layers": -1}, "decoder_layers cannot be -1"),
        ({"gumbel_tau": math.nan}, "gumbel_tau cannot be nan"),
        ({"first_stage_layers": 13}, "first_stage_layers is more than 12"),
        ({"mask_ratio": 1.0}, "mask_ratio is 1.0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(size, message):
    with pytest.raises(InputError, match=message):
        Config(**size)


def test_a_row_of_a_batch_equals_the_image_alone_in_training(tiny, batch):
    image, text, noise = batch
    tiny.train()
    together = tiny(image, text, **noise)
    for i in range(8):
        row = slice(i, i + 1)
        alone = tiny(image[row], text[row], **{name: x[row] for name, x in noise.items()})
        for name in ("image_features", "text_features", "assign", "pixels", "mask"):
            assert torch.allclose(together[name][row], alone[name], atol=1e-5), name


@pytest.mark.parametrize("name", ["image_features", "assign", "pixels"])
def test_a_loss_on_one_row_has_no_gradient_for_other_images(tiny, batch, name):
    image, text, noise = batch
    image.requires_grad_()
    output = tiny.train()(image, text, **noise)[name]
    (output[3] * torch.randn_like(output[3])).sum().backward()
    touched = image.grad.flatten(1).abs().sum(dim=1) > 0
    assert touched.tolist() == [i == 3 for i in range(8)]


@pytest.mark.parametrize("training", [True, False])
def test_assignment_rows_are_one_hot(tiny, batch, training):
    M = tiny.train(training).encode_image(batch[0]).hard.detach()
    assert M.shape == (8, 16, 4)
    assert (M.sum(dim=-1) == 1).all() and (M.amax(dim=-1) == 1).all()


def test_straight_through_gradient_is_the_soft_one():
    generator = torch.Generator().manual_seed(0)
    scores, noise, weight = torch.randn(3, 2, 5, 4, generator=generator, dtype=torch.double)
    scores.requires_grad_()
    M = assign_patches(scores, 0.9, noise)
    soft = ((scores + noise) / 0.9).softmax(dim=-1)
    assert not torch.allclose(M, soft)
    gradients = [torch.autograd.grad((x * weight).sum(), scores)[0] for x in (M, soft)]
    assert torch.allclose(*gradients)


def test_training_draws_noise_and_evaluation_does_not(tiny, batch):
    image = batch[0]
    assert torch.equal(tiny.eval().encode_image(image).features, tiny.encode_image(image).features)
    tiny.train().group.tau = 1e3  # so that the noise decides
    assert not torch.equal(tiny.encode_image(image).features, tiny.encode_image(image).features)


def test_gumbel_noise_makes_argmax_sample_from_the_softmax():
    """The Gumbel-max trick: argmax(scores + noise) has the distribution softmax(scores)."""
    generator = torch.Generator().manual_seed(0)
    noise = SegCLIP(TINY).draw_noise(1000, 16, generator)["gumbel_noise"]  # [1000, 16, 4]
    scores = torch.tensor([0.0, 1.0, 2.0, -1.0])
    M = assign_patches(scores + torch.zeros_like(noise), 0.9, noise)
    assert torch.allclose(M.mean(dim=(0, 1)), scores.softmax(dim=0), atol=0.02)


@pytest.mark.parametrize("training", [True, False])
def test_a_center_without_patches_is_finite(tiny, batch, training):
    image, text, noise = batch
    tiny.train(training)
    noise["gumbel_noise"] = torch.tensor([1e4, 0, 0, 0]).expand(8, 16, 4)
    noise["masked_gumbel_noise"] = noise["gumbel_noise"][:, : tiny.num_visible(16)]
    if not training:  # all scores equal: the first center takes everything
        tiny.group.to_keys.weight.data.zero_()
        tiny.group.ln_keys.bias.data.zero_()
    outputs = tiny(image, text, **noise)
    assert outputs["assign"].detach().sum(dim=1)[:, 1:].abs().max() < 1e-5
    total = outputs["image_features"].sum() + outputs["pixels"].sum()
    total.backward()
    assert total.isfinite()
    for name, parameter in tiny.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


def test_mean_over_the_patches_of_each_center(tiny):
    """Eq. 3's mean, with identities in place of the MLP."""
    group = tiny.group.eval()
    group.ln_out = group.mlp = group.activation = torch.nn.Identity()
    patches = torch.randn(2, 6, 64)
    regions, M, _ = group(patches)
    centers = final_centers(group, patches)
    values = group.to_values(group.ln_patches(patches).mT).mT
    for b in range(2):
        for k in range(4):
            own = values[b, M[b, :, k] == 1]
            mean = own.mean(dim=0) if len(own) else torch.zeros(64)
            assert torch.allclose(regions[b, k], mean + centers[b, k], atol=1e-5)


@pytest.mark.parametrize("height, width", [(32, 32), (16, 48), (64, 40), (8, 8)])
def test_any_multiple_of_the_patch_size(tiny, tiny_clip, height, width):
    image = torch.randn(2, 3, height, width)
    N = height * width // 64
    encoding = tiny.encode_image(image)
    assert encoding.features.shape == (2, 16) and encoding.hard.shape == (2, N, 4)
    pixels, mask = tiny.reconstruct(image)
    assert pixels.shape == (2, N, 192) and mask.shape == (2, N)
    assert tiny_clip.encode_patches(image).shape == (2, N, 16)
    assert tiny_clip.encode_image(image).isfinite().all()


def test_other_image_sizes_are_refused(tiny):
    with pytest.raises(InputError, match="multiples of the patch size 8, not 30x32"):
        tiny.encode_image(torch.randn(1, 3, 30, 32))


def test_positions_are_interpolated_in_space(tiny_clip):
    """A grid that grows from left to right still does so, row for row, when it is stretched."""
    visual = tiny_clip.visual
    ramp = torch.arange(4.0).repeat(4)[:, None].expand(16, 64)
    visual.positional_embedding.data[1:] = ramp
    stretched = visual.patch_positions(4, 8)[:, 0].view(4, 8)
    assert torch.allclose(stretched, stretched[:1].expand(4, 8), atol=1e-5)
    assert (stretched[0].diff() > 0).all()
    assert torch.equal(visual.patch_positions(4, 4), ramp)


def test_random_masking_by_hand():
    patches = torch.tensor([[[10.0], [11.0], [12.0], [13.0]]])
    noise = torch.tensor([[0.4, 0.9, 0.1, 0.6]])
    visible, restore, mask = random_masking(patches, noise, 2)
    assert visible.tolist() == [[[12.0], [10.0]]]
    assert restore.tolist() == [[1, 3, 0, 2]]
    assert mask.tolist() == [[0.0, 1.0, 0.0, 1.0]]


def test_hidden_patches_cannot_reach_the_prediction(tiny, batch):
    image, _, noise = batch
    noise = (noise["mask_noise"], noise["masked_gumbel_noise"])
    pixels, mask = tiny.train().reconstruct(image, *noise)
    assert (mask.sum(dim=1) == 16 - tiny.num_visible(16)).all()
    on_pixels = mask.view(8, 1, 4, 4).repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
    changed, _ = tiny.reconstruct(image + on_pixels, *noise)
    assert torch.equal(changed, pixels)
    changed, _ = tiny.reconstruct(image + 1 - on_pixels, *noise)
    assert not torch.allclose(changed, pixels)


def test_number_of_visible_patches_is_the_authors(tiny):
    assert tiny.num_visible(196) == 48
    assert tiny.num_visible(1) == 1


def test_every_patch_has_its_own_decoder_position():
    positions = sincos_positions(32, 3, 5)
    assert positions.shape == (15, 32)
    distances = torch.cdist(positions, positions) + torch.eye(15) * 9
    assert distances.min() > 0.1


def test_text_feature_ignores_what_follows_the_end_token(tiny_clip):
    text = torch.tensor([[598, 5, 6, 599, 0, 0, 0, 0]])
    longer = torch.tensor([[598, 5, 6, 599, 7, 8, 9, 0, 0, 0]])
    assert torch.allclose(tiny_clip.encode_text(text), tiny_clip.encode_text(longer), atol=1e-6)


# --------------------------------------------------------------------------------------------------
# Read-outs of CLIP


def read_out_slowly(blocks, inputs, readout, columns):
    """One image's tokens, from the papers' equations: one head and query at a time.

    inputs: [1 + N, D] for each block. -> [1 + N, D]
    """
    block = blocks[-1]
    tokens = inputs[-1]
    attn = block.attn
    size = tokens.shape[1] // attn.heads
    qkv = block.ln_1(tokens) @ attn.in_proj_weight.T + attn.in_proj_bias
    attended = torch.zeros_like(tokens)
    for head in range(attn.heads):
        part = slice(head * size, (head + 1) * size)
        q, k, v = (x[:, part] for x in qkv.chunk(3, dim=-1))
        pairs = {"clip": [(q, k)], "sclip": [(q, q), (k, k)], "clearclip": [(q, q)]}
        pairs |= {"naclip": [(k, k)], "maskclip": [], "keymean": []}
        for queries, keys in pairs[readout]:
            for i, query in enumerate(queries):
                scores = keys @ query / math.sqrt(size)  # [1 + N]
                for j in range(1, len(keys)):
                    if readout == "naclip" and i:
                        y = (i - 1) // columns - (j - 1) // columns
                        x = (i - 1) % columns - (j - 1) % columns
                        scores[j] += math.exp(-(y * y + x * x) / (2 * 5**2))
                attended[i, part] += scores.softmax(dim=0) @ v
        if readout == "maskclip":
            attended[:, part] = v
        if readout == "keymean":
            for b, x in zip(blocks, inputs):
                _, k, _ = (b.ln_1(x) @ b.attn.in_proj_weight.T + b.attn.in_proj_bias).chunk(3, -1)
                k = k[:, part]
                for i in range(len(k)):
                    attended[i, part] += (k @ k[i] / math.sqrt(size)).softmax(0) @ v / len(blocks)
    out = attn.out_proj(attended)
    if readout in ("clip", "maskclip", "sclip", "keymean"):
        out = tokens + out
        out = out + block.mlp(block.ln_2(out))
    return out


def random_clip(config):
    """In double precision; no bias is 0, no attention uniform."""
    torch.manual_seed(0)
    clip = CLIP(config).double()
    with torch.no_grad():
        for parameter in clip.visual.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return clip


OF_CLIP = [readout for readout in READOUTS if readout != "proxyclip"]


@pytest.mark.parametrize("readout", OF_CLIP)
@torch.no_grad()
def test_readouts_follow_their_equations(readout):
    clip = random_clip(dataclasses.replace(TINY, vision_width=128))  # two heads
    image = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    blocks = clip.visual.transformer.resblocks
    inputs = [clip.visual.embed(image)]
    for block in blocks[:-1]:
        inputs.append(block(inputs[-1]))
    slow = [read_out_slowly(blocks, tokens, readout, columns=3) for tokens in zip(*inputs)]
    slow = torch.stack(slow)
    patches = clip.encode_patches(image, readout)
    torch.testing.assert_close(patches, clip.visual.project(slow[:, 1:]), rtol=1e-6, atol=1e-6)
    others = [clip.encode_patches(image, other) for other in OF_CLIP if other != readout]
    assert all((patches - other).abs().max() > 0.01 for other in others)
    encoding = DenseCLIP(clip, readout).encode_image(image)
    torch.testing.assert_close(encoding.regions, patches)
    torch.testing.assert_close(encoding.features, clip.encode_image(image))  # for any readout


# --------------------------------------------------------------------------------------------------
# DINO


def dino_slowly(state, image, stride):
    """DINO, from its published names and F alone: image uint8 [B, 3, H, W] -> [B, 1 + N, D]."""

    def weights(name):
        return state[f"{name}.weight"], state[f"{name}.bias"]

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], *weights(name), eps=1e-6)

    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    x = F.conv2d((image / 255 - mean) / std, *weights("patch_embed.proj"), stride=stride)
    positions = state["pos_embed"][:, 1:].reshape(1, 6, 6, 128).permute(0, 3, 1, 2)
    x = (x + F.interpolate(positions, x.shape[2:], mode="bicubic")).flatten(2).mT
    class_token = state["cls_token"] + state["pos_embed"][:, :1]
    x = torch.cat([class_token.expand(len(x), -1, -1), x], dim=1)
    for i in range(2):
        block = f"blocks.{i}"
        qkv = F.linear(norm(x, f"{block}.norm1"), *weights(f"{block}.attn.qkv"))
        q, k, v = qkv.split(128, dim=-1)
        heads = [slice(0, 64), slice(64, 128)]
        y = [(q[..., h] @ k[..., h].mT / 8).softmax(dim=-1) @ v[..., h] for h in heads]
        x = x + F.linear(torch.cat(y, dim=-1), *weights(f"{block}.attn.proj"))
        y = F.linear(norm(x, f"{block}.norm2"), *weights(f"{block}.mlp.fc1"))
        x = x + F.linear(y * (1 + torch.erf(y / math.sqrt(2))) / 2, *weights(f"{block}.mlp.fc2"))
    return norm(x, "norm")


@pytest.fixture
def dino(dino_state, tmp_path):
    torch.save(dino_state, tmp_path / "dino.pth")
    return load_dino(tmp_path / "dino.pth")


@pytest.mark.parametrize(
    "height, width, stride", [(48, 48, 8), (32, 32, 8), (40, 72, 8), (32, 32, 4)]
)
def test_dino_follows_its_equations(dino, dino_state, height, width, stride):
    dino.stride = stride
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8, generator=generator)
    rows, columns = dino.grid(height, width)
    with torch.no_grad():
        tokens = dino(normalise(image))
    assert tokens.shape == (2, 1 + rows * columns, 128)
    name = f"DINO at {height}x{width}, stride {stride}"
    assert_close(tokens, dino_slowly(dino_state, image, stride), name, 1e-5)


@pytest.mark.parametrize("patch_size, sides", [(8, (32, 48)), (16, (32, 48)), (16, (64, 32))])
@torch.no_grad()
def test_proxyclip_follows_its_equations(dino, patch_size, sides):
    """DINO's grid is CLIP's, or twice as fine."""
    config = dataclasses.replace(TINY, vision_width=128, patch_size=patch_size)
    clip = random_clip(config)
    dino = dino.double()
    dino.conv1.weight.mul_(50)  # so that its patches differ
    image = torch.randn(3, 3, *sides, dtype=torch.float64)
    image[1] = 0.5  # all patches alike: the mean of the cosines is nearly 1
    dense = DenseCLIP(clip, "proxyclip", dino)
    patches = dense.patch_tokens(image)
    rows, columns = dense.visual.grid(*sides)
    assert patches.shape == (3, rows * columns, 128) and patches.isfinite().all()

    x = clip.visual.embed(image)
    blocks = clip.visual.transformer.resblocks
    for block in blocks[:-1]:
        x = block(x)
    last = blocks[-1]
    lonely = 0
    for b in range(3):
        alone = dense.patch_tokens(image[b : b + 1])
        torch.testing.assert_close(alone[0], patches[b])  # whatever else is in the batch
        f = dino(image[b : b + 1])[0, 1:]
        S = [[torch.dot(p, q) / (p.norm() * q.norm()) for q in f] for p in f]
        mean = sum(map(sum, S)) / len(f) ** 2
        weight, bias = last.attn.in_proj_weight[256:], last.attn.in_proj_bias[256:]
        v = (last.ln_1(x[b]) @ weight.T + bias)[1:]
        v = v.reshape(sides[0] // patch_size, sides[1] // patch_size, 128).permute(2, 0, 1)
        v = F.interpolate(v[None], (rows, columns), mode="bilinear")[0].flatten(1).T
        for i, row in enumerate(S):
            scores = [3 * (cosine - 1.2 * mean) for cosine in row]
            near = [j for j in range(len(f)) if scores[j] >= 0] or [i]
            lonely += near == [i]
            total = sum(math.exp(scores[j]) for j in near)
            y = last.attn.out_proj(sum(math.exp(scores[j]) / total * v[j] for j in near))
            torch.testing.assert_close(patches[b, i], y)
    assert 0 < lonely < 3 * len(f)
    encoding = dense.encode_image(image)
    torch.testing.assert_close(encoding.regions, clip.visual.project(patches))
    torch.testing.assert_close(encoding.features, clip.encode_image(image))


def test_proxyclip_and_dino_need_each_other(tiny_clip, dino):
    for others in (("proxyclip",), ("naclip", dino)):
        with pytest.raises(InputError, match="--readout proxyclip and --dino FILE"):
            DenseCLIP(tiny_clip, *others)


def test_pacl_embeds_the_patches_of_dino(tiny_clip, dino, batch):
    image, text, _ = batch
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
    with pytest.raises(InputError, match="DINO has patches of 8 pixels, CLIP of 16"):
        PACL(CLIP(dataclasses.replace(TINY, patch_size=16)), dino)


def test_the_small_start_passes_centers_and_regions_on():
    config = Config(
        vision_width=64, vision_layers=2, first_stage_layers=1, cross_layers=1, linear_std=0.0
    )
    model = SegCLIP(config)
    centers = torch.randn(2, 3, 64)
    patches = torch.randn(2, 5, 64)
    assert torch.equal(model.group.cross_blocks[0](centers, patches), centers)
    assert torch.equal(model.third_stage(centers), centers)
    assert not torch.equal(model.first_stage(patches), patches)
