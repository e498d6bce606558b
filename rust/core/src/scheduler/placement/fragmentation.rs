//! How usable the free memory is.
//!
//! `1 − longest / free` misleads: a GPU with one long run and a few slivers scores badly though it can take every
//! request, and one whose only run is too short for all of them scores perfectly. The scores here ask what requests
//! look like instead. With `P` the share of contiguous requests so far (those placed, one vote each):
//!
//! * stranded bytes `F = free · P(size class of a request > longest run)`: free memory, weighed by how probable it is
//!   that a request cannot use it;
//! * `unusable(s)`: the share of free memory in runs shorter than `s`, with `s` the 90th percentile of the requests.
//!
//! They are reported, and choose nothing.

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
    /// The share of the free memory in runs shorter than the 90th percentile of the requests.
    pub unusable_ratio: f64,
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
    pub unusable_ratio: f64,
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

    /// The threshold of the class that the 90th percentile is in; 0 before the first request.
    fn p90(&self, classes: &SizeClasses) -> u32 {
        let mut seen = 0;
        for (class, num) in self.by_class.iter().enumerate() {
            seen += num;
            if seen * 10 >= self.num * 9 && self.num > 0 {
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
        let p90 = self.asked.p90(&self.classes);
        let (mut free, mut longest, mut short) = (0_u64, 0, 0_u64);
        for run in gpu.memory.free_runs() {
            free += u64::from(run.length);
            longest = run.length.max(longest);
            if run.length < p90 {
                short += u64::from(run.length);
            }
        }
        let stranded = free as f64 * self.asked.share_above(longest, &self.classes);
        GpuMemoryUse {
            bytes_total: u64::from(gpu.memory.capacity()) * unit,
            bytes_free: free * unit,
            longest_run_bytes: u64::from(longest) * unit,
            bytes_stranded: (stranded * unit as f64) as u64,
            unusable_ratio: ratio(short, free),
            num_pieces: gpu.memory.num_pieces() as u32,
            is_out_of_use: !gpu.is_usable(),
        }
    }

    /// Figures of one domain. O(pieces in it).
    pub(in super::super) fn domain_memory(&self, name: &str) -> Option<DomainMemory> {
        let domain = self.domain(name)?;
        let mut sum = DomainMemory::default();
        let mut bytes_unusable = 0.0;
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
            bytes_unusable += gpu.unusable_ratio * gpu.bytes_free as f64;
        }
        if sum.bytes_free > 0 {
            sum.unusable_ratio = bytes_unusable / sum.bytes_free as f64;
        }
        Some(sum)
    }
}

fn ratio(part: u64, whole: u64) -> f64 {
    if whole == 0 {
        return 0.0;
    }
    part as f64 / whole as f64
}
