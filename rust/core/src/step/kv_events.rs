//! Changes of the prefix cache that nobody has taken yet.

use super::plan::KvEvent;
use crate::hash::BlockHash;

/// A bounded log. When more changes gather than it may hold, they are dropped, and the next reader is told the
/// whole content instead.
#[derive(Debug)]
pub(super) struct KvEventLog {
    events: Vec<KvEvent>,
    num_hashes: usize,
    max_hashes: usize,
    is_overflowed: bool,
}

impl KvEventLog {
    pub(super) fn new(max_hashes: usize) -> Self {
        Self {
            events: Vec::new(),
            num_hashes: 0,
            max_hashes,
            is_overflowed: false,
        }
    }

    /// Blocks of one chain became reusable.
    pub(super) fn stored(&mut self, hashes: Vec<BlockHash>) {
        if !hashes.is_empty() && self.make_room(hashes.len()) {
            self.events.push(KvEvent::Stored(hashes));
        }
    }

    /// A block left the device, and host memory keeps it; or another worker brought it there. Neighbours in time become
    /// one event.
    pub(super) fn kept(&mut self, hash: BlockHash) {
        if !self.make_room(1) {
            return;
        }
        if let Some(KvEvent::Kept(hashes)) = self.events.last_mut() {
            hashes.push(hash);
        } else {
            self.events.push(KvEvent::Kept(vec![hash]));
        }
    }

    /// A block is gone. Neighbouring removals become one event.
    pub(super) fn removed(&mut self, hash: BlockHash) {
        if !self.make_room(1) {
            return;
        }
        if let Some(KvEvent::Removed(hashes)) = self.events.last_mut() {
            hashes.push(hash);
        } else {
            self.events.push(KvEvent::Removed(vec![hash]));
        }
    }

    /// Nothing is reusable any more, whatever was said before.
    pub(super) fn cleared(&mut self) {
        self.events = vec![KvEvent::Cleared];
        self.num_hashes = 0;
        self.is_overflowed = false;
    }

    /// What happened since the last call; `content` lists what the device and host memory hold now, parents before
    /// children.
    pub(super) fn take(
        &mut self,
        content: impl FnOnce() -> (Vec<BlockHash>, Vec<BlockHash>),
    ) -> Vec<KvEvent> {
        self.num_hashes = 0;
        if !std::mem::take(&mut self.is_overflowed) {
            return std::mem::take(&mut self.events);
        }
        let (cached, kept) = content();
        let mut events = vec![KvEvent::Cleared, KvEvent::Stored(cached)];
        if !kept.is_empty() {
            events.push(KvEvent::Kept(kept));
        }
        events
    }

    fn make_room(&mut self, num_hashes: usize) -> bool {
        self.num_hashes += num_hashes;
        if self.num_hashes > self.max_hashes {
            self.is_overflowed = true;
            self.events.clear();
        }
        !self.is_overflowed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clearing_replaces_what_nobody_has_heard_yet() {
        let mut log = KvEventLog::new(2);
        for hash in 0..3 {
            log.stored(vec![BlockHash(hash)]);
        }
        log.cleared();
        log.stored(vec![BlockHash(7)]);
        let events = [KvEvent::Cleared, KvEvent::Stored(vec![BlockHash(7)])];
        assert_eq!(log.take(Vec::new), events);
    }

    #[test]
    fn removals_in_a_row_are_one_event_and_an_overflow_becomes_the_content() {
        let mut log = KvEventLog::new(4);
        log.stored(vec![BlockHash(1), BlockHash(2)]);
        log.removed(BlockHash(2));
        log.removed(BlockHash(1));
        let events = [
            KvEvent::Stored(vec![BlockHash(1), BlockHash(2)]),
            KvEvent::Removed(vec![BlockHash(2), BlockHash(1)]),
        ];
        let nothing = || (Vec::new(), Vec::new());
        assert_eq!(log.take(nothing), events);
        for hash in 0..2 {
            log.kept(BlockHash(hash));
        }
        let kept = [KvEvent::Kept(vec![BlockHash(0), BlockHash(1)])];
        assert_eq!(log.take(nothing), kept);

        for hash in 0..5 {
            log.stored(vec![BlockHash(hash)]);
        }
        log.removed(BlockHash(0));
        let content = vec![BlockHash(3), BlockHash(4)];
        let events = [KvEvent::Cleared, KvEvent::Stored(content.clone())];
        assert_eq!(log.take(|| (content, Vec::new())), events);
        assert_eq!(log.take(nothing), []);
    }
}
