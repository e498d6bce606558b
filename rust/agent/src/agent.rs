//! The handle that the engine drives: four verbs, callable from any thread.

use std::{sync::Arc, thread::JoinHandle, time::Duration};

use orchestra_core::{
    config::ConfigIssue,
    step::{StepOutput, StepPlan},
};
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::{
    attach::{self, Network},
    config::AgentConfig,
    error::AgentError,
    kv::{self, Inbox, Mover, Order, pool::KvPool},
    load::{AgentStats, LoadBoard},
    plan_codec::{OutputBuffers, encode_plan},
    step_loop::{KvLink, StepLoop},
};

/// Commands from the router that may wait for the step loop. When it is full, the network side stops reading, and
/// HTTP/2 flow control holds the router back.
const COMMANDS_MAX: usize = 1024;

/// A worker's side of the router: takes sequences in, plans steps, sends tokens out.
///
/// One thread drives it: `next_step`, execute, `commit`, repeat. As many steps may be handed out before the first is
/// committed as the scheduler's `max_steps_in_flight` says. The other calls may come from any thread, also while
/// `next_step` waits.
#[derive(Debug)]
pub struct Agent {
    /// Held by whoever drives the steps, so never contended but by `close`.
    step_loop: Mutex<StepLoop>,
    board: Arc<LoadBoard>,
    closing: CancellationToken,
    network: Mutex<Option<JoinHandle<()>>>,
    /// The inbox of the thread that moves KV, and the thread.
    kv: Option<Arc<Inbox>>,
    mover: Mutex<Option<JoinHandle<()>>>,
}

impl Agent {
    /// Checks the settings and starts to attach to the router, which need not be there yet.
    ///
    /// The worker announces itself with the first `next_step`, so that no sequence waits for a model that loads.
    pub fn new(config: AgentConfig) -> Result<Self, AgentError> {
        Self::start(config, None)
    }

    /// As [`new`](Self::new), for an engine whose KV lies in `pool`: it can move to other workers, and come from them.
    pub fn with_kv(config: AgentConfig, pool: Arc<KvPool>) -> Result<Self, AgentError> {
        check_pool(&config, &pool)?;
        Self::start(config, Some(pool))
    }

    fn start(config: AgentConfig, pool: Option<Arc<KvPool>>) -> Result<Self, AgentError> {
        config.validate().map_err(AgentError::InvalidConfig)?;
        let config = Arc::new(config);
        let board = Arc::new(LoadBoard::default());
        let closing = CancellationToken::new();
        let (sender, receiver) = mpsc::channel(COMMANDS_MAX);
        let inbox = pool.as_ref().map(|_| Inbox::new()).transpose();
        let inbox = inbox.map_err(AgentError::Start)?.map(Arc::new);
        let block_size = config.scheduler.block_size;
        let link = pool.clone().zip(inbox.clone());
        let link = link.map(|(pool, inbox)| KvLink::new(pool, inbox, block_size));

        let step_loop = StepLoop::new(
            Arc::clone(&config),
            receiver,
            Arc::clone(&board),
            closing.clone(),
            link,
        )?;
        let mover = pool.zip(inbox.clone()).map(|(pool, inbox)| {
            let worker_id = config.worker_id.clone();
            let commands = sender.downgrade();
            Mover::new(pool, inbox, commands, worker_id, Arc::clone(&board))
        });
        let network = Network::new(
            config,
            sender,
            Arc::clone(&board),
            closing.clone(),
            inbox.clone(),
        )?;
        let thread = attach::start(network).map_err(AgentError::Start)?;
        let mover = mover.map(kv::start).transpose();
        Ok(Self {
            step_loop: Mutex::new(step_loop),
            board,
            closing,
            network: Mutex::new(Some(thread)),
            kv: inbox,
            mover: Mutex::new(mover.map_err(AgentError::Start)?),
        })
    }

    /// The next step to execute; `None` when there was nothing to do for `timeout`. Sleeps while it waits.
    ///
    /// # Errors
    /// [`AgentError::StepOutstanding`] where as many steps as may be are not committed, [`AgentError::Closed`] and
    /// [`AgentError::Failed`] when the agent has ended.
    pub fn next_step(&self, timeout: Duration) -> Result<Option<StepPlan>, AgentError> {
        self.step_loop.lock().next_step(timeout)
    }

    /// [`next_step`](Self::next_step) as the shards read it: flat arrays, see [`plan_codec`](crate::plan_codec).
    pub fn next_step_encoded(&self, timeout: Duration) -> Result<Option<Vec<u8>>, AgentError> {
        let Some(plan) = self.next_step(timeout)? else {
            return Ok(None);
        };
        Ok(Some(encode_plan(&plan)?))
    }

    /// Hands in what the model drew for the oldest step that is not committed, and sends the tokens to the router.
    ///
    /// # Errors
    /// An answer that does not fit its plan is refused and changes nothing: the step can still be committed.
    pub fn commit(&self, output: &StepOutput) -> Result<(), AgentError> {
        self.step_loop.lock().commit(output)
    }

    /// [`commit`](Self::commit) of raw little-endian arrays, as the shards compute them.
    pub fn commit_buffers(
        &self,
        step_id: u64,
        buffers: &OutputBuffers<'_>,
    ) -> Result<(), AgentError> {
        self.step_loop.lock().commit_buffers(step_id, buffers)
    }

    /// The KV of layer `layer`, and of those before it, is where step `step_id` puts it. For steps whose plan says
    /// `fills_blocks`, from the thread that executes them; whoever does not call it lets the blocks go with the commit.
    pub fn layer_done(&self, step_id: u64, layer: u32) {
        if let Some(inbox) = &self.kv {
            inbox.progress(step_id, layer.saturating_add(1));
        }
    }

    /// Gives up: executing a step failed, so its KV cannot be trusted. Every sequence ends with `worker_failed` and
    /// this message, the stream to the router ends, and `next_step` fails from now on.
    pub fn fail(&self, message: &str) {
        self.step_loop.lock().fail(message);
    }

    /// Gives up the step that was handed out, if one was, and everything computed so far: a part of its KV is lost,
    /// and the engine can have that part again. Every sequence ends, the prefix cache is empty, and the stream to the
    /// router ends, so that the router replays the sequences elsewhere and sends nothing new. The next
    /// [`next_step`](Self::next_step) attaches again.
    ///
    /// # Errors
    /// [`AgentError::Closed`] and [`AgentError::Failed`] when the agent has ended.
    pub fn start_over(&self) -> Result<(), AgentError> {
        self.step_loop.lock().start_over()
    }

    /// Refuses new sequences from now on with `shutting_down`; those that run or wait go on.
    pub fn drain(&self) {
        self.board.update(|stats| stats.is_draining = true);
    }

    /// Figures since start.
    pub fn stats(&self) -> AgentStats {
        self.board.read()
    }

    /// Whether no sequence runs or waits.
    pub fn is_idle(&self) -> bool {
        self.board.read().is_idle()
    }

    /// Whether a router's stream is open.
    pub fn is_attached(&self) -> bool {
        self.board.read().is_attached
    }

    /// Sends what is left to send, ends the stream and the network thread. `next_step` returns
    /// [`AgentError::Closed`], also where it waits now. Takes at most [`AgentConfig::close_grace`]; again does nothing.
    pub fn close(&self) {
        self.closing.cancel();
        self.step_loop.lock().close();
        if let Some(thread) = self.network.lock().take()
            && thread.join().is_err()
        {
            tracing::error!("the agent's network thread panicked");
        }
        if let Some(inbox) = &self.kv {
            inbox.order(Order::Stop);
        }
        if let Some(thread) = self.mover.lock().take()
            && thread.join().is_err()
        {
            tracing::error!("the agent's thread that moves KV panicked");
        }
    }
}

/// A pool for another number of blocks, or without a prefix cache to fill, is of no use.
fn check_pool(config: &AgentConfig, pool: &KvPool) -> Result<(), AgentError> {
    let mut issues = Vec::new();
    let (blocks, held) = (config.scheduler.num_blocks, pool.config().num_blocks);
    if blocks != held {
        let message = format!("is {blocks}, the KV pool has {held}");
        issues.push(ConfigIssue::new("scheduler.num_blocks", message));
    }
    let (blocks, held) = (
        config.scheduler.num_host_blocks,
        pool.config().num_host_blocks,
    );
    if blocks != held {
        let message = format!("is {blocks}, the KV pool has {held}");
        issues.push(ConfigIssue::new("scheduler.num_host_blocks", message));
    }
    if !config.scheduler.enable_prefix_cache {
        let message = "must be true where KV moves: it is what moved KV fills";
        issues.push(ConfigIssue::new("scheduler.enable_prefix_cache", message));
    }
    if issues.is_empty() {
        Ok(())
    } else {
        Err(AgentError::InvalidConfig(issues))
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.close();
    }
}
