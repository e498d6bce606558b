//! Every interleaving of readers that refresh a snapshot at a time, with loom's locks under the real module.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

/// What the module takes from the crate: loom's, in the shape of the ones there.
mod sync {
    pub(crate) use loom::sync::Arc;

    #[derive(Debug, Default)]
    pub(crate) struct Mutex<T>(loom::sync::Mutex<T>);

    impl<T> Mutex<T> {
        pub(crate) fn new(value: T) -> Self {
            Self(loom::sync::Mutex::new(value))
        }

        pub(crate) fn lock(&self) -> loom::sync::MutexGuard<'_, T> {
            self.0.lock().unwrap()
        }
    }
}
#[path = "../src/snapshot.rs"]
mod snapshot;

use std::{panic, time::Duration};

use loom::thread;
use orchestra_core::Time;
use snapshot::{Snapshot, Snapshots};
use sync::{Arc, Mutex};

/// Something that counts up, and how often it was copied.
#[derive(Default)]
struct State {
    value: u64,
    num_copies: u64,
}

/// Copies with numbers that tell their order, or all with the same one.
fn copy(state: &Mutex<State>, is_numbered: bool) -> Snapshot<u64> {
    let mut state = state.lock();
    state.num_copies += 1;
    Snapshot {
        number: if is_numbered { state.num_copies } else { 0 },
        taken_at: Time::ZERO,
        value: state.value,
    }
}

/// Two threads refresh while a third changes the state; each reads twice, and what all have seen never goes back.
fn readers(is_numbered: bool) {
    loom::model(move || {
        let state = Arc::new(Mutex::new(State::default()));
        let snapshots = Arc::new(Snapshots::default());
        let reader = {
            let (state, snapshots) = (Arc::clone(&state), Arc::clone(&snapshots));
            thread::spawn(move || {
                let read =
                    || snapshots.read(Time::ZERO, Duration::ZERO, || copy(&state, is_numbered));
                read();
            })
        };
        state.lock().value += 1;
        // Never fresh, so that each read copies.
        let first = snapshots.read(Time::ZERO, Duration::ZERO, || copy(&state, is_numbered));
        assert_eq!(first.value, 1, "it was copied after the change");
        reader.join().unwrap();
        // Fresh whatever it is: nobody copies.
        let stored = snapshots.read(Time::ZERO, Duration::MAX, || unreachable!("it is fresh"));
        assert!(
            stored.value >= first.value,
            "a reader is shown an older state"
        );
    });
}

#[test]
fn no_reader_is_shown_an_older_state() {
    readers(true);
}

/// The negative control: without the order of the copies the check must find the interleaving that goes back.
#[test]
fn copies_without_an_order_go_back() {
    assert!(panic::catch_unwind(|| readers(false)).is_err());
}
