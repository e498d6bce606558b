//! What a step's answer can get wrong.

/// A step's output does not belong to the step that executes. Nothing changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StepError {
    /// No step executes.
    #[error("output of step {got} came while no step executes")]
    NoStep {
        /// The step that was answered.
        got: u64,
    },
    /// Another step executes.
    #[error("output of step {got} came while step {expected} executes")]
    WrongStep {
        /// The step that executes.
        expected: u64,
        /// The step that was answered.
        got: u64,
    },
    /// Not one token for each sample of the plan.
    #[error("{got} tokens were drawn, the plan has {expected} samples")]
    WrongTokenCount {
        /// Samples of the plan.
        expected: usize,
        /// Tokens of the output.
        got: usize,
    },
    /// Not one entry of log-probabilities for each sample of a plan that wants some.
    #[error("{got} entries of log-probabilities came, the plan has {expected} samples")]
    WrongLogprobCount {
        /// Samples of the plan.
        expected: usize,
        /// Entries of the output.
        got: usize,
    },
}
