//! Whole runs.

use std::{cell::Cell, env, rc::Rc, time::Duration};

use parking_lot::Mutex;

use crate::{
    client, engine,
    faults::{Culprit, Injector, Orders},
    router::{self, ENGINES, ROUTER},
    trace::Trace,
    worker,
};

const WORKERS: usize = 6;
/// Runs of one test, each with a seed of its own.
const RUNS: u64 = 4;
/// How far a host runs before the next one does; coarser is faster.
const TICK: Duration = Duration::from_millis(2);
/// Longer than any run takes, in simulated time.
const TIME_LIMIT: Duration = Duration::from_secs(1 << 20);
/// How long requests may take to end after the last fault, in simulated time.
const LAST_REQUESTS: Duration = Duration::from_secs(600);

/// One run at a time: libraries number things across the whole process, and order by these numbers.
static ALONE: Mutex<()> = Mutex::new(());

/// tokio keeps tasks by their numbers in a few lists, which it ends one after another where a host crashes. Two runs of a
/// seed have to begin at alike numbers.
fn align_task_numbers() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    let next = || runtime.spawn(async {}).id().to_string();
    while !next().parse::<u64>().unwrap().is_multiple_of(1024) {}
}

/// A simulated cluster under `num_faults` faults, to the end of its last request.
fn run(seed: u64, num_faults: u64) -> Trace {
    align_task_numbers();
    let trace = Trace::default();
    let mut sim = turmoil::Builder::new()
        .rng_seed(seed)
        .tick_duration(TICK)
        .simulation_duration(TIME_LIMIT)
        .min_message_latency(Duration::from_micros(200))
        .max_message_latency(Duration::from_millis(3))
        .tcp_capacity(1 << 20)
        .build();
    fastrand::seed(seed);
    sim.host(ROUTER, router::run);
    let mut hosts = Vec::new();
    for number in 0..WORKERS {
        let (name, orders) = (format!("w{number}"), Orders::default());
        hosts.push((name.clone(), Culprit::Worker(orders.clone())));
        let trace = trace.clone();
        sim.host(name.clone(), move || {
            worker::run(name.clone(), orders.clone(), trace.clone())
        });
    }
    for name in ENGINES {
        let orders = Orders::default();
        hosts.push((name.to_owned(), Culprit::Engine(orders.clone())));
        sim.host(name, move || engine::run(orders.clone()));
    }
    let is_over = Rc::new(Cell::new(false));
    sim.client(
        "clients",
        client::run(seed, Rc::clone(&is_over), trace.clone()),
    );

    let mut injector = Injector::new(seed, hosts, trace.clone());
    let mut injected = 0;
    while injected < num_faults {
        injected += injector.tick(&mut sim);
        assert!(!sim.step().unwrap(), "the clients ended by themselves");
        show_progress(injected, num_faults);
    }
    injector.stop(&mut sim);
    is_over.set(true);
    let time_limit = sim.elapsed() + LAST_REQUESTS;
    while !sim.step().unwrap() {
        assert!(
            sim.elapsed() < time_limit,
            "seed {seed}: a request never ended; {}",
            trace.summary()
        );
    }
    eprintln!(
        "seed {seed}: {injected} faults in {:?} simulated; {}",
        sim.elapsed(),
        trace.summary()
    );
    trace
}

fn show_progress(injected: u64, num_faults: u64) {
    if injected > 0 && injected.is_multiple_of(10_000) && injected < num_faults {
        eprint!("\r{injected} of {num_faults} faults ");
    }
}

fn setting(name: &str) -> Option<u64> {
    env::var(name).ok().map(|value| value.parse().unwrap())
}

#[test]
fn no_token_is_lost_repeated_or_out_of_order() {
    let _alone = ALONE.lock();
    let faults_per_run = setting("FAULTS").unwrap_or(240) / RUNS;
    let first_seed = setting("SEED").unwrap_or(1);
    let (mut all_stopped, mut engines_stopped) = (0, 0);
    for seed in first_seed..first_seed + RUNS {
        let trace = run(seed, faults_per_run);
        for what in ["answered", "engines: answered"] {
            assert!(
                trace.count(what) > faults_per_run / 10,
                "{what}: {}",
                trace.summary()
            );
        }
        engines_stopped += trace.count("engines: stopped for others");
        all_stopped += trace.count("stopped for others");
    }
    // Workers' and engines' streams both gave way.
    assert!(engines_stopped > 0 && all_stopped > engines_stopped);
}

#[test]
fn a_seed_is_one_history() {
    let _alone = ALONE.lock();
    let history = run(7, 40).fingerprint();
    assert_eq!(history, run(7, 40).fingerprint());
    assert_ne!(history, run(8, 40).fingerprint());
}
