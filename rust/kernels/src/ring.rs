//! Messages of one process to some others of its machine, each of which reads all of them in their order.
//!
//! A socket costs the sender a call for each reader. Here it copies a message once, into a ring of bytes in shared memory,
//! and each reader copies it out:
//!
//! ```text
//!           taken by 1     taken by 2          written
//! | …  free | 2 has it      | nobody has it yet | free … |
//! ```
//!
//! A message is its length in four bytes and its bytes; the ring begins anew behind its end, also inside a message. One
//! that is longer than the room goes in pieces, while the readers take them. Positions count all bytes ever written and
//! wrap.
//!
//! A reader to which nothing comes sleeps on the position, where the next message wakes it at once. It does not spin: the
//! gap between two steps is longer than that may last, and on a machine with too few cores the spinner takes the core of
//! the writer that it waits for. When nothing comes soon it is told so, after it has written down that it sleeps soundly;
//! the writer learns of that and has to wake it by other means, a socket for example. So a reader can wait for hours
//! without waking in between, and hears through the same socket of the writer's end. The writer waits for room by naps,
//! between which it can look for itself who is still there.
//!
//! Nobody trusts what the memory says: a position or a length that cannot be is an error.

mod region;

use std::{
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use self::region::Region;
use crate::{counter::NAP, error::RingError, memory_file::Mapping};

/// Most readers of a ring.
pub const READERS_MAX: usize = 1024;
/// Largest ring.
pub const CAPACITY_MAX: usize = 1 << 30;
/// The first position: shortly before they wrap, so that what would go wrong there goes wrong at once.
const START: u32 = 0_u32.wrapping_sub(4096);
/// Bytes of a message's length.
const LENGTH_BYTES: usize = size_of::<u32>();

/// A ring: the same for its writer and all readers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RingConfig {
    /// How many read.
    pub readers: usize,
    /// Which ring it is, a random number: on another machine there may be another one at the same address.
    pub key: u64,
    /// Bytes that the slowest reader can be behind, a power of two.
    pub capacity: usize,
    /// Longest message.
    pub message_bytes_max: usize,
}

impl Default for RingConfig {
    fn default() -> Self {
        Self {
            readers: 1,
            key: 0,
            capacity: 256 << 10,
            message_bytes_max: 64 << 20,
        }
    }
}

impl RingConfig {
    fn check(&self) -> Result<(), RingError> {
        let wrong = |key, reason| Err(RingError::InvalidConfig { key, reason });
        if self.readers == 0 || self.readers > READERS_MAX {
            let reason = format!("{} are not 1 to {READERS_MAX}", self.readers);
            return wrong("readers", reason);
        }
        let is_in_range = (LENGTH_BYTES..=CAPACITY_MAX).contains(&self.capacity);
        if !self.capacity.is_power_of_two() || !is_in_range {
            let reason = format!(
                "{} is not a power of two from {LENGTH_BYTES} to {CAPACITY_MAX}",
                self.capacity
            );
            return wrong("capacity", reason);
        }
        if u32::try_from(self.message_bytes_max).is_err() {
            let reason = format!("{} is more than {}", self.message_bytes_max, u32::MAX);
            return wrong("message_bytes_max", reason);
        }
        Ok(())
    }
}

/// How far a message has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// From where to go on: bytes of the message and its length that are in the ring.
    pub upto: usize,
    /// Whether that is all of it.
    pub is_whole: bool,
    /// Readers that slept soundly, and now have something to read: they have to be woken.
    pub sleepers: Vec<usize>,
}

/// What the writer alone knows.
struct Progress {
    written: u32,
    /// The readers that are waited for.
    readers: Vec<usize>,
}

/// The end that writes.
pub struct RingWriter {
    region: Region,
    /// Keeps the memory reachable for readers to come.
    file: OwnedFd,
    progress: Mutex<Progress>,
}

impl RingWriter {
    /// Makes the memory. Nobody is waited for, until it is admitted.
    pub fn create(config: RingConfig) -> Result<Self, RingError> {
        config.check()?;
        let (region, file) = Region::create(config)?;
        let progress = Mutex::new(Progress {
            written: START,
            readers: Vec::new(),
        });
        Ok(Self {
            region,
            file,
            progress,
        })
    }

    /// Where readers of this machine find the memory.
    pub fn address(&self) -> String {
        Mapping::address(&self.file)
    }

    /// Takes a reader in. It has to be done before the first message: each reads all of them.
    pub fn admit(&self, reader: usize) -> Result<(), RingError> {
        if reader >= self.region.config().readers {
            let reason = format!("{reader} of {}", self.region.config().readers);
            let key = "reader";
            return Err(RingError::InvalidConfig { key, reason });
        }
        self.progress.lock().readers.push(reader);
        Ok(())
    }

    /// Writes as much of a message as there is room for; `from` is 0 for a new one, then what the last call has returned.
    /// Never waits.
    pub fn write(&self, message: &[u8], from: usize) -> Result<Written, RingError> {
        let most = self.region.config().message_bytes_max;
        let bytes = message.len();
        if bytes > most {
            return Err(RingError::TooLong { bytes, most });
        }
        let length = (bytes as u32).to_le_bytes();
        let mut progress = self.progress.lock();
        let (mut upto, mut room) = (from, self.room(&progress)?);
        for (begin, part) in [(0, &length[..]), (LENGTH_BYTES, message)] {
            let rest = part.get(upto.saturating_sub(begin)..).unwrap_or_default();
            let piece = &rest[..rest.len().min(room)];
            self.region.put(progress.written, piece);
            progress.written = progress.written.wrapping_add(piece.len() as u32);
            upto += piece.len();
            room -= piece.len();
        }
        let mut sleepers = Vec::new();
        if upto > from {
            self.region.written().publish(progress.written);
            let asleep = |reader: &usize| self.region.line(*reader).wake();
            sleepers.extend(progress.readers.iter().copied().filter(asleep));
        }
        Ok(Written {
            upto,
            is_whole: upto >= LENGTH_BYTES + bytes,
            sleepers,
        })
    }

    /// Waits some milliseconds, or until there is room; returns the readers that have made none.
    pub fn await_room(&self) -> Result<Vec<usize>, RingError> {
        let progress = self.progress.lock();
        let mut late = Vec::new();
        for reader in progress.readers.iter().copied() {
            let taken = &self.region.line(reader).taken;
            let room = taken.asleep(|| {
                let seen = taken.look();
                if self.room_of(&progress, reader, seen)? == 0 {
                    taken.nap(seen, NAP);
                }
                self.room_of(&progress, reader, taken.look())
            })?;
            if room == 0 {
                late.push(reader);
            }
        }
        Ok(late)
    }

    /// Bytes that may be written now.
    fn room(&self, progress: &Progress) -> Result<usize, RingError> {
        let mut least = self.region.config().capacity;
        for reader in &progress.readers {
            let taken = self.region.line(*reader).taken.get();
            least = least.min(self.room_of(progress, *reader, taken)?);
        }
        Ok(least)
    }

    fn room_of(&self, progress: &Progress, reader: usize, taken: u32) -> Result<usize, RingError> {
        let behind = progress.written.wrapping_sub(taken) as usize;
        let capacity = self.region.config().capacity;
        capacity.checked_sub(behind).ok_or_else(|| {
            RingError::Damaged(format!(
                "reader {reader} is {behind} of {capacity} bytes behind"
            ))
        })
    }
}

/// A message that is not whole yet.
struct Message {
    taken: u32,
    length: Option<usize>,
    bytes: Vec<u8>,
}

impl Message {
    /// Bytes that have to come before there is something to do.
    const fn needed(&self) -> usize {
        match self.length {
            None => LENGTH_BYTES,
            Some(_) => 1,
        }
    }
}

/// An end that reads.
pub struct RingReader {
    region: Region,
    reader: usize,
    message: Mutex<Message>,
}

impl RingReader {
    /// Opens the memory that a writer has made with the same `config`, as one of its readers.
    pub fn open(config: RingConfig, address: &str, reader: usize) -> Result<Self, RingError> {
        config.check()?;
        if reader >= config.readers {
            let reason = format!("{reader} of {}", config.readers);
            let key = "reader";
            return Err(RingError::InvalidConfig { key, reason });
        }
        Ok(Self {
            region: Region::open(config, address)?,
            reader,
            message: Mutex::new(Message {
                taken: START,
                length: None,
                bytes: Vec::new(),
            }),
        })
    }

    /// The next message; `None` where none came for as long as the `patience`. The writer knows then that this reader
    /// sleeps soundly, and what comes next wakes it: by other means than this memory.
    pub fn take(&self, patience: Duration) -> Result<Option<Vec<u8>>, RingError> {
        let mut message = self.message.lock();
        let line = self.region.line(self.reader);
        let written = self.region.written();
        loop {
            // Also where nothing is said to be there: it may be an empty message that is whole now.
            if let Some(whole) = self.read(&mut message, written.get())? {
                return Ok(Some(whole));
            }
            let needed = message.needed();
            let taken = message.taken;
            let is_there = |written: u32| written.wrapping_sub(taken) as usize >= needed;
            if self.doze(patience, is_there) {
                continue;
            }
            line.fall_asleep();
            if is_there(written.look()) {
                line.wake();
                continue;
            }
            return Ok(None);
        }
    }

    /// Waits for something, sleeping lightly; returns whether it has come.
    fn doze(&self, patience: Duration, is_there: impl Fn(u32) -> bool) -> bool {
        let written = self.region.written();
        let start = Instant::now();
        written.asleep(|| {
            loop {
                let seen = written.look();
                if is_there(seen) {
                    return true;
                }
                let left = patience.saturating_sub(start.elapsed());
                if left.is_zero() {
                    return false;
                }
                written.nap(seen, left);
            }
        })
    }

    /// Takes what belongs to the message of what is there; returns it when it is whole.
    fn read(&self, message: &mut Message, written: u32) -> Result<Option<Vec<u8>>, RingError> {
        let capacity = self.region.config().capacity;
        let mut there = written.wrapping_sub(message.taken) as usize;
        if there > capacity {
            let reason = format!("{there} bytes are said to wait in {capacity}");
            return Err(RingError::Damaged(reason));
        }
        if message.length.is_none() && there >= LENGTH_BYTES {
            let mut length = [0; LENGTH_BYTES];
            self.region.take(message.taken, &mut length);
            let length = u32::from_le_bytes(length) as usize;
            let most = self.region.config().message_bytes_max;
            if length > most {
                let reason = format!("a message of {length} bytes, at most {most} go");
                return Err(RingError::Damaged(reason));
            }
            message.length = Some(length);
            message.taken = message.taken.wrapping_add(LENGTH_BYTES as u32);
            there -= LENGTH_BYTES;
        }
        let Some(length) = message.length else {
            return Ok(None);
        };
        let begin = message.bytes.len();
        let piece = there.min(length - begin);
        message.bytes.resize(begin + piece, 0);
        self.region.take(message.taken, &mut message.bytes[begin..]);
        message.taken = message.taken.wrapping_add(piece as u32);
        self.region.line(self.reader).taken.publish(message.taken);
        if message.bytes.len() < length {
            return Ok(None);
        }
        message.length = None;
        Ok(Some(std::mem::take(&mut message.bytes)))
    }
}
