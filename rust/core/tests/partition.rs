//! The division of layers among stages against every division that there is.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use orchestra_core::partition::{LayerCost, Move, MoveTerms, PartitionError, StageLoad, plan_move};
use proptest::prelude::*;

/// Terms under which whatever is faster pays.
const EAGER: MoveTerms = MoveTerms {
    steps_in_flight: 8,
    bytes_per_second: u64::MAX,
    horizon: Duration::from_secs(1 << 30),
    gain_percent_min: 0,
};

fn layers(works: &[u64]) -> Vec<LayerCost> {
    let layer = |&work| LayerCost {
        work,
        bytes: 10 * work,
    };
    works.iter().map(layer).collect()
}

fn stage(num_layers: usize, busy_ns: u64) -> StageLoad {
    StageLoad {
        num_layers,
        busy_ns,
        fixed_work: 0,
        free_bytes: u64::MAX,
    }
}

fn split_of(planned: Option<Move>) -> Vec<usize> {
    planned.unwrap().split
}

// === by hand ===

#[test]
fn a_slow_stage_gives_layers_away() {
    // Three times as slow per layer: 2 and 6 layers take the same.
    let stages = [stage(4, 3000), stage(4, 1000)];
    let planned = plan_move(&layers(&[1; 8]), &stages, &EAGER)
        .unwrap()
        .unwrap();
    assert_eq!(planned.split, [2, 6]);
    assert_eq!(
        (planned.period_before_ns, planned.period_after_ns),
        (3000, 1500)
    );
    assert_eq!(planned.bytes, 20);
}

#[test]
fn what_a_stage_has_beside_its_layers_stays() {
    // The head is as much work as four layers.
    let last = StageLoad {
        fixed_work: 4,
        ..stage(4, 800)
    };
    let planned = plan_move(&layers(&[1; 8]), &[stage(4, 400), last], &EAGER).unwrap();
    assert_eq!(split_of(planned), [6, 2]);
}

#[test]
fn with_one_step_in_flight_the_sum_counts() {
    let stages = [stage(4, 1200), stage(4, 1000)];
    let terms = MoveTerms {
        steps_in_flight: 1,
        ..EAGER
    };
    let planned = plan_move(&layers(&[1; 8]), &stages, &terms).unwrap();
    assert_eq!(split_of(planned), [1, 7]);
}

#[test]
fn a_stage_takes_no_more_than_its_memory_holds() {
    let narrow = StageLoad {
        free_bytes: 10,
        ..stage(4, 1000)
    };
    let planned = plan_move(&layers(&[1; 8]), &[stage(4, 3000), narrow], &EAGER).unwrap();
    assert_eq!(split_of(planned), [3, 5]);
}

#[test]
fn nothing_moves_for_little() {
    // A layer less is 50 of 1000 ns for one, and 976 ns for the other.
    let stages = [stage(20, 1000), stage(20, 930)];
    let some = |gain_percent_min| {
        let terms = MoveTerms {
            gain_percent_min,
            ..EAGER
        };
        plan_move(&layers(&[1; 40]), &stages, &terms)
            .unwrap()
            .is_some()
    };
    assert!(some(2));
    assert!(!some(3));
}

#[test]
fn nothing_moves_that_takes_too_long() {
    // Two layers of 10 bytes gain 30 % of 10 s: bringing them over may take half of that.
    let stages = [stage(5, 1000), stage(5, 500)];
    let pays = |bytes_per_second| {
        let horizon = Duration::from_secs(10);
        let terms = MoveTerms {
            bytes_per_second,
            horizon,
            ..EAGER
        };
        plan_move(&layers(&[1; 10]), &stages, &terms)
            .unwrap()
            .is_some()
    };
    assert!(pays(14));
    assert!(!pays(13));
}

#[test]
fn numbers_out_of_range_are_named() {
    let field = |layers: &[LayerCost], stages: &[StageLoad], terms: &MoveTerms| {
        plan_move(layers, stages, terms).unwrap_err().field()
    };
    let two = layers(&[1, 1]);
    let stages = [stage(1, 1), stage(1, 1)];
    assert_eq!(field(&[], &[], &EAGER), "layers");
    assert_eq!(field(&layers(&[0, 1]), &stages, &EAGER), "work");
    assert_eq!(
        field(&two, &[stage(0, 1), stage(2, 1)], &EAGER),
        "num_layers"
    );
    assert_eq!(field(&two, &[stage(1, 0), stage(1, 1)], &EAGER), "busy_ns");
    let terms = MoveTerms {
        steps_in_flight: 0,
        ..EAGER
    };
    assert_eq!(field(&two, &stages, &terms), "steps_in_flight");
    let error = plan_move(&two, &stages[..1], &EAGER).unwrap_err();
    assert_eq!(
        error,
        PartitionError::WrongLayerCount {
            expected: 2,
            got: 1
        }
    );
}

// === against every division ===

/// All divisions of `count` layers among so many stages.
fn divisions(count: usize, stages: usize) -> Vec<Vec<usize>> {
    if stages == 1 {
        return vec![vec![count]];
    }
    let first = 1..=count - (stages - 1);
    first
        .flat_map(|first| {
            divisions(count - first, stages - 1)
                .into_iter()
                .map(move |rest| {
                    let mut split = vec![first];
                    split.extend(rest);
                    split
                })
        })
        .collect()
}

/// Period and bytes of a division, written down once more; `None` where a stage has no room.
fn figures(
    layers: &[LayerCost],
    stages: &[StageLoad],
    split: &[usize],
    steps_in_flight: u64,
) -> Option<(u64, u64)> {
    let (mut slowest, mut all, mut brought) = (0, 0, 0);
    let (mut old, mut new) = (0, 0);
    for (stage, &count) in stages.iter().zip(split) {
        let has = old..old + stage.num_layers;
        let gets = new..new + count;
        let work = |run: std::ops::Range<usize>| -> u64 {
            stage.fixed_work + layers[run].iter().map(|layer| layer.work).sum::<u64>()
        };
        let busy = (work(gets.clone()) * stage.busy_ns).div_ceil(work(has.clone()));
        let further = gets.clone().filter(|layer| !has.contains(layer));
        let bytes: u64 = further.map(|layer| layers[layer].bytes).sum();
        if bytes > stage.free_bytes {
            return None;
        }
        slowest = slowest.max(busy);
        all += busy;
        brought += bytes;
        (old, new) = (has.end, gets.end);
    }
    Some((slowest.max(all.div_ceil(steps_in_flight)), brought))
}

fn pipeline() -> impl Strategy<Value = (Vec<LayerCost>, Vec<StageLoad>)> {
    (1..=4_usize)
        .prop_flat_map(|count| {
            let loads =
                prop::collection::vec((1..=3_usize, 1..200_u64, 0..5_u64, 0..40_u64), count);
            loads.prop_map(|loads| {
                let load = |(num_layers, busy_ns, fixed_work, free_bytes)| StageLoad {
                    num_layers,
                    busy_ns,
                    fixed_work,
                    free_bytes,
                };
                loads.into_iter().map(load).collect::<Vec<_>>()
            })
        })
        .prop_flat_map(|stages| {
            let count = stages.iter().map(|stage| stage.num_layers).sum::<usize>();
            let layer = (1..10_u64, 0..20_u64).prop_map(|(work, bytes)| LayerCost { work, bytes });
            (prop::collection::vec(layer, count), Just(stages))
        })
}

proptest! {
    #[test]
    fn no_division_is_better((layers, stages) in pipeline(), steps_in_flight in 1..6_u64) {
        let terms = MoveTerms { steps_in_flight, ..EAGER };
        let planned = plan_move(&layers, &stages, &terms).unwrap();
        let now: Vec<usize> = stages.iter().map(|stage| stage.num_layers).collect();
        let figures = |split: &[usize]| figures(&layers, &stages, split, steps_in_flight);
        let (before, _) = figures(&now).unwrap();
        let all = divisions(layers.len(), stages.len());
        let (best, _) = all.iter().filter_map(|split| figures(split)).min().unwrap();
        prop_assert_eq!(planned.is_some(), best < before);
        if let Some(planned) = planned {
            prop_assert_eq!(figures(&planned.split), Some((best, planned.bytes)));
            prop_assert_eq!((planned.period_before_ns, planned.period_after_ns), (before, best));
            if steps_in_flight >= stages.len() as u64 {
                // The slowest stage is what counts: then it is also the one that brings least over.
                let least = all.iter().filter_map(|split| figures(split)).min().unwrap();
                prop_assert_eq!(least, (best, planned.bytes));
            }
        }
    }

    #[test]
    fn it_stays_where_it_went((layers, stages) in pipeline(), steps_in_flight in 1..6_u64) {
        // Were the stages as fast as they seemed, nothing would move a second time.
        let terms = MoveTerms { steps_in_flight, gain_percent_min: 5, ..EAGER };
        let stages: Vec<_> = stages
            .into_iter()
            .map(|stage| StageLoad { busy_ns: stage.busy_ns * 1_000_000, free_bytes: u64::MAX, ..stage })
            .collect();
        let Some(planned) = plan_move(&layers, &stages, &terms).unwrap() else {
            return Ok(());
        };
        let (mut old, mut new) = (0, 0);
        let moved: Vec<_> = stages
            .iter()
            .zip(&planned.split)
            .map(|(stage, &num_layers)| {
                let work = |start: usize, count: usize| -> u64 {
                    let run = &layers[start..start + count];
                    stage.fixed_work + run.iter().map(|layer| layer.work).sum::<u64>()
                };
                let busy_ns = work(new, num_layers) * stage.busy_ns / work(old, stage.num_layers);
                (old, new) = (old + stage.num_layers, new + num_layers);
                StageLoad { num_layers, busy_ns, ..*stage }
            })
            .collect();
        prop_assert_eq!(plan_move(&layers, &moved, &terms).unwrap(), None);
    }
}
