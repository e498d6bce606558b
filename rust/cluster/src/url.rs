//! Where the store is, as settings spell it.

use std::{fmt, str::FromStr};

/// Most endpoints of one store.
const ENDPOINTS_MAX: usize = 16;
/// The prefix of a store whose URL has none.
const PREFIX: &str = "/orchestra/";

/// `etcd://HOST:PORT[,HOST:PORT…][/PREFIX]`: members of one etcd cluster, and the keys that are ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreUrl {
    /// `http://HOST:PORT`, at least one.
    pub(crate) endpoints: Vec<String>,
    /// Begins and ends with a slash.
    prefix: String,
}

/// What is wrong with a [`StoreUrl`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreUrlError {
    /// Another kind of store.
    #[error("must begin with etcd://")]
    Scheme,
    /// No, too many or broken endpoints.
    #[error("must name 1 to {ENDPOINTS_MAX} members as HOST:PORT, separated by commas")]
    Endpoints,
}

impl StoreUrl {
    /// The prefix of a kind of keys, for example `engines`: ends with a slash.
    pub fn prefix_of(&self, kind: &str) -> String {
        format!("{}{kind}/", self.prefix)
    }
}

impl FromStr for StoreUrl {
    type Err = StoreUrlError;

    fn from_str(text: &str) -> Result<Self, StoreUrlError> {
        let rest = text.strip_prefix("etcd://").ok_or(StoreUrlError::Scheme)?;
        let (members, path) = rest.split_once('/').unwrap_or((rest, ""));
        let endpoints: Option<Vec<_>> = members
            .split(',')
            .map(|member| is_host_and_port(member).then(|| format!("http://{member}")))
            .collect();
        let endpoints = endpoints
            .filter(|all| all.len() <= ENDPOINTS_MAX)
            .ok_or(StoreUrlError::Endpoints)?;
        let path = path.trim_matches('/');
        let prefix = if path.is_empty() {
            PREFIX.to_owned()
        } else {
            format!("/{path}/")
        };
        Ok(Self { endpoints, prefix })
    }
}

fn is_host_and_port(member: &str) -> bool {
    member.rsplit_once(':').is_some_and(|(host, port)| {
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._[]:".contains(&byte);
        !host.is_empty() && host.bytes().all(is_plain) && port.parse::<u16>().is_ok()
    })
}

impl fmt::Display for StoreUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let members = self.endpoints.iter();
        let members: Vec<_> = members.map(|it| it.trim_start_matches("http://")).collect();
        write!(
            f,
            "etcd://{}{}",
            members.join(","),
            self.prefix.trim_end_matches('/')
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_read_and_written() {
        let url: StoreUrl = "etcd://a:2379,[::1]:2380/serving/blue/".parse().unwrap();
        assert_eq!(url.endpoints, ["http://a:2379", "http://[::1]:2380"]);
        assert_eq!(url.prefix_of("engines"), "/serving/blue/engines/");
        assert_eq!(url.to_string(), "etcd://a:2379,[::1]:2380/serving/blue");
        let plain: StoreUrl = "etcd://a:2379".parse().unwrap();
        assert_eq!(plain.prefix_of("engines"), "/orchestra/engines/");
        assert_eq!(plain.to_string().parse(), Ok(plain));
    }

    #[test]
    fn broken_urls_say_what_is_wrong() {
        let parse = |text: &str| text.parse::<StoreUrl>().unwrap_err();
        assert_eq!(parse("http://a:2379"), StoreUrlError::Scheme);
        for text in [
            "etcd://",
            "etcd:///x",
            "etcd://a",
            "etcd://a:x",
            "etcd://a:99999",
            "etcd://:1",
            "etcd://a:1,",
            "etcd://u:p@a:1",
            &format!("etcd://{}", ["a:1"; 17].join(",")),
        ] {
            assert_eq!(parse(text), StoreUrlError::Endpoints, "{text}");
        }
    }
}
