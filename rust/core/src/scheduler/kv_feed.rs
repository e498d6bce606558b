//! What workers' prefix caches hold, from events that count up.
//!
//! A worker numbers its messages of KV events. One that was seen already changes nothing. Where a number is left out,
//! nobody knows what the worker dropped since, so all that is known of its cache is forgotten, in O(1), and its
//! events are passed over until it is known again: by [`Scheduler::resync_kv`], or by an event that clears the cache.
//! A lost message therefore costs cache hits for a while, and never a hit that is not there.

use super::{Scheduler, error::SchedulerError, worker::WorkerId};
use crate::{hash::BlockHash, step::KvEvent};

/// Where a worker's numbered KV events stand after a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvFeed {
    /// Nothing is missing.
    InStep,
    /// Messages are missing, and the worker's cache counts as empty until it is known again.
    Lost {
        /// The number that was to come when the first one was missed.
        expected: u64,
    },
}

impl Scheduler {
    /// Takes a change of what a worker's prefix cache holds, without a number.
    ///
    /// A worker that reports more blocks than it has is refused before anything changes; so is one that is gone, and
    /// one whose cache is [assumed](super::KvSource), which may only be cleared.
    pub fn apply_kv_event(&mut self, id: WorkerId, event: &KvEvent) -> Result<(), SchedulerError> {
        if *event != KvEvent::Cleared {
            self.check_reports_kv(id)?;
        }
        let worker = self.workers.get_mut(id);
        let worker = worker.ok_or(SchedulerError::UnknownWorker)?;
        match event {
            KvEvent::Stored(hashes) | KvEvent::Kept(hashes) => {
                let limit = worker
                    .spec
                    .num_blocks
                    .saturating_add(worker.spec.num_host_blocks);
                let room = limit - worker.num_cached_blocks;
                let holder = worker.holder;
                // What is stored already takes no room; mostly there is enough without counting that.
                let is_new = |hash: &&BlockHash| !self.index.contains(**hash, holder);
                if hashes.len() > room as usize
                    && hashes.iter().filter(is_new).count() > room as usize
                {
                    let worker = worker.spec.name.clone();
                    return Err(SchedulerError::TooManyBlocks { worker, limit });
                }
                worker.num_cached_blocks += self.index.insert_all(hashes, holder);
                match event {
                    KvEvent::Kept(_) => worker.kept.extend(hashes),
                    _ => worker.uses_device_for(hashes),
                }
            }
            KvEvent::Removed(hashes) => {
                worker.num_cached_blocks -= self.index.remove_all(hashes, worker.holder);
                worker.uses_device_for(hashes);
            }
            KvEvent::Cleared => self.forget_kv(id),
        }
        Ok(())
    }

    /// Takes a worker's message number `sequence`: KV events in order.
    ///
    /// The first message may have any number, and each that follows the next one. After an error, too, the worker's
    /// cache counts as lost, because events before the refused one were applied.
    pub fn apply_kv_events(
        &mut self,
        id: WorkerId,
        sequence: u64,
        events: &[KvEvent],
    ) -> Result<KvFeed, SchedulerError> {
        self.check_reports_kv(id)?;
        let worker = self.workers.get_mut(id);
        let worker = worker.ok_or(SchedulerError::UnknownWorker)?;
        let expected = worker.kv_sequence.unwrap_or(sequence);
        if sequence < expected {
            return Ok(worker.kv_feed);
        }
        worker.kv_sequence = Some(sequence.saturating_add(1));
        if sequence > expected && worker.kv_feed == KvFeed::InStep {
            self.lose_kv(id, expected);
        }
        for event in events {
            if let Err(error) = self.apply_in_step(id, event) {
                self.lose_kv(id, sequence);
                return Err(error);
            }
        }
        let worker = self.workers.get(id);
        Ok(worker.map_or(KvFeed::InStep, |worker| worker.kv_feed))
    }

    /// Takes all that a worker's prefix cache holds after its message number `sequence`, instead of what is known.
    pub fn resync_kv(
        &mut self,
        id: WorkerId,
        sequence: u64,
        blocks: &[BlockHash],
    ) -> Result<(), SchedulerError> {
        self.check_reports_kv(id)?;
        let worker = self.workers.get_mut(id);
        let worker = worker.ok_or(SchedulerError::UnknownWorker)?;
        let mut distinct = blocks.to_vec();
        distinct.sort_unstable();
        distinct.dedup();
        let limit = worker.spec.num_blocks;
        if distinct.len() > limit as usize {
            let worker = worker.spec.name.clone();
            return Err(SchedulerError::TooManyBlocks { worker, limit });
        }
        worker.kv_sequence = Some(sequence.saturating_add(1));
        worker.kv_feed = KvFeed::InStep;
        self.forget_kv(id);
        self.apply_kv_event(id, &KvEvent::Stored(distinct))
    }

    /// An event where nothing is missing before it; a cleared cache is known again.
    fn apply_in_step(&mut self, id: WorkerId, event: &KvEvent) -> Result<(), SchedulerError> {
        let worker = self.workers.get_mut(id);
        let worker = worker.ok_or(SchedulerError::UnknownWorker)?;
        if *event == KvEvent::Cleared {
            worker.kv_feed = KvFeed::InStep;
        }
        match worker.kv_feed {
            KvFeed::InStep => self.apply_kv_event(id, event),
            KvFeed::Lost { .. } => Ok(()),
        }
    }

    fn lose_kv(&mut self, id: WorkerId, expected: u64) {
        self.forget_kv(id);
        self.num_kv_gaps += 1;
        if let Some(worker) = self.workers.get_mut(id) {
            worker.kv_feed = KvFeed::Lost { expected };
        }
    }

    fn forget_kv(&mut self, id: WorkerId) {
        let Some(worker) = self.workers.get_mut(id) else {
            return;
        };
        self.index
            .remove_holder(worker.holder, worker.num_cached_blocks);
        worker.num_cached_blocks = 0;
        worker.kept.clear();
        if let Some(assumed) = &mut worker.assumed {
            assumed.clear();
        }
        worker.holder = self.index.add_holder(id.slot);
        self.refresh(id.slot);
    }
}
