"""Why a score is what it is, on images with label maps.

python tests/analyse.py                 oracles: the score if one part of the model were perfect
python tests/analyse.py --coherence     are patch tokens of one class alike? (PACL, Fig. 3)

It takes the flags of evaluate.py, also those of images of your own with label maps.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import mannwhitneyu

sys.path.insert(0, str(Path(__file__).parents[1]))

import evaluate
from clip_loader import open_model
from data import normalize, progress, resize_bilinear
from model import DenseCLIP, GroupViT, InputError

EXPLANATIONS = {  # in the order in which they are best read
    "mIoU": "mIoU, as of evaluate.py",
    "patches named": "oracle mIoU: each patch has its most frequent class",
    "regions named": "oracle mIoU: each region has its most frequent class",
    "purity": "pixels with the most frequent class of their region",
    "patches": "patches classified correctly",
    "regions": "regions per image",
}


def majority(parts, label):
    """Gives each part of an image its most frequent label: int [H, W], uint8 [H, W] -> [H, W]."""
    parts = np.unique(parts, return_inverse=True)[1].reshape(label.shape)  # numbered without gaps
    pairs = (256 * parts + label).ravel()
    counts = np.bincount(pairs, minlength=256 * (parts.max() + 1)).reshape(-1, 256)
    counts[:, 255] = 0  # not scored
    return counts.argmax(axis=1)[parts].astype(np.uint8)


def nearest(values, shape):
    """Resizes an array [h, w] to a shape (H, W), nearest neighbor."""
    y, x = (np.arange(new) * old // new for old, new in zip(values.shape, shape))
    return values[y[:, None], x]


def oracles(results, num_classes, patch_size):
    """results: of each image its label map, uint8 [H, W], and its Segmentation -> EXPLANATIONS."""
    names = "mIoU", "patches named", "regions named", "patches"
    counts = {name: evaluate.Confusion(num_classes) for name in names}
    numbers = []  # of regions
    for label, result in results:
        height, width = result.maps.shape[1:]  # as the model saw it
        y, x = np.mgrid[:height, :width] // patch_size
        patches = nearest(y * width + x, label.shape)
        regions = patches if result.regions is None else nearest(result.regions, label.shape)
        best = majority(patches, label)
        counts["mIoU"].add(result.label, label)
        counts["patches named"].add(best, label)
        counts["regions named"].add(majority(regions, label), label)
        best[label == 255] = 255
        counts["patches"].add(majority(patches, result.label), best)
        numbers.append(len(np.unique(regions)))
    summaries = {name: x.summary() for name, x in counts.items()}
    values = {name: summary["mIoU"] for name, summary in summaries.items()}
    values["purity"] = summaries["regions named"]["aAcc"]
    values["patches"] = summaries["patches"]["aAcc"]
    return values | {"regions": float(np.mean(numbers))}


# --------------------------------------
# Semantic coherence: the cosine of two patch tokens as a test for the same class


@torch.inference_mode()
def coherence(model, samples, short_side, patches=40):
    """-> the area under the ROC curve, over pairs of so many random patches of each image.

    It is how often two patches of one class are more similar than two of different classes. A patch
    has the class of its center. Its token is not grouped or embedded yet, but CLIP's are projected.
    """
    if isinstance(model, GroupViT):
        raise InputError("--coherence: a GroupViT has no patch tokens without its group tokens")
    rng = np.random.RandomState(0)
    patch = model.visual.patch_size
    cosines = []
    same = []
    for sample in samples:
        factor = short_side / min(sample.label.shape) / patch
        rows, columns = (max(1, round(side * factor)) for side in sample.label.shape)
        image = torch.tensor(resize_bilinear(sample.image, rows * patch, columns * patch))
        image = normalize(image.permute(2, 0, 1).to(model.clip.logit_scale.device))[None]
        is_clip = isinstance(model, DenseCLIP)
        tokens = model.encode_image(image).regions if is_clip else model.patch_tokens(image)
        label = nearest(sample.label, (2 * rows, 2 * columns))[1::2, 1::2].ravel()
        chosen = rng.permutation(np.flatnonzero(label != 255))[:patches]
        i, j = chosen[np.array(np.triu_indices(len(chosen), 1))]
        cosines.append(F.cosine_similarity(tokens[0, i], tokens[0, j]).float().cpu().numpy())
        same.append(label[i] == label[j])
    cosines = np.concatenate(cosines)
    same = np.concatenate(same)
    area = mannwhitneyu(cosines[same], cosines[~same]).statistic
    return area / same.sum() / (~same).sum()


# --------------------------------------
# The program

FLAGS = [("coherence", bool, False, "the area under the ROC curve")]


def parse_args(argv=None):
    return evaluate.parse_args(argv, __doc__, FLAGS)


def samples_of(dataset, limit):
    samples = (dataset[i] for i in progress(range(len(dataset))[:limit], "images"))
    return (sample for sample in samples if sample.label is not None)


def main(argv=None):
    args = parse_args(argv)
    how = {"readout": args.readout, "activation": args.activation, "dino": args.dino}
    checkpoint = args.checkpoint or evaluate.DEFAULT_CHECKPOINT
    model, tokenizer = open_model(checkpoint, args.vocabulary, **how)
    model.to(evaluate.start_processes(args.device)).eval()
    dataset, classes = evaluate.what_to_label(args, model.config.image_size)
    changes = {name: getattr(args, name) for name, *_ in evaluate.CHANGES}
    protocol = evaluate.choose_protocol(args.protocol, dataset, model.config, classes, **changes)
    samples = samples_of(dataset, args.limit)
    if args.coherence:
        area = coherence(model, samples, protocol.short_side)
        return print(f"area under the ROC curve: {area:.4f}")
    text = evaluate.class_features(model, tokenizer, protocol)
    results = ((x.label, evaluate.segment(model, text, x.image, protocol)) for x in samples)
    num_classes = protocol.has_background + len(dataset.words)
    values = oracles(results, num_classes, model.visual.patch_size)
    for name, what in EXPLANATIONS.items():
        number = f"{values[name]:6.1f}  " if name == "regions" else f"{100 * values[name]:6.1f} %"
        print(f"{number}  {what}")
    output = Path(args.output or "runs/analysis")
    output.mkdir(parents=True, exist_ok=True)
    (output / "analysis.json").write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    evaluate.run_program(main)
