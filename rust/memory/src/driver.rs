//! The thread that drives a manager, for programs that have no loop of their own to do it in.
//!
//! It never spins: it sleeps on the descriptors of the transports and on a bell, which is rung by whoever has started
//! or given up something. A transport that cannot be slept on is asked after naps that grow while nothing moves.
//! While bytes move, it works without sleeping: transports move them in its time.

mod bell;
mod rest;

use std::{
    fmt,
    os::fd::AsFd,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use orchestra_core::Time;
use parking_lot::Mutex;

pub use self::bell::Chime;
use self::{
    bell::{Bell, sleep},
    rest::Rest,
};
use crate::{defragment::Defragmenter, error::MemoryError, manager::BufferManager};

/// The most that transports work before transfers are looked at.
const BUDGET: Duration = Duration::from_millis(1);
/// How soon a defragmenter that has work is asked again, and one that has none.
const DEFRAGMENT_SOON: Duration = Duration::from_millis(4);
const DEFRAGMENT_LATER: Duration = Duration::from_millis(250);
/// The wait number by which a [`Chime`] learns that there are events.
pub const EVENTS: u64 = 0;

/// Drives a manager until it is closed or dropped.
pub struct Driver {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

struct Shared {
    manager: BufferManager,
    started: Instant,
    bell: Bell,
    is_closed: AtomicBool,
    /// Those who wait for events; each is told once.
    listeners: Mutex<Vec<Weak<Chime>>>,
    defragmenters: Mutex<Vec<Defragmenter>>,
}

impl fmt::Debug for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Driver")
            .field("manager", &self.shared.manager)
            .finish_non_exhaustive()
    }
}

impl Driver {
    /// Starts the thread.
    pub fn start(manager: BufferManager) -> Result<Self, MemoryError> {
        let shared = Arc::new(Shared {
            manager,
            started: Instant::now(),
            bell: Bell::new()?,
            is_closed: AtomicBool::new(false),
            listeners: Mutex::default(),
            defragmenters: Mutex::default(),
        });
        let driven = Arc::clone(&shared);
        let thread = thread::Builder::new()
            .name("orchestra-memory".to_owned())
            .spawn(move || driven.run())
            .map_err(|error| MemoryError::Os {
                action: "start the thread that drives the memory manager",
                code: error.raw_os_error().unwrap_or(0),
            })?;
        let thread = Mutex::new(Some(thread));
        Ok(Self { shared, thread })
    }

    /// What it drives. Whoever starts or gives up a transfer calls [`Self::ring`] afterwards.
    pub fn manager(&self) -> &BufferManager {
        &self.shared.manager
    }

    /// The time by which the manager is driven.
    pub fn now(&self) -> Time {
        self.shared.now()
    }

    /// Wakes the thread: there is something to do.
    pub fn ring(&self) {
        self.shared.bell.ring();
    }

    /// Has a bell rung with [`EVENTS`] when there are events; `true` where there are some already, and where nobody
    /// will bring any more.
    pub fn listen(&self, chime: &Arc<Chime>) -> bool {
        let mut listeners = self.shared.listeners.lock();
        listeners.retain(|one| one.strong_count() > 0 && one.as_ptr() != Arc::as_ptr(chime));
        listeners.push(Arc::downgrade(chime));
        // Asked after it was added, and under the lock: what arrives later rings.
        self.shared.manager.has_events() || self.is_closed()
    }

    /// Keeps a pool in long runs from now on, in the time that transfers leave.
    pub fn defragment(&self, defragmenter: Defragmenter) {
        self.shared.defragmenters.lock().push(defragmenter);
        self.ring();
    }

    /// Bytes that were copied to keep pools in long runs.
    pub fn defragmented_bytes(&self) -> u64 {
        let defragmenters = self.shared.defragmenters.lock();
        defragmenters.iter().map(Defragmenter::copied_bytes).sum()
    }

    /// Whether [`Self::close`] was called.
    pub fn is_closed(&self) -> bool {
        self.shared.is_closed.load(Ordering::Acquire)
    }

    /// Ends the thread, and with it every connection and every transfer. Again does nothing.
    pub fn close(&self) {
        self.shared.is_closed.store(true, Ordering::Release);
        self.ring();
        if let Some(thread) = self.thread.lock().take() {
            // The thread has nothing to return, and no lock is left behind by one that panicked.
            drop(thread.join());
        }
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.close();
    }
}

impl Shared {
    fn now(&self) -> Time {
        Time(self.started.elapsed().as_micros() as u64)
    }

    fn run(&self) {
        let mut rest = Rest::default();
        while !self.is_closed.load(Ordering::Acquire) {
            let moved = self.manager.progress(self.now(), BUDGET);
            if self.manager.has_events() {
                self.tell_listeners();
            }
            let again = self.defragment();
            if moved > 0 {
                rest.moved();
            } else {
                self.sleep(&mut rest, again);
            }
        }
        for peer in self.manager.peers() {
            // Nobody is left who could do anything about a peer that is not proven to be quiet.
            drop(self.manager.disconnect(peer, self.now()));
        }
        self.tell_listeners();
    }

    fn tell_listeners(&self) {
        for listener in self.listeners.lock().drain(..) {
            if let Some(chime) = listener.upgrade() {
                chime.ring(EVENTS);
            }
        }
    }

    /// Moves blocks where the budget allows; when to look again, where there is anything to look at.
    fn defragment(&self) -> Option<Duration> {
        let mut defragmenters = self.defragmenters.lock();
        if defragmenters.is_empty() {
            return None;
        }
        let now = self.now();
        let is_busy = || {
            // Whoever has just been woken often waits for this processor: else it would until all slices are copied.
            thread::yield_now();
            self.manager.is_busy()
        };
        let mut is_running = false;
        for defragmenter in defragmenters.iter_mut() {
            is_running |= defragmenter.step(now, is_busy).is_running;
        }
        Some(if is_running {
            DEFRAGMENT_SOON
        } else {
            DEFRAGMENT_LATER
        })
    }

    fn sleep(&self, rest: &mut Rest, again: Option<Duration>) {
        let due = self.manager.next_due().map(|due| due.since(self.now()));
        let transports = self.manager.transports();
        let wakes = transports.iter().filter_map(|one| one.wake_fd());
        let wakes: Vec<_> = wakes.collect();
        let is_blind = wakes.len() < transports.len();
        let next = rest.next(due.into_iter().chain(again).min(), is_blind);
        let mut fds = vec![self.bell.as_fd()];
        if next.hears_transports {
            fds.extend(wakes);
        }
        let started = Instant::now();
        sleep(&fds, next.at_most);
        if self.bell.silence() {
            rest.moved();
        } else {
            rest.slept(next, started.elapsed());
        }
    }
}
