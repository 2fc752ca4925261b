"""Images as people have them, folders of them, the order of visiting, reading ahead."""

import hashlib
import itertools
import multiprocessing
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from io import BytesIO

import numpy as np
import PIL
import pytest
import torch
from conftest import DATA
from PIL import Image

import archives
import dataset
import randomness
from storage import UserError

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def noise(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def read(image, path, channels=3, exif=False, **options):
    """What read_image makes of a PIL image of 16 × 16 saved at `path`, in numbers that may be
    subtracted."""
    image.save(path, **options)
    return dataset.read_image(path, 16, channels, exif).astype(int)


def plain(mode, colour):
    return Image.new(mode, (16, 16), colour)


def distance(found, colour):
    """The largest difference to one colour."""
    return abs(found - np.asarray(colour)).max()


@pytest.fixture
def folder(tmp_path):
    """Ten noisy 20 × 20 PNGs in each of the classes a and b."""
    for name in "ab":
        place = tmp_path / "images" / name
        place.mkdir(parents=True)
        for i in range(10):
            Image.fromarray(noise(20, 20, seed=ord(name) + 100 * i)).save(place / f"{i}.png")
    return tmp_path / "images"


# one image


def test_center_crop_is_adms():
    files = np.load(DATA / "center_crop.npz")
    tolerance = 0 if PIL.__version__.startswith("13.") else 1  # Pillow 13 made them
    for k in range(4):
        for size in (32, 64):
            crop = np.asarray(dataset.center_crop(Image.fromarray(files[f"image_{k}"]), size))
            assert distance(crop.astype(int), files[f"crop_{k}_{size}"]) <= tolerance


def test_a_crop_is_halved_while_twice_its_size_and_cut_from_the_middle():
    """Of 8 × 11 pixels: one halving, to 4 × 5, and the offset of the odd rest is rounded down."""
    pixels = noise(11, 8)
    halved = Image.fromarray(pixels).resize((4, 5), Image.Resampling.BOX)
    found = np.asarray(dataset.center_crop(Image.fromarray(pixels), 4))
    assert (found == np.asarray(halved)[:4]).all()


def test_16_bit_grey_is_scaled_not_clipped(tmp_path):
    values = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    expected = np.round(values / 257)
    for channels in (1, 3):
        found = read(Image.fromarray(values), tmp_path / "x.png", channels)
        assert found.shape == (16, 16, channels)
        assert (found == expected[..., None]).all()
    older = Image.fromarray(values.astype(np.int32))  # the mode in which some Pillows open them
    assert (np.asarray(dataset._plain(older)) == expected).all()


def test_1_bit_spans_black_to_white(tmp_path):
    bits = noise(16, 16, 1)[..., 0] > 127
    found = read(Image.fromarray(bits), tmp_path / "x.png", 1)
    assert (found[..., 0] == 255 * bits).all()


def test_grey_becomes_three_equal_channels(tmp_path):
    grey = noise(16, 16, 1)
    assert (read(Image.fromarray(grey[..., 0]), tmp_path / "x.png") == grey).all()


def test_colour_and_lossless_formats_are_kept(tmp_path):
    colour = noise(16, 16)
    assert (read(Image.fromarray(colour), tmp_path / "x.png") == colour).all()
    assert (read(Image.fromarray(colour), tmp_path / "x.webp", lossless=True) == colour).all()
    palette = Image.fromarray(colour).quantize(16)
    assert (read(palette, tmp_path / "x.png") == np.asarray(palette.convert("RGB"))).all()


def test_transparency_is_laid_on_white(tmp_path):
    path = tmp_path / "x.png"
    half = read(plain("RGBA", (255, 0, 0, 128)), path)
    assert distance(half, (255, 127, 127)) <= 1
    grey = read(plain("LA", (100, 51)), path, 1)
    assert distance(grey, 255 - 155 * 0.2) <= 1
    keyed = read(plain("RGB", BLUE), path, transparency=BLUE)
    assert distance(keyed, 255) == 0
    none = read(plain("RGBA", (0, 0, 0, 0)), tmp_path / "x.webp", lossless=True)
    assert distance(none, 255) == 0


def test_a_transparent_colour_of_a_palette_is_laid_on_white(tmp_path):
    palette = plain("P", 1)
    palette.putpalette(RED + GREEN)
    assert distance(read(palette, tmp_path / "x.png"), GREEN) == 0
    assert distance(read(palette, tmp_path / "x.png", transparency=1), 255) == 0


def test_cmyk_jpeg_keeps_its_colours(tmp_path):
    red = read(plain("CMYK", (0, 255, 255, 0)), tmp_path / "x.jpg")
    assert distance(red, RED) <= 3
    dark_blue = read(plain("CMYK", (255, 255, 0, 128)), tmp_path / "x.jpg")
    assert distance(dark_blue, (0, 0, 127)) <= 3


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = {"save_all": True, "append_images": [plain("RGB", GREEN)], "lossless": True}
    found = read(plain("RGB", RED), tmp_path / "x.webp", **frames)
    assert distance(found, RED) == 0


def test_exif_rotation_counts_only_on_request(tmp_path):
    red_above_blue = np.zeros((16, 16, 3), np.uint8)
    red_above_blue[:8] = RED
    red_above_blue[8:] = BLUE
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(red_above_blue).save(tmp_path / "x.png", exif=exif)
    assert tuple(dataset.read_image(tmp_path / "x.png", 16)[0, 0]) == RED
    assert tuple(dataset.read_image(tmp_path / "x.png", 16, exif=True)[0, 0]) == BLUE


def png(width, height, data=b""):
    """A PNG file whose header claims this size."""

    def chunk(kind, body):
        check = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + check

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = [
        chunk(b"IHDR", header),
        chunk(b"IDAT", zlib.compress(data)),
        chunk(b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def encoded(kind):
    """An image file of this format."""
    file = BytesIO()
    Image.fromarray(noise(40, 40)).save(file, kind)
    return file.getvalue()


BAD = {
    "is empty": b"",
    "is not a JPEG, PNG or WebP image": b"<html>404</html>",
    "is not a JPEG, PNG or WebP": encoded("GIF"),
    "truncated": encoded("JPEG")[:600],
    "Truncated": encoded("PNG")[:600],
    "pixels": png(20_000, 20_000),
    "pixels ": png(10_000, 10_000),  # above the size that Pillow only warns of
    "elongated": png(1_000_000, 1, bytes(1_000_001)),
}


@pytest.mark.parametrize("reason", BAD)
def test_an_unreadable_image_is_named_with_its_reason(tmp_path, reason):
    path = tmp_path / "x.jpg"
    path.write_bytes(BAD[reason])
    with pytest.raises(dataset.BadImage) as error:
        dataset.read_image(path, 16)
    message = str(error.value)
    assert str(path) in message
    assert reason.strip().lower() in message.lower()
    assert "\n" not in message
    assert str(pickle.loads(pickle.dumps(error.value))) == message  # it has to travel from a worker


@pytest.mark.parametrize("kind", dataset.FORMATS)
def test_no_damage_to_a_file_raises_anything_else(tmp_path, kind):
    whole = encoded(kind)
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        places = rng.integers(0, 60, 4)
        if rng.random() < 0.5:
            places = rng.integers(0, len(whole), 8)
        for place in places:
            damaged[place] = rng.integers(256)
        if rng.random() < 0.2:
            damaged = damaged[: rng.integers(1, len(whole))]
        (tmp_path / "x").write_bytes(damaged)
        try:
            assert dataset.read_image(tmp_path / "x", 16, exif=True).shape == (16, 16, 3)
        except dataset.BadImage:
            refused += 1
    assert refused > 30


def test_a_file_that_cannot_be_reached_is_not_a_bad_image(tmp_path):
    for path in (tmp_path / "gone.png", tmp_path):
        with pytest.raises(UserError, match="can't be read") as error:
            dataset.read_image(path, 16)
        assert not isinstance(error.value, dataset.BadImage)


# folders


def test_classes_are_numbered_by_sorted_folder_name(folder):
    (folder / "a").rename(folder / "zebra")
    (folder / ".cache").mkdir()
    (folder / "b" / ".hidden.png").write_bytes(b"")
    (folder / "b" / "notes.txt").write_text("not an image")
    (folder / "b" / "folder.png").mkdir()
    data = dataset.Images(folder)
    assert data.classes == ["b", "zebra"]
    assert data.labels.tolist() == [0] * 10 + [1] * 10
    assert data.labels.dtype == np.int64
    assert len(data) == 20
    assert (data.kind, data.size, data.channels) == ("pixels", 20, 3)
    expected = [folder / name / f"{i}.png" for name in ("b", "zebra") for i in range(10)]
    assert [data.place(i) for i in range(20)] == [str(path) for path in expected]


def test_a_flat_folder_is_one_class(folder):
    data = dataset.open_data(folder / "a")
    assert data.classes == ["a"]
    assert data.labels.tolist() == [0] * 10


def test_names_come_back_as_they_were():
    names = ["a/é.png", os.fsdecode(b"b/\xff.png"), "c/x y.png"]
    kept = archives.Names(names)
    assert list(kept) == names
    assert [kept[i] for i in range(3)] == names
    assert kept[-1] == "c/x y.png"
    assert kept[-3] == "a/é.png"
    assert len(kept) == 3
    with pytest.raises(IndexError):
        kept[3]


def test_folders_that_are_not_data_are_refused_with_what_to_do(folder, tmp_path):
    def refusal(path):
        with pytest.raises(UserError) as error:
            dataset.open_data(path)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "is not a folder" in refusal(tmp_path / "missing")
    assert "is not a folder" in refusal(folder / "a" / "0.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "x.gif").write_bytes(b"")
    assert ".jpg, .jpeg, .png, .webp" in refusal(tmp_path / "empty")
    (tmp_path / "imagenet").mkdir()
    folder.rename(tmp_path / "imagenet" / "train")
    assert f"choose one of the folders in {tmp_path / 'imagenet'}" in refusal(tmp_path / "imagenet")
    (tmp_path / "imagenet" / "train" / "c").mkdir()
    assert "fill or remove" in refusal(tmp_path / "imagenet" / "train")
    (tmp_path / "imagenet" / "x.JPEG").write_bytes(b"")
    assert "mixes images (x.JPEG) and folders (train)" in refusal(tmp_path / "imagenet")


def test_size_is_the_images_own_only_if_they_share_one(folder):
    assert dataset.Images(folder, default_size=64).size == 20
    Image.fromarray(noise(20, 30)).save(folder / "b" / "5.png")
    with pytest.raises(UserError, match=r"20×20.*5\.png is 30×20.*--res"):
        dataset.Images(folder)
    assert dataset.Images(folder, default_size=64).size == 64
    assert dataset.Images(folder, size=16, default_size=64).size == 16


def test_a_shared_size_that_is_not_square_is_nobodys(tmp_path):
    Image.fromarray(noise(20, 30)).save(tmp_path / "x.png")
    with pytest.raises(UserError, match="not of one square size .*x.png is 30×20"):
        dataset.Images(tmp_path)
    assert dataset.Images(tmp_path, default_size=64).size == 64


MANY = dataset.PROBED + 20


@pytest.mark.parametrize("count, odd", [(3, 0), (3, 1), (3, 2), (MANY, 0), (MANY, MANY - 1)])
def test_a_sample_is_all_of_a_few_images_and_reaches_from_the_first_to_the_last(
    tmp_path, count, odd
):
    for i in range(count):
        Image.fromarray(noise(8, 8)).save(tmp_path / f"{i:03}.png")
    Image.fromarray(noise(8, 12)).save(tmp_path / f"{odd:03}.png")
    with pytest.raises(UserError, match=f"{odd:03}.png is 12×8"):
        dataset.Images(tmp_path)


def test_grey_folders_have_one_channel_and_colour_among_them_is_named(tmp_path):
    for i in range(3):
        Image.fromarray(noise(16, 16, 1, i)[..., 0]).save(tmp_path / f"{i}.png")
    data = dataset.Images(tmp_path)
    assert data.channels == 1
    images, _ = data.batch([0], [False])
    assert images.shape == (1, 1, 16, 16)
    in_name_only = Image.fromarray(noise(16, 16, 1)[..., 0]).convert("RGB")
    in_name_only.save(tmp_path / "1.png")
    assert (data.read(1) == noise(16, 16, 1)).all()
    Image.fromarray(noise(16, 16)).save(tmp_path / "1.png")
    with pytest.raises(UserError, match=r"1\.png is in colour"):
        list(dataset.loader(data, [([0, 1], [False, False])], 0, on_bad="skip"))
    assert dataset.Images(tmp_path).channels == 3


def test_colour_in_one_channel_alone_is_colour(tmp_path):
    grey = noise(16, 16, 1).repeat(3, 2)
    for channel, change in itertools.product(range(3), (-1, 1)):
        tinted = np.clip(grey, 1, 254)
        tinted[3, 4, channel] = int(tinted[3, 4, channel]) + change
        Image.fromarray(tinted).save(tmp_path / "x.png")
        with pytest.raises(UserError, match="is in colour"):
            dataset.read_image(tmp_path / "x.png", 16, 1)


def test_fingerprint_follows_names_and_sizes_but_not_the_place(folder, tmp_path):
    before = dataset.Images(folder).fingerprint
    shutil.copytree(folder, tmp_path / "copy")
    assert dataset.Images(tmp_path / "copy").fingerprint == before
    (folder / "a" / "0.png").rename(folder / "a" / "00.png")
    assert dataset.Images(folder).fingerprint != before
    (tmp_path / "copy" / "b" / "3.png").write_bytes(b"")
    assert dataset.Images(tmp_path / "copy").fingerprint != before


def test_fingerprint_is_that_of_all_versions(folder):
    lines = [
        f"{name}/{i}.png\0{(folder / name / f'{i}.png').stat().st_size}\n"
        for name in "ab"
        for i in range(10)
    ]
    expected = hashlib.sha256("".join(lines).encode()).hexdigest()
    assert dataset.Images(folder).fingerprint == expected


def test_a_batch_holds_crops_and_mirrored_crops(folder):
    data = dataset.Images(folder, size=16)
    images, labels = data.batch([3, 12], np.array([False, True]))
    assert images.dtype == torch.uint8
    assert images.is_contiguous()
    assert labels.tolist() == [0, 1]
    crops = [dataset.read_image(data.place(i), 16) for i in (3, 12)]
    assert (images[0].permute(1, 2, 0).numpy() == crops[0]).all()
    assert (images[1].permute(1, 2, 0).numpy() == crops[1][:, ::-1]).all()


# order


def test_every_epoch_visits_every_item_once_in_an_order_of_its_own():
    order = randomness.Order(50, 1)
    epochs = [order(50 * e, 50 * e + 50)[0].tolist() for e in range(4)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert randomness.Order(50, 2)(0, 50)[0].tolist() != epochs[0]


def test_what_a_position_visits_does_not_depend_on_how_the_run_is_cut():
    indices, flips = randomness.Order(7, 5)(0, 100)
    for cuts in ([0, 1, 2, 50, 51, 100], [0, 33, 33, 100], [99, 100], [6, 8]):
        order = randomness.Order(7, 5)
        for first, last in itertools.pairwise(cuts):
            part, part_flips = order(first, last)
            assert (part == indices[first:last]).all()
            assert (part_flips == flips[first:last]).all()


def test_flips_are_fair_coins_independent_of_epoch_and_seed():
    _, flips = randomness.Order(1000, 0)(0, 20_000)
    _, others = randomness.Order(1000, 1)(0, 20_000)
    assert abs(flips.mean() - 0.5) < 0.02
    assert abs((flips[:10_000] == flips[10_000:]).mean() - 0.5) < 0.02
    assert abs((flips == others).mean() - 0.5) < 0.02


def test_the_order_of_a_seed_is_the_same_for_ever():
    indices, flips = randomness.Order(10, 3)(0, 12)
    assert indices.tolist() == [9, 7, 8, 3, 5, 6, 4, 0, 2, 1, 8, 2]
    assert flips.astype(int).tolist() == [1, 0, 0, 1, 1, 0, 0, 0, 0, 1, 0, 0]


# reading ahead


def stretches(order, length, count):
    """Yield `count` steps of `length` positions."""
    for k in range(count):
        yield order(k * length, (k + 1) * length)


def forever():
    """Yield the same step again and again."""
    while True:
        yield [0], [False]


def test_any_number_of_workers_gives_the_same_batches(folder):
    data = dataset.Images(folder, size=16)
    order = randomness.Order(20, 0)
    before = torch.random.get_rng_state()
    runs = [list(dataset.loader(data, stretches(order, 7, 10), n)) for n in (0, 1, 2)]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert [len(run) for run in runs] == [10, 10, 10]
    for run in runs[1:]:
        for (images, labels, bad), (expected, numbers, _) in zip(run, runs[0], strict=True):
            assert torch.equal(images, expected)
            assert torch.equal(labels, numbers)
            assert bad == []
    assert not multiprocessing.active_children()


def test_readers_are_as_many_as_this_process_has_cores(folder, monkeypatch):
    data = dataset.Images(folder)
    for cores, processes, expected in ((2, 1, 2), (9, 2, 4), (9, 1, 8), (3, 8, 1)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, n=cores: range(n), raising=False)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert dataset._share_of_cores(data) == expected
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert dataset._share_of_cores(data) == 3


def without(folder, *names):
    """The folder's data, with these files empty."""
    for name in names:
        (folder / name).write_bytes(b"")
    return dataset.Images(folder, 16, 3)


def messages(folder, *names):
    return [f"{folder}/{name}: is empty" for name in names]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_stops_the_reading_unless_told_otherwise(folder, workers):
    data = without(folder, "a/9.png")
    batches = dataset.loader(data, [([8], [False]), ([9], [False])], workers)
    next(batches)
    with pytest.raises(dataset.BadImage, match=r"^\S*a/9.png: is empty$"):
        next(batches)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_skipped_image_is_replaced_by_the_next_that_can_be_read(folder, workers):
    """With the flip of its place; after the last comes the first."""
    data = without(folder, "a/9.png", "b/0.png", "b/9.png")
    steps = [([8, 9], [False, True]), ([11, 19], [False, True])]
    (first, labels, bad), (second, last_labels, last_bad) = dataset.loader(
        data, steps, workers, on_bad="skip"
    )
    assert labels.tolist() == [0, 1]
    assert bad == messages(folder, "a/9.png", "b/0.png")
    assert torch.equal(first, data.batch([8, 11], [False, True])[0])
    assert last_labels.tolist() == [1, 0]
    assert last_bad == messages(folder, "b/9.png")
    assert torch.equal(second, data.batch([11, 0], [False, True])[0])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_dropped_image_leaves_the_others_their_flips(folder, workers):
    data = without(folder, "a/8.png", "a/9.png")
    steps = [([7, 8, 10], [False, False, True]), ([9], [True])]
    (images, labels, bad), (none, no_labels, last_bad) = dataset.loader(
        data, steps, workers, on_bad="drop"
    )
    assert labels.tolist() == [0, 1]
    assert bad == messages(folder, "a/8.png")
    assert torch.equal(images, data.batch([7, 10], [False, True])[0])
    assert none.shape == (0, 3, 16, 16)
    assert no_labels.shape == (0,)
    assert last_bad == messages(folder, "a/9.png")


def test_one_readable_image_is_found_from_anywhere(folder):
    names = [f"{name}/{i}.png" for name in "ab" for i in range(10)]
    names.remove("a/4.png")
    data = without(folder, *names)
    bad = []
    images, labels = data.batch([5], [False], bad)
    assert labels.tolist() == [0]
    assert torch.equal(images, data.batch([4], [False])[0])
    assert len(bad) == 19


def test_a_folder_without_a_readable_image_ends(folder):
    data = without(folder, *(f"{name}/{i}.png" for name in "ab" for i in range(10)))
    with pytest.raises(UserError, match=r"none of the 20 images can be read; the last: .*9\.png"):
        list(dataset.loader(data, [([0], [False])], 0, on_bad="skip"))
    with pytest.raises(dataset.BadImage):
        dataset.Images(folder)


def test_a_killed_worker_is_an_error_here_and_not_in_the_training_step(folder):
    data = dataset.Images(folder, size=16)
    batches = dataset.loader(data, forever(), 2)
    next(batches)
    victim = multiprocessing.active_children()[0].pid
    os.kill(victim, signal.SIGKILL)
    os.waitid(os.P_PID, victim, os.WEXITED | os.WNOWAIT)
    sum(range(10**6))  # the step that must not be interrupted
    with pytest.raises(UserError, match=f"worker.*{victim}.*--workers"):
        for _ in batches:
            pass
    assert not multiprocessing.active_children()


def test_a_worker_told_to_stop_as_it_starts_goes_on(folder, monkeypatch):
    follow = dataset._follow

    def told(number):
        for stop in dataset.STOPS:
            os.kill(os.getpid(), stop)
        follow(number)

    monkeypatch.setattr(dataset, "_follow", told)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    data = dataset.Images(folder)
    assert len(list(dataset.loader(data, [([0], [False])] * 5, 2))) == 5
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


ABANDON = """
import itertools, sys, dataset
images = dataset.Images(sys.argv[1])
batches = dataset.loader(images, itertools.repeat(([0], [False])), 2)
try:
    next(batches)
    raise KeyError
except KeyError:
    sys.exit(3)
"""


@pytest.mark.slow
def test_a_process_that_abandons_its_loader_still_ends(folder):
    done = subprocess.run([sys.executable, "-c", ABANDON, folder], timeout=60)
    assert done.returncode == 3


WAIT = """
import itertools, multiprocessing, sys, time, torch, dataset
# PyTorch's own check, which a kill at the start misleads
torch.utils.data._utils.worker.MP_STATUS_CHECK_INTERVAL = 10**6
images = dataset.Images(sys.argv[1])
batches = dataset.loader(images, itertools.repeat(([0], [False])), 3)
next(batches)
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_workers_end_with_a_killed_process(folder):
    command = [sys.executable, "-Wignore", "-c", WAIT, folder]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    workers = process.stdout.readline().split()
    process.kill()
    assert len(workers) == 3
    # their copies of the pipe are closed, so they are gone
    assert process.communicate(timeout=60) == ("", None)
