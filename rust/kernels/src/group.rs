//! Collectives between the ranks of one machine, over shared memory.
//!
//! A gloo all-reduce of a decode step costs 400 µs on two cores, nearly all of it for handing over between threads. Here
//! a rank copies its numbers into a slot, counts up, and reads the slots of the others when they have counted up too:
//! a few microseconds.
//!
//! Each rank has two slots and uses them in turns. It writes piece `n + 2` over piece `n`, so it first waits until every
//! rank has published piece `n + 1`, which none does before it has read piece `n`.
//!
//! Who waits spins for some 50 µs, then sleeps in the kernel: on a small machine the rank that is waited for may need
//! this very core. A sleeper looks every few milliseconds whether the other process still lives, whether somebody has
//! called [`SharedGroup::abort`], and whether time is up. Whoever finds a rank lost tells all others through the shared
//! memory. A group never recovers: its ranks form another, with the next generation.

mod meter;
mod peers;
mod region;
mod shares;

use std::{
    num::NonZeroUsize,
    ops::Range,
    os::fd::OwnedFd,
    sync::atomic::Ordering::{Acquire, Release, SeqCst},
    thread,
    time::{Duration, Instant},
};

use parking_lot::Mutex;

pub use self::{
    meter::{Meter, Progress},
    region::Number,
};
use self::{peers::Peers, region::Region};
use crate::{counter::NAP, error::GroupError, memory_file::Mapping};

/// Most ranks of a group.
pub const RANKS_MAX: usize = 64;
/// Largest slot.
pub const SLOT_BYTES_MAX: usize = 16 << 20;
/// How long to spin before sleeping, where every rank can have a core of its own.
const SPIN: Duration = Duration::from_micros(50);
/// The first thing that a rank publishes: that it is there.
const HERE: u32 = 1;

/// A group and this rank's place in it. All but `rank` are the same on every rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupConfig {
    /// This rank.
    pub rank: usize,
    /// Ranks of the group, at most 64.
    pub size: usize,
    /// Which group of these ranks it is: one that forms after another was lost has a higher number.
    pub generation: u64,
    /// How long a rank waits for another inside a collective.
    pub timeout: Duration,
    /// Bytes of a slot, a multiple of 4096: larger tensors go in pieces.
    pub slot_bytes: usize,
}

impl Default for GroupConfig {
    fn default() -> Self {
        Self {
            rank: 0,
            size: 1,
            generation: 0,
            timeout: Duration::from_secs(60),
            slot_bytes: 256 << 10,
        }
    }
}

impl GroupConfig {
    fn check(&self) -> Result<(), GroupError> {
        let wrong = |key, reason| Err(GroupError::InvalidConfig { key, reason });
        if self.size == 0 || self.size > RANKS_MAX {
            let reason = format!("{} ranks, 1 to {RANKS_MAX} make a group", self.size);
            return wrong("size", reason);
        }
        if self.rank >= self.size {
            return wrong("rank", format!("{} of {} ranks", self.rank, self.size));
        }
        let is_whole_pages = self.slot_bytes.is_multiple_of(4096);
        if self.slot_bytes == 0 || self.slot_bytes > SLOT_BYTES_MAX || !is_whole_pages {
            let reason = format!(
                "{} is not a multiple of 4096 up to {SLOT_BYTES_MAX}",
                self.slot_bytes
            );
            return wrong("slot_bytes", reason);
        }
        Ok(())
    }
}

/// Which collective a piece belongs to.
#[derive(Clone, Copy)]
enum Kind {
    AllReduce = 1,
    Gather = 2,
    ReduceScatter = 3,
    AllGather = 4,
}

/// How a group ended, as the shared memory says it.
enum Ending {
    Aborted,
    Lost(usize),
    Late(usize),
}

impl Ending {
    const fn encode(&self) -> u32 {
        match self {
            Self::Aborted => 1,
            Self::Lost(rank) => 2 + 2 * *rank as u32,
            Self::Late(rank) => 3 + 2 * *rank as u32,
        }
    }

    const fn decode(word: u32) -> Option<Self> {
        match word {
            0 => None,
            1 => Some(Self::Aborted),
            _ if word.is_multiple_of(2) => Some(Self::Lost(word as usize / 2 - 1)),
            _ => Some(Self::Late((word as usize - 3) / 2)),
        }
    }
}

/// What changes from one collective to the next.
struct Turn {
    /// What this rank has published last.
    published: u32,
    /// Handles of the others, once all are there.
    peers: Option<Peers>,
    /// Keeps the memory reachable for the others; rank 0's, until all are there.
    file: Option<OwnedFd>,
}

/// One rank's end of a group.
///
/// One thread at a time is in a collective: a second one waits for the first. `abort` and `ending` take no lock and may
/// come from any thread at any time.
pub struct SharedGroup {
    config: GroupConfig,
    region: Region,
    address: String,
    spin: Duration,
    meter: Meter,
    turn: Mutex<Turn>,
}

impl SharedGroup {
    /// Makes the group's memory; rank 0 does. The others need its [`address`](Self::address).
    pub fn create(config: GroupConfig) -> Result<Self, GroupError> {
        config.check()?;
        let (region, file) = Region::create(&config)?;
        let address = Mapping::address(&file);
        Ok(Self::enter(config, region, address, Some(file)))
    }

    /// Joins the group whose memory lies at `address`; every rank but rank 0 does.
    pub fn join(config: GroupConfig, address: &str) -> Result<Self, GroupError> {
        config.check()?;
        let region = Region::open(address, &config)?;
        Ok(Self::enter(config, region, address.to_owned(), None))
    }

    fn enter(config: GroupConfig, region: Region, address: String, file: Option<OwnedFd>) -> Self {
        let cores = thread::available_parallelism().map_or(1, NonZeroUsize::get);
        let spin = if cores < config.size {
            Duration::ZERO
        } else {
            SPIN
        };
        let line = region.line(config.rank);
        line.pid.store(std::process::id(), Release);
        let group = Self {
            turn: Mutex::new(Turn {
                published: 0,
                peers: None,
                file,
            }),
            config,
            region,
            address,
            spin,
            meter: Meter::default(),
        };
        group.publish(HERE);
        group
    }

    /// Ranks of the group.
    pub const fn size(&self) -> usize {
        self.config.size
    }

    /// Where the other ranks of this machine find the memory, until rank 0 has met them all.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Waits until every rank is there. Each collective does so too; this one names who did not come at the start.
    pub fn meet(&self) -> Result<(), GroupError> {
        let mut turn = self.turn.lock();
        self.ensure_met(&mut turn)
    }

    /// What this rank's collectives have come to; any thread may ask at any time.
    pub const fn meter(&self) -> &Meter {
        &self.meter
    }

    /// Does the work of one collective, when it is this thread's turn and all ranks have met.
    fn collective(
        &self,
        work: impl FnOnce(&mut Turn) -> Result<(), GroupError>,
    ) -> Result<(), GroupError> {
        let mut turn = self.turn.lock();
        self.meter.enter();
        self.ensure_met(&mut turn)?;
        work(&mut turn)?;
        self.meter.leave();
        Ok(())
    }

    /// Replaces `numbers` by their sum over all ranks (`f32`, or bf16 as `u16`), added in `f32` in the order of the
    /// ranks: every rank gets the same bits, whoever came first. All ranks call it with equally many numbers.
    pub fn all_reduce<T: Number>(&self, numbers: &mut [T]) -> Result<(), GroupError> {
        self.collective(|turn| {
            for piece in numbers.chunks_mut(self.config.slot_bytes / size_of::<T>()) {
                let label = label(Kind::AllReduce, size_of_val(piece));
                let number = self.put(turn, label, T::bytes(piece))?;
                for rank in 0..self.config.size {
                    self.await_piece(turn, rank, label)?;
                }
                self.region.sum(number, 0, piece);
            }
            Ok(())
        })
    }

    /// Joins the ranks' matrices of `rows` rows side by side: rank 0 gets `[rows, size * columns]` in `joined`, which
    /// the others leave away. All ranks call it with equally many rows and bytes.
    pub fn gather_columns(
        &self,
        part: &[u8],
        rows: usize,
        mut joined: Option<&mut [u8]>,
    ) -> Result<(), GroupError> {
        self.check_gather(part, rows, joined.as_deref())?;
        self.collective(|turn| {
            if part.is_empty() {
                return Ok(());
            }
            let width = part.len() / rows;
            // As many whole rows as a slot holds, or a row in pieces.
            let rows_each = (self.config.slot_bytes / width).max(1);
            let bytes_each = self.config.slot_bytes.min(width);
            for first in (0..rows).step_by(rows_each) {
                let some_rows = first..rows.min(first + rows_each);
                for start in (0..width).step_by(bytes_each) {
                    let columns = start..width.min(start + bytes_each);
                    let place = (some_rows.clone(), columns);
                    self.gather_piece(turn, part, (width, place), joined.as_deref_mut())?;
                }
            }
            Ok(())
        })
    }

    /// Gathers some rows whole, or a part of one row; of a matrix of so many bytes a row.
    fn gather_piece(
        &self,
        turn: &mut Turn,
        part: &[u8],
        (width, (rows, columns)): (usize, (Range<usize>, Range<usize>)),
        joined: Option<&mut [u8]>,
    ) -> Result<(), GroupError> {
        let bytes = rows.len() * columns.len();
        let piece = &part[rows.start * width + columns.start..][..bytes];
        let label = label(Kind::Gather, bytes);
        let Some(joined) = joined else {
            return self.put(turn, label, piece).map(drop);
        };
        // Nobody reads rank 0's slot.
        let number = self.put(turn, label, &[])?;
        for rank in 0..self.config.size {
            if rank > 0 {
                self.await_piece(turn, rank, label)?;
            }
            for (at, row) in rows.clone().enumerate() {
                let target = (row * self.config.size + rank) * width;
                let target = &mut joined[target + columns.start..target + columns.end];
                let from = at * columns.len();
                if rank == 0 {
                    target.copy_from_slice(&piece[from..from + columns.len()]);
                } else {
                    self.region.take(rank, number, from, target);
                }
            }
        }
        Ok(())
    }

    fn check_gather(
        &self,
        part: &[u8],
        rows: usize,
        joined: Option<&[u8]>,
    ) -> Result<(), GroupError> {
        let wrong = |field, reason| Err(GroupError::InvalidArgument { field, reason });
        if !part.is_empty() && (rows == 0 || !part.len().is_multiple_of(rows)) {
            return wrong(
                "rows",
                format!("{rows} rows do not divide {} bytes", part.len()),
            );
        }
        if joined.is_some() != (self.config.rank == 0) {
            return wrong("joined", "rank 0 has one, and no other rank".to_owned());
        }
        let expected = part.len() * self.config.size;
        match joined {
            Some(joined) if joined.len() != expected => {
                let reason = format!("{} bytes, {expected} come together", joined.len());
                wrong("joined", reason)
            }
            _ => Ok(()),
        }
    }

    /// Ends every collective of every rank, now and from now on. Any thread of any rank may call it, also while
    /// another is in a collective; a sleeping rank notices within some milliseconds.
    pub fn abort(&self) {
        self.end(&Ending::Aborted);
    }

    /// How the group ended; `None` while it lives.
    pub fn ending(&self) -> Option<GroupError> {
        let timeout_ms = self.config.timeout.as_millis() as u64;
        Ending::decode(self.region.ending().load(Acquire)).map(|ending| match ending {
            Ending::Aborted => GroupError::Aborted,
            Ending::Lost(rank) => GroupError::RankLost(rank),
            Ending::Late(rank) => GroupError::RankLate { rank, timeout_ms },
        })
    }

    // === one piece ===

    /// Publishes this rank's next piece; returns its number.
    fn put(&self, turn: &mut Turn, label: u64, piece: &[u8]) -> Result<u32, GroupError> {
        if let Some(error) = self.ending() {
            return Err(error);
        }
        // What the slot held is no longer read when every rank has published the piece after it.
        for rank in 0..self.config.size {
            self.wait(turn, rank, turn.published)?;
        }
        let number = turn.published.wrapping_add(1);
        self.region.put(self.config.rank, number, piece);
        let own = self.region.line(self.config.rank);
        own.labels[(number & 1) as usize].store(label, Release);
        turn.published = number;
        self.publish(number);
        Ok(number)
    }

    fn publish(&self, number: u32) {
        self.region.line(self.config.rank).published.publish(number);
    }

    /// Waits until a rank has published the piece that this rank published last, and compares the two.
    fn await_piece(&self, turn: &Turn, rank: usize, label: u64) -> Result<(), GroupError> {
        self.wait(turn, rank, turn.published)?;
        let labels = &self.region.line(rank).labels;
        if labels[(turn.published & 1) as usize].load(Acquire) == label {
            return Ok(());
        }
        self.abort();
        Err(GroupError::Mismatch(rank))
    }

    // === waiting ===

    fn ensure_met(&self, turn: &mut Turn) -> Result<(), GroupError> {
        if let Some(error) = self.ending() {
            return Err(error);
        }
        if turn.peers.is_some() {
            return Ok(());
        }
        turn.published = HERE;
        for rank in 0..self.config.size {
            self.wait(turn, rank, HERE)?;
        }
        let pids = (0..self.config.size).map(|rank| self.region.line(rank).pid.load(Acquire));
        let peers = Peers::open(pids).map_err(|rank| self.end(&Ending::Lost(rank)))?;
        turn.peers = Some(peers);
        turn.file = None;
        Ok(())
    }

    /// Waits until a rank has published `number` pieces.
    fn wait(&self, turn: &Turn, rank: usize, number: u32) -> Result<(), GroupError> {
        let published = &self.region.line(rank).published;
        // Numbers wrap; two ranks are never more than a few pieces apart.
        let is_there = |published: u32| published.wrapping_sub(number) as i32 >= 0;
        if is_there(published.get()) {
            return Ok(());
        }
        let start = Instant::now();
        if published.spin(self.spin, is_there) {
            return Ok(());
        }
        published.asleep(|| self.sleep(turn, rank, is_there, start))
    }

    fn sleep(
        &self,
        turn: &Turn,
        rank: usize,
        is_there: impl Fn(u32) -> bool,
        start: Instant,
    ) -> Result<(), GroupError> {
        let published = &self.region.line(rank).published;
        loop {
            // Asked before the number is read: what a process published before it ended counts.
            let is_gone = turn.peers.as_ref().is_some_and(|peers| peers.is_gone(rank));
            let seen = published.look();
            if is_there(seen) {
                return Ok(());
            }
            if let Some(error) = self.ending() {
                return Err(error);
            }
            if is_gone {
                return Err(self.end(&Ending::Lost(rank)));
            }
            if start.elapsed() >= self.config.timeout {
                return Err(self.end(&Ending::Late(rank)));
            }
            published.nap(seen, NAP);
        }
    }

    /// Writes down how the group ended, unless it has ended before; tells every rank, and returns how.
    fn end(&self, ending: &Ending) -> GroupError {
        let word = self.region.ending();
        let _ = word.compare_exchange(0, ending.encode(), SeqCst, SeqCst);
        for rank in 0..self.config.size {
            self.region.line(rank).published.wake();
        }
        self.ending().unwrap_or(GroupError::Aborted)
    }
}

/// What a slot says that it holds.
const fn label(kind: Kind, bytes: usize) -> u64 {
    (bytes as u64) << 8 | kind as u64
}
