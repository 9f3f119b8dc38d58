"""Image-text pairs from where people keep them: none lost, none twice, none changed by a neighbour's fault."""

import csv
import io
import itertools
import json
import os
import tarfile
import zipfile
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset

import data
from clip_loader import InputError, Tokenizer
from conftest import GOLDEN, TINY, assert_one_line
from data import Batches, Fault, SyntheticScenes, TrainingPairs, collate, open_pairs, shuffled, superpixels

PHOTOGRAPHS = sorted((GOLDEN / "pipeline/voc_like/JPEGImages").glob("*.jpg"))


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("CLIP_CACHE", str(tmp_path_factory.mktemp("cache")))


def encoded(i, kind="JPEG", size=64):
    """A scene as the bytes of a picture file."""
    file = io.BytesIO()
    Image.fromarray(SyntheticScenes(size)[i].picture).save(file, kind)
    return file.getvalue()


def caption(i):
    return f"picture number {i} of many"


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def members(first, last, kinds=("jpg",)):
    """What img2dataset writes: a picture, its caption, and what else is known of it."""
    for i in range(first, last):
        kind = kinds[i % len(kinds)]
        yield f"{i:09}.{kind}", encoded(i, {"jpg": "JPEG"}.get(kind, kind))
        yield f"{i:09}.txt", caption(i).encode()
        yield f"{i:09}.json", json.dumps({"caption": "not this one", "url": "x"}).encode()


@pytest.fixture
def shards(tmp_path):
    """Three shards of 8 pairs: 00000.tar, ..."""
    for n in range(3):
        write_tar(tmp_path / f"{n:05}.tar", members(8 * n, 8 * n + 8))
    return tmp_path


def open_all(*specs, **options):
    return ConcatDataset(open_pairs([str(spec) for spec in specs], TINY, 0, **options))


def captions(source):
    return sorted(source[i].caption for i in range(len(source)))


def numbers(n):
    return sorted(caption(i) for i in range(n))


def training(source, **options):
    return TrainingPairs(source, Tokenizer(), TINY, crop_scale=0.5, seed=3, **options)


def assert_same_pair(one, other):
    assert all((a == b).all() for a, b in zip(one[:3], other[:3]))


# ---------------------------------------------------------------------------------------------------------------------
# The order


def test_every_epoch_has_every_pair_once_in_another_order(monkeypatch):
    monkeypatch.setattr(data, "SHUFFLE_CHUNK", 7)
    monkeypatch.setattr(data, "SHUFFLE_BUFFER", 20)
    sizes, n = [30, 1, 64, 5], 100
    order = list(itertools.islice(shuffled(sizes, seed=1), 3 * n))
    epochs = [order[i : i + n] for i in (0, n, 2 * n)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(n))
        assert epoch != sorted(epoch)
    assert epochs[0] != epochs[1] != epochs[2]
    assert order[:n] != list(itertools.islice(shuffled(sizes, seed=2), n))
    for start in (0, 1, 19, 99, 100, 101, 250):
        assert list(itertools.islice(shuffled(sizes, 1, start), 30)) == order[start : start + 30]


def test_only_a_few_shards_are_in_use_at_a_time(monkeypatch):
    monkeypatch.setattr(data, "SHUFFLE_BUFFER", 40)
    order = list(itertools.islice(shuffled([10] * 50, seed=0), 500))
    for first in range(0, 480, 40):
        shards = [index // 10 for index in order[first : first + 40]]
        assert len(set(shards)) == 4 and shards != sorted(shards)


def test_processes_share_a_batch_without_overlap():
    whole = list(Batches([50], 0, 12, slice(0, 12), range(3, 20)))
    parts = [list(Batches([50], 0, 12, slice(4 * r, 4 * r + 4), range(3, 20))) for r in range(3)]
    assert whole == [a + b + c for a, b, c in zip(*parts)]
    assert [place for batch in whole for place, _ in batch] == list(range(36, 240))
    assert whole[5:] == list(Batches([50], 0, 12, slice(0, 12), range(8, 20)))


def test_a_pair_is_the_same_whoever_asks():
    source = SyntheticScenes(64)
    forward, backward = [training(source)[i, 7] for i in (0, 1, 2)], [training(source)[i, 7] for i in (2, 1, 0)][::-1]
    for one, other in zip(forward, backward):
        assert_same_pair(one, other)
    assert (forward[0][0] != forward[1][0]).any()  # elsewhere in the order it has another crop
    picture, superpatch, text, faults = collate(forward)
    assert picture.shape == (3, 3, 32, 32) and picture.dtype == torch.uint8
    assert superpatch.shape == (3, 16) and text.shape == (3, 12) and faults == []
    assert training(source, text_length=5)[0, 0][2].shape == (5,)


def test_texts_of_a_caption_and_its_nouns():
    """The caption and, of each noun in it, each template: all as often. A noun is a whole word, the longest one there."""
    pairs = training(SyntheticScenes(64), nouns=["Snow", "polar bear", "bear", "man"], templates=["a {}.", "the {}."])
    rng, caption = np.random.RandomState(0), "A polar bear, a snowman, SNOW and snow."
    counts = Counter(pairs.text(caption, rng) for _ in range(2000))
    assert counts.keys() == {caption, "a polar bear.", "the polar bear.", "a snow.", "the snow."}
    assert min(counts.values()) > 330
    assert {pairs.text("nothing of them", rng) for _ in range(20)} == {"nothing of them"}
    plurals = training(SyntheticScenes(64), nouns=["dog", "bus", "bench"], templates=["a {}."])
    counts = Counter(plurals.text("Two dogs, busy buses and one bench", rng) for _ in range(200))
    assert counts.keys() == {"Two dogs, busy buses and one bench", "a dog.", "a bus.", "a bench."}
    scenes = training(SyntheticScenes(64), nouns=data.SCENE_WORDS, templates=["{}"])
    assert_same_pair(scenes[5, 7], scenes[5, 7])
    assert len({scenes[place, 7][2].tobytes() for place in range(30)}) > 1


# ---------------------------------------------------------------------------------------------------------------------
# Tables


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(6):
        (folder / f"{i}.jpg").write_bytes(encoded(i))
    return folder


def write_table(path, rows, header=None, **dialect):
    with open(path, "w", newline="") as file:
        csv.writer(file, **dialect).writerows([header] * bool(header) + rows)


@pytest.mark.parametrize("header", [None, ("filepath", "title"), ("title", "number", "filepath")])
@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_tables(pictures, tmp_path, kind, header):
    tail = ", with a comma" if kind == "csv" else ""
    rows = [(f"pictures/{i}.jpg", caption(i) + tail) for i in range(6)]
    if header and len(header) == 3:
        rows = [(text, "5", path) for path, text in rows]
    write_table(tmp_path / f"pairs.{kind}", rows, header, delimiter="," if kind == "csv" else "\t")
    source = open_all(tmp_path / f"pairs.{kind}")
    assert captions(source) == [text + tail for text in numbers(6)]
    for i in range(6):
        sample = source[i]
        number = int(sample.caption.split()[2])
        expected = np.asarray(Image.open(pictures / f"{number}.jpg"))
        assert (sample.picture == expected).all()


def test_jsonl_and_a_folder_elsewhere(pictures, tmp_path):
    lines = [json.dumps({"image": f"{i}.jpg", "caption": caption(i)}) for i in range(6)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines) + "\n\n")
    assert captions(open_all(f"{tmp_path}/pairs.jsonl={pictures}")) == numbers(6)


def test_coco_captions_and_karpathys_split(pictures, tmp_path):
    coco = {
        "images": [{"id": 10 + i, "file_name": f"{i}.jpg"} for i in range(3)],
        "annotations": [{"image_id": 10 + i // 2, "caption": caption(i)} for i in range(6)],
    }
    (tmp_path / "captions.json").write_text(json.dumps(coco))
    source = open_all(f"{tmp_path}/captions.json={pictures}")
    assert captions(source) == numbers(6)
    assert {(int(s.caption.split()[2]) // 2, int(s.name[0])) for s in map(source.__getitem__, range(6))} == {
        (0, 0),
        (1, 1),
        (2, 2),
    }
    split = [
        {"filepath": "pictures", "filename": f"{i}.jpg", "split": name, "sentences": [{"raw": caption(i)}]}
        for i, name in enumerate(["train", "val", "restval", "train", "test"])
    ]
    (tmp_path / "dataset.json").write_text(json.dumps({"images": split}))
    assert captions(open_all(tmp_path / "dataset.json")) == [caption(0), caption(3)]


def test_kinds_of_data_mix(pictures, shards, tmp_path):
    write_table(tmp_path / "pairs.csv", [(f"pictures/{i}.jpg", f"row {i}") for i in range(6)])
    source = open_all(shards / "{00000..00002}.tar", "synthetic", tmp_path / "pairs.csv")
    assert len(source) == 24 + 12_000 + 6
    assert source[23].caption == caption(23) and source[24 + 12_000].caption.startswith("row")


@pytest.mark.parametrize(
    "spec",
    [
        *("nowhere.csv", "nowhere.tar", "x{0..3}.tar", "nothing*.tar", "photo.jpg", "empty.csv", "broken.json", "list.json"),
        "elsewhere.csv",
    ],
)
def test_data_that_is_not_there(tmp_path, monkeypatch, spec):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "elsewhere.csv").write_text("pictures/1.jpg,a cat\npictures/2.jpg,a dog\n")
    with pytest.raises(InputError) as error:
        open_all(spec)
    assert_one_line(error, spec)


# ---------------------------------------------------------------------------------------------------------------------
# Shards


def test_shards_of_all_kinds(tmp_path):
    write_tar(tmp_path / "a.tar", members(0, 9, ("jpg", "png", "webp")))
    only_json = [(f"b/{i}.JPG", encoded(i)) for i in range(9, 12)]
    only_json += [(f"b/{i}.json", json.dumps({"caption": caption(i)}).encode()) for i in range(9, 12)]
    write_tar(tmp_path / "b.tar", only_json)
    source = open_all(tmp_path / "*.tar")
    assert captions(source) == numbers(12)
    assert (source[1].picture == SyntheticScenes(64)[1].picture).all()  # PNG is exact
    assert source[11].name == f"{tmp_path}/b.tar/b/11"


def test_a_shard_is_scanned_once(shards, monkeypatch):
    first = open_all(shards / "{00000..00002}.tar", workers=2)
    assert sorted(path.name for path in shards.glob("*.npz")) == [f"{n:05}.index.npz" for n in range(3)]
    monkeypatch.setattr(data, "scan_tar", None)
    assert captions(open_all(shards / "*.tar")) == captions(first) == numbers(24)


def test_a_shard_that_has_changed_is_scanned_again(shards):
    open_all(shards / "00000.tar")
    write_tar(shards / "00000.tar", members(0, 3))
    data.ShardReader.of.cache_clear()
    assert captions(open_all(shards / "00000.tar")) == numbers(3)


def test_a_damaged_index_is_made_again(shards):
    open_all(shards / "00000.tar")
    (shards / "00000.index.npz").write_bytes(b"PK damaged")
    assert captions(open_all(shards / "00000.tar")) == numbers(8)


def test_without_leave_to_write_the_index_goes_into_the_cache(shards, monkeypatch):
    replace = os.replace

    def refuse(source, target):
        if shards in target.parents:
            raise PermissionError
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    open_all(shards / "00000.tar")
    monkeypatch.setattr(data, "scan_tar", None)
    assert len(open_all(shards / "00000.tar")) == 8


def test_a_shard_that_is_cut_off(shards, capsys):
    path = shards / "00001.tar"
    whole = path.read_bytes()
    for length in (len(whole) // 2, len(whole) // 2 // 512 * 512):
        path.write_bytes(whole[:length])
        source = open_all(shards / "*.tar", max_faults=0.3)
        assert set(captions(source)) < set(numbers(24)) and 16 < len(source) < 24
        assert "1 of 3 shards are missing or damaged" in (text := capsys.readouterr().err) and str(path) in text
    with pytest.raises(InputError) as error:
        open_all(shards / "*.tar")
    assert_one_line(error, path, "cut off", "max-faults")


def test_shards_that_are_missing_or_no_tars(shards, capsys):
    (shards / "00001.tar").unlink()
    (shards / "00002.tar").write_bytes(b"not a tar at all")
    source = open_all(shards / "{00000..00002}.tar", max_faults=0.7)
    assert captions(source) == numbers(8)
    assert "2 of 3 shards" in capsys.readouterr().err
    with pytest.raises(InputError) as error:
        open_all(shards / "{00000..00002}.tar")
    assert_one_line(error, "00001.tar", "00002.tar")
    (shards / "00000.tar").unlink()
    with pytest.raises(InputError, match="no shard is whole"):
        open_all(shards / "{00000..00002}.tar", max_faults=0.99)


# ---------------------------------------------------------------------------------------------------------------------
# Faults


def faulty(tmp_path):
    """A shard with one fault of each kind among sound pairs."""
    pairs = dict(members(0, 12))
    pairs["000000001.jpg"] = b"not a picture"
    pairs["000000002.jpg"] = pairs["000000002.jpg"][:1500]  # cut off
    pairs["000000003.txt"] = b"  \n"
    pairs["000000004.txt"] = "für".encode("latin-1")
    del pairs["000000005.txt"]
    pairs["000000005.json"] = b"{"
    del pairs["000000006.jpg"]
    write_tar(tmp_path / "faulty.tar", pairs.items())
    return open_all(tmp_path / "faulty.tar")


def test_faults_are_told_apart(tmp_path):
    source = faulty(tmp_path)
    kinds = {}
    for i in range(12):
        try:
            assert source[i].caption == caption(i)
        except Fault as fault:
            kinds[i] = fault.kind
            assert f"faulty.tar/{i:09}" in str(fault) and "\n" not in str(fault)
    broken, none = "broken picture", "no caption"
    assert kinds == {1: broken, 2: broken, 3: none, 4: "caption not in UTF-8", 5: none, 6: broken}


def test_a_pair_stands_in_for_a_broken_one_and_no_other_changes(tmp_path):
    source = faulty(tmp_path)
    write_tar(tmp_path / "sound.tar", members(0, 12))
    sound = training(open_all(tmp_path / "sound.tar"))
    pairs = training(source)
    for i in range(12):
        if i in range(1, 7):
            assert [kind for kind, _ in pairs[i, i][3]][0] in Fault.KINDS
            assert_same_pair(pairs[i, i], pairs[i, i])
        else:
            assert pairs[i, i][3] == []
            assert_same_pair(pairs[i, i], sound[i, i])


def test_faults_of_tables(pictures, tmp_path):
    (pictures / "1.jpg").write_bytes(b"")
    rows = [f"pictures/{i}.jpg,{caption(i)}\n".encode() for i in range(6)]
    rows[2] = "pictures/2.jpg,für\n".encode("latin-1")
    rows[3] = b"pictures/3.jpg\n"
    rows[4] = b"pictures/elsewhere.jpg,gone\n"
    (tmp_path / "pairs.csv").write_bytes(b"".join(rows))
    pairs = training(open_all(tmp_path / "pairs.csv"))
    kinds = Counter(kind for i in range(6) for kind, _ in pairs[i, i][3][:1])
    assert kinds == {"broken picture": 2, "caption not in UTF-8": 1, "no caption": 1}
    lines = [{"image": "pictures/0.jpg", "caption": "sound"}, {"image": "pictures/0.jpg"}, {"caption": "no path"}]
    lines += [{"image": None, "caption": "x"}, {"image": "pictures/0.jpg", "caption": None}]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    pairs = training(open_all(tmp_path / "pairs.jsonl"))
    kinds = Counter(kind for i in range(5) for kind, _ in pairs[i, i][3][:1])
    assert kinds == {"broken picture": 2, "no caption": 2}


def test_a_shard_that_loses_its_end_while_it_is_read(shards):
    source = open_all(shards / "*.tar")
    assert source[7].caption == caption(7)  # it is open now
    with open(shards / "00000.tar", "r+b") as file:
        file.truncate(5000)
    with pytest.raises(Fault, match="unreadable shard"):
        source[7]


def test_a_shard_that_disappears(shards):
    source = open_all(shards / "*.tar")
    data.ShardReader.of.cache_clear()
    (shards / "00001.tar").unlink()
    pairs = training(source)
    assert {kind for i in range(8, 16) for kind, _ in pairs[i, i][3]} == {"unreadable shard"}
    assert pairs[0, 0][3] == [] and pairs[16, 16][3] == []


def test_when_nothing_can_be_used(shards):
    source = open_all(shards / "*.tar")
    data.ShardReader.of.cache_clear()
    for path in shards.glob("*.tar"):
        path.unlink()
    loader = torch.utils.data.DataLoader(training(source), batch_sampler=[[(0, 0)]], collate_fn=collate, num_workers=1)
    with pytest.raises(InputError) as error:
        list(data.raised(loader))
    assert_one_line(error, "1,000 pairs in a row", "00000.tar")


# ---------------------------------------------------------------------------------------------------------------------
# Superpixels computed before


def compute(*specs, workers="0"):
    sizes = ["--image-size", "32", "--patch-size", "8"]
    data.main(["superpixels", "--data", *map(str, specs), *sizes, "--workers", workers])


def all_pairs(source):
    pairs = training(source)
    return [pairs[i, i] for i in range(len(source))]


@pytest.fixture(params=["shards", "table"])
def specs(request, shards, pictures, tmp_path):
    """The same scenes in three shards or in a table with two captions for each."""
    if request.param == "shards":
        return [shards / "{00000..00002}.tar"]
    write_table(tmp_path / "pairs.csv", [(f"{i // 2}.jpg", caption(i)) for i in range(12)])
    return [f"{tmp_path}/pairs.csv={pictures}"]


def test_computed_before_or_in_training_they_are_the_same(specs, monkeypatch, capsys):
    before = all_pairs(open_all(*specs))
    compute(*specs, workers="2")
    out = capsys.readouterr().out
    assert "bytes each" in out and f"of {6 if '=' in str(specs[0]) else 24} pictures" in out
    monkeypatch.setattr(data, "superpixels", None)  # training finds them and computes none
    data.ShardReader.of.cache_clear()
    after = all_pairs(open_all(*specs))
    for one, other in zip(before, after, strict=True):
        assert_same_pair(one, other)
        assert other[3] == []
    compute(*specs)  # nor are they computed again
    assert "of 0 pictures" in capsys.readouterr().out


def test_the_tool_goes_on_where_it_was_stopped(shards, tmp_path, monkeypatch, capsys):
    count, original = itertools.count(), superpixels

    def interrupted(*args):
        if next(count) == 13:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(data, "superpixels", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compute(shards / "*.tar")
    assert len(list(shards.glob("*.zip"))) == 1  # the second was not finished
    monkeypatch.setattr(data, "superpixels", original)
    compute(shards / "*.tar")
    assert "of 16 pictures" in capsys.readouterr().out
    assert len(list(shards.glob("*.zip"))) == 3


def test_missing_or_damaged_superpixels_are_computed_and_counted(shards, pictures, tmp_path):
    write_table(tmp_path / "pairs.csv", [(f"{i}.jpg", caption(i)) for i in range(6)])
    table = f"{tmp_path}/pairs.csv={pictures}"
    before = all_pairs(open_all(shards / "*.tar", table))
    compute(shards / "*.tar", table)
    folder = tmp_path / "pairs.superpixels-32-8"
    (folder / "1.jpg.png").unlink()
    (folder / "2.jpg.png").write_bytes(b"damaged")
    (folder / "3.jpg.png").write_bytes(encoded(3, "PNG", 40))
    zip_path = shards / "00001.superpixels-32-8.zip"
    with zipfile.ZipFile(zip_path) as old:
        names = old.namelist()
        contents = {name: old.read(name) for name in names[1:]}
    with zipfile.ZipFile(zip_path, "w") as new:
        for name, content in contents.items():
            new.writestr(name, content)
    (shards / "00002.superpixels-32-8.zip").write_bytes(b"PK not really")
    data.ShardReader.of.cache_clear()
    after = all_pairs(open_all(shards / "*.tar", table))
    kinds = [kind for *_, faults in after for kind, _ in faults]
    assert kinds == ["missing superpixels"] * (1 + 8 + 3)
    for one, other in zip(before, after, strict=True):
        assert_same_pair(one, other)


def test_broken_pictures_have_no_superpixels(tmp_path, capsys):
    faulty(tmp_path)
    compute(tmp_path / "faulty.tar")
    streams = capsys.readouterr()
    assert "of 9 pictures" in streams.out and "3 broken pictures" in streams.out and "000000001" in streams.err


# ---------------------------------------------------------------------------------------------------------------------
# Photographs


@pytest.mark.parametrize("path", PHOTOGRAPHS, ids=lambda path: path.stem)
def test_a_reduced_jpeg_shows_the_same(path):
    """Decoded at half the size, and the superpixels of either are nearly of one picture."""
    full = data.decode_picture(path)
    size = min(full.shape[:2]) // 4
    reduced = data.decode_picture(path, size * 3 // 2)
    assert min(reduced.shape[:2]) >= size * 3 // 2 and reduced.shape[0] <= full.shape[0] // 2 + 1
    shape = data.reduced_size(*full.shape[:2], size)
    a, b = (np.asarray(Image.fromarray(x).resize(shape[::-1], Image.BICUBIC)).astype(float) for x in (full, reduced))
    assert np.abs(a - b).mean() < 4


def test_a_very_long_picture_stays_small():
    assert data.reduced_size(10, 100_000, 224) == (224, 8 * 224)
    assert data.reduced_size(375, 500, 224) == (224, 299)
    assert data.reduced_size(1, 1, 224) == (224, 224)
