//! A connection that a peer made: it is handed our descriptors, and sends notifications.

use std::{
    os::fd::{AsFd, OwnedFd},
    time::{Duration, Instant},
};

use rustix::{
    event::epoll::EventFlags,
    net::{Shutdown, shutdown, sockopt::socket_peercred},
    process::geteuid,
};

use super::message::{Message, Received, receive, send};
use crate::transport::{
    ledger::{Inbox, LocalSlabs, Roster},
    metadata::{AccessKey, Identity},
    watch::{Token, Watch},
};

/// How long a new connection may take to say who it is.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);

/// The connection.
pub(super) struct Caller {
    socket: OwnedFd,
    token: Token,
    /// Known once it has said hello.
    identity: Option<Identity>,
    /// Said hello after it was disconnected here: waits to be connected to again, under a new name.
    barred: Option<Identity>,
    hello_until: Instant,
    /// The inbox was full: nothing more is read until it has room.
    is_paused: bool,
    /// Disconnected by us: it is waited for to unmap our memory, and heard no more.
    is_dismissed: bool,
}

/// What came of listening.
pub(super) enum Heard {
    /// As many notifications.
    Notifications(usize),
    /// The peer has closed or died: our memory is mapped there no more.
    Gone,
    /// The peer does not keep to the protocol.
    Broken,
}

/// What a caller can see and change here.
pub(super) struct House<'a> {
    pub(super) slabs: &'a LocalSlabs,
    pub(super) roster: &'a Roster,
    pub(super) inbox: &'a mut Inbox,
    pub(super) key: AccessKey,
}

impl Caller {
    /// Takes a new connection in, if it belongs to the same user.
    pub(super) fn accept(socket: OwnedFd, watch: &Watch, token: Token) -> Option<Self> {
        let credentials = socket_peercred(&socket).ok()?;
        if credentials.uid != geteuid() || watch.add(&socket, token, EventFlags::IN).is_err() {
            return None;
        }
        Some(Self {
            socket,
            token,
            identity: None,
            barred: None,
            hello_until: Instant::now() + HELLO_TIMEOUT,
            is_paused: false,
            is_dismissed: false,
        })
    }

    pub(super) const fn identity(&self) -> Option<Identity> {
        self.identity
    }

    pub(super) const fn is_dismissed(&self) -> bool {
        self.is_dismissed
    }

    pub(super) fn is_overdue(&self, now: Instant) -> bool {
        self.identity.is_none() && now >= self.hello_until
    }

    /// Asks the peer to unmap our memory; the end of its socket is the proof that it has.
    pub(super) fn dismiss(&mut self, watch: &Watch) {
        self.is_dismissed = true;
        self.resume(watch);
        // Refused only where the peer has closed already, which the next read sees.
        let _ = shutdown(&self.socket, Shutdown::Write);
    }

    fn pause(&mut self, watch: &Watch) {
        if !self.is_paused {
            self.is_paused = true;
            watch.change(&self.socket, self.token, EventFlags::empty());
        }
    }

    /// The inbox has room again.
    pub(super) fn resume(&mut self, watch: &Watch) {
        if self.is_paused {
            self.is_paused = false;
            watch.change(&self.socket, self.token, EventFlags::IN);
        }
    }

    pub(super) fn leave(self, watch: &Watch) {
        watch.remove(&self.socket);
    }

    /// Whether it waits for this peer to be connected to again.
    pub(super) fn is_barred_as(&self, identity: Identity) -> bool {
        self.barred == Some(identity)
    }

    /// Takes in what the peer says.
    pub(super) fn listen(
        &mut self,
        watch: &Watch,
        flags: EventFlags,
        house: &mut House<'_>,
    ) -> Heard {
        if let Some(identity) = self.barred {
            if house.roster.is_revoked(identity) {
                let is_gone = flags.intersects(EventFlags::HUP | EventFlags::ERR);
                return if is_gone {
                    Heard::Gone
                } else {
                    Heard::Notifications(0)
                };
            }
            self.identity = self.barred.take();
            self.resume(watch);
        }
        let mut heard = 0;
        while self.barred.is_none() {
            if let Some(identity) = self.identity
                && !self.is_dismissed
                && !house.inbox.has_room(house.roster, identity)
            {
                self.pause(watch);
                return Heard::Notifications(heard);
            }
            match receive(&self.socket) {
                Received::Nothing => return Heard::Notifications(heard),
                Received::Closed => return Heard::Gone,
                Received::Message(..) | Received::Malformed if self.is_dismissed => {}
                Received::Malformed => return Heard::Broken,
                Received::Message(message, _) => match self.obey(message, house) {
                    Some(count) => heard += count,
                    None => return Heard::Broken,
                },
            }
        }
        self.pause(watch);
        Heard::Notifications(heard)
    }

    /// How many notifications that was, or none where the peer breaks the protocol.
    fn obey(&mut self, message: Message, house: &mut House<'_>) -> Option<usize> {
        match (message, self.identity) {
            (Message::Hello { caller, key }, None) => {
                if !house.key.matches(&key.0) {
                    return None;
                }
                if house.roster.is_revoked(caller) {
                    self.barred = Some(caller);
                } else {
                    self.identity = Some(caller);
                }
                Some(0)
            }
            (Message::Want(wanted), Some(_)) => {
                let (here, missing): (Vec<_>, Vec<_>) = wanted
                    .into_iter()
                    .partition(|slab| house.slabs.get(*slab).is_some_and(|it| it.file().is_some()));
                let files: Vec<_> = here
                    .iter()
                    .filter_map(|slab| house.slabs.get(*slab))
                    .filter_map(|slab| slab.file())
                    .collect();
                if !here.is_empty() {
                    send(self.socket.as_fd(), &Message::Here(here), &files).ok()?;
                }
                if !missing.is_empty() {
                    send(self.socket.as_fd(), &Message::Missing(missing), &[]).ok()?;
                }
                Some(0)
            }
            (Message::Notify(payload), Some(identity)) => {
                house.inbox.push(house.roster, identity, payload);
                Some(1)
            }
            _ => None,
        }
    }
}
