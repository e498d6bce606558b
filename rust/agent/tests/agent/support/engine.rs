//! An engine without a model: what it draws is known beforehand, and it can be stopped in the middle of a step.

use std::{
    sync::Arc,
    thread::{self, JoinHandle},
    time::Duration,
};

use orchestra_agent::{Agent, AgentConfig, AgentError};
use orchestra_core::step::{StepOutput, StepPlan, TokenLogprobs};
use parking_lot::{Condvar, Mutex};

use super::{PATIENCE, drawn_token, eventually};

/// A thread that drives an agent.
pub(crate) struct Engine {
    pub(crate) agent: Arc<Agent>,
    gate: Arc<Gate>,
    thread: Option<JoinHandle<AgentError>>,
}

/// Where the engine stands still while it is held: between a plan and its commit.
#[derive(Default)]
struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Default)]
struct GateState {
    is_closed: bool,
    /// Steps that may pass although it is closed.
    permits: u32,
    is_waiting: bool,
}

impl Engine {
    pub(crate) fn start(config: AgentConfig) -> Self {
        let agent = Arc::new(Agent::new(config).unwrap());
        let gate = Arc::new(Gate::default());
        let thread = thread::spawn({
            let (agent, gate) = (Arc::clone(&agent), Arc::clone(&gate));
            move || drive(&agent, &gate)
        });
        Self {
            agent,
            gate,
            thread: Some(thread),
        }
    }

    /// From now on a step that is handed out stays so.
    pub(crate) fn hold(&self) {
        self.gate.state.lock().is_closed = true;
    }

    /// Waits until a step is being held.
    pub(crate) fn wait_until_held(&self) {
        let mut state = self.gate.state.lock();
        while !state.is_waiting {
            let timed_out = self.gate.changed.wait_for(&mut state, PATIENCE).timed_out();
            assert!(!timed_out, "no step is executed");
        }
    }

    /// Lets the held step be committed, and waits until the next one is held.
    pub(crate) fn step(&self) {
        let mut state = self.gate.state.lock();
        state.permits += 1;
        state.is_waiting = false;
        drop(state);
        self.gate.changed.notify_all();
        self.wait_until_held();
    }

    /// Waits until `count` commands of the router stand before the step loop.
    pub(crate) fn wait_for_commands(&self, count: u32) {
        eventually("the commands arrive", || {
            self.agent.stats().commands_waiting == count
        });
    }

    /// Lets the held step, and those after it, be committed.
    pub(crate) fn release(&self) {
        self.gate.state.lock().is_closed = false;
        self.gate.changed.notify_all();
    }

    /// Closes the agent; returns what `next_step` said to the engine in the end.
    pub(crate) fn close(mut self) -> AgentError {
        self.release();
        self.agent.close();
        self.join()
    }

    /// Waits for the engine to end by itself.
    pub(crate) fn join(&mut self) -> AgentError {
        self.thread.take().unwrap().join().unwrap()
    }
}

fn drive(agent: &Agent, gate: &Gate) -> AgentError {
    loop {
        match agent.next_step(Duration::from_millis(200)) {
            Ok(Some(plan)) => {
                gate.pass();
                if let Err(error) = agent.commit(&execute(&plan)) {
                    return error;
                }
            }
            Ok(None) => {}
            Err(error) => return error,
        }
    }
}

impl Gate {
    fn pass(&self) {
        let mut state = self.state.lock();
        while state.is_closed && state.permits == 0 {
            state.is_waiting = true;
            self.changed.notify_all();
            self.changed.wait(&mut state);
        }
        state.permits = state.permits.saturating_sub(1);
        state.is_waiting = false;
    }
}

/// Draws [`drawn_token`] for each sample.
pub(crate) fn execute(plan: &StepPlan) -> StepOutput {
    let wants_logprobs = plan.samples.iter().any(|sample| sample.logprobs.is_some());
    let logprobs = plan.samples.iter().map(|sample| {
        sample.logprobs.map(|count| TokenLogprobs {
            chosen: -0.5,
            top: (0..count).map(|id| (id, -1.0)).collect(),
        })
    });
    StepOutput {
        step_id: plan.step_id,
        token_ids: plan
            .samples
            .iter()
            .map(|sample| drawn_token(sample.position))
            .collect(),
        logprobs: if wants_logprobs {
            logprobs.collect()
        } else {
            Vec::new()
        },
    }
}
