"""The official weight files: where they are kept, and how they get there.

python -m rfdetr.weights.download list
python -m rfdetr.weights.download get nano
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import torch
from tqdm import tqdm

from rfdetr import distributed
from rfdetr.console import UserError, run_script
from rfdetr.runs.places import find_checkpoint
from rfdetr.sizes import SIZES, ModelSize

CHUNK = 1 << 20
TIMEOUT = 30.0  # seconds without a byte
PAUSE = 2.0  # seconds before a broken transfer goes on
# what helps where a download fails: how to name a file, and what needs none
OWN_FILE = "with --pretrain_weights PATH"
NO_DOWNLOAD = f"{OWN_FILE}. --size tiny needs no download"


def cache_dir() -> Path:
    """Torch's own cache for weights; TORCH_HOME moves it."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def find_weights(spec: str, size: ModelSize, otherwise: str = NO_DOWNLOAD) -> Path | None:
    """The file that `--pretrain_weights` means (auto, none, path or URL), downloaded if need be.

    `auto` is the size's official file (None for a size that has none), `none` is None. Under
    torchrun the main process downloads for all. A file of the user's is only ever read.
    otherwise: of official files, what helps where there is no network.
    Raises UserError for a file that is missing or cannot be downloaded.
    """
    result: Path | UserError | None = None
    if distributed.is_main():
        try:
            result = _find(spec, size, otherwise)
        except UserError as error:  # sent to the other ranks too, which would wait forever
            result = error
    result = distributed.from_main(result)
    if isinstance(result, UserError):
        raise result
    return result


def _find(spec: str, size: ModelSize, otherwise: str) -> Path | None:
    if spec == "none":
        return None
    if spec == "auto":
        return _official_file(size, otherwise)
    for known in SIZES.values():
        if known.weights_url == spec:
            return _official_file(known, otherwise)
    if spec.startswith(("http://", "https://")):
        last_part = spec.split("?")[0].split("#")[0].rsplit("/", 1)[-1]
        name = re.sub(r"[^\w.-]", "_", last_part)[-100:]
        tag = hashlib.sha256(spec.encode()).hexdigest()[:8]  # many files are called best.pth
        return _cached(spec, cache_dir() / f"{tag}-{name}", None, OWN_FILE)
    try:
        return find_checkpoint(Path(spec).expanduser())
    except UserError as error:
        raise UserError(f"{error} --pretrain_weights takes auto, none, a file or a URL") from error


def _official_file(size: ModelSize, otherwise: str) -> Path | None:
    if size.weights_url is None:
        return None
    path = cache_dir() / size.weights_file
    return _cached(size.weights_url, path, size.weights_md5, otherwise)


def _md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def _cached(url: str, path: Path, md5: str | None, otherwise: str) -> Path:
    if not path.exists():
        download(url, path, md5, otherwise)
    elif md5 is not None:
        actual = _md5(path)
        if actual != md5:
            raise UserError(
                f"{path} is not the official file: its md5 is {actual}, expected {md5}. Move it "
                f"away and run again to download {url}, or use it as it is "
                f"{otherwise.replace('PATH', str(path))}"
            )
    return path


def download(url: str, path: Path, md5: str | None = None, otherwise: str = OWN_FILE) -> None:
    """Fetch `url` into `path` by way of PATH.part, checked by its length and, where given, its md5.

    A transfer that breaks goes on where it stopped; so does the .part file of a run that was
    killed, if an md5 can tell that both halves belong together. Raises UserError with the URL and
    the path, and `otherwise`; then no .part file is left.
    """
    part = path.with_name(path.name + ".part")
    print(f"Downloading {url} to {path}", flush=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if md5 is None:
            part.unlink(missing_ok=True)
        size_before = None
        while not _transfer(url, part, path.name):
            size = part.stat().st_size
            if size_before is not None and size <= size_before:
                raise ConnectionError(f"the transfer breaks off at {size_before} bytes every time")
            size_before = size
            time.sleep(PAUSE)
        if md5 is not None:
            actual = _md5(part)
            if actual != md5:
                raise ValueError(f"its md5 is {actual}, expected {md5}")
        part.replace(path)
    # OSError: no network, HTTP 4xx, a full disk
    except (OSError, http.client.HTTPException, ValueError) as error:
        if part.exists():  # where the folder is a file, unlink itself would fail
            part.unlink()
        raise UserError(
            f"could not download {url} ({error}). Run again, or download it in another way and put "
            f"it here: {path} or anywhere, {otherwise}"
        ) from error


def _transfer(url: str, part: Path, label: str) -> bool:
    """Request what is missing in `part` and append it; returns whether it is complete now."""
    start = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url)
    if start:
        request.add_header("Range", f"bytes={start}-")
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not start:  # 416: the server has nothing after `start`
            raise
        return error.headers.get("Content-Range", "").endswith(f"/{start}")
    with response:
        if response.status != 206:  # a server that cannot resume sends all of it
            start = 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        progress = tqdm(
            total=total, initial=start, unit="B", unit_scale=True, desc=label, disable=None
        )
        with open(part, "ab" if start else "wb") as file, progress:
            while True:
                try:
                    chunk = response.read1(CHUNK)
                except (OSError, http.client.HTTPException):
                    return False
                if not chunk:
                    return total is None or file.tell() >= total
                file.write(chunk)
                progress.update(len(chunk))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m rfdetr.weights.download", description="The official weight files."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="sizes, addresses, checksums and what is here already")
    get = commands.add_parser(
        "get", help="download a size's file into the cache, or check the one that is there"
    )
    get.add_argument("size", choices=[name for name, size in SIZES.items() if size.weights_url])
    args = parser.parse_args(argv)
    if args.command == "get":
        print(find_weights("auto", SIZES[args.size]))
        return
    for name, size in SIZES.items():
        if size.weights_url:
            path = cache_dir() / size.weights_file
            state = "in" if path.exists() else "not in"
            print(f"{name:<11} {size.weights_url}  md5 {size.weights_md5}  {state} {path}")


if __name__ == "__main__":
    run_script(main)
