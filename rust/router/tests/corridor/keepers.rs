//! Who is told to keep copies of whose KV.

use orchestra_proto::v1::{self, WorkerRole, router_message::Message as Down};

use crate::{
    moves::kv_hello,
    support::{TestRouter, Worker, eventually, limits},
};

/// What a worker says first that has host memory.
fn keeper_hello(worker_id: &str, domain: &str) -> v1::WorkerHello {
    let mut hello = kv_hello(worker_id, WorkerRole::Unspecified);
    hello.num_host_blocks = 8;
    if let Some(kv) = &mut hello.kv_transfer {
        domain.clone_into(&mut kv.failure_domain);
    }
    hello
}

fn writer_hello(worker_id: &str, domain: &str) -> v1::WorkerHello {
    let mut hello = keeper_hello(worker_id, domain);
    if let Some(kv) = &mut hello.kv_transfer {
        kv.writes_through = true;
    }
    hello
}

/// The next name that a worker is told; empty: nobody.
async fn named(worker: &mut Worker) -> String {
    match worker.next().await.unwrap() {
        Down::Keeper(keeper) => keeper.peer.map_or_else(String::new, |peer| peer.worker_id),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_keeper_is_of_another_domain_where_there_is_one_and_stays_while_it_lives() {
    let router = TestRouter::start(limits()).await;
    let mut writer = router.attach_as(writer_hello("writer", "x")).await;
    assert_eq!(named(&mut writer).await, "");
    let near = router.attach_as(keeper_hello("near", "x")).await;
    assert_eq!(named(&mut writer).await, "near", "better than nobody");
    let far = router.attach_as(keeper_hello("far", "y")).await;
    assert_eq!(named(&mut writer).await, "far");
    // Others come, and what is told next is told because the keeper goes.
    let farther = router.attach_as(keeper_hello("farther", "z")).await;
    let _near_too = router.attach_as(keeper_hello("near-too", "x")).await;
    drop(far);
    assert_eq!(named(&mut writer).await, "farther");
    drop(near);
    eventually("it is gone", || router.num_workers("tiny") == 3).await;
    drop(farther);
    assert_eq!(named(&mut writer).await, "near-too");
    let returned = router.attach_as(keeper_hello("far", "y")).await;
    assert_eq!(named(&mut writer).await, "far", "of another domain again");
    drop(returned);
    assert_eq!(named(&mut writer).await, "near-too");
}

#[tokio::test]
async fn who_has_no_host_memory_or_other_kv_keeps_nothing() {
    let router = TestRouter::start(limits()).await;
    let mut without = keeper_hello("without", "y");
    without.num_host_blocks = 0;
    let mut other = keeper_hello("other", "y");
    if let Some(kv) = &mut other.kv_transfer {
        kv.layout = "fp8".to_owned();
    }
    let mut mute = keeper_hello("mute", "y");
    mute.kv_transfer = None;
    let mut workers = Vec::new();
    for hello in [without, other, mute] {
        workers.push(router.attach_as(hello).await);
    }
    let mut writer = router.attach_as(writer_hello("writer", "x")).await;
    assert_eq!(named(&mut writer).await, "");
    // Two that write through keep for each other.
    let mut second = router.attach_as(writer_hello("second", "y")).await;
    assert_eq!(named(&mut writer).await, "second");
    assert_eq!(named(&mut second).await, "writer");
}
