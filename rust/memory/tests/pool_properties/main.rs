//! Random histories of a pool against a naive model: the same answers, the same states, the same bytes.
//! `PROPTEST_CASES=20000` runs for minutes instead of seconds.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod blocks;
mod model;
mod soak;

use proptest::{prelude::*, sample::Index, strategy::ValueTree, test_runner::TestRunner};

use crate::model::{Model, Seen};

#[derive(Clone, Debug)]
pub(crate) enum Op {
    Allocate {
        n: u32,
    },
    Extend {
        set: Index,
        n: u32,
    },
    Truncate {
        set: Index,
        to: Index,
    },
    DropSet {
        set: Index,
    },
    Free {
        set: Index,
        at: Index,
        twice: bool,
    },
    FreeStale {
        set: Index,
        stale: Index,
    },
    FreeForeign {
        set: Index,
    },
    Write {
        set: Index,
        at: Index,
        tag: u64,
    },
    Seal {
        set: Index,
    },
    Pin {
        set: Index,
        at: Index,
    },
    Unpin {
        guard: Index,
    },
    UseStale {
        stale: Index,
    },
    Hold {
        kind: u8,
        set: Index,
        from: Index,
        n: usize,
    },
    Quarantine {
        hold: Index,
    },
    EndHold {
        hold: Index,
    },
    Move {
        set: Index,
        from: Index,
        n: usize,
        during: During,
    },
    Join,
    Pass {
        participant: Index,
    },
    Leave {
        participant: Index,
    },
}

/// What happens between the copy and the commit of a move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum During {
    Nothing,
    Pin,
    Free,
    GiveUp,
}

fn any_op() -> impl Strategy<Value = Op> {
    let index = any::<Index>;
    let during = prop_oneof![
        4 => Just(During::Nothing),
        1 => Just(During::Pin),
        1 => Just(During::Free),
        1 => Just(During::GiveUp),
    ];
    prop_oneof![
        6 => (1_u32..24).prop_map(|n| Op::Allocate { n }),
        3 => (index(), 1_u32..6).prop_map(|(set, n)| Op::Extend { set, n }),
        1 => (index(), index()).prop_map(|(set, to)| Op::Truncate { set, to }),
        3 => index().prop_map(|set| Op::DropSet { set }),
        2 => (index(), index(), prop::bool::weighted(0.2))
            .prop_map(|(set, at, twice)| Op::Free { set, at, twice }),
        1 => (index(), index()).prop_map(|(set, stale)| Op::FreeStale { set, stale }),
        1 => index().prop_map(|set| Op::FreeForeign { set }),
        4 => (index(), index(), any::<u64>()).prop_map(|(set, at, tag)| Op::Write { set, at, tag }),
        5 => index().prop_map(|set| Op::Seal { set }),
        4 => (index(), index()).prop_map(|(set, at)| Op::Pin { set, at }),
        4 => index().prop_map(|guard| Op::Unpin { guard }),
        2 => index().prop_map(|stale| Op::UseStale { stale }),
        3 => (0_u8..4, index(), index(), 1_usize..8)
            .prop_map(|(kind, set, from, n)| Op::Hold { kind, set, from, n }),
        1 => index().prop_map(|hold| Op::Quarantine { hold }),
        3 => index().prop_map(|hold| Op::EndHold { hold }),
        5 => (index(), index(), 1_usize..16, during)
            .prop_map(|(set, from, n, during)| Op::Move { set, from, n, during }),
        1 => Just(Op::Join),
        2 => index().prop_map(|participant| Op::Pass { participant }),
        1 => index().prop_map(|participant| Op::Leave { participant }),
    ]
}

fn any_ops() -> impl Strategy<Value = Vec<Op>> {
    prop::collection::vec(any_op(), 1..400)
}

fn run(block_bytes: u64, slabs: u32, ops: &[Op]) -> Seen {
    let mut model = Model::new(block_bytes, slabs);
    for op in ops {
        model.apply(op);
        model.check();
    }
    model.finish()
}

proptest! {
    // 32 cases of 200 steps on average, unless PROPTEST_CASES (256) is set.
    #![proptest_config(ProptestConfig::with_cases(ProptestConfig::default().cases / 8))]

    #[test]
    fn a_pool_does_what_a_list_of_blocks_would(
        // 4, 20 and 52 blocks in a slab, with a rest that holds none.
        block_bytes in prop::sample::select(vec![500_000_u64, 100_003, 40_000]),
        slabs in 1_u32..4,
        ops in any_ops(),
    ) {
        run(block_bytes, slabs, &ops);
    }
}

#[test]
#[ignore = "takes minutes: make soak"]
fn a_million_steps() {
    let slabs = 1_u32..4;
    soak::run_histories((slabs, any_ops()), |_, (slabs, ops)| {
        run(40_000, slabs, &ops);
        ops.len()
    });
}

/// The property above says little if the random runs stay on the easy paths.
#[test]
fn the_random_runs_reach_the_rare_paths() {
    let mut runner = TestRunner::deterministic();
    let mut seen = Seen::default();
    for _ in 0..12 {
        let ops = any_ops().new_tree(&mut runner).unwrap().current();
        seen.add(run(40_000, 2, &ops));
    }
    let Seen {
        exhausted,
        scattered,
        moved,
        moves_lost_to_pins,
        frees_while_held,
        lost_to_quarantine,
        stale,
        waited_for_participants,
    } = seen;
    for (what, times) in [
        ("exhausted", exhausted),
        ("scattered", scattered),
        ("moved", moved),
        ("moves lost to pins", moves_lost_to_pins),
        ("frees while held", frees_while_held),
        ("lost to quarantine", lost_to_quarantine),
        ("stale", stale),
        ("waited for participants", waited_for_participants),
    ] {
        assert!(times > 3, "{what}: {times} times");
    }
}
