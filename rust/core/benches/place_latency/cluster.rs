//! The simulated cluster and its arrivals: gangs of 1, 2, 4 and 8 GPUs, log-normal extents, Poisson arrivals,
//! exponential lifetimes; rejected gangs are lost.

use std::{cmp::Reverse, collections::BinaryHeap};

use orchestra_core::scheduler::{GpuSpec, Scheduler, SchedulerConfig};
use rustc_hash::FxHashMap;

pub(crate) const SLOT_BYTES: u64 = 64 << 20;
/// 80 GiB.
pub(crate) const SLOTS_PER_GPU: usize = 1_280;

pub(crate) struct Cluster {
    pub(crate) num_gpus: usize,
    pub(crate) domain_size: usize,
}

impl Cluster {
    /// About `num_gpus` GPUs in whole domains.
    pub(crate) fn new(num_gpus: usize, domain_size: usize) -> Self {
        let num_gpus = (num_gpus as f64 / domain_size as f64).round() as usize * domain_size;
        Self {
            num_gpus,
            domain_size,
        }
    }

    pub(crate) fn scheduler(&self) -> Scheduler {
        let mut scheduler = Scheduler::new(SchedulerConfig::default()).unwrap();
        for gpu in 0..self.num_gpus {
            let spec = GpuSpec {
                name: format!("gpu-{gpu}"),
                domain: format!("domain-{}", gpu / self.domain_size),
                node: format!("node-{}", gpu / 8),
                rack: None,
                memory_bytes: SLOTS_PER_GPU as u64 * SLOT_BYTES,
            };
            scheduler.add_gpu(spec).unwrap();
        }
        scheduler
    }
}

/// What is simulated: whoever places gangs and gives their memory back.
pub(crate) trait Placer {
    type Held;

    fn place(&mut self, num_gpus: usize, slots: usize) -> Option<Self::Held>;
    fn release(&mut self, held: Self::Held);
}

pub(crate) struct Gang {
    pub(crate) at: f64,
    pub(crate) lifetime: f64,
    pub(crate) num_gpus: usize,
    pub(crate) slots: usize,
}

/// Draws gangs such that what they demand over time is `load` times the memory of the cluster.
pub(crate) struct Arrivals {
    random: Random,
    mix: Mix,
    gap: f64,
    now: f64,
}

/// How large extents are: median slots and the deviation of their logarithm. Cut to 8 slots and to 3/4 of a GPU.
#[derive(Clone, Copy)]
pub(crate) struct Mix {
    pub(crate) median_slots: f64,
    pub(crate) sigma: f64,
}

const WIDTHS: [usize; 4] = [1, 2, 4, 8];
const WEIGHTS: [f64; 4] = [0.4, 0.2, 0.2, 0.2];

impl Arrivals {
    pub(crate) fn new(seed: u64, load: f64, mix: Mix, cluster: &Cluster) -> Self {
        // The mean demand of a gang, by sampling: the cut tails have no closed form worth its lines.
        let mut random = Random(0);
        let num_samples = 200_000;
        let demand: usize = (0..num_samples)
            .map(|_| {
                let (num_gpus, slots) = random.gang(mix);
                num_gpus * slots
            })
            .sum();
        let mean = demand as f64 / f64::from(num_samples);
        let capacity = (cluster.num_gpus * SLOTS_PER_GPU) as f64;
        Self {
            random: Random(seed),
            mix,
            gap: mean / (capacity * load),
            now: 0.0,
        }
    }

    fn next(&mut self) -> Gang {
        self.now += self.random.exponential() * self.gap;
        let (num_gpus, slots) = self.random.gang(self.mix);
        Gang {
            at: self.now,
            lifetime: self.random.exponential(),
            num_gpus,
            slots,
        }
    }
}

#[derive(Default)]
pub(crate) struct Rejects {
    pub(crate) rejected: f64,
    pub(crate) demanded: f64,
}

/// One placer under load.
pub(crate) struct Run<P: Placer> {
    pub(crate) placer: P,
    arrivals: Arrivals,
    held: FxHashMap<u64, P::Held>,
    /// (end of life in bits, number of the gang).
    ends: BinaryHeap<Reverse<(u64, u64)>>,
    num_arrived: u64,
}

impl<P: Placer> Run<P> {
    pub(crate) fn new(placer: P, arrivals: Arrivals) -> Self {
        Self {
            placer,
            arrivals,
            held: FxHashMap::default(),
            ends: BinaryHeap::new(),
            num_arrived: 0,
        }
    }

    /// Plays `num` arrivals and the ends of life between them.
    pub(crate) fn drive(&mut self, num: usize) -> Rejects {
        let mut rejects = Rejects::default();
        for _ in 0..num {
            let gang = self.arrivals.next();
            // The bits of positive floats are in the order of the floats.
            while let Some(&Reverse((end, number))) = self.ends.peek()
                && end <= gang.at.to_bits()
            {
                self.ends.pop();
                self.placer.release(self.held.remove(&number).unwrap());
            }
            let demand = (gang.num_gpus * gang.slots) as f64 * gang.lifetime;
            rejects.demanded += demand;
            match self.placer.place(gang.num_gpus, gang.slots) {
                Some(held) => {
                    self.num_arrived += 1;
                    let end = (gang.at + gang.lifetime).to_bits();
                    self.ends.push(Reverse((end, self.num_arrived)));
                    self.held.insert(self.num_arrived, held);
                }
                None => rejects.rejected += demand,
            }
        }
        rejects
    }
}

/// splitmix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// In (0, 1].
    fn unit(&mut self) -> f64 {
        ((self.next() >> 11) + 1) as f64 / (1_u64 << 53) as f64
    }

    fn exponential(&mut self) -> f64 {
        -self.unit().ln()
    }

    fn gang(&mut self, mix: Mix) -> (usize, usize) {
        let mut draw = self.unit();
        let mut width = WIDTHS[WIDTHS.len() - 1];
        for (candidate, weight) in WIDTHS.into_iter().zip(WEIGHTS) {
            draw -= weight;
            if draw <= 0.0 {
                width = candidate;
                break;
            }
        }
        let normal =
            (2.0 * self.exponential()).sqrt() * (std::f64::consts::TAU * self.unit()).cos();
        let slots = mix.median_slots * (mix.sigma * normal).exp();
        (
            width,
            slots.clamp(8.0, SLOTS_PER_GPU as f64 * 0.75) as usize,
        )
    }
}
