//! Models of foreign engines: a name, and the engines that have it. Their text is the engines' own affair.

use std::{
    collections::BTreeMap,
    sync::{Arc, OnceLock, atomic::Ordering::Relaxed},
    time::SystemTime,
};

use orchestra_core::scheduler::WorkerId;

use super::{ModelInfo, ModelText, Models, epoch_seconds};

/// Most models of all foreign engines together; an engine may list hundreds of adapters.
const FOREIGN_MODELS_MAX: usize = 4096;

/// A model of foreign engines.
pub(crate) struct ForeignModel {
    /// The name that clients use.
    pub(crate) name: String,
    /// How its engines tokenise, from the files that came with the first engine that has some.
    pub(crate) text: OnceLock<Arc<ModelText>>,
}

/// Why an engine's model was not taken in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ForeignModelError {
    #[error("a model of this name is served by Orchestra's own workers")]
    ServedByWorkers,
    #[error("there are {FOREIGN_MODELS_MAX} models of engines already")]
    TooMany,
}

/// What is known of a foreign model. It stays as long as an engine has it, whether or not that answers now.
pub(super) struct Foreign {
    model: Arc<ForeignModel>,
    /// With the context that each says it has.
    workers: Vec<(WorkerId, Option<u32>)>,
    created: SystemTime,
}

pub(super) type ForeignModels = BTreeMap<String, Foreign>;

impl Models {
    /// The foreign model of this name; also one whose engines are away.
    pub(crate) fn foreign(&self, name: &str) -> Option<Arc<ForeignModel>> {
        let foreign = self.foreign.read();
        foreign.get(name).map(|foreign| Arc::clone(&foreign.model))
    }

    /// Whether there are foreign models at all.
    pub(crate) fn has_foreign(&self) -> bool {
        !self.foreign.read().is_empty()
    }

    /// Adds an engine to a model. A name is served by Orchestra's workers or by engines, not by both: they write text
    /// differently, so a request could not be continued from one to the other.
    pub(crate) fn attach_foreign(
        &self,
        name: &str,
        worker: WorkerId,
        max_model_len: Option<u32>,
        text: Option<&Arc<ModelText>>,
    ) -> Result<(), ForeignModelError> {
        let served = self.served.read();
        if served
            .get(name)
            .is_some_and(|served| !served.workers.is_empty())
        {
            return Err(ForeignModelError::ServedByWorkers);
        }
        let mut foreign = self.foreign.write();
        if foreign.len() >= FOREIGN_MODELS_MAX && !foreign.contains_key(name) {
            return Err(ForeignModelError::TooMany);
        }
        let entry = foreign.entry(name.to_owned()).or_insert_with(|| Foreign {
            model: Arc::new(ForeignModel {
                name: name.to_owned(),
                text: OnceLock::new(),
            }),
            workers: Vec::new(),
            created: SystemTime::now(),
        });
        entry.workers.push((worker, max_model_len));
        if let Some(text) = text {
            entry.model.text.get_or_init(|| Arc::clone(text));
        }
        self.has_had_any.store(true, Relaxed);
        Ok(())
    }

    /// Takes an engine off a model.
    pub(crate) fn detach_foreign(&self, name: &str, worker: WorkerId) {
        let mut foreign = self.foreign.write();
        if let Some(entry) = foreign.get_mut(name) {
            entry.workers.retain(|&(id, _)| id != worker);
            if entry.workers.is_empty() {
                foreign.remove(name);
            }
        }
    }

    /// The foreign models that have an engine of those that `is_up` knows, in no order.
    pub(crate) fn list_foreign(&self, is_up: impl Fn(WorkerId) -> bool) -> Vec<ModelInfo> {
        let foreign = self.foreign.read();
        let present = foreign.values().filter_map(|foreign| {
            let up = foreign.workers.iter().filter(|&&(id, _)| is_up(id));
            let num_workers = up.clone().count() as u32;
            (num_workers > 0).then(|| ModelInfo {
                id: foreign.model.name.clone(),
                max_model_len: up.filter_map(|&(_, length)| length).max().unwrap_or(0),
                num_workers,
                created: epoch_seconds(foreign.created),
            })
        });
        present.collect()
    }
}
