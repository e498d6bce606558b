//! How usable the free memory is.
//!
//! `1 − longest / free` misleads: a GPU with one long run and a few slivers scores badly though it can take every
//! request, and one whose only run is too short for all of them scores perfectly. The scores here ask what requests
//! look like instead. With `P` the share of contiguous requests so far (those placed, one vote each):
//!
//! * stranded bytes `F = free · P(size class of a request > longest run)`: free memory, weighed by how probable it is
//!   that a request cannot use it;
//! * `F_alloc(s)`: the share of free memory in runs shorter than `s`, with `s` the median and the 90th percentile of the
//!   requests;
//! * `F_slab` of a domain: the share of the GPUs in use that could be emptied if what is placed could be moved freely.
//!
//! They are reported, and choose nothing.

use std::cmp::Reverse;

use super::{super::place::GpuId, GpuPool, classes::SizeClasses, registry::Gpu};

/// A GPU's memory as placement sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct GpuMemoryUse {
    /// Memory that may be given out.
    pub bytes_total: u64,
    /// Of it, how much is free.
    pub bytes_free: u64,
    /// The longest contiguous free run.
    pub longest_run_bytes: u64,
    /// Free bytes × the probability that a request's size class exceeds the longest run.
    pub bytes_stranded: u64,
    /// `F_alloc(p50)`: the share of the free memory in runs shorter than the median of the requests.
    pub unusable_p50_ratio: f64,
    /// `F_alloc(p90)`: the same for their 90th percentile.
    pub unusable_p90_ratio: f64,
    /// Pieces that placements hold.
    pub num_pieces: u32,
    /// Whether it is out of use: failed, or of a draining domain.
    pub is_out_of_use: bool,
}

/// A domain's memory as placement sees it; sums over its GPUs.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct DomainMemory {
    /// Registered GPUs.
    pub num_gpus: u32,
    /// Of them, how many are out of use.
    pub num_gpus_out_of_use: u32,
    /// Of them, how many hold nothing.
    pub num_gpus_empty: u32,
    /// Memory that may be given out.
    pub bytes_total: u64,
    /// Of it, how much is free.
    pub bytes_free: u64,
    /// Sum of the GPUs' stranded bytes.
    pub bytes_stranded: u64,
    /// The share of the free memory in runs that are too short, as for a GPU.
    pub unusable_p50_ratio: f64,
    /// The same for the 90th percentile.
    pub unusable_p90_ratio: f64,
    /// `F_slab`: the share of the GPUs in use that are more than the placed bytes need, the largest taken first. What
    /// moving all placements could gain at most: gangs and extents that stay whole may need more.
    pub emptiable_ratio: f64,
}

/// How large the contiguous requests were: placed requests by class, rounded up.
#[derive(Clone, Debug, Default)]
pub(super) struct SizeMix {
    by_class: Vec<u64>,
    num: u64,
}

impl SizeMix {
    pub(super) fn add(&mut self, units: u32, classes: &SizeClasses) {
        let (class, _) = classes.round_up(units);
        if self.by_class.len() <= class {
            self.by_class.resize(class + 1, 0);
        }
        self.by_class[class] += 1;
        self.num += 1;
    }

    /// The share of requests whose class has a threshold above `run`.
    fn share_above(&self, run: u32, classes: &SizeClasses) -> f64 {
        if self.num == 0 {
            return 0.0;
        }
        let above = self.by_class.iter().skip(classes.num_held(run));
        above.sum::<u64>() as f64 / self.num as f64
    }

    /// The threshold of the class that the percentile is in; 0 before the first request.
    fn percentile(&self, percent: u64, classes: &SizeClasses) -> u32 {
        let mut seen = 0;
        for (class, num) in self.by_class.iter().enumerate() {
            seen += num;
            if seen * 100 >= self.num * percent && self.num > 0 {
                return classes.threshold(class);
            }
        }
        0
    }
}

impl GpuPool {
    /// Figures of one GPU. O(pieces on it).
    pub(in super::super) fn gpu_memory(&self, id: GpuId) -> Option<GpuMemoryUse> {
        self.gpu(id).map(|gpu| self.gpu_use(gpu))
    }

    fn gpu_use(&self, gpu: &Gpu) -> GpuMemoryUse {
        let unit = self.extent_bytes;
        let percentile = |percent| self.asked.percentile(percent, &self.classes);
        let (p50, p90) = (percentile(50), percentile(90));
        let (mut free, mut longest) = (0_u64, 0);
        let (mut below_p50, mut below_p90) = (0_u64, 0_u64);
        for run in gpu.memory.free_runs() {
            free += u64::from(run.length);
            longest = run.length.max(longest);
            if run.length < p50 {
                below_p50 += u64::from(run.length);
            }
            if run.length < p90 {
                below_p90 += u64::from(run.length);
            }
        }
        let stranded = free as f64 * self.asked.share_above(longest, &self.classes);
        GpuMemoryUse {
            bytes_total: u64::from(gpu.memory.capacity()) * unit,
            bytes_free: free * unit,
            longest_run_bytes: u64::from(longest) * unit,
            bytes_stranded: (stranded * unit as f64) as u64,
            unusable_p50_ratio: ratio(below_p50, free),
            unusable_p90_ratio: ratio(below_p90, free),
            num_pieces: gpu.memory.num_pieces() as u32,
            is_out_of_use: !gpu.is_usable(),
        }
    }

    /// Figures of one domain. O(pieces in it).
    pub(in super::super) fn domain_memory(&self, name: &str) -> Option<DomainMemory> {
        let domain = self.domain(name)?;
        let mut sum = DomainMemory::default();
        let (mut below_p50, mut below_p90) = (0.0, 0.0);
        let mut capacities = Vec::with_capacity(domain.members.len());
        for slot in domain.members.iter().flatten() {
            let Some(gpu) = self.gpus[*slot as usize].as_ref() else {
                continue;
            };
            let gpu = self.gpu_use(gpu);
            sum.num_gpus += 1;
            sum.num_gpus_out_of_use += u32::from(gpu.is_out_of_use);
            sum.num_gpus_empty += u32::from(gpu.num_pieces == 0);
            sum.bytes_total += gpu.bytes_total;
            sum.bytes_free += gpu.bytes_free;
            sum.bytes_stranded += gpu.bytes_stranded;
            below_p50 += gpu.unusable_p50_ratio * gpu.bytes_free as f64;
            below_p90 += gpu.unusable_p90_ratio * gpu.bytes_free as f64;
            if gpu.num_pieces > 0 {
                capacities.push(gpu.bytes_total);
            }
        }
        if sum.bytes_free > 0 {
            sum.unusable_p50_ratio = below_p50 / sum.bytes_free as f64;
            sum.unusable_p90_ratio = below_p90 / sum.bytes_free as f64;
        }
        let num_needed = num_needed(&mut capacities, sum.bytes_total - sum.bytes_free);
        let num_used = capacities.len() as u64;
        sum.emptiable_ratio = ratio(num_used - num_needed, num_used);
        Some(sum)
    }
}

/// The fewest of the GPUs that could hold so many bytes.
fn num_needed(capacities: &mut [u64], bytes: u64) -> u64 {
    capacities.sort_unstable_by_key(|&capacity| Reverse(capacity));
    let mut left = bytes;
    let needed = capacities.iter().take_while(|&&capacity| {
        let is_needed = left > 0;
        left = left.saturating_sub(capacity);
        is_needed
    });
    needed.count() as u64
}

fn ratio(part: u64, whole: u64) -> f64 {
    if whole == 0 {
        return 0.0;
    }
    part as f64 / whole as f64
}
