//! From a door's input to token ids, checked against the model and every limit. Nothing is held yet, so a refusal
//! changes nothing.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use orchestra_core::{ErrorCode, SamplingParams, TokenId};
use serde_json::Value as Json;
use tokio::time::Instant;

use super::{
    admit::Presence,
    place::{placement_error, retry_after_ms},
};
use crate::{
    caller::Caller,
    error::ApiError,
    models::ModelEntry,
    observe::Record,
    request::{GenerateInput, Prompt, SamplingPatch},
    state::RouterState,
    text::template::Conversation,
};

/// Most choices of one request.
const CHOICES_MAX: u32 = 32;
/// Most stop strings, and the longest.
const STOP_MAX: usize = 16;
const STOP_BYTES_MAX: usize = 256;
/// Longest cache salt.
const SALT_BYTES_MAX: usize = 256;
/// Text up to this size is tokenised where it arrives: that takes under about half a millisecond.
const INLINE_BYTES_MAX: usize = 1024;
/// Normalisers may drop characters; none in use makes text four times shorter.
const NORMALISED_SHARE_MIN: usize = 4;

/// A request that is fit to run.
pub(super) struct Tokenised {
    pub(super) request: CheckedRequest,
    pub(super) presence: Presence,
}

/// What every later stage needs to know of the request.
pub(super) struct CheckedRequest {
    pub(super) state: Arc<RouterState>,
    pub(super) model: Arc<ModelEntry>,
    pub(super) prompt_token_ids: Vec<TokenId>,
    /// The field that the prompt came in, for errors about it.
    pub(super) prompt_field: &'static str,
    pub(super) sampling: SamplingParams,
    pub(super) stop: Vec<String>,
    pub(super) n: u32,
    pub(super) cache_salt: String,
    pub(super) caller: Caller,
    /// What is taken down of it, to the end of its stream.
    pub(super) record: Record,
    pub(super) arrived: Instant,
    pub(super) deadline: Instant,
}

/// Checks the input and tokenises its prompt.
pub(super) async fn tokenise(
    state: &Arc<RouterState>,
    input: GenerateInput,
) -> Result<Tokenised, ApiError> {
    let arrived = Instant::now();
    check_limits(&input)?;
    let model = state.models.get(&input.model);
    let model = model.ok_or_else(|| unknown_model(state))?;
    input.record.model(&model.name);
    let caller = &input.caller;
    input.record.caller(&caller.tenant.name, caller.class());
    let prompt_field = field_of(&input.prompt);
    // An overloaded router spends nothing on what it would refuse anyway.
    let presence = state.enter(&input.caller.tenant, &model.name)?;
    let full = state.workers.check_queue(&model.name, input.caller.class());
    full.map_err(|error| placement_error(&error, prompt_field))?;
    check_not_empty(&input.prompt, prompt_field)?;
    let prompt_token_ids = token_ids(state, &model, input.prompt).await?;
    check_token_ids(prompt_field, &prompt_token_ids, model.vocab_size)?;
    input.record.prompt(prompt_token_ids.len());
    let sampling = sampling(
        &model,
        &input.sampling,
        prompt_field,
        prompt_token_ids.len(),
    )?;
    let limit = state.settings().limits.request_timeout;
    let asked = input.timeout.into_iter().chain(input.caller.timeout);
    let timeout = asked.fold(limit, Duration::min);
    let request = CheckedRequest {
        state: Arc::clone(state),
        model,
        prompt_token_ids,
        prompt_field,
        sampling,
        stop: input.stop,
        n: input.n,
        cache_salt: input.cache_salt,
        caller: input.caller,
        record: input.record,
        arrived,
        deadline: arrived + timeout,
    };
    Ok(Tokenised { request, presence })
}

fn check_limits(input: &GenerateInput) -> Result<(), ApiError> {
    if !(1..=CHOICES_MAX).contains(&input.n) {
        return Err(ApiError::invalid(
            "n",
            format!("n must be between 1 and {CHOICES_MAX}"),
        ));
    }
    if input.stop.len() > STOP_MAX {
        return Err(ApiError::invalid(
            "stop",
            format!("stop takes at most {STOP_MAX} strings"),
        ));
    }
    if input
        .stop
        .iter()
        .any(|stop| stop.is_empty() || stop.len() > STOP_BYTES_MAX)
    {
        let message = format!("each string of stop must have 1 to {STOP_BYTES_MAX} bytes");
        return Err(ApiError::invalid("stop", message));
    }
    if input.cache_salt.len() > SALT_BYTES_MAX {
        let message = format!("cache_salt must have at most {SALT_BYTES_MAX} bytes");
        return Err(ApiError::invalid("cache_salt", message));
    }
    Ok(())
}

/// A router that has just started knows no model until the first worker has come.
fn unknown_model(state: &RouterState) -> ApiError {
    if !state.models.has_had_any() {
        let message = "no worker has come since this router started";
        return ApiError::new(ErrorCode::NoWorkers, message).retry_after_ms(retry_after_ms(None));
    }
    let message = "no such model is served here; the list of models names those that are";
    ApiError {
        param: Some("model".to_owned()),
        ..ApiError::new(ErrorCode::ModelNotFound, message)
    }
}

const fn field_of(prompt: &Prompt) -> &'static str {
    match prompt {
        Prompt::Text(_) | Prompt::TokenIds(_) => "prompt",
        Prompt::Chat { .. } => "messages",
    }
}

/// Before tokenising: with a beginning-of-text token even nothing would become something.
fn check_not_empty(prompt: &Prompt, field: &str) -> Result<(), ApiError> {
    let is_empty = match prompt {
        Prompt::Text(text) => text.is_empty(),
        Prompt::TokenIds(token_ids) => token_ids.is_empty(),
        Prompt::Chat { messages, .. } => messages.is_empty(),
    };
    if is_empty { Err(empty(field)) } else { Ok(()) }
}

fn empty(field: &str) -> ApiError {
    ApiError::invalid(field, format!("{field} must not be empty"))
}

async fn token_ids(
    state: &RouterState,
    model: &Arc<ModelEntry>,
    prompt: Prompt,
) -> Result<Vec<TokenId>, ApiError> {
    let size = match &prompt {
        Prompt::TokenIds(_) => 0,
        Prompt::Text(text) => text.len(),
        Prompt::Chat {
            messages, tools, ..
        } => messages.iter().chain(tools).map(text_bytes).sum(),
    };
    if size <= INLINE_BYTES_MAX {
        return encode(model, prompt);
    }
    let model = Arc::clone(model);
    state
        .tasks
        .run_blocking(move || encode(&model, prompt))
        .await?
}

/// Roughly the text in a JSON value, keys and punctuation as a few bytes each.
fn text_bytes(value: &Json) -> usize {
    8 + match value {
        Json::String(text) => text.len(),
        Json::Array(items) => items.iter().map(text_bytes).sum(),
        Json::Object(fields) => fields
            .iter()
            .map(|(key, value)| key.len() + text_bytes(value))
            .sum(),
        Json::Null | Json::Bool(_) | Json::Number(_) => 0,
    }
}

fn encode(model: &ModelEntry, prompt: Prompt) -> Result<Vec<TokenId>, ApiError> {
    let encode = |field: &'static str, text: &str, add_special_tokens: bool| {
        check_text_bytes(model, field, text)?;
        let failed = |_| ApiError::invalid(field, format!("{field} cannot be tokenised"));
        model
            .tokenizer()
            .encode(text, add_special_tokens)
            .map_err(failed)
    };
    match prompt {
        Prompt::Text(text) => encode("prompt", &text, true),
        Prompt::TokenIds(token_ids) => Ok(token_ids),
        Prompt::Chat {
            messages,
            tools,
            template_kwargs,
        } => {
            let conversation = Conversation {
                messages: &messages,
                tools: &tools,
                template_kwargs: &template_kwargs,
            };
            let text = model.template()?.render(&conversation, SystemTime::now())?;
            // Templates write the special tokens themselves.
            encode("messages", &text, false)
        }
    }
}

/// Text that cannot fit even if every token were the longest there is need not be tokenised to be refused.
fn check_text_bytes(model: &ModelEntry, field: &str, text: &str) -> Result<(), ApiError> {
    let token_bytes_max = model.tokenizer().token_bytes_max() * NORMALISED_SHARE_MIN;
    let num_tokens_min = text.len() / token_bytes_max;
    let limit = model.max_model_len;
    if num_tokens_min < limit as usize {
        return Ok(());
    }
    let message =
        format!("{field} has more than {num_tokens_min} tokens, the model's context holds {limit}");
    Err(too_long(field, message))
}

fn too_long(field: &str, message: String) -> ApiError {
    ApiError {
        param: Some(field.to_owned()),
        ..ApiError::new(ErrorCode::ContextTooLong, message)
    }
}

fn check_token_ids(field: &str, token_ids: &[TokenId], vocab_size: u32) -> Result<(), ApiError> {
    // A template may print nothing.
    if token_ids.is_empty() {
        return Err(empty(field));
    }
    match token_ids.iter().position(|&id| id >= vocab_size) {
        Some(index) => Err(outside_vocabulary(field, index, vocab_size)),
        None => Ok(()),
    }
}

fn outside_vocabulary(field: &str, index: usize, vocab_size: u32) -> ApiError {
    let message =
        format!("{field}[{index}] must be below {vocab_size}, the size of the vocabulary");
    ApiError::invalid(field, message)
}

/// The request's sampling, every value in its range and the output within the context.
fn sampling(
    model: &ModelEntry,
    given: &SamplingPatch,
    prompt_field: &str,
    prompt_tokens: usize,
) -> Result<SamplingParams, ApiError> {
    let limit = model.max_model_len as usize;
    if prompt_tokens >= limit {
        let message = format!(
            "{prompt_field} has {prompt_tokens} tokens, the model's context holds {limit} with the output"
        );
        return Err(too_long(prompt_field, message));
    }
    let sampling = model.resolve_sampling(given, (limit - prompt_tokens) as u32);
    sampling.validate()?;
    let stop_token_ids = sampling.stop_token_ids.iter().copied();
    let logit_bias = sampling.logit_bias.iter().map(|&(id, _)| id);
    let ids = [stop_token_ids.collect::<Vec<_>>(), logit_bias.collect()];
    for (field, ids) in ["stop_token_ids", "logit_bias"].into_iter().zip(ids) {
        if let Some(index) = ids.iter().position(|&id| id >= model.vocab_size) {
            return Err(outside_vocabulary(field, index, model.vocab_size));
        }
    }
    let max_tokens = sampling.max_tokens;
    if prompt_tokens + max_tokens as usize > limit {
        let message = format!(
            "{prompt_field} has {prompt_tokens} tokens and max_tokens is {max_tokens}, \
             together more than the model's context of {limit}"
        );
        return Err(too_long(prompt_field, message));
    }
    Ok(sampling)
}
