//! A connection that this process made: it has the peer's slabs mapped, and copies in and out of them.

use std::{
    collections::VecDeque,
    os::fd::{AsFd, OwnedFd},
};

use rustc_hash::{FxHashMap, FxHashSet};
use rustix::{
    event::epoll::EventFlags,
    io::Errno,
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with},
};

use super::{
    map::RemoteSlab,
    message::{Message, Received, SLABS_PER_MESSAGE, receive, send},
};
use crate::{
    error::{MemoryError, TransferError},
    transport::{
        Direction, Progress, SlabId, TransferId,
        ledger::RemoteSlabs,
        metadata::{AccessKey, Identity, Metadata},
        spans::Spans,
        watch::{Token, Watch},
    },
};

/// What is copied before the lock is given to others: some 100 µs of memory bandwidth.
const SLICE_BYTES: u64 = 1 << 20;

/// A transfer under way.
pub(super) struct Job {
    pub(super) id: TransferId,
    pub(super) direction: Direction,
    pub(super) spans: Spans,
    pub(super) notification: Option<Vec<u8>>,
    /// The first span that is not copied yet, and how many of its bytes are.
    next: usize,
    copied: u64,
}

impl Job {
    pub(super) const fn new(
        id: TransferId,
        direction: Direction,
        spans: Spans,
        notification: Option<Vec<u8>>,
    ) -> Self {
        Self {
            id,
            direction,
            spans,
            notification,
            next: 0,
            copied: 0,
        }
    }
}

impl Job {
    /// Copies at most as many bytes between the two slabs that are next; how many it copied.
    fn copy(&mut self, map: &RemoteSlab, most: u64) -> u64 {
        let Some((pair, spans)) = self.spans.rest(self.next) else {
            return 0;
        };
        let copier = map.beside(&pair.local);
        let mut left = most;
        for span in spans {
            let len = left.min(span.len - self.copied);
            let (theirs, ours) = (span.remote_offset, span.local_offset);
            copier.copy(
                self.direction,
                theirs + self.copied,
                ours + self.copied,
                len,
            );
            left -= len;
            self.copied += len;
            if self.copied < span.len {
                break;
            }
            self.next += 1;
            self.copied = 0;
            if left == 0 {
                break;
            }
        }
        most - left
    }
}

/// What a step came to.
pub(super) enum Step {
    /// There is nothing to do, or it waits for the peer.
    Idle,
    /// Bytes were copied.
    Moved,
    /// A transfer is over.
    Ended(TransferId, Progress),
}

/// The connection.
pub(super) struct Callee {
    // Before the socket, so that they are dropped first: the peer takes the end of the socket for the proof that
    // its memory is mapped here no more.
    maps: FxHashMap<SlabId, RemoteSlab>,
    /// None when the peer has gone.
    socket: Option<OwnedFd>,
    token: Token,
    pub(super) known: RemoteSlabs,
    missing: FxHashSet<SlabId>,
    pub(super) jobs: VecDeque<Job>,
    /// The socket was full; its next room is watched for.
    awaits_room: bool,
}

impl Callee {
    /// Calls, and asks for all slabs of the metadata; the answer comes later.
    pub(super) fn call(
        metadata: &Metadata,
        caller: (Identity, AccessKey),
        watch: &Watch,
        token: Token,
    ) -> Result<Self, MemoryError> {
        let fail = |errno| MemoryError::os("connect to a peer's socket", errno);
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket =
            socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).map_err(fail)?;
        let address = SocketAddrUnix::new_abstract_name(&metadata.address)
            .map_err(|_| MemoryError::BadMetadata("a socket name that is too long"))?;
        connect(&socket, &address).map_err(fail)?;
        let hello = Message::Hello {
            caller: caller.0,
            key: metadata.key,
        };
        send(&socket, &hello, &[]).map_err(fail)?;
        for slabs in metadata.slabs.chunks(SLABS_PER_MESSAGE) {
            let want = Message::Want(slabs.iter().map(|slab| slab.id).collect());
            send(&socket, &want, &[]).map_err(fail)?;
        }
        watch.add(&socket, token, EventFlags::IN)?;
        Ok(Self {
            socket: Some(socket),
            token,
            known: RemoteSlabs::new(&metadata.slabs),
            maps: FxHashMap::default(),
            missing: FxHashSet::default(),
            jobs: VecDeque::new(),
            awaits_room: false,
        })
    }

    pub(super) const fn is_gone(&self) -> bool {
        self.socket.is_none()
    }

    pub(super) const fn token(&self) -> Token {
        self.token
    }

    /// Closes, unmaps, and hands back what can no longer end well.
    pub(super) fn hang_up(&mut self, watch: &Watch) -> Vec<TransferId> {
        self.maps.clear();
        if let Some(socket) = self.socket.take() {
            watch.remove(&socket);
        }
        self.jobs.drain(..).map(|job| job.id).collect()
    }

    /// Takes in what the peer says. False when it has gone.
    pub(super) fn listen(&mut self, watch: &Watch, flags: EventFlags) -> bool {
        let Some(socket) = &self.socket else {
            return true;
        };
        if self.awaits_room && flags.contains(EventFlags::OUT) {
            self.awaits_room = false;
            watch.change(socket, self.token, EventFlags::IN);
        }
        loop {
            match receive(socket) {
                Received::Message(Message::Here(slabs), files) if slabs.len() == files.len() => {
                    for (slab, file) in slabs.into_iter().zip(&files) {
                        // A slab that cannot be mapped is as good as not there; its transfers say so.
                        match self
                            .known
                            .len_of(slab)
                            .map(|len| RemoteSlab::map(file, len))
                        {
                            Some(Ok(map)) => drop(self.maps.insert(slab, map)),
                            Some(Err(_)) => drop(self.missing.insert(slab)),
                            None => {}
                        }
                    }
                }
                Received::Message(Message::Missing(slabs), _) => self.missing.extend(slabs),
                Received::Nothing => return true,
                Received::Message(..) | Received::Malformed | Received::Closed => return false,
            }
        }
    }

    /// Copies one slice of the oldest transfer, or ends it.
    pub(super) fn step(&mut self, watch: &Watch) -> Step {
        let Some(job) = self.jobs.front_mut() else {
            return Step::Idle;
        };
        let mut left = SLICE_BYTES;
        while left > 0
            && let Some((pair, _)) = job.spans.rest(job.next)
        {
            let Some(map) = self.maps.get(&pair.remote.id) else {
                if self.missing.contains(&pair.remote.id) {
                    return self.end(Progress::Failed(TransferError::OutOfBounds));
                }
                return if left < SLICE_BYTES {
                    Step::Moved
                } else {
                    Step::Idle
                };
            };
            left -= job.copy(map, left);
        }
        if job.next < job.spans.len() {
            return Step::Moved;
        }
        self.notify(watch)
    }

    /// The bytes are there: says so to the peer, where that was asked for.
    fn notify(&mut self, watch: &Watch) -> Step {
        let (Some(job), Some(socket)) = (self.jobs.front_mut(), &self.socket) else {
            return Step::Idle;
        };
        let Some(payload) = job.notification.take() else {
            return self.end(Progress::Done);
        };
        // Ours must be visible before the peer reads that they are; a system call alone is not a promise of that.
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        let message = Message::Notify(payload);
        match send(socket, &message, &[]) {
            Ok(()) => self.end(Progress::Done),
            Err(Errno::AGAIN | Errno::NOBUFS) => {
                if let Message::Notify(payload) = message {
                    job.notification = Some(payload);
                }
                if !self.awaits_room {
                    self.awaits_room = true;
                    watch.change(socket.as_fd(), self.token, EventFlags::IN | EventFlags::OUT);
                }
                Step::Idle
            }
            Err(_) => self.end(Progress::Failed(TransferError::PeerGone)),
        }
    }

    fn end(&mut self, outcome: Progress) -> Step {
        self.jobs
            .pop_front()
            .map_or(Step::Idle, |job| Step::Ended(job.id, outcome))
    }
}
