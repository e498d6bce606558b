use std::net::SocketAddr;

use clap::{Args as _, FromArgMatches as _};

use super::*;
use crate::state::CorridorLimits;

fn parse(args: &[&str]) -> Result<RouterConfig, clap::Error> {
    let command = RouterConfig::augment_args(clap::Command::new("orchestra-router"));
    let matches = command.try_get_matches_from([&["orchestra-router"], args].concat())?;
    RouterConfig::from_arg_matches(&matches)
}

#[test]
fn without_flags_every_setting_has_its_default() {
    let parsed = parse(&[]).unwrap();
    assert_eq!(
        format!("{parsed:?}"),
        format!("{:?}", RouterConfig::default())
    );
    assert_eq!(parsed.corridor.limits(), CorridorLimits::default());
    assert_eq!(parsed.validate(), Ok(()));
}

#[test]
fn flags_reach_their_settings_and_keys_do_not_print() {
    let args = [
        "--http",
        "0.0.0.0:0",
        "--max-body-size",
        "1MiB",
        "--drain-timeout",
        "250ms",
    ];
    let keys = ["--api-key", "sk-a,sk-b", "--api-key", "sk-c"];
    let config = parse(&[&args[..], &keys[..]].concat()).unwrap();
    assert_eq!(config.listen.http, SocketAddr::from(([0, 0, 0, 0], 0)));
    assert_eq!(config.listen.max_body_size, ByteSize(1 << 20));
    assert_eq!(
        config.listen.drain_timeout,
        Span(Duration::from_millis(250))
    );
    assert_eq!(config.api_keys.len(), 3);
    assert!(!format!("{config:?}").contains("sk-"));
}

#[test]
fn all_issues_are_reported_at_once() {
    let mut config = RouterConfig::default();
    config.listen.grpc = config.listen.http;
    config.listen.max_connections = 0;
    config.listen.max_body_size = ByteSize(0);
    config.listen.header_timeout = Span(Duration::ZERO);
    config.corridor.max_concurrent_requests = 0;
    config.corridor.split_wait_max = Span(Duration::from_secs(61));
    config.log.filter = "a=b=c".to_owned();
    config.api_keys = vec!["".parse().unwrap()];
    let keys: Vec<_> = config
        .validate()
        .unwrap_err()
        .iter()
        .map(|issue| issue.key.clone())
        .collect();
    let expected = [
        "grpc",
        "max_connections",
        "max_body_size",
        "header_timeout",
        "split_wait_max",
        "max_concurrent_requests",
        "api_key",
        "log",
    ];
    assert_eq!(keys, expected);
}
