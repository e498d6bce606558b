//! The operations that the property test draws.

use orchestra_core::scheduler::WorkerLoad;
use proptest::prelude::*;

#[derive(Clone, Debug)]
pub(crate) enum Op {
    AddWorker {
        model: usize,
        epoch: u64,
        block_size: u32,
        num_blocks: u32,
        max_num_seqs: u32,
    },
    RemoveWorker(usize),
    SetDraining(usize, bool),
    Stored {
        worker: usize,
        family: u32,
        blocks: usize,
    },
    Removed {
        worker: usize,
        family: u32,
        block: usize,
    },
    Cleared(usize),
    Load(usize, WorkerLoad),
    Route {
        model: usize,
        family: u32,
        len: usize,
        max_tokens: u32,
        exclude: Option<usize>,
    },
    PrefillDone(usize),
    Release(usize),
}

pub(crate) fn op() -> impl Strategy<Value = Op> {
    let pick = 0_usize..100;
    let load = (0_u32..4, 0_u32..4, 0_u32..40, 0_u64..100).prop_map(
        |(num_running, num_waiting, kv_blocks_used, queued_prefill_tokens)| WorkerLoad {
            num_running,
            num_waiting,
            kv_blocks_used,
            queued_prefill_tokens,
        },
    );
    prop_oneof![
        2 => (model(), prop_oneof![4 => Just(0_u64), 1 => Just(1)],
            prop_oneof![4 => Just(4_u32), 1 => Just(8)], 4_u32..40, 1_u32..6)
            .prop_map(|(model, epoch, block_size, num_blocks, max_num_seqs)| Op::AddWorker {
                model, epoch, block_size, num_blocks, max_num_seqs,
            }),
        1 => pick.clone().prop_map(Op::RemoveWorker),
        1 => (pick.clone(), any::<bool>()).prop_map(|(worker, on)| Op::SetDraining(worker, on)),
        6 => (pick.clone(), 0_u32..3, 1_usize..8)
            .prop_map(|(worker, family, blocks)| Op::Stored { worker, family, blocks }),
        3 => (pick.clone(), 0_u32..3, 0_usize..8)
            .prop_map(|(worker, family, block)| Op::Removed { worker, family, block }),
        1 => pick.clone().prop_map(Op::Cleared),
        2 => (pick.clone(), load).prop_map(|(worker, load)| Op::Load(worker, load)),
        8 => (model(), 0_u32..3, 1_usize..60, 1_u32..40, prop::option::weighted(0.2, pick.clone()))
            .prop_map(|(model, family, len, max_tokens, exclude)| Op::Route {
                model, family, len, max_tokens, exclude,
            }),
        3 => pick.clone().prop_map(Op::PrefillDone),
        4 => pick.prop_map(Op::Release),
    ]
}

/// Mostly the same one, so that workers compete.
fn model() -> impl Strategy<Value = usize> {
    prop_oneof![4 => Just(0_usize), 1 => Just(1)]
}

/// Prompts of a family share their prefix.
pub(crate) fn prompt(family: u32, len: usize) -> Vec<u32> {
    (0..len as u32)
        .map(|position| family * 1000 + position)
        .collect()
}
