//! A transport of the test's own, as hostile as the trait allows: bytes move when the test says so, also long after
//! a transfer was released or its deadline passed, and in any order. All of it is drawn from a seed.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use orchestra_memory::{
    Direction, MemoryError, Notification, PeerId, Progress, Quiet, Segment, Slab, SlabId,
    TransferError, TransferId, Transport,
};
use parking_lot::Mutex;

/// Bytes that move at once: a third of a block or so.
const PIECE: u64 = 1500;

/// A small generator (xorshift64).
#[derive(Debug)]
pub(crate) struct Draw(pub(crate) u64);

impl Draw {
    pub(crate) fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % n as u64) as usize
    }
}

struct Wire {
    node: usize,
    peer: PeerId,
    direction: Direction,
    /// What has not moved yet, with the bytes that a put had to read when it was posted.
    pieces: Vec<(Segment, Vec<u8>)>,
    notification: Option<Vec<u8>>,
    failure: Option<TransferError>,
}

#[derive(Default)]
struct Node {
    slabs: BTreeMap<SlabId, Arc<Slab>>,
    /// Who its peers are, by the names that it gave them.
    peers: BTreeMap<PeerId, usize>,
    notifications: VecDeque<Notification>,
    /// What the next disconnect can promise.
    can_prove: bool,
}

#[derive(Default)]
struct State {
    nodes: [Node; 2],
    wires: BTreeMap<u64, Wire>,
    next: u64,
}

/// What both ends share.
#[derive(Clone, Default)]
pub(crate) struct Fabric(Arc<Mutex<State>>);

/// One end.
pub(crate) struct End {
    fabric: Fabric,
    node: usize,
}

impl State {
    fn other(&self, node: usize, peer: PeerId) -> Option<usize> {
        self.nodes[node].peers.get(&peer).copied()
    }

    /// Moves one piece of a transfer.
    fn move_piece(&mut self, id: u64, draw: &mut Draw) {
        let Some(wire) = self.wires.get_mut(&id) else {
            return;
        };
        if wire.pieces.is_empty() || wire.failure.is_some() {
            return;
        }
        let at = draw.below(wire.pieces.len());
        let (piece, posted) = wire.pieces.swap_remove(at);
        let far = 1 - wire.node;
        let local = Arc::clone(&self.nodes[wire.node].slabs[&piece.local_slab]);
        let remote = Arc::clone(&self.nodes[far].slabs[&piece.remote_slab]);
        match wire.direction {
            Direction::Put => {
                let mut bytes = vec![0; piece.len as usize];
                local.read(piece.local_offset, &mut bytes).unwrap();
                assert!(
                    bytes == posted,
                    "a put read bytes of its blocks' next owner"
                );
                remote.write(piece.remote_offset, &bytes).unwrap();
            }
            Direction::Get => {
                remote
                    .copy_to(piece.remote_offset, &local, piece.local_offset, piece.len)
                    .unwrap();
            }
        }
        if wire.pieces.is_empty()
            && let Some(payload) = wire.notification.take()
        {
            let node = wire.node;
            let far = &mut self.nodes[far];
            let named = far.peers.iter().find(|(_, peer)| **peer == node);
            if let Some((&peer, _)) = named {
                far.notifications.push_back(Notification { peer, payload });
            }
        }
    }
}

impl Fabric {
    pub(crate) fn end(&self, node: usize) -> End {
        let fabric = self.clone();
        End { fabric, node }
    }

    /// Moves up to `n` pieces of transfers that the draw picks, whatever their senders think of them by now.
    pub(crate) fn step(&self, n: usize, draw: &mut Draw) {
        let mut state = self.0.lock();
        for _ in 0..n {
            let ids: Vec<u64> = state.wires.keys().copied().collect();
            if !ids.is_empty() {
                state.move_piece(ids[draw.below(ids.len())], draw);
            }
        }
    }

    /// Fails one transfer for good: no more of it moves.
    pub(crate) fn fail_one(&self, draw: &mut Draw) {
        let mut state = self.0.lock();
        let ids: Vec<u64> = state.wires.keys().copied().collect();
        if !ids.is_empty()
            && let Some(wire) = state.wires.get_mut(&ids[draw.below(ids.len())])
        {
            wire.failure = Some(TransferError::PeerGone);
        }
    }

    /// What the next disconnect of this end will be able to promise.
    pub(crate) fn can_prove(&self, node: usize, can_prove: bool) {
        self.0.lock().nodes[node].can_prove = can_prove;
    }

    /// Cuts the cable: nothing that was posted moves any more.
    pub(crate) fn cut(&self) {
        for wire in self.0.lock().wires.values_mut() {
            wire.failure = Some(TransferError::PeerGone);
        }
    }
}

impl Transport for End {
    fn name(&self) -> &'static str {
        "fabric"
    }

    fn is_one_sided(&self) -> bool {
        true
    }

    fn register(&self, slab: &Arc<Slab>) -> Result<(), MemoryError> {
        let mut state = self.fabric.0.lock();
        state.nodes[self.node]
            .slabs
            .insert(slab.id(), Arc::clone(slab));
        Ok(())
    }

    fn deregister(&self, slab: SlabId) -> Result<(), MemoryError> {
        self.fabric.0.lock().nodes[self.node].slabs.remove(&slab);
        Ok(())
    }

    fn local_metadata(&self) -> Result<Vec<u8>, MemoryError> {
        Ok(vec![self.node as u8])
    }

    fn connect(&self, peer: PeerId, metadata: &[u8]) -> Result<(), MemoryError> {
        let mut state = self.fabric.0.lock();
        state.nodes[self.node]
            .peers
            .insert(peer, usize::from(metadata[0]));
        Ok(())
    }

    fn disconnect(&self, peer: PeerId) -> Result<Quiet, MemoryError> {
        let mut state = self.fabric.0.lock();
        state.nodes[self.node].peers.remove(&peer);
        if !state.nodes[self.node].can_prove {
            return Ok(Quiet::Unproven);
        }
        for wire in state.wires.values_mut() {
            wire.failure = Some(TransferError::PeerGone);
        }
        Ok(Quiet::Proven)
    }

    fn post(
        &self,
        direction: Direction,
        peer: PeerId,
        segments: &[Segment],
        notification: Option<&[u8]>,
    ) -> Result<TransferId, TransferError> {
        let mut state = self.fabric.0.lock();
        state
            .other(self.node, peer)
            .ok_or(TransferError::PeerGone)?;
        let mut pieces = Vec::new();
        for segment in segments {
            let slab = &state.nodes[self.node].slabs[&segment.local_slab];
            for at in (0..segment.len).step_by(PIECE as usize) {
                let piece = Segment {
                    local_offset: segment.local_offset + at,
                    remote_offset: segment.remote_offset + at,
                    len: PIECE.min(segment.len - at),
                    ..*segment
                };
                let mut bytes = vec![0; piece.len as usize];
                slab.read(piece.local_offset, &mut bytes).unwrap();
                pieces.push((piece, bytes));
            }
        }
        let id = state.next;
        state.next += 1;
        let wire = Wire {
            node: self.node,
            peer,
            direction,
            pieces,
            notification: notification.map(<[u8]>::to_vec),
            failure: None,
        };
        state.wires.insert(id, wire);
        Ok(TransferId(id))
    }

    fn poll(&self, transfer: TransferId) -> Progress {
        let state = self.fabric.0.lock();
        let Some(wire) = state.wires.get(&transfer.0) else {
            return Progress::Failed(TransferError::PeerGone);
        };
        match &wire.failure {
            Some(failure) => Progress::Failed(failure.clone()),
            None if wire.pieces.is_empty() => Progress::Done,
            None => Progress::Pending,
        }
    }

    fn release(&self, transfer: TransferId) -> Quiet {
        let mut state = self.fabric.0.lock();
        let Some(wire) = state.wires.get(&transfer.0) else {
            return Quiet::Proven;
        };
        debug_assert!(
            state
                .other(self.node, wire.peer)
                .is_none_or(|other| other != self.node)
        );
        if wire.failure.is_some() || wire.pieces.is_empty() {
            state.wires.remove(&transfer.0);
            return Quiet::Proven;
        }
        Quiet::Unproven
    }

    fn progress(&self, _budget: Duration) -> usize {
        0
    }

    fn take_notification(&self) -> Option<Notification> {
        self.fabric.0.lock().nodes[self.node]
            .notifications
            .pop_front()
    }
}
