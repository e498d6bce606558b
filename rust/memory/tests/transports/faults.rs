//! What goes wrong, with real processes and real signals: each has its named answer.

use std::fs::read_dir;

use orchestra_memory::{Direction, MemoryError, PeerId, Progress, Quiet, TransferError};
use rustix::process::Signal;

use crate::{
    rig::{self, pattern},
    two::{MIB, Peer, THEM, Two, US, segment},
};

/// Set where NIXL has real verbs: `make rdma-vm`.
const VERBS: &str = "ORCHESTRA_TEST_VERBS";

crate::on_transports! { shm tcp => {
    memory_that_is_mapped_over_is_found_by_a_checksum,
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

/// Memory that is mapped anew under its registration: a card writes the pages that it knows, and so does whoever has them
/// mapped. Every transfer is done, and only a checksum of the bytes tells. The crate has no way to do this, the peer
/// program does it by hand.
fn memory_that_is_mapped_over_is_found_by_a_checksum(kind: &str) {
    let mut two = Two::connected(kind);
    let (before, after) = (pattern(5, 4096), pattern(6, 4096));
    assert_eq!(rig::crc32(b"123456789"), 0xcbf4_3926);
    two.slabs[0].write(0, &before).unwrap();
    let put = two.put(&[segment((0, 0), (0, 0), 4096)]).unwrap();
    assert_eq!(two.outcome(put), Progress::Done);
    assert_eq!(
        two.peer.ask("crc 0 0 4096"),
        rig::crc32(&before).to_string()
    );

    assert_eq!(two.peer.ask("map-over 0"), "Ok(())");
    two.slabs[0].write(0, &after).unwrap();
    let put = two.put(&[segment((0, 0), (0, 0), 4096)]).unwrap();
    assert_eq!(two.outcome(put), Progress::Done);
    let is_found = two.peer.ask("crc 0 0 4096") != rig::crc32(&after).to_string();
    // TCP's bytes are written by the peer, and the kernel's copies go by its addresses: those arrive.
    let writes_pages = kind == "shm" || (kind == "nixl" && std::env::var_os(VERBS).is_some());
    assert_eq!(is_found, writes_pages);
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
    let transport = rig::open(kind);
    let slab = rig::slab(0, 2 * MIB);
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
    memory_that_is_mapped_over_is_found_by_a_checksum,
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

mod tcp_only {
    use std::{
        io::{Read, Write},
        net::TcpStream,
    };

    use super::*;

    /// The peer's processor takes part, so nothing ends, and nothing is called quiet, until it goes on.
    #[test]
    fn a_stopped_peer_ends_nothing_until_it_goes_on() {
        let mut two = Two::connected("tcp");
        two.slabs[0].write(0, &pattern(8, 8 << 20)).unwrap();
        let first = two.put(&[segment((0, 0), (0, 0), 1)]).unwrap();
        assert_eq!(two.outcome(first), Progress::Done);
        two.peer.signal(Signal::STOP);
        let begun = two.put(&[segment((0, 0), (0, 0), 8 * MIB)]).unwrap();
        let queued = two.put(&[segment((0, 0), (1, 0), MIB)]).unwrap();
        while two.transport.progress(std::time::Duration::from_millis(5)) > 0 {}
        assert_eq!(two.transport.poll(begun), Progress::Pending);
        assert_eq!(
            two.transport.release(queued),
            Quiet::Proven,
            "no byte of it was sent"
        );
        assert_eq!(two.transport.release(begun), Quiet::Unproven);
        assert_eq!(two.transport.disconnect(THEM), Ok(Quiet::Unproven));
        let after = two.put(&[segment((0, 0), (0, 0), 1)]);
        assert_eq!(after, Err(TransferError::PeerGone));
        two.peer.signal(Signal::CONT);
        two.disconnected(THEM);
        assert!(two.peer.holds(0, 0, 8 * MIB, 8));
        assert!(!two.peer.holds(1, 0, 4096, 8));
    }

    #[test]
    fn a_released_get_writes_nothing_more() {
        let mut two = Two::connected("tcp");
        assert_eq!(two.peer.ask("fill 0 0 4194304 6"), "filled");
        let get = [segment((0, 0), (0, 0), 4 * MIB)];
        let id = two
            .transport
            .post(Direction::Get, THEM, &get, None)
            .unwrap();
        assert_eq!(two.transport.release(id), Quiet::Proven);
        let again = two
            .transport
            .post(Direction::Get, THEM, &get, None)
            .unwrap();
        two.until("the first bytes", |_| {
            let mut first = [0];
            two.slabs[0].read(1, &mut first).unwrap();
            (first != [0]).then_some(())
        });
        assert_eq!(two.transport.release(again), Quiet::Proven);
        two.slabs[0].write(0, &vec![0; 4 << 20]).unwrap();
        let put = two.put(&[segment((1, 0), (1, 0), 4096)]).unwrap();
        assert_eq!(two.outcome(put), Progress::Done);
        let mut bytes = vec![1; 4 << 20];
        two.slabs[0].read(0, &mut bytes).unwrap();
        assert!(
            bytes.iter().all(|byte| *byte == 0),
            "late bytes are thrown away"
        );
    }

    /// A connection in the raw: hello, then whatever a test wants to say.
    fn intruder(metadata: &[u8], key: &[u8]) -> TcpStream {
        // Magic, version and kind, identity, key, then the address behind its length.
        let len = usize::from(metadata[30]);
        let address = std::str::from_utf8(&metadata[34..34 + len]).unwrap();
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(crate::two::PATIENCE)).unwrap();
        let mut hello = vec![1, 0, 1, 0, 16, 0, 0, 0];
        hello.extend([0; 8]);
        hello.extend(77_u64.to_le_bytes());
        hello.extend([0; 8]);
        hello.extend(key);
        stream.write_all(&hello).unwrap();
        stream
    }

    /// What the peer answers before it closes or is waited for.
    fn answer(stream: &mut TcpStream, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let mut filled = 0;
        while filled < len {
            match stream.read(&mut bytes[filled..]) {
                Ok(0) | Err(_) => break,
                Ok(more) => filled += more,
            }
        }
        bytes.truncate(filled);
        bytes
    }

    #[test]
    fn a_wrong_key_and_a_wrong_word_end_the_connection() {
        let peer = Peer::start("tcp", &[2]);
        let mut stranger = intruder(&peer.metadata, &[0; 16]);
        assert_eq!(answer(&mut stranger, 32), b"");
        let mut friend = intruder(&peer.metadata, &peer.metadata[14..30]);
        friend.write_all(&[9; 64]).unwrap();
        assert_eq!(answer(&mut friend, 32), b"");
    }

    #[test]
    fn a_put_out_of_bounds_is_refused_whole_and_the_next_is_taken() {
        let mut peer = Peer::start("tcp", &[2]);
        let mut friend = intruder(&peer.metadata, &peer.metadata[14..30]);
        for (offset, answered) in [(2 * MIB - 2, 4), (u64::MAX - 1, 4), (100, 3)] {
            // Two parts, the first always good.
            let mut put = vec![1, 1, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0];
            put.extend(5_u64.to_le_bytes());
            put.extend(7_u64.to_le_bytes());
            for (offset, len) in [(0, 4), (offset, 3_u64)] {
                put.extend(0_u32.to_le_bytes());
                put.extend(offset.to_le_bytes());
                put.extend(len.to_le_bytes());
            }
            put.extend(pattern(3, 4));
            put.extend(pattern(3, 3));
            friend.write_all(&put).unwrap();
            assert_eq!(answer(&mut friend, 32)[1], answered, "at {offset}");
            assert_eq!(peer.holds(0, 0, 4, 3), answered == 3);
        }
        assert!(peer.holds(0, 100, 3, 3));
    }
}
