"""GroupViT: transformers' outputs and gradients, its equations, NVlabs' files, its training."""

import dataclasses
import re
import sys
import types
import typing

import pytest
import torch
import torch.nn.functional as F

from clip_loader import from_groupvit, load_model, save_checkpoint
from conftest import TINY, assert_close, assert_one_line, rebuild_weights, recorded
from losses import contrastive_loss, multi_label_loss
from model import GroupingBlock, GroupViT, InputError

CONFIG = dataclasses.replace(
    TINY, vision_layers=4, first_stage_layers=2, group_tokens=6, projector_width=24, gumbel_tau=1.0
)


def tiny_groupvit(stages=2):
    torch.manual_seed(0)
    return GroupViT(dataclasses.replace(CONFIG, stages=stages))


@pytest.fixture(scope="module", params=[1, 2])
def golden(request, tmp_path_factory):
    """Recorded outputs, the recipe of the weights, the weights, a file of them, and its model."""
    name = f"groupvit_{request.param}stage"
    weights, recipe = rebuild_weights(f"{name}.json")
    path = tmp_path_factory.mktemp(name) / "pytorch_model.bin"
    torch.save(weights, path)
    return recorded(f"{name}.npz"), recipe, weights, path, load_model(path)


def for_clip(model, image):
    """An image that is normalised for ImageNet, as our models take it."""
    return (image - model.visual.to_imagenet.shift) / model.visual.to_imagenet.scale


# --------------------------------------------------------------------------------------------------
# Parity


def test_outputs(golden):
    expected, _, _, _, model = golden
    image = for_clip(model.eval(), expected["image"])
    with torch.no_grad():
        encoding = model.encode_image(image)
        segments, _, _ = model.visual(image)
        text = F.normalize(model.encode_text(expected["text_ids"]), dim=-1)
    soft = expected["soft_assign_0"].mT
    if "soft_assign_1" in expected:
        soft = soft @ expected["soft_assign_1"].mT
    assert_close(segments, expected["segments"], "segments")
    assert_close(encoding.regions, expected["projected_segments"], "projected segments")
    assert_close(encoding.soft, soft, "soft assignment")
    assert_close(F.normalize(encoding.features, dim=-1), expected["image_features"], "images")
    assert_close(text, expected["text_features"], "texts")


def test_loss_and_gradients(golden):
    """In training, without Gumbel noise."""
    expected, recipe, weights, path, _ = golden
    model = load_model(path).train()
    image = for_clip(model, expected["image"])
    noise = model.draw_noise(*expected["soft_assign_0"].shape[::2])
    noise = {name: torch.zeros_like(x) for name, x in noise.items()}
    loss = contrastive_loss(**model(image, expected["text_ids"], **noise))
    loss.backward()
    assert loss.item() == pytest.approx(*recipe["losses"].values(), rel=1e-4)
    # Each parameter filled with its gradient's norm, renamed and joined by the loader.
    norms = recipe["gradient_norms"].items()
    norms = from_groupvit({name: torch.full_like(weights[name], x) for name, x in norms})
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert ours.keys() == norms.keys()
    worst = 0
    for name, gradient in ours.items():
        parts = 3 if "in_proj" in name else 1
        numbers = zip(gradient.flatten().chunk(parts), norms[name].flatten().chunk(parts))
        for part, norm in numbers:
            norm = norm[0].item()
            error = abs(part.norm().item() - norm)
            if norm < 1e-4:  # zero, but for rounding
                assert error < 1e-4, name
            else:
                worst = max(worst, error / norm)
                assert error <= 1e-4 * norm, name
    print(f"{'norm of any gradient':>50}: off by {worst:.1e}")


NVLABS = {  # part of a name in transformers' files: in NVlabs'
    "vision_model.embeddings.position_embeddings": "img_encoder.pos_embed",
    "vision_model.embeddings.patch_embeddings.projection": "img_encoder.patch_embed.proj",
    "vision_model.embeddings.layernorm": "img_encoder.patch_embed.norm",
    "vision_model.layernorm": "img_encoder.norm",
    r"vision_model.encoder.stages.(\d).layers": r"img_encoder.layers.\1.blocks",
    "vision_model.encoder.stages": "img_encoder.layers",
    r"(img_.*blocks.*)self_attn.out_proj": r"\1attn.proj",
    r"(img_.*blocks.*)self_attn": r"\1attn",
    r"(img_.*blocks.*)layer_norm": r"\1norm",
    "pre_assign_attn.attn.out_proj": "pre_assign_attn.attn.proj",
    "text_model.final_layer_norm": "text_encoder.ln_final",
    "text_model.encoder.layers": "text_encoder.transformer.resblocks",
    "self_attn": "attn",
    "layer_norm": "ln_",
    "(resblocks.*)fc1": r"\1c_fc",
    "(resblocks.*)fc2": r"\1c_proj",
    "text_model.embeddings.token_embedding": "text_encoder.token_embedding",
    "text_model.embeddings.position_embedding.weight": "text_encoder.positional_embedding",
    r"visual_projection.([01])": r"img_projector.linear_hidden.\1",
    "visual_projection.3": "img_projector.linear_out",
    r"text_projection.([01])": r"text_projector.linear_hidden.\1",
    "text_projection.3": "text_projector.linear_out",
}


def as_nvlabs(weights):
    """transformers' state dict -> the same in NVlabs' naming."""
    state = {}
    for name, tensor in weights.items():
        for theirs, ours in NVLABS.items():
            name = re.sub(theirs, ours, name)
        if re.search("(img|text)_projector.*(0|out).weight", name):
            tensor = tensor[..., None]
        state[name] = tensor
    for name in [name for name in state if re.search("(blocks|resblocks).*q_proj", name)]:
        parts = [state.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        joined = "attn.qkv." if "img_encoder" in name else "attn.in_proj_"
        state[name.replace("attn.q_proj.", joined)] = torch.cat(parts)
    state["multi_label_logit_scale"] = torch.tensor(1.5)
    for name in ("img", "text"):
        state[f"{name}_projector.linear_hidden.1.num_batches_tracked"] = torch.tensor(7)
    return state


class Opened:
    """Unpickled as its own class, this would create a file."""

    def __setstate__(self, state):
        open(state["victim"], "w").close()


def omegaconf(monkeypatch, victim):
    """An object like those of OmegaConf, which is not installed here."""
    classes = {}
    for module, name in {"dictconfig": "DictConfig", "base": "ContainerMetadata"}.items():
        path = f"omegaconf.{module}"
        classes[name] = type(name, (Opened,), {"__module__": path})
        monkeypatch.setitem(sys.modules, path, types.ModuleType(path))
        setattr(sys.modules[path], name, classes[name])
    monkeypatch.setitem(sys.modules, "omegaconf", types.ModuleType("omegaconf"))
    config, metadata = classes["DictConfig"](), classes["ContainerMetadata"]()
    vars(metadata).update(ref_type=typing.Any, object_type=dict, victim=victim)
    vars(config).update(_metadata=metadata, _parent=config, victim=victim)
    return config


def test_a_checkpoint_of_nvlabs(golden, tmp_path, monkeypatch, capsys):
    expected, _, weights, _, reference = golden
    path, victim = tmp_path / "group_vit.pth", tmp_path / "victim"
    with monkeypatch.context() as patch:
        config = omegaconf(patch, str(victim))
        torch.save({"model": as_nvlabs(weights), "config": config, "epoch": 29}, path)
    model = load_model(path).eval()
    assert not victim.exists()
    assert capsys.readouterr().err == ""
    assert model.multi_label_logit_scale.item() == 1.5
    assert model.config == reference.config
    with torch.no_grad():
        encoding = model.encode_image(for_clip(model, expected["image"]))
        theirs = reference.eval().encode_image(for_clip(model, expected["image"]))
        text = model.encode_text(expected["text_ids"])
        assert torch.equal(text, reference.encode_text(expected["text_ids"]))
    for ours, other in zip(encoding, theirs):
        assert torch.equal(ours, other)


def test_files_that_are_no_groupvit(golden, tmp_path):
    _, _, weights, _, _ = golden
    path = tmp_path / "file.pth"
    state = as_nvlabs(weights)
    wrong = {
        "qkv": "Missing",  # parts of the names that are left out: part of the message
        "group_token": "group_tokens",
        "mlp_inter": "mixer",
        "img_encoder.layers": "visual.stages.0.group_tokens",
    }
    files = {
        message: {name: x for name, x in state.items() if part not in name}
        for part, message in wrong.items()
    }
    files["not the architecture"] = weights | {
        name: torch.zeros(()) for name in weights if "k_proj" in name or "group_token" in name
    }
    blocks = {name.replace("blocks.0", "blocks.7"): x for name, x in state.items()}
    files["blocks"] = {n: x.clone() for n, x in blocks.items() if "rs.1.b" in n} | state
    for message, file in files.items():
        torch.save({"model": file}, path)
        with pytest.raises(InputError) as error:
            load_model(path)
        assert_one_line(error, path, message)


# --------------------------------------------------------------------------------------------------
# The model


def test_a_grouping_block_by_hand():
    """Four tokens of two groups, made from three group tokens; one number at a time."""
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, linear_std=0.0)
    block = GroupingBlock(config, group_tokens=3, groups=2)
    for parameter in block.parameters():  # also of the norms
        torch.nn.init.normal_(parameter, mean=0.1, std=0.3)
    x, tokens = (torch.randn(1, n, 64) for n in (4, 3))
    noise = torch.randn(1, 4, 2)

    def norm(x, layer):
        mean = sum(x) / 64
        variance = sum((v - mean) ** 2 for v in x) / 64
        return (x - mean) / (variance + 1e-5).sqrt() * layer.weight + layer.bias

    def mlp(x, layer):
        h = layer.c_fc.weight @ x + layer.c_fc.bias
        h = h * (1 + torch.erf(h / 2**0.5)) / 2
        return layer.c_proj.weight @ h + layer.c_proj.bias

    keys = [norm(row, block.ln_x) for row in x[0]]
    mixed = torch.stack([norm(row, block.ln_tokens) for row in tokens[0]])  # [3, 64]
    mixed = torch.stack([mlp(channel, block.mixer) for channel in mixed.T]).T  # [2, 64]
    wq, wk, wv = block.attn.in_proj_weight.chunk(3)
    bq, bk, bv = block.attn.in_proj_bias.chunk(3)
    queries = []
    for query in mixed:
        query = norm(query, block.ln_mixed)
        e = [torch.exp((wq @ query + bq) @ (wk @ key + bk) / 8) for key in keys]  # one head of 64
        attended = sum(e_n / sum(e) * (wv @ key + bv) for e_n, key in zip(e, keys))
        query = query + block.attn.out_proj.weight @ attended + block.attn.out_proj.bias
        query = query + mlp(norm(query, block.ln_2), block.mlp)
        queries.append(norm(query, block.ln_queries))
    scores = torch.zeros(4, 2)
    for n, key in enumerate(keys):
        for o, query in enumerate(queries):
            scores[n, o] = block.to_keys(key) @ block.to_queries(query) / 64**0.5

    for training in (False, True):
        block.train(training)
        groups, M, soft = block(x, tokens, noise)
        label = (scores + noise[0] if training else scores).argmax(dim=1)
        torch.testing.assert_close(soft[0], scores.softmax(dim=1), atol=1e-5, rtol=1e-4)
        assert torch.equal(M[0], F.one_hot(label, 2).to(M.dtype))
        for o, query in enumerate(queries):
            members = [block.to_values(key) for n, key in enumerate(keys) if label[n] == o]
            y = block.out_proj(sum(members, torch.zeros(64)) / (len(members) + 1)) + query
            y = y + mlp(norm(y, block.ln_out), block.mlp_out)
            torch.testing.assert_close(groups[0, o], y, atol=1e-5, rtol=1e-4)
    assert len(label.unique()) == 2  # no group is empty


@pytest.mark.parametrize("stages", [1, 2])
def test_a_row_of_a_batch_equals_the_image_alone(stages, batch):
    image, _, _ = batch
    model = tiny_groupvit(stages).eval()
    with torch.no_grad():
        together = model.encode_image(image)
        alone = model.encode_image(image[3:4])
    for whole, one in zip(together, alone):
        torch.testing.assert_close(whole[3:4], one, atol=1e-5, rtol=1e-4)
    assert together.regions.shape == (8, 4, 16)
    torch.testing.assert_close(together.soft.sum(dim=-1), torch.ones(8, 16))
    assert torch.equal(together.hard.sum(dim=-1), torch.ones(8, 16))


def test_grouping_is_exact_in_bf16(batch):
    """At inference an argmax over the groups decides."""
    model = tiny_groupvit().eval()
    with torch.autocast("cpu", torch.bfloat16):
        encoding = model.encode_image(batch[0])
    assert encoding.regions.dtype == torch.bfloat16
    assert encoding.soft.dtype == encoding.hard.dtype == torch.float32


@pytest.mark.parametrize("height, width", [(32, 32), (64, 40), (16, 48)])
def test_any_multiple_of_the_patch_size(height, width):
    encoding = tiny_groupvit().eval().encode_image(torch.zeros(1, 3, height, width))
    assert encoding.soft.shape == (1, height * width // 64, 4)


def test_captions_and_prompts_share_one_pass(batch):
    image, text, _ = batch
    model = tiny_groupvit().train()
    prompts = torch.stack([text, text.flip(0), text], dim=1)  # [8, 3, 12]
    outputs = model(image, prompts)
    assert outputs["prompt_features"].shape == (8, 2, 16)
    torch.testing.assert_close(outputs["prompt_features"][:, 1], outputs["text_features"])
    torch.testing.assert_close(outputs["prompt_features"][:, 0].flip(0), outputs["text_features"])
    assert "prompt_features" not in model(image, text)


def test_multi_label_loss_by_hand():
    image = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    prompts = torch.tensor([[[1.0, 0.0], [0.0, 3.0]], [[0.0, 1.0], [3.0, 4.0]]])
    scale = torch.tensor(2.0).log()
    # Cosines of the two images with the four prompts: 1 0 0 .6 and 0 1 1 .8, times 2.
    log_p = torch.tensor([[2, 0, 0, 1.2], [0, 2, 2, 1.6]]).log_softmax(dim=1)
    i2t = -(log_p[0, 0] + log_p[0, 1] + log_p[1, 2] + log_p[1, 3]) / 4
    log_p = torch.tensor([[2, 0], [0, 2], [0, 2], [1.2, 1.6]]).log_softmax(dim=1)
    t2i = -(log_p[0, 0] + log_p[1, 0] + log_p[2, 1] + log_p[3, 1]) / 4
    torch.testing.assert_close(multi_label_loss(image, prompts, scale), (i2t + t2i) / 2)


@pytest.mark.parametrize("stages", [1, 2])
def test_our_checkpoint_is_itself_again(stages, tmp_path, batch):
    model = tiny_groupvit(stages).train()
    model(*batch[:2])  # BatchNorm's statistics change
    save_checkpoint(tmp_path / "checkpoint.pt", model)
    again = load_model(tmp_path / "checkpoint.pt")
    assert again.config == model.config
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


@pytest.mark.parametrize("sizes", [{"stages": 3}, {"vision_layers": 5}])
def test_stages_that_do_not_fit_are_refused(sizes):
    with pytest.raises(InputError, match="stages"):
        GroupViT(dataclasses.replace(CONFIG, **sizes))
