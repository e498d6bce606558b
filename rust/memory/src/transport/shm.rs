//! Shared memory: the transport between processes of one host.
//!
//! Slabs are memory files. A process that connects is handed their descriptors over a Unix socket and maps them;
//! from then on it copies with its own processor, and the peer's stays idle. The socket carries notifications and,
//! by its end, the news that a peer has died.
//!
//! Reading order: [`message`] is what is said on the socket, [`caller`] and [`callee`] are its two ends, and
//! [`map`] has the only `unsafe` code.
//!
//! **What can be proven.** A mapping cannot be taken back. But a peer unmaps before it closes its socket, and the
//! kernel takes a dead process's memory away before it closes its files, so the end of a peer's socket proves that
//! it writes here no more. Until then [`disconnect`](Transport::disconnect) answers [`Quiet::Unproven`]; it may be
//! asked again.

mod callee;
mod caller;
mod map;
mod message;

use std::{
    os::fd::{BorrowedFd, OwnedFd},
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::{Mutex, MutexGuard};
use rustc_hash::FxHashMap;
use rustix::{
    event::epoll::EventFlags,
    net::{
        AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, listen,
        socket_with,
    },
};

use self::{
    callee::{Callee, Job, Step},
    caller::{Caller, Heard, House},
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

const KIND: u8 = 1;
const LISTENER: Token = Token(0);
/// Connections that wait to be accepted; a caller beyond them is refused and may try again.
const BACKLOG: i32 = 1024;

/// The transport between processes of one host and one user.
pub struct ShmTransport {
    identity: Identity,
    key: AccessKey,
    address: Vec<u8>,
    listener: OwnedFd,
    watch: Watch,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    slabs: LocalSlabs,
    roster: Roster,
    transfers: Transfers,
    inbox: Inbox,
    callees: FxHashMap<PeerId, Callee>,
    callee_tokens: FxHashMap<Token, PeerId>,
    callers: FxHashMap<Token, Caller>,
    /// Callers that have not said who they are.
    strangers: usize,
    tokens: u64,
    /// Where the last slice was copied: peers take turns.
    turn: usize,
}

impl ShmTransport {
    /// Opens a socket that peers of the same host can call, in the abstract namespace: it leaves no file behind.
    pub fn open() -> Result<Self, MemoryError> {
        let (identity, key) = draw_identity()?;
        let fail = |errno| MemoryError::os("open a socket for peers of this host", errno);
        let address = format!("orchestra-memory-{:016x}", identity.0).into_bytes();
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let listener =
            socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).map_err(fail)?;
        let name = SocketAddrUnix::new_abstract_name(&address).map_err(fail)?;
        bind(&listener, &name).map_err(fail)?;
        listen(&listener, BACKLOG).map_err(fail)?;
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

    /// Does what sockets ask for; how many notifications arrived.
    fn serve(&self, state: &mut State) -> usize {
        let mut moved = 0;
        for (token, flags) in self.watch.ready() {
            if token == LISTENER {
                self.accept(state);
            } else if let Some(peer) = state.callee_tokens.get(&token).copied() {
                let is_here = state
                    .callees
                    .get_mut(&peer)
                    .is_none_or(|callee| callee.listen(&self.watch, flags));
                if !is_here {
                    state.lose(&self.watch, peer);
                }
            } else {
                moved += self.hear(state, token, flags);
            }
        }
        if state.strangers > 0 {
            let now = Instant::now();
            let overdue = state
                .callers
                .iter()
                .filter(|(_, caller)| caller.is_overdue(now));
            for token in overdue.map(|(token, _)| *token).collect::<Vec<_>>() {
                state.drop_caller(&self.watch, token);
            }
        }
        moved
    }

    fn accept(&self, state: &mut State) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        while let Ok(socket) = accept_with(&self.listener, flags) {
            let token = state.next_token();
            if state.callers.len() < PEERS_MAX
                && let Some(caller) = Caller::accept(socket, &self.watch, token)
            {
                state.strangers += 1;
                state.callers.insert(token, caller);
            }
        }
    }

    /// Listens to one caller; how many notifications it sent.
    fn hear(&self, state: &mut State, token: Token, flags: EventFlags) -> usize {
        let Some(caller) = state.callers.get_mut(&token) else {
            return 0;
        };
        let was_stranger = caller.identity().is_none();
        let mut house = House {
            slabs: &state.slabs,
            roster: &state.roster,
            inbox: &mut state.inbox,
            key: self.key,
        };
        let heard = caller.listen(&self.watch, flags, &mut house);
        if was_stranger && caller.identity().is_some() {
            state.strangers -= 1;
        }
        match heard {
            Heard::Notifications(count) => return count,
            // It may hold our descriptors: only its own end of the socket proves that it is done with them.
            Heard::Broken if caller.identity().is_some() => caller.dismiss(&self.watch),
            Heard::Broken | Heard::Gone => state.drop_caller(&self.watch, token),
        }
        0
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

    fn drop_caller(&mut self, watch: &Watch, token: Token) {
        if let Some(caller) = self.callers.remove(&token) {
            match caller.identity() {
                Some(identity) if self.roster.peer_of(identity).is_none() => {
                    self.inbox.forget(identity, None);
                }
                Some(_) => {}
                None => self.strangers -= 1,
            }
            caller.leave(watch);
        }
    }

    /// Copies one slice for one peer; whether there was anything to do.
    fn step(&mut self, watch: &Watch) -> bool {
        let busy: Vec<PeerId> = self
            .callees
            .iter()
            .filter(|(_, callee)| !callee.jobs.is_empty())
            .map(|(peer, _)| *peer)
            .collect();
        for at in 0..busy.len() {
            let peer = busy[(self.turn + at) % busy.len()];
            let step = self.callees.get_mut(&peer).map(|callee| callee.step(watch));
            match step {
                None | Some(Step::Idle) => continue,
                Some(Step::Moved) => {}
                Some(Step::Ended(id, outcome)) => self.transfers.end(id, outcome),
            }
            self.turn = self.turn.wrapping_add(at + 1);
            return true;
        }
        false
    }
}

impl Transport for ShmTransport {
    fn name(&self) -> &'static str {
        "shm"
    }

    fn is_one_sided(&self) -> bool {
        true
    }

    fn slab_bytes_max(&self) -> u64 {
        SLAB_BYTES_UNREGISTERED_MAX
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.watch.as_fd())
    }

    fn check_tier(&self, tier: Tier) -> Result<(), MemoryError> {
        let reason = "peers map memory files, and it is none";
        host_memory_only(self.name(), tier, reason)
    }

    fn register(&self, slab: &Arc<Slab>) -> Result<(), MemoryError> {
        self.check_tier(slab.tier())?;
        self.state.lock().slabs.insert(slab)
    }

    fn deregister(&self, slab: SlabId) -> Result<(), MemoryError> {
        let mut state = self.state.lock();
        let mut jobs = state.callees.values().flat_map(|callee| &callee.jobs);
        if jobs.any(|job| job.spans.locals().any(|local| local.id() == slab)) {
            return Err(MemoryError::InUse);
        }
        state.slabs.remove(slab).map(drop)
    }

    fn local_metadata(&self) -> Result<Vec<u8>, MemoryError> {
        let metadata = Metadata {
            kind: KIND,
            identity: self.identity,
            key: self.key,
            address: self.address.clone(),
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
        match Callee::call(&metadata, (self.identity, self.key), &self.watch, token) {
            Ok(callee) => {
                state.callee_tokens.insert(token, peer);
                state.callees.insert(peer, callee);
                state.inbox.name(metadata.identity, peer);
                let waited: Vec<Token> = state
                    .callers
                    .iter()
                    .filter(|(_, caller)| caller.is_barred_as(metadata.identity))
                    .map(|(token, _)| *token)
                    .collect();
                for token in waited {
                    self.hear(state, token, EventFlags::IN);
                }
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
        let identity = state.roster.part(peer)?;
        state.lose(&self.watch, peer);
        if state.callees.remove(&peer).is_some() {
            state.inbox.forget(identity, Some(peer));
            for caller in state.callers.values_mut() {
                if caller.identity() == Some(identity) {
                    caller.dismiss(&self.watch);
                }
            }
        }
        let is_leaving =
            |caller: &Caller| caller.identity() == Some(identity) && caller.is_dismissed();
        let leaving: Vec<Token> = state
            .callers
            .iter()
            .filter(|(_, caller)| is_leaving(caller))
            .map(|(token, _)| *token)
            .collect();
        for token in leaving {
            self.hear(state, token, EventFlags::IN);
        }
        if state.callers.values().any(is_leaving) {
            return Ok(Quiet::Unproven);
        }
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
        let callee = state
            .callees
            .get_mut(&peer)
            .filter(|callee| !callee.is_gone());
        let callee = callee.ok_or(TransferError::PeerGone)?;
        let spans = state.slabs.resolve(segments, &callee.known)?;
        let id = state.transfers.begin()?;
        callee.jobs.push_back(Job::new(
            id,
            direction,
            spans,
            notification.map(<[u8]>::to_vec),
        ));
        Ok(id)
    }

    fn poll(&self, transfer: TransferId) -> Progress {
        self.state.lock().transfers.poll(transfer)
    }

    /// Stops the transfer where it is: no byte of it moves afterwards, so it is always proven quiet.
    fn release(&self, transfer: TransferId) -> Quiet {
        let mut guard = self.state.lock();
        let state = &mut *guard;
        if state.transfers.release(transfer) == Some(Progress::Pending) {
            for callee in state.callees.values_mut() {
                callee.jobs.retain(|job| job.id != transfer);
            }
        }
        Quiet::Proven
    }

    fn progress(&self, budget: Duration) -> usize {
        let started = Instant::now();
        let mut moved = 0;
        let mut state = self.state.lock();
        loop {
            moved += self.serve(&mut state);
            let stepped = state.step(&self.watch);
            moved += usize::from(stepped);
            if !stepped || started.elapsed() >= budget {
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
            for caller in state.callers.values_mut() {
                caller.resume(&self.watch);
            }
        }
        taken
    }
}
