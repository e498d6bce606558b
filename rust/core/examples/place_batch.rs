//! Places the gangs of each instance on standard input, for `benches/placement/cp_sat.py`.
//!
//! An instance is a line `{"num_domains": 1, "extents": 32, "gangs": [[GPUs, extents], …]}` about eight GPUs. The
//! answer is a line with the extents placed, of the gangs one by one in their order and of all of them as one batch.

#![expect(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "an example prints, or fails loudly"
)]

use std::io::BufRead as _;

use orchestra_core::scheduler::{GpuSpec, PlaceRequest, Scheduler, SchedulerConfig};
use serde::Deserialize;
use serde_json::json;

const NUM_GPUS: usize = 8;

#[derive(Deserialize)]
struct Instance {
    num_domains: usize,
    extents: u64,
    gangs: Vec<(u32, u64)>,
}

impl Instance {
    fn scheduler(&self) -> Scheduler {
        let config = SchedulerConfig {
            extent_bytes: 1,
            ..SchedulerConfig::default()
        };
        let mut scheduler = Scheduler::new(config).unwrap();
        for gpu in 0..NUM_GPUS {
            let spec = GpuSpec {
                name: gpu.to_string(),
                domain: (gpu * self.num_domains / NUM_GPUS).to_string(),
                node: "node".to_owned(),
                rack: None,
                memory_bytes: self.extents,
            };
            scheduler.add_gpu(spec).unwrap();
        }
        scheduler
    }

    fn requests(&self) -> Vec<PlaceRequest> {
        let gangs = self.gangs.iter();
        let requests = gangs.map(|&(num_gpus, bytes_per_gpu)| PlaceRequest {
            num_gpus,
            bytes_per_gpu,
            ..PlaceRequest::default()
        });
        requests.collect()
    }
}

fn main() {
    for line in std::io::stdin().lock().lines() {
        let instance: Instance = serde_json::from_str(&line.unwrap()).unwrap();
        let requests = instance.requests();
        let placed = |is_placed: Vec<bool>| -> u64 {
            let both = requests.iter().zip(is_placed).filter(|(_, placed)| *placed);
            both.map(|(request, _)| u64::from(request.num_gpus) * request.bytes_per_gpu)
                .sum()
        };
        let mut scheduler = instance.scheduler();
        let one_by_one = requests
            .iter()
            .map(|request| scheduler.place(request).is_ok());
        let one_by_one = placed(one_by_one.collect());
        let batch = instance.scheduler().place_batch(&requests);
        let batch = placed(batch.iter().map(Result::is_ok).collect());
        println!("{}", json!({ "one by one": one_by_one, "batch": batch }));
    }
}
