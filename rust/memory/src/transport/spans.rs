//! The segments of a transfer after their slabs were looked up.

use std::sync::Arc;

use super::metadata::KnownSlab;
use crate::slab::Slab;

/// Two slabs that bytes move between. Holds the local one, which therefore stays mapped.
#[derive(Clone, Debug)]
pub(super) struct Pair {
    pub(super) local: Arc<Slab>,
    pub(super) remote: KnownSlab,
    /// Its spans end before this one.
    end: usize,
}

/// Bytes between two slabs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Span {
    pub(super) local_offset: u64,
    pub(super) remote_offset: u64,
    pub(super) len: u64,
}

/// Spans in their order. Neighbours between the same two slabs share a pair: a hold for each of hundreds would cost
/// as much as copying 4 KiB does.
#[derive(Clone, Debug, Default)]
pub(super) struct Spans {
    pairs: Vec<Pair>,
    spans: Vec<Span>,
}

impl Spans {
    pub(super) fn with_capacity(spans: usize) -> Self {
        Self {
            pairs: Vec::new(),
            spans: Vec::with_capacity(spans),
        }
    }

    /// Adds spans that were found to lie inside both slabs.
    pub(super) fn push(
        &mut self,
        local: &Arc<Slab>,
        remote: &KnownSlab,
        spans: impl Iterator<Item = Span>,
    ) {
        self.spans.extend(spans);
        self.pairs.push(Pair {
            local: Arc::clone(local),
            remote: *remote,
            end: self.spans.len(),
        });
    }

    /// How many spans.
    pub(super) const fn len(&self) -> usize {
        self.spans.len()
    }

    pub(super) const fn is_empty(&self) -> bool {
        self.spans.is_empty()
    }

    /// The slabs of this side.
    pub(super) fn locals(&self) -> impl Iterator<Item = &Arc<Slab>> {
        self.pairs.iter().map(|pair| &pair.local)
    }

    /// Every span with its slabs.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&Pair, &Span)> {
        let mut start = 0;
        self.pairs.iter().flat_map(move |pair| {
            let spans = &self.spans[std::mem::replace(&mut start, pair.end)..pair.end];
            spans.iter().map(move |span| (pair, span))
        })
    }

    /// The spans from `next` on that are between the same slabs, and these; `None` behind the last one.
    pub(super) fn rest(&self, next: usize) -> Option<(&Pair, &[Span])> {
        let at = self.pairs.partition_point(|pair| pair.end <= next);
        let pair = self.pairs.get(at)?;
        Some((pair, &self.spans[next..pair.end]))
    }
}
