//! One step's arrays, checked once, and how its work is cut into tiles.

use crate::error::AttentionError;

use super::AttentionConfig;

/// The arrays of a step, as the plan has them. `T` tokens of `S` sequences, sequence after sequence.
#[derive(Clone, Copy, Debug)]
pub struct StepArrays<'a> {
    /// `[T]`: where each token's KV goes: `block * block_size + offset`.
    pub slot_mapping: &'a [i32],
    /// `[S + 1]`: the first token of each sequence; the last is `T`.
    pub query_start: &'a [i32],
    /// `[S]`: tokens of KV that each sequence has after this step.
    pub context_lens: &'a [i32],
    /// `[S, W]`: each sequence's blocks, and behind them anything.
    pub block_tables: &'a [i32],
}

/// Some tokens of a sequence and the query heads of one KV head: what one thread computes at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tile {
    pub(super) sequence: u32,
    pub(super) kv_head: u32,
    /// The first of its tokens, in the step.
    pub(super) first: u32,
    pub(super) tokens: u32,
    /// Tokens that the first one sees, itself included.
    pub(super) seen: u32,
}

impl Tile {
    /// The token and the query head of one of its rows, of which each token has `group`.
    pub(super) const fn place(&self, row: usize, group: usize) -> (usize, usize) {
        let head = self.kv_head as usize * group + row % group;
        (self.first as usize + row / group, head)
    }
}

/// A step whose every index is inside what it points into.
#[derive(Debug, Default)]
pub(super) struct Step {
    pub(super) num_tokens: usize,
    slots: Vec<u32>,
    tables: Vec<u32>,
    table_width: usize,
    pub(super) tiles: Vec<Tile>,
}

impl Step {
    /// Reads the arrays of a step; whatever is wrong with them, nothing has changed.
    ///
    /// A tile has `rows` rows, where a token has fewer.
    pub(super) fn new(
        arrays: &StepArrays<'_>,
        config: &AttentionConfig,
        rows: usize,
    ) -> Result<Self, AttentionError> {
        let sequences = arrays.context_lens.len();
        let num_tokens = arrays.slot_mapping.len();
        let slots = below("slot_mapping", arrays.slot_mapping, config.num_slots())?;
        let starts = below("query_start", arrays.query_start, num_tokens + 1)?;
        let contexts = below("context_lens", arrays.context_lens, config.num_slots() + 1)?;
        let ends_meet = starts.first() == Some(&0)
            && starts.last() == Some(&(num_tokens as u32))
            && starts.len() == sequences + 1;
        if !ends_meet {
            return Err(AttentionError::wrong(
                "query_start",
                "does not fit the other arrays",
            ));
        }
        if sequences == 0 || !arrays.block_tables.len().is_multiple_of(sequences) {
            return Err(AttentionError::wrong(
                "block_tables",
                "is no row for each sequence",
            ));
        }
        let mut step = Self {
            num_tokens,
            slots,
            tables: below("block_tables", arrays.block_tables, config.num_blocks)?,
            table_width: arrays.block_tables.len() / sequences,
            tiles: Vec::new(),
        };
        for (sequence, context) in contexts.into_iter().enumerate() {
            let (first, end) = (starts[sequence], starts[sequence + 1]);
            if first > end || end - first > context {
                return Err(AttentionError::wrong(
                    "context_lens",
                    "is less than what is new",
                ));
            }
            if (context as usize).div_ceil(config.block_size) > step.table_width {
                return Err(AttentionError::wrong(
                    "block_tables",
                    "is shorter than a context",
                ));
            }
            let most = (rows / config.group()).max(1) as u32;
            step.cut(sequence as u32, (first, end), (context, most), config);
        }
        Ok(step)
    }

    /// Adds the tiles of a sequence, of at most so many tokens: those of one KV head together, so that what is read of
    /// the cache is read again while it is near.
    fn cut(
        &mut self,
        sequence: u32,
        (first, end): (u32, u32),
        (context, most): (u32, u32),
        config: &AttentionConfig,
    ) {
        for kv_head in 0..config.num_kv_heads as u32 {
            for start in (first..end).step_by(most as usize) {
                self.tiles.push(Tile {
                    sequence,
                    kv_head,
                    first: start,
                    tokens: most.min(end - start),
                    seen: context - (end - start) + 1,
                });
            }
        }
    }

    /// The block and the place in it where a token's KV goes.
    pub(super) fn slot(&self, token: usize, block_size: usize) -> (usize, usize) {
        let slot = self.slots[token] as usize;
        (slot / block_size, slot % block_size)
    }

    /// The block that holds a position of a sequence.
    pub(super) fn block(&self, sequence: u32, position: usize, block_size: usize) -> usize {
        let column = position / block_size;
        assert!(column < self.table_width, "contexts fit their tables");
        self.tables[sequence as usize * self.table_width + column] as usize
    }
}

/// The numbers of an array, each found to be in `0..limit`.
fn below(field: &'static str, array: &[i32], limit: usize) -> Result<Vec<u32>, AttentionError> {
    let number = |&number: &i32| {
        let number = u32::try_from(number).ok()?;
        ((number as usize) < limit).then_some(number)
    };
    let numbers: Option<Vec<u32>> = array.iter().map(number).collect();
    numbers.ok_or_else(|| {
        AttentionError::wrong(
            field,
            format!("holds a number outside of 0 to {}", limit - 1),
        )
    })
}
