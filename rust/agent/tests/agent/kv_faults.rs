//! Workers that are killed or stopped in the middle of a move: real processes, real signals.

use std::{
    env,
    net::SocketAddr,
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use orchestra_agent::KvTransports::{self, Shm, Tcp};
use orchestra_proto::v1::{FinishReason, KvSource, KvTarget, StartSequence};
use rustix::process::{Pid, Signal, kill_process};

use crate::support::{
    Cluster, FakeRouter, KvEngine, Line, config, eventually, kv_pool_with, reference, start,
};

const NAME: &str = "worker-of-its-own";
/// The router to dial, what moves KV, after how many layers the engine stands still, whether it writes through, and its
/// name.
const CHILD: &str = "ORCHESTRA_TEST_KV_WORKER";
/// How long the worker that lives waits for the other, where that says nothing.
const TIMEOUT_MS: u32 = 400;
/// The same where the router knows better: longer than any test waits.
const FOREVER_MS: u32 = 60_000;
const BLOCKS: u32 = 5;

/// A worker in a process of its own.
pub(crate) struct Process {
    pub(crate) line: Line,
    child: Child,
}

impl Process {
    fn start(cluster: &Cluster, transports: KvTransports, layers: u32) -> Self {
        Self::start_as(cluster, transports, layers, None)
    }

    /// One whose cache is written through.
    pub(crate) fn start_writer(cluster: &Cluster, transports: KvTransports, name: &str) -> Self {
        Self::start_as(cluster, transports, u32::MAX, Some(name))
    }

    fn start_as(
        cluster: &Cluster,
        transports: KvTransports,
        layers: u32,
        writer: Option<&str>,
    ) -> Self {
        let (writes, name) = (writer.is_some(), writer.unwrap_or(NAME));
        let router = FakeRouter::start();
        let kind = if transports == Tcp { "tcp" } else { "shm" };
        let child = Command::new(env::current_exe().unwrap())
            .args(["--exact", "kv_faults::a_worker_of_its_own", "--ignored"])
            .env(
                CHILD,
                format!("{} {kind} {layers} {writes} {name}", router.address),
            )
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let line = cluster.attach(router);
        Self { line, child }
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).unwrap();
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
#[ignore = "what the other tests here run as another process"]
fn a_worker_of_its_own() {
    let told = env::var(CHILD).expect("run by the other tests only");
    let parts: Vec<&str> = told.split(' ').collect();
    let mut config = config(parts[0].parse::<SocketAddr>().unwrap());
    config.worker_id = parts[4].to_owned();
    let transports = if parts[1] == "tcp" { Tcp } else { Shm };
    let writes = parts[3].parse().unwrap();
    let pool = kv_pool_with(&config, transports, |pool| pool.write_through = writes);
    let engine = KvEngine::start(&config, pool);
    engine.allow(parts[2].parse().unwrap());
    // Ended by a signal, or with the process that started it.
    let parent = rustix::process::getppid();
    while rustix::process::getppid() == parent {
        thread::sleep(Duration::from_millis(50));
    }
}

fn request(sequence_id: u64, max_tokens: u32) -> StartSequence {
    StartSequence {
        sequence_id,
        ..start(7, 22, max_tokens)
    }
}

fn taking(from: &Process, id: u64, is_pushed: bool, timeout_ms: u32) -> StartSequence {
    StartSequence {
        kv_source: Some(KvSource {
            peer: Some(from.line.peer()),
            transfer_id: id,
            num_blocks: BLOCKS,
            is_pushed,
            timeout_ms,
        }),
        ..request(id, 4)
    }
}

/// Lets another process push, until it stands still behind the first layer.
fn push_until_the_first_layer(cluster: &Cluster, giver: &Process, timeout_ms: u32) {
    let taker = &cluster.members[0];
    taker.start(taking(giver, 1, true, timeout_ms));
    giver.line.start(StartSequence {
        kv_target: Some(KvTarget {
            peer: Some(taker.peer()),
            transfer_id: 1,
            num_blocks: BLOCKS,
            timeout_ms: 30_000,
        }),
        ..request(1, 4)
    });
    eventually("the first layer is there", || {
        taker.engine.has_first_block(0)
    });
}

fn check_computed(cluster: &Cluster, sequence_id: u64) {
    let output = cluster.members[0].finish(sequence_id);
    assert_eq!(output.finish_reason(), FinishReason::Length);
    let prompt = request(0, 1).prompt_token_ids;
    assert_eq!(output.token_ids, reference(&prompt, 4));
    assert_eq!(output.fetched_tokens, 0);
}

fn a_writer_is_killed(transports: KvTransports) {
    let cluster = Cluster::start(&[transports], |_| {});
    let giver = Process::start(&cluster, transports, 0);
    push_until_the_first_layer(&cluster, &giver, FOREVER_MS);
    giver.signal(Signal::KILL);
    check_computed(&cluster, 1);
    assert_eq!(cluster.members[0].engine.agent.stats().kv_fetch_failures, 1);
    cluster.members[0].engine.wait_until_quiet();
}

#[test]
fn a_writer_that_is_killed_costs_no_timeout_and_no_block_over_shared_memory() {
    a_writer_is_killed(Shm);
}

#[test]
fn a_writer_that_is_killed_costs_no_timeout_and_no_block_over_tcp() {
    a_writer_is_killed(Tcp);
}

fn a_writer_is_stopped(transports: KvTransports) {
    let cluster = Cluster::start(&[transports], |_| {});
    let taker = &cluster.members[0];
    let giver = Process::start(&cluster, transports, 0);
    push_until_the_first_layer(&cluster, &giver, TIMEOUT_MS);
    giver.signal(Signal::STOP);
    check_computed(&cluster, 1);
    eventually("nobody runs", || taker.engine.agent.is_idle());
    // Its blocks stay withheld: it may go on at any time. Others are used meanwhile.
    assert_eq!(taker.engine.agent.stats().kv_blocks_used, BLOCKS);
    taker.start(request(2, 4));
    check_computed(&cluster, 2);
    assert_eq!(taker.engine.agent.stats().kv_blocks_used, BLOCKS);
    giver.signal(Signal::CONT);
    taker.engine.wait_until_quiet();
    taker.start(request(3, 4));
    check_computed(&cluster, 3);
}

#[test]
fn a_writer_that_is_stopped_keeps_its_blocks_until_it_goes_on_over_shared_memory() {
    a_writer_is_stopped(Shm);
}

#[test]
fn a_writer_that_is_stopped_keeps_its_blocks_until_it_goes_on_over_tcp() {
    a_writer_is_stopped(Tcp);
}

#[test]
fn a_holder_that_is_stopped_costs_the_timeout_and_lets_go_when_it_goes_on() {
    let cluster = Cluster::start(&[Shm], |_| {});
    let holder = Process::start(&cluster, Shm, u32::MAX);
    holder.line.run(request(1, 1));
    holder.signal(Signal::STOP);
    cluster.members[0].start(taking(&holder, 2, false, TIMEOUT_MS));
    check_computed(&cluster, 2);
    // It had granted nothing, so there is nothing to wait for.
    cluster.members[0].engine.wait_until_quiet();
    holder.signal(Signal::CONT);
    // Its late grant is declined.
    holder.line.run(request(3, 1));
    eventually("the holder has its blocks back", || {
        holder.line.load().kv_blocks_used == 0
    });
}

#[test]
fn a_holder_that_is_killed_costs_no_timeout() {
    let cluster = Cluster::start(&[Tcp], |_| {});
    let mut holder = Process::start(&cluster, Tcp, u32::MAX);
    holder.line.run(request(1, 1));
    holder.signal(Signal::KILL);
    holder.child.wait().unwrap();
    cluster.members[0].start(taking(&holder, 2, false, FOREVER_MS));
    check_computed(&cluster, 2);
    cluster.members[0].engine.wait_until_quiet();
}

#[test]
fn a_reader_that_is_killed_costs_the_holder_no_block() {
    let cluster = Cluster::start(&[Shm], |_| {});
    let holder = &cluster.members[0];
    holder.run(request(1, 1));
    // The reader gets what it asks for, and dies with it in its cache.
    let reader = Process::start(&cluster, Shm, u32::MAX);
    let fetching = StartSequence {
        kv_source: Some(KvSource {
            peer: Some(holder.peer()),
            transfer_id: 9,
            num_blocks: BLOCKS,
            is_pushed: false,
            timeout_ms: 10_000,
        }),
        ..request(1, 2)
    };
    assert_eq!(reader.line.run(fetching).fetched_tokens, 20);
    reader.signal(Signal::KILL);
    holder.engine.wait_until_quiet();
    holder.start(request(2, 4));
    check_computed(&cluster, 2);
}
