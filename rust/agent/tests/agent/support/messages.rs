//! Messages as a router writes and reads them.

use std::collections::BTreeMap;

use orchestra_core::TokenId;
use orchestra_proto::v1::{
    AbortSequence, FinishReason, SamplingParams, SequenceOutput, StartSequence,
    router_message::Message as Down, worker_message::Message as Up,
};

use super::Session;

pub(crate) const VOCAB_SIZE: u32 = 1000;

/// The token that the engine draws for a position. No stop token is among them.
pub(crate) fn drawn_token(position: u32) -> TokenId {
    500 + position % 100
}

/// Sampling parameters with every field set.
pub(crate) fn greedy(max_tokens: u32) -> SamplingParams {
    SamplingParams {
        max_tokens: Some(max_tokens),
        temperature: Some(0.0),
        top_p: Some(1.0),
        top_k: Some(0),
        min_p: Some(0.0),
        repetition_penalty: Some(1.0),
        presence_penalty: Some(0.0),
        frequency_penalty: Some(0.0),
        seed: Some(0),
        ..SamplingParams::default()
    }
}

/// A sequence with a prompt of `num_tokens` tokens that no other sequence id has.
pub(crate) fn start(sequence_id: u64, num_tokens: u32, max_tokens: u32) -> StartSequence {
    StartSequence {
        sequence_id,
        prompt_token_ids: (0..num_tokens)
            .map(|token| (sequence_id as u32 * 31 + token) % 500)
            .collect(),
        sampling: Some(greedy(max_tokens)),
        weights_epoch: 3,
        ..StartSequence::default()
    }
}

pub(crate) fn abort(sequence_id: u64) -> Down {
    Down::Abort(AbortSequence { sequence_id })
}

/// The outputs in a message.
pub(crate) fn outputs_of(message: Up) -> Option<Vec<SequenceOutput>> {
    match message {
        Up::Tokens(batch) => Some(batch.outputs),
        _ => None,
    }
}

/// All that came for one sequence.
#[derive(Debug, Default)]
pub(crate) struct Collected {
    pub(crate) token_ids: Vec<TokenId>,
    /// Index of the first of them in the output.
    pub(crate) first_index: u32,
    pub(crate) cached_tokens: u32,
    /// Alternatives with each token.
    pub(crate) num_top: Vec<usize>,
    pub(crate) finish: FinishReason,
    /// Code of the error.
    pub(crate) error: Option<String>,
}

impl Collected {
    /// Adds an output, which must follow what came before without a gap.
    fn add(&mut self, output: SequenceOutput) {
        assert_eq!(
            self.finish,
            FinishReason::Unspecified,
            "output after the end: {output:?}"
        );
        if self.token_ids.is_empty() {
            self.first_index = output.first_index;
        }
        if !output.token_ids.is_empty() {
            let expected = self.first_index as usize + self.token_ids.len();
            assert_eq!(
                output.first_index as usize, expected,
                "gap or repeat: {output:?}"
            );
        }
        self.finish = output.finish_reason();
        self.num_top
            .extend(output.logprobs.iter().map(|logprobs| logprobs.top.len()));
        self.token_ids.extend(output.token_ids);
        self.cached_tokens = output.cached_tokens;
        self.error = output.error.map(|error| error.code);
    }
}

/// Reads until every sequence named has ended.
pub(crate) fn collect(session: &mut Session, sequence_ids: &[u64]) -> BTreeMap<u64, Collected> {
    let mut all: BTreeMap<u64, Collected> = BTreeMap::new();
    let has_ended = |all: &BTreeMap<u64, Collected>, id| {
        all.get(id)
            .is_some_and(|it| it.finish != FinishReason::Unspecified)
    };
    while !sequence_ids.iter().all(|id| has_ended(&all, id)) {
        for output in session.wait_for(outputs_of) {
            all.entry(output.sequence_id).or_default().add(output);
        }
    }
    all
}
