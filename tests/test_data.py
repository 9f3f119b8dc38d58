"""Scenes, superpixels, crops, and images and label maps in every form that people have them."""

import hashlib
import os
import struct
import subprocess
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from conftest import assert_one_line
from data import (
    COLOURS,
    GROUNDS,
    SCENE_WORDS,
    THINGS,
    ImageFolder,
    SegmentationFolder,
    SyntheticScenes,
    normalise,
    patch_labels,
    random_resized_crop,
    read_image,
    read_label,
    resize_bilinear,
    superpixels,
    value_table,
)
from model import InputError

# --------------------------------------------------------------------------------------------------
# Synthetic scenes


def test_scenes_are_the_same_on_every_machine():
    """If this value changes, no result on the scenes can be compared with an older one."""
    digest = hashlib.sha256()
    for split in ("train", "val"):
        scenes = SyntheticScenes(64, seed=0, split=split)
        for i in (0, 1, 2, 1000):
            sample = scenes[i]
            digest.update(sample.image.tobytes() + sample.label.tobytes())
            digest.update(sample.caption.encode())
    assert digest.hexdigest()[:16] == "d0e1a94116df28bc"


def test_splits_and_seeds_differ():
    keys = [(seed, split) for seed in (0, 1) for split in ("train", "val")]
    images = [SyntheticScenes(64, *key)[0].image.tobytes() for key in keys]
    assert len(set(images)) == 4


def words_of(sample):
    return "".join(x if x.isalpha() else " " for x in sample.caption).split()


def test_captions_name_what_is_in_the_scene_and_nothing_else():
    counts = {word: 0 for word in SCENE_WORDS}
    complete = 0
    for sample in (SyntheticScenes(64)[i] for i in range(300)):
        present = {SCENE_WORDS[c] for c in np.unique(sample.label)}
        named = set(words_of(sample)) & set(SCENE_WORDS)
        assert named and named <= present, sample.caption
        complete += named == present
        for word in present:
            counts[word] += 1
    assert min(counts.values()) > 20
    assert 200 < complete < 300  # one caption in nine names only one thing


def test_unseen_scenes_have_only_combinations_that_training_has_not():
    met = {"train": set(), "val": set(), "unseen": set()}
    for split in met:
        scenes = SyntheticScenes(16, split=split)
        for sample in (scenes[i] for i in range(400)):
            grounds = {SCENE_WORDS[c] for c in np.unique(sample.label)} & GROUNDS.keys()
            words = words_of(sample)
            for colour, thing in zip(words, words[1:]):
                if colour in COLOURS and thing in THINGS and len(grounds) == 1:
                    met[split].add((colour, thing, *grounds))
    assert len(met["unseen"]) > 15 and len(met["train"]) > 30
    assert not met["unseen"] & (met["train"] | met["val"])


# --------------------------------------------------------------------------------------------------
# Superpixels and crops


def test_patch_label_is_the_floor_of_the_mean():
    segments = np.zeros((4, 8), int)
    segments[:, 2:4] = 3  # first patch: half 0, half 3 -> 1.5 -> 1
    segments[:, 4:] = 7
    segments[0, 4] = 2  # second: 15 of 16 pixels 7 -> 6.69 -> 6
    assert patch_labels(segments, 4).tolist() == [1, 6]


def test_patch_label_by_majority():
    segments = np.zeros((4, 12), int)
    segments[:, 2:4] = 3  # first patch: 6 pixels of 0, 8 of 3, 2 of 9
    segments[:2, 0] = 9
    segments[:, 4:8] = 7
    segments[0, 4:8] = 2
    segments[:, 8:10] = 6  # third: a tie, the smaller id
    segments[:, 10:] = 5
    assert patch_labels(segments, 4, "majority").tolist() == [3, 7, 5]


def test_superpixels_follow_the_objects():
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, 32:] = 255
    segments = superpixels(image, 64, 8)
    left, right = segments[:, :28], segments[:, 36:]
    assert len(np.unique(left)) == len(np.unique(right)) == 1 and left[0, 0] != right[0, 0]


@pytest.mark.parametrize("shape", [(64, 64), (50, 90), (90, 30), (8, 200), (1, 1)])
def test_crops_keep_image_and_superpixels_aligned(shape):
    """An image whose red is its superpixel id stays so in every crop."""
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    segments = rows // 8 * 16 + columns // 8
    image = np.stack([segments % 256, rows % 256, columns % 256], axis=-1).astype(np.uint8)
    for seed in range(10):
        rng = np.random.RandomState(seed)
        crop, labels = random_resized_crop(image, segments, 64, rng, scale=0.5)
        assert crop.shape == (64, 64, 3) and labels.shape == (64, 64)
        inside = np.ones((64, 64), bool)  # away from borders, where bicubic interpolation blends
        for dy in (-3, 3):
            for dx in (-3, 3):
                inside &= np.roll(labels, (dy, dx), (0, 1)) == labels
        if inside.any():
            assert (crop[..., 0][inside] == labels[inside] % 256).mean() > 0.9


def test_crops_keep_at_least_their_share():
    rows, columns = np.mgrid[:100, :100]
    image = np.stack([rows, columns, columns], axis=-1).astype(np.uint8)
    sizes = []
    for seed in range(100):
        rng = np.random.RandomState(seed)
        _, labels = random_resized_crop(image, rows * 100 + columns, 50, rng, scale=0.5)
        height, width = (np.ptp(labels // 100) + 2), (np.ptp(labels % 100) + 2)
        sizes.append(height * width / 1e4)
    assert min(sizes) > 0.45 and max(sizes) > 0.9 and np.std(sizes) > 0.05


@pytest.mark.parametrize("height, width", [(8, 200), (200, 8)])
def test_where_no_crop_fits_it_is_the_center(height, width):
    """As in torchvision's RandomResizedCrop: as much as the ratio 4 to 3 allows."""
    rows, columns = np.mgrid[:height, :width]
    image = np.stack([rows, columns, columns], axis=-1).astype(np.uint8)
    rng = np.random.RandomState(0)
    _, labels = random_resized_crop(image, rows + columns, 64, rng, scale=0.5)
    assert labels.min() == (200 - 11) // 2 and np.ptp(labels) == 11 - 1 + 8 - 1


def test_a_whole_crop_changes_nothing():
    image = SyntheticScenes(64)[0].image
    segments = superpixels(image, 64, 8)
    crop, same = random_resized_crop(image, segments, 64, np.random.RandomState(0), scale=1.0)
    assert (crop == image).all() and (same == segments).all()


def test_normalise():
    image = torch.tensor([0, 128, 255], dtype=torch.uint8).view(3, 1, 1)
    expected = [-0.48145466 / 0.26862954, (128 / 255 - 0.4578275) / 0.26130258]
    expected.append((1 - 0.40821073) / 0.27577711)
    assert torch.allclose(normalise(image).flatten(), torch.tensor(expected))


# --------------------------------------------------------------------------------------------------
# Image files


def test_images_of_every_mode_look_as_in_a_viewer(tmp_path):
    rgb = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [128, 128, 128]]], np.uint8)
    grey = np.array([[0, 100], [200, 255]], np.uint8)

    def shown(image, name="a.png", **options):
        image.save(tmp_path / name, **options)
        return read_image(tmp_path / name)

    image = Image.fromarray(rgb)
    palette = image.quantize(4)
    assert (shown(image) == rgb).all()
    assert (shown(Image.fromarray(grey)) == grey[..., None]).all()
    assert (shown(Image.fromarray(grey.astype(np.uint16) * 257)) == grey[..., None]).all()  # 16 bit
    assert (shown(palette) == rgb).all()
    assert abs(shown(image.convert("CMYK"), "a.tif").astype(int) - rgb).max() <= 1
    assert (shown(Image.fromarray(grey > 128)) == (grey > 128)[..., None] * 255).all()  # 1 bit

    alpha = np.array([[255, 0], [255, 128]], np.uint8)
    transparent = shown(Image.fromarray(np.dstack([rgb, alpha])))
    assert (transparent[0, 0] == rgb[0, 0]).all() and (transparent[0, 1] == 255).all()  # on white
    assert (abs(transparent[1, 1].astype(int) - 191) <= 1).all()
    assert (shown(Image.fromarray(np.dstack([grey, alpha]), "LA"))[0, 1] == 255).all()
    assert (shown(palette, transparency=palette.getpixel((1, 0)))[0, 1] == 255).all()


# Where the white corner of the file is on the screen.
CORNERS = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0)}
CORNERS |= {n + 4: CORNERS[n] for n in CORNERS}


@pytest.mark.parametrize("orientation", CORNERS)
def test_exif_orientation(tmp_path, orientation):
    rows = np.zeros((20, 40, 3), np.uint8)
    rows[:10, :20] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(rows).save(tmp_path / "a.jpg", exif=exif, quality=100, subsampling=0)
    image = read_image(tmp_path / "a.jpg")
    assert image.shape == ((20, 40, 3) if orientation < 5 else (40, 20, 3))
    assert image[CORNERS[orientation]].min() > 240
    assert (image > 128).mean() == pytest.approx(0.25, abs=0.02)


def test_files_that_are_not_images(tmp_path):
    (tmp_path / "text.jpg").write_bytes(b"hello")
    (tmp_path / "empty.jpg").write_bytes(b"")
    noise = np.random.RandomState(0).randint(0, 255, (99, 99, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:3000])
    for name, reason in {"text": "", "empty": "", "cut": "truncated", "none": "no such"}.items():
        with pytest.raises(InputError) as error:
            read_image(tmp_path / f"{name}.jpg")
        assert_one_line(error, tmp_path / name, reason)


def refused(function, *args):
    """The message of the InputError that a function must raise."""
    with pytest.raises(InputError) as error:
        function(*args)
    return error


def test_images_of_no_sensible_size_are_refused(tmp_path, monkeypatch):
    """Before they are decoded: a file of 10 KB can hold 8,000,000 x 1 pixels."""
    path = tmp_path / "a.png"
    table = value_table([0])
    for size in ((101, 1), (1, 101), (30, 31)):
        Image.new("L", size).save(path)
        label = np.zeros((*size[::-1], 3), np.uint8)
        if size[0] == 30:
            assert read_image(path).shape == label.shape
            monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)  # Pillow refuses twice as many
        monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda *_: pytest.fail("decoded"))
        size = "930 pixels" if size[0] == 30 else "x".join(map(str, size))
        assert_one_line(refused(read_image, path), path, size)
        assert_one_line(refused(read_label, path, label, table), path, size)
        monkeypatch.undo()


def test_a_decoder_may_fail_in_any_way(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    Image.new("L", (4, 4)).save(path)
    for kind in (struct.error, EOFError, ZeroDivisionError, MemoryError):

        def fail(*_, kind=kind):
            raise kind("broken")

        monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", fail)
        assert_one_line(refused(read_image, path), path, "broken")
        label = np.zeros((4, 4, 3), np.uint8)
        assert_one_line(refused(read_label, path, label, value_table([0])), path, "broken")


def test_a_pipe_is_no_file(tmp_path):
    """To read it would wait for ever."""
    path = tmp_path / "pipe.png"
    os.mkfifo(path)
    image = np.zeros((4, 4, 3), np.uint8)
    assert_one_line(refused(read_image, path), path, "no such file")
    assert_one_line(refused(read_label, path, image, value_table([0])), path, "no such file")


def test_an_eps_file_starts_no_program(tmp_path, monkeypatch):
    """Pillow would run Ghostscript on it."""
    Image.new("RGB", (9, 9)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.jpg")
    monkeypatch.setattr(subprocess, "check_call", lambda *_, **__: pytest.fail("a program"))
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program"))
    with pytest.raises(InputError) as error:
        read_image(tmp_path / "a.jpg")
    assert_one_line(error, "a.jpg", "cannot identify")


def test_label_maps(tmp_path):
    path = tmp_path / "a.png"
    image = np.zeros((4, 6, 3), np.uint8)
    label = np.arange(24, dtype=np.uint8).reshape(4, 6)
    palette = Image.fromarray(label)
    palette.putpalette(list(range(256)) * 3)
    palette.save(path)
    assert (read_label(path, image, value_table(range(24))) == label).all()
    label[0, 0] = 255
    Image.fromarray(label).save(path)
    assert (read_label(path, image, value_table(range(24))) == label).all()
    assert read_label(path, image, value_table(range(1, 24), [0]))[0].tolist()[:3] == [255, 0, 1]

    def fails(image=image, classes=24):
        with pytest.raises(InputError) as error:
            read_label(path, image, value_table(range(classes)))
        return error

    assert_one_line(fails(classes=23), path, "value 23", "--ignore 23")
    assert_one_line(fails(image.swapaxes(0, 1)), path, "6x4", "4x6")
    Image.fromarray(image).save(path)
    assert_one_line(fails(), path, "RGB")
    path.write_bytes(b"no")
    assert_one_line(fails(), path)


def test_resize_of_the_smallest_images():
    assert (resize_bilinear(np.full((1, 1, 3), 77, np.uint8), 5, 7) == 77).all()
    assert (resize_bilinear(np.full((1, 200, 3), 9, np.uint8), 64, 640) == 9).all()


@pytest.mark.parametrize("size", [(300, 450), (1000, 1500)])  # the second is OpenCV's special case
def test_resize_needs_no_copy_of_the_image_in_larger_numbers(size):
    image = np.zeros((2000, 3000, 3), np.uint8)
    tracemalloc.start()
    resize_bilinear(image, *size)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.5 * image.nbytes


# --------------------------------------------------------------------------------------------------
# Benchmarks, and your own images


@pytest.fixture
def voc(tmp_path):
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text("a\nb\n")
    Image.new("L", (9, 9)).save(tmp_path / "SegmentationClass/a.png")
    return tmp_path


@pytest.mark.parametrize(
    "lost", ["JPEGImages", "SegmentationClass", "ImageSets/Segmentation/val.txt"]
)
def test_a_data_root_without_the_expected_folders(voc, lost):
    assert len(SegmentationFolder("pascal_voc", voc)) == 2
    (voc / lost).rename(voc / "elsewhere")
    with pytest.raises(InputError) as error:
        SegmentationFolder("pascal_voc", voc)
    assert_one_line(error, voc / lost, "VOCdevkit/VOC2012")


def test_names_are_lines(voc):
    Image.new("L", (9, 9)).save(voc / "SegmentationClass/my cat.png")
    (voc / "ImageSets/Segmentation/val.txt").write_text("my cat \r\n\nb\n")
    assert SegmentationFolder("pascal_voc", voc).names == ["my cat", "b"]
    (voc / "ImageSets/Segmentation/val.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError) as error:
        SegmentationFolder("pascal_voc", voc)
    assert_one_line(error, "val.txt")


def test_own_label_maps(tmp_path):
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (3, 2)).save(tmp_path / f"images/{name}.jpg")
    how = tmp_path / "images", tmp_path / "labels", ["cat", "dog"]
    Image.new("L", (3, 2)).save(tmp_path / "labels/a_L.png")
    assert_one_line(refused(ImageFolder, *how), tmp_path / "labels/a.png", "does not exist")
    Image.fromarray(np.array([[0, 1, 11], [255, 7, 1]], np.uint8)).save(tmp_path / "labels/a.png")
    assert_one_line(refused(ImageFolder(*how).__getitem__, 0), "value 7", "--ignore 7")
    labelled, other = ImageFolder(*how, ignored=[7, 11])
    assert labelled.label.tolist() == [[0, 1, 255], [255, 255, 1]] and other.label is None
    assert ImageFolder(*how, ignored=[0, 7, 11])[0].label[0].tolist() == [255, 1, 255]
