//! A list of block ids ordered by when they were last used; every operation is O(1).

use crate::ids::BlockId;

/// No neighbour.
const NIL: u32 = u32::MAX;

#[derive(Clone, Copy, Debug)]
struct Links {
    older: u32,
    newer: u32,
}

/// Doubly linked through one array that is indexed by block id, so that no operation allocates.
#[derive(Debug)]
pub(super) struct LruList {
    links: Vec<Links>,
    oldest: u32,
    newest: u32,
    len: usize,
}

impl LruList {
    /// An empty list for block ids below `num_blocks`.
    pub(super) fn new(num_blocks: usize) -> Self {
        let links = vec![
            Links {
                older: NIL,
                newer: NIL
            };
            num_blocks
        ];
        Self {
            links,
            oldest: NIL,
            newest: NIL,
            len: 0,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Adds a block that is not in the list as the one used last.
    pub(super) fn push_newest(&mut self, block: BlockId) {
        self.links[block.0 as usize] = Links {
            older: self.newest,
            newer: NIL,
        };
        match self.newest {
            NIL => self.oldest = block.0,
            newest => self.links[newest as usize].newer = block.0,
        }
        self.newest = block.0;
        self.len += 1;
    }

    /// Takes out a block that is in the list.
    pub(super) fn remove(&mut self, block: BlockId) {
        let Links { older, newer } = self.links[block.0 as usize];
        match older {
            NIL => self.oldest = newer,
            older => self.links[older as usize].newer = newer,
        }
        match newer {
            NIL => self.newest = older,
            newer => self.links[newer as usize].older = older,
        }
        self.len -= 1;
    }

    /// Takes out the block whose last use is longest ago.
    pub(super) fn pop_oldest(&mut self) -> Option<BlockId> {
        let oldest = self.oldest()?;
        self.remove(oldest);
        Some(oldest)
    }

    /// The block whose last use is longest ago.
    pub(super) fn oldest(&self) -> Option<BlockId> {
        (self.oldest != NIL).then_some(BlockId(self.oldest))
    }

    /// The blocks from the oldest to the newest.
    pub(super) fn iter(&self) -> impl Iterator<Item = BlockId> {
        let first = Some(self.oldest).filter(|&id| id != NIL);
        std::iter::successors(first, |&id| {
            Some(self.links[id as usize].newer).filter(|&id| id != NIL)
        })
        .map(BlockId)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_order_of_use_through_removals_at_both_ends_and_inside() {
        let mut list = LruList::new(5);
        for id in 0..5 {
            list.push_newest(BlockId(id));
        }
        for id in [2, 0, 4] {
            list.remove(BlockId(id));
        }
        list.push_newest(BlockId(2));
        assert_eq!(
            list.iter().map(|block| block.0).collect::<Vec<_>>(),
            [1, 3, 2]
        );
        assert_eq!(list.len(), 3);

        let popped: Vec<u32> = std::iter::from_fn(|| list.pop_oldest())
            .map(|id| id.0)
            .collect();
        assert_eq!(popped, [1, 3, 2]);
        assert_eq!((list.len(), list.iter().count()), (0, 0));
    }
}
