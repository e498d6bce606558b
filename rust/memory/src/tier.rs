//! Where the bytes of a slab lie.

use std::{fmt, str::FromStr};

use crate::error::MemoryError;

/// A kind of memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Tier {
    /// Host memory.
    #[default]
    Dram,
    /// Host memory that NVIDIA devices read and write directly.
    Pinned,
    /// Memory of an NVIDIA device, which the processor cannot reach.
    Vram {
        /// The device, as the driver counts those that this process may see.
        device: u32,
    },
}

impl Tier {
    /// Whether the processor reaches it through pointers.
    pub const fn is_host(self) -> bool {
        match self {
            Self::Dram | Self::Pinned => true,
            Self::Vram { .. } => false,
        }
    }

    /// The device whose memory it is.
    pub const fn device(self) -> Option<u32> {
        match self {
            Self::Dram | Self::Pinned => None,
            Self::Vram { device } => Some(device),
        }
    }
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dram => f.write_str("dram"),
            Self::Pinned => f.write_str("pinned"),
            Self::Vram { device } => write!(f, "vram:{device}"),
        }
    }
}

impl FromStr for Tier {
    type Err = MemoryError;

    fn from_str(text: &str) -> Result<Self, MemoryError> {
        let device = text.strip_prefix("vram:");
        match (text, device.map(str::parse)) {
            ("dram", _) => Ok(Self::Dram),
            ("pinned", _) => Ok(Self::Pinned),
            (_, Some(Ok(device))) => Ok(Self::Vram { device }),
            _ => Err(MemoryError::InvalidField {
                field: "tier",
                expected: "dram, pinned, or vram: and the number of a device",
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tier_is_read_back_from_its_name() {
        for tier in [Tier::Dram, Tier::Pinned, Tier::Vram { device: 11 }] {
            assert_eq!(tier.to_string().parse(), Ok(tier));
        }
        for text in ["", "DRAM", "vram", "vram:", "vram:-1", "vram:4294967296"] {
            assert!(text.parse::<Tier>().is_err(), "{text}");
        }
    }
}
