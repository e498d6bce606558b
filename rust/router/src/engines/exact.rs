//! Exact prefixes on an engine: its model's files, so that requests can be tokenised as it does it, and its own word on
//! what it holds.

#[cfg(test)]
mod tests;

use std::{io::Read, path::Path, sync::Arc};

use orchestra_core::scheduler::{KvSource, WorkerSpec};
use orchestra_proto::v1;

use super::{
    engine::{Engine, EngineWorker},
    models::{CHUNK_TOKENS, CHUNKS_ASSUMED_MAX, NUM_BLOCKS_UNKNOWN},
};
use crate::{
    kv_events::{KvEventSource, follow},
    models::{ModelFilesError, ModelText},
    state::RouterState,
};

/// The largest file of a model that is read.
const FILE_BYTES_MAX: u64 = 64 << 20;

/// Why an engine's model files cannot be used.
#[derive(Debug, thiserror::Error)]
enum LoadError {
    #[error("{file} cannot be read: {error}")]
    Io {
        file: &'static str,
        error: std::io::Error,
    },
    #[error("{file} has more than 64 MiB")]
    TooLarge { file: &'static str },
    #[error(transparent)]
    Files(#[from] ModelFilesError),
}

/// Reads the model files that the engine's settings name. Without them, its prompts count as text.
pub(super) async fn load(state: &RouterState, engine: &Engine) {
    let Some(directory) = engine.config.model_files.clone() else {
        return;
    };
    let url = &engine.config.url;
    let loading = state.tasks.run_blocking(move || read(&directory));
    match loading.await {
        Ok(Ok(text)) => {
            let _ = engine.text.set(Arc::new(text));
        }
        Ok(Err(error)) => {
            tracing::warn!(%url, %error, "model_files cannot be used: prefixes are text");
        }
        Err(_) => tracing::warn!(%url, "model_files were not read: prefixes are text"),
    }
}

fn read(directory: &Path) -> Result<ModelText, LoadError> {
    let read = |file: &'static str, is_needed: bool| {
        let error = |error| LoadError::Io { file, error };
        let opened = match std::fs::File::open(directory.join(file)) {
            Err(error) if !is_needed && error.kind() == std::io::ErrorKind::NotFound => {
                return Ok(Vec::new());
            }
            opened => opened.map_err(error)?,
        };
        let mut bytes = Vec::new();
        let limited = opened.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes);
        match limited.map_err(error)? as u64 {
            0..=FILE_BYTES_MAX => Ok(bytes),
            _ => Err(LoadError::TooLarge { file }),
        }
    };
    let template = read("chat_template.jinja", false)?;
    let files = v1::ModelFiles {
        tokenizer_json: read("tokenizer.json", true)?,
        tokenizer_config_json: read("tokenizer_config.json", false)?,
        generation_config_json: read("generation_config.json", false)?,
        chat_template: String::from_utf8_lossy(&template).into_owned(),
    };
    Ok(ModelText::from_files(
        &files,
        directory.display().to_string(),
    )?)
}

/// The scheduler's worker for a model of an engine. Where it `has_events`, it says itself what it holds.
pub(super) fn spec(engine: &Engine, name: String, model: &str, has_events: bool) -> WorkerSpec {
    let config = &engine.config;
    let block_size = match engine.text.get() {
        Some(_) => config.kv_block_size,
        None => CHUNK_TOKENS,
    };
    let num_blocks = config
        .kv_tokens
        .map_or(NUM_BLOCKS_UNKNOWN, |tokens| tokens.div_ceil(block_size));
    WorkerSpec {
        name,
        model: model.to_owned(),
        block_size,
        num_blocks,
        max_num_seqs: config.max_num_seqs,
        // The engine says itself what is too long for it.
        max_model_len: u32::MAX,
        kv_source: if has_events {
            KvSource::Reported
        } else {
            KvSource::Assumed {
                max_blocks: num_blocks.min(CHUNKS_ASSUMED_MAX),
                ttl_s: 0,
            }
        },
        ..WorkerSpec::default()
    }
}

impl Engine {
    /// Whether its KV events are followed: there are some, and the tokens that they tell of can be had for prompts.
    pub(super) fn has_events(&self) -> bool {
        self.config.kv_events.is_some() && self.text.get().is_some()
    }
}

impl RouterState {
    /// Follows the engine's KV events for as long as the worker is there.
    pub(super) fn follow_kv_events(&self, worker: &Arc<EngineWorker>, spec: WorkerSpec) {
        let config = &worker.engine.config;
        let Some(events) = config.kv_events.clone() else {
            return;
        };
        let source = KvEventSource {
            spec,
            events,
            replay: config.kv_replay.clone(),
            topic: config.kv_topic.clone(),
        };
        let series = self.metrics.kv_events.worker(&worker.name);
        let (workers, clock) = (Arc::clone(&self.workers), self.clock);
        let (id, caching) = (worker.id, Arc::clone(&worker.caching));
        let (gone, shutdown) = (worker.gone.clone(), self.tasks.shutdown_token().clone());
        self.tasks.spawn(async move {
            let following = follow(source, series, |event| {
                caching.heard(clock.now());
                workers.apply_kv_event(id, event)
            });
            tokio::select! {
                biased;
                () = gone.cancelled() => {}
                () = shutdown.cancelled() => {}
                () = following => {}
            }
        });
    }
}
