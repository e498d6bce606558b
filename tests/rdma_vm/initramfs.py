"""The guest's first file system: an archive in the `newc` format of cpio, which the kernel unpacks by itself."""

from pathlib import PurePosixPath

_FOLDER = 0o040755
_FILE = 0o100000
_END = "TRAILER!!!"


def _entry(number: int, name: str, mode: int, content: bytes) -> bytes:
    """A header of 13 numbers in hexadecimal, the name, and the content, each padded to four bytes."""
    path = name.encode() + b"\0"
    numbers = (number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(path), 0)
    head = b"070701" + b"".join(b"%08x" % value for value in numbers) + path
    return _padded(head) + _padded(content)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def archive(files: dict[str, tuple[int, bytes]]) -> bytes:
    """Files by path, with their permissions, and the folders that they need."""
    folders = {
        str(folder)
        for name in files
        for folder in PurePosixPath(name).parents
        if str(folder) != "."
    }
    entries = [(name, _FOLDER, b"") for name in sorted(folders)]
    entries += [(name, _FILE | mode, content) for name, (mode, content) in files.items()]
    entries.append((_END, 0, b""))
    return b"".join(_entry(number, *entry) for number, entry in enumerate(entries, 1))
