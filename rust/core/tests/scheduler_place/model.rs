//! The naive model: one owner per extent, every answer checked by looking at all of them.

use std::{cmp::Reverse, collections::BTreeMap, ops::Range};

use orchestra_core::{
    ErrorCode, Time,
    scheduler::{
        GpuId, GpuSpec, Layout, PlaceRequest, PlacedGpu, Placement, PlacementId, Scheduler,
        SchedulerConfig, SchedulerError,
    },
};
use proptest::prelude::*;

pub(crate) const EXTENT: u64 = 1 << 20;

pub(crate) struct ModelGpu {
    pub(crate) id: GpuId,
    domain: usize,
    is_failed: bool,
    /// Who holds each extent.
    extents: Vec<Option<PlacementId>>,
}

#[derive(Clone, Debug)]
pub(crate) enum Op {
    AddGpu { domain: usize, extents: u64 },
    RemoveGpu(usize),
    FailGpu(usize),
    RestoreGpu(usize),
    Drain { domain: usize, is_draining: bool },
    Place(PlaceRequest),
    PlaceBatch(Vec<PlaceRequest>),
    Release(usize),
    SetExpiry(usize, Option<u64>),
    Expire(u64),
}

fn request() -> impl Strategy<Value = PlaceRequest> {
    let (gpus, bytes) = (1_u32..6, 1_u64..10 * EXTENT);
    let layout = prop_oneof![Just(Layout::Contiguous), Just(Layout::Paged)];
    let expires_at = prop::option::of((0_u64..100).prop_map(Time));
    (gpus, bytes, 0_u8..4, layout, 0_u64..50, expires_at).prop_map(
        |(num_gpus, bytes_per_gpu, priority, layout, replay_cost, expires_at)| PlaceRequest {
            num_gpus,
            bytes_per_gpu,
            priority,
            layout,
            replay_cost,
            expires_at,
        },
    )
}

pub(crate) fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => (0_usize..3, 1_u64..24)
            .prop_map(|(domain, extents)| Op::AddGpu { domain, extents }),
        1 => (0_usize..100).prop_map(Op::RemoveGpu),
        1 => (0_usize..100).prop_map(Op::FailGpu),
        1 => (0_usize..100).prop_map(Op::RestoreGpu),
        2 => (0_usize..3, prop::bool::weighted(0.3))
            .prop_map(|(domain, is_draining)| Op::Drain { domain, is_draining }),
        20 => request().prop_map(Op::Place),
        1 => prop::collection::vec(request(), 0..5).prop_map(Op::PlaceBatch),
        6 => (0_usize..100).prop_map(Op::Release),
        1 => (0_usize..100, prop::option::of(0_u64..100))
            .prop_map(|(pick, at)| Op::SetExpiry(pick, at)),
        1 => (0_u64..100).prop_map(Op::Expire),
    ]
}

pub(crate) struct Pair {
    pub(crate) real: Scheduler,
    pub(crate) gpus: Vec<ModelGpu>,
    draining: [bool; 3],
    pub(crate) placements: BTreeMap<PlacementId, PlaceRequest>,
    num_named: usize,
}

impl Pair {
    pub(crate) fn new() -> Self {
        let config = SchedulerConfig {
            extent_bytes: EXTENT,
            ..SchedulerConfig::default()
        };
        Self {
            real: Scheduler::new(config).unwrap(),
            gpus: Vec::new(),
            draining: [false; 3],
            placements: BTreeMap::new(),
            num_named: 0,
        }
    }

    /// Most GPUs of one domain for which `fits` holds.
    fn widest(&self, fits: impl Fn(&ModelGpu) -> bool) -> u32 {
        let count = |domain| {
            let here = self.gpus.iter().filter(|gpu| gpu.domain == domain);
            here.filter(|&gpu| fits(gpu)).count() as u32
        };
        (0..3).map(count).max().unwrap_or(0)
    }

    /// Whether the extent is free for a request of this priority.
    fn is_open(&self, extent: Option<PlacementId>, priority: u8) -> bool {
        extent.is_none_or(|id| self.placements[&id].priority < priority)
    }

    /// Whether the GPU has room for the request, all that is below `priority` gone.
    fn fits(&self, gpu: &ModelGpu, request: &PlaceRequest, priority: u8) -> bool {
        let length = length(request);
        if gpu.is_failed || self.draining[gpu.domain] {
            return false;
        }
        let is_open = |&extent: &Option<PlacementId>| self.is_open(extent, priority);
        match request.layout {
            Layout::Contiguous => {
                let mut runs = gpu.extents.windows(length);
                runs.any(|run| run.iter().all(is_open))
            }
            Layout::Paged => gpu.extents.iter().filter(|e| is_open(e)).count() >= length,
        }
    }

    pub(crate) fn add_gpu(&mut self, domain: usize, extents: u64) {
        self.num_named += 1;
        let spec = GpuSpec {
            name: format!("gpu-{}", self.num_named),
            domain: format!("domain-{domain}"),
            node: "node".to_owned(),
            memory_bytes: extents * EXTENT + EXTENT / 2, // the half extent is not given out
        };
        let id = self.real.add_gpu(spec).unwrap();
        self.gpus.push(ModelGpu {
            id,
            domain,
            is_failed: false,
            extents: vec![None; extents as usize],
        });
    }

    fn forget(&mut self, placement: PlacementId) {
        for extent in self.gpus.iter_mut().flat_map(|gpu| &mut gpu.extents) {
            if *extent == Some(placement) {
                *extent = None;
            }
        }
        assert!(self.placements.remove(&placement).is_some());
    }

    fn pick_gpu(&self, pick: usize) -> Option<usize> {
        pick.checked_rem(self.gpus.len())
    }

    fn pick_placement(&self, pick: usize) -> Option<PlacementId> {
        let index = pick.checked_rem(self.placements.len())?;
        self.placements.keys().nth(index).copied()
    }

    pub(crate) fn lose_gpu(&mut self, index: usize, is_removed: bool) {
        let id = self.gpus[index].id;
        let expected = placed_on(&self.gpus[index]);
        if is_removed {
            assert_eq!(self.real.remove_gpu(id), Some(expected.clone()));
            assert_eq!(self.real.remove_gpu(id), None);
        } else {
            assert_eq!(self.real.fail_gpu(id), Some(expected.clone()));
            self.gpus[index].is_failed = true;
        }
        for placement in expected {
            self.forget(placement);
        }
        if is_removed {
            let domain = self.gpus.remove(index).domain;
            // The last GPU takes the domain with it, drain and all.
            self.draining[domain] &= self.gpus.iter().any(|gpu| gpu.domain == domain);
        }
    }

    fn drain(&mut self, domain: usize, is_draining: bool) {
        let here = self.gpus.iter().filter(|gpu| gpu.domain == domain);
        let mut expected: Vec<_> = here.clone().flat_map(placed_on).collect();
        expected.sort_unstable();
        expected.dedup();
        let expected = (here.count() > 0).then_some(expected);
        self.draining[domain] = is_draining && expected.is_some();
        let name = format!("domain-{domain}");
        assert_eq!(self.real.set_domain_draining(&name, is_draining), expected);
    }

    fn cost(&self, victims: &[PlacementId]) -> u64 {
        victims
            .iter()
            .map(|id| self.placements[id].replay_cost)
            .sum()
    }

    /// The least that a contiguous extent on any one GPU costs in victims: every window is looked at.
    fn least_cost(&self, request: &PlaceRequest) -> Option<u64> {
        let gpus = self.gpus.iter();
        let usable = gpus.filter(|gpu| !gpu.is_failed && !self.draining[gpu.domain]);
        let windows = usable.flat_map(|gpu| gpu.extents.windows(length(request)));
        let open = windows.filter(|run| run.iter().all(|&e| self.is_open(e, request.priority)));
        let costs = open.map(|run| {
            let mut victims: Vec<PlacementId> = run.iter().flatten().copied().collect();
            victims.dedup();
            victims.sort_unstable();
            victims.dedup();
            self.cost(&victims)
        });
        costs.min()
    }

    fn check_victims(&self, placement: &Placement, request: &PlaceRequest) {
        let victims = &placement.preempted;
        for victim in victims {
            assert!(self.placements[victim].priority < request.priority);
        }
        let fits_free = self.widest(|gpu| self.fits(gpu, request, 0)) >= request.num_gpus;
        assert_eq!(
            victims.is_empty(),
            fits_free,
            "displaced where there was room"
        );
        if request.layout == Layout::Paged {
            return;
        }
        for victim in victims {
            let holds = |placed: &PlacedGpu| {
                let gpu = self.gpus.iter().find(|gpu| gpu.id == placed.gpu).unwrap();
                gpu.extents[range(placed)].contains(&Some(*victim))
            };
            assert!(placement.gpus.iter().any(holds), "a needless victim");
        }
        if request.num_gpus == 1 {
            assert_eq!(self.least_cost(request), Some(self.cost(victims)));
        }
    }

    fn take(&mut self, placement: &Placement, request: &PlaceRequest) {
        self.check_victims(placement, request);
        for &victim in &placement.preempted {
            self.forget(victim);
        }
        let mut sizes: BTreeMap<GpuId, usize> = BTreeMap::new();
        let mut domains = Vec::new();
        for placed in &placement.gpus {
            let mut gpus = self.gpus.iter_mut();
            let gpu = gpus.find(|gpu| gpu.id == placed.gpu).unwrap();
            domains.push(gpu.domain);
            for extent in &mut gpu.extents[range(placed)] {
                assert_eq!(*extent, None, "two placements overlap");
                *extent = Some(placement.id);
            }
            *sizes.entry(placed.gpu).or_default() += range(placed).len();
        }
        domains.dedup();
        assert_eq!(domains.len(), 1, "a gang spans domains");
        assert_eq!(sizes.len(), request.num_gpus as usize);
        assert!(sizes.values().all(|&size| size == length(request)));
        if request.layout == Layout::Contiguous {
            assert_eq!(placement.gpus.len(), sizes.len(), "an extent is in pieces");
        }
        self.placements.insert(placement.id, *request);
    }

    fn check_outcome(
        &mut self,
        request: &PlaceRequest,
        outcome: Result<Placement, SchedulerError>,
    ) {
        let priority = request.priority;
        let widest_now = self.widest(|gpu| self.fits(gpu, request, priority));
        let widest_empty = self.widest(|gpu| gpu.extents.len() >= length(request));
        match outcome {
            Ok(placement) => {
                assert!(widest_now >= request.num_gpus);
                self.take(&placement, request);
            }
            Err(SchedulerError::NoGpuRoom { num_gpus_max, .. }) => {
                assert_eq!(num_gpus_max, widest_now);
                assert!(widest_now < request.num_gpus && widest_empty >= request.num_gpus);
            }
            Err(error) => {
                assert_eq!(error.code(), ErrorCode::InvalidRequest);
                assert_eq!(error.limit(), Some(widest_empty.into()));
                assert!(widest_empty < request.num_gpus);
            }
        }
    }

    pub(crate) fn place(&mut self, request: &PlaceRequest) {
        let before = self.real.stats(Time::ZERO);
        let previewed = self.real.preview_place(request);
        assert_eq!(
            self.real.stats(Time::ZERO),
            before,
            "a preview changed something"
        );
        let outcome = self.real.place(request);
        if outcome.is_err() {
            assert_eq!(
                self.real.stats(Time::ZERO),
                before,
                "a refusal changed something"
            );
        }
        let seen = outcome
            .clone()
            .map(|placed| (placed.gpus, placed.preempted));
        assert_eq!(seen, previewed);
        self.check_outcome(request, outcome);
    }

    /// A batch is the same as placing by priority and then by size.
    fn place_batch(&mut self, requests: &[PlaceRequest]) {
        let outcomes = self.real.place_batch(requests);
        assert_eq!(outcomes.len(), requests.len());
        let mut pairs: Vec<_> = requests.iter().zip(outcomes).collect();
        pairs.sort_by_key(|(request, _)| {
            let bytes = u64::from(request.num_gpus) * request.bytes_per_gpu;
            Reverse((request.priority, bytes))
        });
        for (request, outcome) in pairs {
            self.check_outcome(request, outcome);
        }
    }

    pub(crate) fn release(&mut self, pick: usize) {
        let Some(placement) = self.pick_placement(pick) else {
            return;
        };
        assert!(self.real.release_placement(placement));
        assert!(!self.real.release_placement(placement), "released twice");
        self.forget(placement);
    }

    fn expire(&mut self, now: Time) {
        let due = self.placements.iter().filter_map(|(&id, request)| {
            let at = request.expires_at.filter(|&at| at <= now)?;
            Some((at, id))
        });
        let mut due: Vec<(Time, PlacementId)> = due.collect();
        due.sort_unstable();
        let expected: Vec<PlacementId> = due.into_iter().map(|(_, id)| id).collect();
        assert_eq!(self.real.expire_placements(now), expected);
        for placement in expected {
            self.forget(placement);
        }
    }

    pub(crate) fn apply(&mut self, op: &Op) {
        match *op {
            Op::AddGpu { domain, extents } => self.add_gpu(domain, extents),
            Op::RemoveGpu(pick) | Op::FailGpu(pick) => {
                if let Some(index) = self.pick_gpu(pick) {
                    self.lose_gpu(index, matches!(op, Op::RemoveGpu(_)));
                }
            }
            Op::RestoreGpu(pick) => {
                if let Some(index) = self.pick_gpu(pick) {
                    assert!(self.real.restore_gpu(self.gpus[index].id));
                    self.gpus[index].is_failed = false;
                }
            }
            Op::Drain {
                domain,
                is_draining,
            } => self.drain(domain, is_draining),
            Op::Place(ref request) => self.place(request),
            Op::PlaceBatch(ref requests) => self.place_batch(requests),
            Op::Release(pick) => self.release(pick),
            Op::SetExpiry(pick, at) => {
                if let Some(id) = self.pick_placement(pick) {
                    let at = at.map(Time);
                    assert!(self.real.set_placement_expiry(id, at));
                    self.placements.get_mut(&id).unwrap().expires_at = at;
                }
            }
            Op::Expire(now) => self.expire(Time(now)),
        }
    }

    pub(crate) fn check(&self) {
        self.real.check_integrity();
        let usable = self.gpus.iter().filter(|gpu| !gpu.is_failed);
        let free = usable.flat_map(|gpu| &gpu.extents).filter(|e| e.is_none());
        let stats = self.real.stats(Time::ZERO);
        assert_eq!(stats.gpu_bytes_free, free.count() as u64 * EXTENT);
        assert_eq!(stats.num_placements, self.placements.len() as u64);
        for gpu in &self.gpus {
            let told = self.real.gpu_memory(gpu.id).unwrap();
            let runs = gpu.extents.split(Option::is_some).map(<[_]>::len);
            assert_eq!(told.longest_run_bytes, runs.max().unwrap() as u64 * EXTENT);
            assert!(told.bytes_stranded <= told.bytes_free);
        }
    }
}

fn placed_on(gpu: &ModelGpu) -> Vec<PlacementId> {
    let mut placed: Vec<PlacementId> = gpu.extents.iter().flatten().copied().collect();
    placed.sort_unstable();
    placed.dedup();
    placed
}

fn length(request: &PlaceRequest) -> usize {
    request.bytes_per_gpu.div_ceil(EXTENT) as usize
}

fn range(placed: &PlacedGpu) -> Range<usize> {
    let start = (placed.extent.offset_bytes / EXTENT) as usize;
    start..start + (placed.extent.length_bytes / EXTENT) as usize
}
