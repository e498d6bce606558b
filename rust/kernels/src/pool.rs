//! Threads to compute on: torch's own.
//!
//! Torch computes on the OpenMP threads of GNU's library, which spin for a while after each piece of work. A second pool
//! beside them would have to share the cores with that, so kernels run on the same threads. The library's entry is
//! looked up in the process; where it is not there (another OpenMP, a test), the caller computes alone.

#![expect(unsafe_code, reason = "calls into the OpenMP library of the process")]

use std::{
    ffi::{c_uint, c_void},
    io,
    sync::{
        OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
};

use rustix::thread::{CpuSet, sched_setaffinity};

/// `GOMP_parallel` of libgomp, which compilers call for `#pragma omp parallel`: runs the function with the data on so
/// many threads, and returns when all have returned.
type Parallel = unsafe extern "C" fn(extern "C" fn(*mut c_void), *mut c_void, c_uint, c_uint);

/// Runs `work` on up to `threads` threads at a time; each call of it has to take its share from what is left.
pub(crate) fn run(threads: u32, work: &(dyn Fn() + Sync)) {
    let Some(parallel) = entry().filter(|_| threads > 1) else {
        work();
        return;
    };
    let mut data: &(dyn Fn() + Sync) = work;
    // SAFETY: the symbol has this signature in every version of the library. `data` outlives the call, which returns
    // when every thread has, and each thread only reads it.
    unsafe { parallel(enter, (&raw mut data).cast(), threads, 0) }
}

/// Does each piece of work from 0 to `count` once, on up to `threads` threads; each thread `begin`s with what it needs.
pub(crate) fn share<S>(
    count: usize,
    threads: u32,
    begin: impl Fn() -> S + Sync,
    each: impl Fn(&mut S, usize) + Sync,
) {
    let next = AtomicUsize::new(0);
    let threads = threads.min(u32::try_from(count).unwrap_or(u32::MAX));
    run(threads, &|| {
        let mut state = None;
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= count {
                return;
            }
            each(state.get_or_insert_with(&begin), index);
        }
    });
}

/// As [`share`], of several works, of so many pieces each: which work, and which piece of it.
pub(crate) fn share_all<S>(
    counts: impl Iterator<Item = usize>,
    threads: u32,
    begin: impl Fn() -> S + Sync,
    each: impl Fn(&mut S, (usize, usize)) + Sync,
) {
    let mut total = 0;
    // The first piece of each.
    let starts: Vec<usize> = counts
        .map(|count| {
            total += count;
            total - count
        })
        .collect();
    share(total, threads, begin, |state, index| {
        // Of those that begin where it does the last one: the others have no pieces.
        let at = starts.partition_point(|start| *start <= index) - 1;
        each(state, (at, index - starts[at]));
    });
}

/// Keeps the threads that compute, the caller's and those beside it, on some cores.
///
/// # Errors
/// [`io::Error`] where the system does not let them; those that it did stay there.
pub fn bind(threads: u32, cores: &[usize]) -> io::Result<()> {
    let mut set = CpuSet::new();
    for core in cores {
        if *core >= CpuSet::MAX_CPU {
            let message = format!("core {core} of at most {}", CpuSet::MAX_CPU);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        set.set(*core);
    }
    let failed = OnceLock::new();
    run(threads, &|| {
        if let Err(error) = sched_setaffinity(None, &set) {
            failed.get_or_init(|| error);
        }
    });
    failed
        .into_inner()
        .map_or(Ok(()), |error| Err(error.into()))
}

/// Whether there are threads besides the caller's.
pub fn has_threads() -> bool {
    entry().is_some()
}

/// Runs on each thread. A panic in `work` ends the process here: it cannot pass through the library.
extern "C" fn enter(data: *mut c_void) {
    // SAFETY: `run` hands this pointer out, and waits.
    let work = unsafe { *data.cast::<&(dyn Fn() + Sync)>() };
    work();
}

fn entry() -> Option<Parallel> {
    static ENTRY: OnceLock<Option<Parallel>> = OnceLock::new();
    *ENTRY.get_or_init(|| {
        let process = libloading::os::unix::Library::this();
        // SAFETY: the type is the function's, see above.
        let found = unsafe { process.get::<Parallel>(b"GOMP_parallel\0") };
        // The library stays: torch never unloads it.
        found.ok().map(|symbol| *symbol)
    })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use parking_lot::Mutex;
    use rustix::thread::sched_getaffinity;

    use super::*;

    #[test]
    fn threads_stay_on_their_cores() {
        let anywhere = sched_getaffinity(None).unwrap();
        let core = (0..CpuSet::MAX_CPU).find(|core| anywhere.is_set(*core));
        let bound = std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                bind(1, &[core.unwrap()]).unwrap();
                sched_getaffinity(None).unwrap()
            });
            thread.join().unwrap()
        });
        assert_eq!(bound.count(), 1);
        assert!(bound.is_set(core.unwrap()));
        // Others are where they were.
        assert_eq!(sched_getaffinity(None).unwrap(), anywhere);
    }

    #[test]
    fn cores_that_are_not_there_are_refused() {
        assert!(bind(1, &[CpuSet::MAX_CPU]).is_err());
        assert!(bind(1, &[CpuSet::MAX_CPU - 1]).is_err());
    }

    #[test]
    fn every_piece_of_every_work_is_done_once() {
        let counts = [0, 3, 0, 0, 2, 1, 0];
        let done = Mutex::new(Vec::new());
        let note = |(): &mut (), piece| done.lock().push(piece);
        share_all(counts.into_iter(), 2, || (), note);
        let mut done = done.into_inner();
        done.sort_unstable();
        assert_eq!(done, [(1, 0), (1, 1), (1, 2), (4, 0), (4, 1), (5, 0)]);
    }

    #[test]
    fn work_is_done_without_a_library_too() {
        let calls = AtomicUsize::new(0);
        run(4, &|| {
            calls.fetch_add(1, Ordering::Relaxed);
        });
        let expected = if has_threads() { 4 } else { 1 };
        assert_eq!(calls.into_inner(), expected);
    }
}
