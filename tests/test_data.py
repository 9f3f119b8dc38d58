"""Scenes, superpixels, crops, and pictures and label maps as people have them."""

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image

from clip_loader import InputError
from conftest import assert_one_line
from data import (
    COLOURS,
    GROUNDS,
    SCENE_WORDS,
    THINGS,
    SegmentationFolder,
    SyntheticScenes,
    identity,
    normalise,
    patch_labels,
    random_resized_crop,
    read_label,
    read_picture,
    resize_bilinear,
    superpixels,
    voc_palette,
)

# ---------------------------------------------------------------------------------------------------------------------
# Synthetic scenes


def test_scenes_are_the_same_on_every_machine():
    """Recorded once. Any change of this value makes all results on the scenes incomparable with older ones."""
    digest = hashlib.sha256()
    for split in ("train", "val"):
        scenes = SyntheticScenes(64, seed=0, split=split)
        for i in (0, 1, 2, 1000):
            sample = scenes[i]
            digest.update(sample.picture.tobytes() + sample.label.tobytes() + sample.caption.encode())
    assert digest.hexdigest()[:16] == "d0e1a94116df28bc"


def test_splits_and_seeds_differ():
    pictures = [SyntheticScenes(64, seed, split)[0].picture for seed in (0, 1) for split in ("train", "val")]
    for i in range(4):
        for j in range(i):
            assert (pictures[i] != pictures[j]).any()


def test_captions_name_what_is_in_the_scene_and_nothing_else():
    counts = {word: 0 for word in SCENE_WORDS}
    complete = 0
    for sample in (SyntheticScenes(64)[i] for i in range(300)):
        there = {SCENE_WORDS[c] for c in np.unique(sample.label)}
        named = {
            word for word in SCENE_WORDS if word in sample.caption.replace(",", " ").split() + sample.caption[:-1].split()
        }
        assert named and named <= there, sample.caption
        complete += named == there
        for word in there:
            counts[word] += 1
    assert min(counts.values()) > 20
    assert 200 < complete < 300  # eight captions of nine, and those of which one word is all there is


def test_unseen_scenes_have_only_combinations_that_training_has_not():
    met = {}
    for split in ("train", "val", "unseen"):
        scenes, met[split] = SyntheticScenes(16, split=split), set()
        for sample in (scenes[i] for i in range(400)):
            grounds = {SCENE_WORDS[c] for c in np.unique(sample.label)} & GROUNDS.keys()
            letters = "".join(x if x.isalpha() else " " for x in sample.caption).split()
            for colour, thing in zip(letters, letters[1:]):
                if colour in COLOURS and thing in THINGS and len(grounds) == 1:
                    met[split].add((colour, thing, *grounds))
    assert len(met["unseen"]) > 15 and len(met["train"]) > 30
    assert not met["unseen"] & (met["train"] | met["val"])


@pytest.mark.parametrize("size", [32, 64, 224])
def test_every_pixel_has_a_word(size):
    sample = SyntheticScenes(size)[5]
    assert sample.picture.shape == (size, size, 3) and sample.picture.dtype == np.uint8
    assert sample.label.shape == (size, size) and sample.label.max() < len(SCENE_WORDS)
    assert set(COLOURS).isdisjoint(GROUNDS)


# ---------------------------------------------------------------------------------------------------------------------
# Superpixels and crops


def test_patch_label_is_the_floor_of_the_mean():
    segments = np.zeros((4, 8), int)
    segments[:, 2:4] = 3  # first patch: half 0, half 3 -> 1.5 -> 1
    segments[:, 4:] = 7
    segments[0, 4] = 2  # second: 15 of 16 pixels 7 -> 6.69 -> 6
    assert patch_labels(segments, 4).tolist() == [1, 6]


def test_patch_label_by_majority():
    segments = np.zeros((4, 8), int)
    segments[:, 2:4] = 3  # first patch: 6 pixels of 0, 8 of 3, 2 of 9
    segments[:2, 0] = 9
    segments[:, 4:] = 7
    segments[0, 4:] = 2
    assert patch_labels(segments, 4, "majority").tolist() == [3, 7]


def test_superpixels_follow_the_things():
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[:, 32:] = 255
    segments = superpixels(picture, 64, 8)
    left, right = segments[:, :28], segments[:, 36:]
    assert len(np.unique(left)) == len(np.unique(right)) == 1 and left[0, 0] != right[0, 0]


@pytest.mark.parametrize("shape", [(64, 64), (50, 90), (90, 30), (8, 200), (1, 1)])
def test_crops_keep_picture_and_superpixels_aligned(shape):
    """A picture whose red is its superpixel number stays so, whatever is cropped."""
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    segments = rows // 8 * 16 + columns // 8
    picture = np.stack([segments % 256, rows % 256, columns % 256], axis=-1).astype(np.uint8)
    for seed in range(10):
        rng = np.random.RandomState(seed)
        crop, labels = random_resized_crop(picture, segments, 64, rng, scale=0.5)
        assert crop.shape == (64, 64, 3) and labels.shape == (64, 64)
        inside = np.zeros((64, 64), bool)  # away from borders, where bicubic interpolation blends
        for dy in (-3, 3):
            for dx in (-3, 3):
                same = np.roll(labels, (dy, dx), (0, 1)) == labels
                inside = same if not inside.any() else inside & same
        assert (crop[..., 0][inside].astype(int) == labels[inside] % 256).mean() > 0.9 or not inside.any()


def test_crops_keep_at_least_their_share():
    rows, columns = np.mgrid[:100, :100]
    picture = np.stack([rows, columns, columns], axis=-1).astype(np.uint8)
    sizes = []
    for seed in range(100):
        _, labels = random_resized_crop(picture, rows * 100 + columns, 50, np.random.RandomState(seed), scale=0.5)
        height, width = (np.ptp(labels // 100) + 2), (np.ptp(labels % 100) + 2)
        sizes.append(height * width / 1e4)
    assert min(sizes) > 0.45 and max(sizes) > 0.9 and np.std(sizes) > 0.05


@pytest.mark.parametrize("height, width", [(8, 200), (200, 8)])
def test_where_no_crop_fits_it_is_the_middle(height, width):
    """As torchvision's RandomResizedCrop, which the authors use: as much as the ratio 4 to 3 allows."""
    rows, columns = np.mgrid[:height, :width]
    picture = np.stack([rows, columns, columns], axis=-1).astype(np.uint8)
    _, labels = random_resized_crop(picture, rows + columns, 64, np.random.RandomState(0), scale=0.5)
    assert labels.min() == (200 - 11) // 2 and np.ptp(labels) == 11 - 1 + 8 - 1


def test_a_whole_crop_changes_nothing():
    sample = SyntheticScenes(64)[0]
    segments = superpixels(sample.picture, 64, 8)
    picture, same = random_resized_crop(sample.picture, segments, 64, np.random.RandomState(0), scale=1.0)
    assert (picture == sample.picture).all() and (same == segments).all()


def test_normalise():
    image = torch.tensor([0, 128, 255], dtype=torch.uint8).view(3, 1, 1)
    expected = torch.tensor(
        [(0 - 0.48145466) / 0.26862954, (128 / 255 - 0.4578275) / 0.26130258, (1 - 0.40821073) / 0.27577711]
    )
    assert torch.allclose(normalise(image).flatten(), expected)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures as people have them


def test_pictures_of_every_mode_look_as_in_a_viewer(tmp_path):
    rgb = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [128, 128, 128]]], np.uint8)
    grey = np.array([[0, 100], [200, 255]], np.uint8)

    def shown(image, name="a.png", **options):
        image.save(tmp_path / name, **options)
        return read_picture(tmp_path / name)

    picture = Image.fromarray(rgb)
    assert (shown(picture) == rgb).all()
    assert (shown(Image.fromarray(grey)) == grey[..., None]).all()
    assert (shown(Image.fromarray(grey.astype(np.uint16) * 257)) == grey[..., None]).all()  # 16 bit
    assert (shown(picture.quantize(4)) == rgb).all()  # palette
    assert abs(shown(picture.convert("CMYK"), "a.tif").astype(int) - rgb).max() <= 1
    assert (shown(Image.fromarray(grey > 128)) == (grey > 128)[..., None] * 255).all()  # 1 bit

    alpha = np.array([[255, 0], [255, 128]], np.uint8)
    transparent = shown(Image.fromarray(np.dstack([rgb, alpha])))
    assert (transparent[0, 0] == rgb[0, 0]).all() and (transparent[0, 1] == 255).all()  # on white
    assert (abs(transparent[1, 1].astype(int) - 191) <= 1).all()
    assert (shown(Image.fromarray(np.dstack([grey, alpha]), "LA"))[0, 1] == 255).all()
    assert (shown(picture.quantize(4), transparency=picture.quantize(4).getpixel((1, 0)))[0, 1] == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    rows = np.zeros((20, 40, 3), np.uint8)
    rows[:10, :20] = 255  # white top left
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(rows).save(tmp_path / "a.jpg", exif=exif, quality=100, subsampling=0)
    picture = read_picture(tmp_path / "a.jpg")
    assert picture.shape == ((20, 40, 3) if orientation < 5 else (40, 20, 3))
    corners = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}
    assert picture[corners[orientation]].min() > 240
    assert (picture > 128).mean() == pytest.approx(0.25, abs=0.02)


def test_files_that_are_not_pictures(tmp_path):
    for name, content in {"text.jpg": b"hello", "empty.jpg": b"", "none.jpg": None}.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError) as error:
            read_picture(tmp_path / name)
        assert_one_line(error, tmp_path / name)
    Image.fromarray(np.random.RandomState(0).randint(0, 255, (99, 99, 3), np.uint8)).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:3000])
    with pytest.raises(InputError) as error:
        read_picture(tmp_path / "cut.jpg")
    assert_one_line(error, "cut.jpg", "truncated")


def test_label_maps(tmp_path):
    path, picture = tmp_path / "a.png", np.zeros((4, 6, 3), np.uint8)
    label = np.arange(24, dtype=np.uint8).reshape(4, 6)
    image = Image.fromarray(label)
    image.putpalette(voc_palette().ravel().tolist())
    image.save(path)
    assert (read_label(path, picture, identity(24)) == label).all()
    label[0, 0] = 255
    Image.fromarray(label).save(path)
    assert (read_label(path, picture, identity(24)) == label).all()
    with pytest.raises(InputError) as error:
        read_label(path, picture, identity(23))
    assert_one_line(error, path, "value 23")
    with pytest.raises(InputError) as error:
        read_label(path, picture.swapaxes(0, 1), identity(24))
    assert_one_line(error, path, "6x4", "4x6")
    Image.fromarray(picture).save(path)
    with pytest.raises(InputError) as error:
        read_label(path, picture, identity(24))
    assert_one_line(error, path, "RGB")
    path.write_bytes(b"no")
    with pytest.raises(InputError) as error:
        read_label(path, picture, identity(24))
    assert_one_line(error, path)


def test_resize_of_the_smallest_pictures():
    assert (resize_bilinear(np.full((1, 1, 3), 77, np.uint8), 5, 7) == 77).all()
    assert (resize_bilinear(np.full((1, 200, 3), 9, np.uint8), 64, 640) == 9).all()


# ---------------------------------------------------------------------------------------------------------------------
# Benchmarks


@pytest.fixture
def voc(tmp_path):
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text("a\nb\n")
    Image.new("L", (9, 9)).save(tmp_path / "SegmentationClass/a.png")
    return tmp_path


@pytest.mark.parametrize("lost", ["JPEGImages", "SegmentationClass", "ImageSets/Segmentation/val.txt"])
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


def test_voc_palette():
    """From the VOC development kit: background, aeroplane, bicycle, bird, ..., tv monitor; and void."""
    palette = voc_palette()
    assert palette[[0, 1, 2, 3, 20, 255]].tolist() == [
        [0, 0, 0],
        [128, 0, 0],
        [0, 128, 0],
        [128, 128, 0],
        [0, 64, 128],
        [224, 224, 192],
    ]
    assert len(np.unique(palette, axis=0)) == 256
