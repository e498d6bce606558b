//! What goes wrong, with real processes and real signals: each has its named answer.

use std::fs::read_dir;

use orchestra_memory::{Direction, MemoryError, PeerId, Progress, Quiet, TransferError};
use rustix::process::Signal;

use crate::{
    rig::pattern,
    two::{MIB, Peer, THEM, Two, US, segment},
};

crate::on_transports! { shm tcp => {
    a_killed_peer_fails_its_transfers,
    a_peer_that_is_not_connected_gets_nothing,
    a_slab_that_the_peer_has_deregistered_is_not_written,
    bad_metadata_is_refused_and_changes_nothing,
    a_thousand_reconnects_leak_no_descriptor,
} }

fn a_killed_peer_fails_its_transfers(kind: &str) {
    let mut two = Two::connected(kind);
    let puts: Vec<_> = (0..200)
        .map(|_| two.put(&[segment((0, 0), (0, 0), 8 * MIB)]).unwrap())
        .collect();
    assert_eq!(two.outcome(puts[0]), Progress::Done);
    two.peer.kill();
    let last = two.outcome(puts[199]);
    assert_eq!(last, Progress::Failed(TransferError::PeerGone));
    let after = two.put(&[segment((0, 0), (0, 0), 1)]);
    assert_eq!(after, Err(TransferError::PeerGone));
    two.disconnected(THEM);
    assert_eq!(
        two.transport.disconnect(THEM),
        Err(MemoryError::UnknownPeer)
    );
    let fresh = Peer::start(kind, &[2]);
    two.transport.connect(PeerId(2), &fresh.metadata).unwrap();
    let id = two
        .transport
        .post(
            Direction::Put,
            PeerId(2),
            &[segment((0, 0), (0, 0), 4096)],
            None,
        )
        .unwrap();
    assert_eq!(two.outcome(id), Progress::Done);
}

fn a_peer_that_is_not_connected_gets_nothing(kind: &str) {
    let two = Two::connected(kind);
    let segments = [segment((0, 0), (0, 0), 1)];
    let nobody = two
        .transport
        .post(Direction::Put, PeerId(5), &segments, None);
    assert_eq!(nobody, Err(TransferError::PeerGone));
    assert_eq!(
        two.transport.disconnect(PeerId(5)),
        Err(MemoryError::UnknownPeer)
    );
    let again = two.transport.connect(THEM, &two.peer.metadata);
    assert_eq!(again, Err(MemoryError::DuplicatePeer));
    let twice = two.transport.connect(PeerId(5), &two.peer.metadata);
    assert_eq!(twice, Err(MemoryError::InUse));
}

fn a_slab_that_the_peer_has_deregistered_is_not_written(kind: &str) {
    let transport = crate::rig::open(kind);
    let slab = crate::rig::slab(0, 2 * MIB);
    transport.register(&slab).unwrap();
    slab.write(0, &pattern(1, 4096)).unwrap();
    let mut peer = Peer::start(kind, &[2, 2]);
    assert_eq!(peer.ask("deregister 1"), "Ok(())");
    transport.connect(THEM, &peer.metadata).unwrap();
    let two = Two {
        transport,
        slabs: vec![slab],
        peer,
    };
    let refused = two.put(&[segment((0, 0), (1, 0), 4096)]).unwrap();
    let kept = two.put(&[segment((0, 0), (0, 0), 4096)]).unwrap();
    assert_eq!(
        two.outcome(refused),
        Progress::Failed(TransferError::OutOfBounds)
    );
    assert_eq!(two.outcome(kept), Progress::Done);
    let mut two = two;
    assert!(two.peer.holds(0, 0, 4096, 1) && !two.peer.holds(1, 0, 4096, 1));
}

fn bad_metadata_is_refused_and_changes_nothing(kind: &str) {
    let two = Two::connected(kind);
    let good = &two.peer.metadata;
    for bad in [&good[..good.len() - 1], b"", &vec![0; 70_000]] {
        let refused = two.transport.connect(PeerId(3), bad);
        assert!(
            matches!(refused, Err(MemoryError::BadMetadata(_))),
            "{refused:?}"
        );
    }
    let id = two.put(&[segment((0, 0), (0, 0), 4096)]).unwrap();
    assert_eq!(two.outcome(id), Progress::Done);
}

fn open_descriptors() -> usize {
    read_dir("/proc/self/fd").unwrap().count()
}

fn a_thousand_reconnects_leak_no_descriptor(kind: &str) {
    let mut two = Two::connected(kind);
    let before = open_descriptors();
    let mut ours = THEM;
    let mut theirs = US;
    for round in 1..=1000 {
        let quiet = two.transport.disconnect(ours).unwrap();
        assert!(
            two.peer
                .ask(&format!("disconnect {}", theirs.0))
                .starts_with("Ok(")
        );
        if quiet == Quiet::Unproven {
            two.disconnected(ours);
        }
        (ours, theirs) = (PeerId(1000 + round), PeerId(5000 + round));
        two.transport.connect(ours, &two.peer.metadata).unwrap();
        assert_eq!(two.peer_connects(theirs), "Ok(())");
        if round % 100 == 0 {
            let put = [segment((0, 0), (0, 0), 4096)];
            let id = two
                .transport
                .post(Direction::Put, ours, &put, None)
                .unwrap();
            assert_eq!(two.outcome(id), Progress::Done, "round {round}");
            let _ = two.transport.release(id);
            // Tests that run beside this one in the process have some too; a leak would be of hundreds.
            two.until("few descriptors", |_| {
                (open_descriptors() < before + 64).then_some(())
            });
        }
    }
}

crate::on_transports! { nixl => {
    a_peer_that_is_not_connected_gets_nothing,
    bad_metadata_is_refused_and_changes_nothing,
    a_killed_peer_ends_transfers_and_another_takes_its_place,
    a_transfer_released_too_early_is_not_called_quiet,
} }

/// Whether a put into a dead process fails or is still done is the fabric's choice; that it ends is not.
fn a_killed_peer_ends_transfers_and_another_takes_its_place(kind: &str) {
    let mut two = Two::connected(kind);
    let before = two.put(&[segment((0, 0), (0, 0), 8 * MIB)]).unwrap();
    assert_eq!(two.outcome(before), Progress::Done);
    two.peer.kill();
    if let Ok(put) = two.put(&[segment((0, 0), (0, 0), 8 * MIB)]) {
        assert_ne!(two.outcome(put), Progress::Pending);
    }
    assert_eq!(two.transport.disconnect(THEM), Ok(Quiet::Unproven));
    let mut fresh = Peer::start(kind, &[2]);
    two.transport.connect(PeerId(2), &fresh.metadata).unwrap();
    two.slabs[0].write(0, &pattern(4, 4096)).unwrap();
    let put = [segment((0, 0), (0, 0), 4096)];
    let id = two
        .transport
        .post(Direction::Put, PeerId(2), &put, None)
        .unwrap();
    fresh.tell("holds 0 0 4096 4");
    assert_eq!(two.outcome(id), Progress::Done);
    let _ = fresh.answer();
    assert!(fresh.holds(0, 0, 4096, 4));
}

fn a_transfer_released_too_early_is_not_called_quiet(kind: &str) {
    let two = Two::connected(kind);
    two.peer.signal(Signal::STOP);
    let ids: Vec<_> = (0..32)
        .map(|_| two.put(&[segment((0, 0), (0, 0), 8 * MIB)]).unwrap())
        .collect();
    for id in ids {
        let was_over = two.transport.poll(id) != Progress::Pending;
        assert_eq!(two.transport.release(id) == Quiet::Proven, was_over);
    }
    two.peer.signal(Signal::CONT);
}

mod shm_only {
    use super::*;

    /// The peer's processor takes no part.
    #[test]
    fn a_stopped_peer_is_written_all_the_same_and_reads_it_when_it_goes_on() {
        let mut two = Two::connected("shm");
        two.slabs[0].write(0, &pattern(9, 1 << 20)).unwrap();
        let first = two.put(&[segment((0, 0), (0, 0), 1)]).unwrap();
        assert_eq!(two.outcome(first), Progress::Done);
        two.peer.signal(Signal::STOP);
        let put = [segment((0, 0), (0, 0), MIB)];
        let id = two
            .transport
            .post(Direction::Put, THEM, &put, Some(b"later"))
            .unwrap();
        assert_eq!(two.outcome(id), Progress::Done);
        assert_eq!(
            two.transport.disconnect(THEM),
            Ok(Quiet::Unproven),
            "it has our memory mapped"
        );
        two.peer.signal(Signal::CONT);
        two.disconnected(THEM);
        assert_eq!(
            two.peer.ask(&format!("notified 0 0 {MIB} 9")),
            format!("{} 6c61746572 true", US.0)
        );
    }

    #[test]
    fn a_stopped_peer_that_is_killed_is_proven_quiet() {
        let mut two = Two::connected("shm");
        two.peer.tell(&format!("put {} 0 0 0 0 4096", US.0));
        assert_eq!(two.notification().payload, b"put");
        assert_eq!(two.answer(), "Done");
        two.peer.signal(Signal::STOP);
        assert_eq!(two.transport.disconnect(THEM), Ok(Quiet::Unproven));
        two.peer.kill();
        two.disconnected(THEM);
    }

    #[test]
    fn a_released_transfer_writes_nothing_more() {
        let mut two = Two::connected("shm");
        two.slabs[0].write(0, &pattern(2, 8 << 20)).unwrap();
        let id = two.put(&[segment((0, 0), (0, 0), 8 * MIB)]).unwrap();
        assert_eq!(two.transport.release(id), Quiet::Proven);
        let after = two.put(&[segment((0, 0), (1, 0), 4096)]).unwrap();
        assert_eq!(two.outcome(after), Progress::Done);
        assert!(!two.peer.holds(0, 4 * MIB, 4096, 2));
        assert!(two.peer.holds(1, 0, 4096, 2));
    }
}
