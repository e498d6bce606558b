//! Faults, drawn from the seed: what happens to which worker or engine, and when it is over.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use parking_lot::Mutex;
use turmoil::Sim;

use crate::{engine, router::ROUTER, trace::Trace, worker};

const OF_WORKERS: [(worker::Misdeed, &str); 8] = [
    (worker::Misdeed::WrongIndex, "fault: wrong index"),
    (worker::Misdeed::UnknownToken, "fault: unknown token"),
    (worker::Misdeed::KvGap, "fault: gap in KV events"),
    (worker::Misdeed::Fail, "fault: sequences failed"),
    (worker::Misdeed::Refuse, "fault: sequences refused"),
    (worker::Misdeed::Stuck, "fault: no steps"),
    (worker::Misdeed::Silent, "fault: silence"),
    (worker::Misdeed::Leave, "fault: left while busy"),
];
const OF_ENGINES: [(engine::Misdeed, &str); 8] = [
    (engine::Misdeed::Cut, "fault: stream cut"),
    (engine::Misdeed::Garbage, "fault: garbage event"),
    (engine::Misdeed::Truncated, "fault: half an event"),
    (engine::Misdeed::Stall, "fault: stall"),
    (engine::Misdeed::Failed, "fault: status 500"),
    (engine::Misdeed::Busy, "fault: status 503"),
    (engine::Misdeed::GarbageAnswer, "fault: garbage answer"),
    (engine::Misdeed::Hang, "fault: no answer"),
];

/// Tells a host what to do wrong next, once.
#[derive(Clone)]
pub(crate) struct Orders<M>(Arc<Mutex<Option<M>>>);

impl<M> Default for Orders<M> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<M: Copy> Orders<M> {
    fn give(&self, misdeed: M) {
        *self.0.lock() = Some(misdeed);
    }

    /// The order, where it is one of these; others stay.
    pub(crate) fn take_if(&self, is_meant: impl FnOnce(M) -> bool) -> Option<M> {
        self.0.lock().take_if(|misdeed| is_meant(*misdeed))
    }
}

/// Whom an order goes to.
#[derive(Clone)]
pub(crate) enum Culprit {
    Worker(Orders<worker::Misdeed>),
    Engine(Orders<engine::Misdeed>),
}

impl Culprit {
    /// Orders the misdeed with this number; what it is.
    fn order(&self, number: usize) -> &'static str {
        match self {
            Self::Worker(orders) => {
                let (misdeed, what) = OF_WORKERS[number];
                orders.give(misdeed);
                what
            }
            Self::Engine(orders) => {
                let (misdeed, what) = OF_ENGINES[number];
                orders.give(misdeed);
                what
            }
        }
    }
}

/// What ends a fault that lasts.
#[derive(Clone, Copy)]
enum Remedy {
    Bounce,
    Repair,
    Release,
}

/// Injects faults into the hosts of workers and engines, one lasting fault at a time for each.
pub(crate) struct Injector {
    rng: fastrand::Rng,
    hosts: Vec<(String, Culprit)>,
    /// By host: when its fault is over, and how.
    lasting: BTreeMap<usize, (Duration, Remedy)>,
    next_at: Duration,
    trace: Trace,
}

impl Injector {
    pub(crate) fn new(seed: u64, hosts: Vec<(String, Culprit)>, trace: Trace) -> Self {
        Self {
            rng: fastrand::Rng::with_seed(seed),
            hosts,
            lasting: BTreeMap::new(),
            next_at: Duration::ZERO,
            trace,
        }
    }

    /// Ends what is over and injects what is due; how many faults that were.
    pub(crate) fn tick(&mut self, sim: &mut Sim<'_>) -> u64 {
        let now = sim.elapsed();
        let is_over = |&(until, _): &(Duration, Remedy)| until <= now;
        let over: Vec<_> = self
            .lasting
            .iter()
            .filter(|(_, it)| is_over(it))
            .map(|(&host, &it)| (host, it.1))
            .collect();
        for (host, remedy) in over {
            self.remedy(sim, host, remedy);
        }
        if now < self.next_at {
            return 0;
        }
        self.next_at = now + Duration::from_millis(self.rng.u64(1..=40));
        let host = self.rng.usize(..self.hosts.len());
        if self.lasting.contains_key(&host) {
            return 0;
        }
        self.inject(sim, host);
        1
    }

    /// Ends every fault, so that what still runs can come to its end.
    pub(crate) fn stop(&mut self, sim: &mut Sim<'_>) {
        for (host, (_, remedy)) in std::mem::take(&mut self.lasting) {
            self.remedy(sim, host, remedy);
        }
    }

    fn inject(&mut self, sim: &mut Sim<'_>, host: usize) {
        let (name, culprit) = &self.hosts[host];
        let name = name.as_str();
        let (what, remedy) = match self.rng.u32(..12) {
            0 => {
                sim.crash(name);
                ("fault: crash", Remedy::Bounce)
            }
            1 => {
                sim.partition(name, ROUTER);
                ("fault: partition", Remedy::Repair)
            }
            2 => {
                // What was on its way arrives late and all at once.
                sim.hold(name, ROUTER);
                ("fault: delay", Remedy::Release)
            }
            3 => {
                sim.bounce(name);
                self.trace.note("fault: restart", host as u64);
                return;
            }
            kind => {
                let what = culprit.order(kind as usize - 4);
                self.trace.note(what, host as u64);
                return;
            }
        };
        self.trace.note(what, host as u64);
        let lasts = Duration::from_millis(self.rng.u64(1..=1500));
        self.lasting.insert(host, (sim.elapsed() + lasts, remedy));
    }

    fn remedy(&mut self, sim: &mut Sim<'_>, host: usize, remedy: Remedy) {
        self.lasting.remove(&host);
        let name = self.hosts[host].0.as_str();
        match remedy {
            Remedy::Bounce => sim.bounce(name),
            Remedy::Repair => sim.repair(name, ROUTER),
            Remedy::Release => sim.release(name, ROUTER),
        }
    }
}
