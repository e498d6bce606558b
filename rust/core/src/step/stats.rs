//! What a replica says about its load.

use std::time::Duration;

/// Gauges as of now, and counters since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepStats {
    /// Sequences that hold KV blocks.
    pub num_running: u32,
    /// Requests that wait to start or, preempted, to start again.
    pub num_waiting: u32,
    /// Blocks that sequences hold; cached blocks that nobody holds are not counted.
    pub kv_blocks_used: u32,
    /// Blocks in all.
    pub kv_blocks_total: u32,
    /// Known tokens whose KV has still to be computed, of waiting and of prefilling requests. Waiting ones
    /// count with what the prefix cache lacked when they came.
    pub queued_prefill_tokens: u64,
    /// How long the request that started last had waited.
    pub queue_wait: Duration,
    /// From the last step's plan to its output.
    pub step_time: Duration,
    /// Steps planned.
    pub steps: u64,
    /// Times that a running sequence lost its blocks to another.
    pub preemptions: u64,
    /// Those of them that kept what was computed in host memory.
    pub swaps: u64,
    /// Prompt tokens that the prefix cache gave to requests when they first ran.
    pub prefix_hit_tokens: u64,
    /// Tokens whose KV was copied back from host memory, where the cache kept it.
    pub host_hit_tokens: u64,
    /// Blocks that host memory keeps for the prefix cache, now.
    pub host_blocks_kept: u32,
    /// Prompt tokens of those requests in all.
    pub prefix_query_tokens: u64,
    /// Blocks that other workers brought.
    pub fetched_blocks: u64,
    /// Times that what a request awaited of another worker did not come.
    pub fetch_failures: u64,
}
