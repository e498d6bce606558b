//! What happened to memory of this process, and waiting for it.

use std::{
    os::fd::{AsFd, AsRawFd, RawFd},
    sync::Arc,
    time::{Duration, Instant},
};

use orchestra_memory::{Chime as Bell, Event};
use pyo3::prelude::*;

use super::{grants::rights_name, hub::Hub};
use crate::errors::Failure;

/// How long a thread waits before Python may look at its signals.
const SLICE: Duration = Duration::from_millis(100);

/// A descriptor that is readable while waits of one event loop are over.
#[pyclass(frozen, module = "orchestra._core")]
pub(crate) struct Chime {
    bell: Arc<Bell>,
}

impl Chime {
    pub(super) const fn inner(&self) -> &Arc<Bell> {
        &self.bell
    }
}

#[pymethods]
impl Chime {
    #[new]
    fn new() -> PyResult<Self> {
        let bell = Bell::new().map_err(Failure::from)?;
        Ok(Self { bell })
    }

    fn fileno(&self) -> RawFd {
        self.bell.as_fd().as_raw_fd()
    }

    /// The numbers of the waits that are over.
    fn take(&self) -> Vec<u64> {
        self.bell.take()
    }
}

/// Waits until `is_over`, which also asks to be woken; `false` where that did not come in time. The interpreter is
/// free meanwhile, and signals are served.
pub(super) fn wait_until(
    py: Python<'_>,
    bell: &Arc<Bell>,
    deadline: Option<Instant>,
    is_over: impl Fn() -> bool,
) -> PyResult<bool> {
    loop {
        if is_over() {
            return Ok(true);
        }
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        if left == Some(Duration::ZERO) {
            return Ok(false);
        }
        let slice = left.map_or(SLICE, |left| left.min(SLICE));
        py.detach(|| bell.sleep(slice));
        drop(bell.take());
        py.check_signals()?;
    }
}

/// An event as a dictionary; what it does not have is `None`.
#[derive(IntoPyObject)]
pub(crate) struct EventRow {
    kind: &'static str,
    peer: Option<String>,
    grant: Option<u64>,
    rights: Option<&'static str>,
    num_blocks: usize,
    ends_grant: bool,
    payload: Vec<u8>,
}

impl EventRow {
    pub(super) fn new(event: Event, hub: &Hub) -> Self {
        let bare = |kind| Self {
            kind,
            peer: None,
            grant: None,
            rights: None,
            num_blocks: 0,
            ends_grant: false,
            payload: Vec::new(),
        };
        match event {
            Event::Arrived(arrival) => Self {
                peer: hub.name_of(arrival.peer),
                grant: Some(arrival.grant.0),
                rights: Some(rights_name(arrival.rights)),
                num_blocks: arrival.handles.len(),
                ends_grant: arrival.ends_grant,
                payload: arrival.payload,
                ..bare("arrived")
            },
            Event::Stale { peer, grant } => Self {
                peer: hub.name_of(peer),
                grant: Some(grant.0),
                ..bare("stale")
            },
            Event::Malformed(peer) => Self {
                peer: hub.name_of(peer),
                ..bare("malformed")
            },
            Event::WriteGrantExpired(grant) => Self {
                grant: Some(grant.0),
                ..bare("grant_expired")
            },
        }
    }
}
