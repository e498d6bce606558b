//! First fit and best fit from their textbook descriptions, for gangs: all GPUs are looked at.
//!
//! * first fit: the first domain with enough GPUs that have a long enough free run, its first such GPUs, the first
//!   such run, from its low end;
//! * best fit: in every domain the GPUs whose tightest long-enough run leaves the least over, the domain where these
//!   leave the least over in sum, from the low end of the tightest run.

use std::time::Instant;

use crate::cluster::{Cluster, Placer, SLOTS_PER_GPU};

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rule {
    FirstFit,
    BestFit,
}

impl Rule {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::FirstFit => "first-fit scan",
            Self::BestFit => "best-fit scan",
        }
    }
}

pub(crate) struct Baseline {
    rule: Rule,
    domain_size: usize,
    /// Free runs of each GPU as (offset, length), by address.
    gpus: Vec<Vec<(usize, usize)>>,
    /// Nanoseconds of every choice, where wanted.
    pub(crate) samples: Option<Vec<u64>>,
}

/// (GPU, offset, length) of each member.
pub(crate) type Held = Vec<(usize, usize, usize)>;

impl Baseline {
    pub(crate) fn new(cluster: &Cluster, rule: Rule) -> Self {
        Self {
            rule,
            domain_size: cluster.domain_size,
            gpus: vec![vec![(0, SLOTS_PER_GPU)]; cluster.num_gpus],
            samples: None,
        }
    }

    /// What is left over of the run that the rule takes, and its offset.
    fn fit(&self, gpu: usize, slots: usize) -> Option<(usize, usize)> {
        let fits = self.gpus[gpu]
            .iter()
            .filter(|&&(_, length)| length >= slots);
        let mut fits = fits.map(|&(offset, length)| (length - slots, offset));
        match self.rule {
            Rule::FirstFit => fits.next(),
            Rule::BestFit => fits.min(),
        }
    }

    fn choose(&self, num_gpus: usize, slots: usize) -> Option<Held> {
        let mut best: Option<(usize, Held)> = None;
        for domain in 0..self.gpus.len() / self.domain_size {
            let members = domain * self.domain_size..(domain + 1) * self.domain_size;
            let fits = members.filter_map(|gpu| {
                let (left, offset) = self.fit(gpu, slots)?;
                Some((left, gpu, offset))
            });
            let mut fits: Vec<(usize, usize, usize)> = match self.rule {
                Rule::FirstFit => fits.take(num_gpus).collect(),
                Rule::BestFit => fits.collect(),
            };
            if fits.len() < num_gpus {
                continue;
            }
            if self.rule == Rule::BestFit {
                fits.sort_unstable();
                fits.truncate(num_gpus);
            }
            let left = fits.iter().map(|&(left, ..)| left).sum();
            let gang = || {
                fits.iter()
                    .map(|&(_, gpu, offset)| (gpu, offset, slots))
                    .collect()
            };
            if self.rule == Rule::FirstFit {
                return Some(gang());
            }
            if best.as_ref().is_none_or(|&(least, _)| left < least) {
                best = Some((left, gang()));
            }
        }
        best.map(|(_, gang)| gang)
    }
}

impl Placer for Baseline {
    type Held = Held;

    fn place(&mut self, num_gpus: usize, slots: usize) -> Option<Held> {
        let start = Instant::now();
        let gang = self.choose(num_gpus, slots);
        if let Some(samples) = &mut self.samples {
            samples.push(start.elapsed().as_nanos() as u64);
        }
        for &(gpu, offset, length) in gang.iter().flatten() {
            let runs = &mut self.gpus[gpu];
            let at = runs.iter().position(|&(start, _)| start == offset).unwrap();
            runs[at] = (offset + length, runs[at].1 - length);
            if runs[at].1 == 0 {
                runs.remove(at);
            }
        }
        gang
    }

    fn release(&mut self, held: Held) {
        for (gpu, offset, length) in held {
            let runs = &mut self.gpus[gpu];
            let at = runs.partition_point(|&(start, _)| start < offset);
            runs.insert(at, (offset, length));
            if at + 1 < runs.len() && runs[at].0 + runs[at].1 == runs[at + 1].0 {
                runs[at].1 += runs.remove(at + 1).1;
            }
            if at > 0 && runs[at - 1].0 + runs[at - 1].1 == runs[at].0 {
                runs[at - 1].1 += runs.remove(at).1;
            }
        }
    }
}

/// The bound that no rule can beat by much: all memory in one pool, without GPUs and domains.
pub(crate) struct Pooled(pub(crate) usize);

impl Pooled {
    pub(crate) fn new(cluster: &Cluster) -> Self {
        Self(cluster.num_gpus * SLOTS_PER_GPU)
    }
}

impl Placer for Pooled {
    type Held = usize;

    fn place(&mut self, num_gpus: usize, slots: usize) -> Option<usize> {
        let demand = num_gpus * slots;
        self.0 = self.0.checked_sub(demand)?;
        Some(demand)
    }

    fn release(&mut self, held: usize) {
        self.0 += held;
    }
}
