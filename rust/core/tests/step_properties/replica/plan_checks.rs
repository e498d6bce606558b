//! What has to be true of every plan, whatever the requests.

use orchestra_core::{
    RequestId,
    step::{PENDING_TOKEN, StepPlan},
};

use super::{InFlight, Replica, Wish};

impl Replica {
    /// Nobody goes on while a step in flight draws its next token, unless steps are planned ahead: then the plan does
    /// not name it. A slot is its owner's from the step that starts it.
    pub(super) fn check_in_flight(&mut self, plan: &StepPlan) {
        for (row, &slot) in plan.slots.iter().enumerate() {
            let first = plan.token_ids[plan.query_start[row] as usize];
            let mut is_pending = false;
            let is_start = |step: &StepPlan| step.starts.iter().any(|start| start.slot == slot);
            let mut is_owner = !is_start(plan);
            for InFlight { plan: earlier, .. } in self.executing.iter().rev() {
                if !is_owner {
                    break;
                }
                is_pending |= earlier.samples.iter().any(|sample| sample.slot == slot);
                assert!(
                    self.config.plans_ahead || !is_pending,
                    "slot {slot} goes on before its token is known"
                );
                self.num_chunks_in_flight += u64::from(earlier.slots.contains(&slot));
                is_owner = !is_start(earlier);
            }
            let is_unknown = first == PENDING_TOKEN;
            assert_eq!(is_unknown, is_pending, "what slot {slot} goes on with");
            self.num_pending_rows += u64::from(is_unknown);
        }
    }

    /// Counts overtakes and checks their bound; each request's seed is its id.
    pub(super) fn note_starts(&mut self, plan: &StepPlan) {
        for start in &plan.starts {
            let id = RequestId(start.sampling.seed);
            let request = self.requests.get_mut(&id).expect("a request that was sent");
            if request.seniority.is_some() {
                continue;
            }
            request.seniority = Some(self.num_started);
            self.num_started += 1;
            for (_, earlier) in self.requests.range_mut(..id) {
                // What has awaited its KV came to the queue later than its number says.
                let is_waiting = earlier.seniority.is_none()
                    && earlier.finish_reason.is_none()
                    && !matches!(earlier.wish, Wish::Await(_));
                earlier.num_overtakes += u32::from(is_waiting);
            }
        }
        // Each step of being held back lets others take the free seats but one, which is kept.
        let by_rank = self.config.max_overtakes;
        let by_waiting = self.config.max_prefix_wait_steps * (self.config.max_num_seqs - 1);
        for (id, request) in &self.requests {
            assert!(
                request.num_overtakes <= by_rank + by_waiting,
                "{id} starves"
            );
        }
    }

    /// Once the most senior request runs, it is never preempted: it does not start again.
    pub(super) fn check_senior(&mut self, plan: &StepPlan) {
        let started = self
            .requests
            .iter()
            .filter(|(_, it)| it.finish_reason.is_none());
        let started = started.filter_map(|(&id, it)| Some((it.seniority?, id)));
        let Some((_, senior)) = started.min() else {
            return;
        };
        let starts = plan
            .starts
            .iter()
            .any(|start| start.sampling.seed == senior.0);
        assert!(
            !(starts && self.safe == Some(senior)),
            "{senior} was preempted"
        );
        let draws = plan
            .samples
            .iter()
            .any(|sample| sample.request_id == senior);
        if starts || draws {
            self.safe = Some(senior);
        }
    }
}
