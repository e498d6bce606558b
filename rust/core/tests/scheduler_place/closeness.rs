//! Whether the stages of a pipeline are as close to each other as the model says they can be, and limits are kept.

use std::collections::BTreeSet;

use orchestra_core::scheduler::{GpuId, PlaceRequest, PlacedGpu, Placement, Shares};

use crate::model::{ModelGpu, NUM_DOMAINS, Pair, RACKS, placed_on};

impl Pair {
    /// A stage is in one domain; stages of one domain follow each other, and so do those of one rack. Without victims
    /// there are as few racks as can be, and as few domains in each; one domain where one can hold all.
    pub(crate) fn check_closeness(&self, placement: &Placement, request: &PlaceRequest) {
        let domain = |id: GpuId| self.gpus.iter().find(|gpu| gpu.id == id).unwrap().domain;
        let mut stages: Vec<(u32, usize)> = Vec::new();
        for placed in &placement.gpus {
            stages.push((placed.stage, domain(placed.gpu)));
        }
        assert!(stages.is_sorted_by_key(|&(stage, _)| stage));
        stages.dedup();
        assert_eq!(
            stages.len(),
            request.num_stages as usize,
            "a stage spans domains"
        );
        let domains: Vec<usize> = stages.iter().map(|&(_, domain)| domain).collect();
        let racks: Vec<usize> = domains.iter().map(|&domain| rack(domain)).collect();
        assert_eq!(
            num_runs(&domains),
            num_distinct(&domains),
            "a domain is left and met again"
        );
        assert_eq!(
            num_runs(&racks),
            num_distinct(&racks),
            "a rack is left and met again"
        );
        if !placement.preempted.is_empty() {
            return;
        }
        let usable = self.usable_below(request, 0);
        let room: Vec<u32> = usable.iter().map(|gpus| gpus / request.num_gpus).collect();
        if usable
            .iter()
            .any(|&gpus| gpus >= request.num_gpus * request.num_stages)
        {
            assert_eq!(num_distinct(&domains), 1);
            return;
        }
        let rack_room = |name: usize| {
            let here = (0..NUM_DOMAINS).filter(|&domain| rack(domain) == name);
            here.map(|domain| room[domain]).sum()
        };
        let rooms: Vec<u32> = (0..NUM_DOMAINS).map(rack_room).collect();
        assert_eq!(num_distinct(&racks), num_needed(&rooms, request.num_stages));
        for name in 0..NUM_DOMAINS {
            let here: Vec<usize> = domains
                .iter()
                .copied()
                .filter(|&d| rack(d) == name)
                .collect();
            let rooms = (0..NUM_DOMAINS).filter(|&domain| rack(domain) == name);
            let rooms: Vec<u32> = rooms.map(|domain| room[domain]).collect();
            assert_eq!(num_distinct(&here), num_needed(&rooms, here.len() as u32));
        }
    }

    /// Where a GPU with shares was just placed, what all placements hold is within the limits.
    pub(crate) fn check_limits(&self, gpus: &[PlacedGpu], shares: &Shares) {
        let held = |here: &dyn Fn(&ModelGpu) -> bool, share: fn(&Shares) -> u64| -> u64 {
            let here = self.gpus.iter().filter(|gpu| here(gpu)).flat_map(placed_on);
            here.map(|id| share(&self.placements[&id].shares_per_gpu))
                .sum()
        };
        let is_kept = |limit: u64, share: u64, held: u64| limit == 0 || share == 0 || held <= limit;
        for placed in gpus {
            let gpu = self.gpus.iter().find(|gpu| gpu.id == placed.gpu).unwrap();
            let (domain, node) = (gpu.domain, gpu.node);
            let on_node = |gpu: &ModelGpu| (gpu.domain, gpu.node) == (domain, node);
            let in_domain = |gpu: &ModelGpu| gpu.domain == domain;
            let limits = self.limits[domain][node];
            let cores = held(&on_node, |shares| shares.cpu_milli);
            assert!(is_kept(limits.cpu_milli, shares.cpu_milli, cores));
            let host = held(&on_node, |shares| shares.host_memory_bytes);
            assert!(is_kept(
                limits.host_memory_bytes,
                shares.host_memory_bytes,
                host
            ));
            let nic = held(&on_node, |shares| shares.nic_mbps);
            assert!(is_kept(limits.nic_mbps, shares.nic_mbps, nic));
            let watts = held(&in_domain, |shares| shares.power_watts);
            assert!(is_kept(self.watts[domain], shares.power_watts, watts));
        }
    }
}

/// The number of a domain's rack.
fn rack(domain: usize) -> usize {
    if RACKS[domain].is_none() {
        return domain;
    }
    RACKS
        .iter()
        .position(|&rack| rack == RACKS[domain])
        .unwrap()
}

fn num_distinct(names: &[usize]) -> usize {
    names.iter().collect::<BTreeSet<_>>().len()
}

fn num_runs(names: &[usize]) -> usize {
    names.chunk_by(|a, b| a == b).count()
}

/// The fewest rooms that hold `wanted` together: every choice of them is tried.
fn num_needed(rooms: &[u32], wanted: u32) -> usize {
    let choices = (0_u32..1 << rooms.len()).filter(|choice| {
        let chosen = rooms
            .iter()
            .enumerate()
            .filter(|(index, _)| choice >> index & 1 == 1);
        chosen.map(|(_, room)| room).sum::<u32>() >= wanted
    });
    choices.map(u32::count_ones).min().unwrap() as usize
}
