//! Rules for pods, written from their published descriptions. Each gives every node a cost and takes the least; ties go
//! to the first node.
//!
//! * random fit: any node that fits;
//! * first fit: the first node that fits;
//! * best fit: what is left of CPUs and GPUs once the pod is there, each as a share of the largest node's, in sum;
//! * dot product: the product of the node's free CPUs and GPUs with the pod's, in the same units; the least, as FGD's
//!   authors compare it, and the most, as Tetris has it (Grandl et al., SIGCOMM'14);
//! * FGD: the growth of `F(node) = Σ P(class) · GPUs of the node that the class cannot use`. A class can use none where
//!   the node lacks its CPUs, memory or GPUs, else those GPUs with at least its share free.
//!
//! Parts of a GPU come from the one with least left that is enough; FGD takes the one whose use costs least.

use crate::{
    Placer,
    trace::{Draws, Node, Pod, Trace},
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rule {
    Random,
    FirstFit,
    BestFit,
    DotProductLeast,
    DotProductMost,
    Fgd,
}

impl Rule {
    pub(crate) const ALL: [Self; 6] = [
        Self::Random,
        Self::FirstFit,
        Self::BestFit,
        Self::DotProductLeast,
        Self::DotProductMost,
        Self::Fgd,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Random => "random fit",
            Self::FirstFit => "first fit",
            Self::BestFit => "best fit",
            Self::DotProductLeast => "dot product, least",
            Self::DotProductMost => "dot product, most",
            Self::Fgd => "FGD",
        }
    }
}

pub(crate) struct Baseline<'a> {
    trace: &'a Trace,
    rule: Rule,
    nodes: Vec<Node>,
    /// CPUs and GPUs of the largest nodes.
    largest: [f64; 2],
    draws: Draws,
    /// What a pod of a class would cost on a node and the GPU it would use, `[node][class]`; asked for once per state
    /// of the node.
    known: Vec<Vec<Option<Offer>>>,
}

/// Cost and GPU; none where the pod does not fit.
type Offer = Option<(f64, usize)>;

impl<'a> Baseline<'a> {
    pub(crate) fn new(trace: &'a Trace, rule: Rule, seed: u64) -> Self {
        let cpus = trace.nodes.iter().map(|node| node.cpu_milli).max().unwrap();
        let gpus = trace.nodes.iter().map(Node::gpus_left).max().unwrap();
        Self {
            trace,
            rule,
            nodes: trace.nodes.clone(),
            largest: [cpus as f64, gpus as f64],
            draws: Draws::new(!seed),
            known: vec![vec![None; trace.classes.len()]; trace.nodes.len()],
        }
    }

    fn offer(&mut self, index: usize, class: usize) -> Offer {
        let pod = &self.trace.classes[class];
        let node = &self.nodes[index];
        if !node.fits(pod) {
            return None;
        }
        let tightest = || {
            let gpus = node.gpus.iter().enumerate();
            let enough = gpus.filter(|(_, left)| **left >= pod.gpu_milli);
            enough
                .min_by_key(|(_, left)| **left)
                .map_or(0, |(gpu, _)| gpu)
        };
        let cost = match self.rule {
            Rule::Random => self.draws.next() as f64,
            Rule::FirstFit => index as f64,
            Rule::BestFit => {
                let cpus = (node.cpu_milli - pod.cpu_milli) as f64 / self.largest[0];
                let gpus = (node.gpus_left() - pod.gpus()) as f64 / self.largest[1];
                cpus + gpus
            }
            Rule::DotProductLeast => self.dot_product(node, pod),
            Rule::DotProductMost => -self.dot_product(node, pod),
            Rule::Fgd => return Some(self.least_growth(node, pod)),
        };
        Some((cost, tightest()))
    }

    fn dot_product(&self, node: &Node, pod: &Pod) -> f64 {
        let product = |free: u64, asked: u64, most: f64| free as f64 / most * asked as f64 / most;
        product(node.cpu_milli, pod.cpu_milli, self.largest[0])
            + product(node.gpus_left(), pod.gpus(), self.largest[1])
    }

    /// The least growth of fragmentation, and the GPU where it is had.
    fn least_growth(&self, node: &Node, pod: &Pod) -> (f64, usize) {
        let before = self.fragmentation(node);
        let gpus = if pod.is_share() {
            0..node.gpus.len()
        } else {
            0..1
        };
        let enough = gpus.filter(|&gpu| !pod.is_share() || node.gpus[gpu] >= pod.gpu_milli);
        let growths = enough.map(|gpu| {
            let mut after = node.clone();
            after.take(pod, gpu);
            (self.fragmentation(&after) - before, gpu)
        });
        growths.min_by(|a, b| a.0.total_cmp(&b.0)).unwrap()
    }

    /// Thousandths of GPUs that a pod drawn from the trace is expected not to be able to use.
    fn fragmentation(&self, node: &Node) -> f64 {
        let classes = self.trace.classes.iter().zip(&self.trace.counts);
        let unusable = classes.map(|(pod, &count)| {
            let unusable: u64 = if pod.num_gpus == 0 || !node.fits(pod) {
                node.gpus_left()
            } else {
                let short = node.gpus.iter().filter(|left| **left < pod.gpu_milli);
                short.sum()
            };
            unusable * count
        });
        let num_pods: u64 = self.trace.counts.iter().sum();
        unusable.sum::<u64>() as f64 / num_pods as f64
    }
}

impl Placer for Baseline<'_> {
    fn place(&mut self, class: usize) -> bool {
        let mut best: Option<(f64, usize, usize)> = None;
        for index in 0..self.nodes.len() {
            let offer = match self.known[index][class] {
                Some(offer) if self.rule != Rule::Random => offer,
                _ => self.offer(index, class),
            };
            self.known[index][class] = Some(offer);
            if let Some((cost, gpu)) = offer
                && best.is_none_or(|(least, ..)| cost < least)
            {
                best = Some((cost, index, gpu));
            }
        }
        let Some((_, index, gpu)) = best else {
            return false;
        };
        self.nodes[index].take(&self.trace.classes[class], gpu);
        self.known[index].fill(None);
        true
    }
}
