//! Other workers, as the test plays them: they bring KV, or late bytes, and read what is held for them.

use orchestra_core::{
    BlockId, RequestId, TokenId,
    step::{AwaitedBlocks, FilledBlocks, HoldId},
};

use crate::replica::{NewRequest, Replica};

/// Blocks that somebody reads until the hold is released.
#[derive(Debug)]
struct Outgoing {
    hold: HoldId,
    prompt: Vec<TokenId>,
    first_block: u32,
    blocks: Vec<BlockId>,
}

/// What is under way.
#[derive(Debug, Default)]
pub(crate) struct Moves {
    /// Blocks that somebody is writing, also when their request has long ended.
    pub(crate) incoming: Vec<(RequestId, AwaitedBlocks)>,
    outgoing: Vec<Outgoing>,
    pub(crate) num_fetched_tokens: u64,
    pub(crate) num_filled_blocks: u64,
    pub(crate) num_held_blocks: u64,
}

impl Moves {
    /// What is held for others, what was to be `filled` included, is worth nothing any more, and stays theirs until it
    /// is released.
    pub(crate) fn forget_contents(&mut self, filled: Vec<FilledBlocks>) {
        for it in &mut self.outgoing {
            it.prompt.clear();
        }
        let filled = filled.into_iter().map(|it| Outgoing {
            hold: it.hold,
            prompt: Vec::new(),
            first_block: it.first_block,
            blocks: it.blocks,
        });
        self.outgoing.extend(filled);
    }

    pub(crate) fn is_any_open(&self) -> bool {
        !self.incoming.is_empty() || !self.outgoing.is_empty()
    }
}

impl Replica {
    /// The `index`-th move arrives, up to some of its blocks.
    pub(crate) fn arrive(&mut self, index: usize, cut: usize) {
        if self.moves.incoming.is_empty() {
            return;
        }
        let index = index % self.moves.incoming.len();
        let (id, awaited) = self.moves.incoming.swap_remove(index);
        let num_blocks = awaited.blocks.len() - cut % awaited.blocks.len();
        let tokens = self.requests[&id].known_tokens();
        self.model
            .bring(&tokens, awaited.first_block, &awaited.blocks[..num_blocks]);
        self.scheduler.kv_arrived(awaited.hold, num_blocks as u32);
        assert!(!self.scheduler.release_hold(awaited.hold), "it is over");
    }

    /// The `index`-th move fails; its blocks are not quiet yet.
    pub(crate) fn fail_kv(&mut self, index: usize) {
        if !self.moves.incoming.is_empty() {
            let (_, awaited) = &self.moves.incoming[index % self.moves.incoming.len()];
            self.scheduler.kv_failed(awaited.hold);
            assert!(!self.scheduler.kv_failed(awaited.hold), "it fails once");
        }
    }

    /// Whoever may write does.
    pub(crate) fn write_late(&mut self) {
        for (_, awaited) in &self.moves.incoming {
            self.model.spoil(&awaited.blocks);
        }
    }

    /// The `index`-th of all moves is quiet.
    pub(crate) fn release(&mut self, index: usize) {
        self.check_outgoing();
        let num_incoming = self.moves.incoming.len();
        let count = num_incoming + self.moves.outgoing.len();
        if count == 0 {
            return;
        }
        let index = index % count;
        let hold = match index.checked_sub(num_incoming) {
            None => self.moves.incoming.swap_remove(index).1.hold,
            Some(index) => self.moves.outgoing.swap_remove(index).hold,
        };
        assert!(self.scheduler.release_hold(hold), "a hold of ours");
        assert!(!self.scheduler.release_hold(hold), "it ends once");
    }

    /// Another worker asks for the beginning of a prompt.
    pub(crate) fn hold_prefix(&mut self, wanted: NewRequest, num_blocks: u32) {
        let held = self
            .scheduler
            .hold_prefix(wanted.hash_seed, &wanted.prompt, num_blocks);
        let Some(held) = held else { return };
        assert!(held.blocks.len() <= num_blocks as usize);
        self.moves.num_held_blocks += held.blocks.len() as u64;
        self.moves.outgoing.push(Outgoing {
            hold: held.hold,
            prompt: wanted.prompt,
            first_block: 0,
            blocks: held.blocks,
        });
        self.check_outgoing();
    }

    /// What the committed step has filled for others.
    pub(crate) fn note_filled(&mut self, filled: Vec<FilledBlocks>) {
        for it in filled {
            self.moves.num_filled_blocks += it.blocks.len() as u64;
            self.moves.outgoing.push(Outgoing {
                hold: it.hold,
                prompt: self.requests[&it.request_id].prompt.clone(),
                first_block: it.first_block,
                blocks: it.blocks,
            });
        }
        self.check_outgoing();
    }

    /// Nothing that is held has changed.
    fn check_outgoing(&self) {
        for it in &self.moves.outgoing {
            assert!(
                self.model.has(&it.prompt, it.first_block, &it.blocks),
                "{it:?} was overwritten"
            );
        }
    }

    /// Ends all moves.
    pub(crate) fn settle_moves(&mut self) {
        while self.moves.is_any_open() {
            self.release(0);
        }
    }
}
