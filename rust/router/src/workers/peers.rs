//! Messages between workers: opaque here, handed on while both are attached and can exchange KV.
//!
//! A worker that does not read holds nobody up: what waits for it is bounded, and beyond that its peers are told that they
//! cannot reach it.

use orchestra_core::scheduler::NAME_BYTES_MAX;
use orchestra_proto::v1;

use super::{Workers, session::Session, sink::Violation};

/// Largest payload of one message.
const PAYLOAD_BYTES_MAX: usize = 1 << 20;

impl Workers {
    /// Hands a worker's message on, or tells it that this cannot be done.
    pub(super) fn hand_on(
        &self,
        from: &Session,
        message: v1::PeerMessage,
    ) -> Result<(), Violation> {
        if message.payload.len() > PAYLOAD_BYTES_MAX || message.worker_id.len() > NAME_BYTES_MAX {
            return Err(Violation::PeerMessage);
        }
        let target = self.pool.lock().session_of(&message.worker_id);
        let target = target.filter(|target| from.exchanges_with(target));
        let was_handed_on = target.is_some_and(|target| {
            target.push_peer(v1::PeerMessage {
                worker_id: from.spec.name.clone(),
                payload: message.payload,
                is_undeliverable: false,
            })
        });
        if !was_handed_on {
            self.kv_moves.undeliverable();
            from.cannot_reach(&message.worker_id);
        }
        Ok(())
    }
}

impl Session {
    /// Whether KV may go from one to the other.
    pub(super) fn exchanges_with(&self, other: &Self) -> bool {
        let exchange = |session: &Self| Some(session.kv.as_ref()?.exchange().clone());
        self.spec.model == other.spec.model
            && self.kv.is_some()
            && exchange(self) == exchange(other)
    }

    /// Tells the worker that what it expects of that peer will not come. Where too much waits for it already, it finds out
    /// by its own clock.
    pub(super) fn cannot_reach(&self, peer: &str) {
        let _ = self.push_peer(v1::PeerMessage {
            worker_id: peer.to_owned(),
            payload: Vec::new(),
            is_undeliverable: true,
        });
    }
}
