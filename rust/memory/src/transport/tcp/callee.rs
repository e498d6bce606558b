//! A connection that this process made: it sends puts and gets, and takes in their answers.

use std::{
    collections::VecDeque,
    net::SocketAddr,
    os::fd::{AsFd, OwnedFd},
    time::{Duration, Instant},
};

use rustc_hash::FxHashMap;
use rustix::{
    event::epoll::EventFlags,
    io::Errno,
    net::{
        AddressFamily, SocketFlags, SocketType, connect, socket_with,
        sockopt::{set_tcp_nodelay, socket_error},
    },
};

use super::{
    frame::{Cursor, HEADER_BYTES, Header, Kind, Outgoing},
    raw::{Moved, receive},
};
use crate::{
    error::{MemoryError, TransferError},
    transport::{
        Direction, Progress, SlabId, TransferId,
        ledger::RemoteSlabs,
        metadata::{Identity, Metadata},
        spans::Spans,
        watch::{Token, Watch},
    },
};

/// How long the other host may take to answer the first packet.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// System calls in each direction before others get a turn.
const CALLS_PER_TURN: usize = 4;

/// A transfer that was not answered yet.
enum Waiting {
    Put,
    /// Where the bytes go, and what to tell the peer once they are there.
    Get(Cursor, Option<Vec<u8>>),
    /// Released: its answer is of no interest, and bytes that come are thrown away.
    Orphan,
}

/// The connection.
pub(super) struct Callee {
    /// None when the peer has gone.
    socket: Option<OwnedFd>,
    token: Token,
    pub(super) known: RemoteSlabs,
    /// When to give up on the connection; none once it is made.
    connect_until: Option<Instant>,
    queue: VecDeque<Outgoing>,
    waiting: FxHashMap<TransferId, Waiting>,
    header: [u8; HEADER_BYTES],
    header_filled: usize,
    /// The transfer whose data arrives, and how many bytes are to come.
    arriving: Option<(TransferId, u64)>,
    interest: EventFlags,
}

/// Transfers that are over.
pub(super) type Ended = Vec<(TransferId, Progress)>;

impl Callee {
    /// Starts to connect.
    pub(super) fn call(
        metadata: &Metadata,
        caller: Identity,
        watch: &Watch,
        token: Token,
    ) -> Result<Self, MemoryError> {
        let fail = |errno| MemoryError::os("connect to a peer", errno);
        let address = std::str::from_utf8(&metadata.address).ok();
        let address: Option<SocketAddr> = address.and_then(|address| address.parse().ok());
        let address = address.ok_or(MemoryError::BadMetadata("no address"))?;
        let family = if address.is_ipv4() {
            AddressFamily::INET
        } else {
            AddressFamily::INET6
        };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(family, SocketType::STREAM, flags, None).map_err(fail)?;
        set_tcp_nodelay(&socket, true).map_err(fail)?;
        match connect(&socket, &address) {
            Ok(()) | Err(Errno::INPROGRESS) => {}
            Err(errno) => return Err(fail(errno)),
        }
        let interest = EventFlags::IN | EventFlags::OUT;
        watch.add(&socket, token, interest)?;
        let hello = Header::of(Kind::Hello, caller.0);
        Ok(Self {
            socket: Some(socket),
            token,
            known: RemoteSlabs::new(&metadata.slabs),
            connect_until: Some(Instant::now() + CONNECT_TIMEOUT),
            queue: VecDeque::from([Outgoing::short(hello, None, Some(&metadata.key.0))]),
            waiting: FxHashMap::default(),
            header: [0; HEADER_BYTES],
            header_filled: 0,
            arriving: None,
            interest,
        })
    }

    pub(super) const fn is_gone(&self) -> bool {
        self.socket.is_none()
    }

    pub(super) const fn token(&self) -> Token {
        self.token
    }

    pub(super) fn is_overdue(&self, now: Instant) -> bool {
        self.connect_until.is_some_and(|until| now >= until)
    }

    pub(super) fn touches(&self, slab: SlabId) -> bool {
        self.queue.iter().any(|frame| frame.touches(slab))
            || self.waiting.values().any(|waiting| match waiting {
                Waiting::Get(cursor, _) => cursor.touches(slab),
                Waiting::Put | Waiting::Orphan => false,
            })
    }

    pub(super) fn post(
        &mut self,
        watch: &Watch,
        id: TransferId,
        direction: Direction,
        spans: &Spans,
        notification: Option<&[u8]>,
    ) {
        let (kind, waiting, now) = match direction {
            Direction::Put => (Kind::Put, Waiting::Put, notification),
            // A notification follows when the bytes are here.
            Direction::Get => {
                let later = notification.map(<[u8]>::to_vec);
                (
                    Kind::Get,
                    Waiting::Get(Cursor::of_spans(spans), later),
                    None,
                )
            }
        };
        self.queue
            .push_back(Outgoing::transfer(kind, id, spans, now));
        self.waiting.insert(id, waiting);
        self.show_interest(watch);
    }

    /// Forgets a transfer. True where no byte of it can move any more on either side.
    pub(super) fn release(&mut self, id: TransferId) -> bool {
        let Some(waiting) = self.waiting.get_mut(&id) else {
            return true;
        };
        let is_get = matches!(waiting, Waiting::Get(..));
        *waiting = Waiting::Orphan;
        let unsent = self
            .queue
            .iter()
            .position(|frame| frame.transfer == Some(id) && !frame.is_started());
        if let Some(at) = unsent {
            self.queue.remove(at);
            self.waiting.remove(&id);
        }
        is_get || unsent.is_some()
    }

    /// Lets go of everything that is not under way: what is must be finished, or the stream makes no sense.
    pub(super) fn leave(&mut self) -> Vec<TransferId> {
        let ids: Vec<_> = self.waiting.keys().copied().collect();
        for id in &ids {
            self.release(*id);
        }
        ids
    }

    /// Whether nothing of ours can land at the peer any more.
    pub(super) fn is_quiet(&self) -> bool {
        self.socket.is_none()
            || (self.waiting.is_empty() && self.queue.iter().all(|frame| !frame.is_started()))
    }

    /// Closes, and hands back what can no longer end well.
    pub(super) fn hang_up(&mut self, watch: &Watch) -> Vec<TransferId> {
        if let Some(socket) = self.socket.take() {
            watch.remove(&socket);
        }
        self.queue.clear();
        self.arriving = None;
        self.waiting.drain().map(|(id, _)| id).collect()
    }

    /// Sends and receives what it can in its turn. None when the peer has gone.
    pub(super) fn pump(&mut self, watch: &Watch, ended: &mut Ended) -> Option<usize> {
        if self.connect_until.is_some() {
            match socket_error(self.socket.as_ref()?) {
                Ok(Ok(())) => self.connect_until = None,
                _ => return None,
            }
        }
        let mut moved = 0;
        for _ in 0..CALLS_PER_TURN {
            moved += usize::from(self.send()?);
        }
        for _ in 0..CALLS_PER_TURN {
            if !self.receive(ended)? {
                break;
            }
            moved += 1;
        }
        self.show_interest(watch);
        Some(moved)
    }

    fn send(&mut self) -> Option<bool> {
        let (Some(frame), Some(socket)) = (self.queue.front_mut(), &self.socket) else {
            return Some(false);
        };
        match frame.send(socket.as_fd()) {
            Moved::Closed => return None,
            Moved::Blocked => return Some(false),
            Moved::Bytes(_) => {}
        }
        if frame.is_sent() {
            self.queue.pop_front();
        }
        Some(true)
    }

    fn receive(&mut self, ended: &mut Ended) -> Option<bool> {
        let socket = self.socket.as_ref()?.as_fd();
        if let Some((id, left)) = self.arriving {
            let moved = match self.waiting.get_mut(&id) {
                Some(Waiting::Get(cursor, _)) => cursor.receive(socket),
                _ => skip(socket, left),
            };
            return match moved {
                Moved::Closed => None,
                Moved::Blocked => Some(false),
                Moved::Bytes(bytes) => {
                    let left = left - bytes as u64;
                    self.arriving = (left > 0).then_some((id, left));
                    if left == 0 {
                        self.fetched(id, ended);
                    }
                    Some(true)
                }
            };
        }
        match receive(socket, &mut self.header[self.header_filled..]) {
            Moved::Closed => None,
            Moved::Blocked => Some(false),
            Moved::Bytes(bytes) => {
                self.header_filled += bytes;
                if self.header_filled == HEADER_BYTES {
                    self.header_filled = 0;
                    let header = Header::decode(&self.header)?;
                    self.answered(header, ended)?;
                }
                Some(true)
            }
        }
    }

    fn answered(&mut self, header: Header, ended: &mut Ended) -> Option<()> {
        let id = TransferId(header.transfer);
        match (header.kind, self.waiting.get(&id)?) {
            (Kind::Data, Waiting::Get(cursor, _))
                if cursor.left() == header.payload && header.payload > 0 =>
            {
                self.arriving = Some((id, header.payload));
                return Some(());
            }
            (Kind::Data, Waiting::Orphan) if header.payload > 0 => {
                self.arriving = Some((id, header.payload));
                return Some(());
            }
            (Kind::Done, Waiting::Put) => ended.push((id, Progress::Done)),
            (Kind::Refused, Waiting::Put | Waiting::Get(..)) => {
                ended.push((id, Progress::Failed(TransferError::OutOfBounds)));
            }
            (Kind::Done | Kind::Refused, Waiting::Orphan) => {}
            _ => return None,
        }
        self.waiting.remove(&id);
        Some(())
    }

    /// All bytes of a get are here.
    fn fetched(&mut self, id: TransferId, ended: &mut Ended) {
        if let Some(Waiting::Get(_, notification)) = self.waiting.remove(&id) {
            if let Some(payload) = notification {
                let header = Header::of(Kind::Put, id.0);
                self.queue
                    .push_back(Outgoing::short(header, Some(id), Some(&payload)));
                self.waiting.insert(id, Waiting::Put);
            } else {
                ended.push((id, Progress::Done));
            }
        }
    }

    fn show_interest(&mut self, watch: &Watch) {
        let is_sending = !self.queue.is_empty() || self.connect_until.is_some();
        let out = if is_sending {
            EventFlags::OUT
        } else {
            EventFlags::empty()
        };
        let interest = EventFlags::IN | out;
        if let Some(socket) = &self.socket
            && interest != self.interest
        {
            self.interest = interest;
            watch.change(socket, self.token, interest);
        }
    }
}

/// Throws bytes away.
pub(super) fn skip(socket: std::os::fd::BorrowedFd<'_>, left: u64) -> Moved {
    let mut scratch = [0; 8192];
    let len = left.min(scratch.len() as u64) as usize;
    receive(socket, &mut scratch[..len])
}
