//! Dynamo's prefix indexes behind one face: what they share is that they answer with the depth of every holder.

use std::iter;

use dynamo_kv_router::{
    ConcurrentRadixTreeCompressed, LocalBlockHash, OverlapScores, PositionalIndexer, RadixTree,
    RouterEvent, SyncIndexer, ThreadPoolIndexer,
    nested_map::LevelIndex,
    protocols::{
        ExternalSequenceBlockHash, KvCacheEvent, KvCacheEventData, KvCacheRemoveData,
        KvCacheStoreData, KvCacheStoredBlockData, WorkerWithDpRank,
    },
};
use orchestra_core::BlockHash;
use rustc_hash::FxHashMap;
use tokio::runtime::Runtime;

use crate::{caches::Change, trace::TRACE_BLOCK};

/// The step that its documentation names.
const JUMP: usize = 32;

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Radix,
    Positional,
    Compressed,
}

impl Kind {
    pub const ALL: [Self; 3] = [Self::Radix, Self::Positional, Self::Compressed];

    pub fn name(self) -> &'static str {
        match self {
            Self::Radix => "radix",
            Self::Positional => "positional",
            Self::Compressed => "compressed",
        }
    }

    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }
}

/// An index, and what it takes to give it events and wait until they are in.
pub enum Index {
    /// One thread, events in place.
    Radix(RadixTree),
    /// Shared; events in place, with the table of their only writer.
    Positional(PositionalIndexer, FxHashMap<WorkerWithDpRank, LevelIndex>),
    /// Shared, and what its services use; events go to a thread of its own, reads stay here.
    Compressed(ThreadPoolIndexer<ConcurrentRadixTreeCompressed>, Runtime),
}

impl Index {
    pub fn new(kind: Kind) -> Self {
        match kind {
            Kind::Radix => Self::Radix(RadixTree::new()),
            Kind::Positional => {
                Self::Positional(PositionalIndexer::new(JUMP), FxHashMap::default())
            }
            Kind::Compressed => {
                let tree = ConcurrentRadixTreeCompressed::new();
                let runtime = tokio::runtime::Builder::new_current_thread();
                let runtime = { runtime }.build().unwrap();
                Self::Compressed(ThreadPoolIndexer::new(tree, 1, TRACE_BLOCK), runtime)
            }
        }
    }

    pub fn find(&self, sequence: &[LocalBlockHash]) -> OverlapScores {
        match self {
            Self::Radix(tree) => tree.find_matches(sequence.to_vec(), false),
            Self::Positional(index, _) => index.find_matches(sequence, false),
            Self::Compressed(pool, _) => pool.backend().find_matches_impl(sequence, false),
        }
    }

    /// Returns when all events are in.
    pub fn apply(&mut self, events: Vec<RouterEvent>) {
        match self {
            Self::Radix(tree) => {
                for event in events {
                    tree.apply_event(event).unwrap();
                }
            }
            Self::Positional(index, blocks) => {
                for event in events {
                    index.apply_event(blocks, event, None).unwrap();
                }
            }
            Self::Compressed(pool, runtime) => {
                for event in events {
                    pool.enqueue_event(event).unwrap();
                }
                runtime.block_on(pool.flush_and_wait()).unwrap();
            }
        }
    }
}

/// The events of changes in the rival's form.
pub fn router_events(changes: &[Change]) -> Vec<RouterEvent> {
    let external = |hash: &BlockHash| ExternalSequenceBlockHash(hash.0);
    let block = |(hash, local): (&BlockHash, &LocalBlockHash)| KvCacheStoredBlockData {
        block_hash: external(hash),
        tokens_hash: *local,
        mm_extra_info: None,
    };
    let mut events = Vec::new();
    for change in changes {
        let mut push = |data| {
            let event = KvCacheEvent {
                event_id: 0,
                data,
                dp_rank: 0,
            };
            events.push(RouterEvent::new(change.worker as u64, event));
        };
        if !change.stored.is_empty() {
            push(KvCacheEventData::Stored(KvCacheStoreData {
                parent_hash: change.parent().as_ref().map(external),
                start_position: None,
                blocks: iter::zip(&change.stored, change.stored_local())
                    .map(block)
                    .collect(),
            }));
        }
        if !change.removed.is_empty() {
            push(KvCacheEventData::Removed(KvCacheRemoveData {
                block_hashes: change.removed.iter().map(external).collect(),
            }));
        }
    }
    events
}
