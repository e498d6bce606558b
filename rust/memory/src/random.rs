//! Numbers that no other process has.

use rustix::rand::{GetRandomFlags, getrandom};

use crate::error::MemoryError;

/// Bytes that the kernel draws anew for each call. What a process keeps itself to draw from, as the standard library
/// does, processes that are forked from it have alike.
///
/// # Errors
///
/// [`MemoryError::Os`] where the kernel has none to give.
pub fn random_bytes<const N: usize>() -> Result<[u8; N], MemoryError> {
    let mut bytes = [0; N];
    let mut filled = 0;
    while filled < N {
        filled += getrandom(&mut bytes[filled..], GetRandomFlags::empty())
            .map_err(|errno| MemoryError::os("draw random bytes", errno))?;
    }
    Ok(bytes)
}
