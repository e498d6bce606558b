//! Nothing: router and agent know each other by the wire alone, so what they do together is tested from here, in `tests`.
