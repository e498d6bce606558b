//! The workers of a group, ordered by load well enough to find the cheapest without looking at all.
//!
//! A grid of 128 rows (sequences in the batch, exact below 64, then 8 to the octave) by 512 columns (queued prefill
//! tokens, exact below 16, then 16 to the octave). A cell is a list through the workers' [`Standing`]s, longest stay
//! first; it knows a lower bound of what its members have queued. A change of load is O(1).

use super::standing::{NIL, Standing};

const ROWS: usize = 128;
const COLUMNS: usize = 512;
/// First column of an empty row: beyond all others.
const NO_COLUMN: u16 = u16::MAX;

/// The row of a batch.
fn row_of(batch: u32) -> usize {
    match batch {
        0..64 => batch as usize,
        _ => log_class(batch.into(), 3, 64 - 6 * 8).min(ROWS - 1),
    }
}

/// The smallest batch of a row.
fn row_floor(row: usize) -> u64 {
    if row < 64 {
        return row as u64;
    }
    (8 + (row as u64) % 8) << (row / 8 - 5)
}

/// The column of a number of queued tokens.
fn column_of(queued: u64) -> usize {
    match queued {
        0..16 => queued as usize,
        _ => log_class(queued, 4, 16 - 4 * 16).min(COLUMNS - 1),
    }
}

/// The smallest number of queued tokens of a column.
fn column_floor(column: usize) -> u64 {
    if column < 16 {
        return column as u64;
    }
    (16 + (column as u64) % 16) << (column / 16 - 1)
}

/// `2^bits` classes to the octave, shifted by `offset`.
fn log_class(value: u64, bits: u32, offset: isize) -> usize {
    let octave = value.ilog2();
    let step = (value >> (octave - bits)) & ((1 << bits) - 1);
    ((octave << bits) as isize + step as isize + offset) as usize
}

#[derive(Clone, Copy, Debug)]
struct Cell {
    head: u32,
    tail: u32,
    /// At most what any member has queued; exact while all members came with the same.
    queued_min: u64,
}

const EMPTY_CELL: Cell = Cell {
    head: NIL,
    tail: NIL,
    queued_min: u64::MAX,
};

#[derive(Debug)]
struct Row {
    /// Columns whose cell is not empty.
    mask: [u64; COLUMNS / 64],
    cells: [Cell; COLUMNS],
}

impl Row {
    fn next_column(&self, from: usize) -> Option<usize> {
        let first = from / 64;
        let mut word = self.mask.get(first)? & (u64::MAX << (from % 64));
        let mut index = first;
        while word == 0 {
            index += 1;
            word = *self.mask.get(index)?;
        }
        Some(index * 64 + word.trailing_zeros() as usize)
    }
}

/// A group's workers by load.
#[derive(Debug)]
pub(super) struct LoadGrid {
    /// Allocated when first used: 8 KiB each.
    rows: Vec<Option<Box<Row>>>,
    /// Rows that are not empty.
    row_mask: u128,
    first_columns: [u16; ROWS],
}

impl Default for LoadGrid {
    fn default() -> Self {
        Self {
            rows: (0..ROWS).map(|_| None).collect(),
            row_mask: 0,
            first_columns: [NO_COLUMN; ROWS],
        }
    }
}

impl LoadGrid {
    /// Puts a worker into the cell of its load, behind those that are there. It must be in none.
    pub(super) fn insert(&mut self, standings: &mut [Standing], slot: u32) {
        let (batch, queued) = {
            let standing = &standings[slot as usize];
            (standing.batch, standing.queued)
        };
        let (row_index, column) = (row_of(batch), column_of(queued));
        let row = self.rows[row_index].get_or_insert_with(|| {
            Box::new(Row {
                mask: [0; COLUMNS / 64],
                cells: [EMPTY_CELL; COLUMNS],
            })
        });
        let cell = &mut row.cells[column];
        let before = cell.tail;
        cell.tail = slot;
        cell.queued_min = cell.queued_min.min(queued);
        if before == NIL {
            cell.head = slot;
            row.mask[column / 64] |= 1 << (column % 64);
            self.row_mask |= 1 << row_index;
            let first = &mut self.first_columns[row_index];
            *first = (*first).min(column as u16);
        } else {
            standings[before as usize].next = slot;
        }
        let standing = &mut standings[slot as usize];
        (standing.before, standing.next) = (before, NIL);
        standing.cell = (row_index * COLUMNS + column) as u32;
    }

    /// Takes a worker out of its cell, if it is in one.
    pub(super) fn remove(&mut self, standings: &mut [Standing], slot: u32) {
        let standing = &mut standings[slot as usize];
        let (index, before, next) = (standing.cell as usize, standing.before, standing.next);
        if standing.cell == NIL {
            return;
        }
        standing.cell = NIL;
        let (row_index, column) = (index / COLUMNS, index % COLUMNS);
        let Some(row) = &mut self.rows[row_index] else {
            return;
        };
        let cell = &mut row.cells[column];
        match before {
            NIL => cell.head = next,
            _ => standings[before as usize].next = next,
        }
        match next {
            NIL => cell.tail = before,
            _ => standings[next as usize].before = before,
        }
        if cell.head == NIL {
            *cell = EMPTY_CELL;
            row.mask[column / 64] &= !(1 << (column % 64));
            let first = row.next_column(0).map_or(NO_COLUMN, |first| first as u16);
            self.first_columns[row_index] = first;
            if first == NO_COLUMN {
                self.row_mask &= !(1 << row_index);
            }
        }
    }

    /// A worker that has no more queued and no larger a batch than any worker here: `(queued, batch)`.
    pub(super) fn least(&self) -> Option<(u64, u64)> {
        let column = self.first_columns.iter().min().copied()?;
        (self.row_mask != 0).then(|| {
            let row = self.row_mask.trailing_zeros() as usize;
            (column_floor(column.into()), row_floor(row))
        })
    }

    /// Shows workers to `visit` until none that is left could be below its bound; `false` where it broke off.
    ///
    /// `bound(queued, batch)` rises with both. `visit` answers with the bound that the rest must stay below, or with
    /// `None` to break off. Every worker whose `bound` is below the final answer has been shown.
    pub(super) fn walk(
        &self,
        standings: &[Standing],
        mut best: u64,
        bound: impl Fn(u64, u64) -> u64,
        mut visit: impl FnMut(u32) -> Option<u64>,
    ) -> bool {
        // The row of least bound first: what it has closes most of the others.
        let mut next_row = self.least_row(&bound);
        let mut rows = self.row_mask;
        while let Some(row_index) = next_row {
            match self.walk_row(standings, row_index, best, &bound, &mut visit) {
                Some(lower) => best = lower,
                None => return false,
            }
            rows &= !(1 << row_index);
            next_row = (rows != 0).then(|| rows.trailing_zeros() as usize);
            if next_row.is_some_and(|row| bound(0, row_floor(row)) >= best) {
                break;
            }
        }
        true
    }

    fn least_row(&self, bound: &impl Fn(u64, u64) -> u64) -> Option<usize> {
        let mut rows = self.row_mask;
        let mut least = None;
        while rows != 0 {
            let row = rows.trailing_zeros() as usize;
            rows &= rows - 1;
            let column = usize::from(self.first_columns[row]);
            let row_bound = bound(column_floor(column), row_floor(row));
            if least.is_none_or(|(lowest, _)| row_bound < lowest) {
                least = Some((row_bound, row));
            }
        }
        least.map(|(_, row)| row)
    }

    /// One row's part of [`walk`](Self::walk).
    fn walk_row(
        &self,
        standings: &[Standing],
        row_index: usize,
        mut best: u64,
        bound: &impl Fn(u64, u64) -> u64,
        visit: &mut impl FnMut(u32) -> Option<u64>,
    ) -> Option<u64> {
        let batch = row_floor(row_index);
        let mut column = usize::from(self.first_columns[row_index]);
        let row = self.rows[row_index].as_ref();
        while let Some(row) = row.filter(|_| column < COLUMNS)
            && bound(column_floor(column), batch) < best
        {
            let cell = row.cells[column];
            let least = bound(cell.queued_min, batch);
            let mut slot = cell.head;
            while slot != NIL && least < best {
                best = best.min(visit(slot)?);
                slot = standings[slot as usize].next;
            }
            match row.next_column(column + 1) {
                Some(next) => column = next,
                None => break,
            }
        }
        Some(best)
    }

    /// # Panics
    /// If a list, a mask or a count is wrong.
    pub(super) fn check_integrity(&self, standings: &[Standing], num_open: usize) {
        let mut num_listed = 0;
        for (row_index, row) in self.rows.iter().enumerate() {
            let mut first = NO_COLUMN;
            let Some(row) = row else { continue };
            for column in (0..COLUMNS).rev() {
                let cell = row.cells[column];
                let is_listed = row.mask[column / 64] >> (column % 64) & 1 == 1;
                assert_eq!(is_listed, cell.head != NIL);
                first = if is_listed { column as u16 } else { first };
                let (mut before, mut slot) = (NIL, cell.head);
                while slot != NIL {
                    let standing = &standings[slot as usize];
                    assert_eq!(standing.before, before);
                    assert_eq!(row_of(standing.batch), row_index);
                    assert_eq!(column_of(standing.queued), column);
                    assert!(cell.queued_min <= standing.queued);
                    (before, slot) = (slot, standing.next);
                    num_listed += 1;
                }
                assert_eq!(cell.tail, before);
            }
            assert_eq!(self.first_columns[row_index], first);
            assert_eq!(self.row_mask >> row_index & 1 == 1, first != NO_COLUMN);
        }
        assert_eq!(num_listed, num_open);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_are_monotone_and_floors_are_their_smallest_members() {
        let values = || {
            (0..100_000_u64)
                .chain((0..64).map(|bit| 1 << bit))
                .chain([u64::MAX])
        };
        for value in values() {
            let column = column_of(value);
            assert!(column_floor(column) <= value && column < COLUMNS);
            assert!(
                column == COLUMNS - 1 || value < column_floor(column + 1),
                "{value}"
            );
            let batch = u32::try_from(value).unwrap_or(u32::MAX);
            let row = row_of(batch);
            assert!(row_floor(row) <= u64::from(batch) && row < ROWS);
            assert!(
                row == ROWS - 1 || u64::from(batch) < row_floor(row + 1),
                "{batch}"
            );
        }
    }
}
