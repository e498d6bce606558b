"""The memory crate's tests of NIXL over real verbs: in a virtual machine, because a kernel without InfiniBand has none.

The guest is Debian's stock kernel with its soft RDMA card (RoCE over a network device of the kernel's), a first program
of 2 MB, and the host's own files, read-only. `make rdma-vm` runs it; so does `python -m tests.rdma_vm`. With `--bench`,
instead of the tests, it measures what defragmentation is worth where each descriptor is a request to the card.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from tests.rdma_vm.initramfs import archive
from tests.rdma_vm.packages import Packages

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "target/rdma-vm"
HERE = Path(__file__).parent

# In the order in which they are loaded.
MODULES = [
    "drivers/virtio/virtio_ring.ko",
    "drivers/virtio/virtio.ko",
    "drivers/virtio/virtio_pci_modern_dev.ko",
    "drivers/virtio/virtio_pci_legacy_dev.ko",
    "drivers/virtio/virtio_pci.ko",
    "fs/netfs/netfs.ko",
    "fs/fscache/fscache.ko",
    "net/9p/9pnet.ko",
    "net/9p/9pnet_virtio.ko",
    "fs/9p/9p.ko",
    "fs/overlayfs/overlay.ko",
    "crypto/crc32_generic.ko",
    "drivers/net/dummy.ko",
    "net/ipv4/udp_tunnel.ko",
    "net/ipv6/ip6_udp_tunnel.ko",
    "drivers/infiniband/core/ib_core.ko",
    "drivers/infiniband/core/ib_uverbs.ko",
    "drivers/infiniband/sw/rxe/rdma_rxe.ko",
]
MEMORY = "3G"
# When a guest is ended that hangs: it takes two minutes, and more beside other work.
LIMIT_S = 900
# The transport tests move some 60 MiB, in packets of 4 KiB at most: far fewer were not sent by the card.
PACKETS_MIN = 10_000


TESTS = ["test", "--test", "transports", "--test", "memlock"]
BENCH = ["bench", "--bench", "managers"]


def built_programs(wanted: list[str]) -> dict[str, Path]:
    """Builds tests or a bench; the programs by name."""
    command = ["cargo", wanted[0], "--locked", "-p", "orchestra-memory", "--no-run"]
    command += [*wanted[1:], "--message-format", "json"]
    lines = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    built = (json.loads(line) for line in lines.splitlines())
    artifacts = [message for message in built if message["reason"] == "compiler-artifact"]
    return {
        artifact["target"]["name"]: Path(artifact["executable"])
        for artifact in artifacts
        if artifact["executable"]
    }


def nixl_library() -> Path:
    """NIXL of this interpreter's packages."""
    for folder in map(Path, sys.path):
        for cuda in ("13", "12"):
            library = folder / f".nixl_cu{cuda}.mesonpy.libs/libnixl_capi.so"
            if library.exists():
                return library
    raise SystemExit("NIXL is not installed: make setup installs it where it can be had")


def first_files(packages: Packages, programs: dict[str, Path]) -> dict[str, tuple[int, bytes]]:
    """What the guest's first file system holds: modes and contents by path."""
    library = nixl_library()
    libraries = library.parents[1] / library.parent.name.removeprefix(".").replace(".mesonpy", "")
    (verbs,) = libraries.glob("libibverbs-*")
    settings = {
        **{name.upper(): program for name, program in programs.items()},
        "ORCHESTRA_NIXL_LIB": library,
        "VERBS_OF_WHEEL": verbs,
        # Reliable connections over verbs, made through verbs, and nothing else: no other way is left between processes.
        "UCX_TLS": "rc_v",
        "UCX_NET_DEVICES": "rxe0:1",
        # Patient, because this processor is emulated; and a dead peer's transfers fail after three times as long.
        "UCX_RC_TIMEOUT": "2s",
        "UCX_RC_RETRY_COUNT": "2",
        "UCX_LOG_LEVEL": "warn",
    }
    lines = "".join(f"export {name}={value}\n" for name, value in settings.items())
    files = {
        "init": (0o755, (HERE / "init.sh").read_bytes()),
        "bin/busybox": (0o755, packages.busybox.read_bytes()),
        "settings": (0o644, lines.encode()),
        "modules.order": (0o644, "\n".join(Path(name).name for name in MODULES).encode()),
    }
    for name in MODULES:
        files[f"modules/{Path(name).name}"] = (0o644, (packages.modules / name).read_bytes())
    return files


def boot(packages: Packages, initramfs: Path) -> str:
    """Runs the guest until it ends; what it printed."""
    program, environment = packages.emulator()
    share = "local,readonly=on,security_model=none,multidevs=remap,path"
    command = [
        *program,
        *("-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", MEMORY),
        *("-nodefaults", "-no-reboot", "-display", "none", "-serial", "stdio"),
        *("-kernel", str(packages.image), "-initrd", str(initramfs)),
        *("-append", "console=ttyS0 quiet panic=-1"),
        *("-virtfs", f"{share}=/,mount_tag=host"),
        *("-virtfs", f"{share}={packages.guest},mount_tag=extra"),
    ]
    printed: list[str] = []
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, env=os.environ | environment, stdout=pipe, stderr=subprocess.STDOUT, text=True
    ) as guest:
        assert guest.stdout is not None
        limit = threading.Timer(LIMIT_S, guest.kill)
        limit.start()
        for line in guest.stdout:
            print(line, end="", flush=True)
            printed.append(line)
        limit.cancel()
    return "".join(printed)


def passed(said: dict[str, str], printed: str, programs: set[str]) -> bool:
    """Whether all that was to run has run, and by the card."""
    ran = all(said.get(name) == "0" for name in programs)
    packets = int(said.get("packets", 0))
    return ran and "end" in said and packets >= PACKETS_MIN and "skipped: nixl" not in printed


def main() -> int:
    """Builds, boots, and judges what the guest says."""
    parser = argparse.ArgumentParser(prog="python -m tests.rdma_vm", description=__doc__)
    parser.add_argument("--bench", action="store_true", help="measure instead of testing")
    is_bench = parser.parse_args().bench
    started = time.monotonic()
    packages = Packages(FOLDER)
    programs = built_programs(BENCH if is_bench else TESTS)
    wanted = {"managers"} if is_bench else {"transports", "memlock"}
    programs = {name: programs[name] for name in wanted}
    with tempfile.NamedTemporaryFile(suffix=".cpio") as initramfs:
        initramfs.write(archive(first_files(packages, programs)))
        initramfs.flush()
        booted = time.monotonic()
        printed = boot(packages, Path(initramfs.name))
    said = dict(re.findall(r"^@(\w+) (\S+)\r?$", printed, re.MULTILINE))
    tests = sum(map(int, re.findall(r"^test result: ok\. (\d+) passed", printed, re.MULTILINE)))
    is_good = passed(said, printed, wanted)
    print(
        f"{'passed' if is_good else 'FAILED'}: {'the bench' if is_bench else f'{tests} tests'} over rc_verbs on Linux "
        f"{said.get('begin', '?')}, {said.get('packets', 0)} packets sent by the card (at least {PACKETS_MIN} wanted); "
        f"guest {time.monotonic() - booted:.0f} s, all {time.monotonic() - started:.0f} s"
    )
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
