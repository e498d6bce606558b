"""`Scheduler`: adapters, taints, service classes, weights epochs, policies, and many decisions in one call."""

import array

import pytest

from orchestra import Reservation, Scheduler, errors
from orchestra.scheduler import RoutePolicy, SchedulerConfig

MODEL = "demo"


def add_worker(scheduler: Scheduler, name: str, **terms: object) -> None:
    scheduler.add_worker(name, model=MODEL, num_blocks=1000, max_model_len=4096, **terms)  # type: ignore[arg-type]


# === adapters ===


def test_an_adapter_goes_where_it_is_until_loading_it_costs_less() -> None:
    scheduler = Scheduler({"lora_load_tokens": 250})
    for name in ("a", "b"):
        add_worker(scheduler, name, max_loras=2)
    scheduler.set_loras("b", ["poet", ("coder", 3)])
    explanation = scheduler.explain([1] * 100, model=MODEL, lora="coder", lora_version=3)
    costs = [(row.worker, row.cost, row.lora_load_tokens) for row in explanation.candidates]
    assert costs == [("b", 100, 0), ("a", 350, 250)]

    held = [scheduler.route([1] * 100, model=MODEL, lora="poet") for _ in range(3)]
    # (100 + 0) x 1 on b, then (100 + 100) x 2 there against (100 + 250) x 1 on a, which has it from then on. Now both
    # cost (100 + 100) x 2, and b was chosen longer ago.
    assert [reservation.worker for reservation in held] == ["b", "a", "b"]
    scheduler.check_integrity()


def test_an_adapter_s_blocks_are_its_own() -> None:
    scheduler = Scheduler()
    add_worker(scheduler, "a", max_loras=1)
    prompt = list(range(64))
    hashes = scheduler.block_hashes("a", prompt, lora="poet", lora_version=1)
    assert hashes != scheduler.block_hashes("a", prompt)
    scheduler.kv_stored("a", hashes)
    with scheduler.route(prompt, model=MODEL) as plain:
        assert plain.num_cached_tokens == 0
    with scheduler.route(prompt, model=MODEL, lora="poet", lora_version=1) as adapted:
        assert adapted.num_cached_tokens == 48


def test_more_adapters_than_the_worker_holds_are_refused() -> None:
    scheduler = Scheduler()
    add_worker(scheduler, "a", max_loras=1)
    with pytest.raises(errors.OverloadedError) as refusal:
        scheduler.set_loras("a", ["poet", "coder"])
    assert (refusal.value.limit, refusal.value.current) == (1, 2)
    scheduler.check_integrity()


# === terms ===


def test_terms_keep_workers_for_their_own() -> None:
    scheduler = Scheduler()
    add_worker(scheduler, "spot", taints=["spot"])
    add_worker(scheduler, "batch", slo_classes=["batch"])
    add_worker(scheduler, "new", weights_epoch=2, taints=["canary"])
    tolerant = scheduler.explain([1], model=MODEL, tolerations={"spot"})
    assert [row.worker for row in tolerant.candidates] == ["spot"]
    reasons = {row.worker: row.reason for row in tolerant.ineligible}
    assert reasons == {"batch": "other_slo_class", "new": "tainted"}
    with scheduler.route([1], model=MODEL, slo_class="batch") as reservation:
        assert reservation.worker == "batch"
    epoch = scheduler.explain([1], model=MODEL, weights_epoch=2, tolerations=["canary"])
    assert [row.worker for row in epoch.candidates] == ["new"]
    with pytest.raises(errors.ModelNotFoundError, match="tolerations") as refusal:
        scheduler.route([1], model=MODEL, weights_epoch=2)
    assert refusal.value.key == "tolerations", "one worker has these weights"


def test_one_string_is_not_a_list_of_names() -> None:
    scheduler = Scheduler()
    add_worker(scheduler, "a")
    with pytest.raises(TypeError, match="tolerations"):
        scheduler.route([1], model=MODEL, tolerations="spot")
    with pytest.raises(TypeError, match="model"):
        scheduler.route([1])  # type: ignore[call-arg]
    assert scheduler.stats().num_reservations == 0


# === policies ===


def test_the_policy_is_a_setting() -> None:
    assert workers_chosen("round_robin") == ["a", "b", "a", "b"]
    assert len(set(workers_chosen("consistent_hash"))) == 1, "a session stays"


def workers_chosen(policy: RoutePolicy) -> list[str]:
    scheduler = Scheduler(SchedulerConfig(policy=policy))
    for name in ("a", "b"):
        add_worker(scheduler, name)
    held = [scheduler.route([1], model=MODEL, session_key="s") for _ in range(4)]
    return [reservation.worker for reservation in held]


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(errors.ConfigError) as refusal:
        Scheduler({"policy": "best"})
    assert refusal.value.key == "policy"


# === many decisions at once ===


def test_a_batch_decides_as_one_by_one_would() -> None:
    prompts = [list(range(length)) for length in (5, 100, 33, 33, 2000, 1)]
    flat = array.array("i", [token for prompt in prompts for token in prompt])
    ends = [sum(map(len, prompts[: count + 1])) for count in range(len(prompts))]
    one_by_one, at_once = Scheduler(), Scheduler()
    for scheduler in (one_by_one, at_once):
        for name in ("a", "b", "c"):
            add_worker(scheduler, name)
    expected = [one_by_one.route(prompt, model=MODEL, max_tokens=8) for prompt in prompts]
    outcomes = at_once.decide_batch(flat, ends, model=MODEL, max_tokens=8)
    chosen = [outcome.worker for outcome in outcomes if isinstance(outcome, Reservation)]
    assert chosen == [reservation.worker for reservation in expected]
    assert at_once.stats().num_reservations == len(prompts)
    del outcomes
    assert at_once.stats().num_reservations == 0


def test_a_refusal_in_a_batch_is_its_own() -> None:
    scheduler = Scheduler()
    add_worker(scheduler, "a")
    first, second, third = scheduler.decide_batch([7] * 5003, [1, 5001, 5003], model=MODEL)
    assert isinstance(first, Reservation)
    assert isinstance(third, Reservation)
    assert isinstance(second, errors.ContextTooLongError)


@pytest.mark.parametrize("ends", [[3, 2], [4], [1, 2], []])
def test_ends_that_do_not_fit_decide_nothing(ends: list[int]) -> None:
    scheduler = Scheduler()
    add_worker(scheduler, "a")
    with pytest.raises(errors.InvalidRequestError) as refusal:
        scheduler.decide_batch([1, 2, 3], ends, model=MODEL)
    assert refusal.value.key == "ends"
    assert scheduler.stats().num_decisions == 0


# === numbered KV events ===


def test_a_lost_message_costs_hits_until_the_resync() -> None:
    scheduler = Scheduler()
    add_worker(scheduler, "a")
    prompt = list(range(64))
    hashes = scheduler.block_hashes("a", prompt)

    def num_cached() -> int:
        return scheduler.explain(prompt, model=MODEL).candidates[0].num_cached_tokens

    assert scheduler.apply_kv_events("a", 5, [("stored", hashes)])
    assert num_cached() == 48
    assert scheduler.apply_kv_events("a", 5, [("cleared", [])]), "it came before"
    assert not scheduler.apply_kv_events("a", 7, [("stored", hashes[:1])])
    assert num_cached() == 0
    assert not scheduler.workers()[0].is_kv_in_step
    scheduler.resync_kv("a", 7, hashes[:2])
    assert num_cached() == 32
    assert scheduler.apply_kv_events("a", 8, [("removed", hashes[1:2])])
    assert num_cached() == 16
    assert scheduler.stats().num_kv_gaps == 1
    with pytest.raises(errors.InvalidRequestError) as refusal:
        scheduler.apply_kv_events("a", 9, [("evicted", hashes)])  # type: ignore[list-item]
    assert refusal.value.key == "events"


# === snapshots ===


def test_readers_share_a_snapshot_until_it_is_too_old() -> None:
    scheduler = Scheduler()
    add_worker(scheduler, "a")
    with scheduler.route([1], model=MODEL):
        first = scheduler.snapshot()
        assert (first.stats.num_reservations, first.workers[0].batch) == (1, 1)
    shared = scheduler.snapshot(max_age_s=1000)
    assert (shared.stats, shared.workers) == (first.stats, first.workers)
    assert shared.age_s >= first.age_s
    fresh = scheduler.snapshot(max_age_s=0)
    assert (fresh.stats.num_reservations, fresh.workers[0].batch) == (0, 0)
    assert scheduler.snapshot(max_age_s=1000).stats == fresh.stats
