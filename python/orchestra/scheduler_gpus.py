"""GPUs as both schedulers know them: registering, losing and limiting them, and what a gang asks of them."""

import dataclasses
from typing import Literal, TypedDict

from orchestra import _core

__all__ = ["DomainMemory", "GpuRegistry", "GpuSpec", "PlaceOptions", "place_request"]


@dataclasses.dataclass(frozen=True)
class GpuSpec:
    """What a GPU is; fixed while it is registered.

    Attributes:
        name: Unique among the registered GPUs, 1 to 128 bytes.
        domain: GPUs of one domain reach each other at full speed (an NVSwitch island).
        node: The machine that it is in.
        memory_bytes: Memory that may be given out; rounded down to whole extents.
        rack: Domains of one rack are nearer to each other; the same for all GPUs of a domain.
    """

    name: str
    domain: str
    node: str
    memory_bytes: int
    rack: str | None = None


class _Sizes(TypedDict):
    num_gpus: int
    bytes_per_gpu: int


class PlaceOptions(_Sizes, total=False):
    """What a gang asks for.

    Attributes:
        num_gpus: GPUs of each stage, all of one domain; required.
        bytes_per_gpu: Bytes on each, rounded up to whole extents; required.
        num_stages: Stages of a pipeline, neighbours as close as can be; 1 unless given, at most 64.
        layout: `contiguous`, one piece on each GPU, unless `paged`, in any pieces of whole extents.
        paged_bytes_per_gpu: Bytes on the same GPUs besides, in any pieces: KV beside weights.
        priority: 0 to 3. What does not fit displaces placements of lower priority, those with the least to replay.
        replay_cost: What losing it would cost, in any unit that all requests share.
        expires_in_s: Seconds until it is released by itself, at the next decision or `expire_placements()`.
        cpu_milli: Of the node's cores for each GPU, thousandths of a core.
        host_memory_bytes: Of the node's memory for each GPU.
        nic_mbps: Of the node's network for each GPU, megabits per second.
        power_watts: Of the domain's power for each GPU.
    """

    num_stages: int
    layout: Literal["contiguous", "paged"]
    paged_bytes_per_gpu: int
    priority: int
    replay_cost: int
    expires_in_s: float
    cpu_milli: int
    host_memory_bytes: int
    nic_mbps: int
    power_watts: int


@dataclasses.dataclass(frozen=True)
class DomainMemory:
    """How a domain's memory is used; sums over its GPUs.

    Attributes:
        num_gpus: Registered GPUs.
        num_gpus_out_of_use: Of these, how many failed or drain.
        num_gpus_empty: Of these, how many hold nothing.
        bytes_total: Memory that may be given out.
        bytes_free: Of it, how much is free.
        bytes_stranded: Free bytes times the probability that a request does not fit its GPU's longest run.
        unusable_p50_ratio: The share of the free memory in runs shorter than the median request.
        unusable_p90_ratio: The same for the 90th percentile of the requests.
        emptiable_ratio: The share of the GPUs in use that are more than the placed bytes need.
    """

    num_gpus: int
    num_gpus_out_of_use: int
    num_gpus_empty: int
    bytes_total: int
    bytes_free: int
    bytes_stranded: int
    unusable_p50_ratio: float
    unusable_p90_ratio: float
    emptiable_ratio: float


class GpuRegistry:
    """The part of both schedulers that is about GPUs."""

    _core: _core.Scheduler

    def add_gpu(
        self, name: str, *, domain: str, node: str, memory_bytes: int, rack: str | None = None
    ) -> None:
        """Registers a GPU, all of its memory free; see `GpuSpec`.

        Raises:
            InvalidRequestError: A value is out of range, or the name is taken.
            OverloadedError: As many GPUs are registered as may be.
        """
        self._core.add_gpu(
            GpuSpec(name=name, domain=domain, node=node, memory_bytes=memory_bytes, rack=rack)
        )

    def remove_gpu(self, name: str) -> bool:
        """Forgets a GPU and every placement that it was part of; `False` if it is not registered."""
        return self._core.remove_gpu(name)

    def fail_gpu(self, name: str) -> list[int]:
        """Takes a GPU out of use until `restore_gpu`.

        Returns:
            The ids of the placements that it was part of; they are released on all their GPUs.

        Raises:
            InvalidRequestError: No GPU of this name is registered.
        """
        return self._core.fail_gpu(name)

    def restore_gpu(self, name: str) -> None:
        """Puts a failed GPU back into use, all of its memory free.

        Raises:
            InvalidRequestError: No GPU of this name is registered.
        """
        self._core.restore_gpu(name)

    def set_domain_draining(self, domain: str, *, is_draining: bool = True) -> list[int]:
        """A draining domain takes no new gangs.

        Returns:
            The ids of the placements that it has, to be moved or awaited.

        Raises:
            InvalidRequestError: No GPU is of this domain.
        """
        return self._core.set_domain_draining(domain, is_draining)

    def set_node_limits(
        self, node: str, *, cpu_milli: int = 0, host_memory_bytes: int = 0, nic_mbps: int = 0
    ) -> None:
        """Limits what the GPUs of a node share; 0 is no limit. What is held stays.

        Raises:
            InvalidRequestError: No GPU is of this node, or its GPUs are of several domains.
        """
        self._core.set_node_limits(node, cpu_milli, host_memory_bytes, nic_mbps)

    def set_domain_power(self, domain: str, watts: int) -> None:
        """Limits the power that the GPUs of a domain share, in watts; 0 is no limit.

        Raises:
            InvalidRequestError: No GPU is of this domain.
        """
        self._core.set_domain_power(domain, watts)

    def domain_memory(self, domain: str) -> DomainMemory:
        """How a domain's memory is used, and how usable the rest is.

        Raises:
            InvalidRequestError: No GPU is of this domain.
        """
        return DomainMemory(**self._core.domain_memory(domain))

    def expire_placements(self) -> list[int]:
        """Releases the placements whose time has come; their ids. Every decision about GPUs does so first."""
        return self._core.expire_placements()


def place_request(options: PlaceOptions) -> _core.PlaceRequest:
    """The request as the core takes it."""
    arguments = dict(options)
    expires_in_s = options.get("expires_in_s")
    if expires_in_s is not None:
        del arguments["expires_in_s"]
        arguments["expires_in_us"] = round(expires_in_s * 1e6)
    return _core.PlaceRequest(**arguments)  # type: ignore[arg-type]  # checked there, by name
