//! Whether the processes of the other ranks are still there.

use std::os::fd::OwnedFd;

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, getpid, pidfd_open},
};

/// A handle of each other rank's process.
#[derive(Default)]
pub(super) struct Peers {
    handles: Vec<Option<OwnedFd>>,
}

impl Peers {
    /// Takes a handle of each process, in the order of the ranks; `Err` is a rank that is gone already.
    ///
    /// A rank of this very process (threads, in tests) needs none, and where the kernel gives none (before Linux 5.3)
    /// only the deadline finds a lost rank.
    pub(super) fn open(pids: impl Iterator<Item = u32>) -> Result<Self, usize> {
        let own = getpid();
        let open = |(rank, pid): (usize, u32)| {
            let pid = Pid::from_raw(pid as i32).filter(|pid| *pid != own);
            match pid.map(|pid| pidfd_open(pid, PidfdFlags::empty())) {
                Some(Ok(handle)) => Ok(Some(handle)),
                Some(Err(rustix::io::Errno::SRCH)) => Err(rank),
                _ => Ok(None),
            }
        };
        let handles = pids.enumerate().map(open).collect::<Result<_, _>>()?;
        Ok(Self { handles })
    }

    /// Whether a rank's process has ended, also where its parent has not taken notice yet.
    pub(super) fn is_gone(&self, rank: usize) -> bool {
        let Some(Some(handle)) = self.handles.get(rank) else {
            return false;
        };
        let at_once = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let mut asked = [PollFd::new(handle, PollFlags::IN)];
        poll(&mut asked, Some(&at_once)).is_ok_and(|ended| ended > 0)
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_killed_process_is_gone_before_its_parent_looks() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let peers = Peers::open([std::process::id(), child.id()].into_iter()).unwrap();
        assert!(!peers.is_gone(0) && !peers.is_gone(1));
        child.kill().unwrap();
        while !peers.is_gone(1) {
            std::thread::yield_now();
        }
        let pid = child.id();
        child.wait().unwrap();
        assert_eq!(Peers::open([pid].into_iter()).map(drop), Err(0));
    }
}
