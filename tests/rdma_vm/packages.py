"""What the virtual machine is made of: Debian's packages, unpacked below `target/` and installed nowhere.

apt checks each against the hashes of the signed index. The host is not changed: with verbs drivers installed and no
card, UCX would end every process that loads it.
"""

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

# What the guest sees in place of, or beside, the host's own files.
GUEST = ["busybox-static", "ibverbs-providers", "libibverbs1", "libnl-3-200", "libnl-route-3-200"]
EMULATOR = "qemu-system-x86"
LIBRARIES = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"]


def _output(*command: str, cwd: Path | None = None) -> str:
    return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True).stdout


def _missing(package: str) -> list[str]:
    """A package, and those that it needs and this host does not have."""
    command = ["apt-get", "install", "--print-uris", "-qq", "--no-install-recommends", package]
    return re.findall(r"/([^_/]+)_[^/]*\.deb'", _output(*command))


def _kernel() -> str:
    """The package of Debian's stock kernel of today."""
    depends = _output("apt-cache", "depends", "linux-image-amd64")
    (name,) = re.findall(r"Depends: (linux-image-\S+)", depends)
    return str(name)


def _unpack(packages: list[str], into: Path) -> None:
    """Downloads packages and unpacks them, with `/bin`, `/sbin` and `/lib` in `/usr`, where the host's links lead."""
    debs = into.with_suffix(".debs")
    debs.mkdir(parents=True, exist_ok=True)
    try:
        _output("apt-get", "download", *packages, cwd=debs)
    except subprocess.CalledProcessError:
        # The mirror has newer ones than the index names.
        _output("apt-get", "update")
        _output("apt-get", "download", *packages, cwd=debs)
    for deb in debs.glob("*.deb"):
        _output("dpkg-deb", "--extract", str(deb), str(into))
    for name in ("bin", "sbin", "lib"):
        if (into / name).is_dir():
            shutil.copytree(into / name, into / "usr" / name, dirs_exist_ok=True, symlinks=True)
            shutil.rmtree(into / name)
    # Drivers of cards that are not there are warned about.
    for driver in (into / "etc/libibverbs.d").glob("*"):
        if driver.name != "rxe.driver":
            driver.unlink()
    shutil.rmtree(debs)


def _once(folder: Path, packages: Callable[[], list[str]]) -> None:
    """Unpacks packages into a folder, unless an earlier run has."""
    whole = folder.with_suffix(".unpacked")
    if whole.exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if names := packages():
        _unpack(names, folder)
    whole.touch()


class Packages:
    """The unpacked packages; downloaded by the first run, 120 MB.

    Args:
        folder: Where they lie.
    """

    def __init__(self, folder: Path) -> None:
        self.guest = folder / "guest"
        self.kernel = folder / "kernel"
        self._tools = folder / "tools"
        _once(self.guest, lambda: GUEST)
        _once(self.kernel, lambda: [_kernel()])
        _once(self._tools, lambda: _missing(EMULATOR))

    @property
    def image(self) -> Path:
        """The kernel."""
        (image,) = (self.kernel / "boot").glob("vmlinuz-*")
        return image

    @property
    def modules(self) -> Path:
        """Its modules."""
        (modules,) = (self.kernel / "usr/lib/modules").glob("*/kernel")
        return modules

    @property
    def version(self) -> str:
        """The kernel's version."""
        return self.modules.parent.name

    @property
    def busybox(self) -> Path:
        """The guest's first program."""
        return self.guest / "usr/bin/busybox"

    def emulator(self) -> tuple[list[str], dict[str, str]]:
        """The start of the emulator's command line, and what its environment needs: the host's own where it has one."""
        installed = shutil.which("qemu-system-x86_64")
        if installed:
            return [installed], {}
        firmware = self._tools / "usr/share"
        libraries = ":".join(str(self._tools / path) for path in LIBRARIES)
        program = str(self._tools / "usr/bin/qemu-system-x86_64")
        folders = [part for name in ("qemu", "seabios") for part in ("-L", str(firmware / name))]
        return [program, *folders], {"LD_LIBRARY_PATH": libraries}
