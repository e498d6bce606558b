//! From a router's `StartSequence` to a request of the scheduler, or to the reason why not.
//!
//! The router has checked what clients sent; this is the worker's own wall, because a token outside the vocabulary
//! or a NaN would reach the model.

use orchestra_core::{
    ErrorCode, RejectReason, RequestId, SamplingParams, TokenId, hash::SeedParts, step::Request,
};
use orchestra_proto::v1;

use crate::config::AgentConfig;

/// Why a sequence was not started. The message names fields and limits, never what a client wrote.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) code: ErrorCode,
    pub(crate) message: String,
}

impl Refusal {
    pub(crate) fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
        }
    }

    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::new(ErrorCode::InvalidRequest, message)
    }
}

impl From<RejectReason> for Refusal {
    fn from(reason: RejectReason) -> Self {
        Self::new(reason.code(), reason.to_string())
    }
}

/// A request, and what is wanted of its KV.
pub(crate) struct Admitted {
    pub(crate) request: Request,
    /// Where some of it comes from.
    pub(crate) source: Option<v1::KvSource>,
    /// Where it goes, which is all that is wanted.
    pub(crate) target: Option<v1::KvTarget>,
}

/// The request that `start` asks for.
///
/// Another weights epoch is answered with `worker_failed`: the request is fine and this worker cannot serve it, so the
/// router has to send it to one that can.
pub(crate) fn admit(
    start: v1::StartSequence,
    id: RequestId,
    config: &AgentConfig,
) -> Result<Admitted, Refusal> {
    if start.weights_epoch != config.weights_epoch {
        let (wanted, held) = (start.weights_epoch, config.weights_epoch);
        let message = format!("weights epoch {wanted} was asked for, this worker holds {held}");
        return Err(Refusal::new(ErrorCode::WorkerFailed, message));
    }
    let sampling = resolve(start.sampling.unwrap_or_default())?;
    let vocab_size = config.vocab_size;
    check_vocabulary(
        "prompt_token_ids",
        start.prompt_token_ids.iter().copied(),
        vocab_size,
    )?;
    check_vocabulary(
        "output_token_ids",
        start.output_token_ids.iter().copied(),
        vocab_size,
    )?;
    check_vocabulary(
        "logit_bias",
        sampling.logit_bias.iter().map(|&(id, _)| id),
        vocab_size,
    )?;
    let seed = SeedParts {
        model: &config.model,
        weights_epoch: config.weights_epoch,
        salt: &start.cache_salt,
        ..SeedParts::default()
    };
    let request = Request {
        id,
        hash_seed: seed.seed(),
        prompt_token_ids: start.prompt_token_ids,
        output_token_ids: start.output_token_ids,
        sampling,
    };
    Ok(Admitted {
        request,
        source: start.kv_source,
        target: start.kv_target,
    })
}

fn check_vocabulary(
    field: &str,
    mut ids: impl Iterator<Item = TokenId>,
    vocab_size: u32,
) -> Result<(), Refusal> {
    if ids.any(|id| id >= vocab_size) {
        let message = format!("{field} holds a token outside the vocabulary of {vocab_size}");
        return Err(Refusal::invalid(message));
    }
    Ok(())
}

/// Sampling parameters of the wire, every field of which the router has set, checked.
fn resolve(wire: v1::SamplingParams) -> Result<SamplingParams, Refusal> {
    let sampling = SamplingParams {
        max_tokens: set("max_tokens", wire.max_tokens)?,
        temperature: set("temperature", wire.temperature)?,
        top_p: set("top_p", wire.top_p)?,
        top_k: set("top_k", wire.top_k)?,
        min_p: set("min_p", wire.min_p)?,
        repetition_penalty: set("repetition_penalty", wire.repetition_penalty)?,
        presence_penalty: set("presence_penalty", wire.presence_penalty)?,
        frequency_penalty: set("frequency_penalty", wire.frequency_penalty)?,
        seed: set("seed", wire.seed)?,
        stop_token_ids: wire.stop_token_ids,
        ignore_eos: wire.ignore_eos,
        logprobs: wire.logprobs,
        logit_bias: wire
            .logit_bias
            .iter()
            .map(|entry| (entry.token_id, entry.bias))
            .collect(),
    };
    sampling
        .validate()
        .map_err(|error| Refusal::invalid(error.to_string()))?;
    Ok(sampling)
}

fn set<T>(field: &str, value: Option<T>) -> Result<T, Refusal> {
    value.ok_or_else(|| Refusal::invalid(format!("sampling.{field} is not set")))
}
