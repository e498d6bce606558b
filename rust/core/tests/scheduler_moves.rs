//! What moving KV is taken to cost: learned from what it took, forgotten where it was passed over.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use orchestra_core::{
    Time, block_hashes,
    scheduler::{
        Candidate, KvExchange, Reservation, RouteRequest, Scheduler, SchedulerConfig, WorkerId,
        WorkerLoad, WorkerRole, WorkerSpec,
    },
    step::KvEvent,
};

const SECOND: u64 = 1_000_000;
/// Blocks of the prompt that the holder has: all that a hit can use.
const HELD: u32 = 20;

/// A worker that holds the prompt's blocks and is too busy for requests, and one that holds nothing.
struct Cluster {
    scheduler: Scheduler,
    holder: WorkerId,
    other: WorkerId,
    prompt: Vec<u32>,
    now: u64,
}

fn spec(name: &str, role: WorkerRole, bytes_per_block: u64) -> WorkerSpec {
    WorkerSpec {
        name: name.to_owned(),
        model: "m".to_owned(),
        block_size: 16,
        num_blocks: 10_000,
        max_num_seqs: 64,
        max_model_len: 10_000,
        kv_exchange: Some(KvExchange {
            layout: "bf16".to_owned(),
            bytes_per_block,
        }),
        role,
        ..WorkerSpec::default()
    }
}

impl Cluster {
    /// Both compute 1,000 tokens a second.
    fn new(bytes_per_block: u64) -> Self {
        let mut cluster = Self::unknown(bytes_per_block, SchedulerConfig::default());
        cluster.learn();
        cluster
    }

    /// Nobody knows how fast they are.
    fn unknown(bytes_per_block: u64, config: SchedulerConfig) -> Self {
        let mut scheduler = Scheduler::new(config).unwrap();
        let mut add = |name| {
            let spec = spec(name, WorkerRole::Both, bytes_per_block);
            scheduler.add_worker(spec).unwrap()
        };
        let (holder, other) = (add("holder"), add("other"));
        let prompt: Vec<u32> = (0..=HELD * 16).collect();
        let mut cluster = Self {
            scheduler,
            holder,
            other,
            prompt,
            now: 0,
        };
        let spec = cluster.scheduler.worker_spec(holder).unwrap();
        let blocks = block_hashes(spec.hash_seed("", None), &cluster.prompt, 16);
        let scheduler = &mut cluster.scheduler;
        scheduler
            .apply_kv_event(holder, &KvEvent::Stored(blocks))
            .unwrap();
        let busy = WorkerLoad {
            num_running: 60,
            queued_prefill_tokens: 100_000,
            ..WorkerLoad::default()
        };
        scheduler.update_load(holder, busy);
        cluster
    }

    fn learn(&mut self) {
        for worker in [self.other, self.holder] {
            self.compute(worker);
        }
    }

    /// Has one worker compute other prompts for a while.
    fn compute(&mut self, worker: WorkerId) {
        let exclude = if worker == self.other {
            self.holder
        } else {
            self.other
        };
        let token_ids: Vec<u32> = (5000..6000).collect();
        for _ in 0..3 {
            let request = RouteRequest {
                exclude: &[exclude],
                ..request(&token_ids)
            };
            let reservation = self.scheduler.route(&request, Time(self.now)).unwrap();
            self.now += SECOND;
            assert!(self.scheduler.prefill_done(reservation.id, Time(self.now)));
            self.scheduler.release(reservation.id);
        }
    }

    fn route(&mut self) -> Reservation {
        let request = request(&self.prompt);
        let reservation = self.scheduler.route(&request, Time(self.now)).unwrap();
        assert_eq!(reservation.worker, self.other);
        reservation
    }

    /// One request, whose fetch brings so many tokens in that time, where one is made.
    fn serve(&mut self, num_tokens: u32, micros: u64) -> bool {
        let reservation = self.route();
        self.now += micros;
        let (id, now) = (reservation.id, Time(self.now));
        let is_fetch = reservation.fetch.is_some();
        assert_eq!(self.scheduler.fetch_done(id, num_tokens, now), is_fetch);
        assert!(self.scheduler.prefill_done(id, now));
        assert!(self.scheduler.release(id));
        self.scheduler.check_integrity();
        is_fetch
    }

    fn best(&self) -> Candidate {
        let explained = self.scheduler.explain(&request(&self.prompt), 1).unwrap();
        explained.candidates[0]
    }
}

fn request(token_ids: &[u32]) -> RouteRequest<'_> {
    RouteRequest {
        model: "m",
        token_ids,
        max_tokens: 8,
        ..RouteRequest::default()
    }
}

#[test]
fn a_fetch_costs_latency_and_bytes_in_tokens_of_prefill() {
    // A megabyte takes a millisecond, in which a token is computed; latency is five of them.
    let mut cluster = Cluster::new(1_000_000);
    let best = cluster.best();
    let fetch = best.fetch.unwrap();
    assert_eq!((fetch.source, fetch.num_blocks), (cluster.holder, HELD));
    assert_eq!(
        fetch.saved_tokens,
        u64::from(HELD) * 16 - (5 + u64::from(HELD))
    );
    assert_eq!(best.cost, 1 + 5 + u64::from(HELD));
    let predicted = cluster.scheduler.predict_ttft(&request(&cluster.prompt));
    assert_eq!(predicted, Some(Duration::from_millis(26)));
    // Only what is not fetched queues there.
    let reservation = cluster.route();
    let queued = |cluster: &Cluster| {
        let mut workers = cluster.scheduler.workers();
        let (_, snapshot) = workers.find(|(id, _)| *id == cluster.other).unwrap();
        snapshot.queued_prefill_tokens
    };
    assert_eq!(queued(&cluster), 1);
    assert!(cluster.scheduler.release(reservation.id));
}

#[test]
fn what_is_computed_sooner_is_not_fetched() {
    let cluster = Cluster::new(20_000_000);
    assert_eq!(cluster.best().fetch, None);
    assert_eq!(cluster.best().cost, u64::from(HELD) * 16 + 1);
}

#[test]
fn the_speed_of_fetches_is_learned() {
    let mut cluster = Cluster::new(1_000_000);
    for _ in 0..40 {
        // Twice the time that the bandwidth promised, besides latency and the token that is computed.
        assert!(cluster.serve(HELD * 16, 5_000 + 1_000 + 2_000 * u64::from(HELD)));
    }
    let saved = cluster.best().fetch.unwrap().saved_tokens;
    let expected = u64::from(HELD) * 16 - (5 + 2 * u64::from(HELD));
    assert!(saved.abs_diff(expected) <= 1, "{saved} {expected}");
    let mut workers = cluster.scheduler.workers();
    let (_, snapshot) = workers.find(|(id, _)| *id == cluster.other).unwrap();
    assert_eq!(snapshot.prefill_tokens_per_s, 1000, "a fetch is no prefill");
}

#[test]
fn fetches_that_fail_are_tried_less_and_then_again() {
    let mut cluster = Cluster::new(1_000_000);
    let fetches = |cluster: &mut Cluster| {
        let tries = 0..2000;
        tries.filter(|_| cluster.serve(0, 500_000)).count()
    };
    let tried = fetches(&mut cluster);
    assert!((2..200).contains(&tried), "{tried} of 2000");
    let rest = fetches(&mut cluster);
    assert!((1..200).contains(&rest), "it never tries again: {rest}");
}

#[test]
fn a_prompt_that_another_computes_is_held_there_on_its_own() {
    let mut cluster = Cluster::new(1000);
    let spec = spec("prefill", WorkerRole::Prefill, 1000);
    let helper = cluster.scheduler.add_worker(spec).unwrap();
    let token_ids: Vec<u32> = (20_000..22_000).collect();
    let mut request = request(&token_ids);
    request.exclude = &[];
    let holder = cluster.holder;
    cluster.scheduler.set_draining(holder, true);
    // Nobody decodes there yet, so it computes for itself.
    let alone = cluster.scheduler.route(&request, Time(0)).unwrap();
    assert_eq!(alone.prefill, None);
    let split = cluster.scheduler.route(&request, Time(0)).unwrap();
    let part = split.prefill.unwrap();
    assert_eq!((part.worker, part.num_blocks), (helper, 1999 / 16));
    cluster.scheduler.check_integrity();
    assert!(cluster.scheduler.remove_worker(helper));
    cluster.scheduler.check_integrity();
    assert!(
        !cluster.scheduler.release(part.id),
        "it went with its worker"
    );
    assert!(cluster.scheduler.release(split.id));
    assert!(cluster.scheduler.release(alone.id));
    cluster.scheduler.check_integrity();
}

/// The same but for a hundredth: speeds are learned in whole numbers.
fn assert_near(took: Duration, expected_ms: u64) {
    let difference = took.abs_diff(Duration::from_millis(expected_ms));
    assert!(difference * 100 <= took, "{took:?}, not {expected_ms} ms");
}

#[test]
fn a_fetch_is_waited_for_as_long_as_it_may_take_within_bounds() {
    let wait = |bytes_per_block, min_ms, max_ms| {
        let config = SchedulerConfig {
            move_wait_min_ms: min_ms,
            fetch_wait_max_ms: max_ms,
            ..SchedulerConfig::default()
        };
        let mut cluster = Cluster::unknown(bytes_per_block, config);
        assert_eq!(
            cluster.route().move_wait,
            Duration::from_millis(max_ms.into())
        );
        cluster.learn();
        cluster.route().move_wait
    };
    // Computing takes 320 ms, 20 blocks of a millisecond and the latency 25 ms.
    assert_near(wait(1_000_000, 10, 5_000), 320);
    assert_near(wait(10_000_000, 10, 5_000), 4 * 205);
    assert_near(wait(10_000_000, 1_000, 5_000), 1_000);
    assert_near(wait(10_000_000, 1_000, 500), 500);
}

#[test]
fn a_split_is_waited_for_behind_what_the_helper_computes_first() {
    let mut cluster = Cluster::new(1_000);
    let helper = spec("prefill", WorkerRole::Prefill, 1_000);
    let helper = cluster.scheduler.add_worker(helper).unwrap();
    cluster.scheduler.set_draining(cluster.holder, true);
    let token_ids: Vec<u32> = (20_000..22_000).collect();
    let mut route = || {
        let request = request(&token_ids);
        cluster.scheduler.route(&request, Time(0)).unwrap()
    };
    // Nobody decodes there yet, so it computes for itself.
    assert_eq!(route().move_wait, Duration::ZERO);
    let first = route();
    assert_eq!(first.prefill.unwrap().worker, helper);
    // A prompt of 2,000 tokens that take a millisecond each, and next to nothing to move.
    assert_near(first.move_wait, 4 * (2_000 + 5));
    let second = route();
    assert_eq!(second.prefill.unwrap().worker, helper);
    // Behind the 124 blocks of the first one.
    assert_near(second.move_wait, 4 * (124 * 16 + 2_000 + 5));
}

#[test]
fn exchanges_are_checked() {
    let mut scheduler = Scheduler::new(SchedulerConfig::default()).unwrap();
    for (layout, bytes_per_block) in [(String::new(), 1), ("l".repeat(257), 1), ("l".into(), 0)] {
        let exchange = KvExchange {
            layout,
            bytes_per_block,
        };
        let spec = WorkerSpec {
            kv_exchange: Some(exchange),
            ..spec("w", WorkerRole::Both, 1)
        };
        let error = scheduler.add_worker(spec).unwrap_err().to_string();
        assert!(error.contains("kv_exchange."), "{error}");
    }
}
