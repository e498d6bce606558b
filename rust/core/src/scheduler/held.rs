//! The reservations that are held: found by id in one step, and known by age.

use super::{
    reservation::ReservationId,
    standing::NIL,
    worker::{Demand, WorkerId},
};
use crate::time::Time;

/// What the scheduler remembers of a reservation.
#[derive(Clone, Copy, Debug)]
pub(super) struct Held {
    pub(super) worker: WorkerId,
    pub(super) demand: Demand,
    /// `Worker::num_reports` when it was made.
    pub(super) num_reports: u64,
    pub(super) reserved_at: Time,
}

/// A cache line.
#[derive(Debug)]
struct Entry {
    /// [`ReservationId::number`] of who is here; 0: nobody.
    number: u64,
    held: Held,
    /// Neighbours by age; those of an empty entry mean nothing.
    older: u32,
    newer: u32,
}

/// All that are held, in slots that are used again, chained from the oldest to the newest.
#[derive(Debug)]
pub(super) struct HeldReservations {
    entries: Vec<Entry>,
    free: Vec<u32>,
    oldest: u32,
    newest: u32,
}

impl Default for HeldReservations {
    fn default() -> Self {
        Self {
            entries: Vec::new(),
            free: Vec::new(),
            oldest: NIL,
            newest: NIL,
        }
    }
}

impl HeldReservations {
    pub(super) fn len(&self) -> usize {
        self.entries.len() - self.free.len()
    }

    /// Keeps the newest reservation. `number` is above that of every one before it.
    pub(super) fn insert(&mut self, number: u64, held: Held) -> ReservationId {
        let slot = self.free.pop().unwrap_or(self.entries.len() as u32);
        let entry = Entry {
            number,
            held,
            older: self.newest,
            newer: NIL,
        };
        match self.entries.get_mut(slot as usize) {
            Some(empty) => *empty = entry,
            None => self.entries.push(entry),
        }
        match self.newest {
            NIL => self.oldest = slot,
            newest => self.entries[newest as usize].newer = slot,
        }
        self.newest = slot;
        ReservationId { number, slot }
    }

    pub(super) fn get(&self, id: ReservationId) -> Option<&Held> {
        let entry = self.entries.get(id.slot as usize)?;
        (entry.number == id.number).then_some(&entry.held)
    }

    pub(super) fn get_mut(&mut self, id: ReservationId) -> Option<&mut Held> {
        let entry = self.entries.get_mut(id.slot as usize)?;
        (entry.number == id.number).then_some(&mut entry.held)
    }

    pub(super) fn contains(&self, id: ReservationId) -> bool {
        self.get(id).is_some()
    }

    pub(super) fn remove(&mut self, id: ReservationId) -> Option<Held> {
        let held = *self.get_mut(id)?;
        self.vacate(id.slot);
        Some(held)
    }

    /// Forgets what is held on a worker; names it. O(everything held).
    pub(super) fn remove_worker(&mut self, worker: WorkerId) -> Vec<ReservationId> {
        let entries = self.entries.iter().zip(0_u32..);
        let of_worker =
            entries.filter(|(entry, _)| entry.number != 0 && entry.held.worker == worker);
        let ids = of_worker.map(|(entry, slot)| ReservationId {
            number: entry.number,
            slot,
        });
        let ids: Vec<ReservationId> = ids.collect();
        for id in &ids {
            self.vacate(id.slot);
        }
        ids
    }

    fn vacate(&mut self, slot: u32) {
        let entry = &mut self.entries[slot as usize];
        entry.number = 0;
        let (older, newer) = (entry.older, entry.newer);
        match older {
            NIL => self.oldest = newer,
            _ => self.entries[older as usize].newer = newer,
        }
        match newer {
            NIL => self.newest = older,
            _ => self.entries[newer as usize].older = older,
        }
        self.free.push(slot);
    }

    /// The one that is held longest.
    pub(super) fn oldest(&self) -> Option<&Held> {
        Some(&self.entries.get(self.oldest as usize)?.held)
    }

    /// All of them, oldest first.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Held> {
        let entry = |slot: u32| self.entries.get(slot as usize);
        std::iter::successors(entry(self.oldest), move |&it| entry(it.newer)).map(|it| &it.held)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn held(worker: u32, number: u64) -> Held {
        Held {
            worker: WorkerId {
                number: worker,
                slot: worker,
            },
            demand: Demand::default(),
            num_reports: number,
            reserved_at: Time::ZERO,
        }
    }

    proptest! {
        #[test]
        fn it_equals_a_map_by_number(ops in prop::collection::vec((0_u8..8, 0_u32..3, 0_usize..40), 1..300)) {
            assert_eq!(size_of::<Entry>(), 64);
            let (mut real, mut model) = (HeldReservations::default(), BTreeMap::new());
            let mut ids = Vec::new();
            for (number, (op, worker, pick)) in (1_u64..).zip(ops) {
                match op {
                    0..4 => {
                        ids.push(real.insert(number, held(worker, number)));
                        model.insert(number, worker);
                    }
                    4..7 => {
                        // Also ids that are gone, and whose slot somebody else has.
                        let Some(&id) = pick.checked_rem(ids.len()).map(|index| &ids[index]) else { continue };
                        let removed = real.remove(id).map(|held| held.num_reports);
                        prop_assert_eq!(removed, model.remove(&id.number).map(|_| id.number));
                    }
                    _ => {
                        let gone = real.remove_worker(held(worker, 0).worker);
                        prop_assert!(gone.iter().all(|&id| model.contains_key(&id.number) && !real.contains(id)));
                        let num_held = model.len();
                        model.retain(|_, of| *of != worker);
                        prop_assert_eq!(gone.len(), num_held - model.len());
                    }
                }
                prop_assert_eq!(real.len(), model.len());
                prop_assert!(real.iter().map(|held| held.num_reports).eq(model.keys().copied()));
                prop_assert_eq!(real.oldest().map(|held| held.num_reports), model.keys().next().copied());
            }
        }
    }
}
