//! What was measured, and its summary.

use std::time::Duration;

use serde::Serialize;

/// Samples kept of one kind and client; what comes after is counted, not kept.
const MAX_SAMPLES: usize = 1 << 22;

/// How requests went wrong.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Errors {
    /// No connection.
    pub connect: u64,
    /// The connection broke, or its framing did.
    pub broken: u64,
    /// A status other than 200.
    pub status: u64,
    /// An error event, or a stream without its end.
    pub unfinished: u64,
    /// Words lost, doubled or out of place.
    pub wrong_words: u64,
    /// No answer within the time.
    pub timeout: u64,
}

/// What one or several clients saw.
#[derive(Debug, Default)]
pub(super) struct Samples {
    pub(super) requests: u64,
    pub(super) events: u64,
    pub(super) errors: Errors,
    pub(super) latency: Vec<Duration>,
    pub(super) ttft: Vec<Duration>,
    pub(super) gaps: Vec<Duration>,
}

/// A distribution, microseconds.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Spread {
    /// Arithmetic mean.
    pub mean: f64,
    /// Median.
    pub p50: f64,
    /// 99th percentile.
    pub p99: f64,
    /// 99.9th percentile.
    pub p999: f64,
    /// The largest.
    pub max: f64,
}

/// The summary of a run, printed as JSON.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Requests that were sent, with those that failed.
    pub requests: u64,
    /// How many failed, and how.
    pub errors: Errors,
    /// Seconds from the first request to the last answer.
    pub elapsed_s: f64,
    /// Answers per second.
    pub rps: f64,
    /// Events of streamed answers.
    pub events: u64,
    /// The same per second.
    pub events_per_s: f64,
    /// From sending a request to the end of its answer.
    pub latency_us: Spread,
    /// From sending a request to its first event.
    pub ttft_us: Spread,
    /// Between reads that brought events.
    pub gap_us: Spread,
}

impl Samples {
    /// Adds what others saw.
    pub(super) fn add(&mut self, other: Self) {
        self.requests += other.requests;
        self.events += other.events;
        self.errors.add(other.errors);
        self.latency.extend(other.latency);
        self.ttft.extend(other.ttft);
        self.gaps.extend(other.gaps);
    }

    pub(super) fn into_report(mut self, elapsed: Duration) -> Report {
        let elapsed_s = elapsed.as_secs_f64();
        let answers = self.latency.len() as f64;
        Report {
            requests: self.requests,
            errors: self.errors,
            elapsed_s,
            rps: answers / elapsed_s,
            events: self.events,
            events_per_s: self.events as f64 / elapsed_s,
            latency_us: Spread::of(&mut self.latency),
            ttft_us: Spread::of(&mut self.ttft),
            gap_us: Spread::of(&mut self.gaps),
        }
    }
}

/// Keeps a sample while there is room.
pub(super) fn keep(samples: &mut Vec<Duration>, sample: Duration) {
    if samples.len() < MAX_SAMPLES {
        samples.push(sample);
    }
}

impl Errors {
    fn add(&mut self, other: Self) {
        self.connect += other.connect;
        self.broken += other.broken;
        self.status += other.status;
        self.unfinished += other.unfinished;
        self.wrong_words += other.wrong_words;
        self.timeout += other.timeout;
    }
}

impl Spread {
    /// The distribution of `samples`, which are sorted; zeros where there are none.
    fn of(samples: &mut [Duration]) -> Self {
        samples.sort_unstable();
        let Some(max) = samples.last() else {
            return Self::default();
        };
        let us = |duration: &Duration| duration.as_secs_f64() * 1e6;
        // Nearest rank: the smallest sample that the share of all is not above.
        let at = |share: f64| {
            let rank = (share * samples.len() as f64).ceil() as usize;
            us(&samples[rank.clamp(1, samples.len()) - 1])
        };
        Self {
            mean: samples.iter().map(us).sum::<f64>() / samples.len() as f64,
            p50: at(0.5),
            p99: at(0.99),
            p999: at(0.999),
            max: us(max),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_samples_of_the_nearest_rank() {
        let mut samples: Vec<_> = (1..=1000).rev().map(Duration::from_micros).collect();
        let spread = Spread::of(&mut samples);
        let close = |a: f64, b: f64| (a - b).abs() < 1e-6;
        assert!(close(spread.p50, 500.0) && close(spread.p99, 990.0));
        assert!(
            close(spread.p999, 999.0) && close(spread.max, 1000.0) && close(spread.mean, 500.5)
        );
        assert!(close(Spread::of(&mut []).p99, 0.0));
    }
}
