"""Pinned memory and memory of devices from Python: over a mock of the driver, and over a real one (`make gpu`)."""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from orchestra import BufferManager, errors

MOCK = Path(__file__).parents[2] / "rust/memory/tests/devices/mock_driver.c"
BLOCK_BYTES = 4096


@pytest.fixture(scope="session")
def mock_driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The mock of the NVIDIA driver, in which the processor cannot touch a device's memory."""
    built = tmp_path_factory.mktemp("driver") / "libmock_driver.so"
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, "-shared", "-fPIC", "-pthread", "-o", built, MOCK], check=True)
    return built


@pytest.fixture
def driver(mock_driver: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ORCHESTRA_CUDA_LIB", str(mock_driver))
    return mock_driver


@pytest.mark.usefixtures("driver")
def test_a_block_on_a_device_is_copied_and_never_lent_to_the_processor() -> None:
    with BufferManager(transports=()) as manager:
        pool = manager.create_pool(tier="vram:1", block_bytes=BLOCK_BYTES, max_bytes=2 << 20)
        assert pool.tier == "vram:1"
        blocks = pool.alloc(2)
        blocks.write(1, b"on the device", offset=BLOCK_BYTES - 13)
        with pytest.raises(BufferError, match="device 1"):
            blocks.memoryview(1)
        with pytest.raises(errors.BlockInUseError):
            blocks.read(1)
        with pytest.raises(errors.InvalidRequestError) as raised:
            blocks.write(1, b"too long", offset=BLOCK_BYTES - 1)
        assert raised.value.limit == BLOCK_BYTES
        blocks.seal()
        assert blocks.read(1, BLOCK_BYTES - 13) == b"on the device"
        assert blocks.read(1, BLOCK_BYTES - 13, 2) == b"on"
        assert blocks.read(0) == bytes(BLOCK_BYTES)
        with pytest.raises(errors.InvalidRequestError):
            blocks.read(1, BLOCK_BYTES, 1)
        with pytest.raises(errors.BlockInUseError):
            blocks.write(1, b"late")
        with blocks.view(1) as view:
            assert (view.tier, view.__dlpack_device__()) == ("vram:1", (2, 1))
            view.__dlpack__(stream=1, max_version=(1, 0), dl_device=(2, 1))
            with pytest.raises(BufferError, match="vram:1 memory"):
                view.__dlpack__(max_version=(1, 0), dl_device=(1, 0))
            with pytest.raises((BufferError, RuntimeError)):
                np.from_dlpack(view)  # type: ignore[arg-type]  # numpy wants its own stream type


@pytest.mark.usefixtures("driver")
def test_pinned_memory_is_used_like_any_other() -> None:
    with BufferManager() as manager:
        pool = manager.create_pool(tier="pinned", block_bytes=BLOCK_BYTES, max_bytes=2 << 20)
        blocks = pool.alloc(1)
        blocks.write(0, b"copied")
        with blocks.view(0) as view:
            assert (view.tier, view.__dlpack_device__()) == ("pinned", (1, 0))
            with view.memoryview() as bytes_:
                assert bytes(bytes_[:6]) == b"copied"


@pytest.mark.usefixtures("driver")
def test_what_cannot_be_had_is_an_error_and_nothing_else_is_taken() -> None:
    with BufferManager(transports=["shm"]) as manager:
        with pytest.raises(errors.UnsupportedError, match="shm cannot reach vram:0") as raised:
            manager.create_pool(tier="vram:0", max_bytes=2 << 20)
        assert raised.value.key == "tier"
    with BufferManager(transports=()) as manager:
        with pytest.raises(errors.TierUnavailableError, match="CUDA_ERROR_INVALID_DEVICE"):
            manager.create_pool(tier="vram:7", max_bytes=2 << 20)
        with pytest.raises(errors.OverloadedError, match="device 0") as full:
            manager.create_pool(tier="vram:0", slab_bytes=128 << 20)
        assert full.value.current == 128 << 20


def test_a_missing_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCHESTRA_CUDA_LIB", "/nowhere/libcuda.so.1")
    with BufferManager() as manager:
        with pytest.raises(errors.TierUnavailableError, match=r"/nowhere/libcuda\.so\.1") as raised:
            manager.create_pool(tier="pinned", max_bytes=2 << 20)
        assert raised.value.key == "tier"
        manager.create_pool(max_bytes=2 << 20)


@pytest.mark.gpu
def test_torch_takes_a_block_on_its_device_without_a_copy() -> None:
    torch = pytest.importorskip("torch")
    with BufferManager(transports=()) as manager:
        pool = manager.create_pool(tier="vram:0", block_bytes=BLOCK_BYTES, max_bytes=2 << 20)
        blocks = pool.alloc(2)
        blocks.write(0, bytes(range(256)) * 16)
        with blocks.view(0) as view:
            tensor = torch.from_dlpack(view)
        assert (tensor.device.type, tensor.device.index) == ("cuda", 0)
        assert tensor[255].item() == 255
        tensor.fill_(9)
        torch.cuda.synchronize()
        del tensor
        blocks.seal()
        assert blocks.read(0) == bytes([9]) * BLOCK_BYTES
        pinned = manager.create_pool(tier="pinned", block_bytes=BLOCK_BYTES, max_bytes=2 << 20)
        with pinned.alloc(1).view(0) as view:
            assert torch.from_dlpack(view).is_pinned()
