//! Starting over: for a replica that has lost a part of its KV, and with it the use of all of it.

use super::scheduler::StepScheduler;
use crate::ids::RequestId;

impl StepScheduler {
    /// Gives up the step that executes, if one does, and forgets everything computed: every request ends and is named
    /// as by [`abort_all`](Self::abort_all), nothing is cached any more, in host memory neither, and the next [`take_kv_events`] says
    /// `Cleared`.
    ///
    /// Nobody may go on executing that step. Blocks that are held for other workers stay theirs until released, but
    /// what they hold is found by nobody else.
    ///
    /// [`take_kv_events`]: Self::take_kv_events
    pub fn forget_all(&mut self) -> Vec<RequestId> {
        let ended = self.abort_all();
        self.executing = None;
        self.pool.forget_cached();
        ended
    }
}
