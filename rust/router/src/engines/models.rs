//! The models of engines as workers of the scheduler: one for each model on each engine.

use std::sync::Arc;

use orchestra_core::{
    hash::SeedParts,
    scheduler::{KvSource, NAME_BYTES_MAX, SchedulerError, WorkerSpec},
};

use super::{
    engine::{Engine, EngineWorker, Status},
    probe::EngineModel,
};
use crate::{models::ForeignModelError, state::RouterState};

/// "Tokens" of a chunk of text, each four bytes of it: the scheduler's block on engines.
pub(crate) const CHUNK_TOKENS: u32 = 32;
/// KV blocks of an engine that does not say how many it has: more than any has.
const NUM_BLOCKS_UNKNOWN: u32 = 1 << 24;
/// Chunks that an engine is taken to remember at most: 2 MiB of text, which is about half a million tokens.
const CHUNKS_ASSUMED_MAX: u32 = 16 << 10;

impl RouterState {
    /// Takes in the models that the engine has now, and lets go of those that it had.
    pub(super) fn update_models(
        &self,
        engine: &Arc<Engine>,
        status: &mut Status,
        models: &[EngineModel],
    ) {
        let is_listed =
            |worker: &Arc<EngineWorker>| models.iter().any(|model| model.id == worker.model);
        let (kept, gone): (Vec<_>, Vec<_>) = std::mem::take(&mut status.workers)
            .into_iter()
            .partition(is_listed);
        status.workers = kept;
        for worker in gone {
            self.detach_model(&worker);
        }
        for model in models {
            if status.workers.iter().any(|worker| worker.model == model.id) {
                continue;
            }
            match self.attach_model(engine, model) {
                Ok(worker) => {
                    self.workers
                        .set_foreign_available(worker.id, status.was_available);
                    status.workers.push(worker);
                }
                Err(error) => {
                    let (url, model) = (&engine.config.url, &model.id);
                    tracing::warn!(%url, model, %error, "the engine's model is not served");
                }
            }
        }
    }

    fn attach_model(
        &self,
        engine: &Arc<Engine>,
        model: &EngineModel,
    ) -> Result<Arc<EngineWorker>, AttachModelError> {
        let config = &engine.config;
        let num_blocks = config
            .kv_tokens
            .map_or(NUM_BLOCKS_UNKNOWN, |tokens| tokens.div_ceil(CHUNK_TOKENS));
        let spec = WorkerSpec {
            name: worker_name(config.url.as_str(), &model.id),
            model: model.id.clone(),
            block_size: CHUNK_TOKENS,
            num_blocks,
            max_num_seqs: config.max_num_seqs,
            // Text is not counted in tokens here: the engine says itself what is too long for it.
            max_model_len: u32::MAX,
            kv_source: KvSource::Assumed {
                max_blocks: num_blocks.min(CHUNKS_ASSUMED_MAX),
                ttl_s: 0,
            },
            ..WorkerSpec::default()
        };
        let name = spec.name.clone();
        let id = self.workers.add_foreign(spec)?;
        let attached = self
            .models
            .attach_foreign(&model.id, id, model.max_model_len);
        if let Err(error) = attached {
            self.workers.remove_foreign(id);
            return Err(error.into());
        }
        let worker = Arc::new(EngineWorker {
            id,
            name,
            model: model.id.clone(),
            engine: Arc::clone(engine),
        });
        self.engines.workers.write().insert(id, Arc::clone(&worker));
        Ok(worker)
    }

    pub(super) fn detach_model(&self, worker: &EngineWorker) {
        self.engines.workers.write().remove(&worker.id);
        self.workers.remove_foreign(worker.id);
        self.models.detach_foreign(&worker.model, worker.id);
    }
}

/// Why a model of an engine is not served.
#[derive(Debug, thiserror::Error)]
enum AttachModelError {
    #[error(transparent)]
    Scheduler(#[from] SchedulerError),
    #[error(transparent)]
    Model(#[from] ForeignModelError),
}

/// Unique, the same after a restart, and within the length of a name.
fn worker_name(url: &str, model: &str) -> String {
    let name = format!("{url} {model}");
    if name.len() <= NAME_BYTES_MAX {
        return name;
    }
    let hash = SeedParts {
        model,
        ..SeedParts::default()
    };
    let room = NAME_BYTES_MAX - 17;
    format!("{} {:016x}", &url[..url.len().min(room)], hash.seed().0)
}
