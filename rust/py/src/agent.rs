//! The worker's side of the router, for `orchestra.worker`.

use std::time::Duration;

use orchestra_agent::{AgentConfig, OutputBuffers};
use pyo3::{
    prelude::*,
    types::{PyBytes, PyDict},
};

use crate::{
    errors::Failure,
    kv_pool::KvPool,
    values::{config_from, to_dict},
};

/// An array that was not asked for.
const EMPTY: &[u8] = b"";

/// Attaches to a router, takes sequences in, plans steps and sends tokens out.
#[pyclass(frozen, module = "orchestra._core")]
pub(crate) struct Agent {
    inner: orchestra_agent::Agent,
}

#[pymethods]
impl Agent {
    #[new]
    #[pyo3(signature = (config, kv_pool = None))]
    fn new(
        py: Python<'_>,
        config: &Bound<'_, PyDict>,
        kv_pool: Option<&Bound<'_, KvPool>>,
    ) -> PyResult<Self> {
        let config: AgentConfig = config_from(config)?;
        let pool = kv_pool.map(|pool| pool.get().inner());
        let inner = py
            .detach(|| match pool {
                Some(pool) => orchestra_agent::Agent::with_kv(config, pool),
                None => orchestra_agent::Agent::new(config),
            })
            .map_err(Failure::from)?;
        Ok(Self { inner })
    }

    /// The next step plan, or `None` when there was nothing to do for `timeout_ms`.
    #[pyo3(signature = (timeout_ms = 200))]
    fn next_step<'py>(
        &self,
        py: Python<'py>,
        timeout_ms: u64,
    ) -> PyResult<Option<Bound<'py, PyBytes>>> {
        let timeout = Duration::from_millis(timeout_ms);
        let plan = py
            .detach(|| self.inner.next_step_encoded(timeout))
            .map_err(Failure::from)?;
        Ok(plan.map(|plan| PyBytes::new(py, &plan)))
    }

    /// Hands in what the model drew for the step handed out last.
    #[pyo3(
        signature = (step_id, token_ids, chosen_logprobs = EMPTY, top_ids = EMPTY, top_logprobs = EMPTY),
        text_signature = "($self, step_id, token_ids, chosen_logprobs=b\"\", top_ids=b\"\", top_logprobs=b\"\")"
    )]
    #[expect(
        clippy::too_many_arguments,
        reason = "one array each, as the shards compute them"
    )]
    fn commit(
        &self,
        py: Python<'_>,
        step_id: u64,
        token_ids: &[u8],
        chosen_logprobs: &[u8],
        top_ids: &[u8],
        top_logprobs: &[u8],
    ) -> PyResult<()> {
        let buffers = OutputBuffers {
            token_ids,
            chosen_logprobs,
            top_ids,
            top_logprobs,
        };
        let committed = py.detach(|| self.inner.commit_buffers(step_id, &buffers));
        Ok(committed.map_err(Failure::from)?)
    }

    /// The KV of a layer, and of those before it, is where the step puts it.
    fn layer_done(&self, step_id: u64, layer: u32) {
        self.inner.layer_done(step_id, layer);
    }

    /// Ends every sequence as failed: executing a step went wrong, so its KV cannot be trusted.
    fn fail(&self, py: Python<'_>, message: &str) {
        py.detach(|| self.inner.fail(message));
    }

    /// Forgets everything computed and lets go of the router; the next `next_step` attaches again.
    fn start_over(&self, py: Python<'_>) -> PyResult<()> {
        Ok(py
            .detach(|| self.inner.start_over())
            .map_err(Failure::from)?)
    }

    /// Refuses new sequences from now on; those that run or wait go on.
    fn drain(&self) {
        self.inner.drain();
    }

    /// Figures since start, by name.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        to_dict(py, &self.inner.stats())
    }

    /// Whether no sequence runs or waits.
    #[getter]
    fn is_idle(&self) -> bool {
        self.inner.is_idle()
    }

    /// Whether a router's stream is open.
    #[getter]
    fn is_attached(&self) -> bool {
        self.inner.is_attached()
    }

    /// Sends what is left to send and ends the stream. Again does nothing.
    fn close(&self, py: Python<'_>) {
        py.detach(|| self.inner.close());
    }
}
