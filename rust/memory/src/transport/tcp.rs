//! Plain TCP: the floor, where there is neither a shared host nor NIXL. Not one-sided: the peer's own progress applies
//! what is put and sends what is got.
//!
//! Nothing is encrypted and only the access key of the metadata is checked: for networks of one owner.
//!
//! Reading order: [`frame`] is what goes over a connection, [`callee`] and [`caller`] are its two ends, and [`raw`] has
//! the only `unsafe` code.
//!
//! **What can be proven.** What a peer does to memory here passes through this process, so closing its connection ends
//! it at once. What this process has put is over when the peer has answered, or has closed its end: until then
//! [`disconnect`](Transport::disconnect) answers [`Quiet::Unproven`]; it may be asked again.

mod callee;
mod caller;
mod frame;
mod raw;

use std::{
    net::{Ipv4Addr, SocketAddr, TcpListener},
    os::fd::BorrowedFd,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::{Mutex, MutexGuard};
use rustc_hash::FxHashMap;
use rustix::{
    event::epoll::EventFlags,
    net::{SocketFlags, accept_with},
};

use self::{
    callee::Callee,
    caller::{Caller, House},
};
use super::{
    Direction, Notification, PeerId, Progress, Quiet, Segment, SlabId, TransferId, Transport,
    host_memory_only,
    ledger::{Inbox, LocalSlabs, PEERS_MAX, Roster, Transfers, check_notification},
    metadata::{AccessKey, Identity, Metadata, draw_identity},
    watch::{Token, Watch},
};
use crate::{
    error::{MemoryError, TransferError},
    slab::{SLAB_BYTES_UNREGISTERED_MAX, Slab},
    tier::Tier,
};

const KIND: u8 = 2;
const LISTENER: Token = Token(0);

/// Where peers connect to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TcpConfig {
    /// What to listen on; port 0 takes a free one.
    pub listen: SocketAddr,
    /// What peers are told instead, where they cannot reach `listen`.
    pub advertise: Option<SocketAddr>,
}

impl Default for TcpConfig {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            advertise: None,
        }
    }
}

/// The transport over plain TCP.
pub struct TcpTransport {
    identity: Identity,
    key: AccessKey,
    address: SocketAddr,
    listener: TcpListener,
    watch: Watch,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    slabs: LocalSlabs,
    roster: Roster,
    transfers: Transfers,
    inbox: Inbox,
    /// A peer that is leaving stays until what it was sent is known to be over.
    callees: FxHashMap<PeerId, Callee>,
    callee_tokens: FxHashMap<Token, PeerId>,
    callers: FxHashMap<Token, Caller>,
    tokens: u64,
}

impl TcpTransport {
    /// Listens.
    pub fn open(config: &TcpConfig) -> Result<Self, MemoryError> {
        let (identity, key) = draw_identity()?;
        let fail = |error: std::io::Error| MemoryError::Os {
            action: "listen for peers",
            code: error.raw_os_error().unwrap_or(0),
        };
        let listener = TcpListener::bind(config.listen).map_err(fail)?;
        listener.set_nonblocking(true).map_err(fail)?;
        let address = match config.advertise {
            Some(address) => address,
            None => listener.local_addr().map_err(fail)?,
        };
        if address.ip().is_unspecified() || address.port() == 0 {
            return Err(MemoryError::InvalidField {
                field: "advertise",
                expected: "the address and port at which peers reach this host",
            });
        }
        let watch = Watch::new()?;
        watch.add(&listener, LISTENER, EventFlags::IN)?;
        Ok(Self {
            identity,
            key,
            address,
            listener,
            watch,
            state: Mutex::default(),
        })
    }

    /// Gives every socket that is ready its turn; how much moved.
    fn serve(&self, state: &mut State) -> usize {
        let mut moved = 0;
        for (token, flags) in self.watch.ready() {
            if token == LISTENER {
                self.accept(state);
            } else if let Some(peer) = state.callee_tokens.get(&token).copied() {
                moved += self.serve_callee(state, peer);
            } else {
                moved += self.serve_caller(state, token, flags);
            }
        }
        moved
    }

    fn serve_callee(&self, state: &mut State, peer: PeerId) -> usize {
        let Some(callee) = state.callees.get_mut(&peer) else {
            return 0;
        };
        let mut ended = Vec::new();
        let moved = callee.pump(&self.watch, &mut ended);
        for (id, outcome) in ended {
            state.transfers.end(id, outcome);
        }
        if moved.is_none() {
            state.lose(&self.watch, peer);
        }
        moved.unwrap_or(0)
    }

    fn serve_caller(&self, state: &mut State, token: Token, flags: EventFlags) -> usize {
        let Some(caller) = state.callers.get_mut(&token) else {
            return 0;
        };
        let mut house = House {
            slabs: &state.slabs,
            roster: &state.roster,
            inbox: &mut state.inbox,
            key: self.key,
        };
        let moved = caller.pump(&self.watch, flags, &mut house);
        if moved.is_none()
            && let Some(caller) = state.callers.remove(&token)
        {
            caller.leave(&self.watch);
        }
        moved.unwrap_or(0)
    }

    fn accept(&self, state: &mut State) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        while let Ok(socket) = accept_with(&self.listener, flags) {
            let token = state.next_token();
            if state.callers.len() < PEERS_MAX
                && let Some(caller) = Caller::accept(socket, &self.watch, token)
            {
                state.callers.insert(token, caller);
            }
        }
    }

    /// Lets go of those who take too long to connect or to say who they are.
    fn expire(&self, state: &mut State) {
        let now = Instant::now();
        for (_, caller) in state.callers.extract_if(|_, caller| caller.is_overdue(now)) {
            caller.leave(&self.watch);
        }
        let overdue = state
            .callees
            .iter()
            .filter(|(_, callee)| callee.is_overdue(now));
        for peer in overdue.map(|(peer, _)| *peer).collect::<Vec<_>>() {
            state.lose(&self.watch, peer);
        }
    }

    /// Callers that waited for something that has just been done here.
    fn resume(&self, state: &mut State) {
        let held_back = state
            .callers
            .iter()
            .filter(|(_, caller)| caller.is_held_back());
        for token in held_back.map(|(token, _)| *token).collect::<Vec<_>>() {
            self.serve_caller(state, token, EventFlags::IN);
        }
    }
}

impl State {
    fn next_token(&mut self) -> Token {
        self.tokens += 1;
        Token(self.tokens)
    }

    /// A peer has died or hung up.
    fn lose(&mut self, watch: &Watch, peer: PeerId) {
        if let Some(callee) = self.callees.get_mut(&peer) {
            self.callee_tokens.remove(&callee.token());
            for id in callee.hang_up(watch) {
                self.transfers
                    .end(id, Progress::Failed(TransferError::PeerGone));
            }
        }
    }
}

impl Transport for TcpTransport {
    fn name(&self) -> &'static str {
        "tcp"
    }

    fn is_one_sided(&self) -> bool {
        false
    }

    fn slab_bytes_max(&self) -> u64 {
        SLAB_BYTES_UNREGISTERED_MAX
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.watch.as_fd())
    }

    fn check_tier(&self, tier: Tier) -> Result<(), MemoryError> {
        let reason = "it would have to be staged through host memory, which sockets send from";
        host_memory_only(self.name(), tier, reason)
    }

    fn register(&self, slab: &Arc<Slab>) -> Result<(), MemoryError> {
        self.check_tier(slab.tier())?;
        self.state.lock().slabs.insert(slab)
    }

    fn deregister(&self, slab: SlabId) -> Result<(), MemoryError> {
        let mut state = self.state.lock();
        let is_used = state.callees.values().any(|callee| callee.touches(slab))
            || state.callers.values().any(|caller| caller.touches(slab));
        if is_used {
            return Err(MemoryError::InUse);
        }
        state.slabs.remove(slab).map(drop)
    }

    fn local_metadata(&self) -> Result<Vec<u8>, MemoryError> {
        let metadata = Metadata {
            kind: KIND,
            identity: self.identity,
            key: self.key,
            address: self.address.to_string().into_bytes(),
            slabs: self.state.lock().slabs.known(|_| 0),
        };
        metadata.encode()
    }

    fn connect(&self, peer: PeerId, metadata: &[u8]) -> Result<(), MemoryError> {
        let metadata = Metadata::decode(metadata, KIND)?;
        let mut guard = self.state.lock();
        let state = &mut *guard;
        state.roster.join(peer, metadata.identity)?;
        let token = state.next_token();
        match Callee::call(&metadata, self.identity, &self.watch, token) {
            Ok(callee) => {
                state.callee_tokens.insert(token, peer);
                state.callees.insert(peer, callee);
                state.inbox.name(metadata.identity, peer);
                self.resume(state);
                Ok(())
            }
            Err(error) => {
                state.roster.unjoin(peer);
                Err(error)
            }
        }
    }

    fn disconnect(&self, peer: PeerId) -> Result<Quiet, MemoryError> {
        let mut guard = self.state.lock();
        let state = &mut *guard;
        let was_leaving = state.roster.is_leaving(peer);
        let identity = state.roster.part(peer)?;
        if !was_leaving {
            state.inbox.forget(identity, Some(peer));
            for (_, caller) in state
                .callers
                .extract_if(|_, caller| caller.identity() == Some(identity))
            {
                caller.leave(&self.watch);
            }
            let left = state.callees.get_mut(&peer).map(Callee::leave);
            for id in left.unwrap_or_default() {
                state
                    .transfers
                    .end(id, Progress::Failed(TransferError::PeerGone));
            }
        }
        self.serve_callee(state, peer);
        if state
            .callees
            .get(&peer)
            .is_some_and(|callee| !callee.is_quiet())
        {
            return Ok(Quiet::Unproven);
        }
        state.lose(&self.watch, peer);
        state.callees.remove(&peer);
        state.roster.left(peer);
        Ok(Quiet::Proven)
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
        let is_leaving = state.roster.is_leaving(peer);
        let callee = state
            .callees
            .get_mut(&peer)
            .filter(|callee| !callee.is_gone() && !is_leaving);
        let callee = callee.ok_or(TransferError::PeerGone)?;
        let spans = state.slabs.resolve(segments, &callee.known)?;
        let id = state.transfers.begin()?;
        // With no bytes to fetch, what is left of a get is its notification.
        let direction = if spans.is_empty() {
            Direction::Put
        } else {
            direction
        };
        callee.post(&self.watch, id, direction, &spans, notification);
        Ok(id)
    }

    fn poll(&self, transfer: TransferId) -> Progress {
        self.state.lock().transfers.poll(transfer)
    }

    /// A get is quiet from here on: what still comes is thrown away. A put that has begun is not, until the peer has
    /// answered.
    fn release(&self, transfer: TransferId) -> Quiet {
        let mut guard = self.state.lock();
        let state = &mut *guard;
        let was_pending = state.transfers.release(transfer) == Some(Progress::Pending);
        let is_quiet = !was_pending
            || state
                .callees
                .values_mut()
                .all(|callee| callee.release(transfer));
        if is_quiet {
            Quiet::Proven
        } else {
            Quiet::Unproven
        }
    }

    fn progress(&self, budget: Duration) -> usize {
        let started = Instant::now();
        let mut moved = 0;
        let mut state = self.state.lock();
        self.expire(&mut state);
        loop {
            let now = self.serve(&mut state);
            moved += now;
            if now == 0 || started.elapsed() >= budget {
                return moved;
            }
            MutexGuard::bump(&mut state);
        }
    }

    fn take_notification(&self) -> Option<Notification> {
        let mut guard = self.state.lock();
        let state = &mut *guard;
        let taken = state.inbox.take();
        if taken.is_some() {
            self.resume(state);
        }
        taken
    }
}
