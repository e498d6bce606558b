//! What seeds of the property tests have found, as small as it became.

use orchestra_core::scheduler::{KvExchange, RoutePolicy, WorkerLoad, WorkerRole};

use crate::{
    ops::{Op, Part, Terms},
    run,
};

#[test]
fn copies_from_a_helper_s_host_memory_count() {
    // A token for copying is what keeps this prompt from being split.
    let terms = |max_loras| Terms {
        is_tainted: false,
        is_batch: false,
        max_loras,
    };
    let worker = |num_blocks, max_loras, role| Op::AddWorker {
        model: 0,
        epoch: 1,
        sizes: [4, num_blocks, 1],
        terms: terms(max_loras),
        part: Part {
            exchange: Some(KvExchange {
                layout: "wide".to_owned(),
                bytes_per_block: 4096,
            }),
            role,
        },
    };
    let load = |num_waiting, queued_prefill_tokens| WorkerLoad {
        num_waiting,
        queued_prefill_tokens,
        ..WorkerLoad::default()
    };
    let route = |len, lora| Op::Route {
        model: 0,
        family: 0,
        len,
        max_tokens: 1,
        booked_tokens: None,
        exclude: None,
        lora,
        weights_epoch: None,
        terms: terms(0),
    };
    let (helper, family) = (0, 0);
    let ops = [
        worker(9, 2, WorkerRole::Prefill),
        Op::Stored {
            worker: helper,
            family,
            blocks: 6,
        },
        Op::Load(0, load(0, 66)),
        worker(11, 0, WorkerRole::Decode),
        Op::Load(1, load(1, 0)),
        route(11, Some(0)),
        Op::Kept {
            worker: helper,
            family,
            block: 0,
        },
        route(33, None),
    ];
    run(RoutePolicy::LoadOnly, true, &ops);
}
