//! A connection that a peer made: this side applies its puts and answers its gets, one after the other. While an
//! answer waits for room in the socket, nothing more is read: the peer's own socket fills and holds it back.

use std::{
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::event::epoll::EventFlags;

use super::{
    callee::skip,
    frame::{Cursor, HEADER_BYTES, Header, Kind, Outgoing, read_table},
    raw::{Moved, receive},
};
use crate::transport::{
    SlabId,
    ledger::{Inbox, LocalSlabs, Roster, fits},
    metadata::{AccessKey, Identity},
    watch::{Token, Watch},
};

/// How long a new connection may take to say who it is.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
/// System calls before others get a turn.
const CALLS_PER_TURN: usize = 8;

/// What a caller can see and change here.
pub(super) struct House<'a> {
    pub(super) slabs: &'a LocalSlabs,
    pub(super) roster: &'a Roster,
    pub(super) inbox: &'a mut Inbox,
    pub(super) key: AccessKey,
}

/// What is read, or waited for, next.
enum Stage {
    Header,
    Table(Header, Vec<u8>, usize),
    /// The bytes of a put, and its notification.
    Payload(u64, Cursor, Option<Vec<u8>>),
    /// The bytes of a put that was refused.
    Skipping(u64, u64),
    /// A put is in place; its notification waits for room in the inbox.
    Notifying(u64, Vec<u8>),
    Answering(Outgoing),
    /// Said hello after it was disconnected here: waits to be connected to again, under a new name.
    Barred(Identity),
}

/// The connection.
pub(super) struct Caller {
    socket: OwnedFd,
    token: Token,
    identity: Option<Identity>,
    hello_until: Instant,
    stage: Stage,
    header: [u8; HEADER_BYTES],
    header_filled: usize,
    interest: EventFlags,
}

impl Caller {
    pub(super) fn accept(socket: OwnedFd, watch: &Watch, token: Token) -> Option<Self> {
        rustix::net::sockopt::set_tcp_nodelay(&socket, true).ok()?;
        watch.add(&socket, token, EventFlags::IN).ok()?;
        Some(Self {
            socket,
            token,
            identity: None,
            hello_until: Instant::now() + HELLO_TIMEOUT,
            stage: Stage::Header,
            header: [0; HEADER_BYTES],
            header_filled: 0,
            interest: EventFlags::IN,
        })
    }

    pub(super) const fn identity(&self) -> Option<Identity> {
        self.identity
    }

    pub(super) fn is_overdue(&self, now: Instant) -> bool {
        self.identity.is_none() && now >= self.hello_until
    }

    /// Whether it waits for something that the caller of the transport does.
    pub(super) const fn is_held_back(&self) -> bool {
        matches!(self.stage, Stage::Barred(_) | Stage::Notifying(..))
    }

    pub(super) fn touches(&self, slab: SlabId) -> bool {
        match &self.stage {
            Stage::Payload(_, cursor, _) => cursor.touches(slab),
            Stage::Answering(frame) => frame.touches(slab),
            _ => false,
        }
    }

    pub(super) fn leave(self, watch: &Watch) {
        watch.remove(&self.socket);
    }

    /// Takes its turn; how much moved, or none when it must go.
    pub(super) fn pump(
        &mut self,
        watch: &Watch,
        flags: EventFlags,
        house: &mut House<'_>,
    ) -> Option<usize> {
        let mut moved = 0;
        for _ in 0..CALLS_PER_TURN {
            if !self.step(house)? {
                break;
            }
            moved += 1;
        }
        // A turn can end right before a stage that waits for the caller of the transport. It is tried once more: where
        // it can go on, nobody would resume it.
        if self.is_held_back() {
            moved += usize::from(self.step(house)?);
        }
        if self.is_held_back() && flags.intersects(EventFlags::HUP | EventFlags::ERR) {
            return None;
        }
        let interest = match self.stage {
            Stage::Answering(_) => EventFlags::OUT,
            _ if self.is_held_back() => EventFlags::empty(),
            _ => EventFlags::IN,
        };
        if interest != self.interest {
            self.interest = interest;
            watch.change(&self.socket, self.token, interest);
        }
        Some(moved)
    }

    /// One system call, or one change of stage. False when there is nothing to do for now.
    fn step(&mut self, house: &mut House<'_>) -> Option<bool> {
        let socket = self.socket.as_fd();
        let (moved, next) = match &mut self.stage {
            Stage::Header => (
                receive(socket, &mut self.header[self.header_filled..]),
                None,
            ),
            Stage::Table(_, bytes, filled) => (receive(socket, &mut bytes[*filled..]), None),
            Stage::Payload(_, cursor, _) => (cursor.receive(socket), None),
            Stage::Skipping(_, left) => (skip(socket, *left), None),
            Stage::Answering(frame) => (frame.send(socket), None),
            Stage::Notifying(transfer, payload) => {
                let identity = self.identity?;
                if !house.inbox.has_room(house.roster, identity) {
                    return Some(false);
                }
                let payload = std::mem::take(payload);
                house.inbox.push(house.roster, identity, payload);
                (Moved::Bytes(0), Some(answer(Kind::Done, *transfer)))
            }
            Stage::Barred(identity) => {
                if house.roster.is_revoked(*identity) {
                    return Some(false);
                }
                self.identity = Some(*identity);
                (Moved::Bytes(0), Some(Stage::Header))
            }
        };
        let bytes = match moved {
            Moved::Closed => return None,
            Moved::Blocked => return Some(false),
            Moved::Bytes(bytes) => bytes,
        };
        if let Some(next) = next {
            self.stage = next;
        } else if let Some(next) = self.after(bytes, house)? {
            self.stage = next;
        }
        Some(true)
    }

    /// The next stage once `bytes` more have moved; none while this one goes on.
    #[expect(
        clippy::option_option,
        reason = "outside: whether the peer keeps to the protocol; inside: the next stage"
    )]
    fn after(&mut self, bytes: usize, house: &House<'_>) -> Option<Option<Stage>> {
        Some(match &mut self.stage {
            Stage::Header => {
                self.header_filled += bytes;
                if self.header_filled < HEADER_BYTES {
                    return Some(None);
                }
                self.header_filled = 0;
                let header = Header::decode(&self.header)?;
                match (header.kind, self.identity, header.table_bytes()) {
                    (Kind::Put | Kind::Get, None, _)
                    | (Kind::Hello, Some(_), _)
                    | (Kind::Done | Kind::Refused | Kind::Data, _, _) => return None,
                    (Kind::Put, Some(_), 0) => Some(begin(&header, &[], house)?),
                    (Kind::Put | Kind::Get | Kind::Hello, _, len) => {
                        Some(Stage::Table(header, vec![0; len], 0))
                    }
                }
            }
            Stage::Table(header, table, filled) => {
                *filled += bytes;
                if *filled < table.len() {
                    return Some(None);
                }
                if header.kind == Kind::Hello {
                    let identity = Identity(header.transfer);
                    if !house.key.matches(table) {
                        return None;
                    }
                    if house.roster.is_revoked(identity) {
                        return Some(Some(Stage::Barred(identity)));
                    }
                    self.identity = Some(identity);
                    Some(Stage::Header)
                } else {
                    Some(begin(header, table, house)?)
                }
            }
            Stage::Payload(transfer, cursor, notification) if cursor.left() == 0 => {
                Some(finish(*transfer, notification.take()))
            }
            Stage::Skipping(transfer, left) => {
                *left -= bytes as u64;
                (*left == 0).then(|| answer(Kind::Refused, *transfer))
            }
            Stage::Answering(frame) if frame.is_sent() => Some(Stage::Header),
            _ => None,
        })
    }
}

fn answer(kind: Kind, transfer: u64) -> Stage {
    Stage::Answering(Outgoing::short(Header::of(kind, transfer), None, None))
}

fn finish(transfer: u64, notification: Option<Vec<u8>>) -> Stage {
    match notification {
        Some(payload) => Stage::Notifying(transfer, payload),
        None => answer(Kind::Done, transfer),
    }
}

/// Looks at all parts of a put or a get before any byte of it moves. None where the frame contradicts itself.
fn begin(header: &Header, table: &[u8], house: &House<'_>) -> Option<Stage> {
    let (parts, notification) = read_table(header, table)?;
    let notification = header.has_notification.then_some(notification);
    let total = parts
        .iter()
        .try_fold(0_u64, |total, part| total.checked_add(part.len))?;
    if header.kind == Kind::Put && total != header.payload {
        return None;
    }
    let found: Option<Vec<_>> = parts
        .into_iter()
        .map(|part| {
            let slab = house.slabs.get(part.slab)?;
            fits(part.offset, part.len, slab.len())
                .then(|| (Arc::clone(slab), part.offset, part.len))
        })
        .collect();
    let transfer = header.transfer;
    Some(match (header.kind, found) {
        (Kind::Put, Some(_)) if total == 0 => finish(transfer, notification),
        (Kind::Put, Some(parts)) => Stage::Payload(transfer, Cursor::new(parts), notification),
        (Kind::Put, None) if total > 0 => Stage::Skipping(transfer, total),
        (_, Some(parts)) if total > 0 => {
            Stage::Answering(Outgoing::data(transfer, Cursor::new(parts)))
        }
        (_, _) => answer(Kind::Refused, transfer),
    })
}
