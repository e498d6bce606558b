//! Whose requests there are, and what each of them may.
//!
//! A tenant is known by its API key, or by a header where something in front of the router is trusted to set it. All that
//! come without either are one tenant too, the anonymous one, whose name is empty.

use std::{fs, path::Path, sync::Arc};

use orchestra_core::{
    config::ConfigIssue,
    scheduler::{AdmissionClass, NAME_BYTES_MAX},
};
use rustc_hash::{FxHashMap, FxHashSet};
use serde::Deserialize;

use crate::config::{Secret, secrets};

/// Larger files are no list of tenants.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// Most tenants in the file; the scheduler remembers as many weights.
const TENANTS_MAX: usize = 4096;
/// Everybody's weight unless they have one of their own.
pub(crate) const WEIGHT: u32 = 100;
/// The largest weight.
const WEIGHT_MAX: u32 = 10_000;

/// One tenant as the file has it.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TenantConfig {
    /// Its name, at most 128 visible ASCII characters; empty: those who have no tenant of their own.
    pub name: String,
    /// The keys that its requests come with.
    #[serde(deserialize_with = "secrets")]
    pub api_keys: Vec<Secret>,
    /// Its share of the workers while others wait too, 1 to 10,000; everybody's is 100.
    pub weight: u32,
    /// The most urgent class that it gets; what asks for more gets this.
    pub max_class: AdmissionClass,
    /// Requests of it that may be here at once, running or waiting; more are refused.
    pub max_concurrent_requests: Option<u32>,
    /// Requests of it that may wait; more are refused.
    pub max_queued_requests: Option<u32>,
}

impl Default for TenantConfig {
    fn default() -> Self {
        Self {
            name: String::new(),
            api_keys: Vec::new(),
            weight: WEIGHT,
            max_class: AdmissionClass::Interactive,
            max_concurrent_requests: None,
            max_queued_requests: None,
        }
    }
}

/// The file: `[[tenant]]` for each.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct File {
    tenant: Vec<TenantConfig>,
}

/// The tenants in a file.
///
/// # Errors
/// Why it cannot be read. What is in it is not repeated, since that may be a key.
pub(crate) fn read(path: &Path) -> Result<Vec<TenantConfig>, String> {
    let named = path.display();
    let read = || {
        if fs::metadata(path)?.len() > FILE_BYTES_MAX {
            let message = format!("larger than the limit of {FILE_BYTES_MAX} bytes");
            return Err(std::io::Error::other(message));
        }
        fs::read_to_string(path)
    };
    let text = read().map_err(|error| format!("{named}: {error}"))?;
    parse(&text).map_err(|(line, message)| format!("{message} ({named}:{line})"))
}

fn parse(text: &str) -> Result<Vec<TenantConfig>, (usize, String)> {
    let file: Result<File, toml::de::Error> = toml::from_str(text);
    let file = file.map_err(|error| {
        let start = error.span().map_or(0, |span| span.start);
        let before = text.as_bytes().iter().take(start);
        let line = 1 + before.filter(|&&byte| byte == b'\n').count();
        (line, error.message().to_owned())
    })?;
    Ok(file.tenant)
}

/// Whether a name may be a tenant's.
pub(crate) fn is_name(name: &[u8]) -> bool {
    (1..=NAME_BYTES_MAX).contains(&name.len()) && name.iter().all(u8::is_ascii_graphic)
}

/// Everything that is wrong with a list of tenants.
pub(crate) fn validate(tenants: &[TenantConfig]) -> Vec<ConfigIssue> {
    let mut issues = Vec::new();
    let mut issue = |message: String| issues.push(ConfigIssue::new("tenants_file", message));
    if tenants.len() > TENANTS_MAX {
        issue(format!("there may be at most {TENANTS_MAX} tenants"));
    }
    let mut names = FxHashSet::default();
    let mut keys: Vec<&Secret> = Vec::new();
    for (number, tenant) in (1..).zip(tenants) {
        let mut check = |field: &str, is_fine: bool, message: &str| {
            if !is_fine {
                issue(format!("tenant {number}: {field} {message}"));
            }
        };
        let name = tenant.name.as_bytes();
        check(
            "name",
            name.is_empty() || is_name(name),
            "must have at most 128 visible ASCII characters",
        );
        check("name", names.insert(name), "is another tenant's too");
        check(
            "weight",
            (1..=WEIGHT_MAX).contains(&tenant.weight),
            "must be 1 to 10000",
        );
        let has_keys = !tenant.api_keys.is_empty();
        check(
            "api_keys",
            !(name.is_empty() && has_keys),
            "need a tenant with a name",
        );
        for key in &tenant.api_keys {
            check("api_keys", !key.is_empty(), "must not be empty");
            let is_new = !keys.contains(&key);
            check("api_keys", is_new, "hold a key that was given before");
            keys.push(key);
        }
        let runs_one = tenant.max_concurrent_requests != Some(0);
        check("max_concurrent_requests", runs_one, "must be at least 1");
    }
    issues
}

/// A tenant as requests know it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tenant {
    pub(crate) name: Arc<str>,
    pub(crate) weight: u32,
    pub(crate) max_class: AdmissionClass,
    pub(crate) max_concurrent_requests: Option<u32>,
    pub(crate) max_queued_requests: Option<u32>,
}

impl Default for Tenant {
    /// The anonymous one, without limits.
    fn default() -> Self {
        (&TenantConfig::default()).into()
    }
}

impl From<&TenantConfig> for Tenant {
    fn from(config: &TenantConfig) -> Self {
        Self {
            name: config.name.as_str().into(),
            weight: config.weight,
            max_class: config.max_class,
            max_concurrent_requests: config.max_concurrent_requests,
            max_queued_requests: config.max_queued_requests,
        }
    }
}

/// The tenants that were configured.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tenants {
    by_name: FxHashMap<Arc<str>, Arc<Tenant>>,
    anonymous: Arc<Tenant>,
}

impl Tenants {
    pub(crate) fn new(configs: &[TenantConfig]) -> Self {
        let tenants = configs.iter().map(|config| Arc::new(config.into()));
        let by_name: FxHashMap<_, Arc<Tenant>> = tenants
            .map(|tenant: Arc<Tenant>| (Arc::clone(&tenant.name), tenant))
            .collect();
        Self {
            anonymous: by_name.get("").cloned().unwrap_or_default(),
            by_name,
        }
    }

    /// The tenant of those who have none.
    pub(crate) fn anonymous(&self) -> Arc<Tenant> {
        Arc::clone(&self.anonymous)
    }

    /// The tenant of this name; one that was not configured has everybody's weight and no limits of its own.
    pub(crate) fn named(&self, name: &str) -> Arc<Tenant> {
        self.by_name.get(name).cloned().unwrap_or_else(|| {
            Arc::new(Tenant {
                name: name.into(),
                ..Tenant::default()
            })
        })
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Arc<Tenant>> {
        self.by_name.values()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_s_tenants_have_what_it_says_and_defaults_for_the_rest() {
        let tenants = parse(
            "[[tenant]]\nname = 'search'\napi_keys = ['sk-1', 'sk-2']\nweight = 300\nmax_class = 'standard'\n\
             max_concurrent_requests = 8\nmax_queued_requests = 0\n\n[[tenant]]\nname = 'nightly'\nmax_class = 'batch'\n",
        )
        .unwrap();
        assert_eq!(validate(&tenants), []);
        let tenants = Tenants::new(&tenants);
        let search = tenants.named("search");
        assert_eq!(
            (search.weight, search.max_class, search.max_queued_requests),
            (300, AdmissionClass::Standard, Some(0))
        );
        let nightly = tenants.named("nightly");
        assert_eq!(
            (nightly.weight, nightly.max_concurrent_requests),
            (100, None)
        );
        assert_eq!(
            tenants.named("other").max_class,
            AdmissionClass::Interactive
        );
        assert_eq!(&*tenants.anonymous().name, "");
    }

    #[test]
    fn what_is_wrong_is_named_by_line_or_tenant_and_never_repeated() {
        for (text, line) in [
            ("[[tenant]]\nname = 5\n", 2),
            ("[[tenant]]\n\nsecret = 'x'\n", 3),
            ("[[tenant]]\nname = 'a'\nmax_class = 'secret'\n", 3),
            ("[[tenant]]\napi_keys = ['secret\n", 2),
        ] {
            let (found, message) = parse(text).unwrap_err();
            assert_eq!(found, line, "{message}");
        }
        let with = |name: &str, key: &str, weight| TenantConfig {
            name: name.to_owned(),
            api_keys: vec![key.into()],
            weight,
            ..TenantConfig::default()
        };
        let tenants = [
            with("a", "sk-secret", 100),
            with("a", "sk-secret", 0),
            with("", "sk-3", 100),
            with("spaced out", "", 100),
            TenantConfig {
                name: "b".to_owned(),
                max_concurrent_requests: Some(0),
                ..TenantConfig::default()
            },
        ];
        let issues: Vec<String> = validate(&tenants).iter().map(ToString::to_string).collect();
        let expected = [
            "tenant 2: name is another",
            "tenant 2: weight",
            "tenant 2: api_keys hold a key",
            "tenant 3: api_keys need",
            "tenant 4: name must",
            "tenant 4: api_keys must not be empty",
            "tenant 5: max_concurrent_requests",
        ];
        assert_eq!(issues.len(), expected.len(), "{issues:?}");
        for (issue, expected) in issues.iter().zip(expected) {
            assert!(
                issue.contains(expected) && !issue.contains("secret"),
                "{issue}"
            );
        }
    }
}
