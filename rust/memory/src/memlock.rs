//! Whether the process may lock as much memory as registering needs, asked before any library tries.

use rustix::{
    process::{Resource, getrlimit},
    thread::{CapabilitySet, capabilities},
};

use crate::error::MemoryError;

/// Refuses `need` bytes where the limit is lower and the process is not privileged to exceed it.
pub(crate) fn check(need: u64) -> Result<(), MemoryError> {
    let is_privileged =
        capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::IPC_LOCK));
    // No limit is told as `None`.
    let have = getrlimit(Resource::Memlock).current.unwrap_or(u64::MAX);
    judge(need, have, is_privileged)
}

const fn judge(need: u64, have: u64, is_privileged: bool) -> Result<(), MemoryError> {
    if is_privileged || need <= have {
        return Ok(());
    }
    Err(MemoryError::MemlockTooLow { need, have })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_low_limit_of_an_unprivileged_process_is_too_low() {
        assert_eq!(judge(10, 10, false), Ok(()));
        assert_eq!(judge(11, 10, true), Ok(()));
        let (need, have) = (11, 10);
        assert_eq!(
            judge(need, have, false),
            Err(MemoryError::MemlockTooLow { need, have })
        );
    }
}
