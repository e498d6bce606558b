//! The agent's figures: written by the step loop and the network side, read by anyone, at any time.
//!
//! The load report must go out while a step executes, so it reads this board and never the step loop.

use orchestra_core::step::StepStats;
use orchestra_proto::v1;
use parking_lot::Mutex;
use serde::Serialize;

/// Figures of an agent; counters count from its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct AgentStats {
    /// Sequences that run.
    pub num_running: u32,
    /// Sequences that wait, preempted ones included.
    pub num_waiting: u32,
    /// KV blocks that running sequences hold.
    pub kv_blocks_used: u32,
    /// KV blocks that exist.
    pub kv_blocks_total: u32,
    /// Prompt tokens accepted and not yet computed.
    pub queued_prefill_tokens: u64,
    /// Steps executed.
    pub steps: u64,
    /// Times that a running sequence lost its KV blocks to another.
    pub preemptions: u64,
    /// Those of them whose KV host memory kept.
    pub swaps: u64,
    /// Prompt tokens that the prefix cache gave.
    pub prefix_hit_tokens: u64,
    /// Tokens whose KV was copied back from host memory, where the cache kept it.
    pub host_hit_tokens: u64,
    /// Blocks that host memory keeps for the prefix cache, now.
    pub host_blocks_kept: u32,
    /// Prompt tokens that the prefix cache was asked for.
    pub prefix_query_tokens: u64,
    /// Microseconds spent deciding: taking sequences in, planning steps, applying their outputs.
    pub schedule_us: u64,
    /// Microseconds between handing out a step and its commit.
    pub execute_us: u64,
    /// Commands of the router that the step loop has not taken in yet.
    pub commands_waiting: u32,
    /// Messages that the router has not taken in yet, as of the last step.
    pub outbound_waiting: u32,
    /// Sequences refused.
    pub refusals: u64,
    /// Times that a router welcomed this worker.
    pub attachments: u64,
    /// Attachments dropped because the router read too slowly.
    pub outbound_stalls: u64,
    /// Sequences aborted because their attachment was lost.
    pub aborted_by_detach: u64,
    /// KV blocks that came from other workers.
    pub kv_blocks_fetched: u64,
    /// KV blocks written to other workers while they were computed.
    pub kv_blocks_pushed: u64,
    /// Moves that did not come about, so that this worker computed for itself.
    pub kv_fetch_failures: u64,
    /// Whether a router's stream is open.
    pub is_attached: bool,
    /// Whether new sequences are refused.
    pub is_draining: bool,
}

impl AgentStats {
    /// Whether no sequence runs or waits.
    pub const fn is_idle(&self) -> bool {
        self.num_running == 0 && self.num_waiting == 0
    }

    /// Takes over the scheduler's own figures.
    pub(crate) fn set_scheduler(&mut self, stats: StepStats) {
        self.num_running = stats.num_running;
        self.num_waiting = stats.num_waiting;
        self.kv_blocks_used = stats.kv_blocks_used;
        self.kv_blocks_total = stats.kv_blocks_total;
        self.queued_prefill_tokens = stats.queued_prefill_tokens;
        self.steps = stats.steps;
        self.preemptions = stats.preemptions;
        self.swaps = stats.swaps;
        self.prefix_hit_tokens = stats.prefix_hit_tokens;
        self.prefix_query_tokens = stats.prefix_query_tokens;
        self.host_hit_tokens = stats.host_hit_tokens;
        self.host_blocks_kept = stats.host_blocks_kept;
        self.kv_blocks_fetched = stats.fetched_blocks;
        self.kv_fetch_failures = stats.fetch_failures;
    }

    fn report(&self) -> v1::LoadReport {
        v1::LoadReport {
            num_running: self.num_running,
            num_waiting: self.num_waiting,
            kv_blocks_used: self.kv_blocks_used,
            kv_blocks_total: self.kv_blocks_total,
            queued_prefill_tokens: self.queued_prefill_tokens,
            steps: self.steps,
            preemptions: self.preemptions,
            is_draining: self.is_draining,
            schedule_us: self.schedule_us,
            execute_us: self.execute_us,
            kv_blocks_fetched: self.kv_blocks_fetched,
            kv_blocks_pushed: self.kv_blocks_pushed,
            kv_fetch_failures: self.kv_fetch_failures,
        }
    }
}

/// The shared copy of the figures. The lock is held for a copy, never across a wait.
#[derive(Debug, Default)]
pub(crate) struct LoadBoard(Mutex<AgentStats>);

impl LoadBoard {
    /// The figures now.
    pub(crate) fn read(&self) -> AgentStats {
        *self.0.lock()
    }

    /// Changes some of them.
    pub(crate) fn update(&self, change: impl FnOnce(&mut AgentStats)) {
        change(&mut self.0.lock());
    }

    /// The figures as the router gets them.
    pub(crate) fn report(&self) -> v1::WorkerMessage {
        v1::WorkerMessage {
            message: Some(v1::worker_message::Message::Load(self.read().report())),
        }
    }
}
