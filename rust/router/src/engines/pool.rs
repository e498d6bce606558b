//! Connections to one engine that wait for their next request.

use parking_lot::Mutex;

use super::wire::Connection;

/// Idle connections that are kept; one more is closed.
const IDLE_MAX: usize = 256;

/// The idle connections of one engine. The one used last is taken first, so that those beyond the need fall idle long
/// enough for the engine to close them.
#[derive(Default)]
pub(crate) struct Pool(Mutex<Vec<Connection>>);

impl Pool {
    /// An idle connection that is still open. Those that the engine has closed meanwhile are dropped.
    pub(crate) fn take(&self) -> Option<Connection> {
        loop {
            let mut connection = self.0.lock().pop()?;
            if connection.is_open() {
                return Some(connection);
            }
        }
    }

    /// Keeps a connection for the next request, if it may carry one.
    pub(crate) fn put(&self, mut connection: Connection) {
        if !connection.is_reusable() {
            return;
        }
        connection.rest();
        let mut idle = self.0.lock();
        if idle.len() < IDLE_MAX {
            idle.push(connection);
        }
    }

    /// Drops those that the engine has closed.
    pub(crate) fn sweep(&self) {
        self.0.lock().retain_mut(Connection::is_open);
    }

    /// Closes all.
    pub(crate) fn clear(&self) {
        let closed = std::mem::take(&mut *self.0.lock());
        drop(closed);
    }
}
