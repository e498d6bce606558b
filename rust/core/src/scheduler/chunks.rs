//! A list in pieces that never move: growing it copies nothing and leaves no outgrown copies behind.

use std::ops::{Index, IndexMut};

/// `N` items in each piece; a power of two.
#[derive(Clone, Debug)]
pub(super) struct Chunks<T, const N: usize> {
    pieces: Vec<Vec<T>>,
    len: usize,
}

impl<T, const N: usize> Default for Chunks<T, N> {
    fn default() -> Self {
        const { assert!(N.is_power_of_two()) };
        Self {
            pieces: Vec::new(),
            len: 0,
        }
    }
}

impl<T, const N: usize> Chunks<T, N> {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn get(&self, at: usize) -> Option<&T> {
        self.pieces.get(at / N)?.get(at % N)
    }

    pub(super) fn get_mut(&mut self, at: usize) -> Option<&mut T> {
        self.pieces.get_mut(at / N)?.get_mut(at % N)
    }

    /// Appends an item; the answer is its place.
    pub(super) fn push(&mut self, item: T) -> usize {
        let at = self.len;
        match self.pieces.last_mut() {
            Some(last) if last.len() < N => last.push(item),
            _ => {
                let mut piece = Vec::with_capacity(N);
                piece.push(item);
                self.pieces.push(piece);
            }
        }
        self.len += 1;
        at
    }

    /// Bytes on the heap, without what the items hold there.
    pub(super) fn heap_bytes(&self) -> usize {
        self.pieces.len() * N * size_of::<T>() + self.pieces.capacity() * size_of::<Vec<T>>()
    }
}

impl<T, const N: usize> Index<usize> for Chunks<T, N> {
    type Output = T;

    fn index(&self, at: usize) -> &T {
        &self.pieces[at / N][at % N]
    }
}

impl<T, const N: usize> IndexMut<usize> for Chunks<T, N> {
    fn index_mut(&mut self, at: usize) -> &mut T {
        &mut self.pieces[at / N][at % N]
    }
}
