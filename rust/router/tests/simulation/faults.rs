//! Faults, drawn from the seed: what happens to which worker, and when it is over.

use std::{collections::BTreeMap, time::Duration};

use turmoil::Sim;

use crate::{
    router::ROUTER,
    trace::Trace,
    worker::{Misdeed, Orders},
};

const MISDEEDS: [(Misdeed, &str); 8] = [
    (Misdeed::WrongIndex, "fault: wrong index"),
    (Misdeed::UnknownToken, "fault: unknown token"),
    (Misdeed::KvGap, "fault: gap in KV events"),
    (Misdeed::Fail, "fault: sequences failed"),
    (Misdeed::Refuse, "fault: sequences refused"),
    (Misdeed::Stuck, "fault: no steps"),
    (Misdeed::Silent, "fault: silence"),
    (Misdeed::Leave, "fault: left while busy"),
];

/// What ends a fault that lasts.
#[derive(Clone, Copy)]
enum Remedy {
    Bounce,
    Repair,
    Release,
}

/// Injects faults into the workers' hosts, one fault at a time for each.
pub(crate) struct Injector {
    rng: fastrand::Rng,
    workers: Vec<(String, Orders)>,
    /// By worker: when its fault is over, and how.
    lasting: BTreeMap<usize, (Duration, Remedy)>,
    next_at: Duration,
    trace: Trace,
}

impl Injector {
    pub(crate) fn new(seed: u64, workers: Vec<(String, Orders)>, trace: Trace) -> Self {
        Self {
            rng: fastrand::Rng::with_seed(seed),
            workers,
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
            .map(|(&worker, &it)| (worker, it.1))
            .collect();
        for (worker, remedy) in over {
            self.remedy(sim, worker, remedy);
        }
        if now < self.next_at {
            return 0;
        }
        self.next_at = now + Duration::from_millis(self.rng.u64(1..=40));
        let worker = self.rng.usize(..self.workers.len());
        if self.lasting.contains_key(&worker) {
            return 0;
        }
        self.inject(sim, worker);
        1
    }

    /// Ends every fault, so that what still runs can come to its end.
    pub(crate) fn stop(&mut self, sim: &mut Sim<'_>) {
        for (worker, (_, remedy)) in std::mem::take(&mut self.lasting) {
            self.remedy(sim, worker, remedy);
        }
    }

    fn inject(&mut self, sim: &mut Sim<'_>, worker: usize) {
        let (name, orders) = &self.workers[worker];
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
                self.trace.note("fault: restart", worker as u64);
                return;
            }
            kind => {
                let (misdeed, what) = MISDEEDS[kind as usize - 4];
                orders.give(misdeed);
                self.trace.note(what, worker as u64);
                return;
            }
        };
        self.trace.note(what, worker as u64);
        let lasts = Duration::from_millis(self.rng.u64(1..=1500));
        self.lasting.insert(worker, (sim.elapsed() + lasts, remedy));
    }

    fn remedy(&mut self, sim: &mut Sim<'_>, worker: usize, remedy: Remedy) {
        self.lasting.remove(&worker);
        let name = self.workers[worker].0.as_str();
        match remedy {
            Remedy::Bounce => sim.bounce(name),
            Remedy::Repair => sim.repair(name, ROUTER),
            Remedy::Release => sim.release(name, ROUTER),
        }
    }
}
