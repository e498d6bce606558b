//! The bodies on random bytes.

use orchestra_fuzz::{placement, routing, wire};
use proptest::prelude::*;

proptest! {
    #[test]
    fn routing_survives(data in prop::collection::vec(any::<u8>(), 0..2000)) {
        routing(&data);
    }

    #[test]
    fn placement_survives(data in prop::collection::vec(any::<u8>(), 0..2000)) {
        placement(&data);
    }

    #[test]
    fn the_wire_survives(data in prop::collection::vec(any::<u8>(), 0..300)) {
        wire(&data);
    }
}
