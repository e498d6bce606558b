//! Who asks, and how urgently: read from the head of a request, alike for HTTP headers and gRPC metadata.

use std::{sync::Arc, time::Duration};

use orchestra_core::scheduler::AdmissionClass;

use crate::{
    error::ApiError,
    settings::Settings,
    tenants::{Tenant, is_name},
};

/// The request's class.
const CLASS_KEY: &str = "x-orchestra-class";
/// Whose it is, where whoever sets this is trusted.
const TENANT_KEY: &str = "x-orchestra-tenant";
/// How long the client waits for the whole answer, milliseconds.
const TIMEOUT_KEY: &str = "x-request-timeout-ms";
/// How long it waits for the first token.
const TTFT_DEADLINE_KEY: &str = "x-orchestra-ttft-deadline-ms";

/// Who asks, and how urgently.
#[derive(Clone, Debug, Default)]
pub struct Caller {
    /// Whose request it is.
    pub tenant: Arc<Tenant>,
    /// The class that was asked for; see [`Self::class`].
    pub asked_class: Option<AdmissionClass>,
    /// How long the client waits for the whole answer; `None`: the router's limit.
    pub timeout: Option<Duration>,
    /// How long it waits for the first token.
    pub ttft_timeout: Option<Duration>,
}

impl Caller {
    /// Reads what `header` has of a request of `tenant`. A header that cannot be used is refused by its name.
    pub(crate) fn read<'a>(
        settings: &Settings,
        tenant: Arc<Tenant>,
        header: impl Fn(&str) -> Option<&'a [u8]>,
    ) -> Result<Self, ApiError> {
        let named = header(TENANT_KEY).filter(|_| settings.trust_tenant_header);
        let tenant = match named {
            Some(name) if !is_name(name) => {
                return Err(invalid(TENANT_KEY, "1 to 128 visible ASCII characters"));
            }
            Some(name) => settings.tenants.named(&String::from_utf8_lossy(name)),
            None => tenant,
        };
        let asked_class = header(CLASS_KEY).map(|value| {
            let class = str::from_utf8(value).ok().and_then(AdmissionClass::parse);
            class.ok_or_else(|| invalid(CLASS_KEY, "interactive, standard or batch"))
        });
        let milliseconds = |key| {
            let value = header(key).map(|value| {
                let value = str::from_utf8(value).ok().and_then(|it| it.parse().ok());
                let value = value.filter(|&milliseconds: &u64| milliseconds > 0);
                value.ok_or_else(|| invalid(key, "a positive number of milliseconds"))
            });
            Ok::<_, ApiError>(value.transpose()?.map(Duration::from_millis))
        };
        Ok(Self {
            tenant,
            asked_class: asked_class.transpose()?,
            timeout: milliseconds(TIMEOUT_KEY)?,
            ttft_timeout: milliseconds(TTFT_DEADLINE_KEY)?,
        })
    }

    /// The class of the request: what was asked for, as far as the tenant may.
    pub(crate) fn class(&self) -> AdmissionClass {
        let asked = self.asked_class.unwrap_or_default();
        // The more urgent is the less.
        asked.max(self.tenant.max_class)
    }

    /// The same with the class of the body where the head has none.
    pub(crate) fn or_class(self, of_body: Option<AdmissionClass>) -> Self {
        Self {
            asked_class: self.asked_class.or(of_body),
            ..self
        }
    }
}

fn invalid(key: &str, expected: &str) -> ApiError {
    ApiError::invalid(key, format!("{key} must be {expected}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tenants::{TenantConfig, Tenants};

    fn settings(trust_tenant_header: bool) -> Settings {
        let tenants = [TenantConfig {
            name: "nightly".to_owned(),
            max_class: AdmissionClass::Batch,
            ..TenantConfig::default()
        }];
        Settings {
            tenants: Tenants::new(&tenants),
            trust_tenant_header,
            ..Settings::default()
        }
    }

    fn read(is_trusted: bool, headers: &[(&str, &'static str)]) -> Result<Caller, ApiError> {
        let header = |key: &str| {
            let found = headers.iter().find(|(name, _)| *name == key);
            found.map(|(_, value)| value.as_bytes())
        };
        Caller::read(&settings(is_trusted), Arc::default(), header)
    }

    #[test]
    fn the_head_says_who_and_how_urgently() {
        let caller = read(false, &[]).unwrap();
        assert_eq!(caller.class(), AdmissionClass::Standard);
        assert_eq!((caller.timeout, caller.ttft_timeout), (None, None));
        let batch = caller.or_class(Some(AdmissionClass::Batch));
        assert_eq!(batch.class(), AdmissionClass::Batch);
        let caller = read(
            false,
            &[
                (CLASS_KEY, "interactive"),
                (TIMEOUT_KEY, "1500"),
                (TTFT_DEADLINE_KEY, "200"),
            ],
        )
        .unwrap()
        .or_class(Some(AdmissionClass::Batch));
        assert_eq!(caller.class(), AdmissionClass::Interactive, "the head wins");
        assert_eq!(caller.timeout, Some(Duration::from_millis(1500)));
        assert_eq!(caller.ttft_timeout, Some(Duration::from_millis(200)));
    }

    #[test]
    fn a_tenant_is_believed_where_that_is_set_and_gets_no_more_than_it_may() {
        let headers = [(TENANT_KEY, "nightly"), (CLASS_KEY, "interactive")];
        let stranger = read(false, &headers).unwrap();
        assert_eq!(&*stranger.tenant.name, "");
        let nightly = read(true, &headers).unwrap();
        assert_eq!(&*nightly.tenant.name, "nightly");
        assert_eq!(nightly.class(), AdmissionClass::Batch);
        let unknown = read(true, &[(TENANT_KEY, "somebody")]).unwrap();
        assert_eq!(&*unknown.tenant.name, "somebody");
    }

    #[test]
    fn a_header_that_cannot_be_used_is_named() {
        let long: &'static str = "x".repeat(129).leak();
        for (key, value) in [
            (CLASS_KEY, "urgent"),
            (CLASS_KEY, ""),
            (TENANT_KEY, ""),
            (TENANT_KEY, "two words"),
            (TENANT_KEY, long),
            (TIMEOUT_KEY, "0"),
            (TIMEOUT_KEY, "soon"),
            (TIMEOUT_KEY, "-1"),
            (TTFT_DEADLINE_KEY, "1.5"),
        ] {
            let error = read(true, &[(key, value)]).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(key), "{value}");
            assert!(value.len() < 3 || !error.message.contains(value), "{error}");
        }
    }
}
