"""Debian packages made on the spot."""

import io
import tarfile
from pathlib import Path


def write_package(path: Path, files: dict[str, bytes]) -> None:
    """A package as `dpkg-deb` makes it: an `ar` archive whose last member is a compressed tar."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:xz") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"./{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    whole = b"!<arch>\n"
    members = {b"debian-binary": b"2.0\n", b"control.tar.xz": b"odd", b"data.tar.xz": stream.getvalue()}
    for name, content in members.items():
        whole += name.ljust(48) + str(len(content)).encode().ljust(10) + b"`\n" + content + b"\n" * (len(content) % 2)
    path.write_bytes(whole)
