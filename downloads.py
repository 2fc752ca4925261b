"""Weights and reference data by name: a table of what can be fetched, and a cache where each file
appears verified.

    path = find("sd-vae-ft-ema")        # in the cache, fetched if need be
    path = find("runs/mine.safetensors")      # a path is returned as it is

Nothing else of dimr touches the network. Settings come from the environment: DIMR_HOME (the cache),
DIMR_OFFLINE, HF_ENDPOINT (a mirror of the Hugging Face hub), and http_proxy, https_proxy,
no_proxy."""

import contextlib
import dataclasses
import http.client
import os
import shutil
import socket
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

from storage import UserError, sha256, sync_folder

BLOCK = 2**20  # bytes read at once
HUB = "https://huggingface.co"
PASSING = {
    408,
    416,
    425,
    429,
}  # HTTP statuses that another try may cure, beside all of 500 and above


@dataclasses.dataclass(frozen=True)
class Asset:
    address: str  # URL, where {hub} stands for HF_ENDPOINT
    what: str
    licence: str
    size: int | None = None  # bytes
    sha256: str | None = None  # hex, or its first digits

    @property
    def file(self):
        return self.address.rpartition("/")[2]

    @property
    def url(self):
        hub = os.environ.get("HF_ENDPOINT") or HUB
        if not hub.startswith(("http://", "https://")):
            raise UserError(f"HF_ENDPOINT is {hub!r}; expected a URL such as {HUB}")
        return self.address.format(hub=hub.rstrip("/"))


_RELEASE = "{hub}/QHL067/DiMR/resolve/main/"
_RESEARCH = "code Apache-2.0, weights 'for research purposes'; see huggingface.co/QHL067/DiMR"
_REFERENCES = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/"
_IMAGENET = "photographs of ImageNet, non-commercial research only; see image-net.org"

ASSETS = {
    "xl2r": Asset(_RELEASE + "DiMR-XL_2R_800epochs.pth", "DiMR-XL/2R for 256×256, 800 epochs, "
                                                         "about 2.0 GB", _RESEARCH),
    "g2r": Asset(_RELEASE + "DiMR-G_2R_800epochs.pth", "DiMR-G/2R for 256×256, 800 epochs, "
                                                       "about 4.2 GB", _RESEARCH),
    "sd-vae-ft-ema": Asset(
        "{hub}/stabilityai/sd-vae-ft-ema/resolve/main/diffusion_pytorch_model.safetensors",
        "the VAE of the latent models", "MIT; see huggingface.co/stabilityai/sd-vae-ft-ema",
        334_643_276, "32db726da04f06c1b6b14c0043ce115cc87a501482945c5add89a40d838fcb46"),
    "inception": Asset(
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
        "the Inception network of 2015, "
        "for FID", "Google's, ported by pytorch-fid (Apache-2.0); trained on ImageNet",
        95_628_359, "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"),
    "vit-b16": Asset(
        "{hub}/timm/vit_base_patch16_224.augreg2_in21k_ft_in1k/resolve/main/model.safetensors",
        "the ViT-B/16 classifier of dimr eval fidelity, "
        "about 346 MB", "Apache-2.0; trained on ImageNet-21k and ImageNet-1k"),
    "imagenet64": Asset(
        _REFERENCES + "64/VIRTUAL_imagenet64_labeled.npz", "ADM's reference for FID at "
                                                           "64×64", _IMAGENET),
    "imagenet256": Asset(
        _REFERENCES + "256/VIRTUAL_imagenet256_labeled.npz", "ADM's reference for FID at "
                                                             "256×256", _IMAGENET,
        2_037_122_530, "b32732719497e42660a9affb4a966068cba0855ac449b82015e34ec376d20758"),
    "imagenet512": Asset(_REFERENCES + "512/VIRTUAL_imagenet512.npz", "ADM's reference for FID at "
                                                                      "512×512", _IMAGENET),
}  # fmt: skip


def cache():
    """The folder downloads are kept in: DIMR_HOME, else `dimr` in the platform's cache folder."""
    if home := os.environ.get("DIMR_HOME"):
        return Path(home).expanduser()
    default = "~/Library/Caches" if sys.platform == "darwin" else "~/.cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or default).expanduser() / "dimr"


def place(name):
    """Where the file of this name is kept, fetched or not."""
    return cache() / name / ASSETS[name].file


def listing():
    """The table as dicts: name, file, url, size, licence, what, and `cached` (path or None)."""
    return [
        {
            "name": name,
            "what": asset.what,
            "licence": asset.licence,
            "file": asset.file,
            "url": asset.url,
            "size": asset.size,
            "cached": str(place(name)) if place(name).is_file() else None,
        }
        for name, asset in ASSETS.items()
    ]


def find(name_or_path):
    """The path of a name in ASSETS, fetched first if it is not in the cache, or of a file or folder
    that exists.

    A string in the table is always taken as a name (write ./xl2r for a file called so). Raises
    UserError."""
    if name_or_path in ASSETS:
        return fetch(name_or_path)
    if Path(name_or_path).exists():
        return Path(name_or_path)
    raise UserError(
        f"{name_or_path} is no file, nor known by name; expected a path or one of "
        f"{', '.join(ASSETS)}"
    )


def fetch(name, timeout=30, tries=4, wait=1, patience=300):
    """The cached file of `name`, downloaded if need be; a cut download goes on where it stopped.

    `timeout`: seconds without a byte; `tries`: attempts in a row that bring nothing new, `wait`
    seconds and then twice as long apart; `patience`: how long another process may hold the download
    without moving. Raises UserError."""
    asset, path = ASSETS[name], place(name)
    if not path.is_file():
        by_hand = f"; or put {asset.file} from {asset.url} into {path.parent}"
        if os.environ.get("DIMR_OFFLINE", "0") not in ("", "0"):
            raise UserError(
                f"{name} is not in the cache and DIMR_OFFLINE is set: unset it{by_hand}"
            )
        with _locked(path, patience):
            if not path.is_file():  # another process may have fetched it meanwhile
                try:
                    _download(name, asset, path, timeout, tries, wait)
                except Failed as error:
                    raise UserError(
                        f"{name} could not be fetched: {error}; try again later{by_hand}"
                    ) from None
    if asset.size and path.stat().st_size != asset.size:
        raise UserError(
            f"{path} has {path.stat().st_size:,} bytes, expected {asset.size:,}; delete "
            "it and try again"
        )
    return path


class Failed(Exception):
    """A download that can't succeed, and why."""


class Interrupted(Failed):
    """An attempt that failed; another may not."""


def _say(line):
    tqdm.write(line, file=sys.stderr)


@contextlib.contextmanager
def _locked(path, patience):
    """Hold the download of `path` for this process. The lock ends with its owner; a living one is
    waited for as long as its download grows, and named if it does not for `patience` seconds."""
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "a+") as file:
        seen, since = None, time.monotonic()
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                file.seek(0)
                owner, size = file.read().strip() or "another process", _size(_part(path))
            if seen is None:
                _say(f"waiting for {owner}, which is fetching {path}")
            if size != seen:
                seen, since = size, time.monotonic()
            if time.monotonic() - since > patience:
                raise UserError(
                    f"{path} is being fetched by {owner}, which has not moved for {patience:g} s; "
                    "end that process and try again"
                )
            time.sleep(0.1)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _part(path):
    return path.with_name(f".{path.name}.part")


def _tag(path):
    """Beside a partial file: what the server called the file it is a part of."""
    return path.with_name(f".{path.name}.tag")


def _size(path):
    return path.stat().st_size if path.exists() else 0


def _download(name, asset, path, timeout, tries, wait):
    """Bring `path` whole and verified, in as many attempts as still bring something new. Raises
    Failed."""
    part, failures, mixed = _part(path), 0, False
    best = _size(part)
    _say(f"fetching {name} from {asset.url} to {path}")
    with tqdm(
        desc=name, unit="B", unit_scale=True, unit_divisor=1024, leave=False, file=sys.stderr
    ) as bar:
        while True:
            try:
                resumed, expected = _attempt(asset, path, timeout, bar)
            except Interrupted as error:
                failures, best = (0, _size(part)) if _size(part) > best else (failures + 1, best)
                if failures >= tries:
                    raise
                _say(f"{name}: {error}; trying again")
                time.sleep(wait * 2 ** max(failures - 1, 0))
                continue
            try:
                proof = _verify(part, expected)
                break
            except Failed as error:
                part.unlink()
                _tag(path).unlink()
                if mixed or not resumed:
                    raise
                mixed, best = (
                    True,
                    0,
                )  # the pieces may be of different files: once more, from the start
                _say(f"{name}: {error}; starting over")
    with open(part, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(part, path)
    _tag(path).unlink(missing_ok=True)
    sync_folder(path.parent)
    _say(f"{name}: {path.stat().st_size:,} bytes, {proof}")


def _attempt(asset, path, timeout, bar):
    """Append to the partial file what one request brings. Once it is whole, returns (whether an
    earlier attempt began it, the digits its SHA-256 must begin with or None). Raises Interrupted,
    or Failed if trying again won't help."""
    part, tag = _part(path), _tag(path)
    start = (
        max(0, _size(part) - 1) if tag.exists() else 0
    )  # the last byte once more: no range is empty then
    with _open(asset.url, start, timeout, part) as (response, linked):
        first, total = _extent(response)
        known = asset.size or int(linked.get("X-Linked-Size") or 0) or None
        identity = (
            linked.get("X-Linked-ETag")
            or response.headers["ETag"]
            or response.headers["Last-Modified"]
            or ""
        )
        if known and total not in (None, known):
            raise Interrupted(f"the server offers {total:,} bytes, expected {known:,}")
        if first and (first != start or identity != tag.read_text()):
            part.unlink()
            raise Interrupted(
                "the server's file has changed"
                if first == start
                else f"the server sent bytes from {first:,}, asked for {start:,}"
            )
        total = total or known
        room = shutil.disk_usage(path.parent).free
        if total and total - first > room:
            raise Failed(
                f"it takes {total - first:,} bytes and {path.parent} has room for {room:,}; "
                "free space or set DIMR_HOME"
            )
        bar.total, bar.n, bar.initial = total, first, first
        with open(part, "rb+" if first else "wb") as file:
            tag.write_text(identity)
            file.seek(first)
            while block := _read(response):
                file.write(block)
                bar.update(len(block))
        size = _size(part)
    if size != (total or size):
        raise Interrupted(f"the connection ended after {size:,} of {total:,} bytes")
    etag = linked.get("X-Linked-ETag", "").strip('"')
    expected = asset.sha256 or (etag if len(etag) == 64 else None)
    if not (expected or total):
        raise Failed("the server gives neither length nor hash to verify it by")
    return first > 0, expected


@contextlib.contextmanager
def _open(url, start, timeout, part):
    """The response to a request for the bytes of `url` from `start` on, and the hub's X-Linked
    headers, which come with its redirect. Raises as `_attempt` does."""
    linked = {}

    def note(headers):
        linked.update(
            {name: headers[name] for name in ("X-Linked-ETag", "X-Linked-Size") if headers[name]}
        )

    class Redirects(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, request, file, code, message, headers, url):
            note(headers)
            return super().redirect_request(request, file, code, message, headers, url)

    headers = {"User-Agent": "dimr"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        request = urllib.request.Request(url, headers=headers)
        response = urllib.request.build_opener(Redirects).open(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        passing = error.code in PASSING or error.code >= 500
        if error.code == 416:  # no such range: the part is of another, longer file
            part.unlink()
        raise (Interrupted if passing else Failed)(
            f"the server answers {error.code} {error.reason}"
        ) from None
    except (OSError, http.client.HTTPException) as error:
        raise Interrupted(f"no connection ({_reason(error)})") from None
    with response:
        note(response.headers)
        yield response, linked


def _read(response):
    try:
        return response.read1(BLOCK)
    except (OSError, http.client.HTTPException) as error:
        raise Interrupted(f"the connection broke off ({_reason(error)})") from None


def _reason(error):
    return str(getattr(error, "reason", error)) or type(error).__name__


def _extent(response):
    """(number of the body's first byte, length of the whole file or None)."""
    if response.status == 206:
        unit, _, span = (response.headers["Content-Range"] or "").partition(" ")
        span, _, total = span.partition("/")
        first = span.partition("-")[0]
        if unit != "bytes" or not first.isdecimal():
            raise Interrupted("the server sent a part without saying which")
        return int(first), int(total) if total.isdecimal() else None
    length = response.headers["Content-Length"] or ""
    return 0, int(length) if length.isdecimal() else None


def _verify(part, expected):
    """How the partial file was proved to be the whole one. Raises Failed if it is another."""
    digest = sha256(part)
    if expected is None:
        return f"length as announced; no hash is published, its SHA-256 is {digest}"
    if not digest.startswith(expected.lower()):
        raise Failed(f"its SHA-256 is {digest}, expected {expected}")
    return f"SHA-256 {digest} as expected"
