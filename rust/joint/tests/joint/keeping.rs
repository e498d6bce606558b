//! KV that a keeper has copied, and what it is worth when its worker is killed: real processes, real signals.

use rustix::process::Signal;

use crate::{
    process::{Process, Told},
    support::{Cluster, PROMPT, PROMPT_BLOCKS, collect, prompt, reference, wait_for_kept},
};

const MAX_TOKENS: usize = 400;

async fn a_writer_is_killed(how: &str) {
    let cluster = Cluster::start().await;
    // Alone at first, so that the request runs there.
    let writer = Process::start(&cluster, Told::writer("writer", how));
    let prompt = prompt(3, PROMPT);
    let stream = cluster.begin(&prompt, MAX_TOKENS as u32).await;
    let keeper = Told::keeper("keeper", how).start_here(&cluster, cluster.address);
    wait_for_kept(&keeper, PROMPT_BLOCKS).await;
    writer.signal(Signal::KILL);
    assert_eq!(collect(stream).await, reference(&prompt, MAX_TOKENS));
    // What was written through is copied back: the prompt, and perhaps some of the answer.
    assert!(keeper.agent.stats().host_hit_tokens >= 4 * PROMPT_BLOCKS);
    keeper.wait_until_quiet();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_written_through_is_not_computed_again_over_shared_memory() {
    a_writer_is_killed("auto").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_written_through_is_not_computed_again_over_tcp() {
    a_writer_is_killed("tcp").await;
}

/// Whatever the keeper has by then, and whatever it is reading: no byte of it may be wrong.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_writer_may_die_while_it_is_read() {
    for (seed, how, num_kept) in [(1, "tcp", 1), (2, "auto", PROMPT_BLOCKS)] {
        let cluster = Cluster::start().await;
        let writer = Process::start(&cluster, Told::writer("writer", how));
        let prompt = prompt(seed, 2 * PROMPT);
        let stream = cluster.begin(&prompt, 8).await;
        let keeper = Told::keeper("keeper", how).start_here(&cluster, cluster.address);
        wait_for_kept(&keeper, num_kept).await;
        writer.signal(Signal::KILL);
        assert_eq!(collect(stream).await, reference(&prompt, 8), "{how}");
        keeper.wait_until_quiet();
    }
}
