"""Why a score is what it is, on images with label maps. The flags are those of evaluate.py, and:

python tests/analyse.py                 oracles: the score if one part of the model were perfect
python tests/analyse.py --coherence     are patch tokens of one class more similar? (PACL, Fig. 3)
python tests/analyse.py --compare       a table and a figure of the models in runs/
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).parents[1]))

import evaluate
from data import ImageFolder, normalise
from evaluate import Confusion, max_over_synonyms, mean, window_starts
from model import InputError

# --------------------------------------------------------------------------------------------------
# Oracles


def majority(parts, label):
    """Gives each part of an image its most frequent label: int [H, W], uint8 [H, W] -> [H, W]."""
    parts = np.unique(parts, return_inverse=True)[1].reshape(label.shape)  # numbered without gaps
    pairs = (256 * parts + label).ravel()
    counts = np.bincount(pairs, minlength=256 * (parts.max() + 1)).reshape(-1, 256)
    counts[:, 255] = 0  # not scored
    return counts.argmax(axis=1)[parts].astype(np.uint8)


EXPLANATIONS = {  # in the order in which they are best read
    "ceiling": "oracle mIoU at patch resolution: each patch has its most frequent class",
    "names perfect": "oracle mIoU of regions: each region has its most frequent class",
    "grouping perfect": "mIoU if each ground-truth segment got one class, that of its mean score",
    "purity": "purity: pixels with the most frequent class of their region",
    "patches": "patches classified correctly",
    "named right": "ground-truth segments classified correctly",
    "words found": "classes of an image among the image feature's best (--top-k, or 5)",
    "captions": "captions nearest to their own image among 100",
    "regions": "regions per image",
}


class Oracles:
    """What the score would be if one part of the model were perfect, and how good each part is."""

    def __init__(self, num_classes, segmenter, tokenizer):
        self.segmenter = segmenter
        self.tokenizer = tokenizer
        self.top_k = segmenter.protocol.top_k or 5
        names = ("ceiling", "names perfect", "grouping perfect", "patches")
        self.confusions = {name: Confusion(num_classes) for name in names}
        self.regions = []
        self.right_names = []
        self.words_found = []
        self.captions = []
        self.features = []

    def add(self, sample, result):
        """One image: a Sample with a label map, and its Segmentation."""
        label = sample.label
        patches = nearest(self.patch_numbers(result.seen), label.shape)
        best = majority(patches, label)
        self.confusions["ceiling"].add(best, label)
        self.confusions["patches"].add(
            majority(patches, result.label), np.where(label == 255, 255, best)
        )
        regions = patches if result.regions is None else nearest(result.regions, label.shape)
        self.confusions["names perfect"].add(majority(regions, label), label)
        self.regions.append(len(np.unique(regions)))

        protocol = self.segmenter.protocol
        scores = evaluate.class_scores(result.maps, self.segmenter.scale, protocol)  # [C, h, w]
        classes = [c for c in np.unique(label) if c < len(scores)]
        named = label.copy()
        for c in classes:
            segment = torch.as_tensor(nearest(label == c, scores.shape[1:]), device=scores.device)
            if segment.any():
                named[label == c] = scores[:, segment].mean(dim=1).argmax().item()
            self.right_names.append(bool((named[label == c] == c).all()))
        self.confusions["grouping perfect"].add(named, label)

        first = len(scores) - len(protocol.classes)  # 1 where background has no word
        feature = F.normalize(result.features.float(), dim=-1)  # [windows, E]
        scores = feature @ self.segmenter.text.T
        scores = max_over_synonyms(scores, protocol.classes, dim=1).amax(dim=0)
        top = scores.argsort(descending=True)[: self.top_k].tolist()
        self.words_found += [c - first in top for c in classes if c >= first]
        if sample.caption:
            self.captions.append(sample.caption)
            self.features.append(F.normalize(feature.mean(dim=0), dim=0))

    def patch_numbers(self, seen):
        """The number of each pixel's patch, at the inference resolution (h, w)."""
        patch = self.segmenter.patch
        y, x = np.mgrid[: seen[0], : seen[1]]
        return y // patch * seen[1] + x // patch

    def summary(self):
        """-> {key of EXPLANATIONS: fraction or number}."""
        results = {name: confusion.summary() for name, confusion in self.confusions.items()}
        values = {name: results[name]["mIoU"] for name in self.confusions}
        values["purity"] = results["names perfect"]["aAcc"]
        values["patches"] = results["patches"]["aAcc"]
        values["named right"] = mean(self.right_names)
        values["words found"] = mean(self.words_found)
        values["captions"] = self.retrieval()
        values["regions"] = mean(self.regions)
        return {name: values[name] for name in EXPLANATIONS}

    @torch.inference_mode()
    def retrieval(self):
        """How often a caption is nearest to its own of 100 images; None without 100 captions."""
        found = []
        model = self.segmenter.model
        for i in range(0, len(self.captions) - 99, 100):
            text = self.tokenizer(self.captions[i : i + 100], model.config.context_length)
            text = F.normalize(model.encode_text(text.to(self.segmenter.text.device)), dim=-1)
            similarity = text @ torch.stack(self.features[i : i + 100]).T
            found += (similarity.argmax(dim=1).cpu() == torch.arange(100)).tolist()
        return mean(found) if found else None


def nearest(values, shape):
    """Resizes an array [h, w] to a shape (H, W), nearest neighbour."""
    y, x = (np.arange(new) * old // new for old, new in zip(values.shape, shape))
    return values[y[:, None], x]


def run_oracles(segmenter, tokenizer, dataset, limit, workers):
    """-> metrics of evaluate.py, with "analysis" of the oracles; the first results.

    These are (sample, its predicted label map) of up to four images.
    """
    names = evaluate.class_names(dataset, segmenter.protocol)
    confusion = Confusion(len(names))
    oracles = Oracles(len(names), segmenter, tokenizer)
    first = []
    images = evaluate.load_images(segmenter, dataset, range(len(dataset))[:limit], workers, [])
    for sample, result in segmenter(images):
        if len(first) < 4:
            first.append((sample, result.label))
        if sample.label is not None:
            confusion.add(result.label, sample.label)
            oracles.add(sample, result)
    if not oracles.regions:
        raise InputError("no image has a label map")
    return confusion.summary() | {"analysis": oracles.summary()}, first


# --------------------------------------------------------------------------------------------------
# Semantic coherence: ROC of the cosine of two patch tokens as a test for the same class (PACL,
# Figure 3)

PAIRS = 1000  # of patches of each image, and as many with those of another one


def patch_classes(label, patch, stride):
    """The most frequent value in each patch, 255 among them: uint8 [H, W] -> [N]."""
    pixels = torch.as_tensor(label).unfold(0, patch, stride).unfold(1, patch, stride)
    return pixels.flatten(2).flatten(0, 1).mode(dim=1).values  # [rows, columns, P, P] -> [N]


def pairs_of_patches(segmenter, images):
    """(sample, resized image) ... -> {"within an image": cosines and same class [2, n], ...}.

    From one window of each image come PAIRS of patches, and as many with the image before.
    """
    patch = segmenter.patch
    protocol = segmenter.protocol
    choose_window = np.random.RandomState(0)
    choose_patch = np.random.RandomState(1)
    found = {"within an image": [], "across images": []}
    before = None
    for sample, resized in images:
        if sample.label is None:
            continue
        spans = []
        for side in resized.shape[:2]:
            starts = window_starts(side, protocol.window, protocol.stride)
            spans.append(choose_window.choice(starts) + np.arange(protocol.window))
        y, x = spans
        crop = torch.as_tensor(resized[y[:, None], x], device=segmenter.text.device)
        crop = normalise(crop.permute(2, 0, 1))[None]
        segmenter.model.visual.stride = segmenter.stride
        token = segmenter.model.patch_tokens(crop)
        (height, width), (h, w) = sample.label.shape, resized.shape[:2]
        rows = (2 * y + 1) * height // (2 * h)  # the label map has the image's own size
        columns = (2 * x + 1) * width // (2 * w)
        label = patch_classes(sample.label[rows[:, None], columns], patch, segmenter.stride)
        token = F.normalize(token[0].float(), dim=-1).cpu()[label != 255]
        label = label[label != 255]
        if len(label) < 2:
            continue
        i = choose_patch.randint(len(label), size=PAIRS)
        j = (i + choose_patch.randint(1, len(label), size=PAIRS)) % len(label)  # any patch but i
        others = [(token, label, j)]
        if before:
            others.append((*before, choose_patch.randint(len(before[1]), size=PAIRS)))
        for pairs, (other, classes, j) in zip(found.values(), others):
            cosine = (token[i] * other[j]).sum(dim=-1)
            pairs.append(torch.stack([cosine, (label[i] == classes[j]).float()]))
        before = token, label
    return {
        kind: torch.cat([torch.empty(2, 0), *pairs], dim=1).numpy() for kind, pairs in found.items()
    }


def roc(scores, same):
    """Scores [n], 1 or 0 [n] -> false and true positive rates by falling threshold, the area.

    The area is how often a one scores higher than a zero; a tie counts half. None without ones or
    zeros.
    """
    values, which = np.unique(-scores, return_inverse=True)
    positive, negative = (
        np.bincount(which[same == kind], minlength=len(values)) for kind in (1, 0)
    )
    if not positive.any() or not negative.any():
        return None
    true = positive.cumsum()
    false = negative.cumsum()
    area = (negative * (2 * true - positive)).sum() / (2 * true[-1] * false[-1])
    return np.append(0, false / false[-1]), np.append(0, true / true[-1]), float(area)


@torch.inference_mode()
def coherence(segmenter, images, path):
    """Draws the ROC curves -> {"area": {kind of pairs: area or None}, "pairs": their number}."""
    if not segmenter.protocol.window:
        raise InputError("--coherence needs windows; give --window")
    found = pairs_of_patches(segmenter, images)
    found = {"all pairs": np.concatenate(list(found.values()), axis=1)} | found
    curves = {kind: curve for kind, (scores, same) in found.items() if (curve := roc(scores, same))}
    draw_roc(curves, path)
    areas = {kind: curves[kind][2] if kind in curves else None for kind in found}
    return {"area": areas, "pairs": found["all pairs"].shape[1]}


def draw_roc(curves, path, side=400):
    """Draws {name: (false positives [k], true positives [k], area)}, and the diagonal."""
    sheet = Image.new("RGB", (side + 80, side + 90), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13)
    colours = evaluate.palette(len(curves))

    def place(x, y):
        return 50 + side * x, 35 + side * (1 - y)

    draw.rectangle((*place(0, 1), *place(1, 0)), outline="black")
    draw.line((*place(0, 0), *place(1, 1)), "grey")
    for tick in (0, 0.25, 0.5, 0.75, 1):
        x, bottom = place(tick, 0)
        left, y = place(0, tick)
        draw.text((x, bottom + 5), f"{tick:g}", "black", font, anchor="ma")
        draw.text((left - 5, y), f"{tick:g}", "black", font, anchor="rm")
    draw.text((5, 8), "true positive rate: pairs of one class", "black", font)
    text = "false positive rate: pairs of two classes"
    draw.text((50 + side, side + 60), text, "black", font, anchor="ra")
    x = np.linspace(0, 1, side + 1)
    entries = [((128,) * 3, "chance: area 0.500")]
    for colour, (name, (false, true, area)) in zip(colours.tolist(), curves.items()):
        draw.line([place(0, 0), *map(place, x, np.interp(x, false, true))], tuple(colour), 2)
        entries.append((colour, f"{name}: area {area:.3f}"))
    evaluate.with_legend(sheet, entries).save(path)


# --------------------------------------------------------------------------------------------------
# The program

PUBLISHED_ON = "VOC-21 Context-60 COCO-Object VOC-20 Context-59 COCO-Stuff ADE Cityscapes".split()
# name: (--method of train.py, read-out, published mIoU with ViT-B/16 and its protocol; see
# docs/results.md)
COMPARED = {
    "CLIP": ("clip", "clip", "16.4 8.4 5.6 41.9 9.2 4.4 2.9 5.0", "sclip"),
    "MaskCLIP": ("clip", "maskclip", "43.4 23.2 20.6 74.9 26.4 16.7 11.9 24.9", "TCL"),
    "SCLIP": ("clip", "sclip", "59.1 30.4 30.5 80.4 34.2 22.4 16.1 32.2", "sclip"),
    "ClearCLIP": ("clip", "clearclip", "51.8 32.6 33.0 80.9 35.9 23.9 16.7 30.0", "clearclip"),
    "NACLIP": ("clip", "naclip", "58.9 32.2 33.2 79.7 35.2 23.3 17.4 35.5", "naclip"),
    "mean of keys": ("clip", "keymean", "59.1 - - - - 23.6 16.9 32.1", "RF-CLIP"),
    "PACL": ("pacl", "clip", "- - - 72.3 50.1 38.8 31.4 -", "own"),
    "GroupViT": ("groupvit", "clip", "52.3 22.4 24.3 - - - - -", "groupvit"),
    "SegCLIP": ("segclip", "clip", "52.6 24.7 26.5 - - - 8.7 11.0", "segclip"),
}


def parse_args(argv=None):
    parser = evaluate.Parser(__doc__)
    parser.add_argument(
        "--coherence", action="store_true", help="area under the ROC curve, roc.png"
    )
    parser.add_argument(
        "--compare",
        action="store_true",
        help="the models of the scenes in runs/: prints a table, draws runs/compare/examples.png",
    )
    args = evaluate.parse_args(argv, parser)
    if args.image or args.classify or args.images and not args.labels_dir:
        parser.error("an analysis needs images with label maps: --dataset, or --labels-dir")
    return args


def open_all(checkpoint, readout, args):
    """-> Segmenter, tokenizer, data set, with the flags of evaluate.py."""
    files = args.activation, args.dino, args.vocabulary
    model, tokenizer = evaluate.open_model(checkpoint, readout, *files)
    classes = evaluate.read_classes(args.words) if args.words else None
    dataset = evaluate.open_dataset(args.dataset, args.data_root, model.config.image_size)
    if args.images:
        words = [synonyms[0] for synonyms in classes]
        has_background = args.background is not None or args.background_entropy is not None
        how = args.labels_dir, words, has_background, None, args.ignore
        dataset = ImageFolder(args.images, *how)
    changes = {name: getattr(args, name) for name in evaluate.PROTOCOL_FLAGS}
    if args.background != -1:
        changes["background_threshold"] = args.background
    model.to(evaluate.pick_device(args.device))
    how = args.protocol, classes, args.batch_size, args.precision == "bf16"
    segmenter = evaluate.open_segmenter(model, tokenizer, dataset, *how, **changes)
    return segmenter, tokenizer, dataset


def main(argv=None):
    args = parse_args(argv)
    if args.compare:
        return compare(args)
    checkpoint = args.checkpoint or evaluate.DEFAULT_CHECKPOINT
    segmenter, tokenizer, dataset = open_all(checkpoint, args.readout, args)
    source = "images" if args.images else args.dataset
    output = Path(args.output or evaluate.output_folder(source, checkpoint))
    output.mkdir(parents=True, exist_ok=True)
    if args.coherence:
        order = np.random.RandomState(0).permutation(len(dataset))[: args.limit].tolist()
        images = evaluate.load_images(segmenter, dataset, order, args.workers, [])
        result = coherence(segmenter, images, output / "roc.png")
        print(f"{result['pairs']} pairs of patches")
        for kind, area in result["area"].items():
            print(
                f"area under the ROC curve, {kind}: {'-' if area is None else format(area, '.4f')}"
            )
        return None
    metrics, _ = run_oracles(segmenter, tokenizer, dataset, args.limit, args.workers)
    print(f"{100 * metrics['mIoU']:6.1f} %  mIoU")
    for key, value in metrics["analysis"].items():
        number = "     -  " if value is None else f"{100 * value:6.1f} %"
        if key == "regions":
            number = f"{value:6.1f}  "
        print(f"{number}  {EXPLANATIONS[key]}")
    (output / "analysis.json").write_text(json.dumps(metrics, indent=1) + "\n")
    return metrics


def compare(args):
    """Prints a table in Markdown of the models that train.py left in runs/, and draws a figure."""
    found = {method: Path(run, "checkpoint.pt") for method, run in evaluate.RUNS.items()}
    names = [name for name, (method, *_) in COMPARED.items() if found[method].exists()]
    if not names:
        raise InputError("runs/: no model to compare; run `python train.py`")
    for method, checkpoint in found.items():
        if not checkpoint.exists():
            print(f"no {checkpoint}: run `python train.py --method {method}`", file=sys.stderr)
    print(
        "The columns from VOC-21 on are published, of a ViT-B/16; GroupViT's of a ViT-S/16 with "
        "two stages (with one, 28.1 on VOC-21).",
        file=sys.stderr,
    )
    print(f"| | mIoU on {args.dataset} | patches | {' | '.join(PUBLISHED_ON)} | protocol |")
    print(f"|---|---|---|{'---|' * len(PUBLISHED_ON)}---|")
    examples = []
    for name in names:
        method, readout, published, protocol = COMPARED[name]
        segmenter, tokenizer, dataset = open_all(found[method], readout, args)
        metrics, first = run_oracles(segmenter, tokenizer, dataset, args.limit, args.workers)
        measured = [f"{100 * x:.1f} %" for x in (metrics["mIoU"], metrics["analysis"]["patches"])]
        print(f"| {' | '.join([name, *measured, *published.split(), protocol])} |", flush=True)
        examples = examples or [[sample.image, sample.label] for sample, _ in first]
        for example, (_, label) in zip(examples, first):
            example.append(label)
    path = Path(args.output or "runs/compare", "examples.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    words = evaluate.class_names(dataset, segmenter.protocol)
    colours = evaluate.palette(len(words))
    columns = {"image": "image", "ground truth": "label"} | dict.fromkeys(names, "label")
    evaluate.draw_examples(examples, columns, words, colours, path, width=120)
    print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    evaluate.run_program(main, "stopped")
