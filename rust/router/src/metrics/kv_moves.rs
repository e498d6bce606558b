//! KV that moves between attached workers.

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};

/// Why KV moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MoveKind {
    /// Another worker held it already.
    Fetch,
    /// Another worker was to compute it.
    Split,
}

impl MoveKind {
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Fetch => "fetch",
            Self::Split => "split",
        }
    }
}

/// What became of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MoveOutcome {
    /// Blocks came, all or some.
    Moved,
    /// None came: the worker computed them itself.
    Computed,
    /// The sequence ended before its first token.
    Abandoned,
}

impl MoveOutcome {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Moved => "moved",
            Self::Computed => "computed",
            Self::Abandoned => "abandoned",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabel {
    kind: &'static str,
    outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindLabel {
    kind: &'static str,
}

/// Figures about moved KV.
#[derive(Clone, Debug)]
pub struct KvMoveMetrics {
    moves: Family<OutcomeLabel, Counter>,
    bytes: Family<KindLabel, Counter>,
    undeliverable: Counter,
    /// What workers count themselves; summed from the differences of their reports.
    pub(crate) blocks_fetched: Counter,
    pub(crate) blocks_pushed: Counter,
    pub(crate) failures: Counter,
    pub(crate) blocks_written_through: Counter,
    pub(crate) blocks_kept: Counter,
    pub(crate) write_throughs_dropped: Counter,
    pub(crate) host_hit_tokens: Counter,
}

impl KvMoveMetrics {
    #[rustfmt::skip] // A table: one row per metric.
    pub(super) fn register(r: &mut Registry) -> Self {
        let metrics = Self {
            moves: Family::default(), bytes: Family::default(), undeliverable: Counter::default(),
            blocks_fetched: Counter::default(), blocks_pushed: Counter::default(), failures: Counter::default(),
            blocks_written_through: Counter::default(), blocks_kept: Counter::default(),
            write_throughs_dropped: Counter::default(), host_hit_tokens: Counter::default(),
        };
        r.register("kv_moves", "Sequences whose KV was to come from another worker", metrics.moves.clone());
        r.register("kv_moved_bytes", "KV that came from another worker", metrics.bytes.clone());
        r.register("kv_peer_messages_undeliverable", "Messages between workers that could not be handed on", metrics.undeliverable.clone());
        r.register("worker_kv_blocks_fetched", "KV blocks that workers got from others", metrics.blocks_fetched.clone());
        r.register("worker_kv_blocks_pushed", "KV blocks that workers gave to others while computing them", metrics.blocks_pushed.clone());
        r.register("worker_kv_move_failures", "Moves that did not come about", metrics.failures.clone());
        r.register("worker_kv_blocks_written_through", "KV blocks that workers' keepers have copied", metrics.blocks_written_through.clone());
        r.register("worker_kv_blocks_kept", "KV blocks that workers have copied to keep them for others", metrics.blocks_kept.clone());
        r.register("worker_kv_write_throughs_dropped", "Beginnings of sequences that were not written through because too many waited", metrics.write_throughs_dropped.clone());
        r.register("worker_kv_host_hit_tokens", "Tokens whose KV workers copied back from host memory instead of computing it", metrics.host_hit_tokens.clone());
        for kind in [MoveKind::Fetch, MoveKind::Split] {
            for outcome in [MoveOutcome::Moved, MoveOutcome::Computed, MoveOutcome::Abandoned] {
                let _ = metrics.moves.get_or_create_owned(&label(kind, outcome));
            }
            let _ = metrics.bytes.get_or_create_owned(&KindLabel { kind: kind.as_str() });
        }
        metrics
    }

    /// A sequence whose KV was to come from elsewhere has its first token, or has ended.
    pub(crate) fn ended(&self, kind: MoveKind, outcome: MoveOutcome, bytes: u64) {
        self.moves.get_or_create(&label(kind, outcome)).inc();
        let kind = kind.as_str();
        self.bytes.get_or_create(&KindLabel { kind }).inc_by(bytes);
    }

    /// A worker's message to another one got nowhere.
    pub(crate) fn undeliverable(&self) {
        self.undeliverable.inc();
    }
}

const fn label(kind: MoveKind, outcome: MoveOutcome) -> OutcomeLabel {
    OutcomeLabel {
        kind: kind.as_str(),
        outcome: outcome.as_str(),
    }
}
