//! What the tests, the benches and the peer process share: opening a transport by name, and bytes that tell where
//! they belong.

use std::{fmt::Write, num::NonZeroUsize, sync::Arc, time::Duration};

use orchestra_memory::{
    Slab, SlabConfig, SlabId, Transport,
    transport::{
        nixl::{NixlConfig, NixlTransport, library::LIBRARY_VARIABLE},
        shm::ShmTransport,
        tcp::{TcpConfig, TcpTransport},
    },
};
use rustix::{
    event::{PollFd, PollFlags, poll},
    time::Timespec,
};

/// Opens a transport by its name.
pub(crate) fn open(kind: &str) -> Box<dyn Transport> {
    match kind {
        "shm" => Box::new(ShmTransport::open().unwrap()),
        "tcp" => Box::new(TcpTransport::open(&TcpConfig::default()).unwrap()),
        "nixl" => Box::new(NixlTransport::open(&nixl_config()).unwrap()),
        other => panic!("no transport is called {other}"),
    }
}

/// NIXL from the Python packages of this checkout, unless the environment names another.
pub(crate) fn nixl_config() -> NixlConfig {
    let libraries = concat!(env!("CARGO_MANIFEST_DIR"), "/../../.venv/lib");
    let versions = std::fs::read_dir(libraries).into_iter().flatten();
    NixlConfig {
        site_packages: versions
            .filter_map(|version| Some(version.ok()?.path().join("site-packages")))
            .collect(),
        ..NixlConfig::default()
    }
}

/// Whether a transport can be had here. Only NIXL can be missing: where the wheel is not installed.
#[allow(dead_code, reason = "the peer is only started where it can be")]
pub(crate) fn is_installed(kind: &str) -> bool {
    let wheels = nixl_config().site_packages;
    let mut folders = wheels.iter().flat_map(|folder| {
        ["13", "12"].map(|cuda| folder.join(format!(".nixl_cu{cuda}.mesonpy.libs")))
    });
    kind != "nixl"
        || std::env::var_os(LIBRARY_VARIABLE).is_some()
        || folders.any(|wheel| wheel.exists())
}

/// A slab of small pages.
pub(crate) fn slab(id: u32, len: u64) -> Arc<Slab> {
    let config = SlabConfig {
        len,
        huge_pages: false,
        prefault_threads: NonZeroUsize::MIN,
        ..SlabConfig::default()
    };
    Arc::new(Slab::create(SlabId(id), &config).unwrap())
}

/// Bytes that differ between seeds and between neighbours.
pub(crate) fn pattern(seed: u64, len: usize) -> Vec<u8> {
    (0..len as u64)
        .map(|at| (at.wrapping_mul(31) ^ (at >> 8) ^ seed.wrapping_mul(0x9e37_79b9)) as u8)
        .collect()
}

/// The checksum of Ethernet (IEEE 802.3).
pub(crate) fn crc32(bytes: &[u8]) -> u32 {
    let step = |sum: u32, _| (sum >> 1) ^ (0xedb8_8320 & (sum & 1).wrapping_neg());
    !bytes.iter().fold(u32::MAX, |sum, byte| {
        (0..8).fold(sum ^ u32::from(*byte), step)
    })
}

/// Whether a slab holds the pattern.
pub(crate) fn holds(slab: &Slab, offset: u64, len: usize, seed: u64) -> bool {
    let mut bytes = vec![0; len];
    slab.read(offset, &mut bytes).unwrap();
    bytes == pattern(seed, len)
}

/// One turn of a progress loop: works, or sleeps until there is something to do.
pub(crate) fn turn(transport: &dyn Transport, nap: Duration) -> usize {
    let moved = transport.progress(Duration::from_millis(1));
    if moved == 0 {
        match transport.wake_fd() {
            Some(fd) => drop(poll(
                &mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)],
                Some(&Timespec::try_from(nap).unwrap()),
            )),
            None => std::thread::sleep(nap),
        }
    }
    moved
}

/// Naps of a progress loop where nothing moves: short after something has, and longer each time, as a driver's are.
pub(crate) struct Naps(Duration);

impl Naps {
    const MIN: Duration = Duration::from_micros(50);
    const MAX: Duration = Duration::from_millis(5);

    pub(crate) const fn new() -> Self {
        Self(Self::MIN)
    }

    /// A [`turn`] with the next nap.
    pub(crate) fn turn(&mut self, transport: &dyn Transport) -> usize {
        let moved = turn(transport, self.0);
        self.0 = if moved > 0 {
            Self::MIN
        } else {
            Self::MAX.min(2 * self.0)
        };
        moved
    }
}

pub(crate) fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").unwrap();
        text
    })
}

pub(crate) fn from_hex(text: &str) -> Vec<u8> {
    (0..text.len() / 2)
        .map(|at| u8::from_str_radix(&text[2 * at..2 * at + 2], 16).unwrap())
        .collect()
}
