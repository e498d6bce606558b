//! Groups of threads, each with a mapping of its own, against sums that are written down plainly. Real processes, and
//! how they are killed, are in `tests/worker/test_shared_group.py`.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    sync::{Arc, Barrier},
    thread,
    time::{Duration, Instant},
};

use orchestra_kernels::{
    GroupConfig, GroupError, SharedGroup,
    bf16::{narrow, widen},
};
use proptest::prelude::*;

const SLOT_BYTES: usize = 4096;

fn config(rank: usize, size: usize) -> GroupConfig {
    GroupConfig {
        rank,
        size,
        generation: 7,
        timeout: Duration::from_secs(20),
        slot_bytes: SLOT_BYTES,
    }
}

/// All ranks of a group, in order.
fn group(size: usize) -> Vec<SharedGroup> {
    let first = SharedGroup::create(config(0, size)).unwrap();
    let address = first.address().to_owned();
    let join = |rank| SharedGroup::join(config(rank, size), &address).unwrap();
    let others: Vec<SharedGroup> = (1..size).map(join).collect();
    [first].into_iter().chain(others).collect()
}

/// Runs the same on every rank, each on a thread; returns what they return.
fn on_all<T: Send>(ranks: &[SharedGroup], run: impl Fn(usize, &SharedGroup) -> T + Sync) -> Vec<T> {
    thread::scope(|scope| {
        let run = &run;
        let start = |(rank, group)| scope.spawn(move || run(rank, group));
        let threads: Vec<_> = ranks.iter().enumerate().map(start).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    })
}

#[derive(Clone, Debug)]
enum Op {
    SumF32(usize),
    SumBf16(usize),
    Gather {
        rows: usize,
        width: usize,
    },
    /// Numbers of a share.
    Scatter(usize),
    /// Bytes of a part.
    GatherAll(usize),
}

fn op() -> impl Strategy<Value = Op> {
    // Around the ends of a slot, which holds 1,024 or 2,048 numbers.
    let count = prop_oneof![
        0..20_usize,
        1000..1100_usize,
        2000..2100_usize,
        4000..5000_usize
    ];
    let width = prop_oneof![
        1..40_usize,
        1000..1100_usize,
        4090..4100_usize,
        8100..8300_usize
    ];
    prop_oneof![
        count.clone().prop_map(Op::SumF32),
        count.clone().prop_map(Op::SumBf16),
        count.prop_map(Op::Scatter),
        width.clone().prop_map(Op::GatherAll),
        (0..9_usize, width).prop_map(|(rows, width)| Op::Gather { rows, width }),
    ]
}

/// A number that depends on everything, with digits that do not survive rounding.
fn number(rank: usize, step: usize, index: usize) -> f32 {
    let mixed = (rank * 7919 + step * 104_729 + index * 31) % 10_007;
    (mixed as f32 - 5000.0) / 3.7
}

fn run_f32(group: &SharedGroup, rank: usize, step: usize, count: usize) -> Vec<u32> {
    let mut numbers: Vec<f32> = (0..count).map(|index| number(rank, step, index)).collect();
    group.all_reduce(&mut numbers).unwrap();
    numbers.into_iter().map(f32::to_bits).collect()
}

fn run_bf16(group: &SharedGroup, rank: usize, step: usize, count: usize) -> Vec<u32> {
    let numbers = (0..count).map(|index| narrow(number(rank, step, index)));
    let mut numbers: Vec<u16> = numbers.collect();
    group.all_reduce(&mut numbers).unwrap();
    numbers.into_iter().map(u32::from).collect()
}

fn byte(rank: usize, step: usize, row: usize, column: usize) -> u8 {
    (rank * 101 + step * 17 + row * 29 + column * 3 + column / 251) as u8
}

fn run_gather(
    group: &SharedGroup,
    rank: usize,
    step: usize,
    (rows, width, size): (usize, usize, usize),
) -> Vec<u32> {
    let all = (0..rows).flat_map(|row| (0..width).map(move |column| (row, column)));
    let part: Vec<u8> = all
        .map(|(row, column)| byte(rank, step, row, column))
        .collect();
    let mut joined = vec![0; rows * width * size];
    let target = (rank == 0).then_some(joined.as_mut_slice());
    group.gather_columns(&part, rows, target).unwrap();
    if rank == 0 {
        joined.into_iter().map(u32::from).collect()
    } else {
        Vec::new()
    }
}

fn run_scatter(group: &SharedGroup, rank: usize, step: usize, share: usize) -> Vec<u32> {
    let count = share * group.size();
    let numbers = (0..count).map(|index| narrow(number(rank, step, index)));
    let numbers: Vec<u16> = numbers.collect();
    let mut share = vec![0; share];
    group.reduce_scatter(&numbers, &mut share).unwrap();
    share.into_iter().map(u32::from).collect()
}

fn run_gather_all(group: &SharedGroup, rank: usize, step: usize, count: usize) -> Vec<u32> {
    let part: Vec<u8> = (0..count).map(|at| byte(rank, step, 0, at)).collect();
    let mut joined = vec![0; count * group.size()];
    group.all_gather(&part, &mut joined).unwrap();
    joined.into_iter().map(u32::from).collect()
}

/// What the ranks have to get, by the definition.
fn expected(op: &Op, rank: usize, step: usize, size: usize) -> Vec<u32> {
    match *op {
        Op::SumF32(count) => {
            let sum =
                |index| (1..size).fold(number(0, step, index), |a, r| a + number(r, step, index));
            (0..count).map(|index| f32::to_bits(sum(index))).collect()
        }
        Op::SumBf16(count) => {
            let rounded = |rank, index| widen(narrow(number(rank, step, index)));
            let sum = |index| (1..size).fold(rounded(0, index), |a, r| a + rounded(r, index));
            (0..count)
                .map(|index| u32::from(narrow(sum(index))))
                .collect()
        }
        Op::Gather { rows, width } if rank == 0 => {
            let mut all = Vec::new();
            for row in 0..rows {
                for from in 0..size {
                    all.extend((0..width).map(|column| u32::from(byte(from, step, row, column))));
                }
            }
            all
        }
        Op::Gather { .. } => Vec::new(),
        Op::Scatter(share) => {
            let all = expected(&Op::SumBf16(share * size), rank, step, size);
            all[rank * share..][..share].to_vec()
        }
        Op::GatherAll(count) => {
            let part = |from| (0..count).map(move |at| u32::from(byte(from, step, 0, at)));
            (0..size).flat_map(part).collect()
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn every_rank_gets_what_the_definition_says(
        size in 1..5_usize,
        ops in prop::collection::vec(op(), 1..12),
        late in prop::collection::vec(any::<bool>(), 12 * 4),
    ) {
        let ranks = group(size);
        let all = on_all(&ranks, |rank, group| {
            let mut results = Vec::new();
            for (step, op) in ops.iter().enumerate() {
                if late[step * 4 + rank] {
                    // Long enough that the others stop spinning and sleep.
                    thread::sleep(Duration::from_micros(200));
                }
                results.push(match *op {
                    Op::SumF32(count) => run_f32(group, rank, step, count),
                    Op::SumBf16(count) => run_bf16(group, rank, step, count),
                    Op::Gather { rows, width } => run_gather(group, rank, step, (rows, width, size)),
                    Op::Scatter(share) => run_scatter(group, rank, step, share),
                    Op::GatherAll(count) => run_gather_all(group, rank, step, count),
                });
            }
            results
        });
        for (rank, results) in all.iter().enumerate() {
            for (step, (op, result)) in ops.iter().zip(results).enumerate() {
                prop_assert_eq!(result, &expected(op, rank, step, size), "step {} rank {}", step, rank);
            }
        }
    }
}

#[test]
fn abort_ends_the_wait_of_every_rank_and_every_later_call() {
    let ranks = group(3);
    let together = Barrier::new(3);
    let ended = on_all(&ranks, |rank, group| {
        group.all_reduce(&mut [1.0_f32]).unwrap();
        together.wait();
        if rank == 2 {
            group.abort();
            return group.all_reduce(&mut [1.0_f32]);
        }
        // Rank 2 never comes to this one.
        group.all_reduce(&mut [1.0_f32])
    });
    assert_eq!(ended, vec![Err(GroupError::Aborted); 3]);
    for group in &ranks {
        assert_eq!(group.ending(), Some(GroupError::Aborted));
        assert_eq!(group.meet(), Err(GroupError::Aborted));
    }
}

#[test]
fn any_thread_of_a_waiting_rank_can_abort() {
    let mut ranks = group(2);
    let other = ranks.pop().unwrap();
    let waiting = Arc::new(ranks.pop().unwrap());
    let waiter = {
        let group = Arc::clone(&waiting);
        thread::spawn(move || group.all_reduce(&mut [1_u16, 2]))
    };
    waiting.abort();
    assert_eq!(waiter.join().unwrap(), Err(GroupError::Aborted));
    assert_eq!(other.all_reduce(&mut [1_u16, 2]), Err(GroupError::Aborted));
}

#[test]
fn who_does_not_come_is_named_on_every_rank() {
    let quick = |rank| GroupConfig {
        timeout: Duration::from_millis(50),
        ..config(rank, 3)
    };
    let first = SharedGroup::create(quick(0)).unwrap();
    let second = SharedGroup::join(quick(1), first.address()).unwrap();
    let third = SharedGroup::join(quick(2), first.address()).unwrap();
    let late = GroupError::RankLate {
        rank: 2,
        timeout_ms: 50,
    };
    let start = Instant::now();
    let ended = on_all(&[first, second], |_, group| {
        group.all_reduce(&mut [0.5_f32])
    });
    assert!(start.elapsed() >= Duration::from_millis(50));
    assert_eq!(ended, vec![Err(late.clone()); 2]);
    assert_eq!(third.all_reduce(&mut [0.5_f32]), Err(late));
}

#[test]
fn ranks_that_are_out_of_step_are_told_so() {
    let ranks = group(2);
    let ended = on_all(&ranks, |rank, group| {
        group.all_reduce(&mut vec![1.0_f32; 1 + rank])
    });
    let is_told =
        |error: &GroupError| matches!(error, GroupError::Mismatch(_) | GroupError::Aborted);
    assert!(
        ended.iter().all(|ended| ended.as_ref().is_err_and(is_told)),
        "{ended:?}"
    );
}

#[test]
fn a_second_group_forms_after_the_first_has_ended() {
    let ranks = group(2);
    ranks[1].abort();
    let next = |rank| GroupConfig {
        generation: 8,
        ..config(rank, 2)
    };
    let first = SharedGroup::create(next(0)).unwrap();
    let second = SharedGroup::join(next(1), first.address()).unwrap();
    let sums = on_all(&[first, second], |rank, group| {
        let mut numbers = [rank as f32 + 1.0];
        group.all_reduce(&mut numbers).map(|()| numbers[0])
    });
    assert_eq!(sums, vec![Ok(3.0); 2]);
}

#[test]
fn wrong_settings_and_arguments_name_the_field() {
    let key = |config: GroupConfig| match SharedGroup::create(config).map(drop) {
        Err(GroupError::InvalidConfig { key, .. }) => key,
        other => panic!("{other:?}"),
    };
    assert_eq!(key(config(0, 0)), "size");
    assert_eq!(key(config(0, 65)), "size");
    assert_eq!(key(config(2, 2)), "rank");
    let slot_bytes = 4097;
    assert_eq!(
        key(GroupConfig {
            slot_bytes,
            ..config(0, 1)
        }),
        "slot_bytes"
    );

    let alone = SharedGroup::create(config(0, 1)).unwrap();
    let field = |refused| match refused {
        Err(GroupError::InvalidArgument { field, .. }) => field,
        other => panic!("{other:?}"),
    };
    assert_eq!(
        field(alone.gather_columns(&[1, 2, 3], 2, Some(&mut [0; 3]))),
        "rows"
    );
    let scattered = alone.reduce_scatter(&[1.0_f32; 3], &mut [0.0; 2]);
    assert_eq!(field(scattered), "share");
    assert_eq!(field(alone.all_gather(&[1, 2], &mut [0; 3])), "joined");
    assert_eq!(field(alone.gather_columns(&[1, 2], 1, None)), "joined");
    assert_eq!(
        field(alone.gather_columns(&[1, 2], 1, Some(&mut [0; 3]))),
        "joined"
    );
    // None of this has ended the group.
    alone.all_reduce(&mut [1.0_f32]).unwrap();
}

#[test]
fn a_meter_counts_what_was_entered_and_says_who_waits() {
    let ranks = group(2);
    let progress = |rank: usize| ranks[rank].meter().progress();
    assert_eq!(progress(0).entered, 0);
    ranks[0].meter().begin_step();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| ranks[0].all_reduce(&mut [1.0_f32]).unwrap());
        while !progress(0).is_waiting {
            thread::yield_now();
        }
        assert_eq!((progress(0).entered, progress(1).entered), (1, 0));
        ranks[1].all_reduce(&mut [2.0_f32]).unwrap();
        waiting.join().unwrap();
    });
    assert_eq!((progress(0).entered, progress(1).entered), (1, 1));
    assert!(!progress(0).is_waiting && !progress(1).is_waiting);
    assert!(progress(0).slowest_round > Duration::ZERO);
    ranks[0].meter().begin_step();
    assert_eq!(progress(0).slowest_round, Duration::ZERO);
    // Nobody has left a collective that was given up.
    ranks[0].abort();
    ranks[1].all_reduce(&mut [2.0_f32]).unwrap_err();
    assert!(progress(1).is_waiting);
}
