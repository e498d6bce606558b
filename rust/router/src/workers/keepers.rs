//! Who keeps copies of whose KV: a worker that writes through has one keeper, and keeps it for as long as both live.
//!
//! A keeper is another worker of the same exchange that has host memory; one of another failure domain where there is
//! any. Of several, rendezvous hashing chooses (Thaler and Ravishankar, "Using name-based mappings to increase hit
//! rates", 1998), so that the same names find each other again, and the workers of a keeper that died spread. A worker
//! of the same domain is better than nobody, since a process dies more often than a host does; the log says so.

use orchestra_core::{hash::rendezvous_score, scheduler::WorkerId};
use orchestra_proto::v1::{self, router_message::Message};

use super::{Pool, session::Session};

/// Whom a worker was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Keeper {
    worker: WorkerId,
    is_elsewhere: bool,
}

impl Pool {
    /// A worker came: it gets a keeper, and becomes that of those who have none, or none elsewhere.
    pub(super) fn keepers_with(&self, arrived: &Session) {
        for session in self.sessions.values() {
            if let Some(rank) = session.rank_as_keeper(arrived) {
                let keeper = *session.keeper.lock();
                if keeper.is_none_or(|it| rank.0 && !it.is_elsewhere) {
                    session.tell_keeper(Some((arrived, rank.0)));
                }
            }
        }
        self.choose_keeper(arrived);
    }

    /// A worker left: those that it kept copies for get another one.
    pub(super) fn keepers_without(&self, left: WorkerId) {
        for session in self.sessions.values() {
            let keeper = *session.keeper.lock();
            if keeper.is_some_and(|keeper| keeper.worker == left) {
                self.choose_keeper(session);
            }
        }
    }

    fn choose_keeper(&self, session: &Session) {
        if session.writes_through() {
            let others = self.sessions.values();
            let ranked = others.filter_map(|other| Some((session.rank_as_keeper(other)?, other)));
            let best = ranked.max_by_key(|&(rank, _)| rank);
            session.tell_keeper(best.map(|((is_elsewhere, _), other)| (&**other, is_elsewhere)));
        }
    }
}

impl Session {
    fn writes_through(&self) -> bool {
        self.kv.as_ref().is_some_and(|kv| kv.writes_through)
    }

    /// How good a keeper the other one is for this worker; `None` where it is none.
    fn rank_as_keeper(&self, other: &Self) -> Option<(bool, u64)> {
        let (ours, theirs) = (self.kv.as_ref()?, other.kv.as_ref()?);
        let can_keep = ours.writes_through
            && self.worker != other.worker
            && other.spec.num_host_blocks > 0
            && self.exchanges_with(other);
        let is_elsewhere = ours.failure_domain != theirs.failure_domain;
        let score = rendezvous_score(&self.spec.name, &other.spec.name);
        can_keep.then_some((is_elsewhere, score))
    }

    /// Where the message cannot be queued the worker has none, and gets one with the next change.
    fn tell_keeper(&self, keeper: Option<(&Self, bool)>) {
        let worker_id = &self.spec.name;
        match keeper {
            Some((other, true)) => {
                tracing::info!(worker_id, keeper = other.spec.name, "KV is written through");
            }
            Some((other, false)) => tracing::warn!(
                worker_id,
                keeper = other.spec.name,
                "KV is written through to a worker of the same failure domain"
            ),
            None => tracing::warn!(worker_id, "no worker can keep copies of its KV"),
        }
        let peer = keeper.and_then(|(other, _)| Some(other.kv.as_ref()?.peer().clone()));
        let is_told = self.outbox.push(Message::Keeper(v1::KvKeeper { peer }));
        *self.keeper.lock() = keeper
            .filter(|_| is_told)
            .map(|(other, is_elsewhere)| Keeper {
                worker: other.worker,
                is_elsewhere,
            });
    }
}
