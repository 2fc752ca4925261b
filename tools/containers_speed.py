"""How fast images come out of containers beside a folder, and what the index of a large tar costs.

    python tools/containers_speed.py images            # throughput, as shares of the folder's
    python tools/containers_speed.py index 1281167     # a tar of tars with that many tiny members

Everything is written to a temporary folder, which needs 2 KB a member, and deleted at the end."""

import io
import os
import statistics
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ours  # noqa: E402, F401, I001 (before all else)
import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

import containers  # noqa: E402
import dataset  # noqa: E402

ROUNDS = 7
IMAGES = 384
CLASSES = 1000  # of the large tar


def photographs(root):
    """IMAGES crops of 500 × 375 of scikit-learn's photographs, as JPEG: about ImageNet's size."""
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    sources = [Image.fromarray(image) for image in load_sample_images().images]
    for i in range(IMAGES):
        source = sources[i % len(sources)]
        width = int(rng.integers(300, source.width))
        height = width * 3 // 4
        left = int(rng.integers(0, source.width - width + 1))
        top = int(rng.integers(0, max(1, source.height - height + 1)))
        crop = source.crop((left, top, left + width, top + height))
        path = root / f"n{i % 8:08}" / f"{i:05}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        crop.resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=92)


def packed(root, place):
    """The same images in everything: name → path."""
    files = sorted(root.rglob("*.JPEG"))
    found = {"folder": root}
    for method, name in ((zipfile.ZIP_STORED, "zip"), (zipfile.ZIP_DEFLATED, "deflated zip")):
        found[name] = place / f"{name.replace(' ', '-')}.zip"
        with zipfile.ZipFile(found[name], "w", method) as archive:
            for path in files:
                archive.write(path, path.relative_to(root))
    found["tar"] = place / "a.tar"
    with tarfile.open(found["tar"], "w") as archive:
        archive.add(root, ".")
    found["tar of tars"] = place / "ILSVRC2012_img_train.tar"
    with tarfile.open(found["tar of tars"], "w") as archive:
        for folder in sorted(root.iterdir()):
            data = tar_of((path.name, path.read_bytes()) for path in sorted(folder.iterdir()))
            add(archive, f"{folder.name}.tar", data)
    found["WebDataset, 4 tars"] = place / "wds"
    found["WebDataset, 4 tars"].mkdir()
    for number in range(4):
        with tarfile.open(found["WebDataset, 4 tars"] / f"{number}.tar", "w") as archive:
            for path in files[number::4]:
                add(archive, f"{path.stem}.jpg", path.read_bytes())
                add(archive, f"{path.stem}.cls", str(int(path.parent.name[1:])).encode())
    return found


def add(archive, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def tar_of(members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in members:
            add(archive, name, data)
    return buffer.getvalue()


def throughput():
    """Images a second of processor time, cropped to 256, each container after the other in each
    round; the middle of the rounds' shares of the folder's."""
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        os.environ["DIMR_HOME"] = str(place / "home")
        photographs(place / "train")
        data = {}
        for name, path in packed(place / "train", place).items():
            data[name] = dataset.Images(path, 256, 3)
        order = np.random.default_rng(0).permutation(IMAGES)
        seconds = {name: [] for name in data}
        for _ in range(ROUNDS):
            for name, images in data.items():
                begun = time.process_time()
                images.batch(order, np.zeros(IMAGES, bool))
                seconds[name].append(time.process_time() - begun)
        for name, taken in seconds.items():
            pairs = zip(seconds["folder"], taken, strict=True)
            share = statistics.median(folder / own for folder, own in pairs)
            rate = IMAGES / statistics.median(taken)
            print(f"{name:20} {rate:6.0f} images/s of a core   {share:.2f} of the folder's")


def index(count):
    """Time and size of the index of a tar of CLASSES tars with `count` tiny members in all."""
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        os.environ["DIMR_HOME"] = str(place / "home")
        path = place / "ILSVRC2012_img_train.tar"
        with tarfile.open(path, "w") as archive:
            for group in range(CLASSES):
                name = f"n{group:08}"
                share = range(group, count, CLASSES)
                add(archive, f"{name}.tar", small_tar(f"{name}_{i}.JPEG" for i in share))
        print(f"{path.stat().st_size / 1e9:.2f} GB, {count:,} members")
        for what in ("walked", "by its index"):
            begun = time.monotonic()
            processor = time.process_time()
            found = containers.find(path)
            print(
                f"{what}: {time.monotonic() - begun:.0f} s, of a core "
                f"{time.process_time() - processor:.0f} s; {found.words}"
            )
        (kept,) = (place / "home" / "indexes").iterdir()
        print(f"the index takes {kept.stat().st_size / 1e6:.1f} MB")


def small_tar(names):
    """A tar of members of 20 bytes, written by hand: tarfile takes minutes for a million."""
    parts = []
    for name in names:
        header = bytearray(512)
        header[: len(name)] = name.encode()
        header[100:108] = b"0000644\0"
        header[124:136] = b"00000000024\0"
        header[148:156] = b" " * 8
        header[156:157] = b"0"
        header[257:265] = b"ustar\00000"
        header[148:156] = b"%06o\0 " % sum(header)
        parts += [bytes(header), b"x" * 20 + bytes(492)]
    return b"".join(parts) + bytes(1024)


if __name__ == "__main__":
    if sys.argv[1:2] == ["images"]:
        throughput()
    elif sys.argv[1:2] == ["index"]:
        index(int(sys.argv[2]))
    else:
        sys.exit(__doc__)
