//! What a peer costs: small writes with a notification, doing nothing, and dying.

use std::{
    thread,
    time::{Duration, Instant},
};

use orchestra_memory::{Chime, Quiet};

use crate::{
    median,
    node::{BLOCK_BYTES, Node, Peer, THEM, config, processor_seconds, until, wait},
    transports,
};

fn small_writes(node: &Node, peer: &mut Peer, kind: &str) {
    let grant = peer.grant(node, 1);
    let set = node.sealed(1);
    let chime = Chime::new().unwrap();
    let mut micros = |times: usize, pause: Duration| {
        let put = |at| {
            thread::sleep(pause);
            let started = Instant::now();
            wait(&node.put(&set, &grant), &chime);
            let taken = started.elapsed().as_secs_f64() * 1e6;
            if at % 100 == 0 {
                peer.ask("take");
            }
            taken
        };
        median((0..times).map(put).collect())
    };
    println!(
        "peers: {kind}: one block of {} KiB with its notification, from call to woken caller: median {:.0} us, each after \
         50 ms of silence {:.0} us",
        BLOCK_BYTES >> 10,
        micros(500, Duration::ZERO),
        micros(50, Duration::from_millis(50)),
    );
}

/// Shares of a core of both processes while nobody asks for anything.
fn idle(peer: &mut Peer, kind: &str) {
    peer.ask("take");
    thread::sleep(Duration::from_millis(50));
    let theirs = |peer: &mut Peer| peer.ask("take").parse::<f64>().unwrap() / 1e9;
    let (started, ours, others) = (Instant::now(), processor_seconds(), theirs(peer));
    thread::sleep(Duration::from_secs(4));
    let elapsed = started.elapsed().as_secs_f64();
    println!(
        "peers: {kind}: idle, connected: {:.2} % of a core here, {:.2} % there",
        100.0 * (processor_seconds() - ours) / elapsed,
        100.0 * (theirs(peer) - others) / elapsed,
    );
}

/// From the death of the peer's process until all blocks that it could touch may be used again.
fn death(kind: &str) {
    let millis = (0..5).map(|_| {
        let node = Node::new(kind, config(BLOCK_BYTES, 256 << 20));
        let mut peer = Peer::connected(&node);
        let grant = peer.grant(&node, 1024);
        let set = node.sealed(1024);
        let chime = Chime::new().unwrap();
        // The first one sets up whatever has to be set up.
        wait(&node.put(&set, &grant), &chime);
        let puts: Vec<_> = (0..20).map(|_| node.put(&set, &grant)).collect();
        drop(set);
        thread::sleep(Duration::from_millis(5));
        peer.child.kill().unwrap();
        let died = Instant::now();
        peer.child.wait().unwrap();
        for put in &puts {
            wait(put, &chime);
        }
        let manager = node.driver.manager();
        until(|| match manager.disconnect(THEM, node.driver.now()) {
            Ok(Quiet::Proven) => true,
            // The process was waited for: that is the proof which this transport cannot give.
            _ if kind == "nixl" => manager.confirm_gone(THEM, node.driver.now()).is_ok(),
            _ => false,
        });
        until(|| node.pool.stats().allocatable == node.pool.stats().num_blocks);
        node.pool.check_integrity();
        died.elapsed().as_secs_f64() * 1e3
    });
    let millis: Vec<f64> = millis.collect();
    let worst = millis.iter().copied().fold(0.0, f64::max);
    println!(
        "peers: {kind}: from a peer's SIGKILL in the middle of 20 transfers of 64 MiB to all blocks free: median {:.0} ms, \
         worst of 5 {worst:.0} ms",
        median(millis),
    );
}

pub(crate) fn measure() {
    for kind in transports() {
        let node = Node::new(kind, config(BLOCK_BYTES, 64 << 20));
        let mut peer = Peer::connected(&node);
        small_writes(&node, &mut peer, kind);
        idle(&mut peer, kind);
        drop(peer);
        death(kind);
    }
}
