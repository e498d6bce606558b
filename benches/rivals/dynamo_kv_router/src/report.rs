//! What is counted, and the tables.

use std::time::Duration;

use crate::{
    dynamo_index::Kind,
    fleet::{Report, Side},
    probe::Probed,
};

/// Durations.
#[derive(Default)]
pub struct Samples(Vec<u32>);

impl Samples {
    pub fn add(&mut self, duration: Duration, is_timed: bool) {
        if is_timed {
            self.push(duration.as_nanos());
        }
    }

    fn push(&mut self, value: u128) {
        self.0.push(value.try_into().unwrap_or(u32::MAX));
    }

    /// At these shares of all, in thousandths.
    pub fn micros<const N: usize>(&mut self, permille: [usize; N]) -> [f64; N] {
        self.0.sort_unstable();
        let last = self.0.len().saturating_sub(1);
        let at = |permille| self.0.get(last * permille / 1000).copied();
        permille.map(|permille| f64::from(at(permille).unwrap_or(0)) / 1e3)
    }

    fn mean_micros(&self) -> f64 {
        self.0.iter().copied().map(f64::from).sum::<f64>() / self.0.len().max(1) as f64 / 1e3
    }
}

#[derive(Default)]
pub struct Times {
    pub decide: Samples,
    pub prefill_done: Samples,
    pub free: Samples,
    num_event_blocks: usize,
    events: Duration,
    /// Of the events of one prompt, a block: picoseconds.
    event_picos: Samples,
}

impl Times {
    pub fn add_events(&mut self, num_blocks: usize, taken: Duration, is_timed: bool) {
        if is_timed {
            self.num_event_blocks += num_blocks;
            self.events += taken;
            let picos = taken.as_nanos() * 1_000 / num_blocks as u128;
            self.event_picos.push(picos);
        }
    }

    /// Millions of blocks a second, in the mean and at the median prompt.
    fn event_rates(&mut self) -> (f64, f64) {
        let mean = self.num_event_blocks as f64 / self.events.as_secs_f64() / 1e6;
        let [median] = self.event_picos.micros([500]);
        (mean, 1e3 / median)
    }
}

/// How good the decisions were, by what the workers' caches and queues really held.
#[derive(Default)]
pub struct Quality {
    prompt_tokens: u64,
    cached_tokens: u64,
    /// Of each request: tokens to prefill before its first one, its own included.
    ahead: Vec<u64>,
    spreads: Vec<f64>,
}

impl Quality {
    pub fn add(&mut self, prompt: u64, cached: u64, ahead: u64) {
        self.prompt_tokens += prompt;
        self.cached_tokens += cached;
        self.ahead.push(ahead);
    }

    /// How unevenly requests lie on the workers: standard deviation over mean.
    pub fn add_spread(&mut self, batch: &[u32]) {
        let num = batch.len() as f64;
        let mean = batch.iter().copied().map(f64::from).sum::<f64>() / num;
        let squares = batch.iter().map(|&live| (f64::from(live) - mean).powi(2));
        self.spreads
            .push((squares.sum::<f64>() / num).sqrt() / mean);
    }

    fn cached_share(&self) -> f64 {
        self.cached_tokens as f64 / self.prompt_tokens as f64
    }

    fn spread(&self) -> f64 {
        self.spreads.iter().sum::<f64>() / self.spreads.len() as f64
    }

    /// Mean, and 99 of 100 below.
    fn ahead(&mut self) -> (f64, u64) {
        self.ahead.sort_unstable();
        let mean = self.ahead.iter().sum::<u64>() as f64 / self.ahead.len() as f64;
        (mean, self.ahead[(self.ahead.len() - 1) * 99 / 100])
    }
}

/// The table of Dynamo's indexes, and the one whose look-ups took the least time in the mean.
pub fn print_indexes(probed: &[Probed]) -> Kind {
    println!(
        "| Dynamo's index | look-up p50 µs | p99 | mean | fill M blocks/s | events M blocks/s | bytes an entry |"
    );
    println!("|---|---|---|---|---|---|---|");
    let mut fastest = (f64::INFINITY, Kind::Compressed);
    for index in probed {
        let mut find = Samples(index.find.0.clone());
        let ([p50, p99], mean) = (find.micros([500, 990]), find.mean_micros());
        println!(
            "| {} | {p50:.2} | {p99:.2} | {mean:.2} | {:.2} | {:.2} | {:.1} |",
            index.kind.name(),
            index.fill_rate / 1e6,
            index.event_rate / 1e6,
            index.bytes_per_entry
        );
        if mean < fastest.0 {
            fastest = (mean, index.kind);
        }
    }
    fastest.1
}

pub fn print_sides(sides: &mut [Box<dyn Side>]) {
    let mut reports: Vec<Report> = sides.iter_mut().map(|side| side.report()).collect();
    print_times(&mut reports);
    print_state(&mut reports);
    print_quality(&mut reports);
    for details in reports.iter().filter_map(|report| report.details.as_ref()) {
        println!("\n{details}");
    }
}

fn print_times(reports: &mut [Report]) {
    println!("\n| µs, p50 / p99 / p99.9 / max | decide + book | prefill done | free | decisions |");
    println!("|---|---|---|---|---|");
    for report in reports {
        let times = &mut report.times;
        let cell = |samples: &mut Samples| {
            let micros = samples.micros([500, 990, 999, 1000]);
            micros.map(|micros| format!("{micros:.2}")).join(" / ")
        };
        println!(
            "| {} | {} | {} | {} | {} |",
            report.name,
            cell(&mut times.decide),
            cell(&mut times.prefill_done),
            cell(&mut times.free),
            times.decide.0.len()
        );
    }
}

fn print_state(reports: &mut [Report]) {
    println!(
        "\n| state | fill M blocks/s | events M blocks/s, mean / median | bytes an entry | entries | workers/s registered |"
    );
    println!("|---|---|---|---|---|---|");
    for report in reports {
        let (mean, median) = report.times.event_rates();
        println!(
            "| {} | {:.2} | {mean:.2} / {median:.2} | {:.1} | {} | {} |",
            report.name,
            report.fill_rate / 1e6,
            report.bytes_per_entry,
            report.num_entries,
            report
                .registration_rate
                .map_or("–".to_owned(), |rate| format!("{rate:.0}"))
        );
    }
}

fn print_quality(reports: &mut [Report]) {
    println!(
        "\n| what the decisions reached | cached share of prompts | spread of requests | tokens ahead, mean / p99 |"
    );
    println!("|---|---|---|---|");
    for report in reports {
        let (mean, p99) = report.quality.ahead();
        println!(
            "| {} | {:.1} % | {:.2} | {mean:.0} / {p99} |",
            report.name,
            100.0 * report.quality.cached_share(),
            report.quality.spread()
        );
    }
}
