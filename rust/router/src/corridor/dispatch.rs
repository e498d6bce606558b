//! Dispatch: the sequences start on their workers.

use std::sync::{Arc, atomic::AtomicU32};

use orchestra_core::{SamplingParams, scheduler::SchedulerError};
use orchestra_proto::v1;
use tokio::sync::mpsc;

use super::{choice::Choice, held::Held, place::Placed, stream::Running, tokenise::CheckedRequest};
use crate::{
    error::ApiError,
    metrics::InFlight,
    workers::{
        Placement,
        session::RunningSequence,
        sink::{SequenceEvent, TokenSink},
    },
};

/// Events of one choice besides one per token: the end, the loss of the worker, and that it was stopped.
const EVENTS_BESIDES_TOKENS: usize = 3;

impl Placed {
    /// Starts every choice. A worker that takes no work at this moment is passed over.
    pub(super) fn dispatch(self) -> Result<Running, ApiError> {
        let Self {
            request,
            placements,
            seat,
            presence,
            waiting,
            entered,
        } = self;
        // Room for all that can come, so that no worker ever waits for a client.
        let events_max = request.sampling.max_tokens as usize + EVENTS_BESIDES_TOKENS;
        let (events, inbox) = mpsc::channel(events_max * placements.len());
        let mut choices = Vec::with_capacity(placements.len());
        let mut sequences = Vec::with_capacity(placements.len());
        for (index, placement) in placements.into_iter().enumerate() {
            let mut choice = Choice::new(&request, index);
            let started = choice.start(&request, &events, placement);
            sequences.push(started.map_err(|error| request.placement_error(&error))?);
            choices.push(choice);
        }
        let metrics = &request.state.metrics;
        metrics
            .request_queue_time
            .observe(entered.elapsed().as_secs_f64());
        metrics
            .prompt_tokens
            .inc_by(request.prompt_token_ids.len() as u64);
        tracing::debug!(
            model = request.model.name,
            prompt_tokens = request.prompt_token_ids.len(),
            max_tokens = request.sampling.max_tokens,
            choices = choices.len(),
            queue_time = ?entered.elapsed(),
            elapsed = ?request.arrived.elapsed(),
            "request dispatched"
        );
        drop(waiting);
        let in_flight = InFlight::new(&request.state.metrics.requests_running);
        let held = Held::new(sequences, seat, presence, in_flight, events.clone());
        let running = Running::new(request, choices, held, (events, inbox));
        running.offer();
        Ok(running)
    }
}

impl Choice {
    /// Starts the choice on the chosen worker, or where that takes no work on the next best.
    pub(super) fn start(
        &mut self,
        request: &CheckedRequest,
        events: &mpsc::Sender<SequenceEvent>,
        mut placement: Placement,
    ) -> Result<RunningSequence, SchedulerError> {
        loop {
            let worker = placement.session.worker;
            let sink = TokenSink {
                choice: self.index,
                events: events.clone(),
                next_index: self.output.len() as u32,
                progress: Arc::new(AtomicU32::new(self.output.len() as u32)),
                max_tokens: request.sampling.max_tokens,
                has_logprobs: request.sampling.logprobs.is_some(),
            };
            let session = Arc::clone(&placement.session);
            let predicted_cached_tokens = placement.reserved.predicted_cached_tokens();
            let kv_move = placement.kv_move();
            if let Some(sequence) = placement.start(self.start_message(request), sink) {
                let choice = (self.index, self.num_replays > 0);
                let name = &session.spec.name;
                let record = &request.record;
                record.placed(choice, name, predicted_cached_tokens, kv_move);
                self.is_prefilled = false;
                return Ok(sequence);
            }
            self.refused.push(worker);
            placement = request.place(&self.output, &self.barred())?;
        }
    }

    fn start_message(&self, request: &CheckedRequest) -> v1::StartSequence {
        v1::StartSequence {
            prompt_token_ids: request.prompt_token_ids.clone(),
            output_token_ids: self.output.clone(),
            sampling: Some(wire_sampling(&request.sampling, self.index as u64)),
            cache_salt: request.cache_salt.clone(),
            // Filled in with the worker.
            sequence_id: 0,
            weights_epoch: 0,
            kv_source: None,
            kv_target: None,
        }
    }
}

/// Every field set; choice `i` draws with `seed + i`.
fn wire_sampling(sampling: &SamplingParams, choice: u64) -> v1::SamplingParams {
    let bias = |&(token_id, bias): &(u32, f32)| v1::LogitBias { token_id, bias };
    v1::SamplingParams {
        max_tokens: Some(sampling.max_tokens),
        temperature: Some(sampling.temperature),
        top_p: Some(sampling.top_p),
        top_k: Some(sampling.top_k),
        min_p: Some(sampling.min_p),
        repetition_penalty: Some(sampling.repetition_penalty),
        presence_penalty: Some(sampling.presence_penalty),
        frequency_penalty: Some(sampling.frequency_penalty),
        seed: Some(sampling.seed.wrapping_add(choice)),
        stop_token_ids: sampling.stop_token_ids.clone(),
        ignore_eos: sampling.ignore_eos,
        logprobs: sampling.logprobs,
        logit_bias: sampling.logit_bias.iter().map(bias).collect(),
    }
}
