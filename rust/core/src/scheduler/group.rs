//! Workers that are alike in a request's eyes: one model, weights epoch, block size, and the same terms.

use std::collections::BTreeMap;

use rustc_hash::FxHashMap;

use super::{
    bits::Bits,
    load_grid::LoadGrid,
    output_length::OutputLength,
    ring::Ring,
    standing::{NIL, NUM_ROOM_CLASSES, Standing},
    terms::Terms,
    worker::WorkerSpec,
};
use crate::hash::HashSeed;

/// What tells the groups of a model apart.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct GroupKey {
    pub(super) weights_epoch: u64,
    pub(super) block_size: u32,
    pub(super) terms: Terms,
}

/// Workers that share hash chains and take the same requests, so that one search serves them all.
#[derive(Debug)]
pub(super) struct Group {
    pub(super) key: GroupKey,
    /// Start of the chains of requests without a salt.
    pub(super) seed: HashSeed,
    /// Slots, in no order.
    pub(super) members: Vec<u32>,
    /// Those that take requests, by load.
    pub(super) grid: LoadGrid,
    /// By class: those that take requests, have a place in the batch and free KV of this class or a higher one.
    room: Vec<Bits>,
}

impl Group {
    fn new(key: GroupKey, seed: HashSeed) -> Self {
        Self {
            key,
            seed,
            members: Vec::new(),
            grid: LoadGrid::default(),
            room: vec![Bits::default(); NUM_ROOM_CLASSES],
        }
    }

    /// Those that may have this class of room or more.
    pub(super) fn room(&self, class: usize) -> &Bits {
        &self.room[class]
    }

    /// Lets a worker take requests.
    pub(super) fn open(&mut self, standings: &mut [Standing], slot: u32) {
        self.grid.insert(standings, slot);
        if let Some(class) = standings[slot as usize].room() {
            self.change_room(slot, None, Some(class));
        }
    }

    /// Lets a worker take no more requests.
    pub(super) fn close(&mut self, standings: &mut [Standing], slot: u32) {
        self.grid.remove(standings, slot);
        let class = standings[slot as usize].room();
        self.change_room(slot, class, None);
    }

    /// Moves a worker from one class of room to another: as many bits as there are classes between.
    pub(super) fn change_room(&mut self, slot: u32, from: Option<usize>, to: Option<usize>) {
        let (from, to) = (
            from.map_or(0, |class| class + 1),
            to.map_or(0, |class| class + 1),
        );
        for class in from..to {
            self.room[class].insert(slot);
        }
        for class in to..from {
            self.room[class].remove(slot);
        }
    }

    /// # Panics
    /// If the grid or the room does not agree with the standings.
    pub(super) fn check_integrity(&self, standings: &[Standing]) {
        let is_open = |&&slot: &&u32| standings[slot as usize].cell != NIL;
        let num_open = self.members.iter().filter(is_open).count();
        self.grid.check_integrity(standings, num_open);
        for (class, room) in self.room.iter().enumerate() {
            let mut count = 0;
            for &slot in &self.members {
                let standing = &standings[slot as usize];
                let is_open = standing.cell != NIL;
                let has_room = is_open && standing.room().is_some_and(|own| own >= class);
                assert_eq!(room.contains(slot), has_room);
                count += usize::from(has_room);
            }
            assert_eq!(room.len(), count);
        }
    }
}

/// A model's groups.
#[derive(Debug, Default)]
pub(super) struct Model {
    /// The numbers of its groups.
    pub(super) groups: BTreeMap<GroupKey, u32>,
    /// For consistent hashing; empty under any other policy.
    pub(super) ring: Ring,
    /// The slot that round robin chose last.
    pub(super) last_slot: Option<u32>,
    /// Of its finished requests.
    pub(super) output_length: OutputLength,
}

/// All groups.
#[derive(Debug, Default)]
pub(super) struct Groups {
    /// A group whose last member left keeps its number for the next one.
    by_number: Vec<Group>,
    free: Vec<u32>,
    models: FxHashMap<String, Model>,
}

impl Groups {
    pub(super) fn model(&self, name: &str) -> Option<&Model> {
        self.models.get(name)
    }

    pub(super) fn model_mut(&mut self, name: &str) -> Option<&mut Model> {
        self.models.get_mut(name)
    }

    /// Workers of the model whose blocks have the identities that this group's have.
    pub(super) fn num_sharers(&self, model: &Model, key: &GroupKey) -> usize {
        let identity = |key: &GroupKey| (key.weights_epoch, key.block_size);
        let alike = model
            .groups
            .iter()
            .filter(|(other, _)| identity(other) == identity(key));
        alike
            .map(|(_, &number)| self.get(number).members.len())
            .sum()
    }

    pub(super) fn get(&self, number: u32) -> &Group {
        &self.by_number[number as usize]
    }

    pub(super) fn get_mut(&mut self, number: u32) -> &mut Group {
        &mut self.by_number[number as usize]
    }

    /// Adds a worker to the group of its kind; returns the group's number.
    pub(super) fn add_member(&mut self, spec: &WorkerSpec, slot: u32) -> u32 {
        let key = GroupKey {
            weights_epoch: spec.weights_epoch,
            block_size: spec.block_size,
            terms: Terms::of(spec),
        };
        let model = self.models.entry(spec.model.clone()).or_default();
        let number = *model.groups.entry(key.clone()).or_insert_with(|| {
            let group = Group::new(key, spec.hash_seed("", None));
            if let Some(number) = self.free.pop() {
                self.by_number[number as usize] = group;
                return number;
            }
            self.by_number.push(group);
            (self.by_number.len() - 1) as u32
        });
        self.by_number[number as usize].members.push(slot);
        number
    }

    /// Takes a closed worker out of its group.
    pub(super) fn remove_member(&mut self, spec: &WorkerSpec, number: u32, slot: u32) {
        let group = &mut self.by_number[number as usize];
        group.members.retain(|&member| member != slot);
        if !group.members.is_empty() {
            return;
        }
        self.free.push(number);
        if let Some(model) = self.models.get_mut(&spec.model) {
            model.groups.remove(&group.key);
            if model.groups.is_empty() {
                self.models.remove(&spec.model);
            }
        }
    }

    /// # Panics
    /// If a group is wrong.
    pub(super) fn check_integrity(&self, standings: &[Standing]) {
        for number in self.models.values().flat_map(|model| model.groups.values()) {
            self.get(*number).check_integrity(standings);
        }
    }
}
