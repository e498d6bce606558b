//! The two halves of an all-reduce, for a group that has something else to do between them: a sum of which each rank
//! takes a share, and shares that every rank joins.

use super::{Kind, SharedGroup, label, region::Number};
use crate::error::GroupError;

impl SharedGroup {
    /// Adds up the ranks' `numbers` and leaves the `rank`-th of `size` equal shares of the sum in `share`, added as by
    /// [`all_reduce`](Self::all_reduce): the same bits. All ranks call it with equally many numbers.
    pub fn reduce_scatter<T: Number>(
        &self,
        numbers: &[T],
        share: &mut [T],
    ) -> Result<(), GroupError> {
        check("share", numbers.len(), share.len(), self.config.size)?;
        // In `numbers`:  0 ..... begin ..... end ..... len
        //                        | share    |
        let begin = self.config.rank * share.len();
        let end = begin + share.len();
        let mut at = 0;
        self.collective(|turn| {
            for piece in numbers.chunks(self.config.slot_bytes / size_of::<T>()) {
                let label = label(Kind::ReduceScatter, size_of_val(piece));
                let number = self.put(turn, label, T::bytes(piece))?;
                let (from, to) = (at.max(begin), (at + piece.len()).min(end));
                if from < to {
                    for rank in 0..self.config.size {
                        self.await_piece(turn, rank, label)?;
                    }
                    let sum = &mut share[from - begin..to - begin];
                    self.region.sum(number, from - at, sum);
                }
                at += piece.len();
            }
            Ok(())
        })
    }

    /// Puts the ranks' `part`s one behind the other into `joined`, on every rank. All ranks call it with equally many
    /// bytes.
    pub fn all_gather(&self, part: &[u8], joined: &mut [u8]) -> Result<(), GroupError> {
        check("joined", joined.len(), part.len(), self.config.size)?;
        let mut at = 0;
        self.collective(|turn| {
            for piece in part.chunks(self.config.slot_bytes) {
                let label = label(Kind::AllGather, piece.len());
                let number = self.put(turn, label, piece)?;
                for rank in 0..self.config.size {
                    self.await_piece(turn, rank, label)?;
                    let start = rank * part.len() + at;
                    let target = &mut joined[start..start + piece.len()];
                    self.region.take(rank, number, 0, target);
                }
                at += piece.len();
            }
            Ok(())
        })
    }
}

fn check(field: &'static str, whole: usize, share: usize, size: usize) -> Result<(), GroupError> {
    if share.checked_mul(size) == Some(whole) {
        return Ok(());
    }
    let reason = format!("{whole} are not {size} times {share}");
    Err(GroupError::InvalidArgument { field, reason })
}
