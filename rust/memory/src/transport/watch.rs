//! The sockets of a transport in one epoll set: one system call says which of them have something to say, however
//! many peers there are, and the caller's loop can sleep on it.

use std::{
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::{
    event::epoll::{self, CreateFlags, Event, EventData, EventFlags},
    io::Errno,
    time::Timespec,
};

use crate::error::MemoryError;

/// Sockets that are looked at in one go; the rest come with the next.
const EVENTS_MAX: usize = 64;

/// Which socket an event belongs to; chosen by the transport.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Token(pub(super) u64);

/// An epoll set.
pub(super) struct Watch {
    epoll: OwnedFd,
}

impl Watch {
    pub(super) fn new() -> Result<Self, MemoryError> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)
            .map_err(|errno| MemoryError::os("create an epoll set", errno))?;
        Ok(Self { epoll })
    }

    /// Readable when one of the sockets has something to say.
    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    pub(super) fn add(
        &self,
        fd: impl AsFd,
        token: Token,
        interest: EventFlags,
    ) -> Result<(), MemoryError> {
        epoll::add(&self.epoll, fd, EventData::new_u64(token.0), interest)
            .map_err(|errno| MemoryError::os("watch a socket", errno))
    }

    /// Changes what is asked of a socket that was added.
    pub(super) fn change(&self, fd: impl AsFd, token: Token, interest: EventFlags) {
        let changed = epoll::modify(&self.epoll, fd, EventData::new_u64(token.0), interest);
        debug_assert!(changed.is_ok(), "only sockets that were added are changed");
    }

    /// Must come before the socket closes where a copy of its descriptor is left.
    pub(super) fn remove(&self, fd: impl AsFd) {
        let removed = epoll::delete(&self.epoll, fd);
        debug_assert!(removed.is_ok(), "only sockets that were added are removed");
    }

    /// What there is to do now, without waiting.
    pub(super) fn ready(&self) -> Vec<(Token, EventFlags)> {
        let mut events = [const { MaybeUninit::<Event>::uninit() }; EVENTS_MAX];
        let now = Timespec::default();
        match epoll::wait(&self.epoll, &mut events, Some(&now)) {
            Ok((ready, _)) => ready
                .iter()
                .map(|event| (Token(event.data.u64()), event.flags))
                .collect(),
            Err(errno) => {
                debug_assert_eq!(errno, Errno::INTR, "an epoll set of ours can be asked");
                Vec::new()
            }
        }
    }
}
