//! What a worker says about moving KV, checked.

use std::fmt;

use orchestra_core::scheduler::{KvExchange, WorkerRole};
use orchestra_proto::v1;

/// Ways to reach a worker's memory, at most.
const TRANSPORTS_MAX: usize = 8;
const TRANSPORT_NAME_BYTES_MAX: usize = 32;
const METADATA_BYTES_MAX: usize = 64 << 10;
const LAYOUT_BYTES_MAX: usize = 256;
const HOST_BYTES_MAX: usize = 128;

/// How other workers reach a worker's KV.
#[derive(Clone)]
pub(crate) struct KvTransfer {
    /// As other workers are told of it.
    peer: v1::KvPeer,
    exchange: KvExchange,
    /// What fails together with it.
    pub(super) failure_domain: String,
    /// Another worker is to keep copies of its KV.
    pub(super) writes_through: bool,
}

impl fmt::Debug for KvTransfer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Not the metadata: who has it can write the worker's memory.
        f.debug_struct("KvTransfer")
            .field("epoch", &self.peer.epoch)
            .field("exchange", &self.exchange)
            .finish_non_exhaustive()
    }
}

impl KvTransfer {
    /// Checks every field; the message names the one that is wrong.
    pub(super) fn from_wire(worker_id: &str, wire: v1::KvTransfer) -> Result<Self, String> {
        let v1::KvTransfer {
            epoch,
            metadata,
            bytes_per_block,
            layout,
            host,
            failure_domain,
            writes_through,
        } = wire;
        if metadata.is_empty() || metadata.len() > TRANSPORTS_MAX {
            return Err(format!(
                "hello.kv_transfer.metadata must name 1 to {TRANSPORTS_MAX} transports"
            ));
        }
        for (name, value) in &metadata {
            check_text("metadata", name, 1..=TRANSPORT_NAME_BYTES_MAX)?;
            if value.len() > METADATA_BYTES_MAX {
                return Err(format!(
                    "hello.kv_transfer.metadata must have at most {METADATA_BYTES_MAX} bytes for each transport"
                ));
            }
        }
        check_text("layout", &layout, 1..=LAYOUT_BYTES_MAX)?;
        check_text("host", &host, 0..=HOST_BYTES_MAX)?;
        check_text("failure_domain", &failure_domain, 0..=HOST_BYTES_MAX)?;
        if bytes_per_block == 0 {
            return Err("hello.kv_transfer.bytes_per_block must be at least 1".to_owned());
        }
        Ok(Self {
            peer: v1::KvPeer {
                worker_id: worker_id.to_owned(),
                epoch,
                metadata,
                host,
            },
            exchange: KvExchange {
                layout,
                bytes_per_block,
            },
            failure_domain,
            writes_through,
        })
    }

    pub(crate) const fn peer(&self) -> &v1::KvPeer {
        &self.peer
    }

    pub(crate) const fn exchange(&self) -> &KvExchange {
        &self.exchange
    }
}

fn check_text(
    field: &str,
    text: &str,
    bytes: std::ops::RangeInclusive<usize>,
) -> Result<(), String> {
    if !bytes.contains(&text.len()) || text.chars().any(char::is_control) {
        let (least, most) = (bytes.start(), bytes.end());
        return Err(format!(
            "hello.kv_transfer.{field} must have names of {least} to {most} bytes, without control characters"
        ));
    }
    Ok(())
}

/// What the worker is there for.
pub(super) fn role(wire: i32) -> Result<WorkerRole, String> {
    match v1::WorkerRole::try_from(wire) {
        Ok(v1::WorkerRole::Unspecified) => Ok(WorkerRole::Both),
        Ok(v1::WorkerRole::Prefill) => Ok(WorkerRole::Prefill),
        Ok(v1::WorkerRole::Decode) => Ok(WorkerRole::Decode),
        Err(_) => Err("hello.role must be one that this router knows".to_owned()),
    }
}
