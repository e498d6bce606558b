//! Requests that have not started, in the order in which they will.
//!
//! The order is by least prefill left, aged by arrivals. Request number `a`, for which `b` blocks have to be
//! computed before the one that draws its first token, ranks at `a + min(b, max_overtakes + 1)`. A later request
//! goes first only where its rank is lower, so at most `max_overtakes` later requests overtake any one, whatever
//! their sizes and however fast they come. Equal work starts in order of arrival. Ranks never change, so the
//! queue is an ordered map.

use std::{
    collections::BTreeMap,
    ops::Bound::{Excluded, Unbounded},
};

use rustc_hash::FxHashMap;

use super::sequence::Sequence;
use crate::ids::RequestId;

/// A place in the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    rank: u64,
    arrival: u64,
}

#[derive(Debug)]
struct Entry {
    sequence: Sequence,
    num_prefill_tokens: u64,
}

/// The queue.
#[derive(Debug)]
pub(super) struct WaitingQueue {
    block_size: u64,
    max_overtakes: u64,
    entries: BTreeMap<Place, Entry>,
    places: FxHashMap<RequestId, Place>,
    num_arrivals: u64,
    num_prefill_tokens: u64,
}

impl WaitingQueue {
    pub(super) fn new(block_size: u32, max_overtakes: u32) -> Self {
        Self {
            block_size: u64::from(block_size),
            max_overtakes: u64::from(max_overtakes),
            entries: BTreeMap::new(),
            places: FxHashMap::default(),
            num_arrivals: 0,
            num_prefill_tokens: 0,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(super) fn contains(&self, id: RequestId) -> bool {
        self.places.contains_key(&id)
    }

    /// Tokens that the queued requests have to compute, by the counts given to [`Self::push`].
    pub(super) fn num_prefill_tokens(&self) -> u64 {
        self.num_prefill_tokens
    }

    /// Queues a sequence that has `num_prefill_tokens` to compute.
    pub(super) fn push(&mut self, sequence: Sequence, num_prefill_tokens: usize) {
        let num_prefill_tokens = num_prefill_tokens as u64;
        let arrival = self.num_arrivals;
        let num_blocks = num_prefill_tokens.saturating_sub(1) / self.block_size;
        let num_places = num_blocks.min(self.max_overtakes + 1);
        let rank = arrival + num_places;
        let place = Place { rank, arrival };
        self.num_arrivals += 1;
        self.num_prefill_tokens += num_prefill_tokens;
        self.places.insert(sequence.id, place);
        self.entries.insert(
            place,
            Entry {
                sequence,
                num_prefill_tokens,
            },
        );
    }

    /// The first sequence, or the one after `place`.
    pub(super) fn next_after(&mut self, place: Option<Place>) -> Option<(Place, &mut Sequence)> {
        let start = place.map_or(Unbounded, Excluded);
        let (&place, entry) = self.entries.range_mut((start, Unbounded)).next()?;
        Some((place, &mut entry.sequence))
    }

    pub(super) fn take(&mut self, place: Place) -> Option<Sequence> {
        let entry = self.entries.remove(&place)?;
        self.places.remove(&entry.sequence.id);
        self.num_prefill_tokens -= entry.num_prefill_tokens;
        Some(entry.sequence)
    }

    /// Takes out the request with this id.
    pub(super) fn remove(&mut self, id: RequestId) -> Option<Sequence> {
        let place = *self.places.get(&id)?;
        self.take(place)
    }

    /// Takes out all requests, in order.
    pub(super) fn drain(&mut self) -> impl Iterator<Item = Sequence> {
        self.places.clear();
        self.num_prefill_tokens = 0;
        std::mem::take(&mut self.entries)
            .into_values()
            .map(|entry| entry.sequence)
    }

    /// Asserts that both maps and the sum agree; gives the sequences.
    pub(super) fn check_integrity(&self) -> impl Iterator<Item = &Sequence> {
        assert_eq!(self.places.len(), self.entries.len(), "waiting requests");
        for (id, place) in &self.places {
            assert_eq!(
                self.entries.get(place).map(|entry| entry.sequence.id),
                Some(*id)
            );
        }
        let sum: u64 = self
            .entries
            .values()
            .map(|entry| entry.num_prefill_tokens)
            .sum();
        assert_eq!(sum, self.num_prefill_tokens, "queued prefill tokens");
        self.entries.values().map(|entry| &entry.sequence)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Time, hash::HashSeed, sampling::SamplingParams, step::Request};

    fn queue_of(max_overtakes: u32, prefills: &[usize]) -> WaitingQueue {
        let mut queue = WaitingQueue::new(16, max_overtakes);
        for (id, &num_prefill_tokens) in (0..).zip(prefills) {
            let request = Request {
                id: RequestId(id),
                prompt_token_ids: vec![1],
                output_token_ids: Vec::new(),
                sampling: SamplingParams::default(),
                hash_seed: HashSeed(0),
            };
            queue.push(Sequence::new(request, Time::ZERO), num_prefill_tokens);
        }
        queue
    }

    fn order(mut queue: WaitingQueue) -> Vec<u64> {
        queue.drain().map(|sequence| sequence.id.0).collect()
    }

    #[test]
    fn the_shortest_prefill_goes_first_and_equal_ones_in_order_of_arrival() {
        assert_eq!(
            order(queue_of(64, &[320, 160, 16, 160, 16])),
            [2, 4, 1, 3, 0]
        );
        assert_eq!(
            order(queue_of(0, &[320, 160, 16, 160, 16])),
            [0, 1, 2, 3, 4]
        );
    }

    #[test]
    fn a_long_prefill_is_overtaken_by_as_many_as_may() {
        let mut prefills = vec![100_000];
        prefills.resize(200, 1);
        let order = order(queue_of(64, &prefills));
        assert_eq!(order.iter().position(|&id| id == 0), Some(64));
    }

    #[test]
    fn what_leaves_the_queue_leaves_the_counts() {
        let mut queue = queue_of(64, &[10, 20, 30]);
        assert_eq!(
            queue.remove(RequestId(1)).map(|sequence| sequence.id),
            Some(RequestId(1))
        );
        assert!(queue.remove(RequestId(1)).is_none() && !queue.contains(RequestId(1)));
        let (first, _) = queue.next_after(None).unwrap();
        let (second, sequence) = queue.next_after(Some(first)).unwrap();
        assert_eq!(sequence.id, RequestId(2));
        assert_eq!((queue.len(), queue.num_prefill_tokens()), (2, 40));
        queue.take(second);
        assert_eq!(queue.check_integrity().count(), 1);
        assert_eq!(queue.num_prefill_tokens(), 10);
    }
}
