//! The trace: nodes, pods, and draws from them.

use std::collections::BTreeMap;

/// A machine, or what is left of it.
#[derive(Clone, Debug)]
pub(crate) struct Node {
    pub(crate) cpu_milli: u64,
    pub(crate) memory_mib: u64,
    /// Thousandths of each GPU.
    pub(crate) gpus: Vec<u64>,
}

/// What a pod asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Pod {
    pub(crate) cpu_milli: u64,
    pub(crate) memory_mib: u64,
    pub(crate) num_gpus: u64,
    /// Of each GPU.
    pub(crate) gpu_milli: u64,
}

pub(crate) struct Trace {
    pub(crate) nodes: Vec<Node>,
    /// Pods that ask for the same are of one class.
    pub(crate) classes: Vec<Pod>,
    /// Pods of each class.
    pub(crate) counts: Vec<u64>,
    /// The class of each pod.
    pods: Vec<usize>,
}

impl Node {
    pub(crate) fn gpus_left(&self) -> u64 {
        self.gpus.iter().sum()
    }

    pub(crate) fn fits(&self, pod: &Pod) -> bool {
        let enough = self
            .gpus
            .iter()
            .filter(|&&left| left >= pod.gpu_milli)
            .count() as u64;
        self.cpu_milli >= pod.cpu_milli
            && self.memory_mib >= pod.memory_mib
            && (pod.num_gpus == 0 || enough >= pod.num_gpus)
    }

    /// Takes what the pod asks for; shares come from GPU `first`, whole GPUs from wherever they are.
    pub(crate) fn take(&mut self, pod: &Pod, first: usize) {
        self.cpu_milli -= pod.cpu_milli;
        self.memory_mib -= pod.memory_mib;
        if pod.is_share() {
            self.gpus[first] -= pod.gpu_milli;
            return;
        }
        let whole = self.gpus.iter_mut().filter(|left| **left >= pod.gpu_milli);
        for left in whole.take(pod.num_gpus as usize) {
            *left -= pod.gpu_milli;
        }
    }
}

impl Pod {
    /// Thousandths of GPUs in all.
    pub(crate) fn gpus(&self) -> u64 {
        self.num_gpus * self.gpu_milli
    }

    /// Whether it wants a part of one GPU.
    pub(crate) fn is_share(&self) -> bool {
        self.num_gpus == 1 && self.gpu_milli < 1000
    }
}

impl Trace {
    pub(crate) fn parse(nodes: &str, pods: &str) -> Self {
        let nodes = rows(nodes, ["cpu_milli", "memory_mib", "gpu"]);
        let nodes = nodes.map(|[cpu_milli, memory_mib, gpus]| Node {
            cpu_milli,
            memory_mib,
            gpus: vec![1000; gpus as usize],
        });
        let columns = ["cpu_milli", "memory_mib", "num_gpu", "gpu_milli"];
        let pods = rows(pods, columns).map(|[cpu_milli, memory_mib, num_gpus, gpu_milli]| Pod {
            cpu_milli,
            memory_mib,
            num_gpus,
            gpu_milli,
        });
        let pods: Vec<Pod> = pods.collect();
        let mut counts: BTreeMap<Pod, u64> = BTreeMap::new();
        for pod in &pods {
            *counts.entry(*pod).or_default() += 1;
        }
        let classes: Vec<Pod> = counts.keys().copied().collect();
        let class = |pod: &Pod| classes.binary_search(pod).unwrap();
        Self {
            nodes: nodes.collect(),
            pods: pods.iter().map(class).collect(),
            counts: counts.into_values().collect(),
            classes,
        }
    }

    pub(crate) fn gpu_milli(&self) -> u64 {
        self.nodes.iter().map(Node::gpus_left).sum()
    }

    /// The class of a pod drawn from the trace.
    pub(crate) fn draw(&self, draws: &mut Draws) -> usize {
        self.pods[(draws.next() % self.pods.len() as u64) as usize]
    }
}

/// The named columns of a CSV file without quotes.
fn rows<'a, const N: usize>(
    text: &'a str,
    names: [&str; N],
) -> impl Iterator<Item = [u64; N]> + use<'a, N> {
    let mut lines = text.lines();
    let header: Vec<&str> = lines.next().unwrap().split(',').collect();
    let at = names.map(|name| header.iter().position(|column| *column == name).unwrap());
    lines.map(move |line| {
        let cells: Vec<&str> = line.split(',').collect();
        at.map(|column| cells[column].parse().unwrap())
    })
}

/// splitmix64.
pub(crate) struct Draws(u64);

impl Draws {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
}
