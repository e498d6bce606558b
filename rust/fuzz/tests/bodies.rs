//! The bodies on random bytes.

use orchestra_fuzz::{placement, routing, stepping, waiting, wire};
use proptest::prelude::*;

proptest! {
    #[test]
    fn routing_survives(data in prop::collection::vec(any::<u8>(), 0..800)) {
        routing(&data);
    }

    #[test]
    fn placement_survives(data in prop::collection::vec(any::<u8>(), 0..800)) {
        placement(&data);
    }

    #[test]
    fn stepping_survives(data in prop::collection::vec(any::<u8>(), 0..800)) {
        stepping(&data);
    }

    #[test]
    fn waiting_survives(data in prop::collection::vec(any::<u8>(), 0..800)) {
        waiting(&data);
    }

    #[test]
    fn the_wire_survives(data in prop::collection::vec(any::<u8>(), 0..300)) {
        wire(&data);
    }
}
