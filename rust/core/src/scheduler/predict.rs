//! Predicted time to the first token.
//!
//! ```text
//! ttft = wait + (queued(w) + miss(w) + adapter load) / speed(w)        w: the best worker as things are, or who computes
//!                                                                     the prompt for it; less what a fetch saves
//! wait = 0 where nobody waits and w has room and a seat is free, else position / grants per second
//! ```
//!
//! `speed` is learned from [`Scheduler::prefill_done`]: a prompt's tokens that had to be computed, over the time since
//! its reservation or since the worker's last prompt, whichever was later. So it is the speed that requests see, with
//! the decoding beside them, and needs nothing from the worker. Grants per second are learned from the queue's own
//! grants. Both are unknown at first, and then so is the prediction.

use std::time::Duration;

use super::{
    Scheduler,
    error::SchedulerError,
    route::{Candidate, RouteRequest},
    wait_queues::QueueKey,
};
use crate::time::Time;

impl Scheduler {
    /// Time from now to the request's first token if it came now; `None` where nothing is known yet, or no worker
    /// takes it. An estimate: that all go on as they did.
    pub fn predict_ttft(&self, request: &RouteRequest<'_>) -> Option<Duration> {
        let best = self.choose(request).ok()?;
        self.predict(request, &self.queue_key(request), &best)
    }

    fn predict(
        &self,
        request: &RouteRequest<'_>,
        key: &QueueKey,
        best: &Candidate,
    ) -> Option<Duration> {
        let (worker, prefill) = match (best.split, best.fetch) {
            (Some(split), _) => (split.worker, split.cost),
            (None, fetch) => {
                let miss = request.token_ids.len() as u64 - u64::from(best.num_cached_tokens);
                let left = miss - fetch.map_or(0, |fetch| fetch.saved_tokens);
                let prefill = best.queued_prefill_tokens + left + best.lora_load_tokens;
                (best.worker, prefill)
            }
        };
        let worker = self.workers.get(worker)?;
        let compute = worker.prefill_pace.time_for(prefill)?;
        let wait = self.predict_wait(request, key, Some(best))?;
        Some(wait.saturating_add(compute))
    }

    /// Time until all that wait for the model now are served; `None` where that is not known. The longest of its queues
    /// counts.
    pub fn queue_wait(&self, model: &str) -> Option<Duration> {
        let model = model.into();
        let queues = self.waiting.of_model(&model);
        let waits = queues.filter_map(|(_, queue)| {
            let num_waiting = queue.requests.len() as u64;
            queue.pace.time_for(num_waiting)
        });
        waits.max()
    }

    /// Time until a worker has room for the request.
    pub(super) fn predict_wait(
        &self,
        request: &RouteRequest<'_>,
        key: &QueueKey,
        best: Option<&Candidate>,
    ) -> Option<Duration> {
        if self.waiting.occupied(key).is_none()
            && best.is_some_and(|best| best.has_room)
            && self.seats.is_free()
        {
            return Some(Duration::ZERO);
        }
        let queue = self.waiting.queues.get(key)?;
        let position = queue.requests.position(request.tenant, request.class);
        queue.pace.time_for(position)
    }

    /// Refuses a request that is predicted to miss its deadline, where that is wanted.
    pub(super) fn check_hope(
        &self,
        request: &RouteRequest<'_>,
        key: &QueueKey,
        best: Option<&Candidate>,
        now: Time,
    ) -> Result<(), SchedulerError> {
        if let Some(deadline) = request.deadline
            && self.config.refuse_hopeless
            && let Some(best) = best
            && let Some(predicted) = self.predict(request, key, best)
            && now + predicted > deadline
        {
            let left = deadline - now;
            return Err(SchedulerError::DeadlineHopeless { predicted, left });
        }
        Ok(())
    }
}
