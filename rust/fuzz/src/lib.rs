//! Bytes turned into operations on what takes input from others. A body panics where an invariant breaks, and nowhere else.
//!
//! A coverage-guided fuzzer drives them through `targets/`; `tests/bodies.rs` gives them random bytes on every run of the
//! test suite, and the inputs that once found something.

mod placement;
mod routing;
mod stepping;
mod waiting;
mod wire;

use arbitrary::{Arbitrary, Unstructured};

pub use self::{
    placement::placement, routing::routing, stepping::stepping, waiting::waiting, wire::wire,
};

/// The operations that the rest of the input spells.
fn operations<'a, Op: Arbitrary<'a>>(mut input: Unstructured<'a>) -> impl Iterator<Item = Op> {
    std::iter::from_fn(move || {
        let op = (!input.is_empty()).then(|| Op::arbitrary(&mut input));
        op?.ok()
    })
}
