//! KV that moves between workers: who is told what, and that no request depends on it.

use orchestra_core::{block_hashes, hash::SeedParts, step::FinishReason};
use orchestra_proto::v1::{self, WorkerRole, router_message::Message as Down};
use orchestra_router::{
    corridor::TokenStream,
    request::{GenerateInput, Prompt},
};
use tonic::Code;

use crate::support::{
    TestRouter, Worker, bytes, collect, eventually, hello, input, limits, next, tokens,
};

/// Tokens of a prompt that is worth splitting: 25 blocks and a tail.
const LONG: usize = 410;
const BLOCKS: u32 = 25;

/// What a worker says first that exchanges KV.
pub(crate) fn kv_hello(worker_id: &str, role: WorkerRole) -> v1::WorkerHello {
    v1::WorkerHello {
        kv_transfer: Some(v1::KvTransfer {
            epoch: 3,
            metadata: [("shm".to_owned(), worker_id.as_bytes().to_vec())].into(),
            bytes_per_block: 1000,
            layout: "bf16".to_owned(),
            host: "host".to_owned(),
            ..v1::KvTransfer::default()
        }),
        role: role.into(),
        ..hello(worker_id)
    }
}

fn prompt(len: usize) -> Vec<u32> {
    (0..len as u32).map(|index| index % 90).collect()
}

fn request(len: usize) -> GenerateInput {
    input(Prompt::TokenIds(prompt(len)))
}

/// The names of the prompt's first blocks.
fn hashes(num_blocks: usize) -> Vec<u64> {
    let parts = SeedParts {
        model: "tiny",
        weights_epoch: 7,
        ..SeedParts::default()
    };
    let token_ids = prompt(num_blocks * 16);
    let blocks = block_hashes(parts.seed(), &token_ids, 16);
    blocks.into_iter().map(|hash| hash.0).collect()
}

/// A report of a worker that has much to do, so that new requests go elsewhere.
fn busy() -> v1::LoadReport {
    v1::LoadReport {
        num_running: 40,
        queued_prefill_tokens: 50_000,
        kv_blocks_total: 1000,
        ..v1::LoadReport::default()
    }
}

async fn attach(router: &TestRouter, worker_id: &str, role: WorkerRole) -> Worker {
    router.attach_as(kv_hello(worker_id, role)).await
}

/// A holder of the first blocks of the prompt that is too busy for requests.
async fn busy_holder(router: &TestRouter, hello: v1::WorkerHello, num_blocks: usize) -> Worker {
    let mut holder = router.attach_as(hello).await;
    holder.kv_stored(hashes(num_blocks)).await;
    holder.report(busy()).await;
    let shown = "orchestra_worker_requests_running{worker=\"holder\"}";
    eventually("the report", || router.metric(shown) == Some(40)).await;
    holder
}

async fn finish(worker: &Worker, sequence_id: u64, from: u32, text: &str) {
    let reason = v1::FinishReason::Length;
    worker.finish(sequence_id, from, &bytes(text), reason).await;
}

/// The end of a helper's sequence: all is computed.
async fn prefilled(worker: &Worker, sequence_id: u64) {
    let reason = v1::FinishReason::Prefilled;
    worker.finish(sequence_id, 0, &[], reason).await;
}

/// The message of a peer that comes next.
async fn from_peer(worker: &mut Worker) -> v1::PeerMessage {
    match worker.next().await {
        Ok(Down::FromPeer(message)) => message,
        other => panic!("a peer's message was due, got {other:?}"),
    }
}

fn undeliverable(peer: &str) -> v1::PeerMessage {
    v1::PeerMessage {
        worker_id: peer.to_owned(),
        payload: Vec::new(),
        is_undeliverable: true,
    }
}

fn moves(router: &TestRouter, kind: &str, outcome: &str) -> Option<i64> {
    let labels = format!("kind=\"{kind}\",outcome=\"{outcome}\"");
    router.metric(&format!("orchestra_kv_moves_total{{{labels}}}"))
}

// === fetch ===

#[tokio::test]
async fn what_another_worker_holds_is_fetched() {
    let router = TestRouter::start(limits()).await;
    let _holder = busy_holder(&router, kv_hello("holder", WorkerRole::Unspecified), 20).await;
    let mut worker = attach(&router, "w", WorkerRole::Unspecified).await;
    let stream = router.generate(request(LONG)).await.unwrap();
    let start = worker.start().await;
    let source = start.kv_source.unwrap();
    assert_eq!((source.num_blocks, source.is_pushed), (20, false));
    assert!(source.timeout_ms > 0);
    let peer = source.peer.unwrap();
    assert_eq!((peer.worker_id.as_str(), peer.epoch), ("holder", 3));
    assert_eq!(peer.metadata["shm"], b"holder");
    assert_eq!(start.kv_target, None);

    let mut output = tokens(start.sequence_id, 0, &bytes("a"));
    (output.cached_tokens, output.fetched_tokens) = (320, 320);
    worker.output(output).await;
    let (answers, ()) = tokio::join!(
        collect(stream, 1),
        finish(&worker, start.sequence_id, 1, "b")
    );
    assert_eq!(answers.unwrap()[0].text, "ab");
    assert_eq!(moves(&router, "fetch", "moved"), Some(1));
    let shown = "orchestra_kv_moved_bytes_total{kind=\"fetch\"}";
    assert_eq!(router.metric(shown), Some(20 * 1000));
}

#[tokio::test]
async fn nobody_is_told_to_fetch_what_it_could_not_read() {
    let other = v1::KvTransfer {
        layout: "fp8".to_owned(),
        ..kv_hello("holder", WorkerRole::Unspecified)
            .kv_transfer
            .unwrap()
    };
    for transfer in [None, Some(other)] {
        let router = TestRouter::start(limits()).await;
        let holder = v1::WorkerHello {
            kv_transfer: transfer,
            ..hello("holder")
        };
        let _holder = busy_holder(&router, holder, 20).await;
        let mut worker = attach(&router, "w", WorkerRole::Unspecified).await;
        let _stream = router.generate(request(LONG)).await.unwrap();
        assert_eq!(worker.start().await.kv_source, None);
    }
}

#[tokio::test]
async fn a_fetch_that_brings_nothing_is_no_failure() {
    let router = TestRouter::start(limits()).await;
    let _holder = busy_holder(&router, kv_hello("holder", WorkerRole::Unspecified), 20).await;
    let mut worker = attach(&router, "w", WorkerRole::Unspecified).await;
    let stream = router.generate(request(LONG)).await.unwrap();
    let start = worker.start().await;
    assert!(start.kv_source.is_some());
    let (answers, ()) = tokio::join!(
        collect(stream, 1),
        finish(&worker, start.sequence_id, 0, "ab")
    );
    assert_eq!(answers.unwrap()[0].text, "ab");
    assert_eq!(moves(&router, "fetch", "computed"), Some(1));
}

// === split ===

/// A request whose prompt one worker computes for another: its stream, both workers and their starts.
struct Split {
    router: TestRouter,
    stream: TokenStream,
    p: Worker,
    d: Worker,
    on_p: v1::StartSequence,
    on_d: v1::StartSequence,
}

impl Split {
    async fn begin() -> Self {
        let router = TestRouter::start(limits()).await;
        let mut p = attach(&router, "p", WorkerRole::Prefill).await;
        let mut d = attach(&router, "d", WorkerRole::Decode).await;
        let stream = router.generate(request(LONG)).await.unwrap();
        let (on_p, on_d) = (p.start().await, d.start().await);
        Self {
            router,
            stream,
            p,
            d,
            on_p,
            on_d,
        }
    }
}

/// The decode worker ends the sequence by itself.
async fn end_alone(stream: TokenStream, d: &Worker, on_d: &v1::StartSequence) {
    let (answers, ()) = tokio::join!(collect(stream, 1), finish(d, on_d.sequence_id, 0, "done"));
    let answer = &answers.unwrap()[0];
    let end = (answer.text.as_str(), answer.finish);
    assert_eq!(end, ("done", Some(FinishReason::Length)));
}

#[tokio::test]
async fn a_long_prompt_is_computed_where_nobody_decodes() {
    let split = Split::begin().await;
    let (on_p, on_d) = (&split.on_p, &split.on_d);
    let target = on_p.kv_target.clone().unwrap();
    let source = on_d.kv_source.clone().unwrap();
    assert_eq!(source.peer.unwrap().worker_id, "p");
    assert_eq!(target.peer.unwrap().worker_id, "d");
    assert_eq!((source.num_blocks, target.num_blocks), (BLOCKS, BLOCKS));
    assert_eq!(source.transfer_id, target.transfer_id);
    assert!(source.is_pushed && on_d.kv_target.is_none() && on_p.kv_source.is_none());
    assert_eq!(on_p.prompt_token_ids, on_d.prompt_token_ids);

    prefilled(&split.p, on_p.sequence_id).await;
    let mut first = tokens(on_d.sequence_id, 0, &bytes("a"));
    (first.cached_tokens, first.fetched_tokens) = (400, 400);
    split.d.output(first).await;
    let (answers, ()) = tokio::join!(
        collect(split.stream, 1),
        finish(&split.d, on_d.sequence_id, 1, "b")
    );
    assert_eq!(answers.unwrap()[0].text, "ab");
    assert_eq!(moves(&split.router, "split", "moved"), Some(1));
}

#[tokio::test]
async fn short_and_cached_prompts_stay_where_they_decode() {
    let router = TestRouter::start(limits()).await;
    let mut p = attach(&router, "p", WorkerRole::Prefill).await;
    let mut d = attach(&router, "d", WorkerRole::Decode).await;
    let _short = router.generate(request(40)).await.unwrap();
    assert_eq!(d.start().await.kv_source, None);
    d.kv_stored(hashes(24)).await;
    let shown = "orchestra_worker_requests_running{worker=\"d\"}";
    let report = v1::LoadReport {
        num_running: 1,
        ..v1::LoadReport::default()
    };
    d.report(report).await;
    eventually("the report", || router.metric(shown) == Some(1)).await;
    let _cached = router.generate(request(LONG)).await.unwrap();
    assert_eq!(d.start().await.kv_source, None);
    drop(d);
    eventually("the loss", || router.num_workers("tiny") == 1).await;
    // Where prompts are computed for others, whole requests go while nobody else is left.
    let _whole = router.generate(request(LONG)).await.unwrap();
    assert_eq!(p.start().await.kv_target, None);
}

#[tokio::test]
async fn a_helper_that_dies_or_refuses_ends_the_wait_and_not_the_request() {
    for is_death in [true, false] {
        let mut split = Split::begin().await;
        let p = if is_death {
            drop(split.p);
            None
        } else {
            let id = split.on_p.sequence_id;
            split.p.fail(id, "queue_full", "busy").await;
            Some(split.p)
        };
        assert_eq!(from_peer(&mut split.d).await, undeliverable("p"));
        end_alone(split.stream, &split.d, &split.on_d).await;
        assert_eq!(moves(&split.router, "split", "computed"), Some(1));
        drop(p);
    }
}

#[tokio::test]
async fn a_helper_that_never_answers_is_let_go_with_the_first_token() {
    let mut split = Split::begin().await;
    end_alone(split.stream, &split.d, &split.on_d).await;
    assert_eq!(split.p.abort().await, split.on_p.sequence_id);
}

#[tokio::test]
async fn a_request_that_is_given_up_ends_on_both() {
    let mut split = Split::begin().await;
    drop(split.stream);
    assert_eq!(split.p.abort().await, split.on_p.sequence_id);
    assert_eq!(split.d.abort().await, split.on_d.sequence_id);
    assert_eq!(moves(&split.router, "split", "abandoned"), Some(1));
}

#[tokio::test]
async fn a_decode_worker_that_dies_is_replaced_and_helped_again() {
    let mut split = Split::begin().await;
    let id = split.on_d.sequence_id;
    split.d.tokens(id, 0, &bytes("one")).await;
    assert_eq!(next(&mut split.stream).await.unwrap().text, "one");
    assert_eq!(split.p.abort().await, split.on_p.sequence_id);
    let mut other = attach(&split.router, "e", WorkerRole::Decode).await;
    drop(split.d);
    let (answers, ()) = tokio::join!(collect(split.stream, 1), async {
        let on_p = split.p.start().await;
        let target = on_p.kv_target.unwrap();
        assert_eq!(target.peer.unwrap().worker_id, "e");
        let num_tokens = on_p.prompt_token_ids.len();
        assert_eq!(num_tokens, LONG + 3, "what was drawn is computed too");
        let again = other.start().await;
        assert_eq!(again.output_token_ids, bytes("one"));
        let source = again.kv_source.unwrap();
        assert_eq!(source.transfer_id, target.transfer_id);
        prefilled(&split.p, on_p.sequence_id).await;
        finish(&other, again.sequence_id, 3, " two").await;
    });
    assert_eq!(answers.unwrap()[0].text, " two");
}

#[tokio::test]
async fn a_sequence_of_the_wrong_kind_of_output_closes_its_worker() {
    let mut split = Split::begin().await;
    split.p.tokens(split.on_p.sequence_id, 0, &[97]).await;
    assert_eq!(split.p.closed().await.code(), Code::InvalidArgument);
    assert_eq!(from_peer(&mut split.d).await, undeliverable("p"));
    prefilled(&split.d, split.on_d.sequence_id).await;
    assert_eq!(split.d.closed().await.code(), Code::InvalidArgument);
}

// === messages between workers ===

async fn send(worker: &Worker, to: &str, payload: Vec<u8>) {
    let message = v1::PeerMessage {
        worker_id: to.to_owned(),
        payload,
        is_undeliverable: false,
    };
    worker
        .send(v1::worker_message::Message::ToPeer(message))
        .await;
}

#[tokio::test]
async fn peers_hear_each_other_and_of_those_they_cannot_reach() {
    let router = TestRouter::start(limits()).await;
    let mut a = attach(&router, "a", WorkerRole::Unspecified).await;
    let mut b = attach(&router, "b", WorkerRole::Unspecified).await;
    let _alone = router.attach("alone").await;
    send(&a, "b", b"grant".to_vec()).await;
    let heard = from_peer(&mut b).await;
    assert_eq!(
        (heard.worker_id.as_str(), &heard.payload[..]),
        ("a", &b"grant"[..])
    );
    assert!(!heard.is_undeliverable);
    for stranger in ["nobody", "alone"] {
        send(&a, stranger, vec![1]).await;
        assert_eq!(from_peer(&mut a).await, undeliverable(stranger));
    }
    let shown = "orchestra_kv_peer_messages_undeliverable_total";
    assert_eq!(router.metric(shown), Some(2));
    send(&a, "b", vec![0; (1 << 20) + 1]).await;
    assert_eq!(a.closed().await.code(), Code::InvalidArgument);
}

#[tokio::test]
async fn a_peer_that_does_not_read_holds_nobody_up() {
    let router = TestRouter::start(limits()).await;
    let mut a = attach(&router, "a", WorkerRole::Unspecified).await;
    let _deaf = attach(&router, "deaf", WorkerRole::Unspecified).await;
    let mut b = attach(&router, "b", WorkerRole::Unspecified).await;
    // More than the network between and the router take together.
    for _ in 0..64 {
        send(&a, "deaf", vec![0; 1 << 20]).await;
    }
    assert_eq!(from_peer(&mut a).await, undeliverable("deaf"));
    send(&a, "b", b"still here".to_vec()).await;
    assert_eq!(from_peer(&mut b).await.payload, b"still here");
}
