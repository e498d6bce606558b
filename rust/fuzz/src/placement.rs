//! GPUs that come, fail and leave, and gangs.

use arbitrary::{Arbitrary, Unstructured};
use orchestra_core::{
    Time,
    scheduler::{GpuSpec, Layout, PlaceRequest, PlacementId, Scheduler, SchedulerConfig},
};

use crate::operations;

#[derive(Debug, Arbitrary)]
enum Op {
    AddGpu {
        name: u8,
        domain: u8,
        memory_bytes: u64,
    },
    RemoveGpu(u8),
    Place {
        num_gpus: u8,
        bytes_per_gpu: u64,
        is_paged: bool,
    },
    Release(u8),
}

/// Any operations, in any order, with any figures.
///
/// # Panics
/// If an invariant breaks.
pub fn placement(data: &[u8]) {
    let input = Unstructured::new(data);
    let config = SchedulerConfig {
        extent_bytes: 16,
        max_num_gpus: 12,
        max_num_reservations: 8,
        ..SchedulerConfig::default()
    };
    let Ok(mut scheduler) = Scheduler::new(config) else {
        return;
    };
    let mut held = Vec::new();
    for op in operations::<Op>(input) {
        apply(&mut scheduler, &mut held, &op);
        scheduler.check_integrity();
    }
    for id in held {
        scheduler.release_placement(id);
    }
    let stats = scheduler.stats(Time::ZERO);
    assert_eq!(stats.num_placements, 0, "everything can be given back");
    assert_eq!(stats.gpu_bytes_free, stats.gpu_bytes_total);
}

fn apply(scheduler: &mut Scheduler, held: &mut Vec<PlacementId>, op: &Op) {
    let gpu = |name: u8| format!("gpu-{}", name % 16);
    match *op {
        Op::AddGpu {
            name,
            domain,
            memory_bytes,
        } => {
            let spec = GpuSpec {
                name: gpu(name),
                domain: format!("domain-{}", domain % 3),
                node: "node".to_owned(),
                rack: (domain % 3 > 0).then(|| "rack".to_owned()),
                // Small enough that the books fit a test, large enough to be refused now and then.
                memory_bytes: memory_bytes % 5000,
            };
            let known = scheduler.gpu_by_name(&spec.name);
            let name = spec.name.clone();
            let added = scheduler.add_gpu(spec);
            assert_eq!(scheduler.gpu_by_name(&name), added.ok().or(known));
        }
        Op::RemoveGpu(name) => {
            if let Some(id) = scheduler.gpu_by_name(&gpu(name)) {
                let lost = scheduler.remove_gpu(id).unwrap_or_default();
                held.retain(|id| !lost.contains(id));
            }
        }
        Op::Place {
            num_gpus,
            bytes_per_gpu,
            is_paged,
        } => {
            let request = PlaceRequest {
                num_gpus: num_gpus.into(),
                bytes_per_gpu: if bytes_per_gpu > u64::MAX / 2 {
                    bytes_per_gpu
                } else {
                    bytes_per_gpu % 4000
                },
                layout: if is_paged {
                    Layout::Paged
                } else {
                    Layout::Contiguous
                },
                ..PlaceRequest::default()
            };
            if let Ok(placement) = scheduler.place(&request) {
                assert_eq!(placement.gpus.len(), usize::from(num_gpus));
                held.push(placement.id);
            }
        }
        Op::Release(pick) => {
            if usize::from(pick) < held.len() {
                let id = held.swap_remove(pick.into());
                assert!(scheduler.release_placement(id));
                assert!(!scheduler.release_placement(id), "released twice");
            }
        }
    }
}
