//! KV that moves because the router says so.

use futures_util::{StreamExt as _, future};
use orchestra_agent::{KvTransports, Role};
use orchestra_core::TokenId;

use crate::support::{Cluster, PROMPT, collect, eventually, prompt, reference};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_burst_with_a_common_beginning_spreads_and_fetches_it() {
    let cluster = Cluster::start().await;
    let a = cluster.worker("a", Role::Both, KvTransports::Auto);
    let b = cluster.worker("b", Role::Both, KvTransports::Auto);
    let common = prompt(1, PROMPT);
    cluster.check(&common, 2).await;
    let prompts: Vec<Vec<TokenId>> = (0..6)
        .map(|number| [&common[..], &prompt(50 + number, 9)].concat())
        .collect();
    let answers = prompts.iter().map(|prompt| cluster.check(prompt, 12));
    future::join_all(answers).await;
    assert!(cluster.moves("fetch", "moved") > 0);
    assert_eq!(cluster.moves("fetch", "computed"), 0);
    for worker in [&a, &b] {
        worker.wait_until_quiet();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn long_prompts_are_computed_by_one_worker_for_the_other() {
    for transports in [KvTransports::Auto, KvTransports::Tcp] {
        let cluster = Cluster::start().await;
        let p = cluster.worker("p", Role::Prefill, transports);
        let d = cluster.worker("d", Role::Decode, transports);
        for seed in 0..2 {
            cluster.check(&prompt(seed, PROMPT), 6).await;
        }
        assert_eq!(cluster.moves("split", "moved"), 2);
        assert_eq!(d.agent.stats().kv_blocks_fetched, 200);
        p.wait_until_quiet();
        d.wait_until_quiet();
        // Whole requests go where only prompts were computed, once nobody else is left.
        drop(d);
        eventually("the loss", || cluster.num_workers() == 1);
        cluster.check(&prompt(7, 30), 4).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prompt_whose_worker_dies_is_computed_where_it_is_awaited() {
    let cluster = Cluster::start().await;
    let p = cluster.worker("p", Role::Prefill, KvTransports::Auto);
    let d = cluster.worker("d", Role::Decode, KvTransports::Auto);
    // It stands still behind the first layer of its first step.
    p.allow(0);
    let prompt = prompt(5, PROMPT);
    let kill = async {
        let stop = move || {
            eventually("the prompt is being computed", || p.agent.stats().steps > 0);
            drop(p);
        };
        tokio::task::spawn_blocking(stop).await.unwrap();
    };
    tokio::join!(cluster.check(&prompt, 6), kill);
    assert_eq!(cluster.moves("split", "computed"), 1);
    d.wait_until_quiet();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_dies_while_decoding_is_replaced_and_nothing_is_lost() {
    let cluster = Cluster::start().await;
    let p = cluster.worker("p", Role::Prefill, KvTransports::Auto);
    let d = cluster.worker("d", Role::Decode, KvTransports::Auto);
    let prompt = prompt(9, PROMPT);
    let mut stream = cluster.begin(&prompt, 40).await;
    let mut token_ids = stream.next().await.unwrap().unwrap().token_ids;
    let e = cluster.worker("e", Role::Decode, KvTransports::Auto);
    tokio::task::spawn_blocking(move || drop(d)).await.unwrap();
    token_ids.extend(collect(stream).await);
    assert_eq!(token_ids, reference(&prompt, 40));
    for worker in [&p, &e] {
        worker.wait_until_quiet();
    }
}
