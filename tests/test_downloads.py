"""Downloads from a real server on 127.0.0.1 that behaves as badly as servers do."""

import collections
import contextlib
import dataclasses
import fcntl
import hashlib
import http.server
import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from conftest import DATA
from safetensors import safe_open

import cli
import dimr as network
import downloads
import runfolder
from storage import UserError

BODY = bytes(range(256)) * 1200  # the file
OTHER = bytes(reversed(BODY))  # another of the same length
HASH = hashlib.sha256(BODY).hexdigest()
OTHER_HASH = hashlib.sha256(OTHER).hexdigest()
QUICK = downloads.Limits(timeout=0.5, tries=3, wait=0.01)


class Hub(http.server.ThreadingHTTPServer):
    """Like the Hugging Face hub: /NAME/resolve/main/FILE redirects, with the hash, to /store/NAME,
    where the bytes are. `faults` are what befalls the requests for bytes, one after another; then
    all goes well."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.body = BODY
        self.faults = []
        self.asked = []  # ranges
        self.linked = True  # whether a redirect tells hash and length
        self.delay = 0  # seconds a block
        self.headers = {}  # that a redirect has otherwise
        self.etag = None  # what it says of the file's hash, None for the truth


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        if "/resolve/" in self.path:
            self.redirect()
        else:
            self.store()

    def redirect(self):
        hub = self.server
        headers = {"Location": "/store/" + self.path.rpartition("/")[2]}
        if hub.linked:
            etag = hub.etag or hashlib.sha256(hub.body).hexdigest()
            headers["X-Linked-ETag"] = f'"{etag}"'
            headers["X-Linked-Size"] = len(hub.body)
        self.answer(302, b"", headers | hub.headers)

    def store(self):
        hub = self.server
        body = hub.body
        asked = self.headers["Range"]
        hub.asked.append(asked)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        fault = hub.faults.pop(0) if hub.faults else None
        if isinstance(fault, int):
            return self.answer(fault, b"no", {})
        if fault == "page":
            return self.answer(200, b"<html>please log in</html>", {})
        if isinstance(fault, tuple):
            return self.claim(*fault)
        if fault == "drip":
            return self.drip()
        if start >= len(body):
            return self.answer(416, b"", {"Content-Range": f"bytes */{len(body)}"})
        status = 200
        headers = {"ETag": f'"store-{hashlib.md5(body).hexdigest()}"'}
        if start and fault != "whole":
            if fault == "elsewhere":
                start -= 100
            if fault != "unlabelled":
                headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            status = 206
            body = body[start:]
        self.send_with(fault, status, body, headers)

    def claim(self, what, value):
        """Some bytes with a header that says anything of them."""
        if what == "part":
            return self.answer(206, b"five!", {"Content-Range": value} if value else {})
        self.answer(200, self.server.body, {"Content-Length": value}, None)
        self.close_connection = True

    def drip(self):
        """A byte at a time."""
        self.answer(200, b"", {}, 10_000)
        with contextlib.suppress(ConnectionError):
            for _ in range(50):
                self.wfile.write(b"x")
                time.sleep(0.02)
        self.close_connection = True

    def send_with(self, fault, status, body, headers):
        """Answer with these bytes, as far as the fault lets them through."""
        length = len(body) + {"long": 100, "short": -100, "huge": 10**18}.get(fault, 0)
        if fault == "endless":
            length = None
        if fault in ("cut", "stall"):
            body = body[: len(body) // 2]
        self.answer(status, body, headers, length)
        if fault == "stall":
            time.sleep(1.5)
        if fault in ("cut", "stall", "long", "endless"):
            self.close_connection = True

    def answer(self, status, body, headers, length=False):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        if length is not None:
            self.send_header("Content-Length", str(len(body) if length is False else length))
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            for i in range(0, len(body), 2**16):
                self.wfile.write(body[i : i + 2**16])
                time.sleep(self.server.delay)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server, an empty cache, and two names: `model` on the hub, `plain` a file elsewhere with no
    hash to check."""
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        for name in list(os.environ):
            if name.lower().endswith("_proxy"):
                monkeypatch.delenv(name)
        monkeypatch.setenv("HF_ENDPOINT", hub.url + "/")
        monkeypatch.setenv("DIMR_HOME", str(tmp_path / "cache"))
        monkeypatch.delenv("DIMR_OFFLINE", raising=False)
        publish(monkeypatch, "model", "{hub}/someone/resolve/main/model.bin")
        publish(monkeypatch, "plain", hub.url + "/store/plain.bin")
        yield hub
        hub.shutdown()
        thread.join()


def publish(monkeypatch, name, address, **facts):
    asset = downloads.Asset(address, "a model", "none", **facts)
    monkeypatch.setitem(downloads.ASSETS, name, asset)


def known(monkeypatch, name, **facts):
    publish(monkeypatch, name, downloads.ASSETS[name].address, **facts)


def part_of(name):
    path = downloads.place(name)
    return path.with_name(f".{path.name}.part")


def left(name):
    """What lies beside the finished file in the cache, but for the lock."""
    path = downloads.place(name)
    return {found.name for found in path.parent.iterdir()} - {f".{path.name}.lock"}


def test_a_name_is_fetched_once_through_the_redirect_and_then_found(hub, tmp_path, capfd):
    path = downloads.find("model")
    assert path == tmp_path / "cache" / "model" / "model.bin"
    assert path.read_bytes() == BODY
    assert left("model") == {"model.bin"}
    assert f"SHA-256 {HASH} as expected" in capfd.readouterr().err
    assert downloads.find("model") == path
    assert hub.asked == [None]


def test_a_path_is_returned_as_it_is_and_anything_else_lists_the_names(tmp_path, monkeypatch):
    file = tmp_path / "my.safetensors"
    file.touch()
    assert downloads.find(str(file)) == file
    assert downloads.find(file) == file
    assert downloads.find(tmp_path) == tmp_path
    names = "xl2r, g2r, dit-xl2-256, dit-xl2-512, sd-vae-ft-ema, inception"
    with pytest.raises(UserError, match=f"xl9r is no file, nor known by name.*{names}"):
        downloads.find("xl9r")


def test_without_a_hash_the_length_is_checked_and_that_is_said(hub, capfd):
    assert downloads.fetch("plain", QUICK).read_bytes() == BODY
    assert "length as announced; no hash is published" in capfd.readouterr().err
    hub.faults = ["endless"]
    downloads.place("plain").unlink()
    with pytest.raises(UserError, match="neither length nor hash"):
        downloads.fetch("plain", QUICK)
    assert not downloads.place("plain").exists()


def test_with_a_hash_the_length_may_be_missing(hub):
    hub.faults = ["endless"]
    assert downloads.fetch("model", QUICK).read_bytes() == BODY


@pytest.mark.parametrize("fault", ["cut", "stall"])
@pytest.mark.parametrize("name", ["model", "plain"])
def test_an_interrupted_download_goes_on_where_it_stopped(hub, name, fault):
    hub.faults = [fault, fault]
    assert downloads.fetch(name, QUICK).read_bytes() == BODY
    half = len(BODY) // 2 - 1
    assert hub.asked == [None, f"bytes={half}-", f"bytes={half + (len(BODY) - half) // 2 - 1}-"]


def test_a_later_process_goes_on_too_even_from_a_part_that_was_whole(hub):
    hub.faults = ["cut", 404]
    with pytest.raises(UserError):
        downloads.fetch("model", QUICK)
    assert left("model") == {".model.bin.part", ".model.bin.tag"}
    part_of("model").write_bytes(BODY)
    assert downloads.fetch("model", QUICK).read_bytes() == BODY
    assert hub.asked[2:] == [f"bytes={len(BODY) - 1}-"]
    assert left("model") == {"model.bin"}


@pytest.mark.parametrize("fault", ["whole", "elsewhere", "unlabelled"])
def test_a_range_that_was_not_asked_for_is_not_taken_for_the_one_that_was(hub, fault):
    hub.faults = ["cut", fault]
    assert downloads.fetch("plain", QUICK).read_bytes() == BODY


@pytest.mark.parametrize("shorter", [0, len(BODY) // 4, len(BODY) // 2 + 1])
@pytest.mark.parametrize("name", ["model", "plain"])
def test_pieces_of_two_versions_of_a_file_are_never_joined(hub, name, shorter):
    hub.faults = ["cut", 404]
    with pytest.raises(UserError):
        downloads.fetch(name, QUICK)
    hub.body = OTHER[shorter:]
    assert downloads.fetch(name, QUICK).read_bytes() == OTHER[shorter:]


def test_a_damaged_part_is_found_by_the_hash_and_fetched_anew_once(hub):
    hub.faults = ["cut", 404]
    with pytest.raises(UserError):
        downloads.fetch("model", QUICK)
    part = part_of("model")
    part.write_bytes(b"x" + part.read_bytes()[1:])
    assert downloads.fetch("model", QUICK).read_bytes() == BODY
    assert hub.asked[-1] is None


def test_a_wrong_hash_is_refused_at_once_and_nothing_kept(hub, monkeypatch):
    hub.etag = OTHER_HASH
    with pytest.raises(UserError, match=f"SHA-256 is {HASH}, expected {OTHER_HASH}"):
        downloads.fetch("model", QUICK)
    assert hub.asked == [None]
    assert not left("model")


@pytest.mark.parametrize("digits", [8, 64])
def test_a_known_hash_or_its_beginning_overrules_the_server(hub, monkeypatch, digits):
    known(monkeypatch, "model", sha256=HASH[:digits])
    hub.etag = OTHER_HASH
    assert downloads.fetch("model", QUICK).read_bytes() == BODY
    known(monkeypatch, "plain", sha256=hashlib.sha256(OTHER).hexdigest()[:digits])
    with pytest.raises(UserError, match="SHA-256"):
        downloads.fetch("plain", QUICK)
    assert not downloads.place("plain").exists()


def test_a_server_that_promises_more_than_it_sends_is_given_up(hub):
    hub.faults = ["long"] + [416, "long"] * 9
    with pytest.raises(
        UserError, match=f"ended after {len(BODY):,} of {len(BODY) + 100:,} bytes|answers 416"
    ):
        downloads.fetch("plain", QUICK)
    assert len(hub.asked) < 9
    assert not downloads.place("plain").exists()


@pytest.mark.parametrize("fault", ["short", "page"])
def test_a_length_that_is_not_the_known_one_is_refused_before_anything_is_kept(
    hub, monkeypatch, fault
):
    hub.faults = [fault] * 3
    with pytest.raises(UserError, match=f"the server offers [0-9,]+ bytes, expected {len(BODY):,}"):
        downloads.fetch("model", QUICK)
    assert len(hub.asked) == 3
    assert not left("model")
    known(monkeypatch, "plain", size=len(BODY))
    hub.faults = [fault] * 2
    assert downloads.fetch("plain", QUICK).read_bytes() == BODY


def test_refusals_end_at_once_and_passing_faults_are_tried_again(hub):
    hub.faults = [404]
    with pytest.raises(
        UserError, match="answers 404 .* or put model.bin from http://127.0.0.1.* into "
    ):
        downloads.fetch("model", QUICK)
    assert len(hub.asked) == 1
    hub.faults = [500, 503, 500]
    with pytest.raises(UserError, match="answers 500"):
        downloads.fetch("model", QUICK)
    assert len(hub.asked) == 4
    hub.faults = [500, 429]
    assert downloads.fetch("model", QUICK).read_bytes() == BODY


@pytest.mark.parametrize("name", ["model", "plain"])
@pytest.mark.parametrize("times", [1, 2, 9])
def test_a_range_that_the_server_does_not_have_is_one_line_at_worst(hub, name, times):
    hub.faults = [416] * times
    if times < QUICK.tries:
        assert downloads.fetch(name, QUICK).read_bytes() == BODY
    else:
        with pytest.raises(UserError, match="answers 416"):
            downloads.fetch(name, QUICK)


@pytest.mark.parametrize("name", ["model", "plain"])
@pytest.mark.parametrize("span", ["bytes 5-9/10", "bytes 5-9", "bytes -", "", "bytes 5-9/x"])
def test_a_part_that_was_not_asked_for_is_not_taken(hub, name, span):
    hub.faults = [("part", span)] * 2
    assert downloads.fetch(name, QUICK).read_bytes() == BODY


@pytest.mark.parametrize("size", ["abc", "-5", "9" * 5000, "", "0", "\u0663"])
def test_lengths_that_are_none_are_no_lengths(hub, size):
    hub.headers = {"X-Linked-Size": size.encode().decode("latin-1")}
    assert downloads.fetch("model", QUICK).read_bytes() == BODY
    hub.headers = {}
    hub.faults = [("length", size.encode().decode("latin-1"))]
    with contextlib.suppress(UserError):  # without a length and a hash nothing is proved
        assert downloads.fetch("plain", QUICK).read_bytes() == BODY


@pytest.mark.parametrize(
    "place", ["http://[bad", "ftp://127.0.0.1/x", "file:///etc/passwd", "data:,x", "//", "http://"]
)
def test_a_redirect_to_no_address_is_one_line(hub, place):
    hub.headers = {"Location": place}
    with pytest.raises(UserError) as error:
        downloads.fetch("model", QUICK)
    assert "model could not be fetched" in str(error.value)
    assert not downloads.place("model").exists()


def test_a_redirect_does_not_give_up_encryption():
    with pytest.raises(downloads.Failed, match="from https to http://x"):
        downloads._check_redirect("https://hub/x", "http://x/y")
    downloads._check_redirect("https://hub/x", "https://x/y")
    downloads._check_redirect("http://hub/x", "https://x/y")


@pytest.mark.parametrize("known_size", [True, False])
def test_no_more_is_taken_than_was_announced(hub, monkeypatch, known_size):
    if known_size:
        known(monkeypatch, "plain", size=5000)
    else:
        monkeypatch.setattr(downloads, "LARGEST", 5000)
    hub.faults = ["endless"] * 9
    with pytest.raises(UserError, match="more than the 5,000 bytes"):
        downloads.fetch("plain", QUICK)
    assert not part_of("plain").exists()


def test_a_byte_now_and_then_is_too_slow(hub):
    limits = dataclasses.replace(QUICK, window=0.3, least=1000)
    hub.faults = ["drip"] * 9
    begun = time.monotonic()
    with pytest.raises(UserError, match="bytes came in 0.3 s, fewer than 1,000"):
        downloads.fetch("plain", limits)
    assert time.monotonic() - begun < 20


def test_what_lies_in_the_cache_may_be_anything(hub):
    part_of("model").mkdir(parents=True)
    with pytest.raises(UserError, match=r"\.part is a folder.*remove it"):
        downloads.fetch("model", QUICK)
    part_of("model").rmdir()
    part_of("model").write_bytes(BODY[:1000])
    part_of("model").with_suffix(".tag").write_bytes(b"\xff\xfe tag")
    assert downloads.fetch("model", QUICK).read_bytes() == BODY


def test_offline_one_line_says_which_file_to_put_where(hub, monkeypatch):
    monkeypatch.setenv("DIMR_OFFLINE", "1")
    with pytest.raises(UserError) as caught:
        downloads.find("model")
    place = downloads.place("model")
    assert str(caught.value) == (
        "model is not in the cache and DIMR_OFFLINE is set: unset it; or put model.bin from "
        f"{hub.url}/someone/resolve/main/model.bin into {place.parent}"
    )
    place.parent.mkdir(parents=True)
    place.write_bytes(BODY)
    assert downloads.find("model") == place
    assert hub.asked == []


def test_without_a_network_the_same_line_follows(monkeypatch, tmp_path, hub):
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
    with pytest.raises(
        UserError, match="no connection .*refused.*; or put model.bin from http://127.0.0.1"
    ):
        downloads.fetch("model", QUICK)
    monkeypatch.setenv("HF_ENDPOINT", "hub.example")
    with pytest.raises(UserError, match="HF_ENDPOINT is 'hub.example'; expected a URL"):
        downloads.fetch("model", QUICK)


def test_proxies_are_honoured(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    monkeypatch.setenv("http_proxy", hub.url)
    hub.linked = False
    assert downloads.fetch("model", QUICK).read_bytes() == BODY


def test_a_cached_file_of_the_wrong_length_is_named(hub, monkeypatch):
    downloads.fetch("model", QUICK).write_bytes(b"short")
    known(monkeypatch, "model", size=len(BODY))
    with pytest.raises(UserError, match="model.bin has 5 bytes, expected 307,200; delete it"):
        downloads.find("model")


def test_a_full_disk_is_reported_before_the_download(hub):
    hub.faults = ["huge"]
    with pytest.raises(
        UserError,
        match="fetching plain takes 1,000,000,000.00 GB .* free; free some space or set DIMR_HOME",
    ):
        downloads.fetch("plain", QUICK)
    assert not left("plain")


FETCH = """
import downloads
address = "{hub}/someone/resolve/main/model.bin"
downloads.ASSETS["model"] = downloads.Asset(address, "a model", "none")
print(downloads.fetch("model"))
"""


def fetching():
    return subprocess.Popen(
        [sys.executable, "-c", FETCH], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_two_processes_at_once_end_with_one_good_file(hub):
    hub.delay = 0.5
    both = [fetching(), fetching()]
    for process in both:
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out.strip()) == (0, str(downloads.place("model"))), err
    assert hub.asked == [None]
    assert downloads.place("model").read_bytes() == BODY
    assert left("model") == {"model.bin"}


@pytest.mark.slow
def test_the_lock_of_a_killed_process_is_free_and_its_part_goes_on(hub):
    hub.delay = 1
    first = fetching()
    part = part_of("model")
    until = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size) and time.monotonic() < until:
        time.sleep(0.02)
    first.kill()
    first.communicate()
    hub.delay = 0
    assert downloads.fetch("model", QUICK).read_bytes() == BODY
    assert hub.asked[0] is None
    assert hub.asked[1] is not None


def test_a_living_owner_that_does_not_move_is_named_after_a_while(hub):
    lock = downloads.place("model").with_name(".model.bin.lock")
    lock.parent.mkdir(parents=True)
    with open(lock, "w") as file:
        file.write("process 7 on elsewhere")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(
            UserError, match="fetched by process 7 on elsewhere, which has not moved for 0.3 s"
        ):
            downloads.fetch("model", dataclasses.replace(QUICK, patience=0.3))


def test_the_cache_is_dimr_home_or_the_platforms(monkeypatch, tmp_path):
    monkeypatch.delenv("DIMR_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert downloads.cache() == tmp_path / "dimr"
    monkeypatch.setenv("DIMR_HOME", str(tmp_path / "mine"))
    assert downloads.cache() == tmp_path / "mine"


def test_the_table_names_what_the_release_page_and_adm_offer(monkeypatch):
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    release = "https://huggingface.co/QHL067/DiMR/resolve/main/DiMR-XL_2R_800epochs.pth"
    urls = {item["name"]: item["url"] for item in downloads.listing()}
    assert urls["xl2r"] == release
    assert urls["imagenet512"].endswith("/ref_batches/imagenet/512/VIRTUAL_imagenet512.npz")
    assert downloads.ASSETS["inception"].sha256.startswith("6726825d")
    for item, asset in zip(downloads.listing(), downloads.ASSETS.values(), strict=True):
        assert item["licence"]
        assert item["what"]
        if asset.ships:
            assert item["url"] is None and Path(item["cached"]).name == asset.file
            continue
        assert item["url"].startswith("https://")
        assert item["url"].endswith("/" + asset.file)
        if asset.sha256 is not None:
            assert len(bytes.fromhex(asset.sha256)) == 32


def dimr(*arguments):
    return CliRunner().invoke(cli.main, arguments)


def test_the_command_lists_gets_and_lists_again(hub, tmp_path):
    before = dimr("weights")
    assert before.exit_code == 0
    for name in downloads.ASSETS.keys() - {"model", "plain"}:
        assert name in before.stdout
    # a small file, from the hub that HF_ENDPOINT names
    got = dimr("weights", "get", "xl2r", "--json")
    assert got.exit_code == 0, got.output
    path = tmp_path / "cache" / "xl2r" / "DiMR-XL_2R_800epochs.pth"
    assert json.loads(got.stdout.splitlines()[-1]) == {"name": "xl2r", "path": str(path)}
    assert path.read_bytes() == BODY
    listed = {item["name"]: item for item in json.loads(dimr("weights", "--json").stdout)}
    assert listed["xl2r"]["cached"] == str(path)
    assert listed["g2r"]["cached"] is None
    assert dimr("weights", "get", "xl9r").exit_code == 2


@pytest.fixture
def released(tmp_path):
    """A small network as its authors would publish it: plain tensors under their names, and its
    number of heads."""
    with safe_open(DATA / "network_2r.safetensors", "pt") as file:
        heads = int(file.metadata()["heads"])
        tensors = {}
        for name in file.keys():  # noqa: SIM118
            if name.startswith("weight."):
                tensors[name.removeprefix("weight.")] = file.get_tensor(name)
    torch.save(tensors, tmp_path / "released.pth")
    return tmp_path / "released.pth", tensors, heads


def test_convert_goes_to_safetensors_with_the_configuration(released, tmp_path):
    path, _, heads = released
    ours = tmp_path / "ours.safetensors"
    done = dimr("convert", str(path), str(ours), "--heads", str(heads), "--json")
    assert done.exit_code == 0, done.output
    config = json.loads(done.stdout)["config"]
    assert config["heads"] == heads
    assert config["norm"] == "tdrms"
    assert config["space"] == "latent"
    model, _ = runfolder.read_weights(ours)
    assert json.loads(json.dumps(dataclasses.asdict(model.config))) == config


def test_convert_goes_back_and_the_file_knows_its_heads(released, tmp_path):
    path, tensors, heads = released
    ours = str(tmp_path / "ours.safetensors")
    theirs = str(tmp_path / "theirs.pth")
    again = str(tmp_path / "again.safetensors")
    assert dimr("convert", str(path), ours, "--heads", str(heads)).exit_code == 0
    assert dimr("convert", ours, theirs).exit_code == 0
    back = torch.load(theirs, weights_only=True)  # as the authors' code would read it
    assert tensors
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(back[name], tensor)

    assert dimr("convert", theirs, again).exit_code == 0  # without --heads
    with safe_open(ours, "pt") as one, safe_open(again, "pt") as two:
        assert one.metadata() == two.metadata()
        assert set(one.keys()) == set(two.keys())
        for name in one.keys():  # noqa: SIM118
            assert torch.equal(one.get_tensor(name), two.get_tensor(name))


def test_convert_keeps_what_a_run_knows_of_itself(released, tmp_path):
    path, _, heads = released
    model, _ = runfolder.read_weights(path, heads)
    classes = [f"animal {k}" for k in range(model.config.num_classes)]
    facts = {"step": 7, "classes": classes, "vae": None}
    runfolder.write_weights(tmp_path / "run.safetensors", model, facts)
    model, _ = runfolder.read_weights(tmp_path / "run.safetensors")
    runfolder.write_weights(tmp_path / "run.pth", model, facts)
    _, read = runfolder.read_weights(tmp_path / "run.pth")
    assert read == facts


def test_convert_refuses_what_it_cannot_do_in_one_line(released, tmp_path):
    path, _, heads = released
    wrong = dimr("convert", str(path), str(tmp_path / "ours.bin"), "--heads", str(heads))
    assert wrong.exit_code == 1
    assert "ends neither in .safetensors" in wrong.output
    torch.save({"conv.weight": torch.zeros(3)}, tmp_path / "other.pth")
    wrong = dimr("convert", str(tmp_path / "other.pth"), str(tmp_path / "ours.safetensors"))
    assert wrong.exit_code == 1
    assert "are no DiMR's, U-ViT's, DiT's or SiT's" in wrong.output
    assert not (tmp_path / "ours.safetensors").exists()


@pytest.mark.parametrize(
    "metadata", [{"config": "no json"}, {"config": "[]"}, {"config": '{"size": 9}'}]
)
def test_a_configuration_that_makes_no_sense_is_an_error(released, metadata):
    path, tensors, heads = released
    state = collections.OrderedDict(tensors)
    state.metadata = metadata
    torch.save(state, path)
    with pytest.raises(UserError, match="released.pth does not fit"):
        runfolder.read_weights(path, heads)


@pytest.mark.parametrize("metadata", [["a", "list"], {"author": "someone"}, {"config": 7}])
def test_metadata_that_is_not_ours_is_left_alone(released, metadata):
    path, tensors, heads = released
    state = collections.OrderedDict(tensors)
    state.metadata = metadata
    torch.save(state, path)
    model, facts = runfolder.read_weights(path, heads)
    assert facts == {}
    assert model.config.heads == heads


LOAD = """
import resource, sys
import runfolder
def peak():
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
before = peak()
runfolder.read_weights(sys.argv[1])
print(peak() - before)
"""


@pytest.mark.slow
def test_loading_released_weights_takes_little_more_memory_than_the_file(tmp_path):
    config = network.Config(
        size=32,
        channels=4,
        layers=(9, 5),
        dims=(640, 320),
        heads=16,
        num_classes=1000,
        null_class=True,
        space="latent",
        norm="tdrms",
    )
    path = tmp_path / "large.pth"
    torch.save(network.to_released(network.DiMR(config)), path)
    size = path.stat().st_size
    assert size > 150e6
    command = [sys.executable, "-c", LOAD, str(path)]
    loading = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(loading.stdout) < 1.2 * size


# what nobody named


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("answer, agreed", [("\n", True), ("y\n", True), ("No\n", False)])
def test_what_nobody_named_is_asked_for_on_a_terminal(monkeypatch, tmp_path, answer, agreed):
    monkeypatch.setenv("DIMR_HOME", str(tmp_path))
    monkeypatch.delenv("DIMR_OFFLINE", raising=False)
    said = Terminal()
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    monkeypatch.setattr(sys, "stderr", said)
    if agreed:
        downloads.ask("imagenet256")
    else:
        with pytest.raises(UserError, match="dimr weights get imagenet256"):
            downloads.ask("imagenet256")
    assert "imagenet256 is not here yet: ADM's reference for FID at 256×256, 2,037 MB" in (
        said.getvalue()
    )
    assert said.getvalue().endswith("now? [Y/n] ")


def test_without_a_terminal_it_is_said_and_goes_on(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("DIMR_HOME", str(tmp_path))
    monkeypatch.delenv("DIMR_OFFLINE", raising=False)
    monkeypatch.setattr(sys, "stdin", io.StringIO("n\n"))
    downloads.ask("xl2r")
    assert "about 2.0 GB" in capsys.readouterr().err
    downloads.place("xl2r").parent.mkdir(parents=True)
    downloads.place("xl2r").touch()
    downloads.ask("xl2r")  # is here
    downloads.ask("runs/mine")  # is no name
    assert capsys.readouterr().err == ""


def test_sampling_without_any_run_asks_before_it_fetches(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(downloads, "ask", asked.append)
    monkeypatch.setenv("DIMR_OFFLINE", "1")
    monkeypatch.setenv("DIMR_HOME", str(tmp_path))
    with pytest.raises(UserError, match="xl2r is not in the cache"):
        runfolder.find_weights()
    assert asked == ["xl2r"]
    asked.clear()
    with pytest.raises(UserError):
        runfolder.find_weights("g2r")  # named
    assert asked == []
