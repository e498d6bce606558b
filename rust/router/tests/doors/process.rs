//! The binary: what it prints, and how it ends.

use std::{
    io::{BufRead as _, BufReader},
    process::{Child, Command, Output, Stdio},
};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::support::{config, get, start};

fn router(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_orchestra-router"));
    let free = [
        "--http",
        "127.0.0.1:0",
        "--grpc",
        "127.0.0.1:0",
        "--workers",
        "127.0.0.1:0",
        "--admin",
        "127.0.0.1:0",
    ];
    command.args(free).args(arguments);
    command
}

fn output(arguments: &[&str]) -> Output {
    // A flag may be given once; the ones of `router` are for those that start.
    Command::new(env!("CARGO_BIN_EXE_orchestra-router"))
        .args(arguments)
        .output()
        .unwrap()
}

fn signal(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).unwrap();
}

#[tokio::test]
async fn it_says_where_it_listens_and_ends_with_0_on_a_signal() {
    for ending in [Signal::TERM, Signal::INT] {
        let mut child = router(&["--print-addresses"])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let addresses: Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
        let address = |door: &str| addresses[door].as_str().unwrap().parse().unwrap();
        assert_eq!(get(address("http"), "/live").await.status, 200);
        assert_ne!(address("grpc"), address("workers"));
        signal(&child, ending);
        assert_eq!(child.wait().unwrap().code(), Some(0));
        assert!(lines.next().is_none(), "one line, and nothing else");
    }
}

#[test]
fn what_cannot_be_used_is_listed_and_ends_with_64() {
    let wrong = output(&[
        "--max-connections",
        "0",
        "--body-timeout",
        "0s",
        "--api-key",
        "",
    ]);
    assert_eq!(wrong.status.code(), Some(64));
    let said = String::from_utf8(wrong.stderr).unwrap();
    for key in ["max_connections", "body_timeout", "api_key"] {
        assert!(
            said.contains(&format!("orchestra-router: {key}: ")),
            "{said}"
        );
    }
    for arguments in [
        &["--no-such-flag"][..],
        &["--http", "nowhere"],
        &["--body-timeout", "5"],
    ] {
        assert_eq!(output(arguments).status.code(), Some(64), "{arguments:?}");
    }
    assert_eq!(output(&["--help"]).status.code(), Some(0));
}

#[tokio::test]
async fn a_taken_port_ends_it_with_1_and_a_sentence() {
    let (_router, at) = start(&config());
    let output = output(&["--http", &at.http.to_string()]);
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(
        said.contains(&format!("cannot listen on {} (http): ", at.http)),
        "{said}"
    );
}
