//! Sets of holders, for the blocks that more than one worker holds.

use std::ops::ControlFlow;

use crate::scheduler::{bits::Bits, chunks::Chunks};

/// Names what a worker holds, until it is cleared or leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::scheduler) struct HolderId(pub(super) u16);

const FEW_MAX: usize = 12;
/// Beyond, 16,384 workers are 8 bytes a member at most as a bitmap.
const LIST_MAX: usize = 256;
/// Records that are allocated together.
const CHUNK: usize = 4096;

/// A set of holders in the smallest form; 32 bytes here.
#[derive(Debug)]
enum Set {
    Few { len: u8, ids: [u16; FEW_MAX] },
    List(Vec<u16>),
    Bits(Box<Bits>),
}

/// Holders of one block, to look at.
#[derive(Clone, Copy, Debug)]
pub(in crate::scheduler) enum Holders<'a> {
    One(u16),
    List(&'a [u16]),
    Bits(&'a Bits),
}

impl Holders<'_> {
    pub(super) const NONE: Self = Holders::List(&[]);

    /// How many there are, those that left and are not swept yet included.
    pub(in crate::scheduler) fn len(&self) -> usize {
        match self {
            Self::One(_) => 1,
            Self::List(ids) => ids.len(),
            Self::Bits(bits) => bits.len(),
        }
    }

    pub(in crate::scheduler) fn contains(&self, holder: HolderId) -> bool {
        match self {
            Self::One(id) => *id == holder.0,
            Self::List(ids) if ids.len() <= FEW_MAX => ids.contains(&holder.0),
            Self::List(ids) => ids.binary_search(&holder.0).is_ok(),
            Self::Bits(bits) => bits.contains(holder.0.into()),
        }
    }

    /// Visits holders until told to stop.
    pub(in crate::scheduler) fn try_for_each(
        &self,
        mut visit: impl FnMut(HolderId) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        match self {
            Self::One(id) => visit(HolderId(*id)),
            Self::List(ids) => ids.iter().try_for_each(|&id| visit(HolderId(id))),
            Self::Bits(bits) => bits.iter().try_for_each(|id| visit(HolderId(id as u16))),
        }
    }

    pub(in crate::scheduler) fn for_each(&self, mut visit: impl FnMut(HolderId)) {
        match self {
            Self::One(id) => visit(HolderId(*id)),
            Self::List(ids) => ids.iter().for_each(|&id| visit(HolderId(id))),
            Self::Bits(bits) => bits.iter().for_each(|id| visit(HolderId(id as u16))),
        }
    }
}

/// All sets, named by number.
#[derive(Debug, Default)]
pub(super) struct Sets {
    records: Chunks<Set, CHUNK>,
    free: Vec<u32>,
    /// What lists and bitmaps hold on the heap.
    heap_bytes: usize,
}

impl Sets {
    /// Makes a set of two.
    pub(super) fn add(&mut self, first: HolderId, second: HolderId) -> u32 {
        let mut ids = [0; FEW_MAX];
        ids[0] = first.0;
        ids[1] = second.0;
        let set = Set::Few { len: 2, ids };
        if let Some(id) = self.free.pop() {
            *self.at(id) = set;
            return id;
        }
        self.records.push(set) as u32
    }

    fn at(&mut self, id: u32) -> &mut Set {
        &mut self.records[id as usize]
    }

    pub(super) fn get(&self, id: u32) -> Holders<'_> {
        match &self.records[id as usize] {
            Set::Few { len, ids } => Holders::List(&ids[..usize::from(*len)]),
            Set::List(ids) => Holders::List(ids),
            Set::Bits(bits) => Holders::Bits(bits),
        }
    }

    /// Adds a holder; `false` where it was one already.
    pub(super) fn insert(&mut self, id: u32, holder: HolderId) -> bool {
        let set = self.at(id);
        let before = set.heap_bytes();
        let is_new = set.insert(holder.0);
        self.heap_bytes = self.heap_bytes + self.at(id).heap_bytes() - before;
        is_new
    }

    /// Removes a holder; `false` where it was none.
    pub(super) fn remove(&mut self, id: u32, holder: HolderId) -> bool {
        let set = self.at(id);
        let before = set.heap_bytes();
        let was_member = set.remove(holder.0);
        self.heap_bytes = self.heap_bytes + self.at(id).heap_bytes() - before;
        was_member
    }

    /// Gives a set's number back and says who the last holder was, if there is one.
    pub(super) fn dissolve(&mut self, id: u32) -> Option<HolderId> {
        let mut last = None;
        self.get(id).for_each(|holder| last = Some(holder));
        self.heap_bytes -= self.at(id).heap_bytes();
        *self.at(id) = Set::Few {
            len: 0,
            ids: [0; FEW_MAX],
        };
        self.free.push(id);
        last
    }

    /// Bytes on the heap.
    pub(super) fn heap_bytes(&self) -> usize {
        self.heap_bytes + self.records.heap_bytes() + self.free.capacity() * size_of::<u32>()
    }
}

impl Set {
    fn heap_bytes(&self) -> usize {
        match self {
            Self::Few { .. } => 0,
            Self::List(ids) => ids.capacity() * size_of::<u16>(),
            Self::Bits(bits) => size_of::<Bits>() + bits.heap_bytes(),
        }
    }

    fn insert(&mut self, holder: u16) -> bool {
        match self {
            Self::Few { len, ids } => {
                let used = usize::from(*len);
                if ids[..used].contains(&holder) {
                    return false;
                }
                if used < FEW_MAX {
                    ids[used] = holder;
                    *len += 1;
                } else {
                    let mut list = Vec::with_capacity(FEW_MAX * 2);
                    list.extend_from_slice(ids);
                    list.push(holder);
                    list.sort_unstable();
                    *self = Self::List(list);
                }
                true
            }
            Self::List(list) => {
                let Err(position) = list.binary_search(&holder) else {
                    return false;
                };
                if list.len() < LIST_MAX {
                    list.insert(position, holder);
                } else {
                    let mut bits = Bits::default();
                    for id in list.iter().copied().chain([holder]) {
                        bits.insert(id.into());
                    }
                    *self = Self::Bits(Box::new(bits));
                }
                true
            }
            Self::Bits(bits) => bits.insert(holder.into()),
        }
    }

    fn remove(&mut self, holder: u16) -> bool {
        match self {
            Self::Few { len, ids } => {
                let used = usize::from(*len);
                let Some(position) = ids[..used].iter().position(|&id| id == holder) else {
                    return false;
                };
                ids[position] = ids[used - 1];
                *len -= 1;
                true
            }
            Self::List(list) => {
                let Ok(position) = list.binary_search(&holder) else {
                    return false;
                };
                list.remove(position);
                if list.len() <= FEW_MAX / 2 {
                    let mut ids = [0; FEW_MAX];
                    ids[..list.len()].copy_from_slice(list);
                    let len = list.len() as u8;
                    *self = Self::Few { len, ids };
                }
                true
            }
            Self::Bits(bits) => {
                let was_member = bits.remove(holder.into());
                if bits.len() <= LIST_MAX / 2 {
                    *self = Self::List(bits.iter().map(|id| id as u16).collect());
                }
                was_member
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_form_equals_a_set() {
        assert!(size_of::<Set>() <= 32);
        let mut sets = Sets::default();
        let id = sets.add(HolderId(700), HolderId(3));
        let mut expected = BTreeSet::from([700, 3]);
        let ids = |step: u16| step * 37 % 701;
        for step in 0..701 {
            assert_eq!(
                sets.insert(id, HolderId(ids(step))),
                expected.insert(ids(step))
            );
        }
        for step in 0..700 {
            assert_eq!(
                sets.remove(id, HolderId(ids(step))),
                expected.remove(&ids(step))
            );
            let holders = sets.get(id);
            assert_eq!(holders.len(), expected.len());
            assert!((0..701).all(|id| holders.contains(HolderId(id)) == expected.contains(&id)));
        }
        assert_eq!(sets.dissolve(id).map(|last| last.0), expected.pop_first());
    }
}
