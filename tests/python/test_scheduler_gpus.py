"""`Scheduler`: pipelines, priorities, shared limits, failures and batches of gangs."""

import asyncio

import pytest

from orchestra import AsyncScheduler, Placement, Scheduler, errors

GIB = 1 << 30


def cluster(num_domains: int = 2, gpus: int = 4) -> Scheduler:
    scheduler = Scheduler()
    for domain in range(num_domains):
        for gpu in range(gpus):
            scheduler.add_gpu(
                f"{domain}/{gpu}",
                domain=f"domain-{domain}",
                node=f"node-{domain}",
                rack="rack",
                memory_bytes=80 * GIB,
            )
    return scheduler


def names(placement: Placement) -> list[str]:
    return [name for name, _, _ in placement.gpus]


def test_a_pipeline_s_stages_are_each_of_one_domain() -> None:
    scheduler = cluster()
    with scheduler.place(num_gpus=4, num_stages=2, bytes_per_gpu=60 * GIB) as placement:
        assert placement.stages == (0,) * 4 + (1,) * 4
        domains = [name.split("/")[0] for name in names(placement)]
        assert len(set(domains[:4])) == len(set(domains[4:])) == 1
        with pytest.raises(errors.WorkerUnavailableError):
            scheduler.place(num_gpus=1, bytes_per_gpu=60 * GIB)
    scheduler.check_integrity()


def test_higher_priority_displaces_what_is_cheapest_to_replay() -> None:
    scheduler = cluster(num_domains=1, gpus=2)
    dear = scheduler.place(num_gpus=1, bytes_per_gpu=60 * GIB, replay_cost=9)
    cheap = scheduler.place(num_gpus=1, bytes_per_gpu=60 * GIB, replay_cost=1)
    urgent = scheduler.place(num_gpus=1, bytes_per_gpu=60 * GIB, priority=1)
    assert urgent.preempted == (cheap.id,)
    assert not cheap.release(), "its memory is gone"
    assert dear.release()
    scheduler.check_integrity()


def test_weights_lie_in_one_piece_and_kv_wherever_it_fits() -> None:
    scheduler = cluster(num_domains=1, gpus=1)
    with scheduler.place(
        num_gpus=1, bytes_per_gpu=30 * GIB, paged_bytes_per_gpu=40 * GIB
    ) as placement:
        assert sum(length for _, _, length in placement.gpus) == 70 * GIB
        assert scheduler.domain_memory("domain-0").bytes_free == 10 * GIB
    with pytest.raises(errors.InvalidRequestError) as refusal:
        scheduler.place(num_gpus=1, bytes_per_gpu=1, layout="scattered")  # type: ignore[arg-type]
    assert refusal.value.key == "layout"
    with pytest.raises(TypeError, match="bytes_per_gpu"):
        scheduler.place(num_gpus=1)  # type: ignore[call-arg]


def test_what_a_node_shares_is_counted() -> None:
    scheduler = cluster(num_domains=1)
    scheduler.set_node_limits("node-0", host_memory_bytes=100 * GIB)
    scheduler.set_domain_power("domain-0", 1000)
    first = scheduler.place(num_gpus=1, bytes_per_gpu=GIB, host_memory_bytes=60 * GIB)
    with pytest.raises(errors.WorkerUnavailableError):
        scheduler.place(num_gpus=1, bytes_per_gpu=GIB, host_memory_bytes=60 * GIB)
    with pytest.raises(errors.OrchestraError):
        scheduler.place(num_gpus=2, bytes_per_gpu=GIB, power_watts=600)
    first.release()
    scheduler.place(num_gpus=1, bytes_per_gpu=GIB, host_memory_bytes=60 * GIB).release()
    with pytest.raises(errors.InvalidRequestError):
        scheduler.set_domain_power("elsewhere", 1)


def test_failing_and_draining_name_the_placements() -> None:
    scheduler = cluster()
    placement = scheduler.place(num_gpus=2, bytes_per_gpu=GIB)
    domain = f"domain-{names(placement)[0][0]}"
    assert scheduler.set_domain_draining(domain) == [placement.id]
    other = scheduler.place(num_gpus=4, bytes_per_gpu=GIB)
    assert names(other)[0][0] != names(placement)[0][0]
    assert scheduler.fail_gpu(names(placement)[0]) == [placement.id]
    assert not placement.release()
    assert scheduler.domain_memory(domain).num_gpus_out_of_use > 0
    scheduler.set_domain_draining(domain, is_draining=False)
    scheduler.restore_gpu(names(placement)[0])
    scheduler.place(num_gpus=4, bytes_per_gpu=GIB).release()
    for call in (scheduler.fail_gpu, scheduler.restore_gpu):
        with pytest.raises(errors.InvalidRequestError) as refusal:
            call("nobody")
        assert refusal.value.key == "name"


def test_a_batch_places_the_largest_first() -> None:
    scheduler = cluster(num_domains=1, gpus=2)
    small, large, hopeless = scheduler.place_batch(
        [
            {"num_gpus": 1, "bytes_per_gpu": 20 * GIB},
            {"num_gpus": 2, "bytes_per_gpu": 70 * GIB},
            {"num_gpus": 3, "bytes_per_gpu": GIB},
        ]
    )
    assert isinstance(large, Placement)
    assert isinstance(small, errors.WorkerUnavailableError)
    assert isinstance(hopeless, errors.InvalidRequestError)
    del small, large
    assert scheduler.stats().num_placements == 0


def test_an_expired_placement_makes_room() -> None:
    scheduler = cluster(num_domains=1, gpus=1)
    expired = scheduler.place(num_gpus=1, bytes_per_gpu=80 * GIB, expires_in_s=0.0)
    with scheduler.place(num_gpus=1, bytes_per_gpu=80 * GIB):
        assert not expired.release()
        assert scheduler.expire_placements() == []


def test_what_an_expired_placement_leaves_serves_those_that_wait() -> None:
    async def main() -> None:
        scheduler = AsyncScheduler(scheduler=cluster(num_domains=1, gpus=1))
        await scheduler.place(num_gpus=1, bytes_per_gpu=GIB)
        expiring = await scheduler.place(num_gpus=1, bytes_per_gpu=70 * GIB, expires_in_s=0.02)
        waiting = asyncio.ensure_future(
            scheduler.place(num_gpus=1, bytes_per_gpu=60 * GIB, timeout=10)
        )
        await asyncio.sleep(0.05)  # the time that it has to be over
        with pytest.raises(errors.InvalidRequestError):
            await scheduler.place(num_gpus=2, bytes_per_gpu=GIB)
        (await waiting).release()
        assert not expiring.release()

    asyncio.run(main())


def test_a_pipeline_waits_for_room() -> None:
    async def main() -> None:
        scheduler = AsyncScheduler(scheduler=cluster())
        first = await scheduler.place(num_gpus=4, bytes_per_gpu=70 * GIB)
        waiting = asyncio.ensure_future(
            scheduler.place(num_gpus=4, num_stages=2, bytes_per_gpu=70 * GIB, timeout=30)
        )
        await asyncio.sleep(0)
        assert not waiting.done()
        first.release()
        (await waiting).release()

    asyncio.run(main())
