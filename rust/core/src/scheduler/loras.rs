//! Which workers have which LoRA adapters in memory.
//!
//! An adapter is loaded on demand, so a worker without it may take the request too; it costs as much as
//! [`lora_load_tokens`](super::SchedulerConfig::lora_load_tokens) tokens of prefill. A worker that was chosen for an
//! adapter counts as having it from the decision on, so that a burst for a new adapter meets on the workers that are
//! loading it; the worker's next report says what came of it.

use rustc_hash::FxHashMap;

use super::{Scheduler, bits::Bits, error::SchedulerError, worker::WorkerId};
use crate::hash::{HashSeed, SeedParts};

/// A version of a LoRA adapter of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lora<'a> {
    /// Its name, 1 to 128 bytes.
    pub id: &'a str,
    /// Counts its updates; part of every block's identity.
    pub version: u64,
}

impl Lora<'_> {
    /// One number for the adapter of this model.
    fn key(self, model: &str) -> HashSeed {
        let parts = SeedParts {
            model,
            lora_id: self.id,
            lora_version: self.version,
            ..SeedParts::default()
        };
        parts.seed()
    }
}

/// Residents of every adapter.
#[derive(Debug, Default)]
pub(super) struct Loras {
    /// Slots of the workers that have the adapter, or were chosen for it. No set is empty.
    residents: FxHashMap<HashSeed, Bits>,
    nobody: Bits,
}

impl Loras {
    pub(super) fn residents(&self, model: &str, lora: Lora<'_>) -> &Bits {
        self.residents.get(&lora.key(model)).unwrap_or(&self.nobody)
    }

    fn insert(&mut self, key: HashSeed, slot: u32) -> bool {
        self.residents.entry(key).or_default().insert(slot)
    }

    /// Forgets that the worker in this slot has these adapters.
    pub(super) fn remove(&mut self, keys: &[HashSeed], slot: u32) {
        for key in keys {
            if let Some(residents) = self.residents.get_mut(key) {
                residents.remove(slot);
                if residents.len() == 0 {
                    self.residents.remove(key);
                }
            }
        }
    }

    /// (adapter, slot) pairs.
    pub(super) fn len(&self) -> usize {
        self.residents.values().map(Bits::len).sum()
    }

    pub(super) fn contains(&self, key: HashSeed, slot: u32) -> bool {
        let residents = self.residents.get(&key);
        residents.is_some_and(|residents| residents.contains(slot))
    }
}

impl Scheduler {
    /// Takes a worker's report of the adapters that it has in memory: all of them, instead of those known so far.
    ///
    /// At most the worker's `max_loras`, with ids of 1 to 128 bytes; a report that breaks a rule changes nothing.
    pub fn set_loras(&mut self, id: WorkerId, loras: &[Lora<'_>]) -> Result<(), SchedulerError> {
        let worker = self.workers.get_mut(id);
        let worker = worker.ok_or(SchedulerError::UnknownWorker)?;
        let limit = worker.spec.max_loras;
        if loras.len() > limit as usize {
            return Err(SchedulerError::LimitReached {
                kind: "LoRA adapters on the worker",
                current: loras.len() as u32,
                limit,
            });
        }
        for lora in loras {
            super::worker::validate_name("lora.id", lora.id)?;
        }
        let keys = loras.iter().map(|lora| lora.key(&worker.spec.model));
        let mut keys: Vec<HashSeed> = keys.collect();
        keys.sort_unstable();
        keys.dedup();
        let before = std::mem::replace(&mut worker.loras, keys.clone());
        self.loras.remove(&before, id.slot);
        for key in keys {
            self.loras.insert(key, id.slot);
        }
        Ok(())
    }

    /// The worker was chosen for a request with this adapter and has it from now on.
    pub(super) fn expect_lora(&mut self, id: WorkerId, lora: Lora<'_>) {
        let Some(worker) = self.workers.get_mut(id) else {
            return;
        };
        let key = lora.key(&worker.spec.model);
        if self.loras.insert(key, id.slot) {
            worker.loras.push(key);
        }
    }
}
