//! Which NUMA node a slab's pages come from.

use std::fs;

use crate::error::MemoryError;

/// The most nodes that a mask names; Linux is built for at most 1,024.
const NODES_MAX: usize = 1024;
const BITS: usize = u64::BITS as usize;

/// Has the pages of a range come from one node, and from no other. Before they are touched: later it moves none.
pub(super) fn bind(base: *mut u8, len: usize, node: u32) -> Result<(), MemoryError> {
    let is_there = fs::exists(format!("/sys/devices/system/node/node{node}")).unwrap_or(false);
    if !is_there || node as usize >= NODES_MAX {
        return Err(MemoryError::InvalidField {
            field: "numa_node",
            expected: "a NUMA node of this machine",
        });
    }
    let mut mask = [0_u64; NODES_MAX / BITS];
    mask[node as usize / BITS] = 1 << (node as usize % BITS);
    // SAFETY: the range is a mapping of the caller's, whose bytes this leaves as they are, and the mask is as long as is
    // said: the kernel counts one bit more than it reads.
    let bound = unsafe {
        libc::syscall(
            libc::SYS_mbind,
            base,
            len,
            libc::MPOL_BIND,
            mask.as_ptr(),
            NODES_MAX + 1,
            0,
        )
    };
    if bound == 0 {
        return Ok(());
    }
    let errno = std::io::Error::last_os_error().raw_os_error();
    Err(MemoryError::Os {
        action: "bind a slab to its NUMA node",
        code: errno.unwrap_or(0),
    })
}
