//! The models of engines as workers of the scheduler: one for each model on each engine.

use std::sync::Arc;

use orchestra_core::{
    hash::SeedParts,
    scheduler::{NAME_BYTES_MAX, SchedulerError},
};

use super::{
    caching::Caching,
    engine::{Engine, EngineWorker, Status},
    exact,
    probe::EngineModel,
};
use crate::{models::ForeignModelError, state::RouterState};

/// "Tokens" of a chunk of text, each four bytes of it: the scheduler's block on engines.
pub(crate) const CHUNK_TOKENS: u32 = 32;
/// KV blocks of an engine that does not say how many it has: more than any has.
pub(super) const NUM_BLOCKS_UNKNOWN: u32 = 1 << 24;
/// Chunks that an engine is taken to remember at most: 2 MiB of text, which is about half a million tokens.
pub(super) const CHUNKS_ASSUMED_MAX: u32 = 16 << 10;

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
            // Events tell of the engine's one cache, which its first model fills; the others are adapters of that.
            let has_events = engine.has_events() && models[0].id == model.id;
            match self.attach_model(engine, model, has_events) {
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
        has_events: bool,
    ) -> Result<Arc<EngineWorker>, AttachModelError> {
        let name = worker_name(engine.config.url.as_str(), &model.id);
        let spec = exact::spec(engine, name.clone(), &model.id, has_events);
        let id = self.workers.add_foreign(spec.clone())?;
        let text = engine.text.get();
        let attached = self
            .models
            .attach_foreign(&model.id, id, model.max_model_len, text);
        if let Err(error) = attached {
            self.workers.remove_foreign(id);
            return Err(error.into());
        }
        let series = self.metrics.kv_events.cache(&name);
        let worker = Arc::new(EngineWorker {
            id,
            caching: Arc::new(Caching::new(name.clone(), has_events, series)),
            name,
            model: model.id.clone(),
            engine: Arc::clone(engine),
            gone: engine.removed.child_token(),
        });
        if has_events {
            self.follow_kv_events(&worker, spec);
        }
        self.engines.workers.write().insert(id, Arc::clone(&worker));
        Ok(worker)
    }

    pub(super) fn detach_model(&self, worker: &EngineWorker) {
        worker.gone.cancel();
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
