//! Numbers of 16 bits: the upper half of an `f32`.

/// The value of a bf16, which an `f32` holds exactly.
#[inline(always)]
#[expect(
    clippy::inline_always,
    reason = "has to be part of the loops around it, which are compiled for each processor"
)]
pub const fn widen(bits: u16) -> f32 {
    f32::from_bits((bits as u32) << 16)
}

/// The nearest bf16, ties to even, as torch rounds; every NaN becomes the same one.
#[inline(always)]
#[expect(
    clippy::inline_always,
    reason = "has to be part of the loops around it, which are compiled for each processor"
)]
pub const fn narrow(value: f32) -> u16 {
    let bits = value.to_bits();
    // Not a branch: a select, so that loops stay vectors. What lies behind the 16th bit rounds up where it is more than
    // a half, or a half and the last bit kept is odd.
    let rounded = (bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16) as u16;
    if value.is_nan() { 0x7fc0 } else { rounded }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bf16_comes_back() {
        for bits in 0..=u16::MAX {
            if !widen(bits).is_nan() {
                assert_eq!(narrow(widen(bits)), bits);
            }
        }
    }

    #[test]
    fn ties_go_to_even() {
        let one = 1.0_f32.to_bits();
        assert_eq!(narrow(f32::from_bits(one + 0x8000)), 0x3f80);
        assert_eq!(narrow(f32::from_bits(one + 0x8001)), 0x3f81);
        assert_eq!(narrow(f32::from_bits(one + 0x1_8000)), 0x3f82);
        assert_eq!(narrow(f32::MAX), 0x7f80);
        assert_eq!(narrow(f32::NAN), 0x7fc0);
    }
}
