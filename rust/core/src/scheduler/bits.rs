//! A growing set of small integers, one bit each.

/// A set of small integers that knows its size.
#[derive(Clone, Debug, Default)]
pub(super) struct Bits {
    words: Vec<u64>,
    count: u32,
}

impl Bits {
    /// Members.
    pub(super) fn len(&self) -> usize {
        self.count as usize
    }

    /// Bytes on the heap.
    pub(super) fn heap_bytes(&self) -> usize {
        self.words.capacity() * size_of::<u64>()
    }

    pub(super) fn contains(&self, member: u32) -> bool {
        let word = self.words.get(member as usize / 64);
        word.is_some_and(|word| word >> (member % 64) & 1 == 1)
    }

    /// Adds a member; `false` where it was one already.
    pub(super) fn insert(&mut self, member: u32) -> bool {
        let index = member as usize / 64;
        if index >= self.words.len() {
            self.words.resize(index + 1, 0);
        }
        let bit = 1 << (member % 64);
        let is_new = self.words[index] & bit == 0;
        self.words[index] |= bit;
        self.count += u32::from(is_new);
        is_new
    }

    /// Removes a member; `false` where it was none.
    pub(super) fn remove(&mut self, member: u32) -> bool {
        let was_member = self.contains(member);
        if was_member {
            self.words[member as usize / 64] &= !(1 << (member % 64));
            self.count -= 1;
        }
        was_member
    }

    /// Members, ascending.
    pub(super) fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        (0_u32..).zip(&self.words).flat_map(|(index, &word)| {
            let rest = |&left: &u64| (left != 0).then_some(left & left.wrapping_sub(1));
            std::iter::successors(Some(word), rest)
                .filter(|&left| left != 0)
                .map(move |left| index * 64 + left.trailing_zeros())
        })
    }
}
