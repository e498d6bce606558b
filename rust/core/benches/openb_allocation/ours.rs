//! Orchestra as the protocol sees it: a node is a domain, a thousandth of a GPU is an extent of its memory, CPUs and
//! memory of the node are shares.
//!
//! It places no pods without GPUs. For these the bench takes CPUs and memory off the limits of a node, of the one with
//! most CPUs for each GPU that is left there.

use orchestra_core::scheduler::{
    GpuSpec, Layout, NodeLimits, PlaceRequest, Scheduler, SchedulerConfig, Shares,
};

use crate::{
    Placer,
    trace::{Node, Pod, Trace},
};

const MIB: u64 = 1 << 20;

pub(crate) struct Orchestra<'a> {
    trace: &'a Trace,
    scheduler: Scheduler,
    /// What is left of each node, for the pods without GPUs.
    nodes: Vec<Node>,
    limits: Vec<NodeLimits>,
}

impl<'a> Orchestra<'a> {
    pub(crate) fn new(trace: &'a Trace) -> Self {
        let config = SchedulerConfig {
            extent_bytes: MIB,
            ..SchedulerConfig::default()
        };
        let mut scheduler = Scheduler::new(config).unwrap();
        let mut limits = Vec::new();
        for (index, node) in trace.nodes.iter().enumerate() {
            let name = format!("node-{index}");
            for gpu in 0..node.gpus.len() {
                let spec = GpuSpec {
                    name: format!("{name}/{gpu}"),
                    domain: name.clone(),
                    node: name.clone(),
                    rack: None,
                    memory_bytes: 1000 * MIB,
                };
                scheduler.add_gpu(spec).unwrap();
            }
            limits.push(NodeLimits {
                cpu_milli: node.cpu_milli,
                host_memory_bytes: node.memory_mib * MIB,
                nic_mbps: 0,
            });
            scheduler.set_node_limits(&name, &limits[index]).unwrap();
        }
        Self {
            trace,
            scheduler,
            nodes: trace.nodes.clone(),
            limits,
        }
    }

    fn place_without_gpus(&mut self, pod: &Pod) -> bool {
        let fits = self
            .nodes
            .iter()
            .enumerate()
            .filter(|(_, node)| node.fits(pod));
        let spare = |node: &Node| node.cpu_milli * 1000 / (node.gpus_left() + 1);
        let Some((index, _)) = fits.max_by_key(|(_, node)| spare(node)) else {
            return false;
        };
        self.nodes[index].take(pod, 0);
        let limits = &mut self.limits[index];
        // One more than nothing: a limit of 0 would be none.
        limits.cpu_milli = (limits.cpu_milli - pod.cpu_milli).max(1);
        limits.host_memory_bytes = (limits.host_memory_bytes - pod.memory_mib * MIB).max(1);
        self.scheduler
            .set_node_limits(&format!("node-{index}"), limits)
            .unwrap();
        true
    }
}

impl Placer for Orchestra<'_> {
    fn place(&mut self, class: usize) -> bool {
        let pod = self.trace.classes[class];
        if pod.num_gpus == 0 {
            return self.place_without_gpus(&pod);
        }
        let request = PlaceRequest {
            num_gpus: pod.num_gpus as u32,
            bytes_per_gpu: pod.gpu_milli * MIB,
            layout: Layout::Paged,
            shares_per_gpu: Shares {
                cpu_milli: pod.cpu_milli.div_ceil(pod.num_gpus),
                host_memory_bytes: (pod.memory_mib * MIB).div_ceil(pod.num_gpus),
                ..Shares::default()
            },
            ..PlaceRequest::default()
        };
        let Ok(placed) = self.scheduler.place(&request) else {
            return false;
        };
        let spec = self.scheduler.gpu_spec(placed.gpus[0].gpu).unwrap();
        let index: usize = spec.node["node-".len()..].parse().unwrap();
        let node = &mut self.nodes[index];
        node.cpu_milli -= request.shares_per_gpu.cpu_milli * pod.num_gpus;
        node.memory_mib -= pod.memory_mib;
        for placed in placed.gpus {
            let (_, gpu) = self
                .scheduler
                .gpu_spec(placed.gpu)
                .unwrap()
                .name
                .split_once('/')
                .unwrap();
            node.gpus[gpu.parse::<usize>().unwrap()] -= placed.extent.length_bytes / MIB;
        }
        true
    }
}
