//! What is wrong with a setting, in one shape for every config of the workspace.

/// One setting that cannot be used. A validator returns all of them at once.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{key}: {message}")]
pub struct ConfigIssue {
    /// The setting as it is spelled in files and flags.
    pub key: String,
    /// What is wrong with it, with the arithmetic where several settings have to agree.
    pub message: String,
}

impl ConfigIssue {
    /// An issue with `key`.
    pub fn new(key: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            key: key.into(),
            message: message.into(),
        }
    }
}
