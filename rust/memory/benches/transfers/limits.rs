//! What no transport can beat here: the same bytes moved by the shortest way that the machine has.

#![expect(unsafe_code, reason = "copies raw memory and asks the kernel to")]

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    sync::{
        Arc,
        mpsc::{Receiver, sync_channel},
    },
    thread,
    time::Instant,
};

use orchestra_memory::{Direction, Segment, Slab};
use rustix::time::{ClockId, clock_gettime};

use crate::rig;

pub(crate) enum Limit {
    /// Within this process, between two slabs.
    Copy(Arc<Slab>, Arc<Slab>),
    /// `process_vm_writev` into the peer, and `process_vm_readv` out of it.
    KernelCopy {
        slab: Arc<Slab>,
        process: i32,
        remote_base: usize,
    },
    /// A stream to a thread that throws the bytes away; it says when it has them all.
    Socket(TcpStream, Receiver<()>, Vec<u8>),
}

pub(crate) fn of(kind: &str, slab: &Arc<Slab>, process: u32, remote_base: usize) -> Limit {
    match kind {
        "shm" => Limit::Copy(Arc::clone(slab), rig::slab(1, slab.len())),
        "nixl" => Limit::KernelCopy {
            slab: Arc::clone(slab),
            process: process as i32,
            remote_base,
        },
        _ => socket(),
    }
}

fn socket() -> Limit {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    stream.set_nodelay(true).unwrap();
    let (mut accepted, _) = listener.accept().unwrap();
    let (done, is_done) = sync_channel(1);
    thread::spawn(move || {
        let mut buffer = vec![0; 1 << 20];
        let mut header = [0; 8];
        while accepted.read_exact(&mut header).is_ok() {
            let mut left = u64::from_le_bytes(header);
            while left > 0 {
                let len = left.min(buffer.len() as u64) as usize;
                left -= accepted.read(&mut buffer[..len]).unwrap() as u64;
            }
            done.send(()).unwrap();
        }
    });
    Limit::Socket(stream, is_done, vec![0; 1 << 20])
}

impl Limit {
    pub(crate) const fn name(&self) -> &'static str {
        match self {
            Self::Copy(..) => "memcpy",
            Self::KernelCopy { .. } => "the kernel's copy",
            Self::Socket(..) => "a plain socket",
        }
    }

    /// Moves as many bytes the same way, from and to places as far apart; seconds.
    pub(crate) fn run(&mut self, direction: Direction, segments: &[Segment]) -> f64 {
        let started = Instant::now();
        match self {
            Self::Copy(ours, theirs) => {
                for part in segments {
                    // SAFETY: the bench's segments lie inside both slabs, which are two mappings.
                    unsafe {
                        let ours = ours.as_ptr().add(part.local_offset as usize);
                        let theirs = theirs.as_ptr().add(part.remote_offset as usize);
                        let (from, to) = match direction {
                            Direction::Put => (ours, theirs),
                            Direction::Get => (theirs, ours),
                        };
                        std::ptr::copy_nonoverlapping(from, to, part.len as usize);
                    }
                }
            }
            Self::KernelCopy {
                slab,
                process,
                remote_base,
            } => {
                let vector = |address: usize, len: u64| libc::iovec {
                    iov_base: std::ptr::without_provenance_mut(address),
                    iov_len: len as usize,
                };
                let base = slab.as_ptr().addr();
                let ours: Vec<_> = segments
                    .iter()
                    .map(|part| vector(base + part.local_offset as usize, part.len))
                    .collect();
                let theirs: Vec<_> = segments
                    .iter()
                    .map(|part| vector(*remote_base + part.remote_offset as usize, part.len))
                    .collect();
                let count = segments.len() as libc::c_ulong;
                let call = match direction {
                    Direction::Put => libc::process_vm_writev,
                    Direction::Get => libc::process_vm_readv,
                };
                // SAFETY: the vectors lie inside the slabs of this process and of the peer.
                let moved =
                    unsafe { call(*process, ours.as_ptr(), count, theirs.as_ptr(), count, 0) };
                let bytes: u64 = segments.iter().map(|part| part.len).sum();
                assert_eq!(moved, bytes as isize, "the kernel copied everything");
            }
            Self::Socket(stream, is_done, buffer) => {
                let mut left: u64 = segments.iter().map(|part| part.len).sum();
                stream.write_all(&left.to_le_bytes()).unwrap();
                while left > 0 {
                    let len = left.min(buffer.len() as u64) as usize;
                    stream.write_all(&buffer[..len]).unwrap();
                    left -= len as u64;
                }
                is_done.recv().unwrap();
            }
        }
        started.elapsed().as_secs_f64()
    }
}

/// Processor time of this process so far.
pub(crate) fn processor_seconds() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}
