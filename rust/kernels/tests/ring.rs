//! Rings against a queue for each reader, and what becomes of memory that somebody has written over. Real processes, and
//! how they are killed, are in `tests/worker/test_plan_ring.py`.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    collections::VecDeque,
    fs::{File, OpenOptions},
    os::unix::fs::FileExt,
    thread,
    time::Duration,
};

use orchestra_kernels::{RingConfig, RingReader, RingWriter, error::RingError};
use proptest::prelude::*;

/// Where things lie in the memory: see `ring/region.rs`.
const WRITTEN_AT: u64 = 32;
const TAKEN_AT: u64 = 128;
const BYTES_AT: u64 = 4096;
/// The first position.
const START: u32 = 0_u32.wrapping_sub(4096);

fn config(readers: usize, capacity: usize) -> RingConfig {
    RingConfig {
        readers,
        key: 7,
        capacity,
        message_bytes_max: 1000,
    }
}

/// A ring whose readers are all admitted.
fn ring(config: &RingConfig) -> (RingWriter, Vec<RingReader>) {
    let writer = RingWriter::create(config.clone()).unwrap();
    let open = |reader| {
        writer.admit(reader).unwrap();
        RingReader::open(config.clone(), &writer.address(), reader).unwrap()
    };
    let readers = (0..config.readers).map(open).collect();
    (writer, readers)
}

/// Writes a message for which there is room; returns who has to be woken.
fn write(writer: &RingWriter, message: &[u8]) -> Vec<usize> {
    let written = writer.write(message, 0).unwrap();
    assert!(written.is_whole);
    written.sleepers
}

fn message(number: usize, bytes: usize) -> Vec<u8> {
    (0..bytes)
        .map(|index| (number * 31 + index) as u8)
        .collect()
}

#[derive(Clone, Debug)]
enum Op {
    /// Begins a message of so many bytes; or goes on with the last one, which did not fit.
    Write(usize),
    /// A reader asks for a message.
    Take(usize),
}

fn op() -> impl Strategy<Value = Op> {
    // Of a ring of 64 bytes: none, few, around its end, and many times round.
    let bytes = prop_oneof![Just(0), 1..20_usize, 55..70_usize, 900..=1000_usize];
    prop_oneof![
        bytes.prop_map(Op::Write),
        (0..3_usize).prop_map(Op::Take),
        (0..3_usize).prop_map(Op::Take),
    ]
}

proptest! {
    #[test]
    fn every_reader_gets_every_message_in_order(ops in prop::collection::vec(op(), 1..200)) {
        let config = config(3, 64);
        let (writer, readers) = ring(&config);
        let mut expected = vec![VecDeque::new(); config.readers];
        let mut is_asleep = [false; 3];
        let (mut current, mut upto, mut count) = (None::<Vec<u8>>, 0, 0);
        for op in ops {
            match op {
                Op::Write(bytes) => {
                    let content = current.take().unwrap_or_else(|| {
                        count += 1;
                        message(count, bytes)
                    });
                    let written = writer.write(&content, upto).unwrap();
                    for reader in written.sleepers {
                        prop_assert!(is_asleep[reader]);
                        is_asleep[reader] = false;
                    }
                    if written.is_whole {
                        for queue in &mut expected {
                            queue.push_back(content.clone());
                        }
                        upto = 0;
                    } else {
                        upto = written.upto;
                        current = Some(content);
                    }
                }
                Op::Take(reader) => {
                    let taken = readers[reader].take(Duration::ZERO).unwrap();
                    is_asleep[reader] = taken.is_none();
                    prop_assert_eq!(taken, expected[reader].pop_front());
                }
            }
        }
    }
}

#[test]
fn messages_pass_between_threads_in_pieces_and_whole() {
    let config = config(2, 256);
    let (writer, readers) = ring(&config);
    let sizes: Vec<usize> = (0..3000).map(|number| number * 37 % 1001).collect();
    thread::scope(|scope| {
        for reader in &readers {
            let sizes = &sizes;
            scope.spawn(move || {
                for (number, bytes) in sizes.iter().enumerate() {
                    let taken = loop {
                        if let Some(taken) = reader.take(Duration::from_millis(1)).unwrap() {
                            break taken;
                        }
                        thread::yield_now();
                    };
                    assert_eq!(taken, message(number, *bytes));
                }
            });
        }
        for (number, bytes) in sizes.iter().enumerate() {
            let content = message(number, *bytes);
            let mut written = writer.write(&content, 0).unwrap();
            while !written.is_whole {
                writer.await_room().unwrap();
                written = writer.write(&content, written.upto).unwrap();
            }
        }
    });
}

#[test]
fn only_who_sleeps_has_to_be_woken() {
    let (writer, readers) = ring(&config(2, 64));
    assert_eq!(write(&writer, b"one"), Vec::<usize>::new());
    assert_eq!(
        readers[1].take(Duration::ZERO).unwrap(),
        Some(b"one".to_vec())
    );
    assert_eq!(readers[1].take(Duration::ZERO).unwrap(), None);
    assert_eq!(write(&writer, b"two"), [1]);
    assert_eq!(write(&writer, b"three"), Vec::<usize>::new());
}

#[test]
fn the_slowest_reader_that_was_admitted_holds_the_writer_up() {
    let config = config(2, 64);
    let writer = RingWriter::create(config.clone()).unwrap();
    let slow = RingReader::open(config, &writer.address(), 0).unwrap();
    writer.admit(0).unwrap();
    let full = writer.write(&[0; 100], 0).unwrap();
    assert!(!full.is_whole);
    assert_eq!(full.upto, 64);
    assert_eq!(writer.await_room().unwrap(), [0]);
    assert_eq!(slow.take(Duration::ZERO).unwrap(), None);
    assert!(writer.await_room().unwrap().is_empty());
    assert!(writer.write(&[0; 100], full.upto).unwrap().is_whole);
    assert_eq!(slow.take(Duration::ZERO).unwrap(), Some(vec![0; 100]));
}

#[test]
fn a_writer_that_waits_for_room_is_woken() {
    let (writer, readers) = ring(&config(1, 64));
    let full = writer.write(&[0; 60], 0).unwrap();
    assert!(full.is_whole);
    thread::scope(|scope| {
        let waiting = scope.spawn(|| while !writer.await_room().unwrap().is_empty() {});
        thread::sleep(Duration::from_millis(1));
        readers[0].take(Duration::ZERO).unwrap();
        waiting.join().unwrap();
    });
}

// === bounds, and damage ===

/// The memory of a ring, to write over.
fn memory(writer: &RingWriter) -> File {
    OpenOptions::new()
        .write(true)
        .open(writer.address())
        .unwrap()
}

fn damage<T>(reason: &str) -> Result<T, RingError> {
    Err(RingError::Damaged(reason.to_owned()))
}

#[test]
fn longer_messages_than_any_may_be_are_refused() {
    let (writer, readers) = ring(&config(1, 64));
    let refused = writer.write(&[0; 1001], 0);
    let (bytes, most) = (1001, 1000);
    assert_eq!(refused, Err(RingError::TooLong { bytes, most }));
    assert_eq!(readers[0].take(Duration::ZERO).unwrap(), None);
}

#[test]
fn a_length_that_cannot_be_is_damage() {
    let (writer, readers) = ring(&config(1, 64));
    write(&writer, b"plan");
    let length = 1001_u32.to_le_bytes();
    memory(&writer).write_all_at(&length, BYTES_AT).unwrap();
    let expected = "a message of 1001 bytes, at most 1000 go";
    assert_eq!(readers[0].take(Duration::ZERO), damage(expected));
}

#[test]
fn more_bytes_than_the_ring_has_are_damage() {
    let (writer, readers) = ring(&config(1, 64));
    let written = (START + 65).to_le_bytes();
    memory(&writer).write_all_at(&written, WRITTEN_AT).unwrap();
    let expected = "65 bytes are said to wait in 64";
    assert_eq!(readers[0].take(Duration::ZERO), damage(expected));
}

#[test]
fn a_reader_ahead_of_the_writer_is_damage() {
    let (writer, _readers) = ring(&config(2, 64));
    write(&writer, b"plan");
    let second = TAKEN_AT + 128;
    let taken = (START + 9).to_le_bytes();
    memory(&writer).write_all_at(&taken, second).unwrap();
    let expected = "reader 1 is 4294967295 of 64 bytes behind";
    assert_eq!(writer.write(b"plan", 0), damage(expected));
    assert_eq!(writer.await_room(), damage(expected));
}

#[test]
fn another_ring_is_refused() {
    let (writer, _readers) = ring(&config(1, 4096));
    for other in [
        RingConfig {
            key: 8,
            ..config(1, 4096)
        },
        config(2, 4096),
        config(1, 8192),
    ] {
        let refused = RingReader::open(other, &writer.address(), 0).map(drop);
        assert!(matches!(refused, Err(RingError::Memory(_))));
    }
    let gone = writer.address();
    drop(writer);
    let refused = RingReader::open(config(1, 4096), &gone, 0).map(drop);
    assert!(matches!(refused, Err(RingError::Memory(_))));
}

#[test]
fn wrong_settings_are_named() {
    let key = |config: RingConfig| match RingWriter::create(config).map(drop) {
        Err(RingError::InvalidConfig { key, .. }) => key,
        other => panic!("{other:?}"),
    };
    assert_eq!(key(config(0, 64)), "readers");
    assert_eq!(key(config(1025, 64)), "readers");
    assert_eq!(key(config(1, 100)), "capacity");
    assert_eq!(key(config(1, 2)), "capacity");
    let endless = RingConfig {
        message_bytes_max: usize::MAX,
        ..config(1, 64)
    };
    assert_eq!(key(endless), "message_bytes_max");
    let (writer, _readers) = ring(&config(1, 64));
    let refused = RingReader::open(config(1, 64), &writer.address(), 1).map(drop);
    for refused in [refused, writer.admit(1)] {
        assert!(matches!(refused, Err(RingError::InvalidConfig { .. })));
    }
}
