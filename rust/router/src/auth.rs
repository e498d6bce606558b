//! Who may call. Without keys everyone may; then only the network guards the router.

use std::sync::Arc;

use orchestra_core::ErrorCode;

use crate::{
    config::Secret,
    error::ApiError,
    tenants::{Tenant, TenantConfig, Tenants},
};

/// The keys that open a door, and whose they are.
#[derive(Clone, Debug, Default)]
pub(crate) struct ApiKeys {
    keys: Arc<[(Secret, Arc<Tenant>)]>,
    anonymous: Arc<Tenant>,
}

impl ApiKeys {
    /// Any of `keys` will do.
    pub(crate) fn new(keys: &[Secret]) -> Self {
        Self::of_tenants(keys, &[], &Tenants::default())
    }

    /// Any of `keys`, and those of the tenants.
    pub(crate) fn of_tenants(keys: &[Secret], configs: &[TenantConfig], tenants: &Tenants) -> Self {
        let of_nobody = keys.iter().map(|key| (key.clone(), tenants.anonymous()));
        let of_tenants = configs.iter().flat_map(|config| {
            let keys = config.api_keys.iter().cloned();
            keys.map(|key| (key, tenants.named(&config.name)))
        });
        Self {
            keys: of_nobody.chain(of_tenants).collect(),
            anonymous: tenants.anonymous(),
        }
    }

    /// Checks the value of an `authorization` header, of HTTP or of gRPC metadata; whose key it is.
    pub(crate) fn check(&self, authorization: Option<&[u8]>) -> Result<Arc<Tenant>, ApiError> {
        if self.keys.is_empty() {
            return Ok(Arc::clone(&self.anonymous));
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
        let found = self.keys.iter().fold(None, |found, (secret, tenant)| {
            if secret.matches(key) {
                Some(tenant)
            } else {
                found
            }
        });
        match found {
            Some(tenant) => Ok(Arc::clone(tenant)),
            None => error("the API key is not valid"),
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
    fn a_key_says_whose_request_it_is() {
        let configs = [TenantConfig {
            name: "search".to_owned(),
            api_keys: vec!["sk-s".into()],
            ..TenantConfig::default()
        }];
        let keys = ApiKeys::of_tenants(&["sk-a".into()], &configs, &Tenants::new(&configs));
        let name_of = |key: &str| {
            let value = format!("Bearer {key}");
            keys.check(Some(value.as_bytes()))
                .map(|tenant| tenant.name.to_string())
        };
        assert_eq!(name_of("sk-s").unwrap(), "search");
        assert_eq!(name_of("sk-a").unwrap(), "");
        assert!(name_of("sk-x").is_err());
    }

    #[test]
    fn without_keys_everyone_may() {
        assert!(ApiKeys::default().check(None).is_ok());
    }
}
