use std::time::Duration;

use proptest::prelude::*;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};

use super::*;

/// A connection, and the engine's end of it.
fn pair() -> (Connection, DuplexStream) {
    let (ours, theirs) = duplex(256);
    (Connection::new(Box::new(ours)), theirs)
}

/// Answers a request with these bytes, in pieces of this size, and closes.
async fn exchange(answer: &[u8], piece: usize) -> Result<(Head, Vec<u8>, bool), WireError> {
    let (mut connection, mut engine) = pair();
    let answer = answer.to_vec();
    let engine = async move {
        let mut request = [0; 6];
        engine.read_exact(&mut request).await.unwrap();
        assert_eq!(&request, b"headbo");
        for piece in answer.chunks(piece) {
            // The other side may have seen enough.
            let _ = engine.write_all(piece).await;
        }
        let mut rest = Vec::new();
        drop(engine.shutdown().await);
        let _ = engine.read_to_end(&mut rest).await;
    };
    let client = async move {
        let head = connection.send(b"head", b"bo").await?;
        let mut body = BytesMut::new();
        while connection.read_body(&mut body).await? {}
        Ok((head, body.to_vec(), connection.is_reusable()))
    };
    let (result, ()) = tokio::join!(client, engine);
    result
}

const CHUNKED: &[u8] =
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ncontent-type: a/b\r\n\r\n";

#[tokio::test]
async fn each_framing_gives_its_body() {
    let chunked = [CHUNKED, b"3\r\nabc\r\n2;x=y\r\nde\r\n0\r\nt: v\r\n\r\n"].concat();
    let cases: [(&[u8], u16, &[u8], bool); 6] = [
        (
            b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nabcde",
            200,
            b"abcde",
            true,
        ),
        (&chunked, 200, b"abcde", true),
        (
            b"HTTP/1.1 503 No\r\ncontent-length: 0\r\nconnection: close\r\n\r\n",
            503,
            b"",
            false,
        ),
        (
            b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 No\r\n\r\n",
            204,
            b"",
            true,
        ),
        (b"HTTP/1.1 200 OK\r\n\r\nabcde", 200, b"abcde", false),
        (
            b"HTTP/1.0 200 OK\r\ncontent-length: 1\r\n\r\na",
            200,
            b"a",
            false,
        ),
    ];
    for (answer, status, body, is_reusable) in cases {
        for piece in [1, 7, 1000] {
            let (head, got, reusable) = exchange(answer, piece).await.unwrap();
            assert_eq!(
                (head.status, &got[..], reusable),
                (status, body, is_reusable)
            );
        }
    }
}

#[tokio::test]
async fn headers_of_the_connection_and_of_the_engine_s_place_stay_behind() {
    let answer = b"HTTP/1.1 200 OK\r\nContent-Type: a/b\r\nretry-after: 3\r\ncontent-length: 0\r\n\
        server: x\r\nlocation: http://10.0.0.1\r\nkeep-alive: timeout=5\r\nx-request-id: r\r\n\
        date: today\r\nvia: me\r\n\r\n";
    let (head, ..) = exchange(answer, 1000).await.unwrap();
    let names: Vec<_> = head.headers.keys().map(HeaderName::as_str).collect();
    assert_eq!(names, ["content-type", "retry-after"]);
}

#[tokio::test]
async fn what_is_cut_off_or_not_http_is_an_error() {
    let cut = |tail: &[u8]| [CHUNKED, tail].concat();
    for answer in [
        b"".to_vec(),
        b"HTTP/1.1 200".to_vec(),
        b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nabc".to_vec(),
        cut(b""),
        cut(b"3\r\nab"),
        cut(b"3\r\nabc\r\n"),
        cut(b"3\r\nabc\r\n0\r\n"),
    ] {
        let error = exchange(&answer, 1000).await.unwrap_err();
        assert!(matches!(error, WireError::Closed), "{error}");
    }
    for answer in [
        b"nonsense\r\n\r\n".to_vec(),
        b"HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\n".to_vec(),
        b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n".to_vec(),
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\n".to_vec(),
        b"HTTP/1.1 101 Switch\r\n\r\n".to_vec(),
        cut(b"zz\r\n"),
        cut(b"-1\r\n"),
        cut(b"ffffffffffffffff\r\n"),
        cut(b"1\r\nab\r\n"),
        cut(&[b'1'; 5000]),
        [&b"HTTP/1.1 200 OK\r\na: "[..], &vec![b'x'; 70_000]].concat(),
    ] {
        let error = exchange(&answer, 1000).await.unwrap_err();
        assert!(matches!(error, WireError::Malformed(_)), "{error}");
    }
}

#[tokio::test]
async fn an_answer_that_comes_before_the_request_is_read_is_taken() {
    let (mut connection, mut engine) = pair();
    engine
        .write_all(b"HTTP/1.1 413 No\r\ncontent-length: 0\r\n\r\n")
        .await
        .unwrap();
    let head = connection.send(b"head", &[0; 10_000]).await.unwrap();
    assert_eq!(head.status, 413);
    assert!(
        !connection.is_reusable(),
        "the rest of the request is missing"
    );
}

#[tokio::test]
async fn an_idle_connection_knows_when_it_is_over() {
    let (mut connection, engine) = pair();
    assert!(connection.is_open());
    drop(engine);
    assert!(!connection.is_open());
    tokio::time::timeout(Duration::from_secs(5), connection.closed())
        .await
        .unwrap();

    let (mut connection, mut engine) = pair();
    engine.write_all(b"unasked").await.unwrap();
    assert!(!connection.is_open());
}

#[tokio::test]
async fn whether_a_byte_of_the_answer_came_is_known() {
    for (answer, has_answered) in [(&b""[..], false), (b"H", true)] {
        let (mut connection, mut engine) = pair();
        engine.write_all(answer).await.unwrap();
        engine.shutdown().await.unwrap();
        connection.send(b"h", b"").await.unwrap_err();
        assert_eq!(connection.has_answered(), has_answered);
    }
}

proptest! {
    /// However a chunked body is cut up, on the wire and into chunks, it reads the same.
    #[test]
    fn chunks_come_together(
        chunks in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..50), 0..10),
        cuts in proptest::collection::vec(1_usize..20, 1..20),
        tail in proptest::collection::vec(any::<u8>(), 0..10),
    ) {
        let mut wire = Vec::new();
        for chunk in &chunks {
            wire.extend(format!("{:x}\r\n", chunk.len()).bytes());
            wire.extend(chunk);
            wire.extend(b"\r\n");
        }
        wire.extend(b"0\r\n\r\n");
        wire.extend(&tail);
        let (mut decoder, mut out) = (Decoder::chunked(), BytesMut::new());
        let (mut input, mut rest, mut cuts) = (BytesMut::new(), &wire[..], cuts.iter().cycle());
        while !rest.is_empty() {
            let cut = (*cuts.next().unwrap()).min(rest.len());
            input.extend_from_slice(&rest[..cut]);
            rest = &rest[cut..];
            decoder.decode(&mut input, &mut out).unwrap();
        }
        prop_assert!(decoder.is_done());
        prop_assert_eq!(&out[..], &chunks.concat()[..]);
        prop_assert_eq!(&input[..], &tail[..]);
    }

    /// Arbitrary bytes never panic, and never give more than came.
    #[test]
    fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let (mut input, mut out) = (BytesMut::from(&bytes[..]), BytesMut::new());
        let _ = Decoder::chunked().decode(&mut input, &mut out);
        prop_assert!(out.len() + input.len() <= bytes.len());
    }
}
