//! The operations that the property test draws.

use orchestra_core::scheduler::{KvExchange, Lora, WorkerLoad, WorkerRole};
use proptest::prelude::*;

pub(crate) const LORAS: [Lora<'static>; 3] = [
    Lora {
        id: "poet",
        version: 0,
    },
    Lora {
        id: "poet",
        version: 1,
    },
    Lora {
        id: "coder",
        version: 0,
    },
];

/// Prompts of different prefixes.
pub(crate) const NUM_FAMILIES: u32 = 3;

/// Of a worker: what it demands. Of a request: what it meets.
#[derive(Clone, Debug)]
pub(crate) struct Terms {
    pub(crate) is_tainted: bool,
    pub(crate) is_batch: bool,
    pub(crate) max_loras: u32,
}

impl Terms {
    pub(crate) fn taints(&self) -> Vec<String> {
        let taint = self.is_tainted.then(|| "spot".to_owned());
        taint.into_iter().collect()
    }

    pub(crate) fn slo_classes(&self) -> Vec<String> {
        let class = self.is_batch.then(|| "batch".to_owned());
        class.into_iter().collect()
    }
}

/// What a worker does with others.
#[derive(Clone, Debug)]
pub(crate) struct Part {
    pub(crate) exchange: Option<KvExchange>,
    pub(crate) role: WorkerRole,
}

#[derive(Clone, Debug)]
pub(crate) enum Op {
    AddWorker {
        model: usize,
        epoch: u64,
        /// `block_size`, `num_blocks`, `max_num_seqs`.
        sizes: [u32; 3],
        terms: Terms,
        part: Part,
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
    Kept {
        worker: usize,
        family: u32,
        block: usize,
    },
    Cleared(usize),
    Load(usize, WorkerLoad),
    SetLoras(usize, Vec<usize>),
    Route {
        model: usize,
        family: u32,
        len: usize,
        max_tokens: u32,
        booked_tokens: Option<u32>,
        exclude: Option<usize>,
        lora: Option<usize>,
        weights_epoch: Option<u64>,
        terms: Terms,
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
    let block_size = prop_oneof![4 => Just(4_u32), 1 => Just(8)];
    let sizes = (block_size, 4_u32..40, 1_u32..6).prop_map(<[u32; 3]>::from);
    prop_oneof![
        2 => (model(), epoch(), sizes, terms(), part()).prop_map(|(model, epoch, sizes, terms, part)| {
            Op::AddWorker { model, epoch, sizes, terms, part }
        }),
        1 => pick.clone().prop_map(Op::RemoveWorker),
        1 => (pick.clone(), any::<bool>()).prop_map(|(worker, on)| Op::SetDraining(worker, on)),
        6 => (pick.clone(), 0..=NUM_FAMILIES, 1_usize..8)
            .prop_map(|(worker, family, blocks)| Op::Stored { worker, family, blocks }),
        3 => (pick.clone(), 0..=NUM_FAMILIES, 0_usize..8)
            .prop_map(|(worker, family, block)| Op::Removed { worker, family, block }),
        3 => (pick.clone(), 0..=NUM_FAMILIES, 0_usize..8)
            .prop_map(|(worker, family, block)| Op::Kept { worker, family, block }),
        1 => pick.clone().prop_map(Op::Cleared),
        2 => (pick.clone(), load).prop_map(|(worker, load)| Op::Load(worker, load)),
        1 => (pick.clone(), prop::collection::vec(0..LORAS.len(), 0..4))
            .prop_map(|(worker, loras)| Op::SetLoras(worker, loras)),
        8 => (
            (model(), 0..NUM_FAMILIES, 1_usize..60, 1_u32..40),
            prop::option::of(1_u32..50),
            prop::option::weighted(0.2, pick.clone()),
            prop::option::weighted(0.4, 0..LORAS.len()),
            prop::option::weighted(0.1, epoch()),
            terms(),
        )
            .prop_map(|((model, family, len, max_tokens), booked_tokens, exclude, lora, weights_epoch, terms)| {
                Op::Route {
                    model, family, len, max_tokens, booked_tokens, exclude, lora, weights_epoch, terms,
                }
            }),
        3 => pick.clone().prop_map(Op::PrefillDone),
        4 => pick.prop_map(Op::Release),
    ]
}

fn epoch() -> impl Strategy<Value = u64> {
    prop_oneof![4 => Just(0_u64), 1 => Just(1)]
}

/// Some workers exchange nothing, and some not with the others.
fn part() -> impl Strategy<Value = Part> {
    let exchange = |layout: &str| {
        Some(KvExchange {
            layout: layout.to_owned(),
            bytes_per_block: 4096,
        })
    };
    let exchange = prop_oneof![
        2 => Just(None),
        4 => Just(exchange("wide")),
        1 => Just(exchange("narrow")),
    ];
    let role = prop_oneof![
        3 => Just(WorkerRole::Both),
        1 => Just(WorkerRole::Prefill),
        1 => Just(WorkerRole::Decode),
    ];
    (exchange, role).prop_map(|(exchange, role)| Part { exchange, role })
}

fn terms() -> impl Strategy<Value = Terms> {
    let flag = || prop::bool::weighted(0.2);
    let max_loras = prop_oneof![1 => Just(0_u32), 2 => Just(2)];
    (flag(), flag(), max_loras).prop_map(|(is_tainted, is_batch, max_loras)| Terms {
        is_tainted,
        is_batch,
        max_loras,
    })
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
