//! KV that a keeper has copied, and what it is worth when its worker is killed: real processes, real signals.

use std::{
    env,
    net::SocketAddr,
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use orchestra_agent::{KvTransports, Role};
use rustix::process::{Pid, Signal, kill_process};

use crate::support::{
    Cluster, KvEngine, PROMPT, collect, config, eventually, kv_pool_with, prompt, reference,
};

/// What a worker of its own is told: router, name, failure domain, transports.
const CHILD: &str = "ORCHESTRA_TEST_WRITER";
const LAYERS: u32 = 3;
const MAX_TOKENS: usize = 400;
/// The writer computes at an engine's pace, so that the keeper comes in the middle of the answer; and not to its end.
const STEP: Duration = Duration::from_millis(10);
const STEPS: u32 = 350;
const HOST_BLOCKS: u32 = 512;
/// Whole blocks of a prompt.
const PROMPT_BLOCKS: u64 = 100;

/// A worker in a process of its own, which writes through.
struct Writer(Child);

impl Writer {
    fn start(cluster: &Cluster, name: &str, domain: &str, transports: &str) -> Self {
        let before = cluster.num_workers();
        let told = format!("{} {name} {domain} {transports}", cluster.address);
        let child = Command::new(env::current_exe().unwrap())
            .args(["--exact", "keeping::a_worker_of_its_own", "--ignored"])
            .env(CHILD, told)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        eventually("the writer", || cluster.num_workers() > before);
        Self(child)
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.0), signal).unwrap();
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
#[ignore = "what the other tests here run as another process"]
fn a_worker_of_its_own() {
    let told = env::var(CHILD).expect("run by the other tests only");
    let parts: Vec<&str> = told.split(' ').collect();
    let address = parts[0].parse::<SocketAddr>().unwrap();
    let mut settings = config(address, parts[1], Role::Both);
    settings.scheduler.num_host_blocks = HOST_BLOCKS;
    let pool = kv_pool_with(&settings, transports(parts[3]), |pool| {
        pool.failure_domain = parts[2].to_owned();
        pool.write_through = true;
    });
    let engine = KvEngine::start(&settings, pool);
    engine.allow(0);
    // Ended by a signal, or with the process that started it.
    let parent = rustix::process::getppid();
    let mut steps = 0;
    while rustix::process::getppid() == parent {
        if steps < STEPS && !engine.agent.stats().is_idle() {
            steps += 1;
            engine.allow(LAYERS);
        }
        thread::sleep(STEP);
    }
}

fn transports(name: &str) -> KvTransports {
    match name {
        "tcp" => KvTransports::Tcp,
        _ => KvTransports::Auto,
    }
}

/// A worker of this process that keeps copies for others.
fn keeper(cluster: &Cluster, name: &str, domain: &str, how: &str, host_blocks: u32) -> KvEngine {
    let before = cluster.num_workers();
    let mut settings = config(cluster.address, name, Role::Both);
    settings.scheduler.num_host_blocks = host_blocks;
    let pool = kv_pool_with(&settings, transports(how), |pool| {
        domain.clone_into(&mut pool.failure_domain);
    });
    let engine = KvEngine::start(&settings, pool);
    eventually("the keeper", || cluster.num_workers() > before);
    engine
}

async fn wait_for_kept(keeper: &KvEngine, num_blocks: u64) {
    let agent = std::sync::Arc::clone(&keeper.agent);
    let wait = move || {
        eventually("the copies", || agent.stats().kv_blocks_kept >= num_blocks);
    };
    tokio::task::spawn_blocking(wait).await.unwrap();
}

async fn a_writer_is_killed(how: &str) {
    let cluster = Cluster::start().await;
    // Alone at first, so that the request runs there.
    let writer = Writer::start(&cluster, "writer", "here", how);
    let prompt = prompt(3, PROMPT);
    let stream = cluster.begin(&prompt, MAX_TOKENS as u32).await;
    let keeper = keeper(&cluster, "keeper", "there", how, HOST_BLOCKS);
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
