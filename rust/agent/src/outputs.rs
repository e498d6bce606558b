//! What the step loop has to say, as wire messages.

use orchestra_core::{
    BlockHash, ErrorCode,
    step::{FinishReason, KvEvent, TokenLogprobs, TokenUpdate},
};
use orchestra_proto::v1::{self, kv_event::Event, worker_message::Message};

use crate::attachment::Attachment;

/// A batch of outputs.
pub(crate) fn tokens_message(outputs: Vec<v1::SequenceOutput>) -> v1::WorkerMessage {
    v1::WorkerMessage {
        message: Some(Message::Tokens(v1::TokenBatch { outputs })),
    }
}

/// What one step drew. Neighbouring updates of one sequence become one output; a sequence that ended is forgotten.
pub(crate) fn sequence_outputs(
    updates: Vec<TokenUpdate>,
    attachment: &mut Attachment,
) -> Vec<v1::SequenceOutput> {
    let mut outputs: Vec<v1::SequenceOutput> = Vec::with_capacity(updates.len());
    for update in updates {
        // Unknown: aborted by the router while the step ran.
        let Some(sequence_id) = attachment.sequence_of(update.request_id) else {
            continue;
        };
        if update.finish_reason.is_some() {
            attachment.remove(sequence_id);
        }
        if outputs
            .last()
            .is_none_or(|last| last.sequence_id != sequence_id)
        {
            outputs.push(v1::SequenceOutput {
                sequence_id,
                first_index: update.output_index,
                cached_tokens: update.num_cached_tokens,
                fetched_tokens: update.num_fetched_tokens,
                ..v1::SequenceOutput::default()
            });
        }
        if let Some(output) = outputs.last_mut() {
            append(output, update);
        }
    }
    outputs
}

fn append(output: &mut v1::SequenceOutput, update: TokenUpdate) {
    output.token_ids.push(update.token_id);
    output.logprobs.extend(
        update
            .logprobs
            .map(|found| logprobs(update.token_id, found)),
    );
    if let Some(reason) = update.finish_reason {
        output.set_finish_reason(finish_reason(reason));
    }
}

fn logprobs(token_id: u32, logprobs: TokenLogprobs) -> v1::TokenLogprobs {
    let pair = |(token_id, logprob)| v1::TokenLogprob { token_id, logprob };
    v1::TokenLogprobs {
        chosen: Some(pair((token_id, logprobs.chosen))),
        top: logprobs.top.into_iter().map(pair).collect(),
    }
}

const fn finish_reason(reason: FinishReason) -> v1::FinishReason {
    match reason {
        FinishReason::Stop => v1::FinishReason::Stop,
        FinishReason::Length => v1::FinishReason::Length,
        FinishReason::Abort => v1::FinishReason::Abort,
        FinishReason::Error => v1::FinishReason::Error,
    }
}

/// The end of a sequence that was computed for another worker.
pub(crate) fn prefilled_output(sequence_id: u64) -> v1::SequenceOutput {
    let mut output = v1::SequenceOutput {
        sequence_id,
        ..v1::SequenceOutput::default()
    };
    output.set_finish_reason(v1::FinishReason::Prefilled);
    output
}

/// The end of a sequence that was refused or failed.
pub(crate) fn error_output(sequence_id: u64, code: ErrorCode, message: &str) -> v1::SequenceOutput {
    let mut output = v1::SequenceOutput {
        sequence_id,
        error: Some(v1::SequenceError {
            code: code.as_str().to_owned(),
            message: message.to_owned(),
        }),
        ..v1::SequenceOutput::default()
    };
    output.set_finish_reason(v1::FinishReason::Error);
    output
}

/// Changes of the prefix cache, as message number `sequence` of the stream.
pub(crate) fn kv_events_message(sequence: u64, events: Vec<KvEvent>) -> v1::WorkerMessage {
    let events = events.into_iter().map(kv_event).collect();
    v1::WorkerMessage {
        message: Some(Message::KvEvents(v1::KvEvents { sequence, events })),
    }
}

fn kv_event(event: KvEvent) -> v1::KvEvent {
    let event = match event {
        KvEvent::Stored(hashes) => stored(&hashes, v1::KvTier::Unspecified),
        KvEvent::Kept(hashes) => stored(&hashes, v1::KvTier::Host),
        KvEvent::Removed(hashes) => Event::Removed(v1::KvRemoved {
            block_hashes: wire(&hashes),
        }),
        KvEvent::Cleared => Event::Cleared(v1::KvCleared {}),
    };
    v1::KvEvent { event: Some(event) }
}

fn stored(hashes: &[BlockHash], tier: v1::KvTier) -> Event {
    Event::Stored(v1::KvStored {
        block_hashes: wire(hashes),
        tier: tier.into(),
    })
}

/// Hashes as they travel.
pub(crate) fn wire(hashes: &[BlockHash]) -> Vec<u64> {
    hashes.iter().map(|hash| hash.0).collect()
}
