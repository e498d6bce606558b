//! The naive model: one owner per extent, every answer checked by looking at all of them.

use std::{cmp::Reverse, collections::BTreeMap, ops::Range};

use orchestra_core::{
    ErrorCode, Time,
    scheduler::{
        GpuId, GpuSpec, Layout, NodeLimits, PlaceRequest, PlacedGpu, Placement, PlacementId,
        Scheduler, SchedulerConfig, SchedulerError, Shares,
    },
};

pub(crate) const EXTENT: u64 = 1 << 20;
pub(crate) const NUM_DOMAINS: usize = 4;
/// The first two are neighbours; domain 3 is in no known rack.
pub(crate) const RACKS: [Option<&str>; NUM_DOMAINS] =
    [Some("rack-a"), Some("rack-a"), Some("rack-b"), None];

pub(crate) struct ModelGpu {
    pub(crate) id: GpuId,
    pub(crate) domain: usize,
    /// One of two in the domain.
    pub(crate) node: usize,
    is_failed: bool,
    /// Who holds each extent.
    extents: Vec<Option<PlacementId>>,
}

pub(crate) struct Pair {
    pub(crate) real: Scheduler,
    pub(crate) gpus: Vec<ModelGpu>,
    draining: [bool; NUM_DOMAINS],
    /// `[domain][node]`.
    pub(crate) limits: [[NodeLimits; 2]; NUM_DOMAINS],
    pub(crate) watts: [u64; NUM_DOMAINS],
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
            draining: [false; NUM_DOMAINS],
            limits: [[NodeLimits::default(); 2]; NUM_DOMAINS],
            watts: [0; NUM_DOMAINS],
            placements: BTreeMap::new(),
            num_named: 0,
        }
    }

    /// GPUs of each domain for which `fits` holds, as many as can have their shares at once: of what is left, or of
    /// the limits.
    fn usable(
        &self,
        shares: &Shares,
        of_limits: bool,
        fits: impl Fn(&ModelGpu) -> bool,
    ) -> [u32; NUM_DOMAINS] {
        let on = |gpus: &mut dyn Iterator<Item = &ModelGpu>, share: fn(&Shares) -> u64| {
            let held = gpus
                .flat_map(placed_on)
                .map(|id| share(&self.placements[&id].shares_per_gpu));
            if of_limits { 0 } else { held.sum() }
        };
        std::array::from_fn(|domain| {
            let node = |node: usize| {
                let here = || {
                    self.gpus
                        .iter()
                        .filter(move |g| (g.domain, g.node) == (domain, node))
                };
                let limits = self.limits[domain][node];
                let takers = [
                    takers(
                        limits.cpu_milli,
                        on(&mut here(), |s| s.cpu_milli),
                        shares.cpu_milli,
                    ),
                    takers(
                        limits.host_memory_bytes,
                        on(&mut here(), |s| s.host_memory_bytes),
                        shares.host_memory_bytes,
                    ),
                    takers(
                        limits.nic_mbps,
                        on(&mut here(), |s| s.nic_mbps),
                        shares.nic_mbps,
                    ),
                ];
                let fits = here().filter(|&gpu| fits(gpu)).count() as u64;
                takers.into_iter().min().unwrap().min(fits)
            };
            let mut here = self.gpus.iter().filter(|gpu| gpu.domain == domain);
            let held = on(&mut here, |s| s.power_watts);
            let by_power = takers(self.watts[domain], held, shares.power_watts);
            (node(0) + node(1)).min(by_power) as u32
        })
    }

    /// GPUs of each domain that could take part, all that is below `priority` gone.
    pub(crate) fn usable_below(&self, request: &PlaceRequest, priority: u8) -> [u32; NUM_DOMAINS] {
        let fits = |gpu: &ModelGpu| self.fits(gpu, request, priority);
        self.usable(&request.shares_per_gpu, false, fits)
    }

    /// Whether the extent is free for a request of this priority.
    fn is_open(&self, extent: Option<PlacementId>, priority: u8) -> bool {
        extent.is_none_or(|id| self.placements[&id].priority < priority)
    }

    /// Whether the GPU has room for the request, all that is below `priority` gone.
    fn fits(&self, gpu: &ModelGpu, request: &PlaceRequest, priority: u8) -> bool {
        if gpu.is_failed || self.draining[gpu.domain] {
            return false;
        }
        let is_open = |&extent: &Option<PlacementId>| self.is_open(extent, priority);
        let (run, total) = lengths(request);
        let has_run = run == 0 || gpu.extents.windows(run).any(|run| run.iter().all(is_open));
        has_run && gpu.extents.iter().filter(|extent| is_open(extent)).count() >= total
    }

    pub(crate) fn add_gpu(&mut self, domain: usize, node: usize, extents: u64) {
        self.num_named += 1;
        let spec = GpuSpec {
            name: format!("gpu-{}", self.num_named),
            domain: format!("domain-{domain}"),
            node: node_name(domain, node),
            rack: RACKS[domain].map(str::to_owned),
            memory_bytes: extents * EXTENT + EXTENT / 2, // the half extent is not given out
        };
        let id = self.real.add_gpu(spec).unwrap();
        self.gpus.push(ModelGpu {
            id,
            domain,
            node,
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

    pub(crate) fn pick_gpu(&self, pick: usize) -> Option<usize> {
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
            let ModelGpu { domain, node, .. } = self.gpus.remove(index);
            // The last GPU takes the domain with it, drain and all, and so it is with nodes.
            let mut here = self.gpus.iter().filter(|gpu| gpu.domain == domain);
            if here.clone().next().is_none() {
                self.draining[domain] = false;
                self.watts[domain] = 0;
            }
            if here.all(|gpu| gpu.node != node) {
                self.limits[domain][node] = NodeLimits::default();
            }
        }
    }

    pub(crate) fn restore_gpu(&mut self, index: usize) {
        assert!(self.real.restore_gpu(self.gpus[index].id));
        self.gpus[index].is_failed = false;
    }

    pub(crate) fn limit_node(&mut self, domain: usize, node: usize, limits: &NodeLimits) {
        let answer = self.real.set_node_limits(&node_name(domain, node), limits);
        let mut gpus = self.gpus.iter();
        let is_known = gpus.any(|gpu| (gpu.domain, gpu.node) == (domain, node));
        assert_eq!(answer.is_ok(), is_known);
        if is_known {
            self.limits[domain][node] = *limits;
        }
    }

    pub(crate) fn limit_power(&mut self, domain: usize, watts: u64) {
        let is_known = self.gpus.iter().any(|gpu| gpu.domain == domain);
        assert_eq!(
            self.real
                .set_domain_power(&format!("domain-{domain}"), watts),
            is_known
        );
        if is_known {
            self.watts[domain] = watts;
        }
    }

    pub(crate) fn drain(&mut self, domain: usize, is_draining: bool) {
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
        let windows = usable.flat_map(|gpu| gpu.extents.windows(lengths(request).0));
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
        let fits_free = num_stages(self.usable_below(request, 0), request) >= request.num_stages;
        assert_eq!(
            victims.is_empty(),
            fits_free,
            "displaced where there was room"
        );
        if lengths(request).0 != lengths(request).1 {
            return;
        }
        for victim in victims {
            let holds = |placed: &PlacedGpu| {
                let gpu = self.gpus.iter().find(|gpu| gpu.id == placed.gpu).unwrap();
                gpu.extents[range(placed)].contains(&Some(*victim))
            };
            assert!(placement.gpus.iter().any(holds), "a needless victim");
        }
        let is_one = request.num_gpus == 1 && request.num_stages == 1;
        if is_one && request.shares_per_gpu == Shares::default() {
            assert_eq!(self.least_cost(request), Some(self.cost(victims)));
        }
    }

    fn take(&mut self, placement: &Placement, request: &PlaceRequest) {
        self.check_victims(placement, request);
        for &victim in &placement.preempted {
            self.forget(victim);
        }
        let (run, total) = lengths(request);
        let mut sizes: BTreeMap<GpuId, usize> = BTreeMap::new();
        let mut stages: Vec<Vec<GpuId>> = vec![Vec::new(); request.num_stages as usize];
        let mut runs = 0;
        for placed in &placement.gpus {
            let mut gpus = self.gpus.iter_mut();
            let gpu = gpus.find(|gpu| gpu.id == placed.gpu).unwrap();
            for extent in &mut gpu.extents[range(placed)] {
                assert_eq!(*extent, None, "two placements overlap");
                *extent = Some(placement.id);
            }
            *sizes.entry(placed.gpu).or_default() += range(placed).len();
            let stage = &mut stages[placed.stage as usize];
            if stage.last() != Some(&placed.gpu) {
                stage.push(placed.gpu);
            }
            if placed.layout == Layout::Contiguous {
                assert_eq!(range(placed).len(), run, "an extent is in pieces");
                runs += 1;
            }
        }
        assert!(
            stages
                .iter()
                .all(|stage| stage.len() == request.num_gpus as usize)
        );
        let num_gpus = (request.num_stages * request.num_gpus) as usize;
        assert_eq!(sizes.len(), num_gpus, "two stages share a GPU");
        assert_eq!(runs, if run > 0 { num_gpus } else { 0 });
        assert!(sizes.values().all(|&size| size == total));
        self.placements.insert(placement.id, *request);
        self.check_limits(&placement.gpus, &request.shares_per_gpu);
    }

    fn check_outcome(
        &mut self,
        request: &PlaceRequest,
        outcome: Result<Placement, SchedulerError>,
    ) {
        let now = self.usable_below(request, request.priority);
        let total = lengths(request).1;
        let fits = |gpu: &ModelGpu| gpu.extents.len() >= total;
        let empty = self.usable(&request.shares_per_gpu, true, fits);
        // A gang counts the GPUs of its best domain, a pipeline the stages of all domains.
        let most = |usable: [u32; NUM_DOMAINS]| match request.num_stages {
            1 => usable.into_iter().max().unwrap(),
            _ => num_stages(usable, request),
        };
        let wanted = match request.num_stages {
            1 => request.num_gpus,
            stages => stages,
        };
        match outcome {
            Ok(placement) => {
                assert!(most(now) >= wanted);
                self.check_closeness(&placement, request);
                self.take(&placement, request);
            }
            Err(error) if error.code() == ErrorCode::NoWorkers => {
                assert_eq!(error.limit(), Some(most(now).into()));
                assert!(most(now) < wanted && most(empty) >= wanted);
            }
            Err(error) => {
                assert_eq!(error.code(), ErrorCode::InvalidRequest);
                assert_eq!(error.limit(), Some(most(empty).into()));
                assert!(most(empty) < wanted);
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
    pub(crate) fn place_batch(&mut self, requests: &[PlaceRequest]) {
        let outcomes = self.real.place_batch(requests);
        assert_eq!(outcomes.len(), requests.len());
        let mut pairs: Vec<_> = requests.iter().zip(outcomes).collect();
        pairs.sort_by_key(|(request, _)| {
            let num_gpus = u64::from(request.num_gpus * request.num_stages);
            let bytes = num_gpus * (request.bytes_per_gpu + request.paged_bytes_per_gpu);
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

    pub(crate) fn set_expiry(&mut self, pick: usize, at: Option<Time>) {
        if let Some(id) = self.pick_placement(pick) {
            assert!(self.real.set_placement_expiry(id, at));
            self.placements.get_mut(&id).unwrap().expires_at = at;
        }
    }

    pub(crate) fn expire(&mut self, now: Time) {
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

pub(crate) fn placed_on(gpu: &ModelGpu) -> Vec<PlacementId> {
    let mut placed: Vec<PlacementId> = gpu.extents.iter().flatten().copied().collect();
    placed.sort_unstable();
    placed.dedup();
    placed
}

/// Extents in one piece on each GPU, and all extents on each.
fn lengths(request: &PlaceRequest) -> (usize, usize) {
    let first = request.bytes_per_gpu.div_ceil(EXTENT) as usize;
    let total = first + request.paged_bytes_per_gpu.div_ceil(EXTENT) as usize;
    match request.layout {
        Layout::Contiguous => (first, total),
        Layout::Paged => (0, total),
    }
}

/// How many takers of `share` there is room for; a limit of 0 is none.
fn takers(limit: u64, held: u64, share: u64) -> u64 {
    if limit == 0 || share == 0 {
        return u64::MAX;
    }
    limit.saturating_sub(held) / share
}

/// Stages that fit, those of all domains together.
fn num_stages(usable: [u32; NUM_DOMAINS], request: &PlaceRequest) -> u32 {
    usable.iter().map(|gpus| gpus / request.num_gpus).sum()
}

fn node_name(domain: usize, node: usize) -> String {
    format!("node-{domain}-{node}")
}

fn range(placed: &PlacedGpu) -> Range<usize> {
    let start = (placed.extent.offset_bytes / EXTENT) as usize;
    start..start + (placed.extent.length_bytes / EXTENT) as usize
}
