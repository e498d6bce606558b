//! Who may call. Without keys everyone may; then only the network guards the router.

use std::sync::Arc;

use orchestra_core::ErrorCode;

use crate::{config::Secret, error::ApiError};

/// The keys that open the client doors.
#[derive(Clone, Debug, Default)]
pub(crate) struct ApiKeys(Arc<[Secret]>);

impl ApiKeys {
    /// Any of `keys` will do.
    pub(crate) fn new(keys: &[Secret]) -> Self {
        Self(keys.into())
    }

    /// Checks the value of an `authorization` header, of HTTP or of gRPC metadata.
    pub(crate) fn check(&self, authorization: Option<&[u8]>) -> Result<(), ApiError> {
        if self.0.is_empty() {
            return Ok(());
        }
        let error = |message| Err(ApiError::new(ErrorCode::Unauthenticated, message));
        let Some(value) = authorization else {
            return error("an API key is required: send the header Authorization: Bearer KEY");
        };
        let key = match value.split_at_checked(7) {
            Some((scheme, key)) if scheme.eq_ignore_ascii_case(b"bearer ") => key.trim_ascii(),
            _ => return error("the Authorization header must be: Bearer KEY"),
        };
        // Every key is compared, so that the time does not tell which one is close.
        let matches = self
            .0
            .iter()
            .fold(false, |found, secret| found | secret.matches(key));
        if matches {
            Ok(())
        } else {
            error("the API key is not valid")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_key_opens_and_nothing_else_does() {
        let keys = ApiKeys::new(&["sk-a".parse().unwrap(), "sk-b".parse().unwrap()]);
        for value in ["Bearer sk-a", "bearer sk-b", "BEARER  sk-b "] {
            assert!(keys.check(Some(value.as_bytes())).is_ok(), "{value}");
        }
        for value in [
            "",
            "sk-a",
            "Basic sk-a",
            "Bearer",
            "Bearer ",
            "Bearer sk-c",
            "Bearer sk-ab",
        ] {
            let error = keys.check(Some(value.as_bytes())).unwrap_err();
            assert_eq!(error.code, ErrorCode::Unauthenticated);
            assert!(!error.message.contains("sk-"), "{}", error.message);
        }
        assert!(keys.check(None).is_err());
    }

    #[test]
    fn without_keys_everyone_may() {
        assert!(ApiKeys::default().check(None).is_ok());
    }
}
