"""Scenes, images and label maps in every form, superpixels and crops, and image-text pairs."""

import hashlib
import io
import json
import os
import pickle
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader

import data
from clip_loader import Tokenizer
from conftest import TINY
from data import Sample, SyntheticScenes, TrainingPairs
from model import InputError


def refused(pattern):
    return pytest.raises(InputError, match=pattern)


def test_scenes_are_the_same_on_every_machine():
    """If this value changes, no result on the scenes can be compared with an older one."""
    digest = hashlib.sha256()
    for split in ("train", "val"):
        for i in (0, 1, 2, 1000):
            sample = SyntheticScenes(64, seed=0, split=split)[i]
            digest.update(sample.image.tobytes() + sample.label.tobytes())
            digest.update(sample.caption.encode())
    assert digest.hexdigest()[:16] == "d0e1a94116df28bc"


def test_superpixels_follow_the_objects():
    image = np.zeros((64, 128, 3), np.uint8)
    image[:, 64:] = 255
    segments = data.superpixels(image, 32, 8)
    assert segments.shape == (32, 64)  # reduced
    assert np.ptp(segments[:, :28]) == np.ptp(segments[:, 36:]) == 0 < np.ptp(segments)


def test_patch_label_is_the_floor_of_the_mean():
    segments = np.zeros((8, 8), int)
    segments[:4, 2:4] = 3  # first patch: half 0, half 3 -> 1.5 -> 1
    segments[:, 4:] = 7
    segments[0, 4] = 2  # second: 15 of 16 pixels 7 -> 6.69 -> 6
    assert data.patch_labels(segments, 4).tolist() == [1, 6, 0, 7]


@pytest.mark.parametrize("shape", [(64, 64), (50, 90), (90, 30), (8, 200), (1, 1)])
@pytest.mark.parametrize("reduction", [1, 2])  # superpixels are those of a reduced image
def test_crops_keep_image_and_superpixels_aligned(monkeypatch, shape, reduction):
    """Also mirrored ones: an image whose gray is the id of its superpixel stays so."""
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    ids = (rows * 50 // shape[0] + columns * 200 // shape[1]).astype(np.uint8)
    monkeypatch.setattr(data, "superpixels", lambda *_: ids[::reduction, ::reduction])
    pairs = training([Sample(np.dstack([ids] * 3), None, "", "")], mirror=True)
    crops = [pairs[position][:2] for position in range(40)]
    for crop, superpatch in crops:
        patches = crop[..., 0].reshape(4, 8, 4, 8).mean(axis=(1, 3)).ravel()
        assert abs(patches - superpatch).max() < 8
    assert shape == (1, 1) or 10 < sum(crop[0, 0, 0] > crop[0, -1, 0] for crop, _ in crops) < 30


def test_images_of_every_mode_look_as_in_a_viewer(tmp_path):
    rgb = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [128, 128, 128]]], np.uint8)
    gray = np.array([[0, 100], [200, 255]])

    def shown(image, name="a.png", **options):
        image.save(tmp_path / name, **options)
        return data.read_image(tmp_path / name).astype(int)

    image = Image.fromarray(rgb)
    palette = image.quantize(4)
    assert (shown(palette) == rgb).all()
    assert (shown(palette, transparency=palette.getpixel((1, 0)))[0, 1] == 255).all()
    for kind, scale in (("u2", 257), ("u2", 16), ("i4", 1), ("f4", 1 / 255)):  # 16: of 12 bits
        deep = shown(Image.fromarray((gray * scale).astype(kind)), "a.tif")
        assert abs(deep - gray[..., None]).max() <= 1
    image.putalpha(Image.fromarray(np.array([[255, 0], [255, 128]], np.uint8)))
    on_white = [[[255, 0, 0], [255] * 3], [[0, 0, 255], [191] * 3]]
    assert abs(shown(image) - on_white).max() <= 1
    corner = np.zeros((32, 64), np.uint8)
    corner[:16, :16] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to the right
    turned = shown(Image.fromarray(corner), "a.jpg", exif=exif)
    assert (turned == np.rot90(corner, -1)[..., None]).all()
    assert data.read_image(tmp_path / "a.jpg", 10).shape == (32, 16, 3)  # decoded at half its size


def test_broken_images(tmp_path):
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"  # would start a program
    for reason, content in {"truncated": encoded(0, "PNG")[:3000], "identify": eps}.items():
        (tmp_path / "a.jpg").write_bytes(content)
        with refused(f"a.jpg: .*{reason}"):
            data.read_image(tmp_path / "a.jpg")


def write_image(path, array=((1,),)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.array(array, np.uint8)).save(path)


VOC = ("JPEGImages/x.jpg", "SegmentationClass/x.png", "ImageSets/Segmentation/val.txt")
CONTEXT = ("JPEGImages/x.jpg", "SegmentationClassContext/x.png",
    "ImageSets/SegmentationContext/val.txt")  # fmt: skip
COCO = ("images/val2017/x.jpg", "annotations/val2017/x.png", None)
LAYOUTS = {  # image and label map; the list of names; {value in the label map: its class}
    "pascal_voc": (*VOC, {0: 0, 1: 1, 20: 20, 255: 255}),
    "pascal_voc20": (*VOC, {0: 255, 1: 0, 20: 19, 255: 255}),
    "pascal_context": (*CONTEXT, {0: 0, 1: 1, 59: 59}),
    "pascal_context59": (*CONTEXT, {0: 255, 1: 0, 59: 58}),
    "coco_object": (*COCO, {0: 1, 10: 11, 12: 12, 89: 80, 91: 0, 181: 0, 255: 0}),
    "coco_stuff": (*COCO, {0: 0, 10: 10, 12: 11, 89: 79, 91: 80, 181: 170, 255: 255}),
    "ade20k": ("images/validation/x.jpg", "annotations/validation/x.png", None,
        {0: 255, 1: 0, 150: 149}),
    "cityscapes": ("leftImg8bit/val/y/x_leftImg8bit.png", "gtFine/val/y/x_gtFine_labelIds.png",
        None, {0: 255, 7: 0, 8: 1, 13: 4, 28: 15, 30: 255, 33: 18}),
    "coco_object converted": (COCO[0], "annotations/val2017/x_instanceTrainIds.png", None,
        {0: 0, 80: 80, 255: 255}),
    "coco_stuff converted": (COCO[0], "annotations/val2017/x_labelTrainIds.png", None,
        {0: 0, 170: 170, 255: 255}),
    "cityscapes converted": ("leftImg8bit/val/y/x_leftImg8bit.png",
        "gtFine/val/y/x_gtFine_labelTrainIds.png", None, {0: 0, 18: 18, 255: 255}),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_benchmarks(tmp_path, name):
    image, label, split, classes = LAYOUTS[name]
    name = name.split()[0]
    with refused("val"):
        data.open_benchmark(name, tmp_path)
    if split:
        (tmp_path / split).parent.mkdir(parents=True)
        (tmp_path / split).write_text("x\r\n\n")
    write_image(tmp_path / image, [[9] * len(classes)])
    write_image(tmp_path / label, [list(classes)])
    dataset = data.open_benchmark(name, tmp_path)
    (sample,) = [dataset[i] for i in range(len(dataset))]
    assert sample.label.tolist() == [list(classes.values())]
    assert max({*classes.values()} - {255}) + 1 == len(dataset.words) + dataset.has_background


def test_own_images(tmp_path, capsys):
    """What is passed over is counted, and the first is named."""
    images, labels, words = tmp_path / "images", tmp_path / "labels", ["cat", "dog"]
    images.mkdir()
    with refused("no image"):
        data.open_folder(images, None, words)
    for name in ("a.jpg", "sub/b.PNG", "._a.jpg"):  # macOS leaves such files
        write_image(images / name, [[1, 2, 3]])
    (images / "c.gif").touch()
    a, b = data.open_folder(images, None, words)
    assert (a.name, b.name) == ("a", os.path.join("sub", "b")) and a.label is None
    write_image(labels / "c.png", [[1]])
    with refused("no label map .*c.png"):
        data.open_folder(images, labels, words)
    write_image(labels / "a.PNG", [[0, 1, 255]])
    for path, count in ((images, 2), (images / "a.jpg", 1)):
        label, *others = [x.label for x in data.open_folder(path, labels, words, True)]
        assert label.tolist() == [[0, 1, 255]] and others == [None] * (count - 1)
    notes = capsys.readouterr().err
    assert all(note in notes for note in ("c.gif", "b.PNG", "c.png", "0 to 2): dog\n"))
    write_image(images / "a.png")
    with refused("a.jpg, .*a.png: two"):
        data.open_folder(images, None, words)


GRAY_OF_4_BITS = bytes.fromhex(  # a PNG of 0, 1, 2, 3; Pillow does not write such files
    "89504e470d0a1a0a0000000d494844520000000400000001040000000019a7bd10"
    "0000000b49444154789c6360540600002800253ac315ef0000000049454e44ae426082"
)


@pytest.mark.parametrize("form", ["palette", "gray", "16 bits", "1 bit", "4 bits", "32 bits"])
def test_label_maps_in_every_form(tmp_path, form):
    values = [[0, 1, 1, 0]] if form == "1 bit" else [[0, 1, 2, 3]]
    path = tmp_path / "a.png"
    kinds = {"16 bits": "u2", "32 bits": "i4", "1 bit": "?"}
    image = Image.fromarray(np.array(values, kinds.get(form, "u1")))
    if form == "palette":
        image.putpalette(bytes(range(12)))
    image.save(path, "TIFF" if form == "32 bits" else "PNG")
    if form == "4 bits":
        path.write_bytes(GRAY_OF_4_BITS)
    assert data.read_values(path).tolist() == values


def test_label_maps_that_are_none(tmp_path, capsys):
    write_image(tmp_path / "images/a.png", [[5, 5, 5]])
    path = tmp_path / "labels/a.png"
    write_image(path)
    for mode, kind in (("LA", "PNG"), ("RGB", "PNG"), ("F", "TIFF"), ("L", "JPEG"), ("L", "PNG")):
        Image.new(mode, (2, 1)).save(path, kind)  # the last has another size than its image
        dataset = data.open_folder(tmp_path / "images", path.parent, ["cat", "dog"])
        with refused("labels.a.png: "):
            dataset[0]


@pytest.mark.parametrize("values", [[1, 2], [0, 2], [0, 255], [-255, 1, 300], [0, 128, 255]])
def test_values_that_are_no_numbers_of_classes(tmp_path, capsys, values):
    """The message has the flag that is right; with it, the others are not scored."""
    write_image(tmp_path / "images/a.png", [[5] * len(values)])
    (tmp_path / "labels").mkdir()
    Image.fromarray(np.array([values], np.int32)).save(tmp_path / "labels/a.tif")
    folders = tmp_path / "images", tmp_path / "labels"
    with refused(f"the values {', '.join(map(str, values))}; .*--label-values 1-2.* 0,255"):
        data.open_folder(*folders, ["cat", "dog"])
    dataset = data.open_folder(*folders, ["cat", "dog"], label_values=[values[1], 9])
    assert dataset[0].label.tolist() == [[0 if x == values[1] else 255 for x in values]]
    assert f"(values {values[1]} to 9): dog" in capsys.readouterr().err


def encoded(i, kind="JPEG"):
    file = io.BytesIO()
    Image.fromarray(SyntheticScenes(64)[i].image).save(file, kind)
    return file.getvalue()


def open_all(*specs, workers=0):
    return ConcatDataset(data.open_pairs([str(spec) for spec in specs], 32, 0, workers))


def training(source, **options):
    options = {"crop_scale": 0.5, "seed": 3} | options
    return TrainingPairs(source, Tokenizer(), TINY, **options)


def lines(row, numbers="0123"):
    return "".join(row.replace("#", n) + "\n" for n in numbers)


def coco(numbers):
    images = [{"id": n, "file_name": f"im/{n}.jpg"} for n in numbers]
    rows = [{"image_id": n, "caption": f"text {n}, more"} for n in "0123"]
    return json.dumps({"images": images, "annotations": rows})


def karpathy(folder, name):
    image = {"filename": name, "split": "train", "sentences": [{"raw": "text #, more"}]} | folder
    images = lines(json.dumps(image)).splitlines() + [json.dumps(image | {"split": "restval"})]
    return '{"images": [%s]}' % ",".join(images)


GOOD = {
    "bom.csv": "\ufeff" + lines('im/#.jpg, "text #, more"'),
    "quoted.csv": '"","image","caption"\n' + lines('"5","im/#.jpg","text #, more"'),
    "named.tsv": "Title\tfilepath \n" + lines("text #, more\tim/#.jpg"),
    "list.json": json.dumps(
        [{"image": f"im/{n}.jpg", "caption": f"text {n}, more"} for n in "0123"]
    ),
    "pairs.jsonl": lines('{"image": "im/#.jpg", "caption": "text #, more"}\n'),
    "coco.json": coco("0123"),
    "karpathy.json": karpathy({"filepath": "im"}, "#.jpg"),
    "flickr30k.json": karpathy({}, "im/#.jpg"),
}
BROKEN_ROWS = {  # beside one that can be used
    "gone.csv": 'im/0.jpg,"text 0, more"\n' + lines("im/gone#.jpg,text", "abcdefghijkl"),
    "short.csv": 'im/0.jpg,"text 0, more"\nim/1.jpg\n',
    "quote.tsv": 'im/0.jpg\ttext 0, more\n"im/1.jpg\t"text\n',
    "comma.csv": 'im/0.jpg,"text 0, more"\nim/1.jpg,text 1, more\n',
    "says_nothing.csv": 'im/0.jpg,"text 0, more"\nim/1.jpg,1005\nim/2.jpg,caf\ufffd\n',
    "number.jsonl": '{"image": "im/1.jpg", "caption": 5}\n' + GOOD["pairs.jsonl"][:50],
    "cut.jsonl": '{"image": "im/1.j\n' + GOOD["pairs.jsonl"][:50],
    "nameless.json": coco("0"),
}
UNREADABLE = {
    "nowhere.csv": None,
    "empty.csv": "",
    "broken.json": "{",
    "columns.csv": "image,number,comment\n" + lines("im/#.jpg,#,text"),
    "quoted_columns.csv": '"image","number"\n' + lines('"im/#.jpg","text #"'),
    "semicolon.csv": "image;caption\n" + lines("im/#.jpg;text"),
    "open.csv": 'im/0.jpg,text\nim/1.jpg,"text\nim/2.jpg,text\n',
}


@pytest.mark.parametrize("name", GOOD | BROKEN_ROWS | UNREADABLE)
def test_lists(tmp_path, capsys, name):
    content = (GOOD | BROKEN_ROWS | UNREADABLE)[name]
    for i in range(4):
        write_image(tmp_path / f"im/{i}.jpg")
    path = tmp_path / "im" / name
    if content is not None:
        path.write_text(content, encoding="utf-8", newline="")
    if name in UNREADABLE:
        with refused(name):
            open_all(path)
        return
    usable = "0123" if name in GOOD else "0"
    source = open_all(f"{path}={tmp_path}")
    assert [x.name for x in source] == [os.path.join(tmp_path, f"im/{n}.jpg") for n in usable]
    assert [x.caption for x in source] == [f"text {n}, more" for n in usable]
    assert sorted(source.datasets[0].captions()) == [x.caption for x in source]
    broken = {"gone.csv": 12, "nameless.json": 3, "says_nothing.csv": 2}
    broken = broken.get(name, int(name in BROKEN_ROWS))
    error = capsys.readouterr().err
    assert error.count(name) == min(broken, 10) and (f"{broken} rows" in error) == (broken > 0)
    path.rename(tmp_path / name)
    assert len(open_all(tmp_path / name)) == len(usable)  # the images are beside it


def write_tar(path, first, last, kinds=("jpeg",), without=()):
    """As img2dataset does."""
    with tarfile.open(path, "w") as tar:
        for i in range(first, last):
            kind = kinds[i % len(kinds)]
            content = {kind: encoded(i, kind), "json": b"{}", "txt": b"number %d" % i}
            for end, value in content.items():
                info = tarfile.TarInfo(f"{i:03}.{end}")
                info.size = len(value)
                if info.name not in without:
                    tar.addfile(info, io.BytesIO(value))
    return path.read_bytes()


def test_shards(tmp_path, monkeypatch):
    write_tar(tmp_path / "08.tar", 0, 6, ("png", "jpeg", "webp"))
    write_tar(tmp_path / "09.tar", 6, 8)
    write_tar(tmp_path / "10.tar", 8, 9)
    for workers in (2, 0):
        source = open_all("synthetic", tmp_path / "{08..10}.tar", workers=workers)
        pairs = [source[24_000 + i] for i in range(len(source) - 24_000)]
        assert [pair.caption for pair in pairs] == [f"number {i}" for i in range(9)]
        assert (pairs[3].image == SyntheticScenes(64)[3].image).all()  # PNG is exact
        monkeypatch.setattr(tarfile, "open", None)  # now there are indices
    monkeypatch.undo()
    write_tar(tmp_path / "08.tar", 20, 22)
    os.utime(tmp_path / "08.tar", (0, 0))  # older than its index
    assert [x.caption for x in open_all(tmp_path / "08.tar")] == ["number 20", "number 21"]


def test_broken_shards_are_named_and_left_out(tmp_path, capsys):
    write_tar(tmp_path / "alone.tar", 0, 4, without=("001.txt", "002.jpeg"))
    for _ in range(2):  # the second time from its index
        assert len(open_all(tmp_path / "alone.tar")) == 2
        assert "2 rows or shards" in capsys.readouterr().err
    whole = write_tar(tmp_path / "good.tar", 0, 3)
    offset = whole.index(b"002.jpeg")
    hole = whole[:offset] + b"x" * 512 + whole[offset + 512 :]
    broken = {"cut": whole[: offset + 600], "short": whole[:offset], "hole": hole, "text": b"text"}
    broken["joined"] = whole + whole
    for name, content in broken.items():
        (tmp_path / f"{name}.tar").write_bytes(content)
    specs = [tmp_path / f"{name}.tar" for name in (*broken, "missing")]
    assert len(open_all(*specs, tmp_path / "good.tar")) == 3
    error = capsys.readouterr().err
    assert "6 rows or shards" in error and all(str(spec) in error for spec in specs)


def test_every_epoch_has_every_pair_once_in_another_order():
    def order(seed=0):
        pairs = training(range(50), seed=seed)
        return [pairs.index_at(i) for i in range(300)]

    epochs = np.reshape(order(), (6, 50))
    assert (np.sort(epochs) == np.arange(50)).all() and len({*map(tuple, epochs)}) == 6
    assert order(seed=1) != order()


def test_a_pair_depends_on_its_position_alone(tmp_path):
    """Not on the pairs before, on the worker, or on how it was started."""
    write_tar(tmp_path / "a.tar", 0, 4)
    source = open_all(tmp_path / "a.tar")
    pairs = training(source, nouns=["grass", "number"], templates=["a {}."], mirror=True)
    keys = [[0, 7], [3, 4], [1, 2]]
    expected = [data.collate([pairs[i] for i in batch]) for batch in keys[::-1]][::-1]
    sent = pickle.loads(pickle.dumps(pairs))  # as to a worker on macOS or Windows
    for dataset, workers in ((pairs, 2), (sent, 0)):
        how = {"batch_sampler": keys, "collate_fn": data.collate, "num_workers": workers}
        for batch, other in zip(DataLoader(dataset, **how), expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(batch[:3], other[:3])) and batch[3] == []
    assert (pairs.make(3, 0)[0] != pairs.make(3, 7)[0]).any()  # elsewhere another crop
    assert training(source, text_length=5)[0][2].shape == (5,)


@pytest.mark.parametrize("workers", [0, 2])
def test_pairs_in_memory_are_the_same(tmp_path, workers):
    write_tar(tmp_path / "a.tar", 0, 4)
    pairs = training(open_all(tmp_path / "a.tar"), crop_scale=1)
    batches = [[5, 6], [6, 7, 8], [1, 20]]
    found = [*pairs.batches_in_memory(batches, workers)]
    for positions, batch in zip(batches, found, strict=True):
        expected = data.collate([pairs[position] for position in positions])
        assert all(torch.equal(a, b) for a, b in zip(batch[:3], expected[:3]))


def test_a_broken_pair_is_named_and_replaced_and_no_other_changes(tmp_path):
    path = tmp_path / "a.tar"
    whole = write_tar(path, 0, 4)
    good = training(open_all(path))
    expected = [good.make(i, i) for i in range(4)]
    path.write_bytes(whole.replace(encoded(1), bytes(len(encoded(1)))))
    pairs = training(open_all(path))
    for i in (0, 2, 3):
        *pair, errors = pairs.make(i, i)
        assert all((a == b).all() for a, b in zip(pair, expected[i])) and errors == []
    assert len({pairs.make(1, position)[2].tobytes() for position in range(9)}) > 1
    for position in range(9):  # one error for each, however many are tried in its place
        (error,) = pairs.make(1, position)[3]
        assert "a.tar/001" in error
    assert data.collate([pairs.make(1, 1), pairs.make(0, 0)])[3] == [error]
    path.unlink()
    with refused("100 pairs in a row .*a.tar/001"):
        pairs.make(1, 1)


def test_a_batch_has_no_padding_beyond_its_longest_text():
    """Not even where the token 0, that of the padding, is a letter of the texts."""
    texts = [[9, 0, 0, 11, 0, 0], [9, 5, 11, 0, 0, 0]]
    items = [(np.zeros((8, 8, 3), np.uint8), np.zeros(1), np.array(row), []) for row in texts]
    assert data.collate(items)[2].tolist() == [row[:4] for row in texts]


def choices(caption, *nouns, prompts=0):
    options = {"nouns": nouns, "templates": ["a {}.", "the {}."], "prompts": prompts}
    rng = np.random.RandomState(0)
    return [training([], **options).choose_texts(caption, rng) for _ in range(500)]


def test_texts_of_a_caption():
    """PACL: the caption and, of each noun in it, each template, all equally often."""
    text = "A polar bear, a snowman, SNOW, snow, two dogs"
    counts = Counter(x for (x,) in choices(text, "Snow", "polar", "polar bear", "man", "dog"))
    nouns = ("polar bear", "snow", "dog")
    assert counts.keys() == {text, *(f"{x} {noun}." for noun in nouns for x in ("a", "the"))}
    assert min(counts.values()) > 50
    # GroupViT: the caption, and three nouns, none twice, each in any template.
    counts = Counter()
    for first, *prompts in choices(text, "dog", "bear", "snow", "two", prompts=3):
        assert first == text and len({prompt.split()[1] for prompt in prompts}) == 3
        counts.update(prompts)
    assert len(counts) == 8 and min(counts.values()) > 150
    assert choices("bus", "bus", prompts=3)[0][2:] == ["bus", "bus"]
