//! How long placing gangs takes at 10,000 GPUs, and how much demand is rejected at high load.
//!
//! `cargo bench -p orchestra-core --bench place_latency` prints both tables. `-- latency` or `-- rejects` prints one.
//! The baselines are written from their published descriptions; they scan all GPUs.

#![expect(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a benchmark prints, or fails loudly"
)]
#![expect(clippy::disallowed_methods, reason = "a benchmark reads the clock")]

#[path = "place_latency/baselines.rs"]
mod baselines;
#[path = "place_latency/cluster.rs"]
mod cluster;

use std::time::Instant;

use orchestra_core::scheduler::{Layout, PlaceRequest, Scheduler};

use baselines::{Baseline, Pooled, Rule};
use cluster::{Arrivals, Cluster, Mix, Placer, Rejects, Run, SLOT_BYTES, SLOTS_PER_GPU};

/// Domains of eight GPUs, and of 72.
const CLUSTERS: [(&str, usize); 2] = [("HGX-8", 8), ("NVL72", 72)];
/// Median extents of 5 % and of 12.5 % of a GPU.
const MIXES: [Mix; 2] = [
    Mix {
        median_slots: 64.0,
        sigma: 1.0,
    },
    Mix {
        median_slots: 160.0,
        sigma: 0.8,
    },
];
const NUM_SEEDS: u64 = 3;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let wants = |name: &str| {
        let named = arguments.iter().any(|argument| argument == name);
        named
            || !["latency", "rejects"]
                .iter()
                .any(|n| arguments.iter().any(|a| a == n))
    };
    if wants("latency") {
        latency();
    }
    if wants("rejects") {
        rejects();
    }
}

/// Orchestra as the simulator sees it.
struct Orchestra {
    scheduler: Scheduler,
    layout: Layout,
    samples: Samples,
}

#[derive(Default)]
struct Samples {
    is_on: bool,
    find: Vec<u64>,
    refuse: Vec<u64>,
    place: Vec<u64>,
    release: Vec<u64>,
}

impl Orchestra {
    fn new(cluster: &Cluster, layout: Layout) -> Self {
        Self {
            scheduler: cluster.scheduler(),
            layout,
            samples: Samples::default(),
        }
    }
}

impl Placer for Orchestra {
    type Held = orchestra_core::scheduler::PlacementId;

    fn place(&mut self, num_gpus: usize, slots: usize) -> Option<Self::Held> {
        let request = PlaceRequest {
            num_gpus: num_gpus as u32,
            bytes_per_gpu: slots as u64 * SLOT_BYTES,
            layout: self.layout,
            ..PlaceRequest::default()
        };
        if !self.samples.is_on {
            return self.scheduler.place(&request).ok().map(|placed| placed.id);
        }
        let start = Instant::now();
        let found = self.scheduler.preview_place(&request);
        let nanos = start.elapsed().as_nanos() as u64;
        if found.is_err() {
            self.samples.refuse.push(nanos);
            return None;
        }
        self.samples.find.push(nanos);
        drop(found);
        let start = Instant::now();
        let placed = self.scheduler.place(&request);
        self.samples.place.push(start.elapsed().as_nanos() as u64);
        placed.ok().map(|placed| placed.id)
    }

    fn release(&mut self, held: Self::Held) {
        let start = Instant::now();
        self.scheduler.release_placement(held);
        if self.samples.is_on {
            self.samples.release.push(start.elapsed().as_nanos() as u64);
        }
    }
}

fn latency() {
    println!("latency in ns at 10,000 GPUs of {SLOTS_PER_GPU} slots, 90 % offered load");
    println!(
        "{:8} {:11} {:16} {:>8} {:>7} {:>7} {:>7} {:>9}",
        "cluster", "layout", "operation", "samples", "p50", "p99", "p99.9", "max"
    );
    for (name, domain_size) in CLUSTERS {
        let cluster = Cluster::new(10_000, domain_size);
        for layout in [Layout::Contiguous, Layout::Paged] {
            let arrivals = Arrivals::new(1, 0.9, MIXES[0], &cluster);
            let mut run = Run::new(Orchestra::new(&cluster, layout), arrivals);
            run.drive(100_000);
            run.placer.samples.is_on = true;
            run.drive(200_000);
            run.placer.scheduler.check_integrity();
            let mut displace = displacements(&mut run.placer.scheduler, layout);
            let Samples {
                mut find,
                mut refuse,
                mut place,
                mut release,
                ..
            } = run.placer.samples;
            let layout = format!("{layout:?}").to_lowercase();
            histogram(name, &layout, "find", &mut find);
            histogram(name, &layout, "find, refused", &mut refuse);
            histogram(name, &layout, "find + commit", &mut place);
            histogram(name, &layout, "release", &mut release);
            histogram(name, &layout, "find, displacing", &mut displace);
        }
        for rule in [Rule::FirstFit, Rule::BestFit] {
            let arrivals = Arrivals::new(1, 0.9, MIXES[0], &cluster);
            let mut run = Run::new(Baseline::new(&cluster, rule), arrivals);
            run.drive(60_000);
            run.placer.samples = Some(Vec::new());
            run.drive(5_000);
            let mut samples = run.placer.samples.take().unwrap();
            histogram(name, "contiguous", rule.name(), &mut samples);
        }
    }
}

/// Finds, in a cluster filled to the last median extent, for gangs of one and of eight GPUs that need all of their
/// memory and so displace others.
fn displacements(scheduler: &mut Scheduler, layout: Layout) -> Vec<u64> {
    let filler = PlaceRequest {
        num_gpus: 1,
        bytes_per_gpu: MIXES[0].median_slots as u64 * SLOT_BYTES,
        replay_cost: 1,
        ..PlaceRequest::default()
    };
    while scheduler.place(&filler).is_ok() {}
    let finds = [1, 8].into_iter().cycle().take(100).map(|num_gpus| {
        let request = PlaceRequest {
            num_gpus,
            bytes_per_gpu: SLOTS_PER_GPU as u64 * SLOT_BYTES,
            layout,
            priority: 1,
            ..PlaceRequest::default()
        };
        let start = Instant::now();
        let found = scheduler.preview_place(&request);
        let nanos = start.elapsed().as_nanos() as u64;
        (nanos, found.is_ok_and(|(_, victims)| !victims.is_empty()))
    });
    let displacing = finds.filter(|&(_, displaces)| displaces);
    displacing.map(|(nanos, _)| nanos).collect()
}

fn histogram(cluster: &str, layout: &str, operation: &str, samples: &mut [u64]) {
    samples.sort_unstable();
    let at = |share: f64| {
        let index = (samples.len() as f64 * share) as usize;
        samples.get(index).copied().unwrap_or(0)
    };
    println!(
        "{cluster:8} {layout:11} {operation:16} {:>8} {:>7} {:>7} {:>7} {:>9}",
        samples.len(),
        at(0.5),
        at(0.99),
        at(0.999),
        samples.last().copied().unwrap_or(0),
    );
}

fn rejects() {
    println!(
        "rejected share of demanded memory, %, 1,000 GPUs, mean of {NUM_SEEDS} seeds [min, max]"
    );
    for (name, domain_size) in CLUSTERS {
        let cluster = Cluster::new(1_000, domain_size);
        for mix in MIXES {
            let share = mix.median_slots / SLOTS_PER_GPU as f64 * 100.0;
            println!("{name}, median extent {share} % of a GPU");
            reject_row("pooled (bound)", &cluster, mix, || Pooled::new(&cluster));
            for rule in [Rule::FirstFit, Rule::BestFit] {
                reject_row(rule.name(), &cluster, mix, || Baseline::new(&cluster, rule));
            }
            reject_row("orchestra contiguous", &cluster, mix, || {
                Orchestra::new(&cluster, Layout::Contiguous)
            });
            reject_row("orchestra paged", &cluster, mix, || {
                Orchestra::new(&cluster, Layout::Paged)
            });
        }
    }
}

fn reject_row<P: Placer>(rule: &str, cluster: &Cluster, mix: Mix, placer: impl Fn() -> P) {
    let cells = [0.8, 0.9].map(|load| {
        let shares = (1..=NUM_SEEDS).map(|seed| {
            let mut run = Run::new(placer(), Arrivals::new(seed, load, mix, cluster));
            run.drive(40_000);
            let Rejects { rejected, demanded } = run.drive(60_000);
            rejected / demanded * 100.0
        });
        let shares: Vec<f64> = shares.collect();
        let mean = shares.iter().sum::<f64>() / shares.len() as f64;
        let min = shares.iter().copied().fold(f64::INFINITY, f64::min);
        let max = shares.iter().copied().fold(0.0, f64::max);
        format!("{mean:.2} [{min:.2}, {max:.2}]")
    });
    println!(
        "  {rule:22} 80 % load {:>20}   90 % load {:>20}",
        cells[0], cells[1]
    );
}
