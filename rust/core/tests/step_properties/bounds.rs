//! What sharing and pressure cost, in exact numbers.

use orchestra_core::{
    HashSeed, SamplingParams, TokenId,
    step::{StepScheduler, StepSchedulerConfig},
};

use crate::replica::{NewRequest, Replica};

const NUM_REQUESTS: u32 = 32;
const NUM_SHARED: u32 = 512;
const NUM_OWN: u32 = 8;
const MAX_TOKENS: u32 = 4;

fn config() -> StepSchedulerConfig {
    StepSchedulerConfig {
        num_blocks: 400,
        max_num_seqs: 64,
        max_model_len: 1024,
        ..StepSchedulerConfig::default()
    }
}

fn replica(config: StepSchedulerConfig) -> Replica {
    Replica::new(
        StepScheduler::new(config.clone()).expect("a valid config"),
        config,
    )
}

/// The `number`-th of the requests that share a prefix.
fn sharing_request(number: u32, hash_seed: HashSeed) -> NewRequest {
    let own = (0..NUM_OWN).map(|index| 10_000 + number * NUM_OWN + index);
    NewRequest {
        prompt: (0..NUM_SHARED).chain(own).collect(),
        num_replayed: 0,
        sampling: SamplingParams {
            max_tokens: MAX_TOKENS,
            ignore_eos: true,
            ..SamplingParams::default()
        },
        hash_seed,
    }
}

/// Every request's own tokens and all drawn ones but the last have to be computed in any case.
const NUM_UNSHARED: u64 = (NUM_REQUESTS * (NUM_OWN + MAX_TOKENS - 1)) as u64;

#[test]
fn a_burst_that_shares_a_prefix_computes_it_once() {
    for max_prefill_chunk in [0, 16, 40, 512] {
        let mut replica = replica(StepSchedulerConfig {
            max_prefill_chunk,
            ..config()
        });
        let ids: Vec<_> = (0..NUM_REQUESTS)
            .map(|number| {
                replica
                    .add(sharing_request(number, HashSeed(0)))
                    .expect("room")
            })
            .collect();
        replica.run_to_end();
        let expected = u64::from(NUM_SHARED) + NUM_UNSHARED;
        assert_eq!(
            replica.num_computed_tokens, expected,
            "chunks of {max_prefill_chunk}"
        );
        assert_eq!(replica.num_cached_tokens(ids[0]), Some(0));
        for &id in &ids[1..] {
            assert_eq!(replica.num_cached_tokens(id), Some(NUM_SHARED));
        }
    }
}

#[test]
fn without_waiting_everybody_computes_the_prefix() {
    let mut replica = replica(StepSchedulerConfig {
        max_prefix_wait_steps: 0,
        num_blocks: 2000,
        max_num_batched_tokens: 32_768,
        ..config()
    });
    for number in 0..NUM_REQUESTS {
        replica
            .add(sharing_request(number, HashSeed(0)))
            .expect("room");
    }
    replica.run_to_end();
    let expected = u64::from(NUM_REQUESTS * NUM_SHARED) + NUM_UNSHARED;
    assert_eq!(replica.num_computed_tokens, expected);
}

#[test]
fn the_wait_for_a_prefix_ends_after_its_bound() {
    // The first request needs 32 steps for the prefix; the second has a seat from the first step on.
    let config = StepSchedulerConfig {
        max_prefill_chunk: 16,
        max_prefix_wait_steps: 10,
        max_num_seqs: 2,
        ..config()
    };
    let mut replica = replica(config);
    let ids = [0, 1].map(|number| {
        replica
            .add(sharing_request(number, HashSeed(0)))
            .expect("room")
    });
    for step in 1..=11 {
        assert!(replica.schedule());
        let num_running = replica.scheduler.stats().num_running;
        assert_eq!(num_running, if step <= 10 { 1 } else { 2 }, "step {step}");
        replica.commit();
    }
    replica.run_to_end();
    assert_eq!(
        replica.num_cached_tokens(ids[1]),
        Some(160),
        "what ten steps have computed"
    );
}

#[test]
fn who_waits_for_a_prefix_goes_on_when_its_owner_is_aborted() {
    let mut replica = replica(StepSchedulerConfig {
        max_prefill_chunk: 64,
        ..config()
    });
    let _owner = replica.add(sharing_request(0, HashSeed(0))).expect("room");
    let follower = replica.add(sharing_request(1, HashSeed(0))).expect("room");
    replica.schedule();
    replica.commit();
    replica.schedule();
    replica.abort(0); // the second chunk executes and is never committed
    replica.commit();
    replica.run_to_end();
    assert_eq!(replica.num_cached_tokens(follower), Some(64));
}

#[test]
fn seeds_share_nothing() {
    let mut replica = replica(config());
    let ids = [0, 1, 2].map(|seed| {
        replica
            .add(sharing_request(0, HashSeed(seed)))
            .expect("room")
    });
    replica.run_to_end();
    assert_eq!(ids.map(|id| replica.num_cached_tokens(id)), [Some(0); 3]);
}

/// Eight sequences of 64 + 64 tokens, which want 64 blocks of 16; there are 40. Returns how many of them gave way, how
/// often host memory kept what was computed, and the tokens that were computed again.
fn under_pressure(num_host_blocks: u32) -> (u64, u64, u64) {
    let mut replica = replica(StepSchedulerConfig {
        num_blocks: 40,
        max_num_seqs: 8,
        num_host_blocks,
        // What the cache still has of a victim would hide what host memory is good for.
        enable_prefix_cache: num_host_blocks == 0,
        ..config()
    });
    for number in 0..8 {
        let request = NewRequest {
            prompt: (0..64)
                .map(|index: TokenId| number * 1000 + index)
                .collect(),
            num_replayed: 0,
            sampling: SamplingParams {
                max_tokens: 64,
                ignore_eos: true,
                ..SamplingParams::default()
            },
            hash_seed: HashSeed(0),
        };
        replica.add(request).expect("room");
    }
    replica.run_to_end();
    let stats = replica.scheduler.stats();
    let num_wasted = replica.num_computed_tokens - 8 * (64 + 63);
    (stats.preemptions, stats.swaps, num_wasted)
}

#[test]
fn pressure_costs_few_preemptions() {
    // One at a time gives way, and none comes back before there is room for it and for a block of each other.
    let (preemptions, swaps, num_wasted) = under_pressure(0);
    assert!((1..=4).contains(&preemptions), "{preemptions} preemptions");
    assert_eq!(swaps, 0);
    assert!(
        num_wasted < preemptions * 128,
        "{num_wasted} tokens computed again"
    );
}

#[test]
fn host_memory_saves_what_victims_have_computed() {
    let (preemptions, swaps, num_wasted) = under_pressure(32);
    assert!(preemptions > 0);
    assert_eq!((swaps, num_wasted), (preemptions, 0));
    // Room for one victim's five to eight blocks, but not for those of the next.
    let (preemptions, swaps, num_wasted) = under_pressure(8);
    assert!(swaps > 0 && swaps < preemptions, "{swaps} of {preemptions}");
    assert!(num_wasted > 0);
}
