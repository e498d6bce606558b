//! The registered workers, by slot and by name.

use rustc_hash::FxHashMap;

use super::{
    standing::{NIL, Standing},
    worker::{Worker, WorkerId},
};
use crate::hash::BlockHash;

/// Workers in dense slots. A slot is used again once its worker is gone; an id is not.
#[derive(Debug, Default)]
pub(super) struct Workers {
    slots: Vec<Option<Box<Worker>>>,
    /// Beside `slots`; that of an empty one belongs to no group.
    standings: Vec<Standing>,
    free: Vec<u32>,
    names: FxHashMap<String, WorkerId>,
    /// Workers registered so far.
    num_registered: u32,
}

impl Workers {
    pub(super) fn len(&self) -> usize {
        self.names.len()
    }

    /// Slots, empty ones included.
    pub(super) fn num_slots(&self) -> usize {
        self.slots.len()
    }

    /// The slot that the next worker gets.
    pub(super) fn next_slot(&self) -> u32 {
        self.free.last().copied().unwrap_or(self.slots.len() as u32)
    }

    pub(super) fn insert(&mut self, worker: Worker) -> WorkerId {
        self.num_registered += 1;
        let slot = self.free.pop().unwrap_or(self.slots.len() as u32);
        let id = WorkerId {
            number: self.num_registered,
            slot,
        };
        self.names.insert(worker.spec.name.clone(), id);
        let standing = Standing::new(id, &worker);
        if slot as usize == self.slots.len() {
            self.slots.push(None);
            self.standings.push(standing);
        } else {
            self.standings[slot as usize] = standing;
        }
        self.slots[slot as usize] = Some(Box::new(worker));
        id
    }

    pub(super) fn remove(&mut self, id: WorkerId) -> Option<Worker> {
        self.get(id)?;
        let worker = self.slots[id.slot as usize].take()?;
        self.standings[id.slot as usize].group = NIL;
        self.names.remove(&worker.spec.name);
        self.free.push(id.slot);
        Some(*worker)
    }

    pub(super) fn get(&self, id: WorkerId) -> Option<&Worker> {
        let worker = self.slots.get(id.slot as usize)?.as_deref();
        worker.filter(|_| self.standings[id.slot as usize].id == id)
    }

    pub(super) fn get_mut(&mut self, id: WorkerId) -> Option<&mut Worker> {
        let is_same = self.standings.get(id.slot as usize)?.id == id;
        let worker = self.slots[id.slot as usize].as_deref_mut();
        worker.filter(|_| is_same)
    }

    /// The worker in a slot and its standing.
    pub(super) fn at(&self, slot: u32) -> Option<(&Worker, &Standing)> {
        let worker = self.slots.get(slot as usize)?.as_deref()?;
        Some((worker, &self.standings[slot as usize]))
    }

    /// How many of these leading blocks, which the worker in a slot holds, are in its host memory. They are the last of
    /// them: the device holds a block only with all before it.
    pub(super) fn num_kept(&self, slot: u32, blocks: &[BlockHash]) -> u64 {
        match self.at(slot) {
            Some((worker, standing)) if standing.has_kept => {
                let num_on_device = blocks.partition_point(|hash| !worker.kept.contains(hash));
                (blocks.len() - num_on_device) as u64
            }
            _ => 0,
        }
    }

    pub(super) fn by_name(&self, name: &str) -> Option<WorkerId> {
        self.names.get(name).copied()
    }

    pub(super) fn standing(&self, slot: u32) -> &Standing {
        &self.standings[slot as usize]
    }

    pub(super) fn standings(&self) -> &[Standing] {
        &self.standings
    }

    pub(super) fn standings_mut(&mut self) -> &mut [Standing] {
        &mut self.standings
    }

    /// In no order.
    pub(super) fn iter(&self) -> impl Iterator<Item = (WorkerId, &Worker)> + Clone + '_ {
        let slots = self.slots.iter().zip(&self.standings);
        slots.filter_map(|(worker, standing)| Some((standing.id, worker.as_deref()?)))
    }

    /// In order of registration.
    pub(super) fn in_order(&self) -> Vec<(WorkerId, &Worker)> {
        let mut workers: Vec<_> = self.iter().collect();
        workers.sort_unstable_by_key(|&(id, _)| id);
        workers
    }

    /// # Panics
    /// If names and slots do not agree.
    pub(super) fn check_integrity(&self) {
        assert_eq!(self.iter().count(), self.names.len());
        assert_eq!(self.slots.len(), self.names.len() + self.free.len());
        for (id, worker) in self.iter() {
            assert_eq!(self.names.get(&worker.spec.name), Some(&id));
        }
    }
}
