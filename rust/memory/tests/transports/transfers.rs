//! What works: bytes arrive where they should, and nowhere else.

use orchestra_memory::{Direction, Notification, Progress, TransferError};

use crate::{
    rig::{holds, pattern, to_hex},
    two::{MIB, THEM, Two, US, segment},
};

crate::on_transports! { shm tcp nixl => {
    a_put_lands_before_its_notification_does,
    a_get_brings_what_the_peer_has,
    scattered_segments_of_odd_sizes_arrive_each_in_its_place,
    a_notification_without_bytes_arrives,
    the_peer_can_put_into_this_process,
    segments_that_do_not_fit_are_refused_and_nothing_moves,
    many_transfers_end_each_on_its_own,
    notified_puts_are_answered_before_anybody_listens,
} }

fn a_put_lands_before_its_notification_does(kind: &str) {
    let mut two = Two::connected(kind);
    for round in 0..20 {
        two.slabs[0].write(0, &pattern(round, 4 << 20)).unwrap();
        let put = segment((0, 0), (0, MIB), 4 * MIB);
        let notification = format!("round {round}");
        let id = two
            .transport
            .post(Direction::Put, THEM, &[put], Some(notification.as_bytes()))
            .unwrap();
        two.peer
            .tell(&format!("notified 0 {MIB} {} {round}", 4 * MIB));
        assert_eq!(two.outcome(id), Progress::Done);
        let heard = format!("{} {} true", US.0, to_hex(notification.as_bytes()));
        assert_eq!(two.answer(), heard);
        let _ = two.transport.release(id);
    }
}

fn a_get_brings_what_the_peer_has(kind: &str) {
    let mut two = Two::connected(kind);
    assert_eq!(two.peer.ask("fill 1 4096 1000000 77"), "filled");
    let get = segment((0, 123), (1, 4096), 1_000_000);
    let id = two
        .transport
        .post(Direction::Get, THEM, &[get], Some(b"fetched"))
        .unwrap();
    two.peer.tell("notified 1 4096 1000000 77");
    assert_eq!(two.outcome(id), Progress::Done);
    assert!(holds(&two.slabs[0], 123, 1_000_000, 77));
    assert!(holds_zeros(&two, 0, 123) && holds_zeros(&two, 123 + 1_000_000, 4096));
    assert!(two.answer().ends_with("true"));
}

fn holds_zeros(two: &Two, offset: u64, len: usize) -> bool {
    let mut bytes = vec![1; len];
    two.slabs[0].read(offset, &mut bytes).unwrap();
    bytes.iter().all(|byte| *byte == 0)
}

fn scattered_segments_of_odd_sizes_arrive_each_in_its_place(kind: &str) {
    let mut two = Two::connected(kind);
    let sizes = [1, 7, 4096, 65_537, 3, 262_144, 12_345];
    let mut segments = Vec::new();
    for (at, size) in sizes.into_iter().enumerate() {
        let (from, to) = (at as u64 * 300_001, (sizes.len() - at) as u64 * 280_003);
        two.slabs[0].write(from, &pattern(at as u64, size)).unwrap();
        segments.push(segment(
            (0, from),
            ((at % 2) as u32, to % (2 * MIB - 262_144)),
            size as u64,
        ));
    }
    let id = two.put(&segments).unwrap();
    assert_eq!(two.outcome(id), Progress::Done);
    for (at, part) in segments.iter().enumerate() {
        let (slab, offset) = (part.remote_slab.0, part.remote_offset);
        assert!(
            two.peer.holds(slab, offset, part.len, at as u64),
            "segment {at}"
        );
    }
}

fn a_notification_without_bytes_arrives(kind: &str) {
    let mut two = Two::connected(kind);
    let id = two
        .transport
        .post(Direction::Put, THEM, &[], Some(b""))
        .unwrap();
    two.peer.tell("notified 0 0 0 0");
    assert_eq!(two.outcome(id), Progress::Done);
    assert_eq!(two.answer(), format!("{}  true", US.0));
    let long = vec![0; (8 << 10) + 1];
    let refused = two.transport.post(Direction::Put, THEM, &[], Some(&long));
    assert!(matches!(
        refused,
        Err(TransferError::Transport { code: 0, .. })
    ));
}

fn the_peer_can_put_into_this_process(kind: &str) {
    let mut two = Two::connected(kind);
    assert_eq!(two.peer.ask("fill 0 0 500000 5"), "filled");
    two.peer.tell(&format!("put {} 0 0 1 999 500000", US.0));
    let heard = two.notification();
    assert!(holds(&two.slabs[1], 999, 500_000, 5));
    let payload = b"put".to_vec();
    assert_eq!(
        heard,
        Notification {
            peer: THEM,
            payload
        }
    );
    assert_eq!(two.answer(), "Done");
}

fn segments_that_do_not_fit_are_refused_and_nothing_moves(kind: &str) {
    let mut two = Two::connected(kind);
    two.slabs[0].write(0, &pattern(1, 4096)).unwrap();
    let good = segment((0, 0), (0, 0), 4096);
    for bad in [
        segment((0, 0), (0, 0), 0),
        segment((0, 8 * MIB), (0, 0), 1),
        segment((0, 0), (0, 8 * MIB - 1), 2),
        segment((0, u64::MAX), (0, 0), 2),
        segment((0, 0), (0, u64::MAX - 1), u64::MAX),
        segment((7, 0), (0, 0), 1),
        segment((0, 0), (7, 0), 1),
    ] {
        assert_eq!(
            two.put(&[good, bad]),
            Err(TransferError::OutOfBounds),
            "{bad:?}"
        );
    }
    assert!(!two.peer.holds(0, 0, 4096, 1));
}

/// Found by a bench: a turn of TCP's that ended between the bytes and the notification was never resumed.
fn notified_puts_are_answered_before_anybody_listens(kind: &str) {
    let mut two = Two::connected(kind);
    two.slabs[0].write(0, &pattern(3, 1 << 20)).unwrap();
    let post = |at: u64| {
        let segments = [segment((0, at * 256), (0, at * 256), 256)];
        let payload = at.to_le_bytes();
        let posted = two
            .transport
            .post(Direction::Put, THEM, &segments, Some(&payload));
        posted.unwrap()
    };
    let ids: Vec<_> = (0..64).map(post).collect();
    for id in ids {
        assert_eq!(two.outcome(id), Progress::Done);
    }
    // Transfers of their own: nobody promises an order.
    let ask = |_| two.peer.ask("notified 0 0 16384 3");
    let mut heard: Vec<_> = (0..64).map(ask).collect();
    let sent = |at: u64| format!("{} {} true", US.0, to_hex(&at.to_le_bytes()));
    let mut sent: Vec<_> = (0..64).map(sent).collect();
    heard.sort_unstable();
    sent.sort_unstable();
    assert_eq!(heard, sent);
}

fn many_transfers_end_each_on_its_own(kind: &str) {
    let mut two = Two::connected(kind);
    two.slabs[0].write(0, &pattern(3, 1 << 20)).unwrap();
    let ids: Vec<_> = (0..64)
        .map(|at| {
            two.put(&[segment((0, at * 4096), (0, at * 4096), 4096)])
                .unwrap()
        })
        .collect();
    for id in ids {
        assert_eq!(two.outcome(id), Progress::Done);
        let _ = two.transport.release(id);
        assert!(
            matches!(two.transport.poll(id), Progress::Failed(_)),
            "released is forgotten"
        );
    }
    assert!(two.peer.holds(0, 0, 64 * 4096, 3));
}
