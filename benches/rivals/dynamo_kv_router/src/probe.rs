//! Which of Dynamo's indexes is the fastest here: each gets the same events, and is asked for the same prompts.

use std::time::{Duration, Instant};

use crate::{
    caches::{Caches, Change},
    dynamo_index::{Index, Kind, router_events},
    fleet::Size,
    heap,
    prompts::{Prompt, Prompts},
    report::Samples,
};

const NUM_PROMPTS: usize = 2_000;

pub struct Probed {
    pub kind: Kind,
    pub find: Samples,
    /// Blocks a second, in events that fill the caches.
    pub fill_rate: f64,
    /// Blocks a second, in events of one prompt at a time.
    pub event_rate: f64,
    pub bytes_per_entry: f64,
}

pub fn probe_indexes(size: Size, prompts: &Prompts) -> Vec<Probed> {
    let probe = |kind| probe_index(size, kind, prompts.clone());
    Kind::ALL.into_iter().map(probe).collect()
}

/// Blocks, and how long their events took.
#[derive(Default)]
struct Rate {
    num_blocks: usize,
    taken: Duration,
}

impl Rate {
    fn apply(&mut self, index: &mut Index, changes: &[Change]) {
        let events = router_events(changes);
        let start = Instant::now();
        index.apply(events);
        self.taken += start.elapsed();
        self.num_blocks += changes.iter().map(Change::num_blocks).sum::<usize>();
    }

    fn per_second(&self) -> f64 {
        self.num_blocks as f64 / self.taken.as_secs_f64()
    }
}

fn probe_index(size: Size, kind: Kind, mut prompts: Prompts) -> Probed {
    let mut index = Index::new(kind);
    let mut caches = Caches::new(size);
    let (mut fill, mut bytes) = (Rate::default(), 0);
    caches.fill(&mut prompts, |changes| {
        bytes += heap::counted(|| fill.apply(&mut index, changes)).1;
    });
    let num_entries = caches.num_entries;
    let (mut find, mut events) = (Samples::default(), Rate::default());
    for prompt in prompts.take(NUM_PROMPTS) {
        find.add(timed_find(&index, &prompt), true);
        let change = caches.store(prompt.home(size.num_workers), &prompt);
        if change.num_blocks() > 0 {
            events.apply(&mut index, &[change]);
        }
    }
    Probed {
        kind,
        find,
        fill_rate: fill.per_second(),
        event_rate: events.per_second(),
        bytes_per_entry: bytes as f64 / num_entries as f64,
    }
}

fn timed_find(index: &Index, prompt: &Prompt) -> Duration {
    let start = Instant::now();
    let scores = index.find(&prompt.local);
    let taken = start.elapsed();
    std::hint::black_box(scores);
    taken
}
