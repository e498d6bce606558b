//! What chat and completions answers have in common: the envelope around their choices.

use std::time::{SystemTime, UNIX_EPOCH};

use orchestra_core::TokenId;
use serde::Serialize;

use super::usage::Usage;

/// Who answers what, the same in each event and body of one request.
#[derive(Clone, Debug)]
pub(super) struct Envelope {
    id: String,
    object: &'static str,
    created: u64,
    model: String,
}

impl Envelope {
    /// A fresh identity, `prefix` and 32 hexadecimal digits, made now.
    pub(super) fn new(prefix: &str, object: &'static str, model: &str) -> Self {
        let created = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
            .as_secs();
        let id = format!("{prefix}-{:032x}", fastrand::u128(..));
        Self {
            id,
            object,
            created,
            model: model.to_owned(),
        }
    }

    /// Makes snapshots of answers comparable.
    #[cfg(test)]
    pub(super) fn fix_identity(&mut self, id: &str) {
        id.clone_into(&mut self.id);
        self.created = 1_700_000_000;
    }

    /// The JSON object around `choices`.
    pub(super) fn around<'a, C: Serialize>(&'a self, choices: &'a [C]) -> Answer<'a, C> {
        let Self {
            id,
            object,
            created,
            model,
        } = self;
        Answer {
            id,
            object,
            created: *created,
            model,
            choices,
            usage: UsageField::Absent,
            prompt_token_ids: None,
        }
    }
}

/// One event, or the whole answer.
#[derive(Debug, Serialize)]
pub(super) struct Answer<'a, C> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: &'a [C],
    #[serde(skip_serializing_if = "UsageField::is_absent")]
    pub(super) usage: UsageField,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) prompt_token_ids: Option<&'a [TokenId]>,
}

/// The key `usage`.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(untagged)]
pub(super) enum UsageField {
    /// No such key.
    Absent,
    /// `null`: OpenAI writes it in each event before the one that has the usage.
    Later,
    /// What was used.
    Known(Usage),
}

impl UsageField {
    fn is_absent(&self) -> bool {
        matches!(self, Self::Absent)
    }

    /// For an event before the last.
    pub(super) fn before_the_end(include_usage: bool) -> Self {
        if include_usage {
            Self::Later
        } else {
            Self::Absent
        }
    }
}
