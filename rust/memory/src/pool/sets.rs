//! Which blocks belong together, in which order: the sequences of a pool.

/// A set of a pool, until it is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SetId(u32);

/// No slot: a block of the set that was freed or lost.
const GONE: u32 = u32::MAX;

/// Who owns a slot: a set, and the block's number in it.
#[derive(Clone, Copy, Debug)]
struct Owner {
    set: u32,
    at: u32,
}

/// Every set of a pool, and the owner of each slot.
#[derive(Debug, Default)]
pub(crate) struct Sets {
    slots: Vec<Vec<u32>>,
    unused: Vec<u32>,
    /// Right for every slot that a set lists; anything for the others.
    owners: Vec<Owner>,
}

impl Sets {
    pub(crate) fn add_slots(&mut self, n: u32) {
        let len = self.owners.len() + n as usize;
        self.owners.resize(len, Owner { set: GONE, at: 0 });
    }

    pub(crate) fn insert(&mut self, slots: Vec<u32>) -> SetId {
        let set = self.unused.pop().unwrap_or_else(|| {
            self.slots.push(Vec::new());
            self.slots.len() as u32 - 1
        });
        self.own(set, 0, &slots);
        self.slots[set as usize] = slots;
        SetId(set)
    }

    pub(crate) fn append(&mut self, set: SetId, slots: &[u32]) {
        let from = self.slots[set.0 as usize].len();
        self.own(set.0, from, slots);
        self.slots[set.0 as usize].extend_from_slice(slots);
    }

    fn own(&mut self, set: u32, from: usize, slots: &[u32]) {
        for (at, &slot) in (from as u32..).zip(slots) {
            self.owners[slot as usize] = Owner { set, at };
        }
    }

    /// Forgets a set and returns the slots that it still had.
    pub(crate) fn remove(&mut self, set: SetId) -> impl Iterator<Item = u32> + use<> {
        let slots = std::mem::take(&mut self.slots[set.0 as usize]);
        self.unused.push(set.0);
        slots.into_iter().filter(|&slot| slot != GONE)
    }

    /// Takes the blocks from number `from` on.
    pub(crate) fn truncate(&mut self, set: SetId, from: usize) -> Vec<u32> {
        let slots = &mut self.slots[set.0 as usize];
        let mut tail = slots.split_off(from.min(slots.len()));
        tail.retain(|&slot| slot != GONE);
        tail
    }

    /// A block that its set no longer has.
    pub(crate) fn remove_block(&mut self, slot: u32) {
        let owner = self.owners[slot as usize];
        let place = &mut self.slots[owner.set as usize][owner.at as usize];
        debug_assert_eq!(*place, slot, "a live block is where its owner lists it");
        *place = GONE;
    }

    /// Whether the block of this number is gone.
    pub(crate) fn is_gap(&self, set: SetId, at: usize) -> bool {
        self.slots[set.0 as usize].get(at) == Some(&GONE)
    }

    /// Lists a slot under a number whose block is gone.
    pub(crate) fn fill_gap(&mut self, set: SetId, at: usize, slot: u32) {
        let place = &mut self.slots[set.0 as usize][at];
        debug_assert_eq!(*place, GONE, "no block is there");
        *place = slot;
        self.own(set.0, at, &[slot]);
    }

    /// A block that lies elsewhere now.
    pub(crate) fn move_block(&mut self, from: u32, to: u32) {
        let owner = self.owners[from as usize];
        let place = &mut self.slots[owner.set as usize][owner.at as usize];
        debug_assert_eq!(*place, from, "a live block is where its owner lists it");
        *place = to;
        self.owners[to as usize] = owner;
    }

    /// Numbers that the set has given out, blocks since freed included.
    pub(crate) fn len(&self, set: SetId) -> usize {
        self.slots[set.0 as usize].len()
    }

    pub(crate) fn slot(&self, set: SetId, at: usize) -> Option<u32> {
        let slot = *self.slots[set.0 as usize].get(at)?;
        (slot != GONE).then_some(slot)
    }

    /// The blocks of a set in order, without those that are gone.
    pub(crate) fn iter_set(&self, set: SetId) -> impl Iterator<Item = u32> {
        self.slots[set.0 as usize]
            .iter()
            .copied()
            .filter(|&slot| slot != GONE)
    }

    /// Every set's slots in order, blocks that are gone included as `None`.
    pub(crate) fn iter(&self) -> impl Iterator<Item = impl Iterator<Item = Option<u32>>> {
        self.slots
            .iter()
            .filter(|slots| !slots.is_empty())
            .map(|slots| slots.iter().map(|&slot| (slot != GONE).then_some(slot)))
    }

    /// Sets that there are, forgotten ones included.
    pub(crate) const fn num_sets(&self) -> usize {
        self.slots.len()
    }

    /// The blocks of one of them, without those that are gone.
    pub(crate) fn nth(&self, index: usize) -> impl Iterator<Item = u32> {
        let slots = self.slots[index].iter().copied();
        slots.filter(|&slot| slot != GONE)
    }

    /// The set that lists a slot, and the number there.
    pub(crate) fn owner(&self, slot: u32) -> Option<(SetId, usize)> {
        let owner = self.owners.get(slot as usize)?;
        let listed = self.slots.get(owner.set as usize)?.get(owner.at as usize)?;
        (*listed == slot).then_some((SetId(owner.set), owner.at as usize))
    }
}
