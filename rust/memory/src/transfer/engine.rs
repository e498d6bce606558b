//! Moves transfers along: fills the window, watches deadlines, and keeps what cannot be proven to be over.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use orchestra_core::Time;

use super::{Shared, TransferResult, TransferStats};
use crate::{
    error::TransferError,
    pool::Holds,
    registrations::ForeignHold,
    transport::{Direction, PeerId, Progress, Quiet, Segment, TransferId, Transport},
};

/// A transfer that has been checked and planned.
pub(crate) struct NewTransfer {
    pub(crate) transport: Arc<dyn Transport>,
    pub(crate) peer: PeerId,
    pub(crate) direction: Direction,
    pub(crate) segments: Vec<Segment>,
    pub(crate) notification: Vec<u8>,
    pub(crate) holds: LocalHold,
    pub(crate) started: Time,
    pub(crate) deadline: Time,
    pub(crate) shared: Arc<Shared>,
}

/// What keeps the memory of this side where it is.
pub(crate) enum LocalHold {
    Blocks(Holds),
    Foreign(ForeignHold),
}

impl LocalHold {
    /// How many blocks.
    const fn len(&self) -> usize {
        match self {
            Self::Blocks(holds) => holds.len(),
            Self::Foreign(hold) => hold.len(),
        }
    }

    /// Notes that nobody knows when the hold ends; how many blocks wait for that.
    fn quarantine(&mut self) -> usize {
        match self {
            Self::Blocks(holds) => holds.quarantine(),
            Self::Foreign(hold) => hold.quarantine(),
        }
    }
}

/// The part of a transfer that its transport has.
struct Posted {
    id: TransferId,
    bytes: u64,
}

struct Active {
    transfer: NewTransfer,
    /// Segments before this one have been posted.
    next: usize,
    posted: Vec<Posted>,
    failure: Option<TransferError>,
}

/// A transfer whose caller has had its answer, while bytes may still move.
struct Unproven {
    transport: Arc<dyn Transport>,
    peer: PeerId,
    posted: Vec<Posted>,
    #[expect(dead_code, reason = "ends its holds by being dropped")]
    holds: LocalHold,
}

/// A transfer that ended; its caller is told once no lock is held.
pub(crate) struct Finished {
    pub(crate) shared: Arc<Shared>,
    pub(crate) result: TransferResult,
}

/// Every transfer of this process.
pub(crate) struct Engine {
    active: VecDeque<Active>,
    unproven: Vec<Unproven>,
    inflight_bytes: u64,
    inflight_bytes_max: u64,
}

impl Engine {
    pub(crate) const fn new(inflight_bytes_max: u64) -> Self {
        Self {
            active: VecDeque::new(),
            unproven: Vec::new(),
            inflight_bytes: 0,
            inflight_bytes_max,
        }
    }

    /// Transfers that have not ended, and those that nobody has proven to be over.
    pub(crate) fn counts(&self) -> (usize, usize) {
        (self.active.len(), self.unproven.len())
    }

    /// Bytes under way, without those of transfers that were given up.
    pub(crate) const fn inflight_bytes(&self) -> u64 {
        self.inflight_bytes
    }

    /// The first deadline of those that have not ended.
    pub(crate) fn next_deadline(&self) -> Option<Time> {
        let deadlines = self.active.iter().map(|active| active.transfer.deadline);
        deadlines.min()
    }

    /// Whether this peer has a transfer that is not over, or not known to be.
    pub(crate) fn has_peer(&self, peer: PeerId) -> bool {
        self.active
            .iter()
            .any(|active| active.transfer.peer == peer)
            || self.unproven.iter().any(|unproven| unproven.peer == peer)
    }

    /// Starts a transfer, now or when the window has room.
    pub(crate) fn start(&mut self, transfer: NewTransfer) {
        let mut active = Active {
            transfer,
            next: 0,
            posted: Vec::new(),
            failure: None,
        };
        self.post_more(&mut active);
        self.active.push_back(active);
    }

    /// Looks at every transfer once. Returns those that ended.
    pub(crate) fn progress(&mut self, now: Time) -> Vec<Finished> {
        self.unproven.retain_mut(|unproven| {
            let transport = &unproven.transport;
            unproven
                .posted
                .retain(|part| !is_over(&**transport, part.id));
            !unproven.posted.is_empty()
        });
        let mut finished = Vec::new();
        for _ in 0..self.active.len() {
            let Some(mut active) = self.active.pop_front() else {
                break;
            };
            self.poll_posted(&mut active);
            let is_whole =
                active.next == active.transfer.segments.len() && active.posted.is_empty();
            if active.failure.is_none() && !is_whole {
                let transfer = &active.transfer;
                if transfer.shared.is_aborted() || now >= transfer.deadline {
                    active.failure = Some(TransferError::Timeout { quarantined: 0 });
                } else {
                    self.post_more(&mut active);
                }
            }
            if active.failure.is_some() || is_whole {
                finished.push(self.end(active, now));
            } else {
                self.active.push_back(active);
            }
        }
        finished
    }

    /// Nothing touches memory on behalf of this peer any more: what waited for that proof is over, and what was
    /// under way has failed.
    pub(crate) fn peer_is_gone(&mut self, peer: PeerId, quiet: Quiet, now: Time) -> Vec<Finished> {
        if quiet == Quiet::Proven {
            self.unproven.retain(|unproven| {
                let is_theirs = unproven.peer == peer;
                for part in unproven.posted.iter().filter(|_| is_theirs) {
                    forget(&*unproven.transport, part.id);
                }
                !is_theirs
            });
        }
        let (theirs, others): (VecDeque<Active>, VecDeque<Active>) = self
            .active
            .drain(..)
            .partition(|active| active.transfer.peer == peer);
        self.active = others;
        let end = |mut active: Active| {
            active.failure = Some(TransferError::PeerGone);
            if quiet == Quiet::Proven {
                for part in active.posted.drain(..) {
                    forget(&*active.transfer.transport, part.id);
                    self.inflight_bytes -= part.bytes;
                }
            }
            self.end(active, now)
        };
        theirs.into_iter().map(end).collect()
    }

    fn poll_posted(&mut self, active: &mut Active) {
        let transfer = &active.transfer;
        let failure = &mut active.failure;
        active.posted.retain(|part| {
            match transfer.transport.poll(part.id) {
                Progress::Pending => return true,
                Progress::Done => {}
                Progress::Failed(error) => *failure = Some(error),
            }
            forget(&*transfer.transport, part.id);
            self.inflight_bytes -= part.bytes;
            false
        });
    }

    /// Posts as much as the window has room for. The notification goes with the last part, once all others have
    /// arrived: nothing else orders parts among each other.
    fn post_more(&mut self, active: &mut Active) {
        let transfer = &active.transfer;
        while active.next < transfer.segments.len() {
            let room = self.inflight_bytes_max.saturating_sub(self.inflight_bytes);
            let rest = &transfer.segments[active.next..];
            let mut bytes = 0;
            let fits = rest.iter().take_while(|segment| {
                bytes += segment.len;
                bytes <= room
            });
            // A lone segment goes out whatever its size: else one above the limit would wait for ever.
            let n = fits.count().max(usize::from(self.inflight_bytes == 0));
            let is_last = n == rest.len();
            if n == 0 || (is_last && !active.posted.is_empty()) {
                return;
            }
            let part = &rest[..n];
            let notification = is_last.then_some(transfer.notification.as_slice());
            let posted =
                transfer
                    .transport
                    .post(transfer.direction, transfer.peer, part, notification);
            match posted {
                Ok(id) => {
                    let bytes = part.iter().map(|segment| segment.len).sum();
                    self.inflight_bytes += bytes;
                    active.posted.push(Posted { id, bytes });
                    active.next += n;
                }
                Err(error) => {
                    active.failure = Some(error);
                    return;
                }
            }
        }
    }

    /// Answers the caller. Blocks of a part that is not over stay held until it is.
    fn end(&mut self, active: Active, now: Time) -> Finished {
        let Active {
            mut transfer,
            posted,
            failure,
            ..
        } = active;
        let took: Duration = now.since(transfer.started);
        let stats = TransferStats {
            blocks: transfer.holds.len(),
            bytes: transfer.segments.iter().map(|segment| segment.len).sum(),
            segments: transfer.segments.len(),
            took,
        };
        // What was read from a peer after the end of its lease may be the bytes of somebody else.
        let is_late = transfer.direction == Direction::Get && now >= transfer.deadline;
        let mut result = match failure {
            Some(failure) => Err(failure),
            None if is_late => Err(TransferError::Timeout { quarantined: 0 }),
            None => Ok(stats),
        };
        let shared = Arc::clone(&transfer.shared);
        if !posted.is_empty() {
            self.inflight_bytes -= posted.iter().map(|part| part.bytes).sum::<u64>();
            let held = transfer.holds.quarantine();
            if let Err(TransferError::Timeout { quarantined }) = &mut result {
                *quarantined = held;
            }
            self.unproven.push(Unproven {
                transport: transfer.transport,
                peer: transfer.peer,
                posted,
                holds: transfer.holds,
            });
        }
        Finished { shared, result }
    }
}

/// Whether a part is over; if so, its transport forgets it.
fn is_over(transport: &dyn Transport, id: TransferId) -> bool {
    let is_over = transport.poll(id) != Progress::Pending;
    if is_over {
        forget(transport, id);
    }
    is_over
}

/// Releases a part that has ended: bytes no longer move, whatever the transport can say about it now.
fn forget(transport: &dyn Transport, id: TransferId) {
    let (Quiet::Proven | Quiet::Unproven) = transport.release(id);
}
