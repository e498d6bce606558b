//! What can go wrong for the caller of an [`Agent`](crate::Agent).

use std::io;

use orchestra_core::{ErrorCode, config::ConfigIssue, step::StepError};

use crate::plan_codec::OutputError;

/// A failed call. Nothing has changed, except where the variant says so.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// Settings are wrong; every problem is listed.
    #[error("invalid agent settings: {}", list(.0))]
    InvalidConfig(Vec<ConfigIssue>),
    /// The network thread could not be started.
    #[error("the agent's network thread could not be started")]
    Start(#[source] io::Error),
    /// The agent was closed.
    #[error("the agent is closed")]
    Closed,
    /// Executing a step failed earlier; the agent takes no more work.
    #[error("the agent has failed: {0}")]
    Failed(String),
    /// As many steps as may be in flight are not committed; this is the oldest.
    #[error("step {0} was handed out and is not committed yet")]
    StepOutstanding(u64),
    /// This is not the oldest step that was handed out and not committed.
    #[error("step {0} is not the step whose answer is due")]
    UnknownStep(u64),
    /// The answer to a step does not fit its plan.
    #[error(transparent)]
    Output(#[from] OutputError),
    /// A plan could not be written down.
    #[error("the step plan could not be encoded")]
    Encode(#[from] rmp_serde::encode::Error),
    /// The scheduler refused the answer to a step.
    #[error("the step's answer was refused: {0}")]
    Step(#[source] StepError),
}

impl AgentError {
    /// The code under which callers see the error.
    pub const fn code(&self) -> ErrorCode {
        match self {
            Self::InvalidConfig(_) => ErrorCode::InvalidConfig,
            Self::Closed => ErrorCode::ShuttingDown,
            Self::Output(_) | Self::StepOutstanding(_) | Self::UnknownStep(_) => {
                ErrorCode::InvalidRequest
            }
            Self::Start(_) | Self::Failed(_) | Self::Encode(_) | Self::Step(_) => {
                ErrorCode::Internal
            }
        }
    }
}

pub(crate) fn list(issues: &[ConfigIssue]) -> String {
    let lines: Vec<String> = issues.iter().map(ToString::to_string).collect();
    lines.join("; ")
}
