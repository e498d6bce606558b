//! Every transport between two real processes: the same promises, kept or openly not kept.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

#[path = "../../peer/rig.rs"]
mod rig;

/// Runs each test on each transport that is named; one that is not installed is skipped, and says so.
macro_rules! on_transports {
    ($($kind:ident)* => $tests:tt) => {
        $(crate::on_transports! { @ $kind $tests })*
    };
    (@ $kind:ident { $($test:ident,)* }) => {
        mod $kind {
            $(
                #[test]
                fn $test() {
                    if crate::rig::is_installed(stringify!($kind)) {
                        super::$test(stringify!($kind));
                    } else {
                        eprintln!("skipped: {} is not installed", stringify!($kind));
                    }
                }
            )*
        }
    };
}
use on_transports;

mod faults;
mod transfers;
mod two;
