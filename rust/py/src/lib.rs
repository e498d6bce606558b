//! `orchestra._core`: converts, calls, converts back. What it exposes is described in `python/orchestra/_core.pyi`,
//! which is checked against this module.
//!
//! Every class is frozen: state sits behind a lock on the Rust side, and no Python code runs while that is held. So
//! the module works under free-threaded Python as it is.

mod agent;
mod errors;
mod kernels;
mod kv_pool;
mod memory;
mod partition;
mod process;
mod router;
mod scheduler;
mod snapshot;
mod values;

/// Where [`snapshot`] takes its locks from; its model check puts others here.
mod sync {
    pub(crate) use std::sync::Arc;

    pub(crate) use parking_lot::Mutex;
}

/// The compiled core of `orchestra`. Private: use `orchestra` itself.
#[pyo3::pymodule]
mod _core {
    #[pymodule_export]
    use super::{
        agent::Agent,
        errors::error_codes,
        kernels::{
            ExpertRouter, Experts, KernelProgram, Linear, MessageRingReader, MessageRingWriter,
            PagedAttention, SharedGroup, add, begin_recording, bind_threads, candidates, draw,
            end_recording, gate, likeliest_of, look_up, mix, rms_norm, rotate, softmax,
        },
        kv_pool::KvPool,
        memory::{
            BlockPool, BlockSet, BlockView, BufferManager, Chime, Grant, MemoryTransfer,
            Registration, RemoteGrant, TransferOptions,
        },
        partition::plan_layer_move,
        process::{adopt_orphans, die_with_parent, init_logging},
        router::run_router,
        scheduler::{
            KvFetch, KvSplit, PlaceRequest, Placement, Reservation, RouteRequest, Scheduler,
            Ticket, default_scheduler_config,
        },
    };

    #[pymodule_export]
    #[expect(non_upper_case_globals, reason = "the name that Python packages use")]
    const __version__: &str = env!("CARGO_PKG_VERSION");
}
