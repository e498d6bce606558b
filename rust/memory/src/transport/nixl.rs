//! NIXL: the transport between hosts, and to other engines' memory. One-sided over InfiniBand, RoCE, EFA and, within
//! a host, the kernel's copies between processes; over plain TCP the peer must make progress for its memory to be
//! reached.
//!
//! Reading order: [`library`] finds and loads it, [`ffi`] calls it (all `unsafe` code is there).
//!
//! **What can be proven.** Little: NIXL cannot stop a transfer that runs, nor take back what a peer may do here.
//! A transfer that has ended is quiet. A transfer released earlier, and every disconnected peer, is
//! [`Quiet::Unproven`]: only the death of the peer, known from elsewhere, proves more.

mod ffi;
pub mod library;

use std::{
    ffi::CString,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::{Mutex, MutexGuard};
use rustc_hash::FxHashMap;

use self::{
    ffi::{Agent, Extent, Request, Standing},
    library::{find, unavailable},
};
use super::{
    Direction, Notification, PeerId, Progress, Quiet, Segment, SlabId, TransferId, Transport,
    ledger::{Inbox, LocalSlabs, RemoteSlabs, Roster, Transfers, check_notification, refused},
    metadata::{AccessKey, Identity, Metadata, draw_identity},
    spans::{Pair, Span, Spans},
};
use crate::{
    error::{MemoryError, TransferError},
    slab::Slab,
    tier::Tier,
};

const KIND: u8 = 3;
const NAME: &str = "nixl";
/// What the C interface answers where a peer has closed.
const REMOTE_DISCONNECT: i32 = -13;

/// What NIXL is to use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NixlConfig {
    /// Its backend: `UCX`, or `LIBFABRIC` for EFA. Never chosen by itself.
    pub backend: String,
    /// Folders in which Python packages are installed, where the library is looked for.
    pub site_packages: Vec<PathBuf>,
}

impl Default for NixlConfig {
    fn default() -> Self {
        Self {
            backend: "UCX".to_owned(),
            site_packages: Vec::new(),
        }
    }
}

/// The transport over NIXL.
pub struct NixlTransport {
    identity: Identity,
    key: AccessKey,
    state: Mutex<State>,
}

struct State {
    // Before the slabs: it must be gone before they are unmapped.
    agent: Agent,
    slabs: LocalSlabs,
    /// Slabs that a released transfer may still read or write; mapped until the agent is gone.
    haunted: FxHashMap<SlabId, Arc<Slab>>,
    roster: Roster,
    transfers: Transfers,
    inbox: Inbox,
    peers: FxHashMap<PeerId, Peer>,
    running: FxHashMap<TransferId, Running>,
}

struct Peer {
    name: CString,
    known: RemoteSlabs,
}

struct Running {
    peer: PeerId,
    request: Request,
    spans: Spans,
}

impl NixlTransport {
    /// Loads the library and opens an agent, without a progress thread.
    pub fn open(config: &NixlConfig) -> Result<Self, MemoryError> {
        let (identity, key) = draw_identity()?;
        let backend =
            CString::new(config.backend.as_str()).map_err(|_| MemoryError::InvalidField {
                field: "nixl_backend",
                expected: "a name without a zero byte",
            })?;
        let nixl = find(&config.site_packages)?;
        let name = agent_name(identity)?;
        let agent = Agent::create(nixl, &name, &backend).map_err(|code| {
            unavailable(format!("backend {} did not start ({code})", config.backend))
        })?;
        Ok(Self {
            identity,
            key,
            state: Mutex::new(State {
                agent,
                slabs: LocalSlabs::default(),
                haunted: FxHashMap::default(),
                roster: Roster::default(),
                transfers: Transfers::default(),
                inbox: Inbox::default(),
                peers: FxHashMap::default(),
                running: FxHashMap::default(),
            }),
        })
    }
}

fn agent_name(identity: Identity) -> Result<CString, MemoryError> {
    CString::new(format!("{:016x}", identity.0)).map_err(|_| MemoryError::BadMetadata("identity"))
}

fn failed(action: &str, code: i32) -> MemoryError {
    MemoryError::Transport {
        transport: NAME,
        code,
        message: action.to_owned(),
    }
}

fn transfer_failed(code: i32) -> TransferError {
    if code == REMOTE_DISCONNECT {
        return TransferError::PeerGone;
    }
    TransferError::Transport {
        code,
        message: "NIXL could not make the transfer; its log says why".to_owned(),
    }
}

fn memory_of(slab: &Slab) -> Extent {
    Extent {
        address: slab.as_ptr().addr() as u64,
        len: slab.len(),
        tier: slab.tier(),
    }
}

impl State {
    /// Works on what runs, and takes in what has arrived; how many things moved.
    fn sweep(&mut self) -> usize {
        let mut ended = Vec::new();
        for (id, running) in &self.running {
            match self.agent.standing(&running.request) {
                Standing::Running => {}
                Standing::Done => ended.push((*id, Progress::Done)),
                Standing::Failed(code) => {
                    ended.push((*id, Progress::Failed(transfer_failed(code))));
                }
            }
        }
        let mut moved = ended.len();
        for (id, outcome) in ended {
            if let Some(running) = self.running.remove(&id) {
                self.agent.release(running.request);
            }
            self.transfers.end(id, outcome);
        }
        // A failure here is a failure of the whole agent; its transfers say so one by one.
        for arrived in self.agent.notifications().unwrap_or_default() {
            moved += 1;
            self.take_in(&arrived.sender, arrived.payload);
        }
        moved
    }

    fn take_in(&mut self, sender: &[u8], payload: Vec<u8>) {
        let sender = std::str::from_utf8(sender).ok();
        let sender = sender
            .and_then(|name| u64::from_str_radix(name, 16).ok())
            .map(Identity);
        // NIXL has taken it off the wire already: where nobody takes what arrives, or the sender was sent away, it is
        // dropped, and the deadline of whoever waits for it is the answer.
        if let Some(sender) = sender
            && !self.roster.is_revoked(sender)
            && self.inbox.has_room(&self.roster, sender)
        {
            self.inbox.push(&self.roster, sender, payload);
        }
    }

    /// Forgets a transfer that may go on moving bytes.
    fn abandon(&mut self, running: Running) {
        for local in running.spans.locals() {
            self.haunted.insert(local.id(), Arc::clone(local));
        }
        self.agent.release(running.request);
    }
}

impl Transport for NixlTransport {
    fn name(&self) -> &'static str {
        NAME
    }

    /// True of every fabric that NIXL is for; over plain TCP alone, NIXL makes do with the peer's progress.
    fn is_one_sided(&self) -> bool {
        true
    }

    /// All of them: whether a device's memory is reached directly is up to the backend, which says so when it registers.
    fn check_tier(&self, _tier: Tier) -> Result<(), MemoryError> {
        Ok(())
    }

    fn register(&self, slab: &Arc<Slab>) -> Result<(), MemoryError> {
        let mut state = self.state.lock();
        state.slabs.insert(slab)?;
        state.agent.register(memory_of(slab), true).map_err(|code| {
            let _ = state.slabs.remove(slab.id());
            failed("register a slab", code)
        })
    }

    fn deregister(&self, slab: SlabId) -> Result<(), MemoryError> {
        let mut guard = self.state.lock();
        let state = &mut *guard;
        let running = state.running.values();
        let mut locals = running.flat_map(|running| running.spans.locals());
        if locals.any(|local| local.id() == slab) {
            return Err(MemoryError::InUse);
        }
        let slab = state.slabs.remove(slab)?;
        let taken_back = state.agent.register(memory_of(&slab), false);
        // Deregistering revokes nothing: the memory stays mapped while a peer may write to it. Peers are not told of what
        // somebody else has made, and what a transfer of ours may still write was kept when that was given up.
        if !slab.is_foreign() {
            state.haunted.insert(slab.id(), slab);
        }
        taken_back.map_err(|code| failed("deregister a slab", code))
    }

    fn local_metadata(&self) -> Result<Vec<u8>, MemoryError> {
        let mut state = self.state.lock();
        let address = state
            .agent
            .local_metadata()
            .map_err(|code| failed("describe this agent", code))?;
        let metadata = Metadata {
            kind: KIND,
            identity: self.identity,
            key: self.key,
            address,
            slabs: state.slabs.known(|slab| memory_of(slab).address),
        };
        metadata.encode()
    }

    fn connect(&self, peer: PeerId, metadata: &[u8]) -> Result<(), MemoryError> {
        let metadata = Metadata::decode(metadata, KIND)?;
        let expected = agent_name(metadata.identity)?;
        let mut guard = self.state.lock();
        let state = &mut *guard;
        state.roster.join(peer, metadata.identity)?;
        let loaded = state.agent.load_remote(&metadata.address);
        match loaded {
            Ok(name) if name == expected => {
                let known = RemoteSlabs::new(&metadata.slabs);
                state.peers.insert(peer, Peer { name, known });
                state.inbox.name(metadata.identity, peer);
                Ok(())
            }
            Ok(name) => {
                state.agent.forget_remote(&name);
                state.roster.unjoin(peer);
                Err(MemoryError::BadMetadata("an agent of another name"))
            }
            Err(code) => {
                state.roster.unjoin(peer);
                Err(failed("load a peer's metadata", code))
            }
        }
    }

    fn disconnect(&self, peer: PeerId) -> Result<Quiet, MemoryError> {
        let mut guard = self.state.lock();
        let state = &mut *guard;
        let identity = state.roster.part(peer)?;
        let running: Vec<_> = state
            .running
            .extract_if(|_, running| running.peer == peer)
            .collect();
        for (id, running) in running {
            state.abandon(running);
            state
                .transfers
                .end(id, Progress::Failed(TransferError::PeerGone));
        }
        if let Some(peer) = state.peers.remove(&peer) {
            state.agent.forget_remote(&peer.name);
        }
        state.inbox.forget(identity, Some(peer));
        // Nobody can prove more later on, so the name is not kept for another question.
        state.roster.left(peer);
        Ok(Quiet::Unproven)
    }

    fn post(
        &self,
        direction: Direction,
        peer: PeerId,
        segments: &[Segment],
        notification: Option<&[u8]>,
    ) -> Result<TransferId, TransferError> {
        check_notification(notification)?;
        let mut guard = self.state.lock();
        let state = &mut *guard;
        let known = state.peers.get(&peer).ok_or(TransferError::PeerGone)?;
        let spans = state.slabs.resolve(segments, &known.known)?;
        if spans.is_empty() && notification.is_none() {
            return Err(refused("a transfer of nothing".to_owned()));
        }
        let pairs: Vec<_> = spans.iter().map(extents).collect();
        if !is_uniform(&pairs) {
            let message = "host memory and a device's on one side of a transfer";
            return Err(refused(message.to_owned()));
        }
        let id = state.transfers.begin()?;
        let posted = match notification {
            Some(payload) if pairs.is_empty() => {
                state.agent.notify(&known.name, payload).map(|()| None)
            }
            _ => state
                .agent
                .post(direction, &known.name, &pairs, notification)
                .map(Some),
        };
        match posted {
            Ok(None) => state.transfers.end(id, Progress::Done),
            Ok(Some((request, Standing::Running))) => {
                let running = Running {
                    peer,
                    request,
                    spans,
                };
                state.running.insert(id, running);
            }
            Ok(Some((request, standing))) => {
                state.agent.release(request);
                let outcome = match standing {
                    Standing::Failed(code) => Progress::Failed(transfer_failed(code)),
                    Standing::Done | Standing::Running => Progress::Done,
                };
                state.transfers.end(id, outcome);
            }
            Err(code) => {
                state.transfers.release(id);
                return Err(transfer_failed(code));
            }
        }
        Ok(id)
    }

    fn poll(&self, transfer: TransferId) -> Progress {
        self.state.lock().transfers.poll(transfer)
    }

    fn release(&self, transfer: TransferId) -> Quiet {
        let mut state = self.state.lock();
        state.transfers.release(transfer);
        match state.running.remove(&transfer) {
            Some(running) => {
                state.abandon(running);
                Quiet::Unproven
            }
            None => Quiet::Proven,
        }
    }

    /// Keeps at it while transfers run, because NIXL moves bytes only when it is asked.
    fn progress(&self, budget: Duration) -> usize {
        let started = Instant::now();
        let mut moved = 0;
        let mut state = self.state.lock();
        loop {
            moved += state.sweep();
            if state.running.is_empty() || started.elapsed() >= budget {
                return moved;
            }
            MutexGuard::bump(&mut state);
        }
    }

    fn take_notification(&self) -> Option<Notification> {
        self.state.lock().inbox.take()
    }
}

/// Where a span lies on both sides, by address.
fn extents((pair, span): (&Pair, &Span)) -> (Extent, Extent) {
    let ours = Extent {
        address: memory_of(&pair.local).address + span.local_offset,
        len: span.len,
        tier: pair.local.tier(),
    };
    let theirs = Extent {
        // Wraps only where the peer lied about its base, and then names memory that it never registered.
        address: pair.remote.base.wrapping_add(span.remote_offset),
        len: span.len,
        tier: pair.remote.tier,
    };
    (ours, theirs)
}

/// Whether each side of a transfer is of one kind of memory, as NIXL's lists are.
fn is_uniform(pairs: &[(Extent, Extent)]) -> bool {
    let kinds = |(ours, theirs): &(Extent, Extent)| (ours.kind(), theirs.kind());
    let mut pairs = pairs.iter().map(kinds);
    let first = pairs.next();
    pairs.all(|kinds| Some(kinds) == first)
}
