//! System calls that move bytes between a socket and a slab. A slab's bytes are shared with other processes, so the
//! kernel is given addresses and Rust never has a reference to them.

#![expect(unsafe_code, reason = "hands addresses of slabs to the kernel")]

use std::{
    io::Error,
    mem,
    os::fd::{AsRawFd, BorrowedFd},
    ptr,
};

use libc::{MSG_DONTWAIT, MSG_NOSIGNAL, c_void, iovec, msghdr};

use crate::{slab::Slab, transport::ledger::fits};

/// Pieces of one system call; the kernel takes at most 1,024.
pub(super) const PIECES_MAX: usize = 64;

/// Bytes of a slab.
pub(super) struct Piece<'a> {
    pub(super) slab: &'a Slab,
    pub(super) offset: u64,
    pub(super) len: u64,
}

/// What a system call came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Moved {
    Bytes(usize),
    /// The socket is full, or empty.
    Blocked,
    /// The other side has closed or died.
    Closed,
}

/// Sends what it can of `head` and then of the pieces.
pub(super) fn send(socket: BorrowedFd<'_>, head: &[u8], pieces: &[Piece<'_>]) -> Moved {
    let head = iovec {
        iov_base: head.as_ptr().cast_mut().cast(),
        iov_len: head.len(),
    };
    let mut vectors = vectors(head, pieces);
    let message = message(&mut vectors);
    // SAFETY: each vector is a live slice of Rust's or lies inside a slab that is borrowed here; the kernel only reads.
    let sent = unsafe {
        libc::sendmsg(
            socket.as_raw_fd(),
            &raw const message,
            MSG_DONTWAIT | MSG_NOSIGNAL,
        )
    };
    // A send of nothing is never asked for, so that zero cannot come back.
    outcome(sent)
}

/// Receives into `head`.
pub(super) fn receive(socket: BorrowedFd<'_>, head: &mut [u8]) -> Moved {
    // SAFETY: the kernel writes at most `head.len()` bytes to `head`.
    outcome(unsafe {
        libc::recv(
            socket.as_raw_fd(),
            head.as_mut_ptr().cast(),
            head.len(),
            MSG_DONTWAIT,
        )
    })
}

/// Receives into pieces of slabs, in their order.
pub(super) fn receive_into(socket: BorrowedFd<'_>, pieces: &[Piece<'_>]) -> Moved {
    let nothing = iovec {
        iov_base: ptr::null_mut(),
        iov_len: 0,
    };
    let mut vectors = vectors(nothing, pieces);
    let mut message = message(&mut vectors);
    // SAFETY: each vector lies inside a slab that is borrowed here, whose bytes anybody may write at any time.
    outcome(unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, MSG_DONTWAIT) })
}

fn vectors(head: iovec, pieces: &[Piece<'_>]) -> Vec<iovec> {
    let mut vectors = Vec::with_capacity(1 + pieces.len());
    vectors.push(head);
    for piece in pieces {
        let is_inside = fits(piece.offset, piece.len, piece.slab.len());
        debug_assert!(
            is_inside,
            "parts are checked when they are posted and when they arrive"
        );
        if !is_inside {
            break;
        }
        vectors.push(iovec {
            iov_base: piece
                .slab
                .as_ptr()
                .wrapping_add(piece.offset as usize)
                .cast::<c_void>(),
            iov_len: piece.len as usize,
        });
    }
    vectors
}

fn message(vectors: &mut [iovec]) -> msghdr {
    // SAFETY: all of its fields are numbers and pointers, for which zero is a value.
    let mut message: msghdr = unsafe { mem::zeroed() };
    message.msg_iov = vectors.as_mut_ptr();
    message.msg_iovlen = vectors.len();
    message
}

fn outcome(returned: isize) -> Moved {
    match usize::try_from(returned) {
        Ok(0) => Moved::Closed,
        Ok(bytes) => Moved::Bytes(bytes),
        Err(_) => match Error::last_os_error().raw_os_error() {
            Some(libc::EAGAIN | libc::EINTR | libc::ENOBUFS | libc::ENOTCONN) => Moved::Blocked,
            _ => Moved::Closed,
        },
    }
}
