//! The registered GPUs, their free memory, and what is placed on them.

use std::collections::BTreeMap;

use rustc_hash::FxHashMap;

use super::{
    SchedulerConfig,
    error::SchedulerError,
    extents::{End, FreeRuns},
    place::{Extent, GpuId, GpuSpec, PlaceRequest, PlacedGpu, Placement, PlacementId},
    worker::validate_name,
};

/// Gangs of at least this many GPUs are placed from the high end.
const WIDE_GANG_GPUS: u32 = 4;

#[derive(Clone, Debug)]
struct Gpu {
    spec: GpuSpec,
    free: FreeRuns,
}

/// GPUs that have a run of `units` extents free, to be taken from `end`.
pub(super) struct Gang {
    gpus: Vec<GpuId>,
    units: u64,
    end: End,
}

/// All registered GPUs and what is placed on them.
#[derive(Debug)]
pub(super) struct GpuPool {
    extent_bytes: u64,
    max_num_gpus: u32,
    max_num_placements: u32,
    gpus: BTreeMap<GpuId, Gpu>,
    names: FxHashMap<String, GpuId>,
    /// Domain name → its GPUs, ascending.
    domains: BTreeMap<String, Vec<GpuId>>,
    num_registered: u32,
    placements: BTreeMap<PlacementId, Vec<PlacedGpu>>,
    num_placed: u64,
}

impl GpuPool {
    pub(super) fn new(config: &SchedulerConfig) -> Self {
        Self {
            extent_bytes: config.extent_bytes,
            max_num_gpus: config.max_num_gpus,
            max_num_placements: config.max_num_reservations,
            gpus: BTreeMap::new(),
            names: FxHashMap::default(),
            domains: BTreeMap::new(),
            num_registered: 0,
            placements: BTreeMap::new(),
            num_placed: 0,
        }
    }

    pub(super) fn add(&mut self, spec: GpuSpec) -> Result<GpuId, SchedulerError> {
        validate_name("name", &spec.name)?;
        validate_name("domain", &spec.domain)?;
        validate_name("node", &spec.node)?;
        let units = spec.memory_bytes / self.extent_bytes;
        if units == 0 {
            let (field, expected) = ("memory_bytes", "at least one extent");
            return Err(SchedulerError::InvalidField { field, expected });
        }
        if self.names.contains_key(&spec.name) {
            return Err(SchedulerError::DuplicateName { kind: "gpu" });
        }
        let limit = self.max_num_gpus;
        if self.gpus.len() >= limit as usize {
            return Err(SchedulerError::LimitReached {
                kind: "gpus",
                current: limit,
                limit,
            });
        }
        self.num_registered += 1;
        let id = GpuId(self.num_registered);
        self.names.insert(spec.name.clone(), id);
        self.domains
            .entry(spec.domain.clone())
            .or_default()
            .push(id);
        self.gpus.insert(
            id,
            Gpu {
                spec,
                free: FreeRuns::new(units),
            },
        );
        Ok(id)
    }

    pub(super) fn remove(&mut self, id: GpuId) -> Option<Vec<PlacementId>> {
        if !self.gpus.contains_key(&id) {
            return None;
        }
        let on_gpu = |placed: &[PlacedGpu]| placed.iter().any(|placed| placed.gpu == id);
        let lost: Vec<PlacementId> = self
            .placements
            .iter()
            .filter(|(_, placed)| on_gpu(placed))
            .map(|(&placement, _)| placement)
            .collect();
        for &placement in &lost {
            self.release(placement);
        }
        let gpu = self.gpus.remove(&id)?;
        self.names.remove(&gpu.spec.name);
        if let Some(members) = self.domains.get_mut(&gpu.spec.domain) {
            members.retain(|&member| member != id);
            if members.is_empty() {
                self.domains.remove(&gpu.spec.domain);
            }
        }
        Some(lost)
    }

    /// The GPUs that a gang would get, or why it would get none.
    pub(super) fn choose(&self, request: PlaceRequest) -> Result<Gang, SchedulerError> {
        for (field, value) in [
            ("num_gpus", request.num_gpus.into()),
            ("bytes_per_gpu", request.bytes_per_gpu),
        ] {
            if value == 0 {
                return Err(SchedulerError::InvalidField {
                    field,
                    expected: "at least 1",
                });
            }
        }
        let units = request.bytes_per_gpu.div_ceil(self.extent_bytes);
        let end = if request.num_gpus >= WIDE_GANG_GPUS {
            End::High
        } else {
            End::Low
        };
        match self.find_gang(request.num_gpus as usize, units, end) {
            Some(gpus) => Ok(Gang { gpus, units, end }),
            None => Err(self.refusal(request, units)),
        }
    }

    pub(super) fn place(&mut self, request: PlaceRequest) -> Result<Placement, SchedulerError> {
        let Gang { gpus, units, end } = self.choose(request)?;
        let limit = self.max_num_placements;
        if self.placements.len() >= limit as usize {
            return Err(SchedulerError::LimitReached {
                kind: "placements",
                current: limit,
                limit,
            });
        }
        let length_bytes = units * self.extent_bytes;
        let mut placed = Vec::with_capacity(gpus.len());
        for id in gpus {
            // `choose` saw a run of this length on each of them.
            let Some(gpu) = self.gpus.get_mut(&id) else {
                continue;
            };
            let Some(offset) = gpu.free.take(units, end) else {
                continue;
            };
            let offset_bytes = offset * self.extent_bytes;
            placed.push(PlacedGpu {
                gpu: id,
                extent: Extent {
                    offset_bytes,
                    length_bytes,
                },
            });
        }
        self.num_placed += 1;
        let id = PlacementId(self.num_placed);
        self.placements.insert(id, placed.clone());
        Ok(Placement { id, gpus: placed })
    }

    /// The first domain, seen from `end`, with enough GPUs that have such a run free, and the first of these.
    fn find_gang(&self, num_gpus: usize, units: u64, end: End) -> Option<Vec<GpuId>> {
        let fits = |id: &GpuId| self.gpus.get(id).is_some_and(|gpu| gpu.free.fits(units));
        let gang_of = |members: &Vec<GpuId>| {
            let mut gang: Vec<GpuId> = match end {
                End::Low => members
                    .iter()
                    .copied()
                    .filter(fits)
                    .take(num_gpus)
                    .collect(),
                End::High => members
                    .iter()
                    .rev()
                    .copied()
                    .filter(fits)
                    .take(num_gpus)
                    .collect(),
            };
            gang.sort_unstable();
            (gang.len() == num_gpus).then_some(gang)
        };
        match end {
            End::Low => self.domains.values().find_map(gang_of),
            End::High => self.domains.values().rev().find_map(gang_of),
        }
    }

    fn refusal(&self, request: PlaceRequest, units: u64) -> SchedulerError {
        let PlaceRequest {
            num_gpus,
            bytes_per_gpu,
        } = request;
        let widest = |fits: &dyn Fn(&FreeRuns) -> bool| {
            let count = |members: &Vec<GpuId>| {
                let gpus = members.iter().filter_map(|id| self.gpus.get(id));
                gpus.filter(|gpu| fits(&gpu.free)).count() as u32
            };
            self.domains.values().map(count).max().unwrap_or(0)
        };
        let num_gpus_max = widest(&|memory| memory.total() >= units);
        if num_gpus_max < num_gpus {
            return SchedulerError::GangTooLarge {
                num_gpus,
                bytes_per_gpu,
                num_gpus_max,
            };
        }
        let num_gpus_max = widest(&|memory| memory.fits(units));
        SchedulerError::NoGpuRoom {
            num_gpus,
            bytes_per_gpu,
            num_gpus_max,
        }
    }

    pub(super) fn release(&mut self, id: PlacementId) -> bool {
        let Some(placed) = self.placements.remove(&id) else {
            return false;
        };
        for PlacedGpu { gpu, extent } in placed {
            if let Some(gpu) = self.gpus.get_mut(&gpu) {
                let offset = extent.offset_bytes / self.extent_bytes;
                gpu.free
                    .give_back(offset, extent.length_bytes / self.extent_bytes);
            }
        }
        true
    }

    pub(super) fn by_name(&self, name: &str) -> Option<GpuId> {
        self.names.get(name).copied()
    }

    pub(super) fn spec(&self, id: GpuId) -> Option<&GpuSpec> {
        self.gpus.get(&id).map(|gpu| &gpu.spec)
    }

    pub(super) fn len(&self) -> usize {
        self.gpus.len()
    }

    pub(super) fn num_placements(&self) -> usize {
        self.placements.len()
    }

    pub(super) fn bytes_total(&self) -> u64 {
        self.gpus.values().map(|gpu| gpu.free.total()).sum::<u64>() * self.extent_bytes
    }

    pub(super) fn bytes_free(&self) -> u64 {
        self.gpus.values().map(|gpu| gpu.free.free()).sum::<u64>() * self.extent_bytes
    }

    /// Asserts that on every GPU free runs and placed extents tile the memory, with no two free runs touching.
    pub(super) fn check_integrity(&self) {
        let mut pieces: BTreeMap<GpuId, Vec<(u64, u64, bool)>> = BTreeMap::new();
        for (id, gpu) in &self.gpus {
            let free = gpu
                .free
                .iter()
                .map(|(offset, length)| (offset, length, true));
            pieces.insert(*id, free.collect());
        }
        for placed in self.placements.values() {
            let domains = placed
                .iter()
                .filter_map(|placed| self.gpus.get(&placed.gpu));
            let domains: Vec<&str> = domains.map(|gpu| gpu.spec.domain.as_str()).collect();
            assert_eq!(domains.len(), placed.len(), "a placement outlived its GPU");
            assert!(
                domains.windows(2).all(|pair| pair[0] == pair[1]),
                "a gang spans domains"
            );
            for PlacedGpu { gpu, extent } in placed {
                let offset = extent.offset_bytes / self.extent_bytes;
                let length = extent.length_bytes / self.extent_bytes;
                pieces
                    .entry(*gpu)
                    .or_default()
                    .push((offset, length, false));
            }
        }
        for (id, mut pieces) in pieces {
            pieces.sort_unstable();
            let mut stop = 0;
            let mut was_free = false;
            for (offset, length, is_free) in pieces {
                assert_eq!(offset, stop, "{id:?}: pieces overlap or leave a gap");
                assert!(!(was_free && is_free), "{id:?}: two free runs touch");
                (stop, was_free) = (offset + length, is_free);
            }
            assert_eq!(self.gpus.get(&id).map(|gpu| gpu.free.total()), Some(stop));
        }
        assert_eq!(self.names.len(), self.gpus.len());
        assert_eq!(
            self.domains.values().map(Vec::len).sum::<usize>(),
            self.gpus.len()
        );
    }
}
