//! What peers may do here, and what they have granted.

use std::{sync::Arc, time::Duration};

use orchestra_core::Time;
use orchestra_memory::{self as memory, Lease, MemoryError, PeerId, Rights};
use pyo3::{prelude::*, types::PyBytes};

use super::{
    blocks::BlockSet,
    hub::{Hub, seconds},
};
use crate::errors::Failure;

pub(super) const fn rights_name(rights: Rights) -> &'static str {
    match rights {
        Rights::Read => "read",
        Rights::Write => "write",
    }
}

/// What a peer may do with blocks of this process, as their owner keeps it. It outlives this object.
#[pyclass(frozen, module = "orchestra._core")]
pub(crate) struct Grant {
    hub: Arc<Hub>,
    peer: PeerId,
    given: memory::RemoteGrant,
}

impl Grant {
    pub(super) fn give(
        hub: &Arc<Hub>,
        blocks: &BlockSet,
        to: &str,
        rights: &str,
        ttl_s: f64,
    ) -> Result<Self, Failure> {
        let manager = hub.manager()?;
        blocks.check_hub(hub)?;
        let rights = match rights {
            "read" => Rights::Read,
            "write" => Rights::Write,
            _ => {
                return Err(Failure::invalid(
                    "rights",
                    "rights must be \"read\" or \"write\"",
                ));
            }
        };
        let lease = Lease {
            peer: hub.peer(to)?,
            rights,
            lasts: seconds("ttl", ttl_s)?,
        };
        let handles = blocks.handles(0, None)?;
        let given = manager
            .grant(blocks.pool(), &handles, lease, hub.driver.now())
            .map_err(|refused| match refused {
                MemoryError::InvalidField { .. } => {
                    let most = hub.limits.max_lease.as_secs_f64();
                    Failure::invalid("ttl", format!("ttl must be above 0 and at most {most} s"))
                }
                refused => refused.into(),
            })?;
        // It ends by itself, which the driver has to know.
        hub.driver.ring();
        Ok(Self {
            hub: Arc::clone(hub),
            peer: lease.peer,
            given,
        })
    }
}

#[pymethods]
impl Grant {
    #[getter]
    fn id(&self) -> u64 {
        self.given.id.0
    }

    #[getter]
    fn rights(&self) -> &'static str {
        rights_name(self.given.rights)
    }

    #[getter]
    fn num_blocks(&self) -> usize {
        self.given.blocks.len()
    }

    /// What the peer needs, with the time that is left of it now.
    fn encode<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.given.encode(self.hub.driver.now()))
    }

    /// Ends it before its time. Blocks that the peer may still write wait for proof that it does not.
    fn revoke(&self, py: Python<'_>) -> PyResult<()> {
        Ok(py
            .detach(|| -> Result<(), Failure> { Ok(self.hub.manager()?.revoke(self.given.id)?) })?)
    }

    /// Ends it on the peer's word, by whatever way that came, that nothing of it is under way.
    fn settle(&self, py: Python<'_>) -> PyResult<()> {
        Ok(py.detach(|| -> Result<(), Failure> {
            Ok(self.hub.manager()?.settle(self.given.id, self.peer)?)
        })?)
    }
}

/// What a peer has granted to this process.
#[pyclass(frozen, module = "orchestra._core")]
pub(crate) struct RemoteGrant {
    hub: Arc<Hub>,
    grant: memory::RemoteGrant,
    owner: String,
}

impl RemoteGrant {
    pub(super) fn open(
        hub: &Arc<Hub>,
        data: &[u8],
        owner: &str,
        age_s: f64,
    ) -> Result<Self, Failure> {
        let age = seconds("asked", age_s.max(0.0))?;
        let now = hub.driver.now().since(Time::ZERO);
        // Asked before this clock began: then less of it is left than can be said, which is taken off its end.
        let (asked, before) = (now.saturating_sub(age), age.saturating_sub(now));
        let asked = Time::ZERO + asked;
        let max_blocks = hub.limits.max_blocks_per_grant;
        let mut grant = memory::RemoteGrant::decode(data, hub.peer(owner)?, asked, max_blocks)?;
        grant.expires = Time::ZERO + grant.expires.since(Time::ZERO).saturating_sub(before);
        Ok(Self {
            hub: Arc::clone(hub),
            grant,
            owner: owner.to_owned(),
        })
    }

    pub(super) const fn grant(&self) -> &memory::RemoteGrant {
        &self.grant
    }

    /// Whether it was opened by this manager: peers have other numbers in another.
    pub(super) fn check_hub(&self, hub: &Arc<Hub>) -> Result<(), MemoryError> {
        let is_ours = Arc::ptr_eq(&self.hub, hub);
        is_ours.then_some(()).ok_or(MemoryError::UnknownPeer)
    }
}

#[pymethods]
impl RemoteGrant {
    #[getter]
    fn id(&self) -> u64 {
        self.grant.id.0
    }

    #[getter]
    fn owner(&self) -> &str {
        &self.owner
    }

    #[getter]
    fn rights(&self) -> &'static str {
        rights_name(self.grant.rights)
    }

    #[getter]
    fn num_blocks(&self) -> usize {
        self.grant.blocks.len()
    }

    #[getter]
    fn block_bytes(&self) -> u64 {
        self.grant.block_bytes
    }

    /// Seconds that are left of it.
    #[getter]
    fn expires_in(&self) -> f64 {
        let left: Duration = self.grant.expires.since(self.hub.driver.now());
        left.as_secs_f64()
    }
}
