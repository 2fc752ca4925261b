"""Weights and reference data by name: a table of what can be fetched, and a cache where each file
appears verified.

    path = find("sd-vae-ft-ema")        # in the cache, fetched if need be
    path = find("runs/mine.safetensors")      # a path is returned as it is

A name may also mean a file that comes with the tool. Nothing else of dimr touches the network.
Settings come from the environment: DIMR_HOME (the cache), DIMR_OFFLINE, HF_ENDPOINT (a mirror of
the Hugging Face hub), and http_proxy, https_proxy, no_proxy."""

import ours

import contextlib
import dataclasses
import http.client
import os
import re
import socket
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from tqdm import tqdm

from storage import UserError, check_room, sha256, sync_folder

BLOCK = 2**20  # bytes read at once
HUB = "https://huggingface.co"
LARGEST = 64 * 10**9  # bytes that are taken from a server that doesn't say how many there are
PASSING = {408, 416, 425, 429}  # HTTP statuses that another try may cure, beside 500 and above


@dataclasses.dataclass(frozen=True)
class Asset:
    address: str  # URL, where {hub} stands for HF_ENDPOINT, or the name of a file that ships
    what: str
    licence: str
    size: int | None = None  # bytes
    sha256: str | None = None  # hex, or its first digits
    kind: str | None = None  # of network, where the file's tensors don't tell
    ships: bool = False  # comes with the tool, under share/dimr

    @property
    def file(self) -> str:
        return self.address.rpartition("/")[2]

    @property
    def url(self) -> str:
        hub = os.environ.get("HF_ENDPOINT") or HUB
        if not hub.startswith(("http://", "https://")):
            raise UserError(f"HF_ENDPOINT is {hub!r}; expected a URL such as {HUB}")
        return self.address.format(hub=hub.rstrip("/"))


_HUB_RELEASE = "{hub}/QHL067/DiMR/resolve/main/"
_RESEARCH = "code Apache-2.0, weights 'for research purposes'; see huggingface.co/QHL067/DiMR"
_DIT = "https://dl.fbaipublicfiles.com/DiT/models/"
_DIT_LICENCE = "CC BY-NC 4.0: not for commercial use; see github.com/facebookresearch/DiT"
_PYTORCH_FID = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
_REFERENCES = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/"
_IMAGENET = "photographs of ImageNet, non-commercial research only; see image-net.org"

ASSETS = {
    "fashion": Asset(
        address="fashion.safetensors",
        what="DiMR for Fashion-MNIST at 32×32, comes with dimr (docs/evidence.md)",
        licence="Apache-2.0; trained on Fashion-MNIST (Zalando, MIT)",
        ships=True,
    ),
    "xl2r": Asset(
        address=_HUB_RELEASE + "DiMR-XL_2R_800epochs.pth",
        what="DiMR-XL/2R for 256×256, 800 epochs, about 2.0 GB",
        licence=_RESEARCH,
    ),
    "g2r": Asset(
        address=_HUB_RELEASE + "DiMR-G_2R_800epochs.pth",
        what="DiMR-G/2R for 256×256, 800 epochs, about 4.2 GB",
        licence=_RESEARCH,
    ),
    "dit-xl2-256": Asset(
        address=_DIT + "DiT-XL-2-256x256.pt",
        what="DiT-XL/2 for 256×256, 7M steps, about 2.7 GB",
        licence=_DIT_LICENCE,
        kind="dit",
    ),
    "dit-xl2-512": Asset(
        address=_DIT + "DiT-XL-2-512x512.pt",
        what="DiT-XL/2 for 512×512, 3M steps, about 2.7 GB",
        licence=_DIT_LICENCE,
        kind="dit",
    ),
    "sd-vae-ft-ema": Asset(
        address="{hub}/stabilityai/sd-vae-ft-ema/resolve/main/diffusion_pytorch_model.safetensors",
        what="the VAE of the latent models",
        licence="MIT; see huggingface.co/stabilityai/sd-vae-ft-ema",
        size=334_643_276,
        sha256="32db726da04f06c1b6b14c0043ce115cc87a501482945c5add89a40d838fcb46",
    ),
    "inception": Asset(
        address=_PYTORCH_FID + "pt_inception-2015-12-05-6726825d.pth",
        what="the Inception network of 2015, for FID",
        licence="Google's, ported by pytorch-fid (Apache-2.0); trained on ImageNet",
        size=95_628_359,
        sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    ),
    "vit-b16": Asset(
        address="{hub}/timm/vit_base_patch16_224.augreg2_in21k_ft_in1k/resolve/main/"
        "model.safetensors",
        what="the ViT-B/16 classifier of dimr eval fidelity, about 346 MB",
        licence="Apache-2.0; trained on ImageNet-21k and ImageNet-1k",
    ),
    "dinov2": Asset(
        address="https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
        what="DINOv2 ViT-L/14, for FD-DINOv2, about 1.2 GB",
        licence="Apache-2.0; see github.com/facebookresearch/dinov2",
    ),
    "imagenet64": Asset(
        address=_REFERENCES + "64/VIRTUAL_imagenet64_labeled.npz",
        what="ADM's reference for FID at 64×64",
        licence=_IMAGENET,
    ),
    "imagenet256": Asset(
        address=_REFERENCES + "256/VIRTUAL_imagenet256_labeled.npz",
        what="ADM's reference for FID at 256×256",
        licence=_IMAGENET,
        size=2_037_122_530,
        sha256="b32732719497e42660a9affb4a966068cba0855ac449b82015e34ec376d20758",
    ),
    "imagenet512": Asset(
        address=_REFERENCES + "512/VIRTUAL_imagenet512.npz",
        what="ADM's reference for FID at 512×512",
        licence=_IMAGENET,
    ),
}


@dataclasses.dataclass(frozen=True)
class Limits:
    """When a download is given up."""

    timeout: float = 30  # seconds without a byte
    tries: int = 4  # attempts in a row that bring nothing new
    wait: float = 1  # seconds to the next attempt, then twice as long each time
    patience: float = 300  # seconds that another process may hold the download without moving
    window: float = 60  # seconds in which at least
    least: int = 60_000  # bytes have to come


def cache() -> Path:
    """The folder downloads are kept in: DIMR_HOME, else `dimr` in the platform's cache folder."""
    if home := os.environ.get("DIMR_HOME"):
        return Path(home).expanduser()
    default = "~/Library/Caches" if sys.platform == "darwin" else "~/.cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or default).expanduser() / "dimr"


def place(name: str) -> Path:
    """Where the file of this name is kept, fetched or not."""
    if ASSETS[name].ships:
        return ours.shipped(ASSETS[name].address)
    return cache() / name / ASSETS[name].file


def ships(name: object) -> bool:
    """Whether this is the name of a file that comes with the tool."""
    return name in ASSETS and ASSETS[name].ships


def asset_of(path: str | Path) -> Asset | None:
    """The row of ASSETS whose file in the cache `path` is, or None."""
    for name, asset in ASSETS.items():
        if not asset.ships and place(name) == Path(path):
            return asset
    return None


def listing() -> list[dict]:
    """The table as dicts: name, file, url, size, licence, what, and `cached` (path or None)."""
    return [
        {
            "name": name,
            "what": asset.what,
            "licence": asset.licence,
            "file": asset.file,
            "url": None if asset.ships else asset.url,
            "size": place(name).stat().st_size if asset.ships else asset.size,
            "cached": str(place(name)) if place(name).is_file() else None,
        }
        for name, asset in ASSETS.items()
    ]


def find(name_or_path: str | Path) -> Path:
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


def ask(name: str) -> None:
    """Before a file that nobody named is fetched: say what it is and how large, and on a terminal
    wait for a yes, which Enter is. Nothing for what is in the cache or is no name. Raises UserError
    if the answer is no."""
    if name not in ASSETS or place(name).is_file() or _offline():
        return
    asset = ASSETS[name]
    size = ""
    if asset.size:
        size = f", {asset.size / 1e6:,.0f} MB"
    _say(f"{name} is not here yet: {asset.what}{size} ({asset.licence})")
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
    if not (alone and sys.stdin.isatty() and sys.stderr.isatty()):
        return
    print(f"fetch it to {place(name).parent} now? [Y/n] ", end="", file=sys.stderr, flush=True)
    answer = sys.stdin.readline().strip().lower()
    if answer not in ("", "y", "yes"):
        raise UserError(
            f"{name} was not fetched; name what to use instead, or fetch it with dimr weights get "
            f"{name}"
        )


def _offline():
    return os.environ.get("DIMR_OFFLINE", "0") not in ("", "0")


USUAL = Limits()


def fetch(name: str, limits: Limits = USUAL) -> Path:
    """The cached file of `name`, downloaded if need be; a cut download goes on where it stopped.
    Raises UserError."""
    path = place(name)
    if not path.is_file():
        _fetch(_Download(name, ASSETS[name], path, limits))
    expected = ASSETS[name].size
    if expected and path.stat().st_size != expected:
        raise UserError(
            f"{path} has {path.stat().st_size:,} bytes, expected {expected:,}; delete "
            "it and try again"
        )
    return path


class Failed(Exception):
    """A download that can't succeed, and why."""


class Interrupted(Failed):
    """An attempt that failed; another may not."""


class Slow(Interrupted):
    """An attempt that brought too little to go on with for ever."""


@dataclasses.dataclass(frozen=True)
class _Download:
    """One file on its way to `path`. Beside it lie a lock, the part that is there, and a tag: what
    the server called the file that it is a part of."""

    name: str
    asset: Asset
    path: Path
    limits: Limits

    @property
    def lock(self):
        return self.path.with_name(f".{self.path.name}.lock")

    @property
    def part(self):
        return self.path.with_name(f".{self.path.name}.part")

    @property
    def tag(self):
        return self.path.with_name(f".{self.path.name}.tag")


def _fetch(job):
    """Bring the file, or say how else it may come."""
    by_hand = f"or put {job.asset.file} from {job.asset.url} into {job.path.parent}"
    if _offline():
        raise UserError(
            f"{job.name} is not in the cache and DIMR_OFFLINE is set: unset it; {by_hand}"
        )
    for place in (job.part, job.tag):
        if place.is_dir():
            raise UserError(f"{place} is a folder, where a file is to be; remove it")
    with _locked(job):
        if job.path.is_file():  # another process has fetched it meanwhile
            return
        try:
            _download(job)
        except Failed as error:
            raise UserError(
                f"{job.name} could not be fetched: {error}; try again later; {by_hand}"
            ) from None


def _say(line):
    tqdm.write(line, file=sys.stderr)


@contextlib.contextmanager
def _locked(job):
    """Hold a download for this process. The lock ends with its owner; a living one is waited for as
    long as its download grows, and named if it does not for `patience` seconds."""
    job.lock.parent.mkdir(parents=True, exist_ok=True)
    with open(job.lock, "a+") as file:
        seen = None  # bytes that the owner had
        since = time.monotonic()
        while not _taken(file):
            file.seek(0)
            owner = file.read().strip() or "another process"
            size = _size(job.part)
            if seen is None:
                _say(f"waiting for {owner}, which is fetching {job.path}")
            if size != seen:
                seen = size
                since = time.monotonic()
            if time.monotonic() - since > job.limits.patience:
                raise UserError(
                    f"{job.path} is being fetched by {owner}, which has not moved for "
                    f"{job.limits.patience:g} s; end that process and try again"
                )
            time.sleep(0.1)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _taken(file):
    """Whether this process now has the lock on an open file."""
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _size(path):
    return path.stat().st_size if path.exists() else 0


def _download(job):
    """Bring a file whole and verified, in as many attempts as still bring something new. Raises
    Failed, or UserError where there is no room."""
    _say(f"fetching {job.name} from {job.asset.url} to {job.path}")
    with tqdm(
        desc=job.name, unit="B", unit_scale=True, unit_divisor=1024, leave=False, file=sys.stderr
    ) as bar:
        resumed, expected = _bring(job, bar)
        try:
            proof = _verify(job, expected)
        except Failed as error:
            if not resumed:
                raise
            # the pieces may be of different files: once more, from the start
            _say(f"{job.name}: {error}; starting over")
            _, expected = _bring(job, bar)
            proof = _verify(job, expected)
    with open(job.part, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(job.part, job.path)
    job.tag.unlink(missing_ok=True)
    sync_folder(job.path.parent)
    _say(f"{job.name}: {job.path.stat().st_size:,} bytes, {proof}")


def _bring(job, bar):
    """Attempt until the partial file is whole, as long as attempts bring something new. Returns and
    raises as _attempt, whose last Interrupted ends it."""
    failures = 0
    best = _size(job.part)
    while True:
        try:
            return _attempt(job, bar)
        except Interrupted as error:
            if _size(job.part) > best and not isinstance(error, Slow):
                failures = 0
                best = _size(job.part)
            else:
                failures += 1
            if failures >= job.limits.tries:
                raise
            _say(f"{job.name}: {error}; trying again")
            time.sleep(job.limits.wait * 2 ** max(failures - 1, 0))


def _attempt(job, bar):
    """Append to the partial file what one request brings. Once it is whole, returns (whether an
    earlier attempt began it, the digits its SHA-256 must begin with or None). Raises Interrupted,
    Failed if trying again won't help, or UserError where there is no room."""
    start = 0
    if job.tag.exists():
        start = max(0, _size(job.part) - 1)  # the last byte once more: no range is empty then
    with _open(job, start) as (response, linked):
        first, offered = _extent(response)
        known = job.asset.size or _number(linked.get("X-Linked-Size", "")) or None
        if known and offered not in (None, known):
            raise Interrupted(f"the server offers {offered:,} bytes, expected {known:,}")
        total = offered or known
        identity = _identity(response, linked)
        if first:
            _check_same_file(job, identity, start, first)
        if total:
            check_room(
                job.path.parent,
                total - first,
                f"fetching {job.name}",
                "free some space or set DIMR_HOME",
            )
        bar.total = total
        bar.n = first
        bar.initial = first
        with open(job.part, "rb+" if first else "wb") as file:
            job.tag.write_text(identity, "utf-8", "backslashreplace")
            file.seek(first)
            for block in _blocks(job, response, (total or LARGEST) - first):
                file.write(block)
                bar.update(len(block))
    size = _size(job.part)
    if total and size != total:
        raise Interrupted(f"the connection ended after {size:,} of {total:,} bytes")
    expected = job.asset.sha256 or _published_hash(linked)
    if not expected and not total:
        raise Failed("the server gives neither length nor hash to verify it by")
    return first > 0, expected


def _identity(response, linked):
    """What the server calls this version of the file."""
    headers = response.headers
    return linked.get("X-Linked-ETag") or headers["ETag"] or headers["Last-Modified"] or ""


def _check_same_file(job, identity, start, first):
    """Raises Interrupted, with the partial file removed, if bytes from `first` on do not continue
    it."""
    if first == start and identity == job.tag.read_text("utf-8", "replace"):
        return
    job.part.unlink(missing_ok=True)
    if first == start:
        raise Interrupted("the server's file has changed")
    raise Interrupted(f"the server sent bytes from {first:,}, asked for {start:,}")


def _published_hash(linked):
    """The hub's SHA-256 of the file, or None."""
    etag = linked.get("X-Linked-ETag", "").strip('"')
    return etag if len(etag) == 64 else None


@contextlib.contextmanager
def _open(job, start):
    """The response to a request for the file's bytes from `start` on, and the hub's X-Linked
    headers, which come with its redirect. Raises as `_attempt` does."""
    linked = {}

    def note(headers):
        for name in ("X-Linked-ETag", "X-Linked-Size"):
            if headers[name]:
                linked[name] = headers[name]

    class Redirects(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, request, file, code, message, headers, url):
            note(headers)
            _check_redirect(request.full_url, url)
            return super().redirect_request(request, file, code, message, headers, url)

    headers = {"User-Agent": "dimr"}
    if start:
        headers["Range"] = f"bytes={start}-"
    try:
        request = urllib.request.Request(job.asset.url, headers=headers)
        opener = urllib.request.build_opener(Redirects)
        response = opener.open(request, timeout=job.limits.timeout)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # no such range: the part is of another, longer file
            job.part.unlink(missing_ok=True)
        answer = f"the server answers {error.code} {error.reason}"
        if error.code in PASSING or error.code >= 500:
            raise Interrupted(answer) from None
        raise Failed(answer) from None
    except (OSError, http.client.HTTPException) as error:
        raise Interrupted(f"no connection ({_reason(error)})") from None
    except ValueError as error:
        raise Failed(f"an address can't be read ({error})") from None
    with response:
        note(response.headers)
        yield response, linked


def _check_redirect(before, after):
    """Raise Failed for a redirect to anything but http(s), and for one that gives up encryption."""
    scheme = urllib.parse.urlsplit(after).scheme
    if scheme not in ("http", "https"):
        raise Failed(f"the server redirects to {after[:200]}, which is no http(s) address")
    if before.startswith("https:") and scheme == "http":
        raise Failed(f"the server redirects from https to {after[:200]}, which is not encrypted")


def _blocks(job, response, most):
    """Yield what a response brings. Raises Interrupted where that breaks off, Slow where too little
    comes, Failed where more than `most` bytes do."""
    limits = job.limits
    taken = 0
    since = time.monotonic()
    counted = 0  # bytes when the window began
    while block := _read(response):
        taken += len(block)
        if taken > most:
            job.part.unlink(missing_ok=True)
            raise Failed(f"the server sends more than the {most:,} bytes that there should be")
        yield block
        if time.monotonic() - since > limits.window:
            if taken - counted < limits.least:
                raise Slow(
                    f"{taken - counted:,} bytes came in {limits.window:g} s, fewer than "
                    f"{limits.least:,}"
                )
            since = time.monotonic()
            counted = taken


def _read(response):
    try:
        return response.read1(BLOCK)
    except (OSError, http.client.HTTPException) as error:
        raise Interrupted(f"the connection broke off ({_reason(error)})") from None


def _reason(error):
    return str(getattr(error, "reason", error)) or type(error).__name__


def _extent(response):
    """(number of the body's first byte, length of the whole file or None)."""
    if response.status != 206:
        return 0, _number(response.headers["Content-Length"] or "")
    unit, _, span = (response.headers["Content-Range"] or "").partition(" ")
    span, _, total = span.partition("/")
    first = _number(span.partition("-")[0])
    if unit != "bytes" or first is None:
        raise Interrupted("the server sent a part without saying which")
    return first, _number(total)


def _number(text):
    """A length in bytes, or None for what is none."""
    return int(text) if re.fullmatch("[0-9]{1,19}", text) else None


def _verify(job, expected):
    """How the partial file was proved to be the whole one. Raises Failed, with it removed, if it is
    another."""
    digest = sha256(job.part)
    if expected is None:
        return f"length as announced; no hash is published, its SHA-256 is {digest}"
    if not digest.startswith(expected.lower()):
        job.part.unlink()
        job.tag.unlink(missing_ok=True)
        raise Failed(f"its SHA-256 is {digest}, expected {expected}")
    return f"SHA-256 {digest} as expected"
