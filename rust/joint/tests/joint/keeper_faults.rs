//! Keepers that die, hang, are full, come again, or cannot be reached. The writer serves on, whatever becomes of its keeper;
//! what was not read goes to the next one, or to the same one later.

use std::time::Duration;

use orchestra_core::TokenId;
use rustix::process::Signal;

use crate::{
    process::{Process, Told},
    proxy::Proxy,
    support::{Cluster, KvEngine, collect, eventually, prompt, reference, wait_for_kept},
};

/// Too short to be computed by another worker, which keepers are there for.
const PROMPT: u32 = 202;
/// Its whole blocks, and their tokens.
const BLOCKS: u64 = 50;
const TOKENS: u64 = 200;
const MAX_TOKENS: u32 = 24;

fn start_writer(cluster: &Cluster, how: &str) -> KvEngine {
    Told::writer("writer", how).start_here(cluster, cluster.address)
}

fn start_keeper(cluster: &Cluster, name: &str, how: &str) -> KvEngine {
    Told::keeper(name, how).start_here(cluster, cluster.address)
}

/// The prompt that every test is about.
fn asked() -> Vec<TokenId> {
    prompt(3, PROMPT)
}

/// Lets the writer go, and asks the keeper what the writer was asked: none of what it has may be wrong.
async fn lose_writer(cluster: &Cluster, writer: KvEngine) {
    writer.wait_until_quiet();
    let stop = move || drop(writer);
    tokio::task::spawn_blocking(stop).await.unwrap();
    eventually("the loss", || cluster.num_workers() == 1);
    cluster.check(&asked(), MAX_TOKENS).await;
}

/// The same where the keeper is a worker of this process, which had all of the prompt.
async fn lose_writer_to(cluster: &Cluster, writer: KvEngine, keeper: &KvEngine) {
    lose_writer(cluster, writer).await;
    assert_eq!(keeper.agent.stats().host_hit_tokens, TOKENS);
    keeper.wait_until_quiet();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_keeper_that_is_killed_leaves_what_it_has_not_read_to_the_next() {
    let cluster = Cluster::start().await;
    let writer = start_writer(&cluster, "auto");
    // It hears of what there is to keep, and never answers.
    let first = Process::start(&cluster, Told::keeper("first", "auto"));
    first.signal(Signal::STOP);
    cluster.check(&asked(), MAX_TOKENS).await;
    first.signal(Signal::KILL);
    eventually("the loss", || cluster.num_workers() == 1);
    // The sequence has ended: nothing new is noted of it.
    let second = start_keeper(&cluster, "second", "auto");
    wait_for_kept(&second, BLOCKS).await;
    lose_writer_to(&cluster, writer, &second).await;
}

async fn a_keeper_is_stopped(how: &str) {
    let cluster = Cluster::start().await;
    let writer = start_writer(&cluster, how);
    let keeper = Process::start(&cluster, Told::keeper("keeper", how));
    keeper.signal(Signal::STOP);
    // All of it is served while the keeper stands still.
    cluster.check(&asked(), MAX_TOKENS).await;
    writer.wait_until_quiet();
    assert_eq!(cluster.num_kept(), 0);
    keeper.signal(Signal::CONT);
    eventually("the copies", || cluster.num_kept() >= BLOCKS);
    lose_writer(&cluster, writer).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_keeper_that_is_stopped_holds_nobody_up_and_copies_when_it_goes_on_over_shared_memory() {
    a_keeper_is_stopped("auto").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_keeper_that_is_stopped_holds_nobody_up_and_copies_when_it_goes_on_over_tcp() {
    a_keeper_is_stopped("tcp").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_keeper_that_is_full_takes_its_share_and_keeps_what_came_last() {
    let cluster = Cluster::start().await;
    let writer = start_writer(&cluster, "auto");
    let told = Told {
        num_host_blocks: 16,
        ..Told::keeper("keeper", "auto")
    };
    let keeper = told.start_here(&cluster, cluster.address);
    let other = prompt(8, PROMPT);
    for (prompt, num_kept) in [(&other, 8), (&asked(), 16)] {
        cluster.check(prompt, 1).await;
        // Half of host memory, and nothing more of that prompt.
        wait_for_kept(&keeper, num_kept).await;
        assert_eq!(keeper.agent.stats().kv_blocks_kept, num_kept);
    }
    // What follows the blocks that it has cannot take their place.
    let longer = [asked(), prompt(9, 40)].concat();
    cluster.check(&longer, 1).await;
    lose_writer(&cluster, writer).await;
    cluster.check(&other, 1).await;
    cluster.check(&longer, 1).await;
    let stats = keeper.agent.stats();
    assert_eq!((stats.kv_blocks_kept, stats.host_hit_tokens), (16, 4 * 8));
    keeper.wait_until_quiet();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_keeper_that_comes_again_has_nothing_and_gets_what_runs() {
    let cluster = Cluster::start().await;
    let writer = start_writer(&cluster, "tcp");
    let first = Process::start(&cluster, Told::keeper("keeper", "tcp"));
    cluster.check(&prompt(8, PROMPT), 1).await;
    eventually("the copies", || cluster.num_kept() >= BLOCKS);
    writer.allow(0);
    let stream = cluster.begin(&asked(), MAX_TOKENS).await;
    first.signal(Signal::KILL);
    eventually("the loss", || cluster.num_workers() == 1);
    let second = start_keeper(&cluster, "keeper", "tcp");
    writer.allow(u32::MAX);
    let expected = reference(&asked(), MAX_TOKENS as usize);
    assert_eq!(collect(stream).await, expected);
    wait_for_kept(&second, BLOCKS).await;
    lose_writer_to(&cluster, writer, &second).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_keeper_that_cannot_be_reached_is_given_up_and_copies_when_it_is_back() {
    // A silence that no busy machine keeps up by itself, and that a test can wait for.
    let cluster = Cluster::start_with(Duration::from_secs(3)).await;
    let writer = start_writer(&cluster, "auto");
    let line = Proxy::start(cluster.address).await;
    let keeper = Told::keeper("keeper", "auto").start_here(&cluster, line.address);
    line.set_dead(true);
    cluster.check(&asked(), MAX_TOKENS).await;
    writer.wait_until_quiet();
    eventually("it is given up", || cluster.num_workers() == 1);
    assert_eq!(keeper.agent.stats().kv_blocks_kept, 0);
    line.set_dead(false);
    wait_for_kept(&keeper, BLOCKS).await;
    eventually("it is back", || cluster.num_workers() == 2);
    lose_writer_to(&cluster, writer, &keeper).await;
}
