//! Gang placement against a naive model: one bit per extent, every answer checked by looking at all of them.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use orchestra_core::{
    ErrorCode, Time,
    scheduler::{
        GpuId, GpuSpec, PlaceRequest, Placement, PlacementId, Scheduler, SchedulerConfig,
        SchedulerError,
    },
};
use proptest::prelude::*;

const EXTENT: u64 = 1 << 20;

struct ModelGpu {
    id: GpuId,
    domain: usize,
    /// Who holds each extent.
    extents: Vec<Option<PlacementId>>,
}

impl ModelGpu {
    fn fits(&self, length: usize) -> bool {
        self.extents
            .windows(length)
            .any(|run| run.iter().all(Option::is_none))
    }
}

#[derive(Clone, Debug)]
enum Op {
    AddGpu { domain: usize, extents: u64 },
    RemoveGpu(usize),
    Place { num_gpus: u32, bytes: u64 },
    Release(usize),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        3 => (0_usize..3, 1_u64..24)
            .prop_map(|(domain, extents)| Op::AddGpu { domain, extents }),
        1 => (0_usize..100).prop_map(Op::RemoveGpu),
        8 => (1_u32..6, 1_u64..10 * EXTENT)
            .prop_map(|(num_gpus, bytes)| Op::Place { num_gpus, bytes }),
        5 => (0_usize..100).prop_map(Op::Release),
    ]
}

struct Pair {
    real: Scheduler,
    gpus: Vec<ModelGpu>,
    placements: Vec<PlacementId>,
    num_named: usize,
}

impl Pair {
    fn new() -> Self {
        let config = SchedulerConfig {
            extent_bytes: EXTENT,
            ..SchedulerConfig::default()
        };
        let real = Scheduler::new(config).unwrap();
        Self {
            real,
            gpus: Vec::new(),
            placements: Vec::new(),
            num_named: 0,
        }
    }

    /// Most GPUs of one domain for which `fits` holds.
    fn widest(&self, fits: impl Fn(&ModelGpu) -> bool) -> u32 {
        let count = |domain| {
            self.gpus
                .iter()
                .filter(|gpu| gpu.domain == domain && fits(gpu))
                .count() as u32
        };
        (0..3).map(count).max().unwrap_or(0)
    }

    fn add_gpu(&mut self, domain: usize, extents: u64) {
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
            extents: vec![None; extents as usize],
        });
    }

    fn forget(&mut self, placement: PlacementId) {
        for extent in self.gpus.iter_mut().flat_map(|gpu| &mut gpu.extents) {
            if *extent == Some(placement) {
                *extent = None;
            }
        }
        self.placements.retain(|&kept| kept != placement);
    }

    fn remove_gpu(&mut self, pick: usize) {
        let Some(index) = pick.checked_rem(self.gpus.len()) else {
            return;
        };
        let gpu = self.gpus.remove(index);
        let mut expected: Vec<PlacementId> = gpu.extents.into_iter().flatten().collect();
        expected.sort_unstable();
        expected.dedup();
        assert_eq!(self.real.remove_gpu(gpu.id), Some(expected.clone()));
        assert_eq!(self.real.remove_gpu(gpu.id), None);
        for placement in expected {
            self.forget(placement);
        }
    }

    fn take(&mut self, placement: &Placement, num_gpus: u32, length: usize) {
        assert_eq!(placement.gpus.len(), num_gpus as usize);
        let mut domains = Vec::new();
        for placed in &placement.gpus {
            let gpu = self
                .gpus
                .iter_mut()
                .find(|gpu| gpu.id == placed.gpu)
                .unwrap();
            domains.push(gpu.domain);
            assert_eq!(placed.extent.length_bytes, length as u64 * EXTENT);
            let start = (placed.extent.offset_bytes / EXTENT) as usize;
            for extent in &mut gpu.extents[start..start + length] {
                assert_eq!(*extent, None, "two placements overlap");
                *extent = Some(placement.id);
            }
        }
        domains.dedup();
        assert_eq!(domains.len(), 1, "a gang spans domains");
        self.placements.push(placement.id);
    }

    fn place(&mut self, num_gpus: u32, bytes: u64) {
        let length = bytes.div_ceil(EXTENT) as usize;
        let widest_now = self.widest(|gpu| gpu.fits(length));
        let widest_empty = self.widest(|gpu| gpu.extents.len() >= length);
        let before = self.real.stats(Time::ZERO);
        match self.real.place(&PlaceRequest {
            num_gpus,
            bytes_per_gpu: bytes,
        }) {
            Ok(placement) => {
                assert!(widest_now >= num_gpus);
                self.take(&placement, num_gpus, length);
            }
            Err(SchedulerError::NoGpuRoom { num_gpus_max, .. }) => {
                assert_eq!(num_gpus_max, widest_now);
                assert!(widest_now < num_gpus && widest_empty >= num_gpus);
                assert_eq!(
                    self.real.stats(Time::ZERO),
                    before,
                    "a refusal changed something"
                );
            }
            Err(error) => {
                assert_eq!(error.code(), ErrorCode::InvalidRequest);
                assert_eq!(error.limit(), Some(widest_empty.into()));
                assert!(widest_empty < num_gpus);
            }
        }
    }

    fn release(&mut self, pick: usize) {
        let Some(index) = pick.checked_rem(self.placements.len()) else {
            return;
        };
        let placement = self.placements[index];
        assert!(self.real.release_placement(placement));
        assert!(!self.real.release_placement(placement), "released twice");
        self.forget(placement);
    }

    fn check(&self) {
        self.real.check_integrity();
        let free = self
            .gpus
            .iter()
            .flat_map(|gpu| &gpu.extents)
            .filter(|extent| extent.is_none());
        assert_eq!(
            self.real.stats(Time::ZERO).gpu_bytes_free,
            free.count() as u64 * EXTENT
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn a_gang_is_refused_only_where_no_domain_has_room(ops in prop::collection::vec(op(), 1..100)) {
        let mut pair = Pair::new();
        for op in ops {
            match op {
                Op::AddGpu { domain, extents } => pair.add_gpu(domain, extents),
                Op::RemoveGpu(pick) => pair.remove_gpu(pick),
                Op::Place { num_gpus, bytes } => pair.place(num_gpus, bytes),
                Op::Release(pick) => pair.release(pick),
            }
            pair.check();
        }
        while !pair.placements.is_empty() {
            pair.release(0);
        }
        let stats = pair.real.stats(Time::ZERO);
        prop_assert_eq!(stats.gpu_bytes_free, stats.gpu_bytes_total);
    }
}

#[test]
fn wide_gangs_take_the_high_end_and_narrow_ones_the_low_end() {
    let mut pair = Pair::new();
    for domain in [0, 0, 0, 0, 1, 1, 1, 1] {
        pair.add_gpu(domain, 16);
    }
    let narrow = pair
        .real
        .place(&PlaceRequest {
            num_gpus: 1,
            bytes_per_gpu: 4 * EXTENT,
        })
        .unwrap();
    let wide = pair
        .real
        .place(&PlaceRequest {
            num_gpus: 4,
            bytes_per_gpu: 4 * EXTENT,
        })
        .unwrap();
    assert_eq!(
        (narrow.gpus[0].gpu, narrow.gpus[0].extent.offset_bytes),
        (pair.gpus[0].id, 0)
    );
    assert!(
        wide.gpus
            .iter()
            .zip(&pair.gpus[4..])
            .all(|(placed, gpu)| placed.gpu == gpu.id)
    );
    assert!(
        wide.gpus
            .iter()
            .all(|placed| placed.extent.offset_bytes == 12 * EXTENT)
    );
}
