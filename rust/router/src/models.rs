//! The models served here: what the router needs to read and write text for each, and what their workers allow.
//!
//! An entry lives as long as a worker serves it. The last few that lost their workers are kept: a worker that comes
//! back need not send its files again, and clients are told that the model is away, not that it does not exist. Where one was
//! lost a moment ago it is likely to come back: of several ranks one is replaced in a fraction of a second, and a worker that
//! crashed is started again by whoever looks after it. One that drained, or that an operator held back, is not expected.

mod foreign;

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use orchestra_core::{SamplingParams, TokenId, scheduler::WorkerId};
use orchestra_proto::v1;
use parking_lot::RwLock;
use serde_json::Value as Json;
use tokio::time::Instant;

use self::foreign::ForeignModels;
pub(crate) use self::foreign::{ForeignModel, ForeignModelError};
use crate::{
    request::SamplingPatch,
    text::{
        template::{ChatTemplate, TemplateError},
        tokenizer::{ModelTokenizer, TokenizerError},
    },
};

/// Models without workers that are remembered.
const MODELS_AWAY_MAX: usize = 16;

/// A model that a request could name now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelInfo {
    /// The name that clients use.
    pub id: String,
    /// Most tokens of prompt and output together; 0 where no engine says it.
    pub max_model_len: u32,
    /// Workers attached that serve it.
    pub num_workers: u32,
    /// When its first worker attached, seconds since the Unix epoch.
    pub created: u64,
}

/// The model files that a worker sent cannot be used.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ModelFilesError {
    /// No tokeniser.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// Not JSON.
    #[error("{file} is not JSON: {message}")]
    Json {
        /// The file.
        file: &'static str,
        /// Where it stops being JSON.
        message: String,
    },
}

/// What a model's files say about text and sampling. Shared by all workers that sent the same files.
pub struct ModelText {
    digest: String,
    tokenizer: Arc<ModelTokenizer>,
    template: Result<ChatTemplate, TemplateError>,
    defaults: SamplingParams,
}

impl ModelText {
    /// The model's tokeniser.
    pub(crate) fn tokenizer(&self) -> &ModelTokenizer {
        &self.tokenizer
    }

    /// The model's chat template, or why there is none.
    pub(crate) fn template(&self) -> Result<&ChatTemplate, TemplateError> {
        self.template.as_ref().map_err(Clone::clone)
    }

    /// Reads the files. Takes tens of milliseconds for a large vocabulary: not for an async task.
    pub fn from_files(files: &v1::ModelFiles, digest: String) -> Result<Self, ModelFilesError> {
        let tokenizer_config = parse("tokenizer_config.json", &files.tokenizer_config_json)?;
        let generation_config = parse("generation_config.json", &files.generation_config_json)?;
        let template = ChatTemplate::from_files(&tokenizer_config, &files.chat_template);
        if let Err(error @ TemplateError::Broken(_)) = &template {
            tracing::warn!(%error, "chat is not offered for this model");
        }
        Ok(Self {
            digest,
            tokenizer: Arc::new(ModelTokenizer::from_json(&files.tokenizer_json)?),
            template,
            defaults: sampling_defaults(&generation_config),
        })
    }
}

/// An absent file is an empty object.
fn parse(file: &'static str, bytes: &[u8]) -> Result<Json, ModelFilesError> {
    if bytes.is_empty() {
        return Ok(Json::Object(serde_json::Map::new()));
    }
    let message = |error: serde_json::Error| error.to_string();
    serde_json::from_slice(bytes).map_err(|error| ModelFilesError::Json {
        file,
        message: message(error),
    })
}

/// The sampling that `generation_config.json` recommends. A value out of its range is left at our default.
fn sampling_defaults(config: &Json) -> SamplingParams {
    let mut defaults = SamplingParams::default();
    let mut take = |name: &str, field: fn(&mut SamplingParams) -> &mut f32| {
        let Some(value) = config[name].as_f64() else {
            return;
        };
        let mut changed = defaults.clone();
        *field(&mut changed) = value as f32;
        match changed.validate() {
            Ok(()) => defaults = changed,
            Err(error) => tracing::warn!(%error, "generation_config.json is out of range"),
        }
    };
    take("temperature", |it| &mut it.temperature);
    take("top_p", |it| &mut it.top_p);
    take("min_p", |it| &mut it.min_p);
    take("repetition_penalty", |it| &mut it.repetition_penalty);
    // Where files mean "all" they say 0 or -1; a cast to unsigned saturates at 0.
    if let Some(top_k) = config["top_k"].as_f64() {
        defaults.top_k = top_k as u32;
    }
    defaults
}

/// One served model.
#[derive(Clone)]
pub struct ModelEntry {
    /// The name that clients use.
    pub name: String,
    /// Most tokens of prompt and output together, on the worker that takes most.
    pub max_model_len: u32,
    /// Token ids are below this.
    pub vocab_size: u32,
    text: Arc<ModelText>,
}

impl ModelEntry {
    /// The model's tokeniser.
    pub fn tokenizer(&self) -> &Arc<ModelTokenizer> {
        &self.text.tokenizer
    }

    /// The model's chat template, or why there is none.
    pub fn template(&self) -> Result<&ChatTemplate, TemplateError> {
        self.text.template.as_ref().map_err(Clone::clone)
    }

    /// One token as text, alone: half characters show as U+FFFD, special tokens as their name.
    pub fn decode_token(&self, token_id: TokenId) -> String {
        String::from_utf8_lossy(self.token_bytes(token_id)).into_owned()
    }

    /// The bytes that one token adds to the text; for special tokens their name. Empty for unknown ids.
    pub fn token_bytes(&self, token_id: TokenId) -> &[u8] {
        self.text.tokenizer.token_bytes(token_id)
    }

    /// The client's values over the model's generation config over our defaults. A seed that nobody gave is drawn;
    /// `max_tokens` that nobody gave is `max_tokens_default`.
    pub fn resolve_sampling(
        &self,
        given: &SamplingPatch,
        max_tokens_default: u32,
    ) -> SamplingParams {
        let given = SamplingPatch {
            seed: given.seed.or_else(|| Some(fastrand::u64(..))),
            ..given.clone()
        };
        given.over(&self.text.defaults, max_tokens_default)
    }
}

/// What one worker allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WorkerLimits {
    /// Most tokens of one sequence: the model's context, or all of the worker's KV where that is less.
    pub max_model_len: u32,
    /// Token ids are below this.
    pub vocab_size: u32,
}

/// A worker says something else about a model than those that serve it already.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ModelMismatch {
    /// A part of the model is not the same.
    #[error("{what} differs from that of the attached workers of the same model")]
    Differs {
        /// Which part.
        what: &'static str,
    },
    /// Foreign engines serve the name.
    #[error("foreign engines serve a model of this name")]
    Foreign,
}

/// The registry, by name.
#[derive(Default)]
pub struct Models {
    served: RwLock<BTreeMap<String, Served>>,
    /// Locked after `served`, where both are.
    foreign: RwLock<ForeignModels>,
    /// Whether there has been one.
    has_had_any: AtomicBool,
}

struct Served {
    entry: Arc<ModelEntry>,
    workers: Vec<(WorkerId, WorkerLimits)>,
    created: SystemTime,
    /// When its last worker left; nothing while it has one.
    away_since: Option<Instant>,
    /// When a worker was last lost that took requests.
    lost_at: Option<Instant>,
}

impl Models {
    /// The model of this name; also one whose workers are away.
    pub fn get(&self, name: &str) -> Option<Arc<ModelEntry>> {
        self.served
            .read()
            .get(name)
            .map(|served| Arc::clone(&served.entry))
    }

    /// Whether there has been any model since the start: before, nobody can say that one does not exist.
    pub(crate) fn has_had_any(&self) -> bool {
        self.has_had_any.load(Relaxed)
    }

    /// The models that have workers, by name.
    pub fn list(&self) -> Vec<ModelInfo> {
        let served = self.served.read();
        let present = served
            .iter()
            .filter(|(_, served)| !served.workers.is_empty());
        present
            .map(|(name, served)| ModelInfo {
                id: name.clone(),
                max_model_len: served.entry.max_model_len,
                num_workers: served.workers.len() as u32,
                created: epoch_seconds(served.created),
            })
            .collect()
    }

    /// The files of this digest, where a worker sent them before.
    pub(crate) fn text_of(&self, digest: &str) -> Option<Arc<ModelText>> {
        let served = self.served.read();
        let mut texts = served.values().map(|served| &served.entry.text);
        texts.find(|text| text.digest == digest).cloned()
    }

    /// Adds a worker to a model. All workers of one model must agree on its files and vocabulary: token ids that one
    /// has drawn are continued by another.
    pub(crate) fn attach(
        &self,
        name: &str,
        worker: WorkerId,
        limits: WorkerLimits,
        text: Arc<ModelText>,
    ) -> Result<(), ModelMismatch> {
        let mut all = self.served.write();
        if self.foreign.read().contains_key(name) {
            return Err(ModelMismatch::Foreign);
        }
        let present = all
            .get_mut(name)
            .filter(|served| !served.workers.is_empty());
        if let Some(served) = present {
            if served.entry.text.digest != text.digest {
                return Err(ModelMismatch::Differs {
                    what: "model_files_digest",
                });
            }
            if served.entry.vocab_size != limits.vocab_size {
                return Err(ModelMismatch::Differs { what: "vocab_size" });
            }
            served.workers.push((worker, limits));
            served.refresh_limits();
            return Ok(());
        }
        let WorkerLimits {
            max_model_len,
            vocab_size,
        } = limits;
        let entry = ModelEntry {
            name: name.to_owned(),
            max_model_len,
            vocab_size,
            text,
        };
        // Kept: who asks now may have looked for a worker before this one came.
        let lost_at = all.get(name).and_then(|served| served.lost_at);
        let served = Served {
            entry: Arc::new(entry),
            workers: vec![(worker, limits)],
            created: SystemTime::now(),
            away_since: None,
            lost_at,
        };
        all.insert(name.to_owned(), served);
        self.has_had_any.store(true, Relaxed);
        Ok(())
    }

    /// Takes a worker off its model.
    pub(crate) fn detach(&self, name: &str, worker: WorkerId) {
        let mut all = self.served.write();
        let Some(served) = all.get_mut(name) else {
            return;
        };
        served.workers.retain(|&(id, _)| id != worker);
        if served.workers.is_empty() {
            served.away_since = Some(Instant::now());
            forget_longest_away(&mut all);
        } else {
            served.refresh_limits();
        }
    }

    /// A worker of the model took requests until now, and is lost.
    pub(crate) fn note_loss(&self, name: &str) {
        if let Some(served) = self.served.write().get_mut(name) {
            served.lost_at = Some(Instant::now());
        }
    }

    /// Until when a worker of the model may come back that was lost, where it is waited for so long.
    pub(crate) fn expected_by(&self, name: &str, wait: Duration) -> Option<Instant> {
        let by = self.served.read().get(name)?.lost_at? + wait;
        (by > Instant::now()).then_some(by)
    }
}

impl Served {
    fn refresh_limits(&mut self) {
        let most = self
            .workers
            .iter()
            .map(|(_, limits)| limits.max_model_len)
            .max();
        if let Some(max_model_len) = most.filter(|&most| most != self.entry.max_model_len) {
            self.entry = Arc::new(ModelEntry {
                max_model_len,
                ..(*self.entry).clone()
            });
        }
    }
}

fn epoch_seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

fn forget_longest_away(all: &mut BTreeMap<String, Served>) {
    let away = || all.iter().filter(|(_, served)| served.workers.is_empty());
    if away().count() <= MODELS_AWAY_MAX {
        return;
    }
    let longest = away()
        .min_by_key(|(_, served)| served.away_since)
        .map(|(name, _)| name.clone());
    if let Some(name) = longest {
        all.remove(&name);
    }
}

#[cfg(test)]
mod tests {
    use orchestra_core::scheduler::{Scheduler, SchedulerConfig, WorkerSpec};

    use super::*;
    use crate::text::fixtures::{QWEN_WORDS, VOCAB_SIZE, byte_level};

    const LIMITS: WorkerLimits = WorkerLimits {
        max_model_len: 64,
        vocab_size: VOCAB_SIZE,
    };

    fn text() -> Arc<ModelText> {
        let files = v1::ModelFiles {
            tokenizer_json: byte_level(QWEN_WORDS),
            ..Default::default()
        };
        Arc::new(ModelText::from_files(&files, "digest".into()).unwrap())
    }

    fn some_worker() -> WorkerId {
        let spec = WorkerSpec {
            name: "worker".into(),
            model: "model".into(),
            block_size: 16,
            num_blocks: 16,
            max_num_seqs: 1,
            max_model_len: 64,
            ..Default::default()
        };
        let mut scheduler = Scheduler::new(SchedulerConfig::default()).unwrap();
        scheduler.add_worker(spec).unwrap()
    }

    #[test]
    fn of_models_without_workers_those_are_remembered_that_had_one_last() {
        let (models, text, worker) = (Models::default(), text(), some_worker());
        let attach = |name: &str| {
            models
                .attach(name, worker, LIMITS, Arc::clone(&text))
                .unwrap();
        };
        attach("first to come");
        for number in 1..=MODELS_AWAY_MAX {
            let name = format!("model {number}");
            attach(&name);
            models.detach(&name, worker);
        }
        // It came before all of them, and is the last to lose its worker.
        models.detach("first to come", worker);
        models.note_loss("first to come");
        assert!(models.get("first to come").is_some());
        assert!(
            models
                .expected_by("first to come", Duration::from_secs(9))
                .is_some()
        );
        assert!(models.get("model 1").is_none());
        assert!(models.get("model 2").is_some());
        assert_eq!(models.list(), []);
    }
}
