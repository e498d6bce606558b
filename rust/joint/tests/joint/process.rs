//! Workers in processes of their own, to be killed and stopped.

use std::{
    env,
    net::SocketAddr,
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use orchestra_agent::{KvTransports, Role};
use rustix::process::{Pid, Signal, kill_process};

use crate::support::{Cluster, KvEngine, config, eventually, kv_pool_with};

/// What a worker of its own is told: its router, then the fields of [`Told`].
const CHILD: &str = "ORCHESTRA_TEST_WORKER";
const LAYERS: u32 = 3;
/// A writer computes at an engine's pace, so that its keeper comes in the middle of the answer; and not to its end.
const STEP: Duration = Duration::from_millis(10);
const STEPS: u32 = 350;
const HOST_BLOCKS: u32 = 512;

/// What makes a worker.
#[derive(Clone, Copy)]
pub(crate) struct Told<'a> {
    pub(crate) name: &'a str,
    pub(crate) domain: &'a str,
    /// `auto` or `tcp`.
    pub(crate) transports: &'a str,
    pub(crate) writes_through: bool,
    pub(crate) num_host_blocks: u32,
}

impl<'a> Told<'a> {
    /// A worker that writes through.
    pub(crate) const fn writer(name: &'a str, transports: &'a str) -> Self {
        Self {
            name,
            domain: "here",
            transports,
            writes_through: true,
            num_host_blocks: HOST_BLOCKS,
        }
    }

    /// A worker that keeps copies for others. It is there for prompts, so it gets whole requests when no writer is left, and
    /// a test knows where its requests run.
    pub(crate) const fn keeper(name: &'a str, transports: &'a str) -> Self {
        Self {
            name,
            domain: "there",
            transports,
            writes_through: false,
            num_host_blocks: HOST_BLOCKS,
        }
    }

    fn start(self, router: SocketAddr) -> KvEngine {
        let role = if self.writes_through {
            Role::Both
        } else {
            Role::Prefill
        };
        let mut settings = config(router, self.name, role);
        settings.scheduler.num_host_blocks = self.num_host_blocks;
        let transports = match self.transports {
            "tcp" => KvTransports::Tcp,
            _ => KvTransports::Auto,
        };
        let pool = kv_pool_with(&settings, transports, |pool| {
            self.domain.clone_into(&mut pool.failure_domain);
            pool.write_through = self.writes_through;
        });
        KvEngine::start(&settings, pool)
    }

    /// Such a worker in this process, which dials the cluster's router at this address.
    pub(crate) fn start_here(self, cluster: &Cluster, router: SocketAddr) -> KvEngine {
        let before = cluster.num_workers();
        let engine = self.start(router);
        eventually("the worker", || cluster.num_workers() > before);
        engine
    }
}

/// A worker in a process of its own.
pub(crate) struct Process(Child);

impl Process {
    pub(crate) fn start(cluster: &Cluster, told: Told<'_>) -> Self {
        let before = cluster.num_workers();
        let Told {
            name,
            domain,
            transports,
            writes_through,
            num_host_blocks,
        } = told;
        let router = cluster.address;
        let told =
            format!("{router} {name} {domain} {transports} {writes_through} {num_host_blocks}");
        let child = Command::new(env::current_exe().unwrap())
            .args(["--exact", "process::a_worker_of_its_own", "--ignored"])
            .env(CHILD, told)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        eventually("the process", || cluster.num_workers() > before);
        Self(child)
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.0), signal).unwrap();
    }
}

impl Drop for Process {
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
    let told = Told {
        name: parts[1],
        domain: parts[2],
        transports: parts[3],
        writes_through: parts[4].parse().unwrap(),
        num_host_blocks: parts[5].parse().unwrap(),
    };
    let engine = told.start(parts[0].parse().unwrap());
    if told.writes_through {
        engine.allow(0);
    }
    // Ended by a signal, or with the process that started it.
    let parent = rustix::process::getppid();
    let mut steps = 0;
    while rustix::process::getppid() == parent {
        if told.writes_through && steps < STEPS && !engine.agent.stats().is_idle() {
            steps += 1;
            engine.allow(LAYERS);
        }
        thread::sleep(STEP);
    }
}
