//! Seats: how many granted requests may be on at once, whatever room the workers have.
//!
//! A request has one seat however many sequences it has, and keeps it while it goes on elsewhere, so only its owner
//! knows when it is over.

use super::Scheduler;

/// The seats of a [`Scheduler`].
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Seats {
    /// `None`: no limit, and nobody counts.
    limit: Option<u32>,
    taken: u32,
}

impl Seats {
    pub(super) fn is_free(self) -> bool {
        self.limit.is_none_or(|limit| self.taken < limit)
    }

    pub(super) fn take(&mut self) {
        if self.limit.is_some() {
            self.taken += 1;
        }
    }
}

impl Scheduler {
    /// Lets at most so many requests that [`acquire`](Self::acquire) or [`take_grants`](Self::take_grants) granted be on
    /// at once; more wait. From then on each of them is to be ended with [`leave_seat`](Self::leave_seat). Without a
    /// limit there are no seats.
    pub fn limit_seats(&mut self, limit: u32) {
        self.seats.limit = Some(limit);
    }

    /// A granted request is over, besides what it reserved: the next one may have its seat.
    pub fn leave_seat(&mut self) {
        self.seats.taken = self.seats.taken.saturating_sub(1);
    }

    /// Seats that are taken; 0 where there is no limit.
    pub fn num_seats_taken(&self) -> u32 {
        self.seats.taken
    }
}
