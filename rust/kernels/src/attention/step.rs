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

/// Some tokens of a sequence and the query heads of a KV head, or of several: what one thread computes at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tile {
    pub(super) sequence: u32,
    /// The first of its KV heads.
    pub(super) kv_head: u32,
    /// More than one only as [`Cut::together`] says.
    pub(super) kv_heads: u32,
    /// The first of its tokens, in the step.
    pub(super) first: u32,
    pub(super) tokens: u32,
    /// Tokens that the first one sees, itself included.
    pub(super) seen: u32,
}

impl Tile {
    /// The token and the query head of one of its rows, of which each token has `group` for its KV head `part`.
    pub(super) const fn place(&self, part: usize, row: usize, group: usize) -> (usize, usize) {
        let head = (self.kv_head as usize + part) * group + row % group;
        (self.first as usize + row / group, head)
    }

    /// Tokens that the last one sees, itself included.
    pub(super) const fn last_seen(&self) -> usize {
        (self.seen + self.tokens - 1) as usize
    }
}

/// How a step is cut into tiles.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cut {
    /// Rows of a tile, where a token has fewer: at least so many, and at most, if that leaves enough tiles.
    pub(super) rows: (usize, usize),
    /// KV heads that one tile may have where a sequence has at most so many rows for each: the second number.
    pub(super) together: (usize, usize),
    /// Tiles there should be, before sequences of few rows have several heads in one.
    pub(super) tiles: usize,
}

impl Cut {
    /// KV heads of a tile of few rows: as many as leave enough tiles for all threads.
    fn heads_together(&self, sequences: usize, config: &AttentionConfig) -> u32 {
        let spare = sequences * config.num_kv_heads / self.tiles.max(1);
        self.together.0.min(spare).clamp(1, config.num_kv_heads) as u32
    }

    /// Tokens of a tile, at most, where the step has so many.
    fn tokens(&self, num_tokens: usize, config: &AttentionConfig) -> u32 {
        let (least, most) = self.rows;
        let share = num_tokens * config.num_heads / self.tiles.max(1);
        (share.clamp(least, most) / config.group()).max(1) as u32
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
    pub(super) fn new(
        arrays: &StepArrays<'_>,
        config: &AttentionConfig,
        cut: &Cut,
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
        let together = cut.heads_together(sequences, config);
        let most = cut.tokens(num_tokens, config);
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
            let is_few = (end - first) as usize * config.group() <= cut.together.1;
            let heads = if is_few { together } else { 1 };
            step.cut(
                sequence as u32,
                (first, end),
                (context, most),
                heads,
                config,
            );
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
        heads: u32,
        config: &AttentionConfig,
    ) {
        let num_kv_heads = config.num_kv_heads as u32;
        for kv_head in (0..num_kv_heads).step_by(heads as usize) {
            for start in (first..end).step_by(most as usize) {
                self.tiles.push(Tile {
                    sequence,
                    kv_head,
                    kv_heads: heads.min(num_kv_heads - kv_head),
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
