//! Pairs of blocks as descriptors: neighbours on both sides share one.

use std::ops::Range;

use crate::{
    error::TransferError,
    transport::{Segment, SlabId},
};

/// The most that one descriptor carries, so that a window can be filled evenly.
const SEGMENT_BYTES_MAX: u64 = 4 << 20;

/// Where a block lies at one end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Side {
    pub(crate) slab: SlabId,
    pub(crate) offset: u64,
}

/// The segments that move `part` of each pair's blocks.
pub(crate) fn plan(
    pairs: impl Iterator<Item = (Side, Side)>,
    part: &Range<u64>,
) -> Result<Vec<Segment>, TransferError> {
    let mut segments: Vec<Segment> = Vec::new();
    for (local, remote) in pairs {
        let begin = |side: Side| {
            side.offset
                .checked_add(part.start)
                .ok_or(TransferError::OutOfBounds)
        };
        let next = Segment {
            local_slab: local.slab,
            local_offset: begin(local)?,
            remote_slab: remote.slab,
            remote_offset: begin(remote)?,
            len: part.end - part.start,
        };
        match segments.last_mut() {
            Some(last) if joins(last, &next) => last.len += next.len,
            _ => segments.push(next),
        }
    }
    Ok(segments)
}

fn joins(last: &Segment, next: &Segment) -> bool {
    last.local_slab == next.local_slab
        && last.remote_slab == next.remote_slab
        && last.local_offset + last.len == next.local_offset
        && last.remote_offset.checked_add(last.len) == Some(next.remote_offset)
        && last.len + next.len <= SEGMENT_BYTES_MAX
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sides(offsets: &[u64]) -> impl Iterator<Item = Side> {
        offsets.iter().map(|&offset| Side {
            slab: SlabId((offset / 1000) as u32),
            offset: offset % 1000,
        })
    }

    fn lens(local: &[u64], remote: &[u64], part: &Range<u64>) -> Vec<u64> {
        let planned = plan(sides(local).zip(sides(remote)), part).unwrap();
        planned.iter().map(|segment| segment.len).collect()
    }

    #[test]
    fn neighbours_on_both_sides_and_in_one_slab_share_a_descriptor() {
        let whole = 0..10;
        assert_eq!(lens(&[0, 10, 20], &[50, 60, 70], &whole), [30]);
        assert_eq!(lens(&[0, 10, 20], &[50, 60, 90], &whole), [20, 10]);
        assert_eq!(lens(&[0, 20, 30], &[50, 60, 70], &whole), [10, 20]);
        assert_eq!(lens(&[990, 1000], &[50, 60], &whole), [10, 10]);
        assert_eq!(lens(&[20, 10, 0], &[20, 10, 0], &whole), [10, 10, 10]);
    }

    #[test]
    fn parts_of_neighbours_are_no_neighbours() {
        assert_eq!(lens(&[0, 10], &[0, 10], &(2..7)), [5, 5]);
        let planned = plan(sides(&[0]).zip(sides(&[30])), &(2..7)).unwrap();
        assert_eq!((planned[0].local_offset, planned[0].remote_offset), (2, 32));
    }

    #[test]
    fn an_offset_that_no_memory_has_is_refused() {
        let far = Side {
            slab: SlabId(0),
            offset: u64::MAX,
        };
        let near = Side {
            slab: SlabId(0),
            offset: 0,
        };
        let planned = plan([(near, far)].into_iter(), &(1..2));
        assert_eq!(planned, Err(TransferError::OutOfBounds));
    }
}
