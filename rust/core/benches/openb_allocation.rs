//! How much of a public cluster's GPUs can be given out: the inflation protocol of FGD (Weng et al., "Beware of
//! Fragmentation", ATC'23) on its `openb` trace.
//!
//! `cargo bench -p orchestra-core --bench openb_allocation -- NODES.csv PODS.csv [SEEDS]`, with
//! `openb_node_list_gpu_node.csv` and `openb_pod_list_default.csv`. Pods are drawn from the trace with replacement and
//! submitted one by one; those that fit nowhere are lost, nothing ends. Printed is the share of all GPUs that is given
//! out once the GPUs demanded so far reach 80 to 130 % of the cluster.

#![expect(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a benchmark prints, or fails loudly"
)]

#[path = "openb_allocation/baselines.rs"]
mod baselines;
#[path = "openb_allocation/ours.rs"]
mod ours;
#[path = "openb_allocation/trace.rs"]
mod trace;

use baselines::{Baseline, Rule};
use ours::Orchestra;
use trace::{Draws, Trace};

/// Demanded GPUs, percent of the cluster, at which the allocation is read.
const MARKS: [u64; 6] = [80, 90, 100, 110, 120, 130];

/// Whoever places pods.
trait Placer {
    /// Places a pod of a class; `false` where it fits nowhere.
    fn place(&mut self, class: usize) -> bool;
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let mut arguments = arguments.iter().filter(|argument| *argument != "--bench");
    let (Some(nodes), Some(pods)) = (arguments.next(), arguments.next()) else {
        println!("openb_allocation: skipped, it needs -- NODES.csv PODS.csv [SEEDS]");
        return;
    };
    let num_seeds: u64 = arguments.next().map_or(5, |seeds| seeds.parse().unwrap());
    let read = |path: &str| std::fs::read_to_string(path).unwrap();
    let trace = Trace::parse(&read(nodes), &read(pods));
    println!(
        "{} nodes, {} GPUs, {} classes of pods; GPUs given out, % of all, mean of {num_seeds} seeds [min, max]",
        trace.nodes.len(),
        trace.gpu_milli() / 1000,
        trace.classes.len(),
    );
    let marks = MARKS.map(|mark| format!("{mark:>22} %")).join("");
    println!("{:24}{marks} demanded", "rule");
    for rule in Rule::ALL {
        row(rule.name(), &trace, num_seeds, |seed| {
            Baseline::new(&trace, rule, seed)
        });
    }
    row("Orchestra", &trace, num_seeds, |_| Orchestra::new(&trace));
}

fn row<P: Placer>(name: &str, trace: &Trace, num_seeds: u64, placer: impl Fn(u64) -> P) {
    let runs = (1..=num_seeds).map(|seed| run(trace, seed, placer(seed)));
    let runs: Vec<[f64; MARKS.len()]> = runs.collect();
    let cells = (0..MARKS.len()).map(|mark| {
        let shares = runs.iter().map(|run| run[mark]);
        let mean = shares.clone().sum::<f64>() / num_seeds as f64;
        let min = shares.clone().fold(f64::INFINITY, f64::min);
        let max = shares.fold(0.0, f64::max);
        format!("{:>24}", format!("{mean:.2} [{min:.2}, {max:.2}]"))
    });
    println!("{name:24}{}", cells.collect::<String>());
}

/// The share of GPUs given out at each mark, percent.
fn run(trace: &Trace, seed: u64, mut placer: impl Placer) -> [f64; MARKS.len()] {
    let capacity = trace.gpu_milli();
    let mut draws = Draws::new(seed);
    let (mut demanded, mut given) = (0, 0);
    MARKS.map(|mark| {
        while demanded * 100 < capacity * mark {
            let class = trace.draw(&mut draws);
            let gpus = trace.classes[class].gpus();
            demanded += gpus;
            if placer.place(class) {
                given += gpus;
            }
        }
        given as f64 / capacity as f64 * 100.0
    })
}
