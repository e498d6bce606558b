//! What tenants are charged for, and what they get back.
//!
//! A grant charges its tenant at once, `input_token_weight` for each prompt token that the chosen worker has to compute
//! and `output_token_weight` for each of `max_tokens`; what is cached is free. [`Scheduler::finish`] gives back the
//! output tokens that did not come. [`Scheduler::release`] alone gives nothing back: who reserves much and does not
//! say what became of it has used it. A reservation that is lost with its worker is given back whole, since the request
//! will have to come again.

use std::sync::Arc;

use super::{
    Scheduler,
    admission::AdmissionClass,
    error::SchedulerError,
    reservation::{Reservation, ReservationId},
    route::RouteRequest,
    wait_queues::QueueKey,
    worker::NAME_BYTES_MAX,
};

/// The weight of a tenant that was given none.
const TENANT_WEIGHT: u32 = 100;
/// The largest weight of a tenant.
const TENANT_WEIGHT_MAX: u32 = 10_000;
/// Charges are in parts of a weighted token: divided by any weight, enough of them are left to be exact to a percent.
const TOKEN_PARTS: u64 = 1_000_000;

/// What was charged for a reservation.
#[derive(Clone, Debug)]
pub(super) struct Charge {
    queue: QueueKey,
    tenant: Arc<str>,
    class: AdmissionClass,
    total: u64,
    per_output_token: u64,
    max_tokens: u32,
}

impl Scheduler {
    /// Gives a tenant another share than the weight 100 that every tenant has; 1 to 10,000. It counts for what is
    /// granted from now on, in all queues.
    ///
    /// At most [`max_num_tenants`](super::SchedulerConfig::max_num_tenants) have a weight other than 100.
    pub fn set_tenant_weight(&mut self, tenant: &str, weight: u32) -> Result<(), SchedulerError> {
        let refuse = |field, expected| Err(SchedulerError::InvalidField { field, expected });
        if tenant.len() > NAME_BYTES_MAX {
            return refuse("tenant", "at most 128 bytes long");
        }
        if !(1..=TENANT_WEIGHT_MAX).contains(&weight) {
            return refuse("weight", "1 to 10,000");
        }
        if weight == TENANT_WEIGHT {
            self.tenant_weights.remove(tenant);
            return Ok(());
        }
        let limit = self.config.max_num_tenants;
        let current = self.tenant_weights.len() as u32;
        if current >= limit && !self.tenant_weights.contains_key(tenant) {
            return Err(SchedulerError::LimitReached {
                kind: "tenants with a weight",
                current,
                limit,
            });
        }
        self.tenant_weights.insert(tenant.to_owned(), weight);
        Ok(())
    }

    /// Gives a reservation back after its request brought so many output tokens, which settles what its tenant is
    /// charged. `false` where it is gone already. More than `max_tokens` count as these.
    pub fn finish(&mut self, id: ReservationId, num_output_tokens: u32) -> bool {
        if let Some(charge) = self.charges.remove(&id) {
            let unused = charge.max_tokens.saturating_sub(num_output_tokens);
            self.refund(
                &charge,
                charge.per_output_token.saturating_mul(unused.into()),
            );
        }
        self.release(id)
    }

    /// Computes what a grant is charged and remembers it until the reservation ends.
    pub(super) fn record_charge(
        &mut self,
        request: &RouteRequest<'_>,
        tenant: &Arc<str>,
        queue: &QueueKey,
        reservation: &Reservation,
    ) -> u64 {
        let weight = self.tenant_weights.get(request.tenant);
        let parts = TOKEN_PARTS / u64::from(weight.copied().unwrap_or(TENANT_WEIGHT));
        let per_token = |weight: u32| parts * u64::from(weight);
        let per_output_token = per_token(self.config.output_token_weight);
        let num_cached = u64::from(reservation.num_cached_tokens);
        let prefill = request.token_ids.len() as u64 - num_cached;
        let total = per_token(self.config.input_token_weight)
            .saturating_mul(prefill)
            .saturating_add(per_output_token.saturating_mul(request.max_tokens.into()));
        let charge = Charge {
            queue: queue.clone(),
            tenant: Arc::clone(tenant),
            class: request.class,
            total,
            per_output_token,
            max_tokens: request.max_tokens,
        };
        self.charges.insert(reservation.id, charge);
        total
    }

    /// The class of who holds it, where it was charged.
    pub(super) fn class_of(&self, id: ReservationId) -> Option<AdmissionClass> {
        self.charges.get(&id).map(|charge| charge.class)
    }

    /// Gives back all that was charged for reservations that are lost.
    pub(super) fn refund_lost(&mut self, lost: &[ReservationId]) {
        for id in lost {
            if let Some(charge) = self.charges.remove(id) {
                self.refund(&charge, charge.total);
            }
        }
    }

    fn refund(&mut self, charge: &Charge, amount: u64) {
        if let Some(queue) = self.waiting.queues.get_mut(&charge.queue) {
            queue.requests.refund(&charge.tenant, charge.class, amount);
        }
    }
}
