"""Image-text pairs in every form: none lost, none twice, none changed by another's error."""

import csv
import dataclasses
import io
import itertools
import json
import os
import re
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader

import data
from clip_loader import Tokenizer
from conftest import GOLDEN, TINY, assert_one_line
from data import Batches, SampleError, SyntheticScenes, TrainingPairs, open_pairs, shuffled
from model import CLIP, InputError

PHOTOGRAPHS = sorted((GOLDEN / "pipeline/voc_like/JPEGImages").glob("*.jpg"))


def encoded(i, kind="JPEG"):
    """A scene as the bytes of an image file."""
    file = io.BytesIO()
    Image.fromarray(SyntheticScenes(64)[i].image).save(file, kind)
    return file.getvalue()


def caption(i):
    return f"image number {i} of many"


def number(sample):
    return int(sample.caption.split()[2])


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def members(first, last, kinds=("jpg",)):
    """What img2dataset writes."""
    for i in range(first, last):
        kind = kinds[i % len(kinds)]
        yield f"{i:09}.{kind}", encoded(i, {"jpg": "JPEG"}.get(kind, kind))
        yield f"{i:09}.txt", caption(i).encode()
        yield f"{i:09}.json", json.dumps({"caption": "not this one", "url": "x"}).encode()


@pytest.fixture
def shards(tmp_path):
    """Three shards of 8 pairs: 00000.tar, ..."""
    data.open_file.cache_clear()
    for n in range(3):
        write_tar(tmp_path / f"{n:05}.tar", members(8 * n, 8 * n + 8))
    return tmp_path


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(6):
        (folder / f"{i}.jpg").write_bytes(encoded(i))
    return folder


def open_all(*specs, **options):
    return ConcatDataset(open_pairs([str(spec) for spec in specs], TINY, 0, **options))


def captions(source):
    return sorted(sample.caption for sample in source)


def numbers(n):
    return sorted(caption(i) for i in range(n))


def training(source, **options):
    return TrainingPairs(source, Tokenizer(), TINY, crop_scale=0.5, seed=3, **options)


def all_pairs(source):
    pairs = training(source)
    return [pairs[i, i] for i in range(len(source))]


def kinds(pairs):
    """The errors of training pairs, by kind."""
    return Counter(error.args[0] for *_, errors in pairs for error in errors)


def assert_same_pair(one, other):
    assert all((a == b).all() for a, b in zip(one[:3], other[:3]))


def test_mirrored_crops_keep_their_superpixels():
    columns = np.tile(np.arange(0, 256, 8, dtype=np.uint8), (32, 1))  # a name for each column
    image = np.repeat(columns[..., None], 3, axis=2)
    pairs = training([data.Sample(image, None, "", "stripes", columns)], mirror=True)
    directions = Counter()
    for position in range(100):
        crop, superpatch, _, _ = pairs[position, 0]
        patches = crop[..., 0].reshape(4, 8, 4, 8).mean(axis=(1, 3)).ravel()
        assert abs(patches - superpatch).max() < 8
        directions[bool(crop[0, 0, 0] < crop[0, -1, 0])] += 1
    assert min(directions[True], directions[False]) > 30


# --------------------------------------------------------------------------------------------------
# The order


def test_every_epoch_has_every_pair_once_in_another_order(monkeypatch):
    monkeypatch.setattr(data, "SHUFFLE_CHUNK", 7)
    monkeypatch.setattr(data, "SHUFFLE_BUFFER", 20)

    def order(n, *args):
        return list(itertools.islice(shuffled([30, 1, 64, 5], *args), n))

    epochs = np.reshape(order(300, 1), (3, 100))
    assert (np.sort(epochs) == np.arange(100)).all()
    assert len({*map(tuple, epochs), tuple(range(100)), tuple(order(100, 2))}) == 5
    for start in (0, 1, 19, 99, 100, 101, 250):
        assert order(30, 1, start) == epochs.ravel()[start : start + 30].tolist()


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
    assert [position for batch in whole for position, _ in batch] == list(range(36, 240))
    assert whole[5:] == list(Batches([50], 0, 12, slice(0, 12), range(8, 20)))


def test_a_pair_depends_on_its_position_alone():
    source = SyntheticScenes(64)
    pairs = training(source)
    forward = [pairs[i, 7] for i in (0, 1, 2)]
    backward = [pairs[i, 7] for i in (2, 1, 0)][::-1]
    for one, other in zip(forward, backward):
        assert_same_pair(one, other)
    assert (forward[0][0] != forward[1][0]).any()  # at another position it has another crop
    image, superpatch, text, errors = data.collate(forward)
    assert image.shape == (3, 3, 32, 32) and image.dtype == torch.uint8
    assert superpatch.shape == (3, 16) and text.shape == (3, 12) and errors == []
    assert training(source, text_length=5)[0, 0][2].shape == (5,)


def test_a_batch_has_no_padding_beyond_its_longest_text():
    """Not even where the token 0, that of the padding, is a letter of the texts."""
    texts = [[9, 0, 0, 11, 0, 0], [9, 5, 11, 0, 0, 0], [9, 11, 0, 0, 0, 0]]
    items = [(np.zeros((8, 8, 3), np.uint8), np.zeros(1), np.array(text), []) for text in texts]
    _, _, text, _ = data.collate(items)
    assert text.tolist() == [row[:4] for row in texts]
    clip = CLIP(dataclasses.replace(TINY, context_length=6, vocab_size=12))
    whole = clip.encode_text(torch.tensor(texts))
    assert torch.allclose(clip.encode_text(text), whole, atol=1e-6)
    # GroupViT's captions with prompts, of which one is the longest text.
    items = [(*item[:2], np.array([text, texts[0]]), []) for item, text in zip(items, texts)]
    _, _, text, _ = data.collate(items)
    assert text.tolist() == [[row[:4], texts[0][:4]] for row in texts]


def test_texts_of_a_caption_and_its_nouns():
    """The caption and, of each noun in it, each template, all equally often."""

    def texts(caption, nouns, *templates):
        pairs = training(SyntheticScenes(64), nouns=nouns, templates=templates)
        rng = np.random.RandomState(0)
        return Counter(pairs.choose_texts(caption, rng)[0] for _ in range(2000))

    nouns = ["Snow", "polar bear", "bear", "man"]
    text = "A polar bear, a snowman, SNOW and snow."
    counts = texts(text, nouns, "a {}.", "the {}.")  # whole words, the longest one that fits
    assert counts.keys() == {text, "a polar bear.", "the polar bear.", "a snow.", "the snow."}
    assert min(counts.values()) > 330
    assert texts("nothing of them", nouns, "a {}.") == {"nothing of them": 2000}
    text = "Two dogs, busy buses and one bench"
    counts = texts(text, ["dog", "bus", "bench"], "a {}.")
    assert counts.keys() == {text, "a dog.", "a bus.", "a bench."}
    scenes = training(SyntheticScenes(64), nouns=data.SCENE_WORDS, templates=["{}"])
    assert len({scenes[position, 7][2].tobytes() for position in range(30)}) > 1


def test_prompts_beside_the_caption():
    """GroupViT's: three nouns, none twice, each in any template; the caption for missing ones."""
    options = {"nouns": ["dog", "bus", "cat", "cow"], "templates": ["a {}.", "the {}."]}
    pairs = training(SyntheticScenes(64), prompts=3, **options)
    rng = np.random.RandomState(0)
    text = "a dog, a dog, a cat, a cow and a bus"
    counts = Counter()
    for _ in range(400):
        caption, *prompts = pairs.choose_texts(text, rng)
        assert caption == text and len({prompt.split()[1] for prompt in prompts}) == 3
        counts.update(prompts)
    assert len(counts) == 8 and min(counts.values()) > 100
    caption, prompt, *others = pairs.choose_texts("one bus", rng)
    assert prompt in ("a bus.", "the bus.") and [caption, *others] == 3 * ["one bus"]
    assert pairs[0, 0][2].shape == (4, 12)


# --------------------------------------------------------------------------------------------------
# Lists


def write_table(path, rows, header=None, **dialect):
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, **dialect).writerows([header] * bool(header) + rows)
    return path


@pytest.mark.parametrize("header", [None, ("FilePath", " title"), ("title", "number", "filepath")])
@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_tables(images, tmp_path, kind, header):
    tail = ", with a comma" if kind == "csv" else ""
    rows = [(f"images/{i}.jpg", caption(i) + tail) for i in range(6)]
    if header and len(header) == 3:
        rows = [(text, "5", path) for path, text in rows]
    path = tmp_path / f"pairs.{kind}"
    write_table(path, rows, header, delimiter="," if kind == "csv" else "\t")
    source = open_all(path)
    assert captions(source) == [text + tail for text in numbers(6)]
    for sample in source:
        assert (sample.image == np.asarray(Image.open(images / f"{number(sample)}.jpg"))).all()


def test_jsonl_and_a_folder_elsewhere(images, tmp_path):
    lines = [json.dumps({"image": f"{i}.jpg", "caption": caption(i)}) for i in range(6)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines) + "\n\n")
    assert captions(open_all(f"{tmp_path}/pairs.jsonl={images}")) == numbers(6)


def test_coco_captions_and_karpathys_split(images, tmp_path):
    coco = {
        "images": [{"id": 10 + i, "file_name": f"{i}.jpg"} for i in range(3)],
        "annotations": [{"image_id": 10 + i // 2, "caption": caption(i)} for i in range(6)],
    }
    (tmp_path / "captions.json").write_text(json.dumps(coco))
    source = open_all(f"{tmp_path}/captions.json={images}")
    assert captions(source) == numbers(6)
    assert all(sample.name == f"{images}/{number(sample) // 2}.jpg" for sample in source)
    split = []
    for i, name in enumerate(["train", "val", "restval", "train", "test"]):
        image = {"filepath": "images", "filename": f"{i}.jpg", "split": name}
        split.append(image | {"sentences": [{"raw": caption(i)}]})
    (tmp_path / "dataset.json").write_text(json.dumps({"images": split}))
    assert captions(open_all(tmp_path / "dataset.json")) == [caption(0), caption(3)]


FLICKR = {  # as distributed; and one with the path in its second column
    "captions.txt": 'image,caption\n0.jpg,"a cat, a dog"\n0.jpg,a bird\n',
    "Flickr8k.token.txt": "0.jpg#0\ta cat, a dog\n0.jpg#1\ta bird\n",
    "results.csv": "image_name| comment_number| comment\n0.jpg| 0| a cat, a dog\n0.jpg| 1| a bird",
    "ids.csv": 'id,path,caption\n7,0.jpg,"a cat, a dog"\n8,0.jpg,a bird\n',
}


@pytest.mark.parametrize("name", FLICKR)
def test_lists_as_they_are_distributed(images, tmp_path, name):
    (tmp_path / name).write_text(FLICKR[name])
    source = open_all(f"{tmp_path}/{name}={images}")
    assert [text.strip() for text in captions(source)] == ["a bird", "a cat, a dog"]
    assert {sample.name for sample in source} == {f"{images}/0.jpg"}


BROKEN_ROWS = {  # lists of two images with one row, the second, that cannot be read
    "a.jsonl": '{"image": "0.jpg", "text": "a"}\n{"image": "0.j\n{"image": "1.jpg", "text": "b"}',
    "b.jsonl": '{"image": "0.jpg", "text": "a"}\n[1, 2]\n{"image": "1.jpg", "text": "b"}',
    "c.jsonl": '{"file": "0.jpg", "text": "a"}\n'
    + "[" * 99999
    + '\n{"file": "1.jpg", "text": "b"}',
    "coco.json": json.dumps(
        {
            "images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(2)],
            "annotations": [
                {"image_id": 0, "caption": "a"},
                {"image_id": 39, "caption": "gone"},
                {"image_id": 1, "caption": "b"},
            ],
        }
    ),
}


@pytest.mark.parametrize("name", BROKEN_ROWS)
def test_a_row_that_cannot_be_read_costs_no_other(images, tmp_path, capsys, name):
    (tmp_path / name).write_text(BROKEN_ROWS[name])
    assert captions(open_all(f"{tmp_path}/{name}={images}")) == ["a", "b"]
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path}/{name}" in line and "1 of 3 rows" in line and "(row 2)" in line


def test_a_very_long_caption(images, tmp_path):
    write_table(images / "pairs.csv", [("0.jpg", "word " * 40_000), ("1.jpg", "short")])
    assert captions(open_all(images / "pairs.csv")) == ["short", "word " * 40_000]


def test_a_folder_with_some_of_the_images(images, tmp_path, capsys):
    rows = [(f"images/{i:04}.jpg", caption(i)) for i in range(4000)] + [("images/5.jpg", "it")]
    path = write_table(tmp_path / "pairs.csv", rows)
    assert captions(open_all(path)) == ["it"]
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{path}: no image for 4,000 of 4,001 rows" in line and f"{images}/0000.jpg" in line
    write_table(path, rows[:-1])
    with pytest.raises(InputError) as error:
        open_all(path)
    assert_one_line(error, path, f"{images}/0000.jpg (row 1) does not exist", "image_path", "title")


def test_a_pipe_is_no_list_and_no_shard(tmp_path):
    for name in ("pairs.csv", "00000.tar"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(InputError) as error:
            open_all(tmp_path / name)
        assert_one_line(error, tmp_path / name, "no such file")


def test_kinds_of_data_mix(shards):
    source = open_all("synthetic", shards / "{00000..00002}.tar")
    assert len(source) == 24_000 + 24 and source[-1].caption == caption(23)


WRONG = "nowhere.csv nowhere.tar x{0..3}.tar nothing*.tar photo.jpg empty.csv broken.json list.json"


@pytest.mark.parametrize("spec", [*WRONG.split(), "elsewhere.csv"])
def test_data_that_does_not_exist(tmp_path, monkeypatch, spec):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "elsewhere.csv").write_text("images/1.jpg,a cat\nimages/2.jpg,a dog\n")
    with pytest.raises(InputError) as error:
        open_all(spec)
    assert_one_line(error, spec)


# --------------------------------------------------------------------------------------------------
# Shards


def test_shards_of_all_kinds(tmp_path):
    write_tar(tmp_path / "a.tar", members(0, 9, ("jpg", "png", "webp")))
    only_json = [("README.md", b"no pair")]
    for i in range(9, 12):
        only_json.append((f"b/{i}.JPG", encoded(i)))
        only_json.append((f"b/{i}.json", json.dumps({"caption": caption(i)}).encode()))
    write_tar(tmp_path / "b.tar", only_json)
    source = open_all(tmp_path / "*.tar")
    assert captions(source) == numbers(12)
    assert (source[1].image == SyntheticScenes(64)[1].image).all()  # PNG is exact
    assert source[11].name == f"{tmp_path}/b.tar/b/11"


def test_a_shard_is_scanned_once_and_again_when_it_or_its_index_has_changed(shards, monkeypatch):
    open_all(shards / "{00000..00002}.tar", workers=2)
    assert len(list(shards.glob("*.index"))) == 3
    with monkeypatch.context() as patch:
        patch.setattr(data, "scan_tar", None)
        assert captions(open_all(shards / "*.tar")) == numbers(24)
    (shards / "00000.index").write_bytes(b"damaged")
    assert captions(open_all(shards / "*.tar")) == numbers(24)
    write_tar(shards / "00000.tar", members(0, 3))
    assert captions(open_all(shards / "00000.tar")) == numbers(3)


def test_a_folder_that_is_not_writable(shards, monkeypatch):
    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(os, "replace", refuse)
    assert captions(open_all(shards / "*.tar")) == numbers(24)
    assert not list(shards.glob("*.index"))


def test_an_index_is_not_written_through_a_link(shards):
    """Which somebody else may have put beside the shards."""
    precious = shards / "precious.txt"
    precious.write_text("precious")
    (shards / f"00000.{os.getpid()}.part").symlink_to(precious)
    assert captions(open_all(shards / "00000.tar")) == numbers(8)
    assert precious.read_text() == "precious" and not (shards / "00000.index").is_symlink()


def test_a_shard_of_zeros_is_named(tmp_path):
    (tmp_path / "zeros.tar").write_bytes(bytes(10240))
    with pytest.raises(InputError) as error:
        open_all(tmp_path / "zeros.tar")
    assert_one_line(error, "zeros.tar (no pair)")


def test_a_shard_that_is_cut_off(shards, capsys):
    path = shards / "00001.tar"
    whole = path.read_bytes()
    for length in (len(whole) // 2, len(whole) // 2 // 512 * 512):
        path.write_bytes(whole[:length])
        source = open_all(shards / "*.tar", max_errors=0.3)
        assert set(captions(source)) < set(numbers(24)) and 16 < len(source) < 24
        assert f"1 of 3 shards are missing or damaged: {path}" in capsys.readouterr().err
    with pytest.raises(InputError) as error:
        open_all(shards / "*.tar")
    assert_one_line(error, path, "cut off", "max-errors")


def test_shards_that_are_missing_or_no_tars(shards):
    spec = shards / "{00000..00002}.tar"
    (shards / "00001.tar").unlink()
    (shards / "00002.tar").write_bytes(b"not a tar at all")
    assert captions(open_all(spec, max_errors=0.7)) == numbers(8)
    with pytest.raises(InputError) as error:
        open_all(spec)
    assert_one_line(error, "2 of 3 shards", "00001.tar", "00002.tar")
    (shards / "00000.tar").unlink()
    with pytest.raises(InputError, match="3 of 3 shards"):
        open_all(spec, max_errors=1.0)


@pytest.mark.parametrize("n, left", [(0, 16), (1, 16), (24, 24)])
def test_a_negative_size_does_not_lead_back_for_ever(shards, n, left, capsys):
    path = shards / "00001.tar"
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        offset = [*[member.offset for member in tar], tar.offset][n]
    header = tarfile.TarInfo("negative.jpg")
    header.size = -512
    path.write_bytes(whole[:offset] + header.tobuf(tarfile.GNU_FORMAT) + whole[offset:])
    assert len(open_all(shards / "*.tar", max_errors=0.4)) == left
    assert f"{path} (it is cut off or damaged)" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# Errors


def faulty(tmp_path):
    """A shard with one error of each kind among good pairs."""
    pairs = dict(members(0, 12))
    pairs["000000001.jpg"] = b"not an image"
    pairs["000000002.jpg"] = pairs["000000002.jpg"][:1500]  # cut off
    pairs["000000003.txt"] = b"  \n"
    pairs["000000004.txt"] = "für".encode("latin-1")
    del pairs["000000005.txt"]
    pairs["000000005.json"] = b'{"caption": ' + b"[" * 100_000  # too deep for Python's parser
    del pairs["000000006.jpg"]
    write_tar(tmp_path / "faulty.tar", pairs.items())
    return open_all(tmp_path / "faulty.tar")


def test_a_broken_pair_is_named_and_replaced_and_no_other_changes(tmp_path):
    source = faulty(tmp_path)
    pairs = training(source)
    write_tar(tmp_path / "good.tar", members(0, 12))
    good = training(open_all(tmp_path / "good.tar"))
    found = {}
    for i in range(12):
        try:
            assert source[i].caption == caption(i)
            assert pairs[i, i][3] == []
            assert_same_pair(pairs[i, i], good[i, i])
        except SampleError as error:
            found[i] = error.args[0]
            assert f"faulty.tar/{i:09}" in str(error) and "\n" not in str(error)
            assert pairs[i, i][3][0].args[0] == found[i]
            assert_same_pair(pairs[i, i], pairs[i, i])
    image, text = "broken image", "no caption in UTF-8"
    assert found == {1: image, 2: image, 3: text, 4: text, 5: text, 6: image}
    assert {*found.values()} == {*SampleError.KINDS}


def test_errors_of_lists(images, tmp_path):
    (images / "1.jpg").write_bytes(b"")
    rows = [f"images/{i}.jpg,{caption(i)}\n".encode() for i in range(6)]
    rows[2] = "images/2.jpg,für\n".encode("latin-1")
    rows[3] = b"images/3.jpg\n"
    rows[4] = b"images/elsewhere.jpg,left out\n"
    (tmp_path / "pairs.csv").write_bytes(b"".join(rows))
    found = kinds(all_pairs(open_all(tmp_path / "pairs.csv")))
    assert found == {"broken image": 1, "no caption in UTF-8": 2}
    (source,) = open_pairs([str(tmp_path / "pairs.csv")], TINY, 0)
    assert sorted(source.captions()) == [caption(i) for i in (0, 1, 5)]
    lines = [{"image": "images/0.jpg", "caption": "good"}, {"image": "images/0.jpg"}]
    lines += [{"caption": "no path"}, {"image": None, "caption": "x"}]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = open_all(tmp_path / "pairs.jsonl")
    assert kinds(all_pairs(source)) == {"no caption in UTF-8": 1} and len(source) == 2


def test_shards_that_shrink_or_disappear_in_training(shards):
    source = open_all(shards / "*.tar")
    assert source[7].caption == caption(7)  # it is open now
    os.truncate(shards / "00000.tar", 5000)
    with pytest.raises(SampleError, match="broken image"):
        source[7]
    (shards / "00001.tar").unlink()
    pairs = training(source)
    assert set(kinds(pairs[i, i] for i in range(8, 16))) == {"broken image"}
    assert pairs[16, 16][3] == []


def test_when_nothing_can_be_used(shards):
    source = open_all(shards / "*.tar")
    for path in shards.glob("*.tar"):
        path.unlink()
    loader = DataLoader(training(source), batch_sampler=[[(0, 0)]], num_workers=1)
    with pytest.raises(InputError) as error:
        list(loader)
    last = str(error.value).strip().splitlines()[-1]
    assert "1,000 pairs in a row" in last and "00000.tar" in last


# --------------------------------------------------------------------------------------------------
# Superpixels computed before training


def compute(capsys, *specs, workers="0"):
    """Runs the program -> how many images it computed, and what it printed."""
    capsys.readouterr()
    sizes = ["--image-size", "32", "--patch-size", "8"]
    data.main(["superpixels", "--data", *map(str, specs), *sizes, "--workers", workers])
    streams = capsys.readouterr()
    return sum(map(int, re.findall(r"of (\d+) images;", streams.out))), streams.out + streams.err


@pytest.mark.parametrize("kind", ["shards", "list"])
def test_superpixels_of_before_and_of_training_are_the_same(
    shards, images, tmp_path, monkeypatch, capsys, kind
):
    spec = shards / "{00000..00002}.tar"
    if kind == "list":  # two captions for each image
        write_table(tmp_path / "pairs.csv", [(f"{i // 2}.jpg", caption(i)) for i in range(12)])
        spec = f"{tmp_path}/pairs.csv={images}"
    before = all_pairs(open_all(spec))
    assert compute(capsys, spec, workers="2")[0] == (6 if kind == "list" else 24)
    with monkeypatch.context() as patch:
        patch.setattr(data, "superpixels", None)  # training finds them and computes none
        after = all_pairs(open_all(spec))
    for one, other in zip(before, after, strict=True):
        assert_same_pair(one, other)
    assert not kinds(after)
    assert compute(capsys, spec)[0] == 0


def test_an_interrupted_program_keeps_what_it_has(shards, monkeypatch, capsys):
    spec = shards / "*.tar"
    before = all_pairs(open_all(spec))
    original = data.superpixels
    calls = itertools.count()

    def interrupted(*args):
        if next(calls) == 13:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data, "superpixels", interrupted)
        compute(capsys, spec)
    assert [sample.segments is None for sample in open_all(spec)] == [False] * 13 + [True] * 11
    for one, other in zip(before, all_pairs(open_all(spec)), strict=True):
        assert_same_pair(one, other)
    assert compute(capsys, spec)[0] == 11


def test_superpixels_of_an_older_list_are_not_used(images, tmp_path, capsys):
    rows = [(f"images/{i}.jpg", caption(i)) for i in range(6)]
    path = write_table(tmp_path / "pairs.csv", rows)
    compute(capsys, path)
    write_table(path, rows[::-1])
    source = open_all(path)
    assert all(sample.segments is None for sample in source)
    assert compute(capsys, path)[0] == 6
    for one, other in zip(all_pairs(source), all_pairs(open_all(path)), strict=True):
        assert_same_pair(one, other)
    write_table(path, rows)
    assert compute(capsys, path)[0] == 0


def test_superpixels_of_another_algorithm_are_not_used(shards, monkeypatch, capsys):
    compute(capsys, shards / "00000.tar")
    assert open_all(shards / "00000.tar")[0].segments is not None
    monkeypatch.setitem(data.FELZENSZWALB, "sigma", 0.5)
    assert open_all(shards / "00000.tar")[0].segments is None


def test_damaged_superpixels_are_computed(shards, capsys):
    spec = shards / "0000[01].tar"
    before = all_pairs(open_all(spec))
    compute(capsys, spec)
    one, other = (source.superpixels for source in open_pairs([str(spec)], TINY, 0))
    first, last = one.places[1].tolist()
    content = one.data.read_bytes()
    one.data.write_bytes(content[:first] + bytes(last - first) + content[last:])
    places = np.load(other.data.with_suffix(".npy"))
    places[2] = (10**9, 10**9 + 99)
    np.save(other.data.with_suffix(".npy"), places)
    after = all_pairs(open_all(spec))
    assert not kinds(after)
    for pair, same in zip(before, after, strict=True):
        assert_same_pair(pair, same)
    other.data.with_suffix(".npy").write_bytes(b"damaged")
    assert open_pairs([str(spec)], TINY, 0)[1].superpixels.places is None
    assert compute(capsys, spec)[0] == 8


def test_broken_images_have_no_superpixels(tmp_path, capsys):
    faulty(tmp_path)
    images, text = compute(capsys, tmp_path / "faulty.tar")
    assert images == 9 and "3 broken images" in text and "000000001" in text


@pytest.mark.parametrize("path", PHOTOGRAPHS, ids=lambda path: path.stem)
def test_a_reduced_jpeg_shows_the_same(path):
    full = data.decode_image(path)
    size = min(full.shape[:2]) // 4
    reduced = data.decode_image(path, size * 3 // 2)
    assert size * 3 // 2 <= min(reduced.shape[:2]) <= min(full.shape[:2]) // 2 + 1
    one, other = (Image.fromarray(x).resize((64, 64), Image.BICUBIC) for x in (full, reduced))
    assert np.abs(np.asarray(one).astype(float) - np.asarray(other)).mean() < 4


def test_a_very_long_image_stays_small():
    assert data.reduced_size(10, 100_000, 224) == (224, 8 * 224)
    assert data.reduced_size(375, 500, 224) == (224, 299)
