//! Where an engine listens.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// Longest URL of an engine, bytes: it is part of its workers' names, which are at most 128.
const URL_BYTES_MAX: usize = 120;

/// `http://host:port`, with a base path where the engine's routes do not begin at the root.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct EngineUrl {
    /// As given, without a slash at its end.
    text: String,
    /// Where in `text` the base path begins; its length where there is none.
    path: usize,
    /// Without the brackets of an IPv6 address.
    host: String,
    port: u16,
}

/// A text that is no engine's URL. The message does not repeat it: there may be a password in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UrlError {
    /// TLS.
    #[error("https is not offered between router and engines: give http://host:port")]
    Https,
    /// Another scheme, or none.
    #[error("expected http://host:port")]
    Scheme,
    /// User name or password.
    #[error("a user name or password in the URL is not offered: use api_key")]
    UserInfo,
    /// `?` or `#`.
    #[error("a query or fragment is not offered")]
    Query,
    /// No host, or no number where the port is.
    #[error("expected http://host:port, with a port from 1 to 65535")]
    Authority,
    /// Spaces, control characters, or more than ASCII.
    #[error("must be visible ASCII characters only")]
    Characters,
    /// Above the limit.
    #[error("must have at most {URL_BYTES_MAX} bytes")]
    TooLong,
}

impl EngineUrl {
    /// Host and port as the `host` header has them.
    pub fn authority(&self) -> &str {
        &self.text["http://".len()..self.path]
    }

    /// Comes before every path of the engine; empty, or it begins with a slash.
    pub fn base_path(&self) -> &str {
        &self.text[self.path..]
    }

    /// A name or an address.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// 80 where none was given.
    pub const fn port(&self) -> u16 {
        self.port
    }

    /// The URL as text.
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

impl FromStr for EngineUrl {
    type Err = UrlError;

    fn from_str(given: &str) -> Result<Self, UrlError> {
        let text = given.trim_end_matches('/').to_owned();
        if text.len() > URL_BYTES_MAX {
            return Err(UrlError::TooLong);
        }
        if !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(UrlError::Characters);
        }
        if text
            .get(..8)
            .is_some_and(|scheme| scheme.eq_ignore_ascii_case("https://"))
        {
            return Err(UrlError::Https);
        }
        let rest = text.strip_prefix("http://").ok_or(UrlError::Scheme)?;
        if rest.contains(['?', '#']) {
            return Err(UrlError::Query);
        }
        let authority = rest.split('/').next().unwrap_or_default();
        if authority.contains('@') {
            return Err(UrlError::UserInfo);
        }
        let (host, port) = split_authority(authority).ok_or(UrlError::Authority)?;
        Ok(Self {
            path: "http://".len() + authority.len(),
            host: host.to_owned(),
            port,
            text,
        })
    }
}

/// Host and port; the host of `[::1]:8000` is `::1`.
fn split_authority(authority: &str) -> Option<(&str, u16)> {
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => {
            let (host, after) = rest.split_once(']')?;
            (
                host,
                after
                    .strip_prefix(':')
                    .or(after.is_empty().then_some("80"))?,
            )
        }
        None => authority.split_once(':').unwrap_or((authority, "80")),
    };
    let port = port.parse().ok().filter(|&port| port != 0)?;
    (!host.is_empty()).then_some((host, port))
}

impl TryFrom<String> for EngineUrl {
    type Error = UrlError;

    fn try_from(text: String) -> Result<Self, UrlError> {
        text.parse()
    }
}

impl From<EngineUrl> for String {
    fn from(url: EngineUrl) -> Self {
        url.text
    }
}

impl fmt::Display for EngineUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for EngineUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_of_a_url() {
        for (text, authority, host, port, base_path) in [
            ("http://a:8000", "a:8000", "a", 8000, ""),
            ("http://a:8000/", "a:8000", "a", 8000, ""),
            ("http://a", "a", "a", 80, ""),
            (
                "http://10.0.0.1:1/x/y/",
                "10.0.0.1:1",
                "10.0.0.1",
                1,
                "/x/y",
            ),
            ("http://[::1]:8000/x", "[::1]:8000", "::1", 8000, "/x"),
            ("http://[::1]", "[::1]", "::1", 80, ""),
        ] {
            let url: EngineUrl = text.parse().unwrap();
            assert_eq!((url.authority(), url.host()), (authority, host), "{text}");
            assert_eq!((url.port(), url.base_path()), (port, base_path), "{text}");
            assert_eq!(url.as_str(), text.trim_end_matches('/'));
        }
    }

    #[test]
    fn what_is_no_url_says_why_and_repeats_nothing() {
        let long = format!("http://{}", "secret".repeat(40));
        for (text, error) in [
            ("https://secret:1", UrlError::Https),
            ("HTTPS://secret:1", UrlError::Https),
            ("secret:8000", UrlError::Scheme),
            ("", UrlError::Scheme),
            ("http://", UrlError::Scheme),
            ("http://:80", UrlError::Authority),
            ("http://a:0", UrlError::Authority),
            ("http://a:99999", UrlError::Authority),
            ("http://[::1", UrlError::Authority),
            ("http://u:secret@a:1", UrlError::UserInfo),
            ("http://a:1/?secret", UrlError::Query),
            ("http://a b", UrlError::Characters),
            ("http://a\r\nx: y", UrlError::Characters),
            (&long, UrlError::TooLong),
        ] {
            let got = text.parse::<EngineUrl>().unwrap_err();
            assert_eq!(got, error, "{text}");
            assert!(!got.to_string().contains("secret"));
        }
    }
}
