//! What a process of ours does to itself at start.

use orchestra_router::{
    RouterConfig,
    config::{LogConfig, LogFormat},
    logging,
};
use pyo3::prelude::*;

use crate::errors::Failure;

/// Sends the Rust side's logs to standard error: `filter` is a level, or directives such as
/// `info,orchestra_agent=debug`. Importing `orchestra` alone prints nothing. A second call changes nothing.
#[pyfunction]
#[pyo3(signature = (filter = "info", *, json = false))]
pub(crate) fn init_logging(filter: &str, json: bool) -> PyResult<()> {
    let format = if json {
        LogFormat::Json
    } else {
        LogFormat::Text
    };
    let log = LogConfig {
        filter: filter.to_owned(),
        format,
    };
    let config = RouterConfig {
        log,
        ..RouterConfig::default()
    };
    config
        .validate()
        .map_err(|issues| Failure::config(&issues))?;
    logging::init(&config.log);
    Ok(())
}

/// Asks the kernel to end this process when the one that started it ends, however that ends.
///
/// With `SIGKILL`: it is the backstop for a parent that had no time to stop its children in order, and a child may
/// hang in a collective where it would not notice anything milder.
#[pyfunction]
pub(crate) fn die_with_parent(parent_pid: i32) -> PyResult<()> {
    imp::die_with_parent(parent_pid)
}

/// Makes this process the parent of those whose own parent ends and who descend from it, or leaves them to another.
#[pyfunction]
pub(crate) fn adopt_orphans(adopts: bool) -> PyResult<()> {
    imp::adopt_orphans(adopts)
}

#[cfg(target_os = "linux")]
mod imp {
    use pyo3::prelude::*;
    use rustix::process::{
        Pid, Signal, getpid, getppid, kill_process, set_child_subreaper,
        set_parent_process_death_signal,
    };

    pub(super) fn adopt_orphans(adopts: bool) -> PyResult<()> {
        // What is passed means no process: zero or not is what counts.
        Ok(set_child_subreaper(adopts.then(getpid)).map_err(std::io::Error::from)?)
    }

    pub(super) fn die_with_parent(parent_pid: i32) -> PyResult<()> {
        set_parent_process_death_signal(Some(Signal::KILL)).map_err(std::io::Error::from)?;
        // The parent may have ended before the line above: then its death is not signalled any more.
        if getppid() != Pid::from_raw(parent_pid) {
            kill_process(getpid(), Signal::KILL).map_err(std::io::Error::from)?;
        }
        Ok(())
    }
}

#[cfg(not(target_os = "linux"))]
mod imp {
    use orchestra_core::ErrorCode;
    use pyo3::prelude::*;

    use crate::errors::Failure;

    pub(super) fn adopt_orphans(_adopts: bool) -> PyResult<()> {
        unsupported("only Linux gives orphans to a process that asks for them")
    }

    pub(super) fn die_with_parent(_parent_pid: i32) -> PyResult<()> {
        unsupported("only Linux ends a process with the one that started it")
    }

    fn unsupported(message: &str) -> PyResult<()> {
        Err(Failure::new(ErrorCode::Unsupported, message).into())
    }
}
