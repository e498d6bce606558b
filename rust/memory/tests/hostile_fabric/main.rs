//! Two managers on a fabric that writes when it likes: whatever is aborted, freed, revoked or cut in whatever
//! order, no byte of an old transfer reaches a block's next owner, and no byte of a next owner reaches an old
//! transfer's target. `PROPTEST_CASES` scales it.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod fabric;
#[path = "../pool_properties/soak.rs"]
mod soak;
mod world;

use proptest::prelude::*;

use crate::world::{Seen, World};

#[derive(Clone, Debug)]
pub(crate) enum Op {
    /// Allocates, writes and seals blocks.
    Fill {
        node: usize,
        n: u32,
    },
    /// Frees a set, used or not.
    Drop {
        node: usize,
    },
    /// Grants new blocks for writing.
    OfferWrite {
        node: usize,
        n: u32,
    },
    /// Grants sealed blocks for reading.
    OfferRead {
        node: usize,
    },
    Put {
        node: usize,
        timeout_ms: u64,
    },
    Get {
        node: usize,
        timeout_ms: u64,
    },
    Abort {
        node: usize,
    },
    Revoke {
        node: usize,
    },
    /// Bytes move.
    Step {
        n: usize,
    },
    Fail,
    Tick {
        ms: u64,
    },
    Reconnect {
        proves: bool,
        is_cut: bool,
    },
}

fn any_op() -> impl Strategy<Value = Op> {
    let node = || 0_usize..2;
    prop_oneof![
        4 => (node(), 1_u32..6).prop_map(|(node, n)| Op::Fill { node, n }),
        3 => node().prop_map(|node| Op::Drop { node }),
        3 => (node(), 1_u32..6).prop_map(|(node, n)| Op::OfferWrite { node, n }),
        2 => node().prop_map(|node| Op::OfferRead { node }),
        4 => (node(), 1_u64..200).prop_map(|(node, timeout_ms)| Op::Put { node, timeout_ms }),
        3 => (node(), 1_u64..200).prop_map(|(node, timeout_ms)| Op::Get { node, timeout_ms }),
        1 => node().prop_map(|node| Op::Abort { node }),
        1 => node().prop_map(|node| Op::Revoke { node }),
        8 => (1_usize..30).prop_map(|n| Op::Step { n }),
        1 => Just(Op::Fail),
        3 => (1_u64..60).prop_map(|ms| Op::Tick { ms }),
        1 => any::<(bool, bool)>().prop_map(|(proves, is_cut)| Op::Reconnect { proves, is_cut }),
    ]
}

fn run(seed: u64, ops: &[Op]) -> Seen {
    let mut world = World::new(seed);
    for op in ops {
        world.apply(op);
        world.check();
    }
    world.finish()
}

proptest! {
    // 16 cases of 150 steps on average, unless PROPTEST_CASES (256) is set.
    #![proptest_config(ProptestConfig::with_cases(ProptestConfig::default().cases / 16))]

    #[test]
    fn no_byte_of_an_aborted_transfer_reaches_the_next_owner(
        seed in 1_u64..,
        ops in prop::collection::vec(any_op(), 1..300),
    ) {
        run(seed, &ops);
    }
}

#[test]
#[ignore = "takes minutes: make soak"]
fn a_million_steps() {
    let histories = prop::collection::vec(any_op(), 1..300);
    soak::run_histories(histories, |number, ops| {
        run(number, &ops);
        ops.len()
    });
}

/// The property above says little if the random runs stay on the easy paths.
#[test]
fn the_random_runs_reach_the_rare_paths() {
    use proptest::{strategy::ValueTree, test_runner::TestRunner};
    let mut runner = TestRunner::deterministic();
    let mut seen = Seen::default();
    for seed in 1..9 {
        let ops = prop::collection::vec(any_op(), 300);
        let ops = ops.new_tree(&mut runner).unwrap().current();
        seen.add(&run(seed, &ops));
    }
    assert!(seen.puts > 10 && seen.gets > 3, "{seen:?}");
    assert!(seen.timeouts_with_quarantine > 3, "{seen:?}");
    assert!(seen.stale_arrivals > 3 && seen.expired > 3, "{seen:?}");
    assert!(seen.came_back_from_quarantine > 3, "{seen:?}");
}

#[test]
fn a_slab_that_a_card_registers_has_a_limit() {
    assert_eq!(
        world::largest_slab(4 << 30),
        None,
        "a transport registers with a card unless it says otherwise"
    );
    assert_eq!(
        world::largest_slab((4 << 30) + (2 << 20)),
        Some("slab_bytes")
    );
}
