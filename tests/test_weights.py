"""Finding and downloading the official weight files, against a server on this machine."""

from __future__ import annotations

import dataclasses
import hashlib
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from rfdetr import detr
from rfdetr.console import UserError
from rfdetr.sizes import SIZES
from rfdetr.weights import download as weights

CONTENT = bytes(i * 7 % 251 for i in range(300_000))
MD5 = hashlib.md5(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Serves CONTENT; the server's `cuts`: after how many bytes its next answers break off."""

    def do_GET(self):
        server = self.server
        server.ranges.append(self.headers.get("Range"))
        if self.path != "/weights.pth":
            self.send_error(404)
            return
        start = 0
        if self.headers.get("Range") and server.can_resume:
            start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
            if start >= len(CONTENT):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(CONTENT)}")
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        cut = server.cuts.pop(0) if server.cuts else None
        self.wfile.write(CONTENT[start:] if cut is None else CONTENT[start : start + cut])

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.cuts = []
    server.ranges = []
    server.can_resume = True
    server.url = f"http://127.0.0.1:{server.server_address[1]}/weights.pth"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "cache_dir", lambda: tmp_path / "hub" / "checkpoints")
    monkeypatch.setattr(weights, "PAUSE", 0.0)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "hub" / "checkpoints"


def nano(url: str, md5: str = MD5):
    return dataclasses.replace(SIZES["nano"], weights_url=url, weights_md5=md5)


def test_auto_downloads_once_into_the_cache(server, cache):
    path = weights.find_weights("auto", nano(server.url))
    assert path == cache / "rf-detr-nano.pth" and path.read_bytes() == CONTENT
    assert weights.find_weights("auto", nano(server.url)) == path
    assert server.ranges == [None]
    assert [p.name for p in cache.iterdir()] == ["rf-detr-nano.pth"]


def test_a_broken_transfer_goes_on_where_it_stopped(server, cache):
    server.cuts = [100_000, 50_000]
    path = weights.find_weights("auto", nano(server.url))
    assert path.read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=100000-", "bytes=150000-"]


def test_a_server_that_cannot_resume_sends_the_whole_file_again(server, cache):
    server.can_resume = False
    server.cuts = [100_000]
    assert weights.find_weights("auto", nano(server.url)).read_bytes() == CONTENT


def test_a_transfer_that_never_gets_further_ends(server, cache):
    server.can_resume = False
    server.cuts = [100_000] * 20
    with pytest.raises(UserError, match="breaks off at 100000 bytes"):
        weights.find_weights("auto", nano(server.url))
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("already", [120_000, len(CONTENT)])
def test_the_part_of_a_killed_run_is_taken_up(server, cache, already):
    cache.mkdir(parents=True)
    (cache / "rf-detr-nano.pth.part").write_bytes(CONTENT[:already])
    assert weights.find_weights("auto", nano(server.url)).read_bytes() == CONTENT
    assert server.ranges == [f"bytes={already}-"]
    assert len(list(cache.iterdir())) == 1


def test_a_part_of_something_else_is_caught_and_removed(server, cache):
    cache.mkdir(parents=True)
    (cache / "rf-detr-nano.pth.part").write_bytes(b"x" * 1000)
    with pytest.raises(UserError, match=f"expected {MD5}"):
        weights.find_weights("auto", nano(server.url))
    assert weights.find_weights("auto", nano(server.url)).read_bytes() == CONTENT


def test_a_wrong_checksum_names_url_and_place_and_leaves_nothing(server, cache):
    with pytest.raises(UserError) as error:
        weights.find_weights("auto", nano(server.url, md5="0" * 32))
    for text in (server.url, str(cache / "rf-detr-nano.pth"), MD5, "0" * 32):
        assert text in str(error.value)
    assert list(cache.iterdir()) == []


def test_not_found_names_url_and_place(server, cache):
    url = server.url.replace("weights.pth", "moved.pth")
    with pytest.raises(UserError) as error:
        weights.find_weights("auto", nano(url))
    assert (
        "404" in str(error.value)
        and url in str(error.value)
        and str(cache / "rf-detr-nano.pth") in str(error.value)
    )


def test_no_network_names_url_and_place(cache):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/weights.pth"  # bound, but nobody listens
        with pytest.raises(UserError) as error:
            weights.find_weights("auto", nano(url))
        assert "--pretrain_weights PATH. --size tiny needs no download" in str(error.value)
        with pytest.raises(UserError, match="checkpoint=PATH") as of_the_door:
            weights.find_weights("auto", nano(url), detr.OWN_FILE)
        assert "--" not in str(of_the_door.value)
    assert url in str(error.value) and str(cache / "rf-detr-nano.pth") in str(error.value)


def test_a_cache_that_cannot_be_written_is_a_user_error(server, cache):
    cache.parent.write_text("a file where a folder belongs")
    with pytest.raises(UserError, match="could not download"):
        weights.find_weights("auto", nano(server.url))


def test_another_file_in_the_place_of_the_official_one_is_kept(server, cache):
    cache.mkdir(parents=True)
    (cache / "rf-detr-nano.pth").write_bytes(b"the user's own")
    with pytest.raises(UserError, match="is not the official file"):
        weights.find_weights("auto", nano(server.url))
    assert (cache / "rf-detr-nano.pth").read_bytes() == b"the user's own"
    assert server.ranges == []


def test_a_url_of_ones_own_is_kept_under_a_name_of_its_own(server, cache):
    path = weights.find_weights(server.url, SIZES["base"])
    assert (
        path.parent == cache and path.name.endswith("-weights.pth") and path.read_bytes() == CONTENT
    )
    assert weights.find_weights(server.url, SIZES["nano"]) == path and len(server.ranges) == 1


def test_none_paths_and_sizes_without_official_weights(tmp_path, cache):
    assert weights.find_weights("none", SIZES["nano"]) is None
    assert weights.find_weights("auto", SIZES["tiny"]) is None
    own = tmp_path / "mine.pth"
    own.write_bytes(b"mine")
    assert weights.find_weights(str(own), SIZES["nano"]) == own and own.read_bytes() == b"mine"
    for missing in (tmp_path / "gone.pth", tmp_path):
        with pytest.raises(UserError, match="there is no checkpoint"):
            weights.find_weights(str(missing), SIZES["nano"])
    assert not cache.exists()


def test_the_command_lists_and_gets(server, cache, monkeypatch, capsys):
    monkeypatch.setitem(SIZES, "nano", nano(server.url))
    weights.main(["list"])
    listed = capsys.readouterr().out
    assert (
        "tiny" not in listed
        and f"{server.url}  md5 {MD5}  not in {cache / 'rf-detr-nano.pth'}" in listed
    )
    weights.main(["get", "nano"])
    assert str(cache / "rf-detr-nano.pth") in capsys.readouterr().out
    weights.main(["list"])
    assert f"  in {cache / 'rf-detr-nano.pth'}" in capsys.readouterr().out
