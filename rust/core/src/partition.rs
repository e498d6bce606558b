//! Divides the layers of a model among the stages of a pipeline, by what each stage was seen to take.
//!
//! Stages stand in a fixed order and each computes a run of layers, so this is the linear partition problem, with
//! stages of different speeds: chains on heterogeneous processors in a given order (Pinar, Tabak and Aykanat,
//! "One-dimensional partitioning for heterogeneous systems", JPDC 2008). It is solved exactly: a dynamic programme finds
//! the cheapest division whose stages all stay within a bound, and the bound is bisected, which integers allow.
//!
//! A stage computes its share of a step in `rate * (fixed work + work of its layers)`; the rate is what it took for the
//! work that it has now. With `m` steps in flight one is finished every `max(slowest stage, all stages / m)`: the
//! *period*, which is what a better division makes shorter.

use std::time::Duration;

use crate::ErrorCode;

/// Most layers that are divided: what the search takes grows with their square, times the stages.
pub const LAYERS_MAX: usize = 512;
/// Most work and bytes of one layer, and most nanoseconds of a stage: sums and products of them fit their types.
const QUANTITY_MAX: u64 = 1 << 44;

/// One layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerCost {
    /// What computing it takes in proportion to other layers, such as its weights; at least 1.
    pub work: u64,
    /// Weights and KV cache: what a stage that gets it has to find memory for and to bring over.
    pub bytes: u64,
}

/// One stage as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StageLoad {
    /// Layers that it computes, behind those of the stages before it; at least 1.
    pub num_layers: usize,
    /// Time in which it computes its share of a step, ns; at least 1.
    pub busy_ns: u64,
    /// Work that it has beside its layers and that stays, such as the head.
    pub fixed_work: u64,
    /// Memory that it could take for further layers. What it gives away does not count: it is kept until all is over.
    pub free_bytes: u64,
}

/// When a move pays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MoveTerms {
    /// Steps in flight at a time; at least 1.
    pub steps_in_flight: u64,
    /// What brings layers over, per second, while no step runs; at least 1.
    pub bytes_per_second: u64,
    /// How long the load is taken to stay as it is.
    pub horizon: Duration,
    /// Least share of the period that has to be gained, in percent. What is less may be noise, and would go back.
    pub gain_percent_min: u64,
}

/// A division that pays.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Move {
    /// Layers of each stage.
    pub split: Vec<usize>,
    /// Time from one finished step to the next, ns, as the layers lie.
    pub period_before_ns: u64,
    /// The same after the move.
    pub period_after_ns: u64,
    /// What the stages bring over in all.
    pub bytes: u64,
}

/// Numbers that do not describe a pipeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PartitionError {
    /// A quantity is out of its range.
    #[error("{field}: must be {expected}")]
    InvalidField {
        /// Which.
        field: &'static str,
        /// Its range.
        expected: &'static str,
    },
    /// The stages do not have the layers.
    #[error("num_layers: the stages have {got} layers, there are {expected}")]
    WrongLayerCount {
        /// Layers of the model.
        expected: usize,
        /// Layers of all stages.
        got: usize,
    },
}

impl PartitionError {
    /// Always [`ErrorCode::InvalidRequest`].
    pub const fn code(&self) -> ErrorCode {
        ErrorCode::InvalidRequest
    }

    /// Which number it is about.
    pub const fn field(&self) -> &'static str {
        match self {
            Self::InvalidField { field, .. } => field,
            Self::WrongLayerCount { .. } => "num_layers",
        }
    }
}

/// The division with the shortest period, where moving there pays; `None` where the layers should stay.
///
/// Of divisions with the same period it takes the one that brings least over. A move pays if the period becomes shorter
/// by the least share that is asked for, and by more in the whole horizon than twice what bringing the layers over takes.
/// The same numbers give the same answer.
pub fn plan_move(
    layers: &[LayerCost],
    stages: &[StageLoad],
    terms: &MoveTerms,
) -> Result<Option<Move>, PartitionError> {
    check(layers, stages, terms)?;
    let chain = Chain::new(layers, stages, terms.steps_in_flight);
    let now: Vec<usize> = stages.iter().map(|stage| stage.num_layers).collect();
    let before = chain.period(&now);
    let split = chain.best(&now);
    let after = chain.period(&split);
    let bytes = chain.bytes_brought(&split);
    let gained = before.saturating_sub(after);
    let pause_us = u128::from(bytes) * 1_000_000 / u128::from(terms.bytes_per_second);
    // Of the horizon, the share that the gain is of the period.
    let saved_us = terms.horizon.as_micros() * u128::from(gained) / u128::from(before);
    let is_much =
        u128::from(gained) * 100 >= u128::from(before) * u128::from(terms.gain_percent_min);
    let pays = split != now && gained > 0 && is_much && saved_us > 2 * pause_us;
    Ok(pays.then_some(Move {
        split,
        period_before_ns: before,
        period_after_ns: after,
        bytes,
    }))
}

fn check(
    layers: &[LayerCost],
    stages: &[StageLoad],
    terms: &MoveTerms,
) -> Result<(), PartitionError> {
    let every_layer = |holds: fn(&LayerCost) -> bool| layers.iter().all(holds);
    let every_stage = |holds: fn(&StageLoad) -> bool| stages.iter().all(holds);
    let rules = [
        (
            "layers",
            "1 to 512 of them",
            (1..=LAYERS_MAX).contains(&layers.len()),
        ),
        (
            "work",
            "1 to 2^44",
            every_layer(|it| (1..=QUANTITY_MAX).contains(&it.work)),
        ),
        (
            "bytes",
            "at most 2^44",
            every_layer(|it| it.bytes <= QUANTITY_MAX),
        ),
        (
            "num_layers",
            "1 to 512",
            every_stage(|it| (1..=LAYERS_MAX).contains(&it.num_layers)),
        ),
        (
            "busy_ns",
            "1 to 2^44",
            every_stage(|it| (1..=QUANTITY_MAX).contains(&it.busy_ns)),
        ),
        (
            "fixed_work",
            "at most 2^44",
            every_stage(|it| it.fixed_work <= QUANTITY_MAX),
        ),
        ("steps_in_flight", "at least 1", terms.steps_in_flight > 0),
        ("bytes_per_second", "at least 1", terms.bytes_per_second > 0),
        (
            "gain_percent_min",
            "at most 100",
            terms.gain_percent_min <= 100,
        ),
    ];
    if let Some(&(field, expected, _)) = rules.iter().find(|(_, _, holds)| !holds) {
        return Err(PartitionError::InvalidField { field, expected });
    }
    let got = stages.iter().map(|stage| stage.num_layers).sum();
    if got != layers.len() {
        let expected = layers.len();
        return Err(PartitionError::WrongLayerCount { expected, got });
    }
    Ok(())
}

/// The layers and stages with their sums.
struct Chain<'a> {
    stages: &'a [StageLoad],
    steps_in_flight: u64,
    /// Where each stage begins as the layers lie, and the end.
    begins: Vec<usize>,
    /// Work and bytes of the layers before each, and of all.
    work: Vec<u64>,
    bytes: Vec<u64>,
}

impl<'a> Chain<'a> {
    fn new(layers: &[LayerCost], stages: &'a [StageLoad], steps_in_flight: u64) -> Self {
        Self {
            stages,
            steps_in_flight,
            begins: sums(stages.iter().map(|stage| stage.num_layers as u64))
                .iter()
                .map(|&layer| layer as usize)
                .collect(),
            work: sums(layers.iter().map(|layer| layer.work)),
            bytes: sums(layers.iter().map(|layer| layer.bytes)),
        }
    }

    /// What a stage takes for its share of a step with the layers `start..stop`, ns.
    fn busy_ns(&self, (stage, start, stop): Run) -> u64 {
        let load = &self.stages[stage];
        let has = self.work[self.begins[stage + 1]] - self.work[self.begins[stage]];
        let gets = self.work[stop] - self.work[start];
        let now = u128::from(load.fixed_work + has);
        let then = u128::from(load.fixed_work + gets) * u128::from(load.busy_ns);
        then.div_ceil(now).min(u128::from(u64::MAX)) as u64
    }

    /// Bytes that a stage has to bring over to have the layers `start..stop`.
    ///
    /// ```text
    ///   has:            begin ........ end
    ///   gets:   start ................................ stop
    ///   brings: |------|              |-----------------|
    /// ```
    fn brought(&self, (stage, start, stop): Run) -> u64 {
        let (begin, end) = (self.begins[stage], self.begins[stage + 1]);
        let (kept_start, kept_stop) = (start.max(begin), stop.min(end));
        let all = self.bytes[stop] - self.bytes[start];
        if kept_start >= kept_stop {
            return all;
        }
        all - (self.bytes[kept_stop] - self.bytes[kept_start])
    }

    fn bytes_brought(&self, split: &[usize]) -> u64 {
        runs(split).map(|run| self.brought(run)).sum()
    }

    fn period(&self, split: &[usize]) -> u64 {
        let times: Vec<u64> = runs(split).map(|run| self.busy_ns(run)).collect();
        let all = times
            .iter()
            .fold(0, |sum: u64, &time| sum.saturating_add(time));
        let slowest = times.into_iter().max().unwrap_or(0);
        slowest.max(all.div_ceil(self.steps_in_flight))
    }

    /// The division with the shortest period, and of those the one that brings least over.
    fn best(&self, now: &[usize]) -> Vec<usize> {
        let mut best = now.to_vec();
        let (mut low, mut high) = (0, self.period(now));
        // The smallest bound that a division keeps as a whole. Whether one does only changes once as it grows.
        while low < high {
            let bound = low + (high - low) / 2;
            let sum_max = bound.saturating_mul(self.steps_in_flight);
            match self.cheapest(bound, |at| self.busy_ns(at)) {
                Some((sum, split)) if sum <= sum_max => (best, high) = (split, bound),
                _ => low = bound + 1,
            }
        }
        let calmest = self.cheapest(high, |at| self.brought(at));
        let calmest = calmest.filter(|(_, split)| self.period(split) <= high);
        calmest.map_or(best, |(_, split)| split)
    }

    /// The division of the least price in which no stage takes longer than `bound` or more memory than it has.
    fn cheapest(&self, bound: u64, price: impl Fn(Run) -> u64) -> Option<(u64, Vec<usize>)> {
        let (count, layers) = (self.stages.len(), self.work.len() - 1);
        // Of the stages so far, by where they end: the least price.
        let mut least = vec![None; layers + 1];
        least[0] = Some(0_u64);
        // Where each stage begins in the cheapest division that has it end there.
        let mut starts = vec![vec![0; layers + 1]; count];
        for (stage, starts) in starts.iter_mut().enumerate() {
            let mut next = vec![None; layers + 1];
            for stop in stage + 1..=layers {
                for start in (stage..stop).rev() {
                    let run = (stage, start, stop);
                    let is_slow = self.busy_ns(run) > bound;
                    if is_slow || self.brought(run) > self.stages[stage].free_bytes {
                        // With more layers in front it would be no less of either.
                        break;
                    }
                    let Some(before) = least[start] else { continue };
                    let all = price(run).saturating_add(before);
                    if next[stop].is_none_or(|least| all < least) {
                        next[stop] = Some(all);
                        starts[stop] = start;
                    }
                }
            }
            least = next;
        }
        let price = least[layers]?;
        let mut split = vec![0; count];
        let mut stop = layers;
        for stage in (0..count).rev() {
            let start = starts[stage][stop];
            split[stage] = stop - start;
            stop = start;
        }
        Some((price, split))
    }
}

/// A stage with the half-open range of its layers.
type Run = (usize, usize, usize);

fn runs(split: &[usize]) -> impl Iterator<Item = Run> + '_ {
    split.iter().enumerate().scan(0, |stop, (stage, &count)| {
        let start = *stop;
        *stop += count;
        Some((stage, start, *stop))
    })
}

/// The sums of the numbers before each, and of all.
fn sums(numbers: impl Iterator<Item = u64>) -> Vec<u64> {
    let all = numbers.scan(0, |sum, number| {
        *sum += number;
        Some(*sum)
    });
    std::iter::once(0).chain(all).collect()
}
