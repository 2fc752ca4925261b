"""Images as people have them, shards, visiting order, reading ahead."""

import itertools
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
import zlib

import numpy as np
import PIL
import pytest
import torch
from conftest import DATA
from PIL import Image
from safetensors.numpy import save_file

import dataset
import randomness
from storage import UserError

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def noise(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def read(image, path, channels=3, **options):
    """What read_image makes of a PIL image of 16 × 16 saved at `path`."""
    exif = options.pop("exif", False)
    image.save(path, **options)
    return dataset.read_image(path, 16, channels, exif)


@pytest.fixture
def folder(tmp_path):
    """Ten noisy 20 × 20 PNGs in each of the classes a and b."""
    for name in "ab":
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(10):
            Image.fromarray(noise(20, 20, seed=ord(name) + 100 * i)).save(
                tmp_path / "images" / name / f"{i}.png"
            )
    return tmp_path / "images"


# one image


def test_center_crop_is_adms():
    files = np.load(DATA / "center_crop.npz")
    tolerance = 0 if PIL.__version__.startswith("13.") else 1  # Pillow 13 made them
    for k in range(4):
        for size in (32, 64):
            crop = np.asarray(dataset.center_crop(Image.fromarray(files[f"image_{k}"]), size))
            assert abs(crop.astype(int) - files[f"crop_{k}_{size}"]).max() <= tolerance


def test_16_bit_grey_is_scaled_not_clipped(tmp_path):
    values = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    expected = np.round(values / 257)
    for channels in (1, 3):
        found = read(Image.fromarray(values), tmp_path / "x.png", channels)
        assert found.shape == (16, 16, channels) and (found == expected[..., None]).all()
    older = dataset._plain(
        Image.fromarray(values.astype(np.int32))
    )  # the mode in which some Pillows open them
    assert (np.asarray(older) == expected).all()


def test_1_bit_spans_black_to_white(tmp_path):
    bits = noise(16, 16, 1)[..., 0] > 127
    assert (
        read(Image.fromarray(bits), tmp_path / "x.png", 1)[..., 0] == np.where(bits, 255, 0)
    ).all()


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
    palette = Image.new("P", (16, 16), 1)
    palette.putpalette(RED + GREEN)
    assert (read(palette, tmp_path / "x.png") == GREEN).all()
    assert (read(palette, tmp_path / "x.png", transparency=1) == 255).all()
    half = read(Image.new("RGBA", (16, 16), (255, 0, 0, 128)), tmp_path / "x.png")
    assert abs(half.astype(int) - (255, 127, 127)).max() <= 1
    assert (
        abs(
            read(
                Image.new("RGBA", (16, 16), (0, 0, 0, 0)), tmp_path / "x.webp", lossless=True
            ).astype(int)
            - 255
        ).max()
        == 0
    )
    assert (
        abs(
            read(Image.new("LA", (16, 16), (100, 51)), tmp_path / "x.png", 1).astype(int)
            - (255 - 155 * 0.2)
        ).max()
        <= 1
    )
    assert (
        read(Image.new("RGB", (16, 16), BLUE), tmp_path / "x.png", transparency=BLUE) == 255
    ).all()


def test_cmyk_jpeg_keeps_its_colours(tmp_path):
    assert (
        abs(
            read(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), tmp_path / "x.jpg").astype(int)
            - RED
        ).max()
        <= 3
    )
    assert (
        abs(
            read(Image.new("CMYK", (16, 16), (255, 255, 0, 128)), tmp_path / "x.jpg").astype(int)
            - (0, 0, 127)
        ).max()
        <= 3
    )


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (16, 16), colour) for colour in (RED, GREEN)]
    assert (
        read(frames[0], tmp_path / "x.webp", save_all=True, append_images=frames[1:], lossless=True)
        == RED
    ).all()


def test_exif_rotation_counts_only_on_request(tmp_path):
    image = Image.fromarray(
        np.repeat([[RED], [BLUE]], 8, 0).astype(np.uint8).repeat(16, 1)
    )  # red above blue
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    image.save(tmp_path / "x.png", exif=exif)
    assert tuple(dataset.read_image(tmp_path / "x.png", 16)[0, 0]) == RED
    assert tuple(dataset.read_image(tmp_path / "x.png", 16, exif=True)[0, 0]) == BLUE


def png(width, height, data=b""):
    """A PNG file whose header claims this size."""

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(data))
        + chunk(b"IEND", b"")
    )


def encoded(kind, image=None):
    from io import BytesIO

    file = BytesIO()
    (image or Image.fromarray(noise(40, 40))).save(file, kind)
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
    assert (
        str(path) in message and reason.strip().lower() in message.lower() and "\n" not in message
    )
    assert str(pickle.loads(pickle.dumps(error.value))) == message  # it has to travel from a worker


@pytest.mark.parametrize("kind", dataset.FORMATS)
def test_no_damage_to_a_file_raises_anything_else(tmp_path, kind):
    whole, rng, refused = encoded(kind), np.random.default_rng(0), 0
    for _ in range(300):
        damaged = bytearray(whole)
        for place in (
            rng.integers(0, len(whole), 8) if rng.random() < 0.5 else rng.integers(0, 60, 4)
        ):
            damaged[place] = rng.integers(256)
        (tmp_path / "x").write_bytes(
            damaged[: rng.integers(1, len(whole))] if rng.random() < 0.2 else damaged
        )
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
    data = dataset.ImageFolder(folder)
    assert (
        data.classes == ["b", "zebra"]
        and data.labels.tolist() == [0] * 10 + [1] * 10
        and len(data) == 20
    )
    assert data.labels.dtype == np.int64 and (data.kind, data.size, data.channels) == (
        "pixels",
        20,
        3,
    )
    assert list(data.paths) == [
        str(folder / c / f"{i}.png") for c in ("b", "zebra") for i in range(10)
    ]


def test_a_flat_folder_is_one_class(folder):
    data = dataset.open_data(folder / "a")
    assert data.classes == ["a"] and set(data.labels) == {0} and len(data) == 10


def test_paths_come_back_as_they_were():
    names = ["a/é.png", os.fsdecode(b"b/\xff.png"), "c/x y.png"]
    paths = dataset.Paths("/photos", names)
    assert (
        [paths.name(i) for i in range(3)] == names
        and paths[-1] == "/photos/c/x y.png"
        and len(paths) == 3
    )
    with pytest.raises(IndexError):
        paths[3]


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
    Image.fromarray(noise(20, 30)).save(folder / "b" / "5.png")
    with pytest.raises(UserError, match=r"20×20.*5\.png is 30×20.*--res"):
        dataset.ImageFolder(folder)
    assert dataset.ImageFolder(folder, size=16).size == 16


def test_grey_folders_have_one_channel_and_colour_among_them_is_named(tmp_path):
    for i in range(3):
        Image.fromarray(noise(16, 16, 1, i)[..., 0]).save(tmp_path / f"{i}.png")
    data = dataset.ImageFolder(tmp_path)
    assert data.channels == 1 and data.batch([0], [False])[0].shape == (1, 1, 16, 16)
    Image.fromarray(noise(16, 16, 1)[..., 0]).convert("RGB").save(
        tmp_path / "1.png"
    )  # colour in name only
    assert (data.read(1) == noise(16, 16, 1)).all()
    Image.fromarray(noise(16, 16)).save(tmp_path / "1.png")
    with pytest.raises(UserError, match=r"1\.png is in colour"):
        list(dataset.loader(data, [([0, 1], [False, False])], 0, "skip"))
    assert dataset.ImageFolder(tmp_path).channels == 3


def test_fingerprint_follows_names_and_sizes_but_not_the_place(folder, tmp_path):
    before = dataset.ImageFolder(folder).fingerprint
    shutil.copytree(folder, tmp_path / "copy")
    assert dataset.ImageFolder(tmp_path / "copy").fingerprint == before
    (folder / "a" / "0.png").rename(folder / "a" / "00.png")
    assert dataset.ImageFolder(folder).fingerprint != before
    (tmp_path / "copy" / "b" / "3.png").write_bytes(b"")
    assert dataset.ImageFolder(tmp_path / "copy").fingerprint != before


def test_a_batch_holds_crops_and_mirrored_crops(folder):
    data = dataset.ImageFolder(folder, size=16)
    images, labels = data.batch([3, 12], np.array([False, True]))
    assert images.dtype == torch.uint8 and images.is_contiguous() and labels.tolist() == [0, 1]
    assert (images[0].permute(1, 2, 0).numpy() == dataset.read_image(data.paths[3], 16)).all()
    assert (
        images[1].permute(1, 2, 0).numpy() == dataset.read_image(data.paths[12], 16)[:, ::-1]
    ).all()


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
            part = order(first, last)
            assert (part[0] == indices[first:last]).all() and (part[1] == flips[first:last]).all()


def test_flips_are_fair_coins_independent_of_epoch_and_seed():
    flips = randomness.Order(1000, 0)(0, 20_000)[1]
    assert abs(flips.mean() - 0.5) < 0.02
    assert abs((flips[:10_000] == flips[10_000:]).mean() - 0.5) < 0.02
    assert abs((flips == randomness.Order(1000, 1)(0, 20_000)[1]).mean() - 0.5) < 0.02


def test_the_order_of_a_seed_is_the_same_for_ever():
    indices, flips = randomness.Order(10, 3)(0, 12)
    assert indices.tolist() == [9, 7, 8, 3, 5, 6, 4, 0, 2, 1, 8, 2]
    assert "".join("01"[int(flip)] for flip in flips) == "100110000100"


# reading ahead


def test_any_number_of_workers_gives_the_same_batches(folder):
    data, order = dataset.ImageFolder(folder, size=16), randomness.Order(20, 0)
    before = torch.random.get_rng_state()
    runs = [
        list(dataset.loader(data, (order(p, p + 7) for p in range(0, 70, 7)), workers))
        for workers in (0, 1, 2)
    ]
    assert torch.equal(torch.random.get_rng_state(), before)
    for run in runs[1:]:
        assert len(run) == 10
        for (images, labels, bad), (expected, numbers, _) in zip(run, runs[0], strict=True):
            assert torch.equal(images, expected) and torch.equal(labels, numbers) and bad == []
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_stops_is_replaced_or_is_dropped(folder, workers):
    for name in ("a/9.png", "b/0.png"):
        (folder / name).write_bytes(b"")
    data = dataset.ImageFolder(folder, size=16)
    steps = [([8, 9], np.array([False, True])), ([11], np.array([False]))]

    def read(mode):
        return list(dataset.loader(data, steps, workers, mode))

    with pytest.raises(dataset.BadImage, match=r"^\S*a/9.png: is empty$"):
        read("error")
    (images, labels, bad), (_, last, none) = read("skip")
    assert labels.tolist() == [0, 1] and last.tolist() == [1] and none == []
    assert bad == [f"{folder}/a/9.png: is empty", f"{folder}/b/0.png: is empty"]
    assert torch.equal(
        images[1], data.batch([11], [True])[0][0]
    )  # the next readable one, with the flip of its place
    (images, labels, bad), _ = read("drop")
    assert (
        labels.tolist() == [0]
        and bad == [f"{folder}/a/9.png: is empty"]
        and images.shape == (1, 3, 16, 16)
    )


def test_a_folder_without_a_readable_image_ends(folder):
    for path in folder.glob("*/*"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="none of the 20 images can be read"):
        list(dataset.loader(dataset.ImageFolder(folder, 16, 3), [([0], [False])], 0, "skip"))


def test_a_killed_worker_is_an_error_here_and_not_in_the_training_step(folder):
    data, order = dataset.ImageFolder(folder, size=16), randomness.Order(20, 0)
    batches = dataset.loader(data, (order(p, p + 2) for p in range(10**9)), 2)
    next(batches)
    victim = multiprocessing.active_children()[0].pid
    os.kill(victim, signal.SIGKILL)
    os.waitid(os.P_PID, victim, os.WEXITED | os.WNOWAIT)
    sum(range(10**6))  # the step that must not be interrupted
    with pytest.raises(UserError, match=f"worker.*{victim}.*--workers"):
        for _ in batches:
            pass
    assert not multiprocessing.active_children()


def test_a_process_that_abandons_its_loader_still_ends(folder):
    script = f"""
        import sys, dataset
        images = dataset.ImageFolder({str(folder)!r})
        batches = dataset.loader(images, (([0], [False]) for _ in range(10**9)), 2)
        try:
            next(batches)
            raise KeyError
        except KeyError:
            sys.exit(3)
    """
    assert (
        subprocess.run([sys.executable, "-c", textwrap.dedent(script)], timeout=60).returncode == 3
    )


def test_a_worker_told_to_stop_as_it_starts_goes_on(folder, monkeypatch):
    follow = dataset._follow

    def told(number):
        for stop in dataset.STOPS:
            os.kill(os.getpid(), stop)
        follow(number)

    monkeypatch.setattr(dataset, "_follow", told)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert len(list(dataset.loader(dataset.ImageFolder(folder), [([0], [False])] * 5, 2))) == 5
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


def test_workers_end_with_a_killed_process(folder):
    script = f"""
        import multiprocessing, time, torch, dataset
        # PyTorch's own check, which a kill at the start misleads
        torch.utils.data._utils.worker.MP_STATUS_CHECK_INTERVAL = 10**6
        images = dataset.ImageFolder({str(folder)!r})
        batches = dataset.loader(images, (([0], [False]) for _ in range(10**9)), 3)
        next(batches)
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        time.sleep(600)
    """
    process = subprocess.Popen(
        [sys.executable, "-Wignore", "-c", textwrap.dedent(script)],
        stdout=subprocess.PIPE,
        text=True,
    )
    workers = process.stdout.readline().split()
    process.kill()
    assert len(workers) == 3
    assert process.communicate(timeout=60) == (
        "",
        None,
    )  # their copies of the pipe are closed, so they are gone


# shards


def write_set(root, kind, arrays, labels, size, channels, classes=2):
    """A shard set made by the safetensors library and json alone."""
    root.mkdir()
    rows = []
    for k, (data, numbers) in enumerate(zip(arrays, labels, strict=True)):
        save_file({"data": data, "labels": np.asarray(numbers)}, root / f"{k}.safetensors")
        rows.append({"file": f"{k}.safetensors", "count": len(data), "sha256": ""})
    index = {
        "format": 1,
        "kind": kind,
        "size": size,
        "channels": channels,
        "classes": [f"c{i}" for i in range(classes)],
        "shards": rows,
        "options": {"res": 8 * size if kind == "latents" else size},
    }
    (root / "index.json").write_text(json.dumps(index))


@pytest.fixture
def pixels(tmp_path):
    arrays = [
        noise(n * 5, 5).reshape(n, 5, 5, 3) for n in (4, 3)
    ]  # 75 bytes an item: nothing is aligned
    write_set(tmp_path / "pixels", "pixels", arrays, [[0, 1, 0, 1], [1, 1, 0]], 5, 3)
    return tmp_path / "pixels", np.concatenate(arrays)


def test_pixel_shards_give_items_and_mirrored_items(pixels):
    root, expected = pixels
    data = dataset.open_data(root)
    assert (data.kind, data.size, data.channels, data.classes, len(data)) == (
        "pixels",
        5,
        3,
        ["c0", "c1"],
        7,
    )
    assert data.labels.tolist() == [0, 1, 0, 1, 1, 1, 0] and data.labels.dtype == np.int64
    indices, flips = np.array([6, 0, 3, 4, 0]), np.array([0, 1, 0, 1, 0], bool)
    ((images, labels, bad),) = dataset.loader(data, [(indices, flips)])
    found = images.permute(0, 2, 3, 1).numpy()
    for row, (index, flip) in enumerate(zip(indices, flips, strict=True)):
        assert (found[row] == (expected[index][:, ::-1] if flip else expected[index])).all()
    assert images.dtype == torch.uint8 and labels.tolist() == [0, 0, 1, 1, 0] and bad == []
    assert (
        dataset.Shards(root).batch(range(7), [False] * 7)[0].permute(0, 2, 3, 1).numpy() == expected
    ).all()


def test_latent_shards_give_the_latents_of_image_or_flip(tmp_path):
    arrays = [
        np.random.default_rng(n).normal(size=(n, 2, 2, 4, 8, 8)).astype(np.float16) for n in (3, 2)
    ]
    write_set(tmp_path / "latents", "latents", arrays, [[0, 1, 0], [1, 1]], 8, 4)
    data, expected = dataset.open_data(tmp_path / "latents"), np.concatenate(arrays)
    latents, labels = data.batch(np.array([4, 0, 1]), np.array([True, False, True]))
    assert (data.kind, data.size, data.channels) == ("latents", 8, 4) and labels.tolist() == [
        1,
        0,
        1,
    ]
    assert latents.dtype == torch.float16 and latents.shape == (3, 2, 4, 8, 8)
    assert (latents.numpy() == np.stack([expected[4, 1], expected[0, 0], expected[1, 1]])).all()
    assert (
        dataset.open_data(tmp_path / "latents", size=64).size
        == dataset.open_data(tmp_path / "latents", size=8).size
        == 8
    )
    with pytest.raises(UserError, match="holds latents of size 8 with 4 channels, not size 32"):
        dataset.open_data(tmp_path / "latents", size=32)


def test_shards_reach_worker_processes_as_a_path(pixels):
    data = dataset.Shards(pixels[0])
    assert len(pickle.dumps(data)) < 500
    assert torch.equal(
        pickle.loads(pickle.dumps(data)).batch([5], [True])[0], data.batch([5], [True])[0]
    )
    ((images, _, _),) = dataset.loader(data, [(np.array([5]), np.array([True]))], 1)
    assert torch.equal(images, data.batch([5], [True])[0])


def header_of(path):
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_header(path, header, rest):
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + rest)


def damage(path, how):
    raw = path.read_bytes()
    header, rest = header_of(path)
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(raw[:-1])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "endless header":
        path.write_bytes(b"\xff" * 8 + raw[8:])
    elif how == "not json":
        path.write_bytes(raw[:8] + b"x" + raw[9:])
    elif how == "fewer items":
        header["data"]["shape"][0] -= 1
        write_header(path, header, rest)
    elif how == "negative offsets":
        header["data"]["data_offsets"] = [-300, 0]
        write_header(path, header, rest)
    elif how == "other type":
        header["data"]["dtype"] = "F64"
        write_header(path, header, rest)
    elif how == "other shape":
        header["data"]["shape"] = [4, 5, 3, 5]
        write_header(path, header, rest)
    elif how == "label of no class":
        start = len(raw) - len(rest) + header["labels"]["data_offsets"][0]
        path.write_bytes(raw[:start] + b"\x07" + raw[start + 1 :])


@pytest.mark.parametrize(
    "how",
    [
        "missing",
        "cut",
        "empty",
        "endless header",
        "not json",
        "fewer items",
        "negative offsets",
        "other type",
        "other shape",
        "label of no class",
    ],
)
def test_a_damaged_shard_is_named(pixels, how):
    path = pixels[0] / "0.safetensors"
    damage(path, how)
    with pytest.raises(UserError) as error:
        dataset.open_data(pixels[0])
    assert (
        str(path) in str(error.value)
        and "dimr encode" in str(error.value)
        and "\n" not in str(error.value)
    )


def test_an_unfinished_or_foreign_set_is_refused(pixels):
    root = pixels[0]
    index = json.loads((root / "index.json").read_text())
    (root / "index.json").write_text(json.dumps({**index, "format": 2}))
    with pytest.raises(UserError, match="not of shard format 1"):
        dataset.open_data(root)
    (root / "index.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        dataset.open_data(root)
    (root / "index.json").rename(root / "plan.json")
    with pytest.raises(UserError, match="unfinished.*again"):
        dataset.open_data(root)
