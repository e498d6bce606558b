//! Waking somebody who sleeps on descriptors: a bell, and one that says what it was rung for.

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
    task::{Wake, Waker},
    time::Duration,
};

use parking_lot::Mutex;
use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, eventfd, poll},
    time::Timespec,
};

use crate::error::MemoryError;

/// Readable from when it is rung until it is silenced.
#[derive(Debug)]
pub(super) struct Bell(OwnedFd);

impl Bell {
    pub(super) fn new() -> Result<Self, MemoryError> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let fd = eventfd(0, flags).map_err(|errno| MemoryError::os("create an eventfd", errno))?;
        Ok(Self(fd))
    }

    pub(super) fn ring(&self) {
        // It refuses only where it has been rung 2^64 - 2 times: then it is readable all the same.
        let _ = rustix::io::write(&self.0, &1_u64.to_ne_bytes());
    }

    /// Whether it had been rung.
    pub(super) fn silence(&self) -> bool {
        rustix::io::read(&self.0, &mut [0; 8]).is_ok()
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Sleeps until one of the descriptors is readable, a signal comes, or the time is over.
pub(super) fn sleep(fds: &[BorrowedFd<'_>], at_most: Option<Duration>) {
    let mut fds: Vec<_> = fds
        .iter()
        .map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN))
        .collect();
    // What no clock can hold is for ever.
    let at_most = at_most.and_then(|time| Timespec::try_from(time).ok());
    let _ = poll(&mut fds, at_most.as_ref());
}

/// A bell for many waits of one sleeper, each of which has a number.
#[derive(Debug)]
pub struct Chime {
    bell: Bell,
    /// At most one entry for each wait that is on.
    over: Mutex<Vec<u64>>,
}

impl Chime {
    /// A bell that nobody has rung.
    pub fn new() -> Result<Arc<Self>, MemoryError> {
        let bell = Bell::new()?;
        let over = Mutex::default();
        Ok(Arc::new(Self { bell, over }))
    }

    /// Ends the wait of this number.
    pub fn ring(&self, number: u64) {
        let mut over = self.over.lock();
        if !over.contains(&number) {
            over.push(number);
        }
        self.bell.ring();
    }

    /// What ends the wait of this number when it is called.
    pub fn waker(self: &Arc<Self>, number: u64) -> Waker {
        let chime = Arc::clone(self);
        Waker::from(Arc::new(Wait { chime, number }))
    }

    /// The waits that are over since this was asked last.
    pub fn take(&self) -> Vec<u64> {
        let mut over = self.over.lock();
        let _ = self.bell.silence();
        std::mem::take(&mut *over)
    }

    /// Sleeps until it is rung, a signal comes, or the time is over.
    pub fn sleep(&self, at_most: Duration) {
        sleep(&[self.bell.as_fd()], Some(at_most));
    }
}

/// Readable while there is something to [`take`](Chime::take).
impl AsFd for Chime {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}

struct Wait {
    chime: Arc<Chime>,
    number: u64,
}

impl Wake for Wait {
    fn wake(self: Arc<Self>) {
        self.chime.ring(self.number);
    }
}
