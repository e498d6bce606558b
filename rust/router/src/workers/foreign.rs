//! Models on foreign engines, as the scheduler sees them: workers without a stream. What runs on them and how they do is
//! known to [`crate::engines`].

use std::sync::Arc;

use orchestra_core::scheduler::{SchedulerError, WorkerId, WorkerSpec};

use super::Workers;

impl Workers {
    /// Takes an engine's model in. It is chosen once it is said to be available.
    pub(crate) fn add_foreign(
        self: &Arc<Self>,
        spec: WorkerSpec,
    ) -> Result<WorkerId, SchedulerError> {
        self.change(|pool| {
            let worker = pool.scheduler.add_worker(spec)?;
            pool.scheduler.set_draining(worker, true);
            Ok(worker)
        })
    }

    /// Lets it go.
    pub(crate) fn remove_foreign(self: &Arc<Self>, worker: WorkerId) {
        self.change(|pool| pool.scheduler.remove_worker(worker));
    }

    /// From now on it is chosen, or it is not.
    pub(crate) fn set_foreign_available(self: &Arc<Self>, worker: WorkerId, is_available: bool) {
        self.change(|pool| pool.scheduler.set_draining(worker, !is_available));
        if is_available {
            self.arrivals.announce();
        }
    }

    /// Blocks that the worker of this name is known to hold.
    #[cfg(test)]
    pub(crate) fn cached_blocks(&self, name: &str) -> Option<u32> {
        let pool = self.pool.lock();
        let mut workers = pool.scheduler.workers();
        let (_, snapshot) = workers.find(|(_, snapshot)| snapshot.spec.name == name)?;
        Some(snapshot.num_cached_blocks)
    }
}
