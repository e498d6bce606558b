//! What a client may cost.

use std::time::Duration;

use orchestra_router::config::{ByteSize, Span};
use tokio::{
    io::AsyncWriteExt as _,
    time::{Instant, sleep},
};

use crate::support::{Client, ask, config, get, head, post, start, within};

const JSON: &str = "content-type: application/json\r\n";

#[tokio::test]
async fn a_body_that_is_announced_too_large_is_refused_before_it_comes() {
    let (_router, at) = start(&config());
    let headers = format!("{JSON}content-length: 1000000000000\r\n");
    let mut client = Client::send(at.http, head("POST", "/v1/completions", &headers)).await;
    assert!(client.until("\r\n\r\n").await.starts_with("HTTP/1.1 413 "));
    client
        .until("the body is larger than the limit of 16777216 bytes")
        .await;
}

#[tokio::test]
async fn a_body_that_turns_out_too_large_is_refused_and_its_client_reads_why() {
    let mut config = config();
    config.listen.max_body_size = ByteSize(1 << 10);
    let (_router, at) = start(&config);
    let headers = format!("{JSON}transfer-encoding: chunked\r\n");
    let chunk = format!("1000\r\n{}\r\n", "x".repeat(0x1000));
    let request = head("POST", "/v1/completions", &headers) + &chunk.repeat(1000) + "0\r\n\r\n";
    assert_eq!(ask(at.http, request).await.status, 413);
    // Sent as one, without looking for an answer in between.
    let answer = ask(at.http, post("/v1/completions", &"x".repeat(8 << 20))).await;
    assert_eq!(
        (answer.status, answer.error().0.as_str()),
        (413, "invalid_request")
    );
    assert_eq!(
        ask(at.http, post("/v1/completions", "{}")).await.status,
        400
    );
}

#[tokio::test]
async fn an_answer_before_the_body_says_that_the_connection_ends_with_it() {
    let (_router, at) = start(&config());
    let request = |path: &str, body: &str| {
        let length = body.len();
        format!("POST {path} HTTP/1.1\r\nhost: test\r\n{JSON}content-length: {length}\r\n\r\n")
    };
    // The body would come in a packet of its own, as many clients send it.
    let unread = Client::send(at.http, request("/v1/no-such-route", "{}")).await;
    let answer = unread.answer().await;
    assert_eq!(
        (answer.status, answer.header("connection")),
        (404, Some("close"))
    );

    // Where the body was read, or where there is none, the next request may follow.
    let mut read = Client::send(at.http, request("/v1/completions", "{}") + "{}").await;
    let head = read.until("\r\n\r\n").await;
    assert!(head.starts_with("HTTP/1.1 400 ") && !head.contains("connection:"));
    let none = request("/v1/no-such-route", "");
    read.socket.write_all(none.as_bytes()).await.unwrap();
    let head = read.until("\r\n\r\n").await;
    assert!(head.contains("HTTP/1.1 404 ") && !head.contains("connection:"));
    let last = request("/v1/completions", "{}") + "{}";
    read.socket.write_all(last.as_bytes()).await.unwrap();
    assert!(read.until("\r\n\r\n").await.contains("HTTP/1.1 400 "));
}

#[tokio::test]
async fn a_slow_body_is_not_waited_for() {
    let mut config = config();
    config.listen.body_timeout = Span(Duration::from_millis(100));
    let (_router, at) = start(&config);
    let headers = format!("{JSON}content-length: 100\r\n");
    let answer = ask(at.http, head("POST", "/v1/completions", &headers) + "{").await;
    assert_eq!(
        (answer.status, answer.error().0.as_str()),
        (408, "invalid_request")
    );
}

#[tokio::test]
async fn a_dribbled_head_closes_the_connection_and_an_idle_one_stays() {
    let mut config = config();
    config.listen.header_timeout = Span(Duration::from_millis(200));
    let (_router, at) = start(&config);
    let dribbled = ["P", "GET /live HTTP/1.1\r\nx-slow: "];
    for (first, is_silent) in [
        ("", true),
        ("PRI * HT", true),
        (dribbled[0], false),
        (dribbled[1], false),
    ] {
        let began = Instant::now();
        let mut client = Client::send(at.http, first).await;
        if is_silent {
            client.answer().await;
        } else {
            let dribble = async {
                while client.socket.write_all(b"x").await.is_ok() {
                    sleep(Duration::from_millis(20)).await;
                }
            };
            within("close", dribble).await;
        }
        assert!(began.elapsed() >= Duration::from_millis(190), "{first:?}");
    }
    let keep_alive = "GET /live HTTP/1.1\r\nhost: test\r\n\r\n";
    let mut idle = Client::send(at.http, keep_alive).await;
    idle.until("live\"}").await;
    sleep(Duration::from_millis(600)).await;
    idle.socket.write_all(keep_alive.as_bytes()).await.unwrap();
    idle.until("live\"}").await;
}

#[tokio::test]
async fn an_idle_connection_closes_in_its_time() {
    let mut config = config();
    config.listen.idle_timeout = Span(Duration::from_millis(200));
    let (_router, at) = start(&config);
    let idle = Client::send(at.http, "GET /live HTTP/1.1\r\nhost: test\r\n\r\n").await;
    assert_eq!(idle.answer().await.status, 200);
}

#[tokio::test]
async fn connections_are_bounded_and_the_next_one_waits() {
    let mut config = config();
    config.listen.max_connections = 2;
    let (_router, at) = start(&config);
    let held = [
        Client::send(at.http, "").await,
        Client::send(at.http, "").await,
    ];
    let waiting = tokio::spawn(get(at.http, "/live"));
    sleep(Duration::from_millis(100)).await;
    assert!(!waiting.is_finished());
    drop(held);
    assert_eq!(within("turn", waiting).await.unwrap().status, 200);
}

#[tokio::test]
async fn a_large_head_is_refused() {
    let (_router, at) = start(&config());
    let headers = format!("x-large: {}\r\n", "x".repeat(1 << 20));
    assert_eq!(
        ask(at.http, head("GET", "/live", &headers)).await.status,
        431
    );
    let many = "x-many: y\r\n".repeat(300);
    assert_eq!(ask(at.http, head("GET", "/live", &many)).await.status, 431);
    // Two ways to tell where a request ends are how one is smuggled in.
    let two_lengths = "content-length: 2\r\ncontent-length: 3\r\n";
    assert_eq!(
        ask(at.http, head("POST", "/v1/completions", two_lengths))
            .await
            .status,
        400
    );
}
